"""Hessian-vector products from two gradients: first order in ε, exact where the gradient is linear, nothing moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gam_fused import GAM, kernels, reference
from gam_fused.closures import Evaluation, evaluate
from gam_fused.finite_difference import finite_difference_hvp
from gam_fused.kernels.grouping import global_norm
from gam_fused.transaction import Transaction
from tests import literal, problems
from tests.literal import assert_equal_bits, assert_equal_to_rounding

RHO, ALPHA, LR = 0.1, 0.4, 0.3
SMOOTH = ["quartic", "logistic", "gelu_network"]
BACKENDS = sorted(name for name, reason in kernels.available().items() if reason is None)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

over_backends = pytest.mark.parametrize("backend", BACKENDS)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def product(loss: literal.LossFunction, params: list[Tensor], epsilon: float, backend: str = "auto") -> list[Tensor]:
    """H g by the package's finite differences, at ``params``."""
    operators = kernels.resolve(backend)
    transaction = Transaction(operators, params, [{}] * len(params), None)

    def run() -> Evaluation:
        return evaluate(lambda: loss(params), params, transaction.replay, create_graph=False)

    with torch.no_grad():
        vectors = [grad for grad in run().gradients.total if grad is not None]
        norm = global_norm(operators, vectors)
        return finite_difference_hvp(transaction, run, range(len(params)), params, vectors, norm, epsilon)


def exact_product(loss: literal.LossFunction, params: list[Tensor]) -> list[Tensor]:
    return reference.hessian_vector_product(loss, params, reference.gradient(loss, params))


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    return float((literal.flat(one) - literal.flat(other)).norm())


@over_backends
@pytest.mark.parametrize("epsilon", [1.0, 1e-2])
def test_product_of_a_quadratic_is_exact_for_any_epsilon(epsilon: float, backend: str) -> None:
    root, params = torch.randn(5, 5, dtype=torch.float64), [torch.randn(5, dtype=torch.float64).requires_grad_()]
    matrix, linear = root + root.T, torch.randn(5, dtype=torch.float64)
    products = product(lambda p: 0.5 * p[0] @ matrix @ p[0] + linear @ p[0], params, epsilon, backend)
    assert_equal_to_rounding(products, [matrix @ (matrix @ params[0] + linear)])


@over_backends
@pytest.mark.parametrize("name", SMOOTH)
def test_product_is_the_forward_difference_quotient(name: str, backend: str) -> None:
    problem, epsilon = problems.PROBLEMS[name](), 1e-2
    grads = reference.gradient(problem.loss, problem.start)
    norm = reference.global_norm(grads)
    ahead = [theta + epsilon * grad / norm for theta, grad in zip(problem.start, grads, strict=True)]
    expected = [
        (there - here) * norm / epsilon
        for there, here in zip(reference.gradient(problem.loss, ahead), grads, strict=True)
    ]
    assert_equal_to_rounding(product(problem.loss, problem.leaves(), epsilon, backend), expected)


@pytest.mark.parametrize("name", SMOOTH)
def test_product_converges_to_the_exact_one_with_the_order_of_epsilon(name: str) -> None:
    problem = problems.PROBLEMS[name]()
    exact = exact_product(problem.loss, problem.leaves())
    errors = [distance(product(problem.loss, problem.leaves(), epsilon), exact) for epsilon in (1e-3, 1e-4)]
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.01)
    assert errors[1] < 1e-3 * float(literal.flat(exact).norm())


@pytest.mark.parametrize("name", SMOOTH)
def test_step_converges_to_the_exact_one_with_the_order_of_epsilon(name: str) -> None:
    problem = problems.PROBLEMS[name]()
    expected = literal.step(problem.loss, problem.start, rho=RHO, alpha=ALPHA, lr=LR)
    errors = []
    for epsilon in (1e-3, 1e-4):
        params = problem.leaves()
        optimizer = GAM(params, rho=RHO, alpha=ALPHA, lr=LR, hvp="finite_difference", fd_epsilon=epsilon)
        optimizer.step(lambda params=params: problem.loss(params))
        errors.append(distance(params, expected))
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.01)
    assert errors[1] < 1e-3 * distance(expected, problem.start)


