"""GAM follows the literal formulas: hand-derived Hessians, and ``reference.py`` over 50 steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gam_fused import GAM, kernels, reference
from tests import problems

BACKENDS = sorted(name for name, reason in kernels.available().items() if reason is None)

RULES: dict[str, tuple[type[torch.optim.Optimizer], Callable[..., Any], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, reference.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, reference.SGD, {"lr": 0.05, "momentum": 0.9}),
    "dampening": (torch.optim.SGD, reference.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.3}),
    "nesterov": (torch.optim.SGD, reference.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "weight_decay": (torch.optim.SGD, reference.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    "adam": (torch.optim.Adam, reference.Adam, {"lr": 0.01, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, reference.AdamW, {"lr": 0.01, "weight_decay": 0.05}),
    "amsgrad": (torch.optim.AdamW, reference.AdamW, {"lr": 0.01, "amsgrad": True}),
}

RHO, ALPHA, XI = 0.05, 0.4, 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", problems.PROBLEMS)
def test_fifty_steps_follow_the_reference(name: str, rule: str, backend: str) -> None:
    problem = problems.PROBLEMS[name]()
    base, literal_rule, kwargs = RULES[rule]
    params = problem.leaves()
    optimizer = GAM(params, base, rho=RHO, alpha=ALPHA, xi=XI, backend=backend, **kwargs)
    literal = [param.detach().clone() for param in params]
    rule_state = literal_rule(**kwargs)

    for _ in range(50):
        terms = reference.gam_terms(problem.loss, literal, RHO, ALPHA, XI)
        loss = optimizer.step(lambda: problem.loss(params))
        literal = rule_state.step(literal, terms.combined)

        assert relative_error([loss], [terms.loss]) < 1e-10
        assert relative_error(params, literal) < 1e-10


@pytest.mark.parametrize(
    ("name", "gradient", "hessian"),
    [
        ("quartic", problems.quartic_gradient, problems.quartic_hessian),
        ("logistic", problems.logistic_gradient, problems.logistic_hessian),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fifty_steps_follow_the_hand_derived_hessian(
    name: str, gradient: Callable[[Tensor], Tensor], hessian: Callable[[Tensor], Tensor], backend: str
) -> None:
    problem = problems.PROBLEMS[name]()
    params = problem.leaves()
    optimizer = GAM(params, rho=RHO, alpha=ALPHA, xi=XI, backend=backend, lr=0.1)
    theta = flat(params)

    for _ in range(50):
        g = gradient(theta)
        f = hessian(theta) @ g / (g.norm() + XI)
        theta_adv = theta + RHO * f / (f.norm() + XI)
        g_adv = gradient(theta_adv)
        h = RHO * hessian(theta_adv) @ g_adv / (g_adv.norm() + XI)
        theta = theta - 0.1 * (g + ALPHA * h)

        optimizer.step(lambda: problem.loss(params))
        assert relative_error([flat(params)], [theta]) < 1e-10
        expected = {
            "grad_norm": g.norm(),
            "ascent_norm": f.norm() * (g.norm() + XI),
            "adversarial_grad_norm": g_adv.norm(),
            "first_order_flatness": RHO * g_adv.norm(),
        }
        for metric, value in expected.items():
            assert relative_error([optimizer.metrics[metric]], [value]) < 1e-10, metric


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_two_phase_form_takes_the_same_steps_as_the_closure(backend: str) -> None:
    problem = problems.gelu_network()
    by_closure, by_phases = problem.leaves(), problem.leaves()
    first = GAM(by_closure, rho=RHO, alpha=ALPHA, backend=backend, lr=0.1, momentum=0.9)
    second = GAM(by_phases, rho=RHO, alpha=ALPHA, backend=backend, lr=0.1, momentum=0.9)
    for _ in range(10):
        loss = first.step(lambda: problem.loss(by_closure))
        second.first_step(problem.loss(by_phases))
        assert not torch.equal(flat(by_phases), flat(by_closure))
        assert torch.equal(second.second_step(problem.loss(by_phases)), loss)
        assert torch.equal(flat(by_phases), flat(by_closure))


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_use_their_own_rho_alpha_and_xi_under_global_norms(backend: str) -> None:
    problem = problems.gelu_network()
    params = problem.leaves()
    groups = [
        {"params": params[:1], "rho": 0.2, "alpha": 0.1, "xi": 1e-3},
        {"params": params[1:3], "alpha": 0.7},
        {"params": params[3:], "rho": 0.0, "lr": 0.3},
    ]
    optimizer = GAM(groups, rho=0.05, alpha=0.4, xi=1e-6, backend=backend, lr=0.1)
    rho, alpha, xi = [0.2, 0.05, 0.05, 0.0], [0.1, 0.7, 0.7, 0.4], [1e-3, 1e-6, 1e-6, 1e-6]
    lr = [0.1, 0.1, 0.1, 0.3]

    theta = [param.detach().clone() for param in params]
    g = reference.gradient(problem.loss, theta)
    u = reference.hessian_vector_product(problem.loss, theta, g)
    g_norm, u_norm = reference.global_norm(g), reference.global_norm(u)
    adversarial = [t + r * d / (u_norm + x * (g_norm + x)) for t, r, d, x in zip(theta, rho, u, xi, strict=True)]
    g_adv = reference.gradient(problem.loss, adversarial)
    products = reference.hessian_vector_product(problem.loss, adversarial, g_adv)
    adv_norm = reference.global_norm(g_adv)
    expected = [
        t - rate * (gi + a * r / (adv_norm + x) * p)
        for t, rate, gi, a, r, x, p in zip(theta, lr, g, alpha, rho, xi, products, strict=True)
    ]

    optimizer.step(lambda: problem.loss(params))
    assert relative_error(params, expected) < 1e-12
    assert torch.equal(optimizer.metrics["first_order_flatness"], 0.2 * optimizer.metrics["adversarial_grad_norm"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_maximizing_base_optimizer_climbs_the_loss_and_still_descends_on_flatness(backend: str) -> None:
    problem = problems.gelu_network()
    up, down = problem.leaves(), problem.leaves()
    maximizing = GAM(up, rho=RHO, alpha=ALPHA, backend=backend, lr=0.1, maximize=True)
    minimizing = GAM(down, rho=RHO, alpha=ALPHA, backend=backend, lr=0.1)
    for _ in range(10):
        maximizing.step(lambda: problem.loss(up))
        minimizing.step(lambda: -problem.loss(down))
        assert relative_error(up, down) < 1e-12


def flat(params: list[Tensor]) -> Tensor:
    return torch.cat([param.detach().reshape(-1) for param in params])


def relative_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Norm of the difference over the norm of what is expected, over all tensors."""
    return float((flat(actual) - flat(expected)).norm() / flat(expected).norm())
