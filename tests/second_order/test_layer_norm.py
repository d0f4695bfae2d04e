"""Layer and RMS normalization: shapes, and what PyTorch refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gam_fused.second_order import layer_norm as layer_norm_module
from gam_fused.second_order import rms_norm as rms_norm_module
from gam_fused.second_order.layer_norm import layer_norm
from gam_fused.second_order.rms_norm import rms_norm
from tests.second_order.common import derivatives, is_ours

PAIRS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "layer_norm": (layer_norm, F.layer_norm),
    "rms_norm": (rms_norm, F.rms_norm),
}
over_pairs = pytest.mark.parametrize(("ours", "theirs"), list(PAIRS.values()), ids=list(PAIRS))


def test_replace_pytorchs() -> None:
    assert {F.layer_norm: layer_norm} == layer_norm_module.REPLACEMENTS
    assert {F.rms_norm: rms_norm} == rms_norm_module.REPLACEMENTS


@over_pairs
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 1), (2, 3000), (130, 3), (1, 1025)], ids=str)
def test_every_length_of_a_row(ours: Any, theirs: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    w = torch.randn(shape[-1:], dtype=torch.float64, requires_grad=True)
    found = derivatives(lambda x, w: ours(x, w.shape, w, eps=0.1), [x, w])
    expected = derivatives(lambda x, w: theirs(x, w.shape, w, eps=0.1), [x, w])
    for what, values in found.items():
        for one, other in zip(values, expected[what], strict=True):
            # A row of one element is constant after layer normalization: what is zero in theory has no relative error.
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@over_pairs
def test_normalized_shape_may_be_any_sequence(ours: Any, theirs: Any) -> None:
    x = torch.randn(3, 4, 5, requires_grad=True)
    for normalized_shape in ([4, 5], (4, 5), torch.Size([4, 5])):
        output = ours(x, normalized_shape)
        assert is_ours(output)
        assert torch.equal(output, theirs(x, normalized_shape))


@over_pairs
@pytest.mark.parametrize("normalized_shape", [[4], [5, 4], [2, 3, 4, 5], []], ids=str)
def test_refuse_what_pytorch_refuses(ours: Any, theirs: Any, normalized_shape: list[int]) -> None:
    x = torch.randn(3, 4, 5, requires_grad=True)
    said = []
    for function in (theirs, ours):
        with pytest.raises((RuntimeError, ValueError)) as raised:
            function(x, normalized_shape)
        said.append((raised.type, str(raised.value)))
    assert said[0] == said[1]