@over_backends
def test_step_on_a_quadratic_is_the_exact_one(backend: str) -> None:
    start = [torch.randn(2, 2, dtype=torch.float64), torch.randn(3, dtype=torch.float64)]
    root = torch.randn(7, 7, dtype=torch.float64)

    def loss(params: list[Tensor]) -> Tensor:
        theta = torch.cat([param.reshape(-1) for param in params])
        return 0.5 * theta @ root @ root.T @ theta + theta.sum()

    expected = literal.step(loss, start, rho=RHO, alpha=ALPHA, lr=0.1)
    params = [tensor.clone().requires_grad_() for tensor in start]
    optimizer = GAM(params, rho=RHO, alpha=ALPHA, lr=0.1, hvp="finite_difference", backend=backend)
    optimizer.step(lambda: loss(params))
    assert_equal_to_rounding(params, expected)


@over_backends
def test_the_closure_runs_at_theta_ahead_of_it_and_the_same_around_the_adversarial_point(backend: str) -> None:
    problem, epsilon = problems.gelu_network(), 0.05
    params = problem.leaves()
    points: list[list[Tensor]] = []

    def closure() -> Tensor:
        points.append(literal.copies(params))
        return problem.loss(params)

    optimizer = GAM(params, rho=RHO, alpha=ALPHA, lr=LR, hvp="finite_difference", fd_epsilon=epsilon, backend=backend)
    optimizer.step(closure)
    theta, ahead, adversarial, ahead_of_adversarial = points
    assert_equal_bits(theta, problem.start)
    assert distance(ahead, theta) == pytest.approx(epsilon, rel=1e-12)
    assert distance(adversarial, theta) == pytest.approx(RHO, rel=1e-12)
    assert distance(ahead_of_adversarial, adversarial) == pytest.approx(epsilon, rel=1e-12)
    for here, there in ((theta, ahead), (adversarial, ahead_of_adversarial)):
        grads = reference.gradient(problem.loss, here)
        scale = epsilon / reference.global_norm(grads)
        assert_equal_to_rounding(there, [p + scale * g for p, g in zip(here, grads, strict=True)])


@over_backends
@over_dtypes
def test_parameters_are_bitwise_where_they_were(dtype: torch.dtype, backend: str) -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    inputs, labels = torch.randn(9, 5, dtype=dtype), torch.randint(3, (9,))
    before = literal.copies(model.parameters())
    params, points = list(model.parameters()), []

    def loss() -> Tensor:
        points.append(literal.copies(params))
        return F.cross_entropy(model(inputs), labels)

    transaction = Transaction(kernels.resolve(backend), params, [{}] * len(params), None)

    def run() -> Evaluation:
        return evaluate(loss, params, transaction.replay, create_graph=False)

    with torch.no_grad():
        vectors = [grad for grad in run().gradients.total if grad is not None]
        kept = literal.copies(vectors)
        norm = global_norm(kernels.resolve(backend), vectors)
        products = finite_difference_hvp(transaction, run, range(4), params, vectors, norm, 0.5)
    assert_equal_bits(params, before)
    assert not torch.equal(literal.flat(points[1]), literal.flat(before))
    assert_equal_bits(vectors, kept)
    assert [tensor.dtype for tensor in products] == [dtype] * 4
    assert transaction.moves == 0

    optimizer = GAM(params, rho=RHO, alpha=ALPHA, lr=0.0, hvp="finite_difference", fd_epsilon=0.5, backend=backend)
    for _ in range(3):
        optimizer.step(loss)
    assert int(optimizer.metrics["skipped_steps"]) == 0
    assert_equal_bits(params, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_difference_is_rounded_once(dtype: torch.dtype) -> None:
    """Gradients 1 + k ulp and −1 differ by one bit more than their dtype has; the quotient is 1.5 times that."""
    here = torch.full((8,), -1.0, dtype=dtype)
    there = 1 + torch.arange(8) * torch.finfo(dtype).eps
    param, coefficients = torch.zeros(8, dtype=dtype).requires_grad_(), iter([there.to(dtype)])
    transaction = Transaction(kernels.resolve("auto"), [param], [{}], None)

    def run() -> Evaluation:
        return evaluate(lambda: (next(coefficients) * param).sum(), [param], transaction.replay, create_graph=False)

    with torch.no_grad():
        (quotient,) = finite_difference_hvp(transaction, run, [0], [param], [here], torch.tensor(1.5), 1.0)
    assert_equal_bits([quotient], [((there.double() + 1) * 1.5).to(dtype)])


@over_dtypes
def test_a_scale_beyond_the_range_of_the_dtype_is_none_of_its_business(dtype: torch.dtype) -> None:
    """θ = 2⁻⁶, H = 2¹⁰, ε = 2⁻¹²: every step is exact in every dtype, but ‖v‖/ε = 2¹⁶ is infinite in float16."""
    param = torch.tensor([2**-6, 0.0], dtype=dtype).requires_grad_()
    (products,) = product(lambda p: (2**9 * p[0] * p[0]).sum(), [param], 2**-12)
    assert_equal_bits([products], [torch.tensor([2.0**14, 0.0], dtype=dtype)])


def embedding_bag(weight: Tensor) -> Tensor:
    return F.embedding_bag(torch.tensor([[0, 2], [3, 3], [1, 2]]), weight, mode="mean")


def distances(weight: Tensor) -> Tensor:
    return torch.cdist(weight, torch.linspace(1, 2, 12, dtype=torch.float64).view(2, 6))


WITHOUT_SECOND_DERIVATIVE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    # by PyTorch's operator, by operators that can be differentiated twice
    "embedding_bag": (
        embedding_bag,
        lambda weight: weight[torch.tensor([[0, 2], [3, 3], [1, 2]])].mean(1),
    ),
    "cdist": (
        distances,
        lambda weight: (
            (weight[:, None] - torch.linspace(1, 2, 12, dtype=torch.float64).view(2, 6)).square().sum(-1).sqrt()
        ),
    ),
}


