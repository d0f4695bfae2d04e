"""The arithmetic in compiled kernels: one call per operator, whatever the number of tensors.

The operators check their lists in C++ and want tensors of equal index laid out alike, without gaps. Only where they
refuse does this module look closer: it raises the interface's own error if there is one to raise, and otherwise hands
over dense copies of the tensors in question and copies the results back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gam_fused.kernels import extension, operators
from gam_fused.kernels.interface import FusingBackend, as_scalar
from gam_fused.kernels.layouts import copy_back, dense_copies
from gam_fused.kernels.rules import AdamWRule, AdamWState, Descent, FourGradients, SGDRule, TensorList

_Lists = Mapping[str, TensorList]


class NativeBackend(FusingBackend):
    """Compiled multi-tensor operators, on the CPU and on CUDA devices; never synchronises with the device."""

    name = "native"

    @staticmethod
    def unavailable_reason(device: torch.device | None = None) -> str | None:
        """``None`` where the extension is loaded and has kernels for the device; the CPU if none is given."""
        reason = extension.unavailable_reason()
        if reason is not None or device is None or device.type == "cpu":
            return reason
        if device.type == "cuda":
            return extension.cuda_unavailable_reason()
        return f"there are no native kernels for {device.type} devices."

    def l2_norm(self, tensors: TensorList) -> Tensor:
        """See :meth:`Backend.l2_norm`."""
        if not tensors:
            return torch.zeros((), dtype=torch.float32, device="cpu")
        return self._launch("l2_norm", {"tensors": tensors})

    def l2_norm_pair(self, first: TensorList, second: TensorList) -> tuple[Tensor, Tensor]:
        """See :meth:`Backend.l2_norm_pair`; in one launch."""
        if not first or not second:
            return self.l2_norm(first), self.l2_norm(second)
        return self._launch("l2_norm_pair", {"first": first, "second": second})

    def difference_norm(self, ends: TensorList, starts: TensorList) -> Tensor:
        """See :meth:`Backend.difference_norm`."""
        if not ends and not starts:
            return self.l2_norm([])
        return self._launch("difference_norm", {"ends": ends, "starts": starts})

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
        """See :meth:`Backend.perturb_`."""
        norms = as_scalar(direction_norm, params), as_scalar(grad_norm, params)
        lists = {"params": params, "directions": directions}
        self._launch("perturb_", lists, (*norms, rho, xi), rounding_seed=_int64(rounding_seed))

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
        """See :meth:`Backend.shift_`."""
        lists = {"params": params, "origins": origins, "ends": ends, "starts": starts}
        numbers = as_scalar(norm, params), rho, xi
        self._launch("shift_", lists, numbers, ("origins", "starts"), rounding_seed=_int64(rounding_seed))

    def restore_(self, params: TensorList, backups: TensorList) -> None:
        """See :meth:`Backend.restore_`."""
        self._launch("restore_", {"params": params, "backups": backups})

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
        lists = {"params": params, "backups": backups, "grads": grads, "hvps": hvps}
        self._launch("combine_", lists, (as_scalar(adversarial_norm, params), rho, alpha, xi))

    def projection(self, gradients: FourGradients) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`Backend.projection`."""
        lists = gradients.lists
        if not any(lists.values()):
            return (self.l2_norm([]),) * 3
        return self._launch("projection", lists, gradients.weights)

    def decompose_(self, gradients: FourGradients, projection: Tensor, plus_norm: Tensor, xi: float) -> None:
        """See :meth:`Backend.decompose_`."""
        norms = as_scalar(projection, gradients.grads), as_scalar(plus_norm, gradients.grads)
        self._launch("decompose_", gradients.lists, (*norms, *gradients.weights, xi))

    def sgd_step_(
        self, descent: Descent, momentum_buffers: TensorList, rule: SGDRule, *, first_step: bool = False
    ) -> None:
        """See :meth:`FusingBackend.sgd_step_`."""
        state = {"momentum_buffers": momentum_buffers}
        optional = () if rule.momentum else ("momentum_buffers",)
        self._step("sgd_step_", descent, state, vars(rule), optional, first_step=first_step)

    def adamw_step_(self, descent: Descent, state: AdamWState, rule: AdamWRule) -> None:
        """See :meth:`FusingBackend.adamw_step_`."""
        hyperparameters = dict(vars(rule))
        hyperparameters["beta1"], hyperparameters["beta2"] = hyperparameters.pop("betas")
        optional = () if rule.amsgrad else ("max_exp_avg_sqs",)
        self._step("adamw_step_", descent, vars(state), hyperparameters, optional)

    def _step(
        self,
        name: str,
        descent: Descent,
        state: _Lists,
        hyperparameters: Mapping[str, Any],
        optional: tuple[str, ...],
        **options: Any,
    ) -> None:
        params = descent.params
        lists = {**descent.lists, **state}
        norm, guards = (
            as_scalar(descent.adversarial_norm, params),
            [as_scalar(guard, params) for guard in descent.guards],
        )
        self._launch(
            name,
            lists,
            (norm, guards, descent.rho, descent.alpha, descent.xi),
            optional,
            **{**hyperparameters, **_learning_rate(hyperparameters["lr"], params)},
            write_grads=descent.write_grads,
            grad_scale=descent.grad_scale,
            found_inf=descent.found_inf,
            rounding_seed=_int64(descent.rounding_seed),
            **options,
        )

    def _launch(
        self, name: str, lists: _Lists, numbers: tuple[Any, ...] = (), optional: tuple[str, ...] = (), **options: Any
    ) -> Any:
        if not any(lists.values()):
            return None  # without a tensor, PyTorch cannot tell which device's kernel to call
        try:
            result = _call_directly(name, lists, numbers, options)
            if result is not NotImplemented:
                return result
            result = _dispatch(name, lists, numbers, options)
        # What the operators raise themselves, and what PyTorch does where an argument is no tensor or on no device that
        # has kernels. Nothing has been written.
        except (RuntimeError, TypeError, ValueError):
            given = {key: tensors for key, tensors in lists.items() if tensors or key not in optional}
            with torch.no_grad():
                dense = _dense_copies(name, given)
                if not dense:
                    raise
                result = _dispatch(name, {**lists, **dense}, numbers, options)
                copy_back(lists, dense, operators.WRITTEN[name])
        # Last: until every byte is written, versions say that none is.
        operators.count_mutations(name, lists)
        return result


