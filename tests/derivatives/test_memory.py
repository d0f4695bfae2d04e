"""Memory that a step may write into: aliased, expanded or the user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gam_fused import GAM
from gam_fused.derivatives import owned
from tests import literal
from tests.derivatives.common import ALPHA, LR, RHO, assert_module_step_is_literal, draw, leaf
from tests.literal import assert_equal_bits, assert_equal_to_rounding


def assert_step_is_literal(params: list[nn.Parameter], loss: literal.LossFunction, **kwargs: Any) -> None:
    """One step of GAM on ``loss`` equals the literal formulas, and so does what it leaves in ``.grad``."""
    expected = literal.step(loss, params, rho=RHO, alpha=ALPHA, lr=LR)
    combined = literal.combined_gradient(loss, params, rho=RHO, alpha=ALPHA)
    GAM(params, rho=RHO, alpha=ALPHA, lr=LR, **kwargs).step(lambda: loss(list(params)))
    assert_equal_to_rounding(params, expected)
    assert_equal_to_rounding([param.grad for param in params if param.grad is not None], combined)


def test_memory_that_nobody_else_holds_is_not_copied() -> None:
    param = leaf(3, 4)
    tensors = [draw(3, 4), draw(3, 4)]
    pointers = [tensor.data_ptr() for tensor in tensors]
    assert [tensor.data_ptr() for tensor in owned(tensors, [param, param])] == pointers


@pytest.mark.parametrize("alias", ["detached", "view", "listed_twice"])
def test_memory_that_somebody_else_holds_is_copied(alias: str) -> None:
    param, theirs = leaf(3, 4), draw(3, 4)
    value = theirs.clone()
    given = {
        "detached": lambda: [theirs.detach()],
        "view": lambda: [theirs.view(3, 4)],
        "listed_twice": lambda: [theirs.detach()] * 2,
    }[alias]()
    taken = owned(given, [param] * len(given))
    for tensor in taken:
        assert_equal_bits([tensor], [value])
        tensor.zero_()
    assert len({tensor.data_ptr() for tensor in taken}) == len(taken)
    assert_equal_bits([theirs], [value])


def test_what_is_laid_out_unlike_its_parameter_is_copied_into_its_layout() -> None:
    channels_last = nn.Parameter(draw(4, 3, 2, 2).to(memory_format=torch.channels_last))
    expanded, contiguous = draw(1).expand(4, 3, 2, 2), draw(4, 3, 2, 2)
    taken = owned([expanded, contiguous], [channels_last, channels_last])
    assert [tensor.stride() for tensor in taken] == [channels_last.stride()] * 2
    assert_equal_bits(taken, [expanded, contiguous])
    assert not any(tensor.requires_grad for tensor in taken)


def test_a_copy_keeps_the_dtype_of_what_it_copies() -> None:
    param = nn.Parameter(torch.zeros(3, 4, dtype=torch.bfloat16))
    (taken,) = owned([torch.ones(3, 1).expand(3, 4)], [param])
    assert taken.dtype == torch.float32
    assert taken.stride() == param.stride()


@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
def test_parameters_whose_gradients_are_one_tensor_take_the_literal_step(hvp: str) -> None:
    one, other = leaf(4), leaf(4)

    def loss(params: list[Tensor]) -> Tensor:
        both = params[0] + params[1]
        return 0.5 * (both * both).sum()  # a quadratic, so that finite differences are exact

    assert_step_is_literal([one, other], loss, hvp=hvp)
    assert one.grad is not None
    assert other.grad is not None
    assert one.grad.data_ptr() != other.grad.data_ptr()


@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
def test_an_expanded_gradient_takes_the_literal_step(hvp: str) -> None:
    expanded, curved = leaf(3, 4), leaf(3)

    def loss(params: list[Tensor]) -> Tensor:
        return params[0].sum() + 0.5 * params[1] @ params[1]

    (grad,) = torch.autograd.grad(expanded.sum(), [expanded])
    assert grad.stride() == (0, 0)
    assert_step_is_literal([expanded, curved], loss, hvp=hvp)
    assert expanded.grad is not None
    assert expanded.grad.is_contiguous()


class HalfSquare(torch.autograd.Function):
    """½ ‖θ‖² of a custom operator whose gradient lives in memory of the user's: ``store(θ)`` says where."""

    @staticmethod
    def forward(ctx: Any, param: Tensor, store: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(param)
        ctx.stored = store(param)
        return 0.5 * param.square().sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _Stored.apply(*ctx.saved_tensors, ctx.stored), None


class _Stored(torch.autograd.Function):
    """The gradient θ, handed out of the store; its derivative is the identity, so a product *is* its vector."""

    @staticmethod
    def forward(ctx: Any, param: Tensor, stored: Tensor) -> Tensor:
        return stored

    @staticmethod
    def backward(ctx: Any, vector: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return vector, None


MODES = {
    "exact": {"hvp": "exact"},
    "finite_difference": {"hvp": "finite_difference"},
    "between_flatness_steps": {"interval": 2},
}
over_modes = pytest.mark.parametrize("mode", MODES)


def half_square_step(param: nn.Parameter, mode: str, store: Callable[[Tensor], Tensor]) -> GAM:
    optimizer = GAM([param], rho=RHO, alpha=ALPHA, lr=LR, **MODES[mode])  # type: ignore[arg-type]
    if mode == "between_flatness_steps":
        optimizer.step(lambda: 0.5 * param.square().sum())
        optimizer.zero_grad()
    expected = literal.step(
        lambda params: 0.5 * params[0].square().sum(),
        [param],
        rho=RHO,
        alpha=0.0 if mode == "between_flatness_steps" else ALPHA,
        lr=LR,
    )
    optimizer.step(lambda: HalfSquare.apply(param, store))
    assert_equal_to_rounding([param], expected)
    return optimizer


@over_modes
def test_a_gradient_in_the_users_own_memory_leaves_that_memory_bitwise_alone(mode: str) -> None:
    param = leaf(5)
    theirs, written = torch.zeros(5, dtype=torch.float64), []

    def store(theta: Tensor) -> Tensor:
        written.append(theta.detach().clone())
        return theirs.copy_(theta.detach())

    half_square_step(param, mode, store)
    assert_equal_bits([theirs], written[-1:])


@over_modes
def test_a_gradient_that_is_the_parameter_itself_takes_the_literal_step(mode: str) -> None:
    param = leaf(5)
    half_square_step(param, mode, lambda theta: theta.detach())
    assert param.grad is not None
    assert param.grad.data_ptr() != param.data_ptr()


@pytest.mark.parametrize("mode", ["finite_difference", "between_flatness_steps"])
def test_gradients_of_several_losses_in_one_reused_buffer_are_all_counted(mode: str) -> None:
    param, buffer = leaf(5), torch.zeros(5, dtype=torch.float64)
    optimizer = GAM([param], rho=RHO, alpha=ALPHA, lr=LR, **MODES[mode])  # type: ignore[arg-type]
    if mode == "between_flatness_steps":
        optimizer.step(lambda: param.sum())
    before, data = param.detach().clone(), draw(2, 5)

    def closure() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for row in data:
            loss = _LinearInto.apply(param, row, buffer)
            loss.backward()
            total += loss.detach()
        return total

    optimizer.step(closure)
    assert_equal_to_rounding([param], [before - LR * data.sum(0)])


class _LinearInto(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, param: Tensor, row: Tensor, buffer: Tensor) -> Tensor:
        ctx.row, ctx.buffer = row, buffer
        return row @ param

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.buffer.copy_(grad * ctx.row), None, None


def test_a_product_that_is_its_vector_takes_the_literal_step() -> None:
    param = leaf(5)
    (grad,) = torch.autograd.grad(HalfSquare.apply(param, Tensor.clone), [param], create_graph=True)
    vector = grad.detach()
    (product,) = torch.autograd.grad(grad, [param], vector)
    assert product.data_ptr() == vector.data_ptr()
    half_square_step(param, "exact", lambda theta: theta.detach().clone())


@pytest.mark.parametrize("bias", [True, False])
def test_channels_last_parameters_take_the_literal_step_and_keep_their_layout(bias: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), nn.GELU(), nn.Conv2d(4, 2, 2, bias=bias)).double()
    model.to(memory_format=torch.channels_last)
    strides = [param.stride() for param in model.parameters()]
    inputs = draw(2, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    assert_module_step_is_literal(model, lambda net: net(inputs).square().mean())
    for param, stride in zip(model.parameters(), strides, strict=True):
        assert param.grad is not None
        assert param.stride() == param.grad.stride() == stride
