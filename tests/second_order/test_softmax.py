"""Softmax, log-softmax, cross-entropy: values, gradients and double backward are PyTorch's, and right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gam_fused.second_order import sizes, softmax
from tests.second_order.layers_common import (
    Function,
    assert_differentiable_twice,
    assert_like_pytorch,
    assert_third_derivative_like_pytorch,
    draw,
    every_size_worthwhile,
    is_ours,
)

PAIRS: dict[str, tuple[Function, Function]] = {
    "softmax": (softmax.softmax, torch.softmax),
    "log_softmax": (softmax.log_softmax, torch.log_softmax),
}
over_pairs = pytest.mark.parametrize("name", PAIRS)


@pytest.fixture(autouse=True, scope="module")
def _every_size() -> Iterator[None]:
    with every_size_worthwhile():
        yield


@over_pairs
@settings(max_examples=25)
@given(shape=st.lists(st.integers(0, 4), min_size=1, max_size=4), where=st.integers(0, 3), strided=st.booleans())
def test_a_softmax_is_pytorchs(name: str, shape: list[int], where: int, strided: bool) -> None:
    layer, original = PAIRS[name]
    dim = where % (2 * len(shape)) - len(shape)
    inputs = (draw(*shape).detach() * 3).requires_grad_()
    if strided and len(shape) > 1:
        inputs = inputs.detach().mT.requires_grad_()
    assert_like_pytorch(lambda x: layer(x, dim), lambda x: original(x, dim), [inputs])


@over_pairs
def test_a_softmax_is_differentiable_twice(name: str) -> None:
    assert_differentiable_twice(lambda x: PAIRS[name][0](x, 1), [draw(2, 4, 3)])


@over_pairs
def test_third_derivatives_are_pytorchs(name: str) -> None:
    layer, original = PAIRS[name]
    assert_third_derivative_like_pytorch(lambda x: layer(x, 0), lambda x: original(x, 0), [draw(5, 3)])


@over_pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("into", [None, torch.float64], ids=str)
def test_narrow_floating_numbers_and_casts_are_pytorchs(
    name: str, dtype: torch.dtype, into: torch.dtype | None
) -> None:
    layer, original = PAIRS[name]
    assert_like_pytorch(
        lambda x: layer(x, -1, into), lambda x: original(x, -1, dtype=into), [draw(20, 30, dtype=dtype)]
    )


def test_minus_infinity_is_pytorchs() -> None:
    inputs = draw(4, 5).detach()
    inputs[:, 2] = -torch.inf
    assert_like_pytorch(lambda x: softmax.softmax(x, -1), lambda x: torch.softmax(x, -1), [inputs.requires_grad_()])


# ------------------------------------------------------------------ cross-entropy


@st.composite
def problems(draw_: st.DrawFn) -> tuple[Tensor, dict[str, Any]]:
    """(logits, the other arguments)."""
    pick = lambda *values: draw_(st.sampled_from(values))  # noqa: E731
    classes, batch, places = pick(1, 2, 5), pick(1, 2, 3), pick((), (2,), (2, 3))
    shape = pick((classes,), (batch, classes, *places), (batch, classes, *places))
    positions = shape[2:] if len(shape) == 1 else (shape[0], *shape[2:])
    arguments: dict[str, Any] = {"reduction": pick("mean", "sum", "none"), "label_smoothing": pick(0.0, 0.0, 0.3)}
    if pick(True, False):
        arguments["weight"] = torch.rand(classes, dtype=torch.float64) + 0.1
    if pick("indices", "indices", "probabilities") == "indices":
        arguments["target"] = torch.randint(classes, positions)
        if pick(True, False):
            arguments["ignore_index"] = pick(0, -3)
            arguments["target"][torch.rand(positions) < 0.4] = arguments["ignore_index"]
            if arguments["reduction"] == "mean" and (arguments["target"] == arguments["ignore_index"]).all():
                arguments["reduction"] = "sum"  # 0 / 0: below
    else:
        arguments["target"] = torch.rand(shape, dtype=torch.float64)
    return draw(*shape), arguments


@settings(max_examples=100)
@given(problems())
def test_cross_entropy_is_pytorchs(problem: tuple[Tensor, dict[str, Any]]) -> None:
    logits, arguments = problem
    assert_like_pytorch(
        lambda x: softmax.cross_entropy(x, **arguments), lambda x: F.cross_entropy(x, **arguments), [logits]
    )
    assert is_ours(softmax.cross_entropy(logits, **{**arguments, "reduction": "none"}))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cross_entropy_is_differentiable_twice(reduction: str, smoothing: float) -> None:
    target, weight = torch.tensor([0, 3, -100, 1]), torch.rand(4, dtype=torch.float64) + 0.5
    loss = lambda x: softmax.cross_entropy(x, target, weight, reduction=reduction, label_smoothing=smoothing)  # noqa: E731
    assert_differentiable_twice(loss, [draw(4, 4)])


def test_third_derivatives_of_cross_entropy_are_pytorchs() -> None:
    target = torch.tensor([0, 3, -100, 1])
    assert_third_derivative_like_pytorch(
        lambda x: softmax.cross_entropy(x, target), lambda x: F.cross_entropy(x, target), [draw(4, 5)]
    )


@pytest.mark.parametrize("rows", [0, 3])
def test_a_mean_over_nothing_is_not_a_number_as_in_pytorch(rows: int) -> None:
    logits, target = draw(rows, 4), torch.full((rows,), -100)
    assert softmax.cross_entropy(logits, target).isnan()
    (ours,) = torch.autograd.grad(softmax.cross_entropy(logits, target), logits)
    (theirs,) = torch.autograd.grad(F.cross_entropy(logits, target), logits)
    assert torch.equal(ours.isnan(), theirs.isnan())


def test_a_loss_of_nothing_counted_has_no_gradient() -> None:
    logits, target = draw(3, 4), torch.full((3,), -100)
    (grad,) = torch.autograd.grad(softmax.cross_entropy(logits, target, reduction="sum"), logits)
    assert not grad.any()


def test_logits_may_be_written_after_the_loss_as_in_pytorch() -> None:
    scores, target = draw(4, 5), torch.tensor([0, 1, 2, 3])
    results = []
    for loss_of in (softmax.cross_entropy, F.cross_entropy):
        logits = scores * 1
        loss = loss_of(logits, target)
        logits.zero_()
        (grad,) = torch.autograd.grad(loss, scores, create_graph=True)
        results.append([grad, *torch.autograd.grad(grad.square().sum(), scores)])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_float32_cross_entropy_is_pytorchs() -> None:
    target = torch.randint(50, (40,))
    assert_like_pytorch(
        lambda x: softmax.cross_entropy(x, target),
        lambda x: F.cross_entropy(x, target),
        [draw(40, 50, dtype=torch.float32)],
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {"target": torch.tensor([0, 7])},
        {"target": torch.tensor([0])},
        {"target": torch.tensor([0, 1]), "weight": torch.ones(3, dtype=torch.float64)},
        {"target": torch.tensor([0, 1]), "label_smoothing": 2.0},
        {"target": torch.tensor([0, 1]), "reduction": "median"},
        {"target": torch.ones(2, 3, dtype=torch.float64)},
    ],
    ids=["class", "batch", "weight", "smoothing", "reduction", "probabilities"],
)
def test_an_error_is_pytorchs(arguments: dict[str, Any]) -> None:
    with pytest.raises((RuntimeError, ValueError, IndexError)) as expected:
        F.cross_entropy(draw(2, 4), **arguments)
    with pytest.raises(expected.type) as caught:
        softmax.cross_entropy(draw(2, 4), **arguments)
    assert str(caught.value) == str(expected.value)


def test_a_deprecated_reduction_is_pytorchs() -> None:
    logits, target = draw(3, 4), torch.tensor([0, 1, 2])
    with pytest.warns(UserWarning, match="deprecated"):
        loss = softmax.cross_entropy(logits, target, size_average=False)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target, reduction="sum"), rtol=0, atol=0)


def test_small_tensors_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "WORTHWHILE", 12)
    for layer in (softmax.softmax, softmax.log_softmax):
        assert not is_ours(layer(draw(11), 0))
        assert is_ours(layer(draw(12), 0))
