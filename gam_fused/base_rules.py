"""Base optimizers whose rule a back end fuses with restoring and combining: SGD, Adam and AdamW.

A fused step leaves what ``combine_`` and ``base.step()`` would leave, up to rounding: the parameters, ``.grad`` (the
combined gradient), and the state under torch's own keys, so that a step of either kind may follow one of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer

from gam_fused.kernels.grouping import buckets, take
from gam_fused.kernels.interface import Backend
from gam_fused.kernels.rules import AdamWRule, SGDRule

_Group = dict[str, Any]


def has_fused_rule(backend: Backend, base: Optimizer, params: Sequence[Tensor], groups: Sequence[_Group]) -> bool:
    """Whether :func:`fused_step` may take the place of ``combine_`` and ``base.step()``.

    It may not where somebody listens (step hooks, a ``step`` replaced by another one), where a subclass may do
    something of its own, where the step is to be differentiated, or where state is not as torch makes it.
    """
    return (
        backend.fuses_base_rules
        and type(base) in _STATE_KEYS
        and not _is_listened_to(base)
        and not any(group.get("differentiable", False) for group in groups)
        and all(map(_has_usable_state, [base] * len(params), params, groups))
    )


@torch.no_grad()
def fused_step(
    backend: Backend,
    base: Optimizer,
    params: Sequence[Tensor],
    groups: Sequence[_Group],
    backups: Sequence[Tensor],
    grads: Sequence[Tensor],
    hvps: Sequence[Tensor],
    adversarial_norm: Tensor,
    guards: Sequence[Tensor],
    penalties: Sequence[tuple[float, float, float]],
) -> None:
    """Restore, combine, and step as ``base`` does, in one launch for each param group, device and dtype.

    Args:
        backend: has fused base rules.
        base: one that :func:`has_fused_rule`.
        params: θ_adv of the parameters to step; every other one is left alone.
        groups: the param group of each.
        backups: θ.
        grads: g; the combined gradient from now on, and the parameters' ``.grad``.
        hvps: H(θ_adv) g_adv.
        adversarial_norm: ‖g_adv‖.
        guards: 0-d tensors; where one is not finite, the launches restore the parameters and do nothing else.
        penalties: (ρ, α, ξ) of each parameter, α negative for one that maximizes.
    """
    new_state = [param for param in params if not base.state.get(param)]
    # A launch happens in full or not at all; one that comes after it may fail all the same. So the largest goes last,
    # and of the others the state is kept.
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        first = [_complete_state(base, param, group) for param, group in zip(params, groups, strict=True)]
        keys = [
            (*penalty, id(group), is_first) for penalty, group, is_first in zip(penalties, groups, first, strict=True)
        ]
        by_size = sorted(buckets(params, keys).items(), key=lambda item: sum(params[i].numel() for i in item[1]))
        for number, ((_, _, rho, alpha, xi, _, is_first), at) in enumerate(by_size, start=1):
            group = groups[at[0]]
            state = [[base.state.get(params[i], {}).get(key) for i in at] for key in _STATE_KEYS[type(base)]]
            if number < len(by_size):
                kept += [(value, value.clone()) for values in state for value in values if value is not None]
            launch = _Launch(
                take(params, at),
                take(backups, at),
                take(grads, at),
                take(hvps, at),
                state,
                adversarial_norm,
                guards,
                rho,
                alpha,
                xi,
                is_first,
            )
            (_sgd if type(base) is SGD else _adamw)(backend, group, launch)
    except BaseException:
        for value, before in kept:
            value.copy_(before)
        for param in new_state:
            base.state.pop(param, None)
        raise
    base.zero_grad(set_to_none=True)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    base._opt_called = True  # type: ignore[attr-defined]  # what an LR scheduler built over the base looks for


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


class _Launch(NamedTuple):
    """One param group's tensors of one device and dtype, and the numbers of the launch."""

    params: list[Tensor]
    backups: list[Tensor]
    grads: list[Tensor]
    hvps: list[Tensor]
    state: list[list[Any]]
    adversarial_norm: Tensor
    guards: Sequence[Tensor]
    rho: float
    alpha: float
    xi: float
    is_first: bool


def _sgd(backend: Backend, group: _Group, launch: _Launch) -> None:
    names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
    rule = SGDRule(**{name: group[name] for name in names})
    (buffers,) = launch.state
    backend.sgd_step_(
        launch.params,
        launch.backups,
        launch.grads,
        launch.hvps,
        buffers if rule.momentum else [],
        launch.adversarial_norm,
        launch.guards,
        launch.rho,
        launch.alpha,
        launch.xi,
        rule,
        first_step=launch.is_first,
    )


def _adamw(backend: Backend, group: _Group, launch: _Launch) -> None:
    names = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")
    decoupled = bool(group["decoupled_weight_decay"])
    rule = AdamWRule(**{name: group[name] for name in names}, decoupled_weight_decay=decoupled)
    exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps = launch.state
    backend.adamw_step_(
        launch.params,
        launch.backups,
        launch.grads,
        launch.hvps,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs if rule.amsgrad else [],
        steps,
        launch.adversarial_norm,
        launch.guards,
        launch.rho,
        launch.alpha,
        launch.xi,
        rule,
    )
