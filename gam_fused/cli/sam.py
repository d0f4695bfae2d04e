"""Sharpness-Aware Minimization, the baseline that GAM is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gam_fused.replay import Replay

_TINY = 1e-12


class SAM:
    """SAM (Foret et al., ICLR 2021, arXiv 2010.01412) around any base optimizer.

    One step::

        θ_adv = θ + ρ ∇L(θ) / ‖∇L(θ)‖
        θ     ← the base optimizer's step from θ with ∇L(θ_adv)

    The norm is over all parameters of all groups. Both passes see the same dropout masks, and BatchNorm statistics
    advance once per step, as in GAM, so that a comparison of the two compares the algorithms and nothing else.

    ``base_optimizer`` holds all state; ``rho`` joins its param groups. ``model`` is the module whose buffers are kept.
    """

    def __init__(self, base_optimizer: Optimizer, rho: float, model: nn.Module) -> None:
        self.base_optimizer = base_optimizer
        self._model = model
        for group in base_optimizer.param_groups:
            group["rho"] = rho

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base_optimizer.param_groups

    def zero_grad(self) -> None:
        self.base_optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base_optimizer.load_state_dict(state_dict)

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """One step; returns the loss at θ. ``closure`` zeroes gradients, runs the model and calls ``backward()``."""
        replay = Replay(self._model, [param for group in self.param_groups for param in group["params"]])
        with torch.enable_grad():
            loss = _one_pass(replay, closure)
            backups = self._ascend()
            try:
                _one_pass(replay, closure)
            finally:
                self._restore(backups)
                replay.finish()
        self.base_optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def _ascend(self) -> dict[Tensor, Tensor]:
        """Move to θ_adv; returns a copy of θ, since subtracting the perturbation again would not restore it exactly."""
        moved = [
            (param, param.grad, group["rho"])
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None
        ]
        norm = torch.nn.utils.get_total_norm([grad for _, grad, _ in moved])
        backups = {param: param.clone() for param, _, _ in moved}
        for param, grad, rho in moved:
            param.add_(grad * (rho / (norm + _TINY)))
        return backups

    @torch.no_grad()
    def _restore(self, backups: dict[Tensor, Tensor]) -> None:
        for param, backup in backups.items():
            param.copy_(backup)


def _one_pass(replay: Replay, closure: Callable[[], Tensor]) -> Tensor:
    replay.begin_pass()
    loss = closure()
    replay.end_pass()
    return loss
