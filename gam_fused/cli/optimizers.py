"""From a config to an optimizer."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from gam_fused import GAM, AcceleratedGAM
from gam_fused.cli.config import RunConfig
from gam_fused.cli.errors import CommandError
from gam_fused.cli.sam import SAM

# What the two kinds of GAM are given of a config.
_SETTINGS: dict[str, tuple[type[GAM] | type[AcceleratedGAM], tuple[str, ...]]] = {
    "gam": (GAM, ("rho", "alpha", "hvp", "backend", "interval")),
    "accelerated-gam": (
        AcceleratedGAM,
        ("rho", "rho_prime", "alpha", "beta", "gamma", "form", "backend", "interval"),
    ),
}

BASE_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


class TrainingOptimizer(Protocol):
    """What the training loop asks of an optimizer: PyTorch's convention for closures that call ``backward()``.

    PyTorch declares that closures return floats and lets them return tensors; hence the ``Any``.
    """

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def zero_grad(self) -> None: ...

    def step(self, closure: Any) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def build_optimizer(config: RunConfig, model: nn.Module) -> TrainingOptimizer:
    """The optimizer that ``config`` describes, over all parameters of ``model``.

    Raises :class:`CommandError` if GAM refuses its settings, for example a back end that cannot run here.
    """
    groups = _decay_groups(model, config.weight_decay)
    base_optimizer = BASE_OPTIMIZERS[config.base]
    settings: dict[str, Any] = {"lr": config.lr}
    if config.momentum is not None:
        settings["momentum"] = config.momentum
    if config.optimizer == "sam":
        assert config.rho is not None
        return SAM(base_optimizer(groups, **settings), config.rho, model)
    if config.optimizer in _SETTINGS:
        optimizer, names = _SETTINGS[config.optimizer]
        settings.update({name: getattr(config, name) for name in names})
        try:
            return optimizer(groups, base_optimizer, model=model, **settings)
        except (ValueError, RuntimeError) as error:
            raise CommandError(f"{optimizer.__name__}: {error}") from error
    return base_optimizer(groups, **settings)


def _decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for weight matrices and kernels only: decaying biases and normalisation gains serves no purpose."""
    params = list(model.parameters())
    return [
        {"params": [param for param in params if param.dim() > 1], "weight_decay": weight_decay},
        {"params": [param for param in params if param.dim() <= 1], "weight_decay": 0.0},
    ]
