"""Gradients and Hessian-vector products: closed forms, aliased memory, operators with and without second derivative."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from gam_fused import GAM, reference
from gam_fused.derivatives import Gradients, owned
from tests import literal, problems
from tests.literal import assert_equal_bits, assert_equal_to_rounding
from tests.states import assert_same, snapshot

RHO, ALPHA, LR = 0.1, 0.4, 0.5


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def leaf(*shape: int) -> nn.Parameter:
    return nn.Parameter(draw(*shape))


def differentiated(params: list[Tensor], *losses: Tensor) -> Gradients:
    gradients = Gradients(params, create_graph=True)
    for loss in losses:
        gradients.add([loss], [None])
    return gradients


def assert_step_is_literal(params: list[nn.Parameter], loss: literal.LossFunction, **kwargs: Any) -> None:
    """One step of GAM on ``loss`` equals the literal formulas, and so does what it leaves in ``.grad``."""
    expected = literal.step(loss, params, rho=RHO, alpha=ALPHA, lr=LR)
    combined = literal.combined_gradient(loss, params, rho=RHO, alpha=ALPHA)
    GAM(params, rho=RHO, alpha=ALPHA, lr=LR, **kwargs).step(lambda: loss(list(params)))
    assert_equal_to_rounding(params, expected)
    assert_equal_to_rounding([param.grad for param in params if param.grad is not None], combined)


def assert_module_step_is_literal(
    model: nn.Module, loss: Callable[[Callable[..., Any]], Tensor], by_hand: literal.LossFunction | None = None
) -> None:
    """One step of GAM on ``loss(model)`` equals the literal formulas for ``by_hand``, or for the same modules."""
    function = literal.as_function(model, loss) if by_hand is None else by_hand
    expected = literal.step(function, model.parameters(), rho=RHO, alpha=ALPHA, lr=LR)
    before = literal.copies(model.parameters())
    optimizer = GAM(model.parameters(), rho=RHO, alpha=ALPHA, lr=LR, model=model)
    optimizer.step(lambda: loss(model))
    assert int(optimizer.metrics["skipped_steps"]) == 0
    assert_equal_to_rounding(model.parameters(), expected)
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True) if a.numel())


# ---------------------------------------------------------------------- gradients and products


def test_gradient_and_product_of_a_quadratic_are_the_closed_form() -> None:
    root = draw(5, 5)
    matrix, linear, param = root + root.T, draw(5), leaf(5)
    gradients = differentiated([param], 0.5 * param @ matrix @ param + linear @ param)
    assert_equal_to_rounding(gradients.total, [matrix @ param + linear])
    vector = draw(5)
    assert_equal_to_rounding(gradients.hvp([0], [vector]), [matrix @ vector])


# torch.func.jvp itself goes through torch.jit.script when it is first used.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")
@pytest.mark.parametrize("name", problems.PROBLEMS)
def test_gradient_and_product_equal_torch_func(name: str) -> None:
    problem = problems.PROBLEMS[name]()
    params, vectors = problem.leaves(), [torch.randn_like(tensor) for tensor in problem.start]

    def gradient(*theta: Tensor) -> tuple[Tensor, ...]:
        return torch.func.grad(lambda inputs: problem.loss(list(inputs)))(theta)

    expected, products = torch.func.jvp(gradient, tuple(problem.start), tuple(vectors))
    gradients = differentiated(params, problem.loss(params))
    assert_equal_to_rounding(gradients.total, expected)
    assert_equal_to_rounding(gradients.hvp(range(len(params)), vectors), products)


def test_gradient_and_product_of_several_losses_are_those_of_their_sum() -> None:
    one, other = problems.quartic(), problems.quartic()
    params = one.leaves()
    vectors = [torch.randn_like(param) for param in params]

    def losses(theta: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return one.loss(theta), other.loss([t.sin() for t in theta]), theta[1].exp().sum()

    def total(theta: list[Tensor]) -> Tensor:
        return sum(losses(theta), start=torch.zeros((), dtype=torch.float64))

    gradients = differentiated(params, *losses(params))
    assert_equal_to_rounding(gradients.total, reference.gradient(total, params))
    assert_equal_to_rounding(
        gradients.hvp([0, 1], vectors), reference.hessian_vector_product(total, literal.copies(params), vectors)
    )


def test_losses_of_one_shared_graph_may_be_added_one_by_one() -> None:
    param, vector = leaf(4), draw(4)
    hidden = (param * param).tanh()
    gradients = differentiated([param], hidden.sum(), (hidden * hidden).sum())

    def total(theta: list[Tensor]) -> Tensor:
        shared = (theta[0] * theta[0]).tanh()
        return shared.sum() + (shared * shared).sum()

    assert_equal_to_rounding(gradients.total, reference.gradient(total, [param]))
    assert_equal_to_rounding(gradients.hvp([0], [vector]), reference.hessian_vector_product(total, [param], [vector]))


def test_losses_added_together_are_weighted_by_their_grad_outputs() -> None:
    param, weights, vector = leaf(4), draw(4), draw(4)
    gradients = Gradients([param], create_graph=True)
    own = gradients.add([param**3, param.exp().sum()], [weights, torch.tensor(2.0, dtype=torch.float64)])
    expected = 3 * weights * param.detach() ** 2 + 2 * param.detach().exp()
    assert_equal_to_rounding(own, [expected])
    assert_equal_to_rounding(gradients.total, [expected])
    curvature = 6 * weights * param.detach() + 2 * param.detach().exp()
    assert_equal_to_rounding(gradients.hvp([0], [vector]), [curvature * vector])


def test_add_returns_the_gradient_of_the_added_loss_alone() -> None:
    param = leaf(3)
    gradients = Gradients([param], create_graph=False)
    (first,) = gradients.add([(2 * param).sum()], [None])
    (second,) = gradients.add([(5 * param).sum()], [None])
    assert_equal_bits([first, second, gradients.total[0]], [torch.full_like(param, k) for k in (2.0, 5.0, 7.0)])
    assert not any(tensor.requires_grad for tensor in (first, second, gradients.total[0]))


def test_product_of_a_linear_loss_is_zero() -> None:
    param, coefficients = leaf(3), draw(3)
    gradients = differentiated([param], coefficients @ param)
    assert_equal_bits(gradients.total, [coefficients])
    assert_equal_bits(gradients.hvp([0], [draw(3)]), [torch.zeros(3, dtype=torch.float64)])


def test_product_is_zero_where_the_gradient_depends_on_nothing() -> None:
    linear, curved, vector = leaf(3), leaf(3), draw(3)
    gradients = differentiated([linear, curved], linear.sum() + (curved**3).sum())
    products = gradients.hvp([0, 1], [draw(3), vector])
    assert_equal_to_rounding(products, [torch.zeros_like(linear), 6 * curved * vector])


def test_a_parameter_with_no_elements_has_an_empty_gradient_and_product() -> None:
    param, empty = leaf(3), leaf(0, 4)
    gradients = differentiated([empty, param], (param**2).sum() + empty.sum())
    assert [tuple(grad.shape) for grad in gradients.total if grad is not None] == [(0, 4), (3,)]
    vector = draw(3)
    products = gradients.hvp([0, 1], [draw(0, 4), vector])
    assert_equal_to_rounding(products, [empty, 2 * vector])


def test_an_unused_parameter_has_no_gradient_and_leaves_the_others_their_product() -> None:
    unused, param = leaf(2), leaf(3)
    gradients = differentiated([unused, param], (param**3).sum())
    assert gradients.total[0] is None
    vector = draw(3)
    assert_equal_to_rounding(gradients.hvp([1], [vector]), [6 * param * vector])


def test_hvp_frees_the_graph() -> None:
    param = leaf(3)
    gradients = differentiated([param], (param**3).sum())
    hvp = gradients.hvp([0], [draw(3)])
    assert not hvp[0].requires_grad
    assert_equal_bits(gradients.hvp([0], [draw(3)]), [torch.zeros_like(param)])  # nothing is left to differentiate


def test_derivatives_are_taken_outside_autocast() -> None:
    network = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
    params, inputs = list(network.parameters()), torch.randn(9, 6)
    vectors = [torch.randn_like(param) for param in params]
    plain = differentiated(params, network(inputs).square().sum())
    loss = network(inputs).square().sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = differentiated(params, loss)
        products = under_autocast.hvp(range(4), vectors)
        assert torch.is_autocast_enabled("cpu")
    assert_equal_bits([grad for grad in under_autocast.total if grad is not None], plain.total)
    assert_equal_bits(products, plain.hvp(range(4), vectors))


# ---------------------------------------------------------------------- memory that a step may write into


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


# ---------------------------------------------------------------------- operators without a second derivative


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
    optimizer = GAM(model.parameters(), rho=RHO, lr=LR, momentum=0.9, model=model)
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


# ---------------------------------------------------------------------- attention


def attention_by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    return torch.softmax(scores, dim=-1) @ value


def split_heads(tensor: Tensor, heads: int) -> Tensor:
    """[batch, tokens, features] → [batch, heads, tokens, features / heads]."""
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)


def self_attention_by_hand(inputs: Tensor, in_weight: Tensor, in_bias: Tensor, heads: int) -> Tensor:
    """Up to the output projection."""
    query, key, value = F.linear(inputs, in_weight, in_bias).chunk(3, dim=-1)
    attended = attention_by_hand(*(split_heads(tensor, heads) for tensor in (query, key, value)))
    return attended.transpose(1, 2).flatten(-2)


def test_scaled_dot_product_attention_takes_the_step_of_attention_by_hand() -> None:
    params = [leaf(2, 2, 3, 4), leaf(2, 2, 5, 4), leaf(2, 2, 5, 4)]
    expected = literal.step(lambda theta: attention_by_hand(*theta).square().sum(), params, rho=RHO, alpha=ALPHA, lr=LR)
    GAM(params, rho=RHO, alpha=ALPHA, lr=LR).step(
        lambda: F.scaled_dot_product_attention(*params).square().sum()  # type: ignore[arg-type]
    )
    assert_equal_to_rounding(params, expected)


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_takes_the_step_of_attention_by_hand(need_weights: bool) -> None:
    model, inputs = nn.MultiheadAttention(6, 2, batch_first=True).double(), draw(3, 4, 6)
    with torch.no_grad():
        model.in_proj_bias.copy_(draw(18))

    def by_hand(params: list[Tensor]) -> Tensor:
        in_weight, in_bias, out_weight, out_bias = params
        return F.linear(self_attention_by_hand(inputs, in_weight, in_bias, 2), out_weight, out_bias).square().sum()

    assert_module_step_is_literal(
        model, lambda net: net(inputs, inputs, inputs, need_weights=need_weights)[0].square().sum(), by_hand
    )


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_transformer_layer_in_training_takes_the_step_of_attention_by_hand(norm_first: bool) -> None:
    model = nn.TransformerEncoderLayer(
        6, 2, dim_feedforward=5, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first
    ).double()
    inputs, target = draw(3, 4, 6), draw(3, 4, 6)
    assert model.training

    def by_hand(params: list[Tensor]) -> Tensor:
        in_weight, in_bias, out_weight, out_bias, w1, b1, w2, b2, scale1, shift1, scale2, shift2 = params
        attend = lambda x: F.linear(self_attention_by_hand(x, in_weight, in_bias, 2), out_weight, out_bias)  # noqa: E731
        feed = lambda x: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)  # noqa: E731
        norm1 = lambda x: F.layer_norm(x, (6,), scale1, shift1)  # noqa: E731
        norm2 = lambda x: F.layer_norm(x, (6,), scale2, shift2)  # noqa: E731
        x = inputs
        if norm_first:
            x = x + attend(norm1(x))
            x = x + feed(norm2(x))
        else:
            x = norm1(x + attend(x))
            x = norm2(x + feed(x))
        return F.mse_loss(x, target)

    assert_module_step_is_literal(model, lambda net: F.mse_loss(net(inputs), target), by_hand)


def test_the_choice_of_attention_kernels_is_as_before_after_a_step() -> None:
    def choice() -> tuple[bool, ...]:
        cuda = torch.backends.cuda
        return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()

    param, seen = leaf(1, 1, 3, 4), []

    def closure() -> Tensor:
        seen.append(choice())
        return F.scaled_dot_product_attention(param, param, param).square().sum()

    before = choice()
    GAM([param], lr=LR).step(closure)
    assert choice() == before
    assert seen == [(False, False, True)] * 2
    with pytest.raises(ZeroDivisionError):
        GAM([param], lr=LR).step(lambda: closure() / (1 // 0))
    assert choice() == before


def test_first_derivatives_keep_the_fast_attention_kernels() -> None:
    param, seen = leaf(1, 1, 3, 4), []

    def closure() -> Tensor:
        seen.append(torch.backends.cuda.flash_sdp_enabled())
        return F.scaled_dot_product_attention(param, param, param).square().sum()

    optimizer = GAM([param], lr=LR, interval=2)
    optimizer.step(closure)
    optimizer.step(closure)
    GAM([param], lr=LR, hvp="finite_difference").step(closure)
    assert seen == [False, False, True, True, True, True, True]


# ---------------------------------------------------------------------- recurrent networks


def lstm_by_hand(inputs: Tensor, params: list[Tensor]) -> Tensor:
    """One layer, all hidden states: [tokens, batch, features] → [tokens, batch, hidden]."""
    w_input, w_hidden, b_input, b_hidden = params
    hidden = cell = torch.zeros(inputs.shape[1], w_hidden.shape[1], dtype=torch.float64)
    states = []
    for x in inputs:
        gates = x @ w_input.T + b_input + hidden @ w_hidden.T + b_hidden
        i, f, g, o = gates.chunk(4, dim=1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        states.append(hidden)
    return torch.stack(states)


def gru_by_hand(inputs: Tensor, params: list[Tensor]) -> Tensor:
    w_input, w_hidden, b_input, b_hidden = params
    hidden = torch.zeros(inputs.shape[1], w_hidden.shape[1], dtype=torch.float64)
    states = []
    for x in inputs:
        r_in, z_in, n_in = (x @ w_input.T + b_input).chunk(3, dim=1)
        r_hid, z_hid, n_hid = (hidden @ w_hidden.T + b_hidden).chunk(3, dim=1)
        reset, update = (r_in + r_hid).sigmoid(), (z_in + z_hid).sigmoid()
        new = (n_in + reset * n_hid).tanh()
        hidden = (1 - update) * new + update * hidden
        states.append(hidden)
    return torch.stack(states)


@pytest.mark.parametrize(("cell", "by_hand"), [(nn.LSTM, lstm_by_hand), (nn.GRU, gru_by_hand)], ids=["lstm", "gru"])
def test_a_recurrent_network_takes_the_step_of_its_equations(
    cell: type[nn.LSTM] | type[nn.GRU], by_hand: Callable[[Tensor, list[Tensor]], Tensor]
) -> None:
    model, inputs = cell(3, 4).double(), draw(5, 2, 3)
    assert_module_step_is_literal(
        model, lambda net: net(inputs)[0].square().sum(), lambda params: by_hand(inputs, params).square().sum()
    )


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU], ids=["lstm", "gru"])
def test_a_recurrent_network_in_float32_steps_as_in_float64(cell: type[nn.LSTM] | type[nn.GRU]) -> None:
    narrow, wide = cell(3, 4), cell(3, 4).double()
    wide.load_state_dict(narrow.state_dict())
    inputs = torch.randn(5, 2, 3)
    GAM(narrow.parameters(), rho=RHO, alpha=ALPHA, lr=LR).step(lambda: narrow(inputs)[0].square().sum())
    GAM(wide.parameters(), rho=RHO, alpha=ALPHA, lr=LR).step(lambda: wide(inputs.double())[0].square().sum())
    for one, other in zip(narrow.parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- checkpointing


class Checkpointed(nn.Module):
    """Two blocks between two layers; ``rerun`` recomputes a block's activations in the backward pass, or does not."""

    def __init__(self, rerun: Callable[..., Tensor] | None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.3)) for _ in range(2))
        self.rerun = rerun

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        for block in self.blocks:
            hidden = block(hidden) if self.rerun is None else self.rerun(block, hidden)
        return self.last(hidden)


