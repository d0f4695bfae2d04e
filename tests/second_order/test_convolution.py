"""Convolutions: values, gradients and double backward are PyTorch's, and right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gam_fused.second_order import convolution
from tests.second_order.common import Operators
from tests.second_order.layers_common import (
    Function,
    assert_differentiable_twice,
    assert_like_pytorch,
    assert_third_derivative_like_pytorch,
    draw,
)

FORWARD = [(convolution.conv1d, F.conv1d), (convolution.conv2d, F.conv2d), (convolution.conv3d, F.conv3d)]
TRANSPOSED = [
    (convolution.conv_transpose1d, F.conv_transpose1d),
    (convolution.conv_transpose2d, F.conv_transpose2d),
    (convolution.conv_transpose3d, F.conv_transpose3d),
]


@st.composite
def problems(draw_: st.DrawFn) -> tuple[int, bool, list[Tensor], dict[str, Any]]:
    """(dimensions, transposed, input with weight and perhaps bias, options)."""
    pick = lambda *values: draw_(st.sampled_from(values))  # noqa: E731
    dims, transposed, groups = pick(1, 2, 3), pick(False, True), pick(1, 2, 3)
    batch, wide, narrow = pick(0, 1, 2), groups * pick(1, 2), groups * pick(1, 2)
    kernel = [pick(1, 2, 3) for _ in range(dims)]
    options: dict[str, Any] = {"groups": groups}
    options["stride"] = pick(1, [pick(1, 2) for _ in range(dims)])
    options["dilation"] = pick(1, [pick(1, 2) for _ in range(dims)], (2,))
    if transposed:
        options["padding"] = pick(0, 1)
        strides = [options["stride"]] * dims if isinstance(options["stride"], int) else options["stride"]
        options["output_padding"] = [pick(0, stride - 1) for stride in strides]
        shape = (wide, narrow // groups, *kernel)
    else:
        options["padding"] = pick(0, [pick(0, 1, 2) for _ in range(dims)], "valid")
        if options["stride"] == 1:
            options["padding"] = pick(options["padding"], "same")
        shape = (narrow, wide // groups, *kernel)
    inputs = draw(batch, wide, *[pick(5, 6) for _ in range(dims)])
    layout = pick("contiguous", "channels_last", "strided")
    if layout == "channels_last" and dims > 1:
        inputs = inputs.detach().contiguous(memory_format=(torch.channels_last, torch.channels_last_3d)[dims - 2])
    elif layout == "strided":
        inputs = inputs.detach().transpose(0, 1).contiguous().transpose(0, 1)
    tensors = [inputs.detach().requires_grad_(pick(True, True, False)), draw(*shape)]
    if pick(True, False):
        tensors.append(draw(narrow))
    return dims, transposed, tensors, options


def pair(dims: int, transposed: bool, options: dict[str, Any]) -> tuple[Function, Function]:
    layer, original = (TRANSPOSED if transposed else FORWARD)[dims - 1]
    return (lambda *tensors: layer(*tensors, **options)), (lambda *tensors: original(*tensors, **options))


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@settings(max_examples=60)
@given(problems())
def test_a_convolution_is_pytorchs(problem: tuple[int, bool, list[Tensor], dict[str, Any]]) -> None:
    dims, transposed, tensors, options = problem
    assert_like_pytorch(*pair(dims, transposed, options), tensors)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@settings(max_examples=15)
@given(problems())
def test_a_convolution_is_differentiable_twice(problem: tuple[int, bool, list[Tensor], dict[str, Any]]) -> None:
    dims, transposed, tensors, options = problem
    if dims == 3 or not tensors[0].numel():
        dims, transposed, options = 1, False, {"stride": 2, "padding": 1}
        tensors = [draw(1, 2, 5), draw(2, 2, 3), draw(2)]
    layer, _ = pair(dims, transposed, options)
    assert_differentiable_twice(layer, tensors, fast_mode=True)


@pytest.mark.parametrize("frozen", ["input", "weight", "bias", "input and weight"])
def test_what_needs_no_gradient_is_left_out(frozen: str) -> None:
    tensors = [draw(2, 3, 5, 5), draw(4, 3, 3, 3), draw(4)]
    for tensor, name in zip(tensors, ("input", "weight", "bias"), strict=True):
        tensor.requires_grad_(name not in frozen.split(" and "))
    assert_like_pytorch(convolution.conv2d, F.conv2d, tensors)


@pytest.mark.parametrize("only", [0, 1, 2])
def test_a_double_backward_of_one_gradient_alone_is_pytorchs(only: int) -> None:
    tensors = [draw(2, 3, 5, 5), draw(4, 3, 3, 3), draw(4)]
    direction = draw(2, 4, 3, 3)
    found = []
    for function in (convolution.conv2d, F.conv2d):
        grads = torch.autograd.grad(function(*tensors), tensors, direction, create_graph=True)
        found.append(
            torch.autograd.grad(grads[only], [direction, *tensors[:2]], torch.ones_like(grads[only]), allow_unused=True)
        )
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_floating_numbers_are_pytorchs(dtype: torch.dtype) -> None:
    tensors = [draw(4, 8, 9, 9, dtype=dtype), draw(6, 8, 3, 3, dtype=dtype), draw(6, dtype=dtype)]
    assert_like_pytorch(
        lambda *t: convolution.conv2d(*t, stride=2, padding=1), lambda *t: F.conv2d(*t, stride=2, padding=1), tensors
    )


def test_an_input_without_a_batch_is_pytorchs() -> None:
    assert_like_pytorch(convolution.conv2d, F.conv2d, [draw(3, 5, 5), draw(4, 3, 3, 3), draw(4)])
    assert_like_pytorch(convolution.conv_transpose1d, F.conv_transpose1d, [draw(3, 5), draw(3, 2, 3), draw(2)])


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((4, 2, 3, 3), {}),
        ((4, 3, 3), {}),
        ((4, 3, 9, 9), {}),
        ((4, 3, 3, 3), {"padding": "same", "stride": 2}),
        ((4, 3, 3, 3), {"padding": "odd"}),
    ],
    ids=["channels", "dimensions", "kernel", "same", "word"],
)
def test_an_error_is_pytorchs(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    with pytest.raises((RuntimeError, ValueError)) as expected:
        F.conv2d(draw(2, 3, 5, 5), draw(*shape), **options)
    with pytest.raises(expected.type) as caught:
        convolution.conv2d(draw(2, 3, 5, 5), draw(*shape), **options)
    assert str(caught.value) == str(expected.value)


@pytest.mark.parametrize("transposed", [False, True])
def test_third_derivatives_are_pytorchs(transposed: bool) -> None:
    layer, original = (TRANSPOSED if transposed else FORWARD)[1]
    assert_third_derivative_like_pytorch(layer, original, [draw(2, 2, 4, 4), draw(2, 2, 3, 3), draw(2)])


def test_a_double_backward_keeps_no_more_tensors_than_it_was_given() -> None:
    tensors, direction, saved = [draw(2, 2, 4, 4), draw(2, 2, 3, 3), draw(2)], draw(2, 2, 2, 2), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        torch.autograd.grad(convolution.conv2d(*tensors), tensors, direction, create_graph=True)
    assert set(saved) == {tensor.data_ptr() for tensor in (*tensors[:2], direction)}


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_a_double_backward_is_three_calls_and_a_sum(with_bias: bool) -> None:
    inputs, weight = draw(2, 4, 6, 6), draw(3, 4, 3, 3)
    tensors = [inputs, weight, *([draw(3)] if with_bias else [])]
    grad_output = draw(2, 3, 4, 4)
    grads = torch.autograd.grad(convolution.conv2d(*tensors), tensors, grad_output, create_graph=True)
    vectors = [torch.ones_like(grad) for grad in grads]
    with Operators() as operators:
        torch.autograd.grad(grads, [grad_output, inputs, weight], vectors)
    two_products = ["aten.convolution.default", "aten.convolution.default", "aten.add_.Tensor"]
    assert operators.names == [*two_products, "aten.convolution_backward.default"]