@pytest.mark.parametrize("operator", WITHOUT_SECOND_DERIVATIVE)
def test_operators_without_second_derivative_take_the_step_of_their_twins(operator: str) -> None:
    by_operator, by_hand = WITHOUT_SECOND_DERIVATIVE[operator]
    start = torch.randn(4, 6, dtype=torch.float64)
    stepped = []
    for function in (by_operator, by_hand):
        weight = start.clone().requires_grad_()
        optimizer = GAM([weight], rho=RHO, alpha=ALPHA, lr=LR, hvp="finite_difference", fd_epsilon=1e-3)
        optimizer.step(lambda function=function, weight=weight: function(weight).sin().square().mean())
        stepped.append(weight)
    torch.testing.assert_close(stepped[0], stepped[1], rtol=1e-10, atol=1e-10)  # rounding, divided by ε
    exact = literal.step(lambda params: by_hand(params[0]).sin().square().mean(), [start], rho=RHO, alpha=ALPHA, lr=LR)
    assert distance([stepped[0]], exact) < 1e-3 * distance(exact, [start])


def test_a_zero_gradient_gives_a_zero_product_and_moves_nothing() -> None:
    param = torch.zeros(3, dtype=torch.float64).requires_grad_()
    assert_equal_bits(product(lambda p: p[0].square().sum(), [param], 1e-2), [torch.zeros(3, dtype=torch.float64)])
    optimizer = GAM([param], rho=RHO, alpha=ALPHA, lr=LR, hvp="finite_difference")
    optimizer.step(lambda: param.square().sum())
    assert_equal_bits([param], [torch.zeros(3, dtype=torch.float64)])
    assert int(optimizer.metrics["skipped_steps"]) == 0


def test_a_parameter_that_plays_no_part_ahead_has_gradient_zero_there() -> None:
    a, b = (torch.tensor([value], dtype=torch.float64).requires_grad_() for value in (1.0, 2.0))

    def loss(params: list[Tensor]) -> Tensor:
        here = float(params[0].detach()) == 1.0  # at θ only
        return 0.5 * params[0].square().sum() + (3 * params[1].sum() if here else 0.0)

    norm = torch.tensor([1.0, 3.0], dtype=torch.float64).norm()
    scale = norm / 1e-2
    ahead = 1.0 + 1.0 / scale
    expected = [(ahead - 1.0) * scale, (0.0 - 3.0) * scale]
    assert_equal_to_rounding(product(loss, [a, b], 1e-2), [torch.stack([value]) for value in expected])


@pytest.mark.parametrize("value", [1e-2, 0.3])
def test_fd_epsilon_changes_the_step(value: float) -> None:
    problem = problems.gelu_network()
    kwargs: dict[str, Any] = {"rho": RHO, "alpha": ALPHA, "lr": LR, "hvp": "finite_difference"}
    steps = []
    for epsilon in (value, 1e-3):
        params = problem.leaves()
        GAM(params, fd_epsilon=epsilon, **kwargs).step(lambda params=params: problem.loss(params))
        steps.append(literal.flat(params))
    assert not torch.equal(*steps)
