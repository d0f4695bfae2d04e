"""From the adversarial point back to θ and along the combined gradient: the half of a step that writes for good."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gam_fused.base_rules import fused_step, has_fused_rule
from gam_fused.closures import Evaluation
from gam_fused.interrupts import uninterrupted
from gam_fused.kernels.grouping import buckets, global_norm, take
from gam_fused.kernels.interface import FusingBackend, accumulation_dtype
from gam_fused.kernels.rounding import seeds
from gam_fused.kernels.rules import Descent
from gam_fused.transaction import Transaction
from gam_fused.wrapping import OptimizerWrapper


@dataclass
class Active:
    """The parameters that have a gradient in this step; all others are left alone."""

    indices: list[int]
    params: list[Tensor]
    groups: list[dict[str, Any]]
    keys: dict[str, str]

    def of(self, evaluation: Evaluation) -> list[Tensor]:
        """Their gradients, zero where the loss at this point does not depend on a parameter."""
        total = evaluation.gradients.total
        return [
            torch.zeros_like(param) if (grad := total[i]) is None else grad
            for i, param in zip(self.indices, self.params, strict=True)
        ]

    def values(self, name: str) -> list[float]:
        """The hyper-parameter of that name, of each."""
        return [group[self.keys[name]] for group in self.groups]

    @property
    def maximizes(self) -> list[bool]:
        """Whether the base optimizer maximizes, of each."""
        return [group.get("maximize", False) for group in self.groups]

    @property
    def rhos(self) -> list[float]:
        """ρ of each."""
        return self.values("rho")

    @property
    def xis(self) -> list[float]:
        """ξ of each."""
        return self.values("xi")

    @property
    def penalties(self) -> list[tuple[float, float, float]]:
        """(ρ, α, ξ) of each. A base optimizer that maximizes L is given g − α h to negate, so that flatness falls."""
        alphas = [-a if up else a for a, up in zip(self.values("alpha"), self.maximizes, strict=True)]
        return list(zip(self.rhos, alphas, self.xis, strict=True))


@dataclass
class Landing:
    """What is left to do once all points have been differentiated: restore, combine, step.

    The combined gradient is grads + α ρ / (adversarial_norm + ξ) · hvps.
    """

    active: Active
    penalties: list[tuple[float, float, float]]
    """(ρ, α, ξ) of each active parameter."""
    backups: list[Tensor]
    grads: list[Tensor]
    hvps: list[Tensor]
    adversarial_norm: Tensor

    def descent(
        self,
        at: list[int],
        rho: float,
        alpha: float,
        xi: float,
        *,
        guards: Sequence[Tensor] = (),
        rounding_seed: Callable[[], int | None] = lambda: None,
    ) -> Descent:
        """That of the parameters at these indices."""
        lists = (take(tensors, at) for tensors in (self.active.params, self.backups, self.grads, self.hvps))
        params, backups, grads, hvps = lists
        norm, seed = self.adversarial_norm, rounding_seed()
        return Descent(params, backups, grads, hvps, norm, rho, alpha, xi, guards, rounding_seed=seed)

    def overflow(self, grad_norm: Tensor, hvp_norm: Tensor) -> list[Tensor]:
        """0-d tensors, not finite where g + α ρ / (‖g_adv‖ + ξ) · H(θ_adv) g_adv may overflow its dtype.

        No element of the sum is larger than the sum of the norms. In float16, norms of gradients that are well in range
        may not be: there the largest elements are looked for.
        """
        limits = []
        for (_, dtype, rho, alpha, xi), at in buckets(self.active.params, self.penalties).items():
            norm = self.adversarial_norm.to(accumulation_dtype(dtype))  # as a launch is given it
            g, h = grad_norm, hvp_norm
            if dtype == torch.float16:
                g, h = (_largest(take(tensors, at)).to(norm.device) for tensors in (self.grads, self.hvps))
            bound = g + abs(alpha) * rho / (norm + xi) * h
            limits += [norm, torch.where(bound < torch.finfo(dtype).max, 0.0, torch.inf)]
        return limits


class LandingOptimizer(OptimizerWrapper):
    """An optimizer whose steps end with the base optimizer's, along a combined gradient, if everything is finite."""

    rounding: str
    """How parameters are rounded, see :class:`gam_fused.GAM`."""

    def _transaction(self, *, keep_random_states: bool = True) -> Transaction:
        return Transaction(
            self._kernels,
            *self._trainable(),
            self.model,
            keep_random_states=keep_random_states,
            rounding_seeds=seeds(self.steps) if self.rounding == "stochastic" else None,
        )

    def _land(
        self, transaction: Transaction, landing: Landing, guards: list[Tensor], grad_norm: Tensor, hvp_norm: Tensor
    ) -> None:
        """Restore θ and let the base optimizer step along the combined gradient, if all ``guards`` (0-d) are finite."""
        with uninterrupted():
            if not self._has_fused_rule(landing):
                self._descend_by_combining(transaction, landing, guards)
                return
            overflow = landing.overflow(grad_norm, hvp_norm)
            if self._guards_on_device(transaction, landing.active):
                self._descend_on_device(transaction, landing, [*guards, *overflow])
            elif all_finite([*guards, *overflow]):
                self._finish_replay(transaction)
                self._fused_step(transaction, landing)
                self._commit_fused(transaction)
            else:  # or perhaps finite after all: the long way looks at every element
                self._descend_by_combining(transaction, landing, guards)

    def _descend_by_combining(self, transaction: Transaction, landing: Landing, guards: list[Tensor]) -> None:
        """In two launches, for any base optimizer: restore and combine; then the base optimizer's own step."""
        self._restore_and_combine(transaction, landing)
        # Whatever is not finite in a Hessian-vector product is not finite in the combined gradient either.
        if all_finite([*guards, global_norm(self._kernels, landing.grads)]):
            self._step_base(transaction, landing.active.params, landing.grads)
        else:
            self._skip(transaction)

    def _descend_on_device(self, transaction: Transaction, landing: Landing, guards: list[Tensor]) -> None:
        """In launches that do nothing but restore where a guard is not finite: the host never waits to learn it."""
        is_finite = _finite(guards)
        skipped_steps = self.metrics["skipped_steps"]
        skipped_steps = skipped_steps + ~is_finite.to(skipped_steps.device)
        self._finish_replay(transaction, is_finite)
        # One verdict for all launches, whatever their dtypes make of the guards.
        self._fused_step(transaction, landing, [torch.where(is_finite, 0.0, torch.inf)])
        self._commit_fused(transaction, skipped_steps)

    def _fused_step(self, transaction: Transaction, landing: Landing, guards: Sequence[Tensor] = ()) -> None:
        assert isinstance(self._kernels, FusingBackend)  # as _has_fused_rule has found
        active = landing.active
        descent = partial(landing.descent, guards=guards, rounding_seed=transaction.rounding_seed)
        fused_step(self._kernels, self.base_optimizer, active.params, active.groups, landing.penalties, descent)
        transaction.forget_moves()

    def _has_fused_rule(self, landing: Landing) -> bool:
        # Without a flatness term, the base optimizer's own step: GAM is then the base optimizer to the bit.
        has_flatness = any(rho * alpha for rho, alpha, _ in landing.penalties)
        active = landing.active
        return has_flatness and has_fused_rule(self._kernels, self.base_optimizer, active.params, active.groups)

    def _guards_on_device(self, transaction: Transaction, active: Active) -> bool:
        """Whether the host must not wait, and buffers can follow a decision that it does not know."""
        return not transaction.replay.rebinds and any(param.device.type != "cpu" for param in active.params)

    def _descend_by_gradient(self, transaction: Transaction, at_theta: Evaluation) -> None:
        """Let the base optimizer step along g."""
        active = self._active(transaction, at_theta)
        grads = active.of(at_theta)
        grad_norm = global_norm(self._kernels, grads)
        self.metrics.update(loss=at_theta.loss, grad_norm=grad_norm)
        with uninterrupted():
            if all_finite([at_theta.loss, grad_norm]):
                self._step_base(transaction, active.params, grads)
            else:
                self._skip(transaction)

    def _restore_and_combine(self, transaction: Transaction, landing: Landing) -> None:
        for (_, _, rho, alpha, xi), at in buckets(landing.active.params, landing.penalties).items():
            part = landing.descent(at, rho, alpha, xi)
            self._kernels.combine_(
                part.params, part.backups, part.grads, part.hvps, part.adversarial_norm, rho, alpha, xi
            )
        transaction.forget_moves()

    def _active(self, transaction: Transaction, evaluation: Evaluation) -> Active:
        indices = [i for i, grad in enumerate(evaluation.gradients.total) if grad is not None]
        return Active(indices, take(transaction.params, indices), take(transaction.groups, indices), self.keys)


def _largest(tensors: Sequence[Tensor]) -> Tensor:
    """The largest magnitude, as float32."""
    with_elements = [tensor for tensor in tensors if tensor.numel()]
    if not with_elements:
        return torch.zeros((), dtype=torch.float32, device=tensors[0].device)
    return torch.stack(torch._foreach_norm(with_elements, torch.inf)).max().float()


def _finite(values: Sequence[Tensor]) -> Tensor:
    """Whether all of them are: 0-d, on the first one's device."""
    device = values[0].device
    # In one tensor, of the widest of their dtypes: one look at all instead of one at each.
    return torch.isfinite(torch.stack([value.to(device) for value in values])).all()


def all_finite(values: Sequence[Tensor]) -> bool:
    """The guard: one read on the host."""
    return bool(_finite(values))
