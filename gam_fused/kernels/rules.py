"""What a fused step takes: where it starts from, a base rule, and the state of that rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

TensorList = Sequence[Tensor]


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
