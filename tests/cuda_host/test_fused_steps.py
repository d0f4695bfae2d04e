"""sgd_step and adamw_step, compared with PyTorch's own optimizers in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.cuda_host.common import (
    OFFSETS,
    SIZES,
    Common,
    assert_bitwise,
    assert_rounded,
    copies,
    double,
    dtypes,
    needs_compiler,
    random_list,
    run_adamw,
    run_sgd,
)
from tests.cuda_host.kernels_on_host import KernelsFailed

pytestmark = needs_compiler


def steps_with(
    optimizer_class: type[torch.optim.Optimizer],
    theta: list[Tensor],
    grads: list[Tensor],
    state: dict[str, list[Tensor]],
    **settings: float,
) -> list[Tensor]:
    """One step of PyTorch's own optimizer, which updates ``state``; everything in float64."""
    params = [torch.nn.Parameter(t.clone()) for t in theta]
    optimizer = optimizer_class(params, foreach=False, **settings)
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        param.grad = grad.clone()
        optimizer.state[param].update({key: tensors[i] for key, tensors in state.items()})
    optimizer.step()
    for key in state:
        state[key] = [optimizer.state[param][key] for param in params]
    return [param.detach() for param in params]


SGD_CASES = {
    "plain": (Common(), {}),
    "weight decay": (Common(lr_tensor=0.2), {"weight_decay": 0.1}),
    "momentum": (Common(guards=(1.0, 0.0)), {"momentum": 0.9, "dampening": 0.4}),
    "first step": (Common(maximize=True), {"momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1}),
    "nesterov": (Common(grad_scale=4.0, found_inf=0.0), {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "no grads": (Common(write_grads=False), {"momentum": 0.5}),
}


@dtypes
@pytest.mark.parametrize("name", SGD_CASES)
def test_sgd_step_is_a_step_of_torch_optim_sgd(kernels, dtype, name):
    common, settings = SGD_CASES[name]
    params, backups, grads, hvps, buffers = (random_list(dtype) for _ in range(5))
    grads_before = copies(grads)
    combined = common.combined(grads, hvps)
    has_momentum, first_step = "momentum" in settings, name == "first step"
    state = {"momentum_buffer": double(buffers)} if has_momentum and not first_step else {}
    if first_step:
        buffers = [torch.full_like(buffer, math.nan) for buffer in buffers]
    run_sgd(
        kernels, common, settings, [params, backups, grads, hvps], buffers, first_step=first_step, offsets=OFFSETS[1]
    )

    expected = steps_with(
        torch.optim.SGD,
        double(backups),
        combined,
        state,
        lr=common.learning_rate(),
        maximize=common.maximize,
        **settings,
    )
    assert_rounded(params, expected)
    if state:
        assert_rounded(buffers, state["momentum_buffer"])
    if first_step:
        decayed = [0.1 * b - g for b, g in zip(double(backups), combined, strict=True)]
        assert_rounded(buffers, decayed)
    if common.write_grads:
        assert_rounded(grads, combined)  # of the objective itself, also where it is maximized
    else:
        assert_bitwise(grads, grads_before)


ADAMW_CASES = {
    "AdamW": (torch.optim.AdamW, Common(guards=(1.0,)), {"weight_decay": 0.1}),
    "Adam": (torch.optim.Adam, Common(grad_scale=4.0, found_inf=0.0), {"weight_decay": 0.1, "betas": (0.5, 0.75)}),
    "amsgrad": (torch.optim.AdamW, Common(maximize=True), {"amsgrad": True, "weight_decay": 0.0}),
    "no grads": (torch.optim.Adam, Common(write_grads=False, lr_tensor=0.2), {"amsgrad": True, "eps": 1e-4}),
}


def adamw_state(dtype: torch.dtype, amsgrad: bool) -> dict[str, list[Tensor]]:
    squares = {"exp_avg_sq": 1, "max_exp_avg_sq": 1} if amsgrad else {"exp_avg_sq": 1}
    state = {"exp_avg": random_list(dtype), **{key: [t.square() for t in random_list(dtype)] for key in squares}}
    return {**state, "step": [torch.tensor(float(i % 5)) for i in range(len(SIZES))]}


@dtypes
@pytest.mark.parametrize("name", ADAMW_CASES)
def test_adamw_step_is_a_step_of_torch_optim_adam(kernels, dtype, name):
    optimizer_class, common, settings = ADAMW_CASES[name]
    params, backups, grads, hvps = (random_list(dtype) for _ in range(4))
    grads_before = copies(grads)
    combined = common.combined(grads, hvps)
    state = adamw_state(dtype, settings.get("amsgrad", False))
    settings = {"weight_decay": 0.0, **settings}
    expected_state = {key: copies(state[key]) if key == "step" else double(state[key]) for key in state}
    run_adamw(kernels, optimizer_class, common, settings, [params, backups, grads, hvps], state, offsets=OFFSETS[1])

    expected = steps_with(
        optimizer_class,
        double(backups),
        combined,
        expected_state,
        lr=common.learning_rate(),
        maximize=common.maximize,
        **settings,
    )
    assert_rounded(params, expected)
    for key, tensors in state.items():
        assert_rounded(tensors, double(expected_state[key]))
    if common.write_grads:
        assert_rounded(grads, combined)  # of the objective itself, also where it is maximized
    else:
        assert_bitwise(grads, grads_before)


@pytest.mark.parametrize(
    "stopped",
    [Common(norm=math.inf), Common(norm=math.nan), Common(guards=(1.0, -math.inf)), Common(found_inf=1.0)],
    ids=["norm inf", "norm nan", "guard", "found_inf"],
)
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_a_step_that_is_stopped_restores_and_writes_nothing_else(kernels, rule, stopped):
    params, backups, *rest = (random_list(torch.bfloat16) for _ in range(5))
    state = adamw_state(torch.bfloat16, amsgrad=True)
    rest_before, state_before = [copies(tensors) for tensors in rest], {key: copies(state[key]) for key in state}
    lists = [params, backups, rest[0], rest[1]]
    if rule == "sgd":
        run_sgd(kernels, stopped, {"momentum": 0.9}, lists, rest[2])
    else:
        run_adamw(kernels, torch.optim.AdamW, stopped, {"amsgrad": True}, lists, state)
    assert_bitwise(params, backups)
    for after, before in zip(rest, rest_before, strict=True):
        assert_bitwise(after, before)
    for key in state:
        assert_bitwise(state[key], state_before[key])


def test_too_many_guards_are_refused(kernels):
    lists = [[torch.ones(1)] for _ in range(4)]
    with pytest.raises(KernelsFailed, match="guards: 17 tensors, expected at most 16"):
        run_sgd(kernels, Common(guards=(1.0,) * 17), {}, lists, [])
