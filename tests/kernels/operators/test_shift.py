"""To another point without a backup, along one list or from one to another; and the norm of that difference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gam_fused.kernels import Backend
from gam_fused.kernels.grouping import global_difference_norm
from gam_fused.kernels.interface import accumulation_dtype
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

over_forms = pytest.mark.parametrize("with_starts", [False, True], ids=["along ends", "from starts"])
over_origins = pytest.mark.parametrize("with_origins", [False, True], ids=["from where they are", "from origins"])


@over_forms
@over_origins
@few_examples
@given(specs, other_layouts, seeds, st.sampled_from([RHO, -RHO, 0.0]))
def test_shift_moves_from_the_origin_along_the_difference(
    backend: Backend,
    dtype: torch.dtype,
    device: torch.device,
    with_origins: bool,
    with_starts: bool,
    specs: list[Spec],
    layouts: list[str],
    seed: int,
    rho: float,
) -> None:
    draw = Draw(dtype, device, seed)
    params, ends = draw.normal(specs), draw.normal(relaid(specs, layouts))
    origins = draw.normal(relaid(specs, layouts)) if with_origins else []
    starts = draw.normal(specs) if with_starts else []
    theta, unwritten = [t.clone() for t in (origins or params)], copies([*origins, *ends, *starts])
    gaps = surroundings(copies(params))

    backend.shift_(params, origins, ends, starts, draw.norm(1.7), rho, XI)

    scale = rho / (draw.norm(1.7).double() + XI)
    wide = accumulation_dtype(dtype)
    for i, (param, origin) in enumerate(zip(params, theta, strict=True)):
        # The difference is rounded to the accumulation dtype, to which the rest is relative.
        direction = ends[i].to(wide) - starts[i].to(wide) if with_starts else ends[i].to(wide)
        assert_sum_rounded_once(param, origin.double(), scale * direction.double())
    assert_same_bits([*origins, *ends, *starts], unwritten)
    assert_same_bits(surroundings(copies(params)), gaps)


@pytest.mark.parametrize(("norm", "xi"), [(math.nan, 0.1), (math.inf, 0.1), (0.0, 0.0)])
@pytest.mark.parametrize("seed", [None, 1])
def test_shift_leaves_the_origin_to_the_bit_where_the_quotient_is_not_finite(
    backend: Backend, dtype: torch.dtype, device: torch.device, seed: int | None, norm: float, xi: float
) -> None:
    draw = Draw(dtype, device)
    specs = [Spec((9,), "contiguous"), Spec((3, 5), "transposed")]
    params, origins, ends = draw.any_bits(specs), draw.any_bits(specs), draw.normal(specs)
    before = [p.clone() for p in params]
    backend.shift_(params, [], ends, [], draw.norm(norm), RHO, xi, rounding_seed=seed)
    assert_same_bits(params, before)
    backend.shift_(params, origins, ends, ends, draw.norm(norm), RHO, xi, rounding_seed=seed)
    assert_same_bits(params, origins)


@pytest.mark.parametrize(("name", "value"), [("norm", 2.0), ("rho", 0.5), ("xi", 0.5)], ids=str)
def test_every_number_given_to_shift_reaches_the_result(backend: Backend, name: str, value: float) -> None:
    numbers: dict[str, Any] = {"norm": 1.0, "rho": 0.1, "xi": 0.1}
    moved = []
    for case in (numbers, {**numbers, name: value}):
        params = [torch.zeros(1)]
        backend.shift_(params, [], [torch.ones(1)], [], **{**case, "norm": torch.tensor(case["norm"])})
        moved.append(params[0].item())
    assert moved[0] != moved[1]


@few_examples
@given(specs, other_layouts, seeds)
def test_difference_norm_is_that_of_the_differences(
    backend: Backend, dtype: torch.dtype, device: torch.device, specs: list[Spec], layouts: list[str], seed: int
) -> None:
    draw = Draw(dtype, device, seed)
    ends, starts = draw.normal(specs), draw.normal(relaid(specs, layouts))
    norm = backend.difference_norm(ends, starts)
    expected = math.sqrt(
        sum((e.double() - s.double()).square().sum().item() for e, s in zip(ends, starts, strict=True))
    )
    # As for a norm, and one rounding of each difference.
    tolerance = (math.sqrt(sum(t.numel() for t in ends)) + 6) * torch.finfo(accumulation_dtype(dtype)).eps / 2
    assert norm.item() == pytest.approx(expected, rel=tolerance, abs=0)
    assert (norm.shape, norm.dtype) == ((), accumulation_dtype(dtype) if specs else torch.float32)


def test_differences_of_narrow_numbers_are_not_rounded_to_them(
    backend: Backend, dtype: torch.dtype, device: torch.device
) -> None:
    """2048 − 0.75 would be 2047 in float16, and 256 − 0.75 would be 255 in bfloat16."""
    large = 256.0 if dtype == torch.bfloat16 else 2048.0
    ends, starts, origins = (
        [torch.full((3,), value, dtype=dtype, device=device)] for value in (large, 0.75, 1.0 - large)
    )
    wide = accumulation_dtype(dtype)
    found = backend.difference_norm(ends, starts).item()
    assert found == pytest.approx((large - 0.75) * math.sqrt(3), rel=2 * torch.finfo(wide).eps, abs=0)
    params = [torch.zeros(3, dtype=dtype, device=device)]
    backend.shift_(params, origins, ends, starts, torch.tensor(1.0, dtype=wide, device=device), 1.0, 0.0)
    assert params[0].tolist() == [0.25] * 3


def test_difference_norm_of_tensors_of_several_dtypes(backend: Backend) -> None:
    ends = [torch.full((4,), 3.0), torch.full((4,), 3.0, dtype=torch.float64)]
    starts = [torch.full((4,), 1.0), torch.full((4,), 2.0, dtype=torch.float64)]
    found = global_difference_norm(backend, ends, starts)
    assert (found.dtype, found.item()) == (torch.float64, pytest.approx(math.sqrt(20), rel=1e-7))
    assert global_difference_norm(backend, [], []).item() == 0
