"""A back end whose lists are checked in Python, by one set of checks for all operators."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from gam_fused.kernels.interface import Backend, TensorList
from gam_fused.kernels.validation import validate_lists


class ValidatingBackend(Backend):
    """The public operators validate and go on to their ``_`` twins, which subclasses implement."""

    def l2_norm(self, tensors: TensorList) -> Tensor:
        """See :meth:`Backend.l2_norm`."""
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
        """See :meth:`Backend.perturb_`."""
        validate_lists(writes={"params": params, "directions": directions})
        self._perturb_(params, directions, direction_norm, grad_norm, rho, xi)

    def restore_(self, params: TensorList, backups: TensorList) -> None:
        """See :meth:`Backend.restore_`."""
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
        """See :meth:`Backend.combine_`."""
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
