"""With a seed, the kernels round what they compute in float32 to the bits that the Python twin gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gam_fused.kernels.rounding import rounded
from tests.cuda_host.common import (
    OFFSETS,
    SIZES,
    Common,
    assert_bitwise,
    copies,
    needs_compiler,
    number,
    random_list,
    run_adamw,
    run_sgd,
)
from tests.cuda_host.test_fused_steps import adamw_state

pytestmark = needs_compiler
narrow = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
rounding_seeds = pytest.mark.parametrize("rounding_seed", [0, 2**64 - 1])


def widened(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.float() for tensor in tensors]


def assert_rounded_stochastically(params: list[Tensor], exact: list[Tensor], rounding_seed: int) -> None:
    """Tables are small here: these are the tensors of several launches, some without elements."""
    dtype = params[0].dtype
    places = [torch.arange(tensor.numel()) for tensor in exact]
    assert_bitwise(params, [rounded(e, dtype, rounding_seed, i, places[i]) for i, e in enumerate(exact)])


def subnormal_and_not(dtype: torch.dtype) -> list[Tensor]:
    """Half of the float16 numbers are subnormal, before and after they move."""
    return [tensor * 2.0 ** -(torch.arange(tensor.numel()) % 28) for tensor in random_list(dtype)]


@narrow
@rounding_seeds
@pytest.mark.parametrize("offsets", OFFSETS, ids=["aligned", "misaligned"])
def test_perturb_rounds_stochastically(kernels, dtype, rounding_seed, offsets):
    theta, direction = ([t.to(dtype) for t in subnormal_and_not(dtype)] for _ in range(2))
    moved, params, directions = widened(theta), copies(theta), copies(direction)
    arguments = {"numbers": [0.1, 1e-3], "scalars": [number(2, dtype), number(3, dtype)]}
    kernels.call("perturb", [moved, widened(direction)], **arguments)
    kernels.call(
        "perturb", [params, directions], **arguments, offsets=[offsets, offsets[::-1]], rounding_seed=rounding_seed
    )
    assert_bitwise(directions, theta)
    assert_rounded_stochastically(params, moved, rounding_seed)


@narrow
@pytest.mark.parametrize("has_lists", [False, True])
def test_shift_rounds_stochastically(kernels, dtype, has_lists):
    lists = [[t.to(dtype) for t in subnormal_and_not(dtype)] for _ in range(4 if has_lists else 2)]
    exact = [widened(tensors) for tensors in lists]
    arguments = {"numbers": [has_lists, has_lists, 0.1, 1e-3], "scalars": [number(2, dtype)]}
    kernels.call("shift", exact, **arguments)
    kernels.call("shift", lists, **arguments, offsets=[OFFSETS[1]] * len(lists), rounding_seed=5)
    assert_rounded_stochastically(lists[0], exact[0], 5)


SGD_CASES = {
    "plain": (Common(), {}),
    "momentum": (Common(grad_scale=4.0), {"momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1}),
    "nesterov": (Common(maximize=True, lr_tensor=0.2), {"momentum": 0.9, "nesterov": True}),
}


@narrow
@rounding_seeds
@pytest.mark.parametrize("name", SGD_CASES)
def test_sgd_step_rounds_stochastically(kernels, dtype, rounding_seed, name):
    common, settings = SGD_CASES[name]
    lists = [random_list(dtype) for _ in range(5)]
    exact = [widened(tensors) for tensors in lists]
    run_sgd(kernels, common, settings, exact[:4], exact[4])
    run_sgd(kernels, common, settings, lists[:4], lists[4], offsets=OFFSETS[1], rounding_seed=rounding_seed)
    assert_rounded_stochastically(lists[0], exact[0], rounding_seed)
    for tensors, wide in zip(lists[1:], exact[1:], strict=True):  # gradients and state: to nearest
        assert_bitwise(tensors, [tensor.to(dtype) for tensor in wide])


ADAMW_CASES = {
    "AdamW": (torch.optim.AdamW, Common(guards=(1.0,)), {"weight_decay": 0.1}),
    "Adam": (torch.optim.Adam, Common(maximize=True), {"weight_decay": 0.1, "betas": (0.5, 0.75)}),
    "amsgrad": (torch.optim.AdamW, Common(write_grads=False), {"amsgrad": True}),
}


@narrow
@rounding_seeds
@pytest.mark.parametrize("name", ADAMW_CASES)
def test_adamw_step_rounds_stochastically(kernels, dtype, rounding_seed, name):
    optimizer_class, common, settings = ADAMW_CASES[name]
    lists = [random_list(dtype) for _ in range(4)]
    state = adamw_state(dtype, settings.get("amsgrad", False))
    exact, exact_state = [widened(tensors) for tensors in lists], {key: copies(widened(state[key])) for key in state}
    run_adamw(kernels, optimizer_class, common, settings, exact, exact_state)
    run_adamw(kernels, optimizer_class, common, settings, lists, state, offsets=OFFSETS[1], rounding_seed=rounding_seed)
    assert_rounded_stochastically(lists[0], exact[0], rounding_seed)
    for tensors, wide in zip(lists[1:], exact[1:], strict=True):
        assert_bitwise(tensors, [tensor.to(dtype) for tensor in wide])
    for key, tensors in state.items():
        assert_bitwise(tensors, [tensor.to(tensors[0].dtype) for tensor in exact_state[key]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_a_seed_changes_nothing_for_wide_parameters(kernels, dtype):
    theta, direction = random_list(dtype), random_list(dtype)
    arguments = {"numbers": [0.1, 1e-3], "scalars": [number(2, dtype), number(3, dtype)]}
    results = []
    for rounding_seed in (None, 1):
        results.append(copies(theta))
        kernels.call("perturb", [results[-1], copies(direction)], **arguments, rounding_seed=rounding_seed)
    assert_bitwise(results[0], results[1])


@narrow
def test_a_step_that_is_stopped_restores_to_the_bit(kernels, dtype):
    lists = [random_list(dtype) for _ in range(5)]
    run_sgd(kernels, Common(found_inf=1.0), {"momentum": 0.9}, lists[:4], lists[4], rounding_seed=1)
    assert_bitwise(lists[0], lists[1])
    assert len(lists[0]) == len(SIZES)