@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
def test_a_checkpointed_network_steps_bitwise_as_without_checkpoints(hvp: str) -> None:
    inputs = draw(7, 4)
    plain = Checkpointed(None).double()
    saving = Checkpointed(functools.partial(checkpoint, use_reentrant=False)).double()
    saving.load_state_dict(plain.state_dict())
    for model in (plain, saving):
        optimizer = GAM(model.parameters(), rho=RHO, alpha=ALPHA, lr=LR, hvp=hvp, model=model)
        torch.manual_seed(1)
        for _ in range(2):
            optimizer.step(lambda model=model: model(inputs).square().mean())
    assert_equal_bits(saving.parameters(), plain.parameters())


@contextmanager
def nothing_changes(model: nn.Module, optimizer: GAM) -> Iterator[None]:
    before = snapshot(model, optimizer)
    yield
    assert_same(before, snapshot(model, optimizer))


def test_reentrant_checkpoints_name_the_way_out_and_change_nothing() -> None:
    model = Checkpointed(functools.partial(checkpoint, use_reentrant=True)).double()
    optimizer = GAM(model.parameters(), lr=LR)
    with nothing_changes(model, optimizer), pytest.raises(RuntimeError, match="use_reentrant=False"):
        optimizer.step(lambda: model(draw(7, 4)).square().mean())


def test_reentrant_checkpoints_that_hide_parameters_name_the_way_out_and_change_nothing() -> None:
    """Where nothing before the checkpoint is trained, PyTorch itself raises nothing and calls the block unused."""
    model = Checkpointed(functools.partial(checkpoint, use_reentrant=True)).double()
    model.first.requires_grad_(False)
    optimizer = GAM(model.parameters(), lr=LR)
    inputs = draw(7, 4).requires_grad_()
    with nothing_changes(model, optimizer), pytest.raises(RuntimeError, match="use_reentrant=False"):
        optimizer.step(lambda: model(inputs).square().mean())
