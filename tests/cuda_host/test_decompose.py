"""projection and decompose, compared with float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.cuda_host.common import (
    CHUNK,
    OFFSETS,
    assert_bitwise,
    assert_rounded,
    double,
    dtypes,
    needs_compiler,
    number,
    random_list,
)
from tests.cuda_host.kernels_on_host import DTYPES, KernelsOnHost

pytestmark = needs_compiler

WEIGHTS = (0.25, 0.75, -0.5, 0.3)


def mixtures(gradients: list[list[Tensor]], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """h⁺ and h⁻ as they are in ``dtype``."""
    g0, g1, g2, g3 = ([tensor.to(dtype) for tensor in tensors] for tensors in gradients)
    w0, w1, w2, w3 = (torch.tensor(weight, dtype=dtype) for weight in WEIGHTS)
    plus = [w1 * a + w3 * b for a, b in zip(g1, g3, strict=True)]
    return plus, [w0 * a + w2 * b for a, b in zip(g0, g2, strict=True)]


def projection(
    kernels: KernelsOnHost, gradients: list[list[Tensor]], offsets: list[list[int]] | None = None
) -> list[Tensor]:
    results = [number(-1.0, gradients[0][0].dtype) for _ in range(3)]
    kernels.call("projection", gradients, numbers=WEIGHTS, scalars=results, offsets=offsets)
    return results


def assert_projection(found: list[Tensor], gradients: list[list[Tensor]], *, exponent: int = 0) -> None:
    """To two units in the last place, and what is lost where products cancel, here or there; all times 2^exponent."""
    dtype = found[0].dtype
    plus, minus = (torch.cat(double(tensors)) for tensors in mixtures(gradients, dtype))
    plus_norm, minus_norm = plus.norm().item(), minus.norm().item()
    expected = [(minus @ plus).item() / plus_norm if plus_norm else 0.0, plus_norm, minus_norm]
    eps = torch.finfo(dtype).eps
    for value, exact in zip(found, expected, strict=True):
        actual = math.ldexp(value.item(), -exponent)
        assert abs(actual - exact) <= 2 * eps * abs(exact) + max(4 * eps**1.5, 1e-14) * minus_norm, (actual, exact)


@dtypes
@pytest.mark.parametrize("offsets", OFFSETS, ids=["aligned", "misaligned"])
def test_projection_is_that_of_float64(kernels, dtype, offsets):
    """Tables are small here: these are the tensors of several launches."""
    gradients = [random_list(dtype) for _ in range(4)]
    assert_projection(projection(kernels, gradients, [offsets, offsets[::-1], offsets, offsets]), gradients)


def test_projection_has_the_same_bits_for_any_grid_order_and_alignment(kernels):
    gradients = [random_list(torch.float32) for _ in range(4)]
    expected = projection(kernels, gradients)
    for seed in (1, 2):
        other = dataclasses.replace(kernels, seed=seed, multiprocessors=1 + 3 * seed)
        assert_bitwise(projection(other, gradients, [OFFSETS[1]] * 4), expected)


@settings(max_examples=10)
@given(dtype=st.sampled_from(DTYPES[:3]), exponent=st.integers(-110, 110), seed=st.integers(0, 2**32 - 1))
def test_projection_of_numbers_whose_products_are_out_of_range(kernels, dtype, exponent, seed):
    random = torch.Generator().manual_seed(seed)
    gradients = [[torch.randn(200, generator=random).to(dtype)] for _ in range(4)]
    scaled = [[tensor * 2.0**exponent for tensor in tensors] for tensors in gradients]
    assert_projection(projection(kernels, scaled), gradients, exponent=exponent)


@pytest.mark.parametrize("sizes", [(0, 0), (3, 0)])
def test_projection_on_nothing_is_zero(kernels, sizes):
    gradients = [[torch.zeros(size) for size in sizes] for _ in range(4)]
    assert [result.item() for result in projection(kernels, gradients)] == [0.0] * 3
    gradients[0] = [torch.full_like(tensor, 4.0) for tensor in gradients[0]]
    assert [result.item() for result in projection(kernels, gradients)][:2] == [0.0] * 2


@pytest.mark.parametrize("value", [math.inf, math.nan], ids=str)
@pytest.mark.parametrize("which", range(4))
def test_what_is_not_finite_shows_in_a_norm(kernels, which, value):
    gradients = [[torch.ones(5), torch.ones(2 * CHUNK)] for _ in range(4)]
    gradients[which][1][CHUNK + 17] = value
    _, plus_norm, minus_norm = projection(kernels, gradients)
    assert [math.isfinite(plus_norm), math.isfinite(minus_norm)] == [which in (0, 2), which in (1, 3)]


@dtypes
@pytest.mark.parametrize("offsets", OFFSETS, ids=["aligned", "misaligned"])
def test_decompose_leaves_the_gradients_ahead_and_the_perpendicular_part(kernels, dtype, offsets):
    gradients = [random_list(dtype) for _ in range(4)]
    plus, minus = mixtures(gradients, torch.float64)
    read_only = [[tensor.clone() for tensor in tensors] for tensors in gradients[2:]]
    kernels.call(
        "decompose",
        gradients,
        numbers=[*WEIGHTS, 1e-3],
        scalars=[number(-1.5, dtype), number(2.0, dtype)],
        offsets=[offsets, offsets, offsets[::-1], offsets],
    )
    scale = -1.5 * 2.0 / (2.0 + 1e-3) ** 2
    assert_rounded(gradients[0], plus)
    assert_rounded(gradients[1], [m - scale * p for m, p in zip(minus, plus, strict=True)])
    for tensors, before in zip(gradients[2:], read_only, strict=True):
        assert_bitwise(tensors, before)
