"""Every number that float16 and bfloat16 have is widened and rounded as PyTorch does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.native.common import narrow, needs_native, ops
from tests.kernels.tensor_lists import bits

pytestmark = needs_native


@narrow
def test_every_bit_pattern_widens_and_rounds_as_pytorch_does(dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = patterns[patterns.isfinite()]
    for scale in (1.0, 0.3, 7.7e-4, 1.1e3):
        grads, hvps = [torch.zeros_like(values)], [values.clone()]
        ops.combine_([values.clone()], [values.clone()], grads, hvps, torch.tensor(1.0), 1.0, scale, 0.0)
        expected = (values.float() * torch.tensor(scale)).to(dtype)
        assert torch.equal(grads[0].float(), expected.float())


def all_patterns(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@narrow
def test_every_bit_pattern_passes_through_the_accumulation_type(dtype: torch.dtype) -> None:
    one = torch.tensor(1.0)
    for rest in range(9):  # of what vector registers hold
        values = all_patterns(dtype)[rest:].clone()
        grads, zeros = [values.clone()], [torch.full_like(values, -0.0)]
        ops.combine_([values.clone()], [values], grads, zeros, one, 1.0, 1.0, 0.0)  # g + (−0) is g, of either sign
        is_nan = values.isnan()
        assert torch.equal(grads[0].isnan(), is_nan)
        assert torch.equal(bits(grads[0])[~is_nan], bits(values)[~is_nan])


@narrow
def test_every_bit_pattern_alone_has_its_own_magnitude(dtype: torch.dtype) -> None:
    """The root of a square that is exact in float64: what a pattern widens to, with no narrowing after it."""
    patterns = all_patterns(dtype)
    values = patterns[patterns.isfinite() & (patterns >= 0)]
    norms = torch.stack([ops.l2_norm([value]) for value in values])
    assert torch.equal(norms, values.float())


@narrow
@pytest.mark.parametrize("scale", [1.0, -1.0, 2.0**-8, 2.0**-11, 2.0**-12, 0.3, 1e-3, 700.0])
def test_sums_are_rounded_as_pytorch_does(dtype: torch.dtype, scale: float) -> None:
    """Powers of two make ties by the thousand, large factors overflow, small ones end among the subnormals."""
    patterns = all_patterns(dtype)
    values = patterns[patterns.isfinite()]
    for _ in range(8):
        g, h = values, values[torch.randperm(len(values))]
        grads = [g.clone()]
        ops.combine_([g.clone()], [g], grads, [h], torch.tensor(1.0), 1.0, scale, 0.0)
        expected = (g.float() + torch.tensor(scale) * h.float()).to(dtype)
        is_number = ~expected.isnan()
        assert torch.equal(bits(grads[0])[is_number], bits(expected)[is_number])
        assert torch.equal(grads[0].isnan(), ~is_number)
