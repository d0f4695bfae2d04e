"""The casts made by hand are those that autocast makes."""

from __future__ import annotations

import pytest
import torch

from gam_fused.second_order import autocast
from tests.second_order.layers_common import draw

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@over_dtypes
def test_operators_of_the_lower_precision_are_cast_to_it_but_not_from_float64(dtype: torch.dtype) -> None:
    tensor = draw(3, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        cast, nothing = autocast.to_lower_precision("conv2d", tensor, None)
    assert nothing is None
    assert cast is not None
    assert cast.dtype == (torch.float64 if dtype == torch.float64 else torch.bfloat16)


@over_dtypes
def test_operators_of_float32_are_cast_to_it_but_not_from_float64(dtype: torch.dtype) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        cast = autocast.to_float32("cross_entropy_loss", draw(3, dtype=dtype))
    assert cast.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@over_dtypes
def test_nothing_is_cast_outside_of_autocast_or_without_a_rule(dtype: torch.dtype) -> None:
    tensor = draw(3, dtype=dtype)
    assert autocast.to_lower_precision("conv2d", tensor) == (tensor,)
    assert autocast.to_float32("cross_entropy_loss", tensor) is tensor
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast.to_lower_precision("gelu", tensor) == (tensor,)
        assert autocast.to_float32("softmax.int", tensor) is tensor  # a rule on CUDA alone
        with torch.autocast("cpu", enabled=False):
            assert autocast.to_lower_precision("conv2d", tensor) == (tensor,)


def test_a_device_with_rules_unknown_here_is_known_while_autocast_is_off_there() -> None:
    assert autocast.is_known("cpu")
    assert autocast.is_known("cuda")
    assert autocast.is_known("xpu")
    assert not autocast.is_known("meta")  # it has no autocast
