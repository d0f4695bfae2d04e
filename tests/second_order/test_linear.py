"""Linear layers: values, gradients and double backward are PyTorch's, and right."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gam_fused.second_order import linear, sizes
from tests.second_order.common import Operators
from tests.second_order.layers_common import (
    assert_differentiable_twice,
    assert_like_pytorch,
    assert_third_derivative_like_pytorch,
    draw,
    every_size_worthwhile,
    is_ours,
)


@pytest.fixture(autouse=True, scope="module")
def _every_size() -> Iterator[None]:
    with every_size_worthwhile():
        yield


@st.composite
def operands(draw_: st.DrawFn) -> list[Tensor]:
    """Input of any number of dimensions and layout, weight, perhaps a bias; some of them frozen."""
    sizes_ = st.integers(0, 4)
    batch, inner, outer = draw_(st.lists(sizes_, max_size=3)), draw_(sizes_), draw_(sizes_)
    tensors = [draw(*batch, inner), draw(outer, inner)]
    if draw_(st.booleans()) and len(batch) > 1:
        tensors[0] = tensors[0].detach().transpose(0, -1).contiguous().transpose(0, -1)
    if draw_(st.booleans()):
        tensors.append(draw(outer))
    if draw_(st.booleans()):
        tensors[1] = tensors[1].detach().t().contiguous().t()
    trained = draw_(st.lists(st.booleans(), min_size=3, max_size=3).filter(any))
    tensors = [t.detach().requires_grad_(is_trained) for t, is_trained in zip(tensors, trained, strict=False)]
    return tensors if any(t.requires_grad for t in tensors) else [t.requires_grad_() for t in tensors]


@settings(max_examples=80)
@given(operands())
def test_a_linear_layer_is_pytorchs(tensors: list[Tensor]) -> None:
    assert_like_pytorch(linear.linear, F.linear, tensors)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)], ids=str)
def test_a_linear_layer_is_differentiable_twice(shape: tuple[int, ...]) -> None:
    tensors = [draw(*shape), draw(2, 4), draw(2)]
    assert is_ours(linear.linear(*tensors))
    assert_differentiable_twice(linear.linear, tensors)


@pytest.mark.parametrize("only", [0, 1, 2])
def test_a_double_backward_of_one_gradient_alone_is_pytorchs(only: int) -> None:
    tensors, direction = [draw(2, 3, 4), draw(5, 4), draw(5)], draw(2, 3, 5)
    found = []
    for function in (linear.linear, F.linear):
        grads = torch.autograd.grad(function(*tensors), tensors, direction, create_graph=True)
        given_ = torch.linspace(-1, 2, grads[only].numel(), dtype=torch.float64).view_as(grads[only])
        found.append(torch.autograd.grad(grads[only], [direction, *tensors[:2]], given_, allow_unused=True))
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_floating_numbers_are_pytorchs(dtype: torch.dtype) -> None:
    assert_like_pytorch(
        linear.linear, F.linear, [draw(4, 6, dtype=dtype), draw(5, 6, dtype=dtype), draw(5, dtype=dtype)]
    )


def test_third_derivatives_are_pytorchs() -> None:
    assert_third_derivative_like_pytorch(linear.linear, F.linear, [draw(2, 3, 4), draw(2, 4), draw(2)])


def test_a_double_backward_is_four_products() -> None:
    tensors, direction = [draw(6, 4), draw(5, 4), draw(5)], draw(6, 5)
    grads = torch.autograd.grad(linear.linear(*tensors), tensors, direction, create_graph=True)
    with Operators() as operators:
        torch.autograd.grad(grads, [direction, *tensors[:2]], [torch.ones_like(each) for each in grads])
    products = [name for name in operators.names if "mm" in name]
    assert sorted(products) == ["aten.addmm.default", "aten.addmm_.default", "aten.mm.default", "aten.mm.default"]
    assert not [name for name in operators.names if "add." in name or "sum" in name]


def test_an_error_is_pytorchs() -> None:
    with pytest.raises(RuntimeError) as expected:
        F.linear(draw(2, 3), draw(4, 5))
    with pytest.raises(RuntimeError) as caught:
        linear.linear(draw(2, 3), draw(4, 5))
    assert str(caught.value) == str(expected.value)


def test_small_layers_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "WORTHWHILE", 12)
    assert not is_ours(linear.linear(draw(2, 5), draw(5, 5)))
    assert is_ours(linear.linear(draw(3, 4), draw(5, 4)))


@pytest.mark.parametrize("shape", [(1, 5), (3, 5), (1,), ()], ids=str)
def test_a_bias_that_is_broadcast_is_pytorchs(shape: tuple[int, ...]) -> None:
    assert_like_pytorch(linear.linear, F.linear, [draw(3, 4), draw(5, 4), draw(*shape)])


def test_autocast_around_the_derivatives_alone_is_pytorchs() -> None:
    found = []
    for function in (linear.linear, F.linear):
        torch.manual_seed(0)
        tensors = [draw(6, 4, dtype=torch.float32), draw(5, 4, dtype=torch.float32), draw(5, dtype=torch.float32)]
        output = function(*tensors).sin()
        with torch.autocast("cpu", torch.bfloat16):
            grads = torch.autograd.grad(output.sum(), tensors, create_graph=True)
            found.append(torch.autograd.grad(torch.stack([each.square().sum() for each in grads]).sum(), tensors))
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=4e-2 * theirs.abs().max().item())


def test_a_result_can_be_detached_in_place() -> None:
    assert not linear.linear(draw(3, 4), draw(5, 4)).detach_().requires_grad
