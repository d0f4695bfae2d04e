"""What operators take together: four gradients to mix; a fused step's start, its base rule and the rule's state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

TensorList = Sequence[Tensor]


@dataclass(frozen=True)
class FourGradients:
    """The gradients of an accelerated step, and what mixes them: h⁺ = w₁ g1 + w₃ g3 and h⁻ = w₀ g0 + w₂ g2.

    Args:
        grads: g0 = ∇L(θ).
        grads_ahead: g1, a step along g0 ahead of θ.
        adversarial_grads: g2 = ∇L(θ_adv).
        adversarial_grads_ahead: g3, a step along g2 ahead of θ_adv.
        weights: w₀, w₁, w₂ and w₃.
    """

    grads: TensorList
    grads_ahead: TensorList
    adversarial_grads: TensorList
    adversarial_grads_ahead: TensorList
    weights: tuple[float, float, float, float]

    @property
    def lists(self) -> dict[str, TensorList]:
        """Its lists by name, in the order in which operators take them."""
        return {
            "grads": self.grads,
            "grads_ahead": self.grads_ahead,
            "adversarial_grads": self.adversarial_grads,
            "adversarial_grads_ahead": self.adversarial_grads_ahead,
        }


@dataclass(frozen=True)
class Descent:
    """The parameters at θ_adv, and what leads from there to the combined gradient at θ.

    Args:
        params: θ_adv; written.
        backups: θ.
        grads: g; with ``write_grads``, written.
        hvps: H(θ_adv) g_adv.
        adversarial_norm: ‖g_adv‖, 0-d.
        rho: ρ.
        alpha: α; negative for a base optimizer that maximizes, which steps along the negative combined gradient.
        xi: ξ.
        guards: any number of 0-d tensors, as the norms are.
        write_grads: whether the combined gradient, divided by ``grad_scale``, is left in ``grads``.
        grad_scale: float32, 0-d: the combined gradient is divided by it (``torch.amp.GradScaler``).
        found_inf: float32, 0-d: 0 where the step is to be taken.
        rounding_seed: with it, bfloat16 and float16 parameters are rounded stochastically
            (:mod:`gam_fused.kernels.rounding`), without it to nearest.
    """

    params: TensorList
    backups: TensorList
    grads: TensorList
    hvps: TensorList
    adversarial_norm: Tensor
    rho: float
    alpha: float
    xi: float
    guards: TensorList = ()
    write_grads: bool = True
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    rounding_seed: int | None = None

    @property
    def lists(self) -> dict[str, TensorList]:
        """Its lists by name, in the order in which operators take them."""
        return {"params": self.params, "backups": self.backups, "grads": self.grads, "hvps": self.hvps}


@dataclass(frozen=True)
class AdamWState:
    """The state of ``torch.optim.Adam`` and ``AdamW``, by its own names; all of it is written.

    ``max_exp_avg_sqs`` is empty without ``amsgrad``. ``state_steps`` are float32, 0-d, on the parameters' device.
    """

    exp_avgs: TensorList
    exp_avg_sqs: TensorList
    max_exp_avg_sqs: TensorList
    state_steps: TensorList


@dataclass(frozen=True)
class SGDRule:
    """``torch.optim.SGD``. ``lr`` may be a 0-d tensor, on the parameters' device if the host is not to wait for it."""

    lr: float | Tensor
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False


@dataclass(frozen=True)
class AdamWRule:
    """``torch.optim.AdamW``; without ``decoupled_weight_decay``, ``torch.optim.Adam``. ``lr`` as in SGD's."""

    lr: float | Tensor
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = True
    amsgrad: bool = False
    maximize: bool = False
