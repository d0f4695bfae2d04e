"""Operators without a second derivative name the way out and change nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from gam_fused import GAM
from tests import literal
from tests.derivatives.common import ALPHA, LR, RHO, draw, leaf
from tests.literal import assert_equal_to_rounding
from tests.states import assert_same, snapshot


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return tensor**2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * grad * ctx.saved_tensors[0]


class MixedPrecisionOnceDifferentiable(OnceDifferentiable):
    @staticmethod
    @functools.partial(torch.amp.custom_bwd, device_type="cpu")
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * grad * ctx.saved_tensors[0]


class NewStyle(torch.autograd.Function):
    """The context set up apart from the forward pass, and ``vjp`` in the place of ``backward``."""

    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        return tensor**2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def vjp(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * grad * ctx.saved_tensors[0]


class NewStyleOnceDifferentiable(NewStyle):
    @staticmethod
    @once_differentiable
    def vjp(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * grad * ctx.saved_tensors[0]


def flash_attention(weight: Tensor) -> Tensor:
    heads = weight.view(1, 1, 4, 6)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # the closure insists
        return F.scaled_dot_product_attention(heads, heads, heads)


def ctc(weight: Tensor) -> Tensor:
    log_probabilities = weight.log_softmax(-1)[:, None]
    return F.ctc_loss(log_probabilities, torch.tensor([[1, 2]]), torch.tensor([4]), torch.tensor([2]))


WITHOUT_SECOND_DERIVATIVE: dict[str, Callable[[Tensor], Tensor]] = {
    "once_differentiable": OnceDifferentiable.apply,
    "once_differentiable_and_custom_bwd": MixedPrecisionOnceDifferentiable.apply,
    "once_differentiable_vjp": NewStyleOnceDifferentiable.apply,
    "embedding_bag": lambda weight: F.embedding_bag(torch.tensor([[0, 2], [3, 3]]), weight, mode="sum"),
    "cdist": lambda weight: torch.cdist(weight, torch.ones(2, 6, dtype=torch.float64)),
    "ctc_loss": ctc,
    "flash_attention": flash_attention,
}


def test_a_once_differentiable_function_of_the_parameters_themselves_is_refused_as_well() -> None:
    """Nothing in the graph of its gradient would tell: that depends on the parameters no more."""
    param = leaf(4)
    with pytest.raises(RuntimeError, match=r"OnceDifferentiable is marked as once_differentiable.*finite_difference"):
        GAM([param], lr=LR).step(lambda: OnceDifferentiable.apply(param).sum())
    GAM([param], lr=LR, hvp="finite_difference").step(lambda: OnceDifferentiable.apply(param).sum())


def test_a_custom_function_with_a_vjp_takes_the_literal_step() -> None:
    param = leaf(4)
    expected = literal.step(lambda params: params[0].square().sum(), [param], rho=RHO, alpha=ALPHA, lr=LR)
    GAM([param], rho=RHO, alpha=ALPHA, lr=LR).step(lambda: NewStyle.apply(param).sum())
    assert_equal_to_rounding([param], expected)


@pytest.mark.parametrize("operator", WITHOUT_SECOND_DERIVATIVE)
def test_an_operator_without_second_derivative_names_the_way_out_and_changes_nothing(operator: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 6)).double()
    inputs = draw(4, 3)
    # GAM's own layer for attention has one.
    second_order = "off" if operator == "flash_attention" else "auto"
    optimizer = GAM(model.parameters(), rho=RHO, lr=LR, momentum=0.9, model=model, second_order=second_order)
    optimizer.step(lambda: model(inputs).square().mean())
    before = snapshot(model, optimizer)
    metrics = dict(optimizer.metrics)

    with pytest.raises(RuntimeError, match=r"second derivative .* has none: .*hvp='finite_difference'") as caught:
        optimizer.step(lambda: WITHOUT_SECOND_DERIVATIVE[operator](model(inputs)).square().mean())
    if operator.startswith("once_differentiable"):  # PyTorch itself would say nothing
        assert "OnceDifferentiable is marked as once_differentiable" in str(caught.value)
    else:
        assert str(caught.value.__cause__).rstrip(".") in str(caught.value)
    assert ".." not in str(caught.value)
    assert_same(before, snapshot(model, optimizer))
    assert optimizer.metrics == metrics
    optimizer.step(lambda: model(inputs).square().mean())


def test_any_other_error_of_the_second_derivative_is_passed_on_as_it_is() -> None:
    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: Tensor) -> Tensor:
            return tensor.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            raise RuntimeError("out of luck")

    class Fine(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: Tensor) -> Tensor:
            return tensor.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return Breaks.apply(grad)

    param = leaf(3)
    with pytest.raises(RuntimeError, match=r"^out of luck$"):
        GAM([param], lr=LR).step(lambda: Fine.apply(param**2).square().sum())


def test_a_sparse_gradient_names_the_way_out_and_changes_nothing() -> None:
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = GAM(model.parameters(), lr=LR)
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match=r"parameter 0 \(shape \(5, 3\)\) is torch.sparse_coo.*sparse=False"):
        optimizer.step(lambda: model(torch.tensor([1, 3])).square().sum())
    assert_same(before, snapshot(model, optimizer))
