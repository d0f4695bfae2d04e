"""What every back end must do, on every dtype and device.

Tensors come in the sizes, memory formats and alignments that Hypothesis draws. Results are compared with the formula in
float64, within bounds derived from the number of roundings, or bit for bit where the contract is a copy.
"""

from __future__ import annotations

import torch
from hypothesis import settings
from torch import Tensor

from gam_fused.kernels.interface import accumulation_dtype

RHO, ALPHA, XI = 0.3, 0.7, 0.01
few_examples = settings(max_examples=15)


def assert_sum_rounded_once(actual: Tensor, a: Tensor, b: Tensor) -> None:
    """``actual`` is a + b for an exact ``a`` and a ``b`` that is the product of a tensor and a computed factor.

    In the accumulation dtype b takes at most 7 roundings (ρ, ξ, ‖g‖ + ξ, its product with ξ, the sum with ‖u‖, the
    quotient, the product with the tensor) and a + b one more; so do the float64 numbers it is compared with.
    Rounding to a narrower dtype adds half a unit in the last place, or half a subnormal.
    """
    wide = accumulation_dtype(actual.dtype)
    roundings = 16 if wide == torch.float64 else 8
    bound = roundings * torch.finfo(wide).eps / 2 * (a.abs() + b.abs())
    if actual.dtype in (torch.bfloat16, torch.float16):
        info = torch.finfo(actual.dtype)
        bound += info.eps / 2 * (a + b).abs() + info.smallest_normal * info.eps / 2
    error = (actual.double() - (a + b)).abs()
    assert bool((error <= bound).all()), f"off by up to {(error / bound).max().item()} times the bound"
