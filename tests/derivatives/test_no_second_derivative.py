"""Operators without a second derivative name the way out and change nothing."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from gam_fused import GAM
from gam_fused.derivatives import NoSecondDerivative
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


@torch.library.custom_op("gam_fused_tests::cube", mutates_args=())
def cube(tensor: Tensor) -> Tensor:
    return tensor**3


@torch.library.custom_op("gam_fused_tests::cube_grad", mutates_args=())
def cube_grad(grad: Tensor, tensor: Tensor) -> Tensor:
    return 3 * grad * tensor**2


cube.register_autograd(
    lambda ctx, grad: cube_grad(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@functools.partial(torch.compile, backend="aot_eager")
def compiled(weight: Tensor) -> Tensor:
    return weight.tanh()


WITHOUT_SECOND_DERIVATIVE: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    # what the error calls it, and a function that goes by it
    "once_differentiable": ("OnceDifferentiable", OnceDifferentiable.apply),
    "once_differentiable_and_custom_bwd": ("MixedPrecisionOnceDifferentiable", MixedPrecisionOnceDifferentiable.apply),
    "once_differentiable_vjp": ("NewStyleOnceDifferentiable", NewStyleOnceDifferentiable.apply),
    "compiled": ("a module under torch.compile", compiled),
    "custom_op": ("gam_fused_tests.cube_grad", cube),
    "embedding_bag": (
        "embedding_bag",
        lambda weight: F.embedding_bag(torch.tensor([[0, 2], [3, 3]]), weight, mode="sum"),
    ),
    "cdist": ("cdist", lambda weight: torch.cdist(weight, torch.ones(2, 6, dtype=torch.float64))),
    "ctc_loss": ("ctc_loss", ctc),
    "multi_margin_loss": ("multi_margin_loss", lambda w: F.multi_margin_loss(w, torch.arange(4), reduction="none")),
    "flash_attention": ("scaled_dot_product_flash_attention_for_cpu", flash_attention),
}
# PyTorch itself says nothing of these, or something else.
FOUND_IN_THE_GRAPH = {
    "once_differentiable",
    "once_differentiable_and_custom_bwd",
    "once_differentiable_vjp",
    "compiled",
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


# torch.compile looks at the .grad of its inputs, and hides the warning from all but those who turn it into an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
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

    name, function = WITHOUT_SECOND_DERIVATIVE[operator]
    message = rf"second derivative .*, and {name} has none: .*hvp='finite_difference'"
    with pytest.raises(NoSecondDerivative, match=message) as caught:
        optimizer.step(lambda: function(model(inputs)).square().mean())
    assert caught.value.operator == name
    if operator not in FOUND_IN_THE_GRAPH:
        assert str(caught.value.__cause__).rstrip(".") in str(caught.value)
    assert ".." not in str(caught.value)
    assert_same(before, snapshot(model, optimizer))
    assert optimizer.metrics == metrics
    optimizer.step(lambda: model(inputs).square().mean())


def test_what_a_function_of_the_users_own_says_of_a_second_derivative_is_passed_on() -> None:
    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, grad: Tensor, tensor: Tensor) -> Tensor:
            return 2 * grad * tensor

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            raise RuntimeError("Squares do no double backward.")

    class Square(OnceDifferentiable):
        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return Gradient.apply(grad, *ctx.saved_tensors)

    param = leaf(3)
    message = r"and an operator has none: Squares do no double backward\. Replace that operator"
    with pytest.raises(NoSecondDerivative, match=message):
        GAM([param], lr=LR).step(lambda: Square.apply(param).sum())


def test_the_error_survives_pickling() -> None:
    error = NoSecondDerivative("embedding_bag", "not written yet")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.operator) == (str(error), "embedding_bag")


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
