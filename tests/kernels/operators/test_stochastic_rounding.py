"""With a seed, perturbed parameters are rounded stochastically: by every back end to the same bits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gam_fused import kernels
from gam_fused.kernels import Backend
from gam_fused.kernels.interface import accumulation_dtype
from tests.kernels.tensor_lists import (
    Draw,
    Spec,
    assert_same_bits,
    bits,
    copies,
    have_same_bits,
    layouts,
    other_layouts,
    relaid,
    seeds,
    shapes,
    specs,
    surroundings,
)

NARROW = (torch.bfloat16, torch.float16)
narrow = pytest.mark.parametrize("narrow", NARROW, ids=["bf16", "fp16"])
rounding_seeds = st.one_of(st.integers(0, 3), st.integers(-(2**65), 2**65))

# A factor of the direction that every back end computes exactly: 1/8.
EXACT = {"rho": 0.25, "xi": 0.0}


def assert_same_numbers(actual: list[Tensor], expected: list[Tensor]) -> None:
    """The same bits, but for what is in a NaN."""
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a.isnan(), e.isnan())
        assert_same_bits([bits(a).masked_fill(a.isnan(), 0)], [bits(e).masked_fill(e.isnan(), 0)])


def perturbed(
    backend: Backend, params: list[Tensor], directions: list[Tensor], rounding_seed: int | None
) -> list[Tensor]:
    norm = torch.tensor(2.0, dtype=accumulation_dtype(params[0].dtype), device=params[0].device)
    backend.perturb_(params, directions, norm, norm, **EXACT, rounding_seed=rounding_seed)
    return [*params, *directions]


@settings(max_examples=30)
@given(specs.filter(bool), other_layouts, seeds, rounding_seeds)
def test_perturb_rounds_to_the_bits_of_the_reference(
    backend: Backend,
    dtype: torch.dtype,
    device: torch.device,
    specs: list[Spec],
    layouts: list[str],
    seed: int,
    rounding_seed: int,
) -> None:
    draw = Draw(dtype, device, seed)
    params, directions = draw.normal(specs), draw.normal(relaid(specs, layouts))
    others = copies(params), copies(directions)
    gaps = surroundings(copies(params), copies(directions))
    results = perturbed(backend, params, directions, rounding_seed)
    assert_same_bits(results, perturbed(kernels.resolve("reference"), *others, rounding_seed))
    assert_same_bits(surroundings(copies(params), copies(directions)), gaps)


@settings(max_examples=20)
@given(st.lists(st.builds(Spec, shapes, layouts), min_size=1, max_size=6), other_layouts, seeds, rounding_seeds)
@narrow
def test_any_bits_round_to_those_of_the_reference(
    backend: Backend,
    device: torch.device,
    narrow: torch.dtype,
    specs: list[Spec],
    layouts: list[str],
    seed: int,
    rounding_seed: int,
) -> None:
    """Subnormal numbers, sums that overflow, infinities, NaN."""
    draw = Draw(narrow, device, seed)
    params, directions = draw.any_bits(specs), draw.any_bits(relaid(specs, layouts))
    others = copies(params), copies(directions)
    results = perturbed(backend, params, directions, rounding_seed)
    assert_same_numbers(results, perturbed(kernels.resolve("reference"), *others, rounding_seed))


@settings(max_examples=10)
@given(st.lists(st.builds(Spec, shapes, layouts), min_size=1, max_size=6), other_layouts, seeds, rounding_seeds)
@narrow
@pytest.mark.parametrize("with_lists", [False, True])
def test_shift_rounds_to_the_bits_of_the_reference(
    backend: Backend,
    device: torch.device,
    with_lists: bool,
    narrow: torch.dtype,
    specs: list[Spec],
    layouts: list[str],
    seed: int,
    rounding_seed: int,
) -> None:
    draw = Draw(narrow, device, seed)
    params, ends = draw.normal(specs), draw.normal(relaid(specs, layouts))
    origins, starts = (draw.normal(specs) if with_lists else [] for _ in range(2))
    others, norm = copies(params), draw.norm(2.0)
    backend.shift_(params, origins, ends, starts, norm, **EXACT, rounding_seed=rounding_seed)
    reference = kernels.resolve("reference")
    reference.shift_(others, origins, ends, starts, norm, **EXACT, rounding_seed=rounding_seed)
    assert_same_bits(params, others)


def test_a_seed_changes_nothing_for_wide_parameters(backend: Backend, dtype: torch.dtype, device: torch.device) -> None:
    results = []
    for rounding_seed in (None, 0, 5):
        draw = Draw(dtype, device)
        lists = draw.normal([Spec((1000,), "contiguous")]), draw.normal([Spec((1000,), "contiguous")])
        results.append(perturbed(backend, *lists, rounding_seed))
    for result in results[1:]:
        assert have_same_bits(result[:1], results[0][:1]) == (dtype not in NARROW)
        assert_same_bits(result[1:], results[0][1:])


@narrow
def test_other_seeds_and_other_places_in_the_list_give_other_bits(
    backend: Backend, device: torch.device, narrow: torch.dtype
) -> None:
    draw = Draw(narrow, device)
    theta, u = (draw.normal([Spec((1000,), "contiguous")])[0] for _ in range(2))

    def moved(rounding_seed: int) -> list[Tensor]:
        params = [theta.clone(), theta[:0].clone(), theta.clone()]
        return perturbed(backend, params, [u.clone(), u[:0].clone(), u.clone()], rounding_seed)[:3]

    first, _, third = moved(0)
    assert not have_same_bits([first], [third])
    assert_same_bits(moved(0), [first, theta[:0], third])
    assert not have_same_bits(moved(1)[:1], [first])
    assert not have_same_bits(moved(2**32)[:1], [first])
    assert not have_same_bits(moved(2**63)[:1], [first])


@narrow
@pytest.mark.parametrize("norm", [math.nan, math.inf, 0.0])
def test_with_a_seed_too_nothing_moves_where_the_direction_is_not_finite(
    backend: Backend, device: torch.device, narrow: torch.dtype, norm: float
) -> None:
    draw = Draw(narrow, device)
    params, directions = (draw.normal([Spec((9,), "contiguous"), Spec((3, 5), "transposed")]) for _ in range(2))
    theta = copies(params)
    backend.perturb_(params, directions, draw.norm(norm), draw.norm(norm), 0.1, 0.0, rounding_seed=1)
    assert_same_bits(params, theta)
    assert_same_bits(directions, theta)


@pytest.mark.parametrize("sigma", [0.1, 0.3, 1.0])
def test_how_much_of_a_perturbation_survives_rounding(backend: Backend, device: torch.device, sigma: float) -> None:
    """A million bfloat16 weights, moved by ρ = 0.1 along a random direction: by a ten-thousandth each.

    Rounded to nearest, only small weights move at all. Rounded stochastically, they move by what they should
    on average: a weight that is to move by d between two neighbours that are s apart goes to the far one with
    probability p = |d| / s, and the variance p (1 − p) s² is at most |d| s.
    """
    count, rho = 2**20, 0.1
    generator = torch.Generator().manual_seed(1)
    theta = (sigma * torch.randn(count, generator=generator)).bfloat16().to(device)
    u = torch.randn(count, generator=generator).bfloat16().to(device)
    norm = u.float().norm()
    direction = u.double() / norm.double()

    def survived(rounding_seed: int | None) -> float:
        params = [theta.clone()]
        backend.perturb_(params, [u.clone()], norm, norm, rho, 0.0, rounding_seed=rounding_seed)
        return float(((params[0].double() - theta.double()) * direction).sum()) / rho

    d = rho * direction.abs()
    steps = torch.finfo(torch.bfloat16).eps * 2.0 ** ((theta.double().abs() + d).frexp().exponent - 1)
    deviation = math.sqrt(float((direction.square() * d * steps).sum())) / rho
    assert deviation < 0.01
    to_nearest = survived(None)
    stochastically = [survived(rounding_seed) for rounding_seed in range(4)]
    print(f"sigma {sigma}: {to_nearest:.4f} to nearest, {stochastically} stochastically, ± {deviation:.4f}")
    assert to_nearest < {0.1: 2 / 3, 0.3: 1 / 4, 1.0: 1 / 10}[sigma]
    assert all(abs(share - 1) < 6 * deviation for share in stochastically)
