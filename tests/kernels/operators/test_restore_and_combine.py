"""Back to theta, with the flatness penalty added to the gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gam_fused.kernels import Backend
from tests.kernels.operators.common import ALPHA, RHO, XI, assert_sum_rounded_once, few_examples
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
def test_restore_copies_every_bit(
    backend: Backend, dtype: torch.dtype, device: torch.device, specs: list[Spec], layouts: list[str], seed: int
) -> None:
    draw = Draw(dtype, device, seed)
    params, backups = draw.any_bits(specs), draw.any_bits(relaid(specs, layouts))
    expected = [b.clone() for b in backups]
    gaps = surroundings(params)
    backend.restore_(params, backups)
    assert_same_bits(params, expected)
    assert_same_bits(backups, expected)
    assert_same_bits(surroundings(params), gaps)


@few_examples
@given(specs, other_layouts, seeds, st.sampled_from([ALPHA, -ALPHA, 0.0]))
def test_combine_restores_and_adds_the_flatness_penalty_to_the_gradients(
    backend: Backend,
    dtype: torch.dtype,
    device: torch.device,
    specs: list[Spec],
    layouts: list[str],
    seed: int,
    alpha: float,
) -> None:
    draw = Draw(dtype, device, seed)
    params, backups = draw.normal(specs), draw.any_bits(relaid(specs, layouts))
    g, hvps = draw.normal(relaid(specs, layouts)), draw.normal(specs)
    grads, unwritten = copies(g), copies([*backups, *hvps])
    gaps = surroundings(params, grads)
    adversarial_norm = draw.norm(2.9)

    backend.combine_(params, backups, grads, hvps, adversarial_norm, RHO, alpha, XI)

    scale = alpha * RHO / (adversarial_norm.double() + XI)
    for grad, g_i, hvp in zip(grads, g, hvps, strict=True):
        assert_sum_rounded_once(grad, g_i.double(), scale * hvp.double())
    assert_same_bits(params, backups)
    assert_same_bits([*backups, *hvps], unwritten)
    assert_same_bits(surroundings(params, grads), gaps)


@pytest.mark.parametrize(
    ("name", "value"), [("adversarial_norm", 2.0), ("rho", 0.5), ("alpha", -0.5), ("xi", 0.5)], ids=str
)
def test_every_number_given_to_combine_reaches_the_result(backend: Backend, name: str, value: float) -> None:
    numbers: dict[str, Any] = {"adversarial_norm": 1.0, "rho": 0.1, "alpha": 0.1, "xi": 0.1}
    combined = []
    for case in (numbers, {**numbers, name: value}):
        grads = [torch.zeros(1)]
        norm = torch.tensor(case["adversarial_norm"])
        backend.combine_([torch.ones(1)], [torch.ones(1)], grads, [torch.ones(1)], **{**case, "adversarial_norm": norm})
        combined.append(grads[0].item())
    assert combined[0] != combined[1]


def test_a_non_finite_hvp_shows_in_the_combined_gradient(
    backend: Backend, dtype: torch.dtype, device: torch.device
) -> None:
    draw = Draw(dtype, device)
    one, grads = [torch.ones(3, dtype=dtype, device=device)], [torch.ones(3, dtype=dtype, device=device)]
    hvps = [torch.tensor([math.nan, math.inf, 0.0], dtype=dtype, device=device)]
    backend.combine_(copies(one), one, grads, hvps, draw.norm(1.0), RHO, ALPHA, XI)
    assert grads[0].isfinite().tolist() == [False, False, True]
