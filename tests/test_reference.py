"""The oracle itself, against formulas worked out by hand and against torch.optim."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from gam_fused import reference

# float64 throughout: sums of at most a few hundred terms of order one, each within 1.1e-16.
CLOSE: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-13}

RHO, ALPHA, XI = 0.3, 0.7, 0.05


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def gam_terms_by_hand(
    gradient: Callable[[Tensor], Tensor], hessian: Callable[[Tensor], Tensor], theta: Tensor
) -> dict[str, Tensor]:
    """GAM on one flat vector with derivatives given as formulas: no autograd."""
    g = gradient(theta)
    f = hessian(theta) @ g / (g.norm() + XI)
    theta_adv = theta + RHO * f / (f.norm() + XI)
    g_adv = gradient(theta_adv)
    h = RHO * hessian(theta_adv) @ g_adv / (g_adv.norm() + XI)
    return {"g": g, "f": f, "theta_adv": theta_adv, "g_adv": g_adv, "h": h, "combined": g + ALPHA * h}


def assert_terms_equal(terms: reference.GamTerms, expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert_close(flat(getattr(terms, name)), value, **CLOSE, msg=partial("{}: {}".format, name))


def test_gam_terms_of_a_quadratic_over_two_parameters() -> None:
    factor = double(8, 8)
    a = factor @ factor.T
    params = [double(2, 3), double(2)]

    def half_theta_a_theta(theta: list[Tensor]) -> Tensor:
        return flat(theta) @ a @ flat(theta) / 2

    terms = reference.gam_terms(half_theta_a_theta, params, RHO, ALPHA, XI)
    theta = flat(params)
    assert_terms_equal(terms, gam_terms_by_hand(lambda t: a @ t, lambda t: a, theta))
    assert_close(terms.loss, theta @ a @ theta / 2, **CLOSE)
    assert [t.shape for t in terms.combined] == [p.shape for p in params]


def test_gam_terms_of_a_quartic_whose_hessian_varies() -> None:
    params = [double(3), double(2, 2)]

    def sum_of_fourth_powers(theta: list[Tensor]) -> Tensor:
        return flat(theta).pow(4).sum()

    terms = reference.gam_terms(sum_of_fourth_powers, params, RHO, ALPHA, XI)
    assert_terms_equal(terms, gam_terms_by_hand(lambda t: 4 * t**3, lambda t: (12 * t**2).diag(), flat(params)))


def test_gam_terms_of_logistic_regression() -> None:
    x, y = double(20, 4), (double(20) > 0).double()
    params = [double(4)]

    def mean_cross_entropy(theta: list[Tensor]) -> Tensor:
        z = x @ theta[0]
        return ((1 + z.exp()).log() - y * z).mean()

    def gradient(w: Tensor) -> Tensor:
        return x.T @ ((x @ w).sigmoid() - y) / len(y)

    def hessian(w: Tensor) -> Tensor:
        p = (x @ w).sigmoid()
        return x.T @ (p * (1 - p)).diag() @ x / len(y)

    terms = reference.gam_terms(mean_cross_entropy, params, RHO, ALPHA, XI)
    assert_terms_equal(terms, gam_terms_by_hand(gradient, hessian, params[0]))


@pytest.mark.parametrize(("form", "beta", "weights"), [("paper", 0.3, (0.3, 0.7)), ("released_code", 1.7, (1, 0.7))])
def test_accelerated_terms_of_a_quartic_whose_hessian_varies(
    form: str, beta: float, weights: tuple[float, float]
) -> None:
    rho, rho_prime, alpha, gamma, xi = 0.3, 0.05, 0.6, 0.4, 0.05
    params = [double(3), double(2, 2)]

    def gradient(t: Tensor) -> Tensor:
        return 4 * t**3

    theta = flat(params)
    g0 = gradient(theta)
    g1 = gradient(theta + rho_prime * g0 / (g0.norm() + xi))
    theta_adv = theta + rho * (g1 - g0) / ((g1 - g0).norm() + xi)
    g2 = gradient(theta_adv)
    g3 = gradient(theta_adv + rho_prime * g2 / (g2.norm() + xi))
    h_plus = alpha * g1 + (1 - alpha) * g3
    h_minus = weights[0] * g0 + weights[1] * g2
    parallel = (h_minus @ h_plus) / (h_plus.norm() + xi) ** 2 * h_plus
    combined = h_plus - gamma * (h_minus - parallel)

    terms = reference.accelerated_terms(
        lambda t: flat(t).pow(4).sum(), params, rho, rho_prime, alpha, beta, gamma, xi, form
    )
    for name, value in {
        "g0": g0, "g1": g1, "theta_adv": theta_adv, "g2": g2, "g3": g3, "h_plus": h_plus, "h_minus": h_minus,
        "h_perpendicular": h_minus - parallel, "combined": combined,
    }.items():  # fmt: skip
        assert_close(flat(getattr(terms, name)), value, **CLOSE, msg=partial("{}: {}".format, name))
    assert_close(terms.loss, theta.pow(4).sum(), **CLOSE)
    assert [t.shape for t in terms.combined] == [p.shape for p in params]


@pytest.mark.parametrize("form", ["paper", "released_code"])
def test_without_xi_the_perpendicular_part_is_perpendicular(form: str) -> None:
    terms = reference.accelerated_terms(
        lambda t: flat(t).pow(4).sum(), [double(3), double(2, 2)], 0.3, 0.05, 0.6, 0.3, 0.4, 0.0, form
    )
    h_plus, h_perpendicular = flat(terms.h_plus), flat(terms.h_perpendicular)
    assert abs(float(h_plus @ h_perpendicular)) < 1e-14 * float(h_plus.norm() * flat(terms.h_minus).norm())
    assert h_perpendicular.norm() > 0.01 * flat(terms.h_minus).norm()  # there is something to be perpendicular


def test_sam_gradient_of_a_quadratic() -> None:
    factor = double(5, 5)
    a = factor @ factor.T
    params = [double(3), double(2)]
    g = a @ flat(params)
    expected = a @ (flat(params) + RHO * g / g.norm())
    assert_close(flat(reference.sam_gradient(lambda t: flat(t) @ a @ flat(t) / 2, params, RHO)), expected, **CLOSE)


def test_global_norm_is_that_of_all_elements_together() -> None:
    tensors = [double(3, 2), double(0), double(5)]
    assert_close(reference.global_norm(tensors), flat(tensors).norm(), **CLOSE)
    assert reference.global_norm([]) == 0


def test_parameters_without_influence_get_zeros() -> None:
    params = [double(3), double(2, 2), double(0)]

    def loss(theta: list[Tensor]) -> Tensor:
        return theta[0].pow(3).sum() + theta[2].sum()

    g = reference.gradient(loss, params)
    product = reference.hessian_vector_product(loss, params, [torch.ones_like(p) for p in params])
    assert_close(g, [3 * params[0] ** 2, torch.zeros_like(params[1]), params[2]], **CLOSE)
    assert_close(product, [6 * params[0], torch.zeros_like(params[1]), params[2]], **CLOSE)


@pytest.mark.parametrize("loss", [lambda t: 3 * t[0].sum(), lambda t: torch.tensor(1.0)], ids=["linear", "constant"])
def test_losses_without_curvature_have_zero_hessian_vector_products(loss: reference.LossFunction) -> None:
    params = [double(3)]
    assert_close(reference.hessian_vector_product(loss, params, params), [torch.zeros_like(params[0])], rtol=0, atol=0)


def test_nothing_it_is_given_changes_or_enters_a_graph() -> None:
    params = [double(3).requires_grad_()]
    before = params[0].detach().clone()
    terms = reference.gam_terms(lambda t: t[0].pow(4).sum(), params, RHO, ALPHA, XI)
    accelerated = reference.accelerated_terms(lambda t: t[0].pow(4).sum(), params, RHO, RHO, ALPHA, ALPHA, ALPHA, XI)
    assert torch.equal(params[0], before)
    assert params[0].grad is None
    for term in (*terms, *accelerated):
        assert not any(t.requires_grad for t in ([term] if isinstance(term, Tensor) else term))


@pytest.mark.parametrize(
    "call",
    [
        lambda params: reference.gradient(lambda t: t[0].sum(), params),
        lambda params: reference.hessian_vector_product(lambda t: t[0].sum(), params, params),
        lambda params: reference.gam_terms(lambda t: t[0].sum(), params, RHO, ALPHA, XI),
        lambda params: reference.accelerated_terms(lambda t: t[0].sum(), params, RHO, RHO, ALPHA, ALPHA, ALPHA, XI),
        lambda params: reference.sam_gradient(lambda t: t[0].sum(), params, RHO),
        lambda params: reference.SGD(lr=0.1).step(params, params),
        lambda params: reference.Adam().step(params, params),
    ],
    ids=["gradient", "hessian_vector_product", "gam_terms", "accelerated_terms", "sam_gradient", "SGD", "Adam"],
)
def test_parameters_that_are_not_float64_are_refused(call: Callable[[list[Tensor]], object]) -> None:
    with pytest.raises(ValueError, match=r"params\[1\]: dtype torch.float32, expected torch.float64"):
        call([double(2), torch.randn(2)])


ADAM_OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1},
    {"amsgrad": True, "weight_decay": 0.0},
    {"maximize": True, "weight_decay": 0.1},
]

BASE_RULES: list[tuple[type[Any], type[torch.optim.Optimizer], dict[str, Any]]] = [
    *[
        (reference.SGD, torch.optim.SGD, options)
        for options in [
            {"lr": 0.1},
            {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
            {"lr": 0.1, "momentum": 0.9},
            {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
            {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
        ]
    ],
    *[(reference.Adam, torch.optim.Adam, options) for options in ADAM_OPTIONS],
    *[(reference.AdamW, torch.optim.AdamW, options) for options in ADAM_OPTIONS],
]


@pytest.mark.parametrize(
    ("rule", "optimizer", "options"),
    BASE_RULES,
    ids=[f"{rule.__name__}-{','.join(f'{k}={v}' for k, v in options.items())}" for rule, _, options in BASE_RULES],
)
def test_base_rules_step_beside_torch_optim(
    rule: type[Any], optimizer: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    ours = [double(3, 2), double(4)]
    theirs = [p.clone().requires_grad_() for p in ours]
    base_rule, base_optimizer = rule(**options), optimizer(theirs, **options)
    for step in range(8):
        # Growing, then shrinking: amsgrad's maximum matters only for the latter.
        grads = [2.0 ** -abs(step - 3) * double(*p.shape) for p in ours]
        ours = base_rule.step(ours, grads)
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g
        base_optimizer.step()
        assert_close(ours, [p.detach() for p in theirs], **CLOSE)