_DIRECT_CALLS = extension.direct_calls()


def _call_directly(name: str, lists: _Lists, numbers: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    """Past PyTorch's dispatcher, mutations counted; ``NotImplemented``, with nothing done, where that cannot be."""
    call = _DIRECT_CALLS.get(name)
    return NotImplemented if call is None else call(*lists.values(), *numbers, **options)


def _dispatch(name: str, lists: _Lists, numbers: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    """Through PyTorch's dispatcher, mutations not counted."""
    operator = getattr(torch.ops.gam_fused, name).default
    with torch.no_grad(), torch._C._AutoDispatchBelowADInplaceOrView():
        return operator(*lists.values(), *numbers, **options)


def _dense_copies(name: str, lists: _Lists) -> _Lists:
    """The lists with dense copies of the tensors that the operator cannot take as they lie; none where it could.

    Raises ``ValueError``, as every back end does, where the lists are at fault.
    """
    steps = lists.get("state_steps", ())
    lists = {key: tensors for key, tensors in lists.items() if key != "state_steps"}
    operators.validate(name, lists, steps)
    return dense_copies(lists, element_by_element=name not in operators.UNRELATED)


def _int64(seed: int | None) -> int | None:
    """The number of 64 bits with a sign that equals ``seed`` modulo 2⁶⁴: what an operator can be given."""
    return None if seed is None else (seed + 2**63) % 2**64 - 2**63


def _learning_rate(lr: float | Tensor, params: TensorList) -> dict[str, Any]:
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return {"lr": 0.0, "lr_tensor": as_scalar(lr, params)}
    return {"lr": float(lr)}
