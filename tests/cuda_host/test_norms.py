"""l2_norms, compared with the norm in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.cuda_host.common import CHUNK, OFFSETS, dtypes, needs_compiler, norm_of, random_list
from tests.cuda_host.kernels_on_host import DTYPES

pytestmark = needs_compiler


def exact_norm(tensors: list[Tensor]) -> float:
    """To the last bit or next to it, without overflow or underflow."""
    return math.hypot(*torch.cat(tensors).double().tolist()) if tensors else 0.0


def ulps_from(actual: Tensor, expected: float) -> float:
    """How many units in the last place lie between a result and a number in float64."""
    rounded = torch.tensor(expected, dtype=torch.float64).to(actual.dtype)
    if actual == rounded:
        return 0.0
    spacing = torch.nextafter(rounded, torch.full_like(rounded, math.inf)) - rounded
    return abs(actual.item() - expected) / spacing.item()


@dtypes
def test_norm_is_that_of_float64(kernels, dtype):
    tensors = random_list(dtype)
    assert ulps_from(norm_of(kernels, tensors), exact_norm(tensors)) <= 2


def test_norm_of_an_empty_list_and_of_empty_tensors_is_zero(kernels):
    assert norm_of(kernels, []).item() == 0.0
    assert norm_of(kernels, [torch.ones(0), torch.ones(0)]).item() == 0.0


def test_norm_has_the_same_bits_for_any_grid_order_and_alignment(kernels):
    tensors = random_list(torch.float32)
    expected = norm_of(kernels, tensors)
    for seed in (1, 2):
        other = dataclasses.replace(kernels, seed=seed, multiprocessors=1 + 3 * seed)
        assert torch.equal(norm_of(other, tensors, OFFSETS[1]), expected)


@settings(max_examples=10)
@given(
    dtype=st.sampled_from(DTYPES),
    values=st.lists(st.floats(allow_nan=False, width=32), min_size=1, max_size=80),
)
def test_norm_of_any_numbers(kernels, dtype, values):
    """Squares of float32 numbers overflow and underflow; their norm does not."""
    tensor = torch.tensor(values, dtype=torch.float64).to(dtype)
    expected = exact_norm([tensor])
    actual = norm_of(kernels, [tensor])
    if torch.tensor(expected, dtype=actual.dtype).isinf():
        assert actual.item() == math.inf
    else:
        assert ulps_from(actual, expected) <= 2


@dtypes
@pytest.mark.parametrize("offsets", OFFSETS, ids=["aligned", "misaligned"])
def test_difference_norm_is_that_of_float64(kernels, dtype, offsets):
    ends, starts = random_list(dtype), random_list(dtype)
    result = torch.full((), -1.0, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    kernels.call("difference_norm", [ends, starts], numbers=[], scalars=[result], offsets=[offsets, offsets[::-1]])
    differences = [e.to(result.dtype) - s.to(result.dtype) for e, s in zip(ends, starts, strict=True)]
    assert ulps_from(result, exact_norm(differences)) <= 2


@dtypes
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
def test_norm_with_a_value_that_is_not_finite(kernels, dtype, value):
    tensors = [torch.ones(5, dtype=dtype), torch.ones(2 * CHUNK, dtype=dtype)]
    tensors[1][CHUNK + 17] = value
    expected = math.nan if math.isnan(value) else math.inf
    assert norm_of(kernels, tensors).item() == pytest.approx(expected, nan_ok=True)


def test_norm_does_not_lose_small_numbers_beside_large_ones(kernels):
    tensors = [torch.tensor([4096.0]), torch.full((3 * CHUNK,), 2.0**-8)]
    assert ulps_from(norm_of(kernels, tensors), exact_norm(tensors)) <= 2


def test_norms_of_two_lists_over_several_launches(kernels):
    """17 tensors with elements, 14 of which fit into one launch."""
    first, second = random_list(torch.float32, (3,) * 9), random_list(torch.float32, (0, 5, 1) * 4)
    both = [torch.full((), -1.0) for _ in range(2)]
    kernels.call("l2_norms", [[*first, *second]], numbers=[len(first), 2], scalars=both)
    assert torch.equal(both[0], norm_of(kernels, first))
    assert torch.equal(both[1], norm_of(kernels, second))
    assert ulps_from(both[0], exact_norm(first)) <= 2
