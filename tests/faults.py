"""A step in which faults can be planted: what it is of, in which modes, around which base optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gam_fused import GAM, AcceleratedGAM, kernels
from tests.states import assert_same, snapshot

BACKENDS = sorted(name for name, reason in kernels.available().items() if reason is None)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
    # PyTorch's default eps of 1e-8 is 0 in float16, and 0/0 no matter of ours.
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "eps": 1e-3}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5, "eps": 1e-3}),
}

MODES: dict[str, tuple[type[GAM] | type[AcceleratedGAM], dict[str, Any]]] = {
    "exact": (GAM, {"rho": 0.05, "alpha": 0.3}),
    "finite_difference": (GAM, {"rho": 0.05, "alpha": 0.3, "hvp": "finite_difference"}),
    "accelerated": (AcceleratedGAM, {"rho": 0.05, "gamma": 0.3}),
}

over_backends = pytest.mark.parametrize("backend", BACKENDS)
over_modes = pytest.mark.parametrize("mode", MODES)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
over_bases = pytest.mark.parametrize("base", BASES)


class Task:
    """A network with BatchNorm, dropout, an unused layer and a tap, on one batch; faults can be planted in any pass.

    A fault stands at (pass, stage): pass 1 is at θ, pass 2 at θ_adv (of four passes, the third); the stages of the
    tapped activation are its forward, its backward and the backward of its backward.
    """

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(7)
        self.first = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.GELU())
        self.last = nn.Sequential(nn.Dropout(0.2), nn.Linear(12, 3))
        self.model = nn.ModuleDict({"first": self.first, "last": self.last, "unused": nn.Linear(2, 2)}).to(dtype)
        self.inputs = torch.randn(24, 6, dtype=dtype)
        self.labels = torch.randint(3, (24,))
        self.fault: tuple[int, str] | None = None
        self.action: Callable[[Tensor], Tensor] = lambda tensor: tensor
        self.passes = 0

    def closure(self) -> Tensor:
        self.passes += 1
        at = self.passes
        hidden = Tap.apply(self.first(self.inputs), lambda stage, tensor: self._meet((at, stage), tensor))
        return self._meet((at, "loss"), F.cross_entropy(self.last(hidden), self.labels))

    def _meet(self, where: tuple[int, str], tensor: Tensor) -> Tensor:
        return self.action(tensor) if where == self.fault else tensor

    def step(self, optimizer: GAM | AcceleratedGAM, fault: tuple[int, str] | None = None, action: Any = None) -> Tensor:
        self.passes, self.fault = 0, fault
        if action is not None:
            self.action = action
        return optimizer.step(self.closure)


class Tap(torch.autograd.Function):
    """The identity, with a visitor to its forward, backward and double backward."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, visit: Callable[[str, Tensor], Tensor]) -> Tensor:
        ctx.visit = visit
        return visit("forward", tensor.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _TapBackward.apply(grad, ctx.visit), None


class _TapBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, visit: Callable[[str, Tensor], Tensor]) -> Tensor:
        ctx.visit = visit
        return visit("backward", grad.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.visit("double backward", grad.clone()), None


class Planted(Exception):
    """A fault that a test has planted."""


def raise_planted(tensor: Tensor) -> Tensor:
    raise Planted


def raise_interrupt(tensor: Tensor) -> Tensor:
    raise KeyboardInterrupt


def raise_exit(tensor: Tensor) -> Tensor:
    raise SystemExit(3)


def build(task: Task, backend: str, base: str = "sgd", mode: str = "exact", **kwargs: Any) -> Any:
    base_class, base_kwargs = BASES[base]
    wrapper, wrapper_kwargs = MODES[mode]
    return wrapper(
        task.model.parameters(),
        base_class,
        **{**wrapper_kwargs, "model": task.model, "backend": backend, **base_kwargs, **kwargs},
    )


def assert_equals_an_undisturbed_twin(task: Task, optimizer: Any, backend: str, mode: str = "exact") -> None:
    """After two steps from seed 1, and whatever else was undone between them."""
    after = snapshot(task.model, optimizer)
    twin = Task()
    twin_optimizer = build(twin, backend, mode=mode)
    torch.manual_seed(1)
    twin.step(twin_optimizer)
    twin.step(twin_optimizer)
    assert_same(snapshot(twin.model, twin_optimizer), after)
