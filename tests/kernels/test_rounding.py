"""Stochastic rounding: one of the two neighbours, right on average, with bits that depend on nothing they should not.

Every number drawn here is a function of fixed seeds. Bounds are six standard deviations of what is counted, if the bits
were what they are meant to look like; one in 500 million such counts lies outside.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gam_fused.kernels.rounding import launch_key, mix64, random_bits, rounded, seeds, tensor_key
from tests.kernels.tensor_lists import bits

SIGMAS = 6
narrow = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
COUNT = 2**18


def drawn(values: Tensor, dtype: torch.dtype, seed: int = 0, tensor: int = 0) -> Tensor:
    return rounded(values, dtype, seed, tensor, torch.arange(values.numel()).view(values.shape))


def uniform(seed: int = 0, tensor: int = 0, first: int = 0) -> Tensor:
    """The bits of COUNT elements as numbers of mean 0 and variance 1."""
    random = random_bits(seed, tensor, first + torch.arange(COUNT))
    return ((random + 0.5) * 2.0**-32 - 0.5) * math.sqrt(12)


def correlation(a: Tensor, b: Tensor) -> float:
    """In standard deviations of what independent numbers have."""
    return float((a.double() * b.double()).sum()) / math.sqrt(a.numel())


def neighbours(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The numbers of ``dtype`` next to each value, toward zero and away from it, in float64; itself if it is one."""
    info = torch.finfo(dtype)
    exact = values.double()
    exponent = (exact.frexp().exponent.double() - 1).clamp(min=math.log2(info.smallest_normal))
    step = info.eps * 2.0**exponent
    inner = (exact / step).trunc() * step
    return inner, torch.where(inner == exact, exact, inner + step * exact.sign())


