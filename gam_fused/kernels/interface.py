"""The one interface that every back end implements.

A back end does the arithmetic *around* the derivatives: norms, perturbation, restoration, combination. It knows
nothing of GAM's passes, of closures or of optimizers. Each operator below takes lists of tensors that share one
dtype and one device (:func:`gam_fused.kernels.grouping.buckets` makes such lists); any number of tensors, any sizes,
float64, float32, bfloat16 and float16.

Arithmetic is done in the *accumulation dtype* of the tensors' dtype (:func:`accumulation_dtype`: float64 for float64,
float32 otherwise) and rounded once on the way back. Norms are 0-d tensors of that dtype on the tensors' device and are
never read on the host.

Arguments marked ``!`` in the operators' descriptions are written. Lists that are written must not overlap each other or
any list that is read; a list that does, or that differs from the first list in length, shape, dtype or device, or that
holds a sparse or complex tensor, raises ``ValueError`` naming the list and the index of the tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from gam_fused.kernels.rules import AdamWRule, AdamWState, Descent, FourGradients, SGDRule, TensorList


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tensors of ``dtype`` are added up: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_scalar(number: Tensor, tensors: TensorList) -> Tensor:
    """A 0-d tensor to compute with beside ``tensors``: of their accumulation dtype, on their device."""
    if not tensors or not isinstance(number, Tensor):
        return number
    wide, device = accumulation_dtype(tensors[0].dtype), tensors[0].device
    return number if number.dtype == wide and number.device == device else number.to(device, wide)


class Backend(ABC):
    """Multi-tensor arithmetic of a GAM step."""

    name: ClassVar[str]

    is_for_tests_on_cpu: ClassVar[bool] = False
    """Whether ``auto`` leaves it alone where all tensors are on the CPU."""

    @staticmethod
    @abstractmethod
    def unavailable_reason(device: torch.device | None = None) -> str | None:
        """``None`` when this back end can run here, otherwise one sentence saying why not and what to do.

        Asked about tensors on ``device``, or whether it can run at all.
        """

    @abstractmethod
    def l2_norm(self, tensors: TensorList) -> Tensor:
        """Global 2-norm over all tensors, as a 0-d tensor of the accumulation dtype.

        An empty list has norm 0 (float32, CPU). The result does not depend on the number of threads.
        """

    @abstractmethod
    def difference_norm(self, ends: TensorList, starts: TensorList) -> Tensor:
        """The global 2-norm of ends − starts, taken in the accumulation dtype; otherwise as :meth:`l2_norm`."""

    def l2_norm_pair(self, first: TensorList, second: TensorList) -> tuple[Tensor, Tensor]:
        """The global 2-norms of two lists of one dtype and device, as :meth:`l2_norm` gives them."""
        return self.l2_norm(first), self.l2_norm(second)

    @abstractmethod
    def perturb_(
        self,
        params: TensorList,
        directions: TensorList,
        direction_norm: Tensor,
        grad_norm: Tensor,
        rho: float,
        xi: float,
        *,
        rounding_seed: int | None = None,
    ) -> None:
        """Swap in the adversarial point: ``params!`` ← θ + ρ u / (‖u‖ + ξ (‖g‖ + ξ)), ``directions!`` ← θ.

        The direction buffer becomes the backup, so that restoring is exact to the bit and costs no extra memory.
        Backups are complete before the first parameter is written. Where a norm or the quotient is not finite, the
        parameters keep their values, so that no loss is evaluated at a point that is none; backups are written as ever.

        With ``rounding_seed``, bfloat16 and float16 parameters are rounded stochastically
        (:mod:`gam_fused.kernels.rounding`), without it to nearest.
        """

    @abstractmethod
    def shift_(
        self,
        params: TensorList,
        origins: TensorList,
        ends: TensorList,
        starts: TensorList,
        norm: Tensor,
        rho: float,
        xi: float,
        *,
        rounding_seed: int | None = None,
    ) -> None:
        """``params!`` ← origins + ρ (ends − starts) / (``norm`` + ξ), written nowhere else.

        Without ``origins`` (an empty list) they move from where they are, without ``starts`` along ends. Where ``norm``
        or the quotient is not finite, they stay there, or are the origins. ``rounding_seed`` as in :meth:`perturb_`.
        """

    @abstractmethod
    def restore_(self, params: TensorList, backups: TensorList) -> None:
        """``params!`` ← backups, bit for bit."""

    @abstractmethod
    def combine_(
        self,
        params: TensorList,
        backups: TensorList,
        grads: TensorList,
        hvps: TensorList,
        adversarial_norm: Tensor,
        rho: float,
        alpha: float,
        xi: float,
    ) -> None:
        """Restore and combine: ``params!`` ← backups, ``grads!`` ← g + α ρ / (‖g_adv‖ + ξ) · H(θ_adv) g_adv.

        ``alpha`` may be negative (a base optimizer that maximizes).
        """

    @abstractmethod
    def projection(self, gradients: FourGradients) -> tuple[Tensor, Tensor, Tensor]:
        """⟨h⁻, h⁺⟩ / ‖h⁺‖ (0 where h⁺ is 0), ‖h⁺‖ and ‖h⁻‖ over all tensors, as 0-d tensors of the accumulation dtype.

        h⁺ and h⁻ are taken as they are in the accumulation dtype. Empty lists give zeros (float32, CPU). The results do
        not depend on the number of threads.
        """

    @abstractmethod
    def decompose_(self, gradients: FourGradients, projection: Tensor, plus_norm: Tensor, xi: float) -> None:
        """``grads!`` ← h⁺ and ``grads_ahead!`` ← h⊥ = h⁻ − ⟨h⁻, n⟩ n with n = h⁺ / (‖h⁺‖ + ξ).

        ``projection`` and ``plus_norm`` are those of :meth:`projection`, of these tensors and of others as it may be.
        """


class FusingBackend(Backend):
    """A back end that restores, combines and steps as a base optimizer does in one launch.

    Where ``adversarial_norm`` or a guard is not finite, or ``found_inf`` is not 0, a step restores the parameters and
    writes nothing else.
    """

    @abstractmethod
    def sgd_step_(
        self, descent: Descent, momentum_buffers: TensorList, rule: SGDRule, *, first_step: bool = False
    ) -> None:
        """Restore, combine (:meth:`combine_`) and step as ``torch.optim.SGD`` does.

        ``momentum_buffers!`` is empty without momentum; with ``first_step`` they hold nothing yet.
        """

    @abstractmethod
    def adamw_step_(self, descent: Descent, state: AdamWState, rule: AdamWRule) -> None:
        """Restore, combine and step as ``torch.optim.AdamW`` or ``Adam`` does. ``state!`` is the optimizer's."""
