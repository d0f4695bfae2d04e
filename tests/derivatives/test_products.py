"""Gradients and Hessian-vector products equal their closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gam_fused import reference
from gam_fused.derivatives import Gradients
from tests import literal, problems
from tests.derivatives.common import draw, leaf
from tests.literal import assert_equal_bits, assert_equal_to_rounding


def differentiated(params: list[Tensor], *losses: Tensor) -> Gradients:
    gradients = Gradients(params, create_graph=True)
    for loss in losses:
        gradients.add([loss], [None])
    return gradients


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
