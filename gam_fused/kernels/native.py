"""The arithmetic in compiled kernels: one launch per operator, whatever the number of tensors.

The operators check their lists in C++ and want tensors of equal index laid out alike, without gaps. Only where they
refuse does this module look closer: it raises the interface's own error if there is one to raise, and otherwise hands
over dense copies of the tensors in question and copies the results back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gam_fused.kernels import extension, operators
from gam_fused.kernels.interface import Backend, TensorList, accumulation_dtype
from gam_fused.kernels.rules import AdamWRule, SGDRule
from gam_fused.kernels.validation import validate_lists, validate_steps

_Lists = dict[str, TensorList]


class NativeBackend(Backend):
    """Compiled multi-tensor operators, on the CPU and on CUDA devices; never synchronises with the device."""

    name = "native"
    fuses_base_rules = True

    @staticmethod
    def unavailable_reason(device: torch.device | None = None) -> str | None:
        """``None`` where the extension is loaded and has kernels for the device; the CPU if none is given."""
        reason = extension.unavailable_reason()
        if reason is not None or device is None or device.type == "cpu":
            return reason
        if device.type == "cuda":
            return extension.cuda_unavailable_reason()
        return f"there are no native kernels for {device.type} devices."

    @torch.no_grad()
    def l2_norm(self, tensors: TensorList) -> Tensor:
        """See :meth:`Backend.l2_norm`."""
        if not tensors:
            return torch.zeros((), dtype=torch.float32, device="cpu")
        return self._launch("l2_norm", {"tensors": tensors}, (), same_shape=False)

    @torch.no_grad()
    def l2_norm_pair(self, first: TensorList, second: TensorList) -> tuple[Tensor, Tensor]:
        """See :meth:`Backend.l2_norm_pair`; in one launch."""
        if not first or not second:
            return self.l2_norm(first), self.l2_norm(second)
        return self._launch("l2_norm_pair", {"first": first, "second": second}, (), same_shape=False)

    @torch.no_grad()
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
        norms = _like(direction_norm, params), _like(grad_norm, params)
        self._launch("perturb_", {"params": params, "directions": directions}, (*norms, rho, xi))

    @torch.no_grad()
    def restore_(self, params: TensorList, backups: TensorList) -> None:
        """See :meth:`Backend.restore_`."""
        self._launch("restore_", {"params": params, "backups": backups}, ())

    @torch.no_grad()
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
        self._launch("combine_", lists, (_like(adversarial_norm, params), rho, alpha, xi))

    @torch.no_grad()
    def sgd_step_(
        self,
        params: TensorList,
        backups: TensorList,
        grads: TensorList,
        hvps: TensorList,
        momentum_buffers: TensorList,
        adversarial_norm: Tensor,
        guards: TensorList,
        rho: float,
        alpha: float,
        xi: float,
        rule: SGDRule,
        *,
        first_step: bool,
        write_grads: bool = True,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """See :meth:`Backend.sgd_step_`."""
        lists = {
            "params": params,
            "backups": backups,
            "grads": grads,
            "hvps": hvps,
            "momentum_buffers": momentum_buffers,
        }
        self._launch(
            "sgd_step_",
            lists,
            (_like(adversarial_norm, params), [_like(guard, params) for guard in guards], rho, alpha, xi),
            optional=() if rule.momentum else ("momentum_buffers",),
            **_learning_rate(rule.lr, params),
            momentum=rule.momentum,
            dampening=rule.dampening,
            weight_decay=rule.weight_decay,
            nesterov=rule.nesterov,
            maximize=rule.maximize,
            first_step=first_step,
            write_grads=write_grads,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )

    @torch.no_grad()
    def adamw_step_(
        self,
        params: TensorList,
        backups: TensorList,
        grads: TensorList,
        hvps: TensorList,
        exp_avgs: TensorList,
        exp_avg_sqs: TensorList,
        max_exp_avg_sqs: TensorList,
        state_steps: TensorList,
        adversarial_norm: Tensor,
        guards: TensorList,
        rho: float,
        alpha: float,
        xi: float,
        rule: AdamWRule,
        *,
        write_grads: bool = True,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """See :meth:`Backend.adamw_step_`."""
        lists = {
            "params": params,
            "backups": backups,
            "grads": grads,
            "hvps": hvps,
            "exp_avgs": exp_avgs,
            "exp_avg_sqs": exp_avg_sqs,
            "max_exp_avg_sqs": max_exp_avg_sqs,
        }
        guards = [_like(guard, params) for guard in guards]
        self._launch(
            "adamw_step_",
            lists,
            (list(state_steps), _like(adversarial_norm, params), guards, rho, alpha, xi),
            optional=() if rule.amsgrad else ("max_exp_avg_sqs",),
            **_learning_rate(rule.lr, params),
            beta1=rule.betas[0],
            beta2=rule.betas[1],
            eps=rule.eps,
            weight_decay=rule.weight_decay,
            decoupled_weight_decay=rule.decoupled_weight_decay,
            amsgrad=rule.amsgrad,
            maximize=rule.maximize,
            write_grads=write_grads,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )

    def _launch(
        self,
        name: str,
        lists: _Lists,
        numbers: tuple[Any, ...],
        *,
        same_shape: bool = True,
        optional: tuple[str, ...] = (),
        **options: Any,
    ) -> Any:
        if not any(lists.values()):
            return None  # without a tensor, PyTorch cannot tell which device's kernel to call
        operator = getattr(torch.ops.gam_fused, name).default
        try:
            return _run(name, operator, list(lists.values()), numbers, options)
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            present = {key: tensors for key, tensors in lists.items() if tensors or key not in optional}
            _validate(name, present, same_shape)
            if name == "adamw_step_":
                validate_steps(numbers[0], lists["params"])
            device = next(tensor.device for tensors in present.values() for tensor in tensors)
            if (reason := self.unavailable_reason(device)) is not None:
                raise RuntimeError(f"backend='native' cannot run on {device}: {reason}") from None
            dense = _dense(present, same_shape)
            if all(dense[key] is tensors for key, tensors in present.items()):
                raise
        replaced = [dense.get(key, tensors) for key, tensors in lists.items()]
        result = _launch_below(operator, replaced, numbers, options)
        # Backwards: backups are complete before the first parameter is written.
        for position in reversed(operators.MUTATED.get(name, ())):
            if position < len(replaced):
                for tensor, copy in zip(list(lists.values())[position], replaced[position], strict=False):
                    if copy is not tensor:
                        tensor.copy_(copy)
        _count_versions(name, list(lists.values()), numbers)
        return result


def _run(
    name: str, operator: Callable[..., Any], lists: list[TensorList], numbers: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    result = _launch_below(operator, lists, numbers, options)
    _count_versions(name, lists, numbers)
    return result


def _launch_below(
    operator: Callable[..., Any], lists: list[TensorList], numbers: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return operator(*lists, *numbers, **options)


def _count_versions(name: str, lists: list[TensorList], numbers: tuple[Any, ...]) -> None:
    # Last: until every byte is written, versions say that none is.
    arguments = [*lists, *numbers]
    for position in operators.MUTATED.get(name, ()):
        torch.autograd.graph.increment_version(arguments[position])


def _validate(name: str, lists: _Lists, same_shape: bool) -> None:
    if not same_shape:
        for key, tensors in lists.items():
            validate_lists(reads={key: tensors}, same_shape=False)
        return
    written = {list(lists)[i] for i in operators.MUTATED[name] if i < len(lists)}
    validate_lists(
        writes={key: lists[key] for key in lists if key in written},
        reads={key: lists[key] for key in lists if key not in written},
    )


def _dense(lists: _Lists, same_shape: bool) -> _Lists:
    """The lists, with dense copies of the tensors at every index where one has gaps or another layout than the rest."""
    if not same_shape:
        return {key: _replaced(tensors, [not _is_dense(t) for t in tensors]) for key, tensors in lists.items()}
    first = next(iter(lists.values()))
    odd = [
        not _is_dense(model) or any(tensors[i].stride() != model.stride() for tensors in lists.values())
        for i, model in enumerate(first)
    ]
    return {key: _replaced(tensors, odd) for key, tensors in lists.items()}


def _replaced(tensors: TensorList, odd: list[bool]) -> TensorList:
    if not any(odd):
        return tensors
    return [
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor) if is_odd else tensor
        for tensor, is_odd in zip(tensors, odd, strict=True)
    ]


def _is_dense(tensor: Tensor) -> bool:
    run = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != run and tensor.numel():
            return False
        run *= size
    return True


def _like(scalar: Tensor, tensors: TensorList) -> Tensor:
    """A number for a launch over ``tensors``: of their accumulation dtype, on their device."""
    if not tensors or not isinstance(scalar, Tensor):
        return scalar
    wide, device = accumulation_dtype(tensors[0].dtype), tensors[0].device
    return scalar if scalar.dtype == wide and scalar.device == device else scalar.to(device, wide)


def _learning_rate(lr: float | Tensor, params: TensorList) -> dict[str, Any]:
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return {"lr": 0.0, "lr_tensor": _like(lr, params)}
    return {"lr": float(lr)}
