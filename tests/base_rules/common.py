"""One task under every base optimizer that has a fused step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from gam_fused import GAM, kernels

FUSING = [name for name, reason in kernels.available().items() if reason is None and name in ("native", "reference")]
fusing = pytest.mark.parametrize("backend", FUSING)

BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (SGD, {"lr": 0.1}),
    "momentum": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01}),
    "nesterov": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "maximize": (SGD, {"lr": 0.01, "momentum": 0.9, "maximize": True}),
    "Adam": (Adam, {"lr": 0.02, "weight_decay": 0.1}),
    "amsgrad": (Adam, {"lr": 0.02, "amsgrad": True}),
    "AdamW": (AdamW, {"lr": 0.02, "weight_decay": 0.1}),
}
bases = pytest.mark.parametrize("base", BASES)


class Task:
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(3)
        # No bias before BatchNorm: its gradient is rounding noise, of which Adam makes steps of full length.
        self.model = nn.Sequential(nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 3)).to(dtype)
        self.inputs, self.labels = torch.randn(16, 5, dtype=dtype), torch.randint(3, (16,))
        self.poison: float | None = None

    def loss(self) -> Tensor:
        loss = F.cross_entropy(self.model(self.inputs), self.labels)
        return loss if self.poison is None else loss * self.poison

    def gam(self, base: str, backend: str, **options: Any) -> GAM:
        cls, base_options = BASES[base]
        groups = [
            {"params": list(self.model[0].parameters()), "rho": 0.05},
            {"params": [p for layer in self.model[1:] for p in layer.parameters()], "lr": 0.03},
        ]
        shared = {"rho": 0.1, "alpha": 0.4, "model": self.model, "backend": backend}
        return GAM(groups, cls, **{**shared, **base_options, **options})


def assert_same_course(task: Task, twin: Task, fused: GAM, plain: GAM) -> None:
    for param, other in zip(task.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(param, other, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(param.grad, other.grad, rtol=1e-11, atol=1e-13)
    states = [gam.base_optimizer.state_dict()["state"] for gam in (fused, plain)]
    torch.testing.assert_close(*states, rtol=1e-11, atol=1e-13, check_dtype=False)
