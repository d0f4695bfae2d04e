"""Activations: values, gradients and double backward are PyTorch's, and right."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gam_fused.second_order import activations, sizes
from tests.second_order.common import Operators
from tests.second_order.layers_common import (
    Function,
    assert_differentiable_twice,
    assert_like_pytorch,
    assert_third_derivative_like_pytorch,
    draw,
    every_size_worthwhile,
    is_ours,
)

ACTIVATIONS: dict[str, tuple[Function, Function]] = {
    "gelu": (activations.gelu, F.gelu),
    "gelu_tanh": (partial(activations.gelu, approximate="tanh"), partial(F.gelu, approximate="tanh")),
    "silu": (activations.silu, F.silu),
    "relu": (activations.relu, F.relu),
}
over_activations = pytest.mark.parametrize("name", ACTIVATIONS)


@pytest.fixture(autouse=True, scope="module")
def _every_size() -> Iterator[None]:
    with every_size_worthwhile():
        yield


@over_activations
@settings(max_examples=20)
@given(
    shape=st.lists(st.integers(0, 4), max_size=4), scale=st.sampled_from([0.1, 1.0, 6.0, 40.0]), strided=st.booleans()
)
def test_an_activation_is_pytorchs(name: str, shape: list[int], scale: float, strided: bool) -> None:
    layer, original = ACTIVATIONS[name]
    inputs = draw(*shape).detach() * scale
    assert_like_pytorch(layer, original, [(inputs.mT if strided and len(shape) > 1 else inputs).requires_grad_()])


@over_activations
def test_an_activation_is_differentiable_twice(name: str) -> None:
    assert_differentiable_twice(ACTIVATIONS[name][0], [(draw(3, 5).detach() * 2).requires_grad_()])


@over_activations
def test_third_derivatives_are_pytorchs(name: str) -> None:
    assert_third_derivative_like_pytorch(*ACTIVATIONS[name], [draw(3, 5)])


@over_activations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_floating_numbers_are_pytorchs(name: str, dtype: torch.dtype) -> None:
    assert_like_pytorch(*ACTIVATIONS[name], [draw(20, 30, dtype=dtype)])


@over_activations
def test_a_double_backward_keeps_no_more_tensors_than_it_was_given(name: str) -> None:
    """The input for the gradient; the input and the incoming gradient for the double backward. ReLU: the output."""
    layer, _ = ACTIVATIONS[name]
    saved = []
    inputs, direction = draw(3, 5), draw(3, 5)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        output = layer(inputs)
        torch.autograd.grad(output, inputs, direction, create_graph=True)
    expected = {output.data_ptr()} if name == "relu" else {inputs.data_ptr(), direction.data_ptr()}
    assert set(saved) == expected


@pytest.mark.parametrize("name", ["relu", "silu"])
def test_in_place_is_pytorchs(name: str) -> None:
    layer, original = getattr(activations, name), ACTIVATIONS[name][1]
    inputs = draw(3, 5)
    hidden = inputs * 1
    assert layer(hidden, inplace=True) is hidden
    assert torch.equal(hidden, original(inputs))


def test_a_second_derivative_that_is_zero_takes_no_operator() -> None:
    inputs, direction = draw(3, 5), draw(3, 5)
    (slope,) = torch.autograd.grad(activations.relu(inputs), inputs, direction, create_graph=True)
    ones = torch.ones_like(slope)
    with Operators() as operators:
        _, nothing = torch.autograd.grad(slope, (direction, inputs), ones, allow_unused=True)
    assert nothing is None
    assert operators.names == ["aten.threshold_backward.default"]


def test_an_unknown_approximation_is_pytorchs_error() -> None:
    with pytest.raises(RuntimeError, match="approximate argument must be"):
        activations.gelu(draw(3), approximate="cosh")


def test_small_tensors_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "WORTHWHILE", 12)
    assert not is_ours(activations.gelu(draw(11)))
    assert is_ours(activations.gelu(draw(12)))
