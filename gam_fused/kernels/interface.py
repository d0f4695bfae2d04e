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
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from gam_fused.kernels.validation import validate_lists

TensorList = Sequence[Tensor]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tensors of ``dtype`` are added up: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Backend(ABC):
    """Multi-tensor arithmetic of a GAM step. The public operators validate; subclasses implement the ``_`` twins."""

    name: ClassVar[str]

    @staticmethod
    @abstractmethod
    def unavailable_reason() -> str | None:
        """``None`` when this back end can run here, otherwise one sentence saying why not and what to do."""

    def l2_norm(self, tensors: TensorList) -> Tensor:
        """Global 2-norm over all tensors, as a 0-d tensor of the accumulation dtype.

        An empty list has norm 0 (float32, CPU). The result does not depend on the number of threads.
        """
        validate_lists(reads={"tensors": tensors}, same_shape=False)
        return self._l2_norm(tensors)

    def perturb_(
        self,
        params: TensorList,
        directions: TensorList,
        direction_norm: Tensor,
        grad_norm: Tensor,
        rho: float,
        xi: float,
    ) -> None:
        """Swap in the adversarial point: ``params!`` ← θ + ρ u / (‖u‖ + ξ (‖g‖ + ξ)), ``directions!`` ← θ.

        The direction buffer becomes the backup, so that restoring is exact to the bit and costs no extra memory.
        Backups are complete before the first parameter is written. Where a norm or the quotient is not finite, the
        parameters keep their values, so that no loss is evaluated at a point that is none; backups are written as ever.
        """
        validate_lists(writes={"params": params, "directions": directions})
        self._perturb_(params, directions, direction_norm, grad_norm, rho, xi)

    def restore_(self, params: TensorList, backups: TensorList) -> None:
        """``params!`` ← backups, bit for bit."""
        validate_lists(writes={"params": params}, reads={"backups": backups})
        self._restore_(params, backups)

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
        validate_lists(writes={"params": params, "grads": grads}, reads={"backups": backups, "hvps": hvps})
        self._combine_(params, backups, grads, hvps, adversarial_norm, rho, alpha, xi)

    @abstractmethod
    def _l2_norm(self, tensors: TensorList) -> Tensor: ...

    @abstractmethod
    def _perturb_(
        self,
        params: TensorList,
        directions: TensorList,
        direction_norm: Tensor,
        grad_norm: Tensor,
        rho: float,
        xi: float,
    ) -> None: ...

    @abstractmethod
    def _restore_(self, params: TensorList, backups: TensorList) -> None: ...

    @abstractmethod
    def _combine_(
        self,
        params: TensorList,
        backups: TensorList,
        grads: TensorList,
        hvps: TensorList,
        adversarial_norm: Tensor,
        rho: float,
        alpha: float,
        xi: float,
    ) -> None: ...
