"""perturb, restore and combine, compared with their formulas."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cuda_host.common import (
    OFFSETS,
    assert_bitwise,
    assert_rounded,
    copies,
    double,
    dtypes,
    needs_compiler,
    number,
    random_list,
)
from tests.cuda_host.kernels_on_host import DTYPES

pytestmark = needs_compiler


@dtypes
@pytest.mark.parametrize("offsets", OFFSETS, ids=["aligned", "misaligned"])
def test_perturb_moves_along_the_direction_and_leaves_the_backup(kernels, dtype, offsets):
    theta, direction = random_list(dtype), random_list(dtype)
    params, directions = copies(theta), copies(direction)
    kernels.call(
        "perturb",
        [params, directions],
        numbers=[0.1, 1e-3],
        scalars=[number(2, dtype), number(3, dtype)],
        offsets=[offsets, offsets[::-1]],
    )
    scale = 0.1 / (2 + 1e-3 * (3 + 1e-3))
    assert_bitwise(directions, theta)
    assert_rounded(params, [t + scale * u for t, u in zip(double(theta), double(direction), strict=True)])


@pytest.mark.parametrize("norms", [(math.inf, 1.0), (1.0, math.nan), (0.0, 0.0)], ids=str)
def test_perturb_does_not_move_where_the_quotient_is_not_finite(kernels, norms):
    theta = random_list(torch.float32)
    params, directions = copies(theta), random_list(torch.float32)
    scalars = [number(norm, torch.float32) for norm in norms]
    kernels.call("perturb", [params, directions], numbers=[0.1, 0.0], scalars=scalars)
    assert_bitwise(params, theta)
    assert_bitwise(directions, theta)


@dtypes
@pytest.mark.parametrize("offsets", OFFSETS, ids=["aligned", "misaligned"])
@pytest.mark.parametrize("has_origins", [False, True])
@pytest.mark.parametrize("has_starts", [False, True])
def test_shift_moves_from_the_origin_along_the_difference(kernels, dtype, offsets, has_origins, has_starts):
    params, origins, ends, starts = (random_list(dtype) for _ in range(4))
    theta = double(origins if has_origins else params)
    lists = [params, *[origins] * has_origins, ends, *[starts] * has_starts]
    unwritten = copies([*origins, *ends, *starts])
    kernels.call(
        "shift",
        lists,
        numbers=[has_origins, has_starts, 0.1, 1e-3],
        scalars=[number(2, dtype)],
        offsets=[offsets, *[offsets[::-1]] * has_origins, offsets, *[offsets] * has_starts],
    )
    directions = [e - s if has_starts else e for e, s in zip(double(ends), double(starts), strict=True)]
    assert_rounded(params, [t + 0.1 / (2 + 1e-3) * d for t, d in zip(theta, directions, strict=True)])
    assert_bitwise([*origins, *ends, *starts], unwritten)


@pytest.mark.parametrize("norm", [math.inf, math.nan, 0.0], ids=str)
def test_shift_leaves_the_origin_where_the_quotient_is_not_finite(kernels, norm):
    params, origins, ends = (random_list(torch.float32) for _ in range(3))
    theta = copies(params)
    ends[-1][0] = math.inf  # times a quotient of zero it is not a number
    scalars = [number(norm, torch.float32)]
    kernels.call("shift", [params, ends], numbers=[False, False, 0.1, 0.0], scalars=scalars)
    assert_bitwise(params, theta)
    kernels.call("shift", [params, origins, ends, ends], numbers=[True, True, 0.1, 0.0], scalars=scalars)
    assert_bitwise(params, origins)


@settings(max_examples=15)
@given(
    dtype=st.sampled_from(DTYPES),
    tensors=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=60),
    seed=st.integers(0, 2**32 - 1),
)
def test_restoring_after_perturbing_gives_back_every_bit(kernels, dtype, tensors, seed):
    """Whatever the bits: NaN with payloads, infinities, subnormal numbers."""
    random = torch.Generator().manual_seed(seed)
    theta = [
        torch.randint(0, 256, (size * dtype.itemsize,), dtype=torch.uint8, generator=random).view(dtype)
        for size, _, _ in tensors
    ]
    params, directions = copies(theta), [torch.ones_like(t) for t in theta]
    offsets = [[t[1] for t in tensors], [t[2] for t in tensors]]
    shuffled = dataclasses.replace(kernels, seed=seed)
    scalars = [number(1, dtype), number(1, dtype)]
    shuffled.call("perturb", [params, directions], numbers=[0.1, 0.0], scalars=scalars, offsets=offsets)
    shuffled.call("restore", [params, directions], numbers=[], offsets=offsets)
    assert_bitwise(params, theta)


@dtypes
@pytest.mark.parametrize("offsets", OFFSETS, ids=["aligned", "misaligned"])
def test_combine_restores_and_adds_the_penalty(kernels, dtype, offsets):
    params, backups, grads, hvps = (random_list(dtype) for _ in range(4))
    grads_before = double(grads)
    kernels.call(
        "combine",
        [params, backups, grads, hvps],
        numbers=[0.1, -0.3, 1e-3],
        scalars=[number(2, dtype)],
        offsets=[offsets] * 4,
    )
    scale = -0.3 * 0.1 / (2 + 1e-3)
    assert_bitwise(params, backups)
    assert_rounded(grads, [g + scale * h for g, h in zip(grads_before, double(hvps), strict=True)])
