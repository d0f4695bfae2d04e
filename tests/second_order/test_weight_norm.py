"""Weight normalization: values and first derivatives are PyTorch's, second derivatives are right."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from gam_fused import GAM
from gam_fused.second_order import layers
from gam_fused.second_order.weight_norm import weight_norm
from tests import literal
from tests.literal import assert_equal_to_rounding
from tests.second_order.common import Operators
from tests.second_order.layers_common import TOLERANCE, draw

SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "linear": ((4, 3), 0),
    "convolution": ((2, 3, 2, 2), 0),
    "last_dimension": ((4, 3, 2), 2),
    "middle_dimension": ((2, 3, 2), 1),
    "whole_tensor": ((4, 3), -1),
}
over_shapes = pytest.mark.parametrize("name", SHAPES)


def weights(name: str) -> tuple[Tensor, Tensor, int]:
    shape, dim = SHAPES[name]
    sizes = [size if place == dim else 1 for place, size in enumerate(shape)]
    return draw(*shape), draw(*sizes) if dim >= 0 else draw(), dim


@over_shapes
def test_all_derivatives_agree_with_differences(name: str) -> None:
    v, g, dim = weights(name)
    assert gradcheck(lambda v, g: weight_norm(v, g, dim), (v, g))
    assert gradgradcheck(lambda v, g: weight_norm(v, g, dim), (v, g))


@over_shapes
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_value_and_gradient_are_pytorchs(name: str, dtype: torch.dtype) -> None:
    v, g, dim = weights(name)
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (v, g)]
    results = []
    for function in (weight_norm, torch._weight_norm):
        output = function(*inputs, dim)
        results.append([output, *torch.autograd.grad(output.sum(), inputs)])
    torch.testing.assert_close(*results, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


class ByHand(nn.Module):
    """A linear layer and a convolution with normalized weights."""

    def __init__(self, theirs: nn.Module) -> None:
        super().__init__()
        self.params = nn.ParameterList(param.detach() for param in theirs.parameters())

    def forward(self, inputs: Tensor) -> Tensor:
        bias1, g1, v1, bias2, g2, v2 = self.params
        hidden = nn.functional.linear(inputs, g1 * v1 / v1.norm(dim=1, keepdim=True), bias1).tanh()
        weight = g2 * v2 / v2.pow(2).sum((1, 2), keepdim=True).sqrt()
        return nn.functional.conv1d(hidden[:, None], weight, bias2)


@pytest.mark.parametrize("second_order", ["auto", "off"])
@pytest.mark.parametrize("way", ["parametrization", "hook"])
def test_gam_takes_the_literal_step(way: str, second_order: str) -> None:
    normalize = nn.utils.parametrizations.weight_norm
    if way == "hook":
        normalize = nn.utils.weight_norm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # hooks are the old way
        model = nn.Sequential(
            normalize(nn.Linear(3, 5)), nn.Tanh(), nn.Unflatten(1, (1, 5)), normalize(nn.Conv1d(1, 2, 3))
        ).double()
    inputs = draw(4, 3).detach()

    def loss(net: Any) -> Tensor:
        return net(inputs).square().mean()

    expected = literal.step(literal.as_function(ByHand(model), loss), model.parameters(), rho=0.1, alpha=0.4, lr=0.3)
    GAM(model.parameters(), rho=0.1, alpha=0.4, lr=0.3, second_order=second_order).step(lambda: loss(model))
    assert_equal_to_rounding(model.parameters(), expected)


def test_layers_takes_it_where_it_is_differentiated_and_nowhere_else() -> None:
    v, g, dim = weights("linear")

    def fused() -> bool:
        with Operators() as operators:
            torch._weight_norm(v, g, dim)
        return any("_weight_norm_interface" in name for name in operators.names)

    with layers():
        assert not fused()
        with torch.no_grad():
            assert fused()
    assert fused()
