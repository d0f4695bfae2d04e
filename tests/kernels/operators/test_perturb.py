"""To the adversarial point, with theta left in the directions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gam_fused.kernels import Backend
from tests.kernels.operators.common import RHO, XI, assert_sum_rounded_once, few_examples
from tests.kernels.tensor_lists import (
    Draw,
    Spec,
    assert_same_bits,
    copies,
    other_layouts,
    relaid,
    seeds,
    specs,
    surroundings,
)


@few_examples
@given(specs, other_layouts, seeds)
def test_perturb_moves_to_the_adversarial_point_and_leaves_theta_in_the_directions(
    backend: Backend, dtype: torch.dtype, device: torch.device, specs: list[Spec], layouts: list[str], seed: int
) -> None:
    draw = Draw(dtype, device, seed)
    theta, u = draw.normal(specs), draw.normal(relaid(specs, layouts))
    params, directions = copies(theta), copies(u)
    gaps = surroundings(params, directions)
    u_norm, g_norm = draw.norm(1.7), draw.norm(4.3)

    backend.perturb_(params, directions, u_norm, g_norm, RHO, XI)

    scale = RHO / (u_norm.double() + XI * (g_norm.double() + XI))
    for param, theta_i, u_i in zip(params, theta, u, strict=True):
        assert_sum_rounded_once(param, theta_i.double(), scale * u_i.double())
    assert_same_bits(directions, theta)
    assert_same_bits(surroundings(params, directions), gaps)
    assert (u_norm.item(), g_norm.item()) == (draw.norm(1.7).item(), draw.norm(4.3).item())


@few_examples
@given(specs, other_layouts, seeds, st.sampled_from([0.0, 1.0, math.nan, math.inf]))
def test_restoring_after_a_perturbation_is_exact_to_the_bit_whatever_was_added(
    backend: Backend,
    dtype: torch.dtype,
    device: torch.device,
    specs: list[Spec],
    layouts: list[str],
    seed: int,
    norm: float,
) -> None:
    draw = Draw(dtype, device, seed)
    params, directions = draw.any_bits(specs), draw.any_bits(relaid(specs, layouts))
    theta = [p.clone() for p in params]
    backend.perturb_(params, directions, draw.norm(norm), draw.norm(norm), RHO, 0.0)
    assert_same_bits(directions, theta)
    backend.restore_(params, directions)
    assert_same_bits(params, theta)
    assert_same_bits(directions, theta)


def test_perturb_with_a_zero_direction_moves_nothing(
    backend: Backend, dtype: torch.dtype, device: torch.device
) -> None:
    draw = Draw(dtype, device)
    params = draw.normal([Spec((9,), "contiguous")])
    theta = [p.clone() for p in params]
    backend.perturb_(params, [torch.zeros_like(p) for p in params], draw.norm(0.0), draw.norm(0.0), RHO, 1e-12)
    assert_same_bits(params, theta)


@pytest.mark.parametrize(
    ("u_norm", "g_norm", "xi"),
    [(math.nan, 1.0, 0.1), (1.0, math.nan, 0.1), (math.inf, 1.0, 0.1), (1.0, math.inf, 0.0), (0.0, 0.0, 0.0)],
)
def test_perturb_moves_nothing_where_the_direction_is_not_finite(
    backend: Backend, dtype: torch.dtype, device: torch.device, u_norm: float, g_norm: float, xi: float
) -> None:
    draw = Draw(dtype, device)
    params = draw.normal([Spec((9,), "contiguous"), Spec((3, 5), "transposed")])
    theta = [p.clone() for p in params]
    directions = [torch.full_like(p, math.nan) for p in params]
    backend.perturb_(params, directions, draw.norm(u_norm), draw.norm(g_norm), RHO, xi)
    assert_same_bits(params, theta)
    assert_same_bits(directions, theta)


@pytest.mark.parametrize(
    ("name", "value"), [("direction_norm", 2.0), ("grad_norm", 2.0), ("rho", 0.5), ("xi", 0.5)], ids=str
)
def test_every_number_given_to_perturb_reaches_the_result(backend: Backend, name: str, value: float) -> None:
    numbers: dict[str, Any] = {"direction_norm": 1.0, "grad_norm": 1.0, "rho": 0.1, "xi": 0.1}
    moved = []
    for case in (numbers, {**numbers, name: value}):
        tensors = {n: torch.tensor(case[n]) for n in ("direction_norm", "grad_norm")}
        params = [torch.zeros(1)]
        backend.perturb_(params, [torch.ones(1)], **{**case, **tensors})
        moved.append(params[0].item())
    assert moved[0] != moved[1]
