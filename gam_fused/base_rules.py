"""Base optimizers whose rule a back end fuses with restoring and combining: SGD, Adam and AdamW.

A fused step leaves what ``combine_`` and ``base.step()`` would leave, up to rounding: the parameters, ``.grad`` (the
combined gradient), and the state under torch's own keys, so that a step of either kind may follow one of the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer

from gam_fused.kernels.grouping import buckets
from gam_fused.kernels.interface import Backend, FusingBackend
from gam_fused.kernels.rules import AdamWRule, AdamWState, Descent, SGDRule

_Group = dict[str, Any]
_Rule = TypeVar("_Rule", SGDRule, AdamWRule)


def has_fused_rule(backend: Backend, base: Optimizer, params: Sequence[Tensor], groups: Sequence[_Group]) -> bool:
    """Whether :func:`fused_step` may take the place of ``combine_`` and ``base.step()``.

    It may not where somebody listens (step hooks, a ``step`` replaced by another one), where a subclass may do
    something of its own, where the step is to be differentiated, or where state is not as torch makes it.
    """
    return (
        isinstance(backend, FusingBackend)
        and type(base) in _STATE_KEYS
        and not _is_listened_to(base)
        and not any(group.get("differentiable", False) for group in groups)
        and all(map(_has_usable_state, [base] * len(params), params, groups))
    )


@torch.no_grad()
def fused_step(
    backend: FusingBackend,
    base: Optimizer,
    params: Sequence[Tensor],
    groups: Sequence[_Group],
    penalties: Sequence[tuple[float, float, float]],
    descent: Callable[[list[int], float, float, float], Descent],
) -> None:
    """Restore, combine, and step as ``base`` does, in one launch for each param group, device and dtype.

    ``.grad`` is the combined gradient afterwards, and cleared for parameters that do not step. If a launch raises, the
    optimizer's state is as it was before; parameters are for the caller to restore.

    Args:
        backend: launches.
        base: one that :func:`has_fused_rule`.
        params: the parameters to step.
        groups: the param group of each.
        penalties: (ρ, α, ξ) of each, α negative for one that maximizes.
        descent: from indices of parameters, and their ρ, α and ξ, to the descent from θ_adv.
    """
    with _state_undone_on_failure(base, params) as keep:
        first = [_complete_state(base, param, group) for param, group in zip(params, groups, strict=True)]
        keys = [
            (*penalty, id(group), is_first) for penalty, group, is_first in zip(penalties, groups, first, strict=True)
        ]
        launches = [
            (descent(at, rho, alpha, xi), groups[at[0]], is_first)
            for (_, _, rho, alpha, xi, _, is_first), at in buckets(params, keys).items()
        ]
        # A launch happens in full or not at all, but one after it may fail. So the largest is the last.
        launches.sort(key=lambda launch: sum(param.numel() for param in launch[0].params))
        for number, (part, group, is_first) in enumerate(launches, start=1):
            if number < len(launches):
                keep(part.params)
            _launch(backend, base, group, part, first_step=is_first)
    base.zero_grad(set_to_none=True)
    for part, _, _ in launches:
        for param, grad in zip(part.params, part.grads, strict=True):
            param.grad = grad
    base._opt_called = True  # type: ignore[attr-defined]  # what an LR scheduler built over the base looks for


@contextmanager
def _state_undone_on_failure(base: Optimizer, params: Sequence[Tensor]) -> Iterator[Callable[[Sequence[Tensor]], None]]:
    """If the block raises, state is what it was: its entries, and the values of what the block has asked to keep."""
    entries = {param: dict(base.state[param]) for param in params if param in base.state}
    values: list[tuple[Tensor, Tensor]] = []

    def keep(some: Sequence[Tensor]) -> None:
        state = [value for param in some for value in base.state.get(param, {}).values() if isinstance(value, Tensor)]
        values.extend((value, value.clone()) for value in state)

    try:
        yield keep
    except BaseException:
        for value, copy in values:
            value.copy_(copy)
        for param in params:
            base.state.pop(param, None)
            if param in entries:
                base.state[param] = entries[param]
        raise


_STATE_KEYS: dict[type[Optimizer], tuple[str, ...]] = {
    SGD: ("momentum_buffer",),
    Adam: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"),
    AdamW: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"),
}


def _is_listened_to(base: Optimizer) -> bool:
    replaced = vars(base).get("step")
    return bool(
        base._optimizer_step_pre_hooks
        or base._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
        # LR schedulers replace `step` by one that only notes that it was called.
        or (replaced is not None and not getattr(replaced, "_wrapped_by_lr_sched", False))
    )


def _has_usable_state(base: Optimizer, param: Tensor, group: _Group) -> bool:
    state = base.state.get(param) or {}
    for key in _STATE_KEYS[type(base)]:
        value = state.get(key)
        if value is None:
            continue
        if key == "step":
            if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.numel() != 1:
                return False
        elif value.dtype != param.dtype or value.device != param.device or value.shape != param.shape:
            return False
    # On a device, a launch that turns out not to step has touched nothing, but then a first step is not the first one
    # any more; with dampening that makes a difference.
    is_first = type(base) is SGD and state.get("momentum_buffer") is None
    return not (is_first and param.device.type != "cpu" and group["momentum"] and group["dampening"])


def _complete_state(base: Optimizer, param: Tensor, group: _Group) -> bool:
    """Make what state there is none of yet, as torch does; whether a momentum buffer holds nothing yet."""
    if type(base) is SGD and not group["momentum"]:
        return False
    state = base.state[param]
    if type(base) is SGD:
        if state.get("momentum_buffer") is not None:
            return False
        state["momentum_buffer"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return param.device.type == "cpu"  # see _has_usable_state
    for key in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])):
        if key not in state:
            state[key] = torch.zeros_like(param, memory_format=torch.preserve_format)
    step = state.get("step")
    if step is None:
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
    elif step.device != param.device:  # as fused=True of torch's own, so that the host need not read it
        state["step"] = step.to(param.device)
    return False


def _launch(backend: FusingBackend, base: Optimizer, group: _Group, descent: Descent, *, first_step: bool) -> None:
    state = [[base.state.get(param, {}).get(key) for param in descent.params] for key in _STATE_KEYS[type(base)]]
    if type(base) is SGD:
        sgd = _rule(SGDRule, group)
        backend.sgd_step_(descent, state[0] if sgd.momentum else [], sgd, first_step=first_step)
    else:
        adamw = _rule(AdamWRule, group)
        exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps = state
        moments = AdamWState(exp_avgs, exp_avg_sqs, max_exp_avg_sqs if adamw.amsgrad else [], steps)
        backend.adamw_step_(descent, moments, adamw)


def _rule(cls: type[_Rule], group: _Group) -> _Rule:
    """A rule's fields have the names that they have in torch's param groups."""
    return cls(**{field.name: group[field.name] for field in dataclasses.fields(cls)})