def scattered(dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Numbers of either sign and all magnitudes, down to far below the smallest that ``dtype`` has."""
    generator = torch.Generator().manual_seed(seed)
    info = torch.finfo(dtype)
    low = math.log2(info.smallest_normal) - 14
    exponent = low + (math.log2(info.max) - 1 - low) * torch.rand(COUNT, generator=generator)
    return torch.exp2(exponent) * torch.randn(COUNT, generator=generator).sign()


# ---------------------------------------------------------------- one number


@narrow
def test_a_number_becomes_one_of_its_two_neighbours(dtype: torch.dtype) -> None:
    values = scattered(dtype)
    inner, outer = neighbours(values, dtype)
    results = drawn(values, dtype).double()
    assert bool(((results == inner) | (results == outer)).all())
    assert bool((results == inner).any() and (results == outer).any())


@narrow
@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_what_is_representable_stays(dtype: torch.dtype, seed: int) -> None:
    """Zeros of either sign, subnormal numbers, infinities; NaN stays NaN."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    results = drawn(patterns.float(), dtype, seed)
    is_nan = patterns.isnan()
    assert torch.equal(results.isnan(), is_nan)
    assert torch.equal(bits(results)[~is_nan], bits(patterns)[~is_nan])


# Fractions of a step, from numbers that have steps of different sizes: in a binade, below the next, subnormal.
PLACES = {torch.bfloat16: (1.0, 1.9921875, 2.0**-126, 3e38), torch.float16: (1.0, 2047 / 1024, 2.0**-24 * 5, 0.0, 6e4)}


@narrow
@pytest.mark.parametrize("fraction", [2**-10, 0.25, 0.5, 0.875])
@pytest.mark.parametrize("sign", [1, -1])
def test_how_often_a_number_is_rounded_up_is_how_far_up_it_is(dtype: torch.dtype, fraction: float, sign: int) -> None:
    for place in PLACES[dtype]:
        below = torch.tensor(place, dtype=dtype)
        above = (bits(below) + 1).view(dtype)
        value = below.double() + fraction * (above.double() - below.double())
        values = (sign * value).float().expand(COUNT).clone()
        ups = (drawn(values, dtype).double() == sign * above.double()).sum().item()
        deviation = math.sqrt(COUNT * fraction * (1 - fraction))
        assert abs(ups - COUNT * fraction) < SIGMAS * deviation, place


def test_between_the_largest_number_and_the_next_power_of_two_lies_infinity() -> None:
    values = torch.tensor([65520.0, -65520.0, 65535.9]).expand(COUNT, 3).clone()
    results = drawn(values, torch.float16).float()
    assert set(results[:, 0].tolist()) == {65504.0, math.inf}
    assert set(results[:, 1].tolist()) == {-65504.0, -math.inf}
    assert abs((results[:, 0] == math.inf).sum().item() - COUNT / 2) < SIGMAS * math.sqrt(COUNT) / 2
    assert drawn(torch.tensor([65536.0, 1e30]), torch.float16).tolist() == [math.inf] * 2


@narrow
def test_the_mean_error_is_none(dtype: torch.dtype) -> None:
    """In steps between neighbours: an error of fraction p has variance p (1 − p), at most 1/4."""
    for seed in range(4):
        values = scattered(dtype, seed)
        inner, outer = neighbours(values, dtype)
        step = torch.where(inner == outer, 1.0, (outer - inner).abs())
        errors = (drawn(values, dtype, seed).double() - values.double()) / step
        assert abs(float(errors.sum())) < SIGMAS * math.sqrt(COUNT) / 2
        by_magnitude = errors * values.sign()
        assert abs(float(by_magnitude.sum())) < SIGMAS * math.sqrt(COUNT) / 2


def test_without_a_seed_numbers_are_rounded_to_nearest_and_wide_ones_never() -> None:
    values = torch.randn(1000)
    places = torch.arange(1000)
    assert torch.equal(rounded(values, torch.bfloat16, None, 0, places), values.bfloat16())
    assert torch.equal(rounded(values, torch.float32, 5, 0, places), values)
    assert torch.equal(rounded(values.double(), torch.float64, 5, 0, places), values.double())


# ---------------------------------------------------------------- the bits


@pytest.mark.parametrize("seed", [0, 1, 65536, 2**63])
@pytest.mark.parametrize("tensor", [0, 1, 160])
def test_every_byte_of_the_bits_is_uniform(seed: int, tensor: int) -> None:
    """Chi-square of 256 classes: of mean 255 and variance 510."""
    random = random_bits(seed, tensor, torch.arange(COUNT))
    for shift in (0, 8, 16, 24):
        counts = torch.bincount((random >> shift) & 255, minlength=256).double()
        expected = COUNT / 256
        chi_square = float(((counts - expected).square() / expected).sum())
        assert abs(chi_square - 255) < SIGMAS * math.sqrt(510), shift


def test_neighbours_have_nothing_to_do_with_each_other() -> None:
    for seed in (0, 3 << 16):
        of_tensor = uniform(seed)
        for lag in (1, 2, 3, 4, 7, 8, 16, 64, 1024, 16384):
            assert abs(correlation(of_tensor[lag:], of_tensor[:-lag])) < SIGMAS, lag


def test_tensors_seeds_and_blocks_have_nothing_to_do_with_each_other() -> None:
    others = {
        "tensor": uniform(tensor=1),
        "tensor far away": uniform(tensor=2**20),
        "seed": uniform(seed=1),
        "step": uniform(seed=1 << 16),
        "block": uniform(first=2**32),
        "seed and tensor": uniform(seed=1, tensor=1),
    }
    one = uniform()
    for name, other in others.items():
        for lag in (0, 1, 2, 8):
            assert abs(correlation(one[lag:], other[: COUNT - lag])) < SIGMAS, (name, lag)


@pytest.mark.parametrize("bit", range(0, 32, 5))
def test_flipping_one_bit_of_a_place_flips_each_bit_with_even_odds(bit: int) -> None:
    places = torch.arange(COUNT)
    flipped = random_bits(0, 0, places) ^ random_bits(0, 0, places ^ (1 << bit))
    for position in range(32):
        flips = int(((flipped >> position) & 1).sum())
        # Pairs of places are counted twice where both are among them.
        assert abs(flips - COUNT / 2) < SIGMAS * math.sqrt(2 * COUNT) / 2, position


def test_which_way_weights_go_has_nothing_to_do_with_their_neighbours() -> None:
    """The same between two tensors, and from one launch of a step to the next."""
    half = torch.full((COUNT,), 1 + 2.0**-8)

    def ways(seed: int, tensor: int) -> Tensor:
        return (drawn(half, torch.bfloat16, seed, tensor) > 1).double() * 2 - 1

    first, second = list(seeds(7))[:2]
    here = ways(first, 0)
    assert abs(correlation(here[1:], here[:-1])) < SIGMAS
    assert abs(correlation(here, ways(first, 1))) < SIGMAS
    assert abs(correlation(here, ways(second, 0))) < SIGMAS


@settings(max_examples=200)
@given(st.integers(-(2**70), 2**70), st.integers(0, 2**31), st.integers(0, 2**20))
def test_seeds_count_modulo_two_to_the_64(seed: int, tensor: int, place: int) -> None:
    at = torch.tensor([place])
    assert torch.equal(random_bits(seed, tensor, at), random_bits(seed % 2**64, tensor, at))


def test_no_two_blocks_of_a_launch_share_a_key() -> None:
    key = launch_key(0)
    keys = {tensor_key(key, tensor, block) for tensor in range(1000) for block in range(100)}
    assert len(keys) == 100_000
    assert len({mix64(i) for i in range(100_000)}) == 100_000


def test_a_step_has_seeds_that_no_other_step_has() -> None:
    steps = [list(seeds(step)) for step in (0, 1, 2, 1000)]
    assert len({seed for step in steps for seed in step}) == sum(map(len, steps)) == 4 * 2**16
