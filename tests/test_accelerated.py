"""AcceleratedGAM follows Algorithm 2, as ``reference.py`` and gradients by hand have it; what it takes and refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gam_fused import GAM, AcceleratedGAM, kernels, reference
from tests import problems
from tests.states import assert_same
from tests.test_parity import BACKENDS, RULES, flat, relative_error

# So that every term shows.
NUMBERS: dict[str, float] = {"rho": 0.05, "rho_prime": 0.02, "alpha": 0.7, "beta": 0.3, "gamma": 0.5, "xi": 1e-3}

over_backends = pytest.mark.parametrize("backend", BACKENDS)
over_forms = pytest.mark.parametrize("form", ["paper", "released_code"])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("name", "form"), [("quartic", "released_code"), ("gelu_network", "paper")])
def test_fifty_steps_of_every_back_end_follow_the_reference(name: str, form: str, rule: str) -> None:
    problem = problems.PROBLEMS[name]()
    base, literal_rule, kwargs = RULES[rule]
    params = {backend: problem.leaves() for backend in BACKENDS}
    optimizers = {
        backend: AcceleratedGAM(params[backend], base, form=form, backend=backend, **NUMBERS, **kwargs)
        for backend in BACKENDS
    }
    literal = [tensor.clone() for tensor in problem.start]
    rule_state = literal_rule(**kwargs)

    for _ in range(50):
        terms = reference.accelerated_terms(problem.loss, literal, **NUMBERS, form=form)
        literal = rule_state.step(literal, terms.combined)
        for backend, optimizer in optimizers.items():
            loss = optimizer.step(lambda ours=params[backend]: problem.loss(ours))  # type: ignore[misc]
            assert relative_error([loss], [terms.loss]) < 1e-10, backend
            assert relative_error(params[backend], literal) < 1e-10, backend
    expected = {
        "loss": terms.loss,
        "grad_norm": flat(terms.g0).norm(),
        "ascent_norm": (flat(terms.g1) - flat(terms.g0)).norm(),
        "adversarial_grad_norm": flat(terms.g2).norm(),
        "first_order_flatness": NUMBERS["rho"] * flat(terms.g2).norm(),
    }
    for backend, optimizer in optimizers.items():
        assert float(optimizer.metrics["skipped_steps"]) == 0
        for metric, value in expected.items():
            assert relative_error([optimizer.metrics[metric]], [value]) < 1e-9, (backend, metric)


@over_backends
@over_forms
@pytest.mark.parametrize(
    ("name", "gradient"), [("quartic", problems.quartic_gradient), ("logistic", problems.logistic_gradient)]
)
def test_steps_follow_the_hand_derived_gradient(
    name: str, gradient: Callable[[Tensor], Tensor], form: str, backend: str
) -> None:
    problem = problems.PROBLEMS[name]()
    params = problem.leaves()
    optimizer = AcceleratedGAM(params, form=form, backend=backend, lr=0.1, **NUMBERS)
    rho, rho_prime, alpha, beta, gamma, xi = NUMBERS.values()
    theta = flat(params)
    for _ in range(20):
        g0 = gradient(theta)
        g1 = gradient(theta + rho_prime * g0 / (g0.norm() + xi))
        theta_adv = theta + rho * (g1 - g0) / ((g1 - g0).norm() + xi)
        g2 = gradient(theta_adv)
        g3 = gradient(theta_adv + rho_prime * g2 / (g2.norm() + xi))
        plus = alpha * g1 + (1 - alpha) * g3
        minus = beta * g0 + (1 - beta) * g2 if form == "paper" else g0 + abs(1 - beta) * g2
        perpendicular = minus - (minus @ plus) / (plus.norm() + xi) ** 2 * plus
        theta = theta - 0.1 * (plus - gamma * perpendicular)

        optimizer.step(lambda: problem.loss(params))
        assert relative_error([flat(params)], [theta]) < 1e-10


@over_backends
@over_forms
def test_groups_use_their_own_numbers_under_one_norm_and_one_product(form: str, backend: str) -> None:
    problem = problems.gelu_network()
    params = problem.leaves()
    groups = [
        {"params": params[:1], "rho": 0.2, "alpha": 0.1, "xi": 1e-2, "gamma": 0.9},
        {"params": params[1:3], "beta": 1.4, "rho_prime": 0.2},
        {"params": params[3:], "rho": 0.0, "alpha": 0.4, "lr": 0.3, "gamma": 0.0},
    ]
    usual = {"rho": 0.1, "rho_prime": 0.05, "alpha": 0.7, "beta": 0.3, "gamma": 0.5, "xi": 1e-4, "lr": 0.1}
    optimizer = AcceleratedGAM(groups, form=form, backend=backend, **usual)
    each = [{**usual, **groups[number]} for number in (0, 1, 1, 2)]

    def moved(start: list[Tensor], directions: list[Tensor], length: str) -> list[Tensor]:
        norm = flat(directions).norm()
        return [p + n[length] * d / (norm + n["xi"]) for p, d, n in zip(start, directions, each, strict=True)]

    def weighted(
        first: list[Tensor], second: list[Tensor], weights: Callable[[Any], tuple[float, float]]
    ) -> list[Tensor]:
        pairs = zip(first, second, map(weights, each), strict=True)
        return [a * one + b * other for one, other, (a, b) in pairs]

    theta = [param.detach().clone() for param in params]
    g0 = reference.gradient(problem.loss, theta)
    g1 = reference.gradient(problem.loss, moved(theta, g0, "rho_prime"))
    theta_adv = moved(theta, [b - a for a, b in zip(g0, g1, strict=True)], "rho")
    g2 = reference.gradient(problem.loss, theta_adv)
    g3 = reference.gradient(problem.loss, moved(theta_adv, g2, "rho_prime"))
    plus = weighted(g1, g3, lambda n: (n["alpha"], 1 - n["alpha"]))
    if form == "paper":
        minus = weighted(g0, g2, lambda n: (n["beta"], 1 - n["beta"]))
    else:
        minus = weighted(g0, g2, lambda n: (1.0, abs(1 - n["beta"])))
    product, norm = flat(plus) @ flat(minus), flat(plus).norm()
    expected = [
        t - n["lr"] * (p - n["gamma"] * (m - product / (norm + n["xi"]) ** 2 * p))
        for t, p, m, n in zip(theta, plus, minus, each, strict=True)
    ]

    optimizer.step(lambda: problem.loss(params))
    assert relative_error(params, expected) < 1e-12
    assert torch.equal(optimizer.metrics["first_order_flatness"], 0.2 * optimizer.metrics["adversarial_grad_norm"])


@over_backends
def test_a_maximizing_base_optimizer_steps_as_one_that_minimizes_the_negative_loss(backend: str) -> None:
    problem = problems.gelu_network()
    up, down = problem.leaves(), problem.leaves()
    maximizing = AcceleratedGAM(up, backend=backend, lr=0.1, maximize=True, **NUMBERS)
    minimizing = AcceleratedGAM(down, backend=backend, lr=0.1, **NUMBERS)
    for _ in range(10):
        maximizing.step(lambda: problem.loss(up))
        minimizing.step(lambda: -problem.loss(down))
        assert relative_error(up, down) < 1e-12


@over_backends
def test_parameters_of_several_dtypes_are_one_vector(backend: str) -> None:
    problem = problems.gelu_network()
    mixed = [p.to(dtype) for p, dtype in zip(problem.start, [torch.float64, torch.float32] * 2, strict=True)]
    params = [p.requires_grad_() for p in mixed]
    literal = [p.detach().double().clone() for p in params]
    optimizer = AcceleratedGAM(params, backend=backend, lr=0.1, **NUMBERS)
    combined = reference.accelerated_terms(problem.loss, literal, **NUMBERS).combined
    optimizer.step(lambda: problem.loss([p.double() for p in params]))
    steps = [p - 0.1 * h for p, h in zip(literal, combined, strict=True)]
    assert relative_error([p.double() for p in params], steps) < 1e-6
    assert relative_error([params[0]], [steps[0]]) < 1e-6


BASE = {**NUMBERS, "lr": 0.1, "form": "paper", "interval": 1}
OTHER = {
    "rho": 0.3, "rho_prime": 0.1, "alpha": 0.6, "beta": 0.4, "gamma": 0.4, "xi": 1e-2, "form": "released_code",
    "interval": 2, "lr": 0.2,
}  # fmt: skip


@pytest.mark.parametrize("knob", OTHER)
def test_every_knob_reaches_the_result(knob: str) -> None:
    problem = problems.gelu_network()
    results = []
    for options in (BASE, {**BASE, knob: OTHER[knob]}):
        params = problem.leaves()
        optimizer = AcceleratedGAM(params, torch.optim.SGD, **options)  # type: ignore[arg-type]
        for _ in range(2):
            optimizer.step(lambda params=params: problem.loss(params))  # type: ignore[misc]
        results.append(flat(params))
    assert not torch.allclose(*results, rtol=1e-9, atol=0)


def test_stochastic_rounding_reaches_the_result_and_repeats() -> None:
    results = []
    for rounding in ("nearest", "stochastic", "stochastic"):
        params = [p.bfloat16().requires_grad_() for p in problems.gelu_network().start]
        optimizer = AcceleratedGAM(params, rounding=rounding, lr=0.01)
        for _ in range(3):
            optimizer.step(lambda params=params: problems.gelu_network().loss([p.double() for p in params]))  # type: ignore[misc]
        results.append(flat(params))
    assert not torch.equal(results[0], results[1])
    assert torch.equal(results[1], results[2])


def test_between_flatness_terms_the_base_optimizer_steps_alone() -> None:
    problem = problems.gelu_network()
    ours, plain = problem.leaves(), problem.leaves()
    optimizer = AcceleratedGAM(ours, interval=3, lr=0.1, weight_decay=0.1, **NUMBERS)
    base = torch.optim.SGD(plain, lr=0.1, weight_decay=0.1)
    passes: list[None] = []

    def closure() -> Tensor:
        passes.append(None)
        return problem.loss(ours)

    for step in range(6):
        with torch.no_grad():
            torch._foreach_copy_(plain, ours)
        base.zero_grad()
        problem.loss(plain).backward()
        base.step()
        passes.clear()
        optimizer.step(closure)
        assert len(passes) == (4 if step % 3 == 0 else 1)
        assert torch.equal(flat(ours), flat(plain)) == (step % 3 != 0)


@pytest.mark.parametrize("is_given", [True, False], ids=["model given", "model found"])
def test_four_passes_see_one_function_and_statistics_advance_once(is_given: bool) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2)).double()
    inputs, twin = torch.randn(8, 4, dtype=torch.float64), copy.deepcopy(model)
    optimizer = AcceleratedGAM(model.parameters(), lr=0.1, model=model if is_given else None)
    masks: list[Tensor] = []

    def closure() -> Tensor:
        hidden = model[2](model[1](model[0](inputs)))
        masks.append(hidden.detach() == 0)
        return model[3](hidden).square().sum() + torch.rand(())

    torch.manual_seed(4)
    loss = optimizer.step(closure)
    after = torch.rand(3)
    assert len(masks) == 4
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert 0 < int(masks[0].sum()) < masks[0].numel()

    torch.manual_seed(4)
    assert torch.equal(twin(inputs).square().sum() + torch.rand(()), loss)
    assert torch.equal(torch.rand(3), after)
    assert_same(dict(twin.named_buffers()), dict(model.named_buffers()))
    assert int(model[1].num_batches_tracked) == 1


@over_backends
def test_the_kinds_of_closures_take_the_same_step(backend: str) -> None:
    problem = problems.gelu_network()
    results = []
    for kind in ("returns the loss", "calls backward", "calls backward twice"):
        params = problem.leaves()
        optimizer = AcceleratedGAM(params, backend=backend, lr=0.1, **NUMBERS)

        def closure(params: list[Tensor] = params, kind: str = kind, optimizer: Any = optimizer) -> Tensor:
            if kind == "returns the loss":
                return problem.loss(params)
            optimizer.zero_grad()
            if kind == "calls backward":
                loss = problem.loss(params)
                loss.backward()
                return loss
            halves = [problem.loss(params) * 0.25, problem.loss(params) * 0.75]
            for half in halves:
                half.backward()
            return halves[0] + halves[1]

        losses = [optimizer.step(closure) for _ in range(3)]
        results.append([*losses, *params])
    assert relative_error(results[1], results[0]) < 1e-12
    assert relative_error(results[2], results[0]) < 1e-12


@over_backends
@pytest.mark.parametrize("xi", [0.0, 1e-46], ids=str)
def test_a_gradient_of_zero_over_a_xi_of_zero_is_skipped(xi: float, backend: str) -> None:
    """0/0 otherwise, and 1e-46 is 0 in the float32 that the launch divides in."""
    param = torch.zeros(5, requires_grad=True)
    optimizer = AcceleratedGAM([param], lr=0.1, backend=backend, xi=xi)
    optimizer.step(lambda: param.square().sum())
    assert not param.detach().any()
    assert int(optimizer.metrics["skipped_steps"]) == 1


def test_a_closure_that_writes_into_grad_without_backward_takes_the_same_step() -> None:
    start = torch.linspace(0.5, 1.5, 3, dtype=torch.float64)
    stepped = []
    for writes in (False, True):
        param = start.clone().requires_grad_()
        optimizer = AcceleratedGAM([param], lr=0.1)

        def closure(param: Tensor = param, writes: bool = writes) -> Tensor:
            loss = (param**3).sum()
            if writes:
                param.grad = torch.zeros_like(param)
            return loss

        optimizer.step(closure)
        stepped.append(param.detach())
    assert torch.equal(*stepped)


def test_a_closure_that_starts_to_call_backward_in_a_later_pass_is_refused() -> None:
    param = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = AcceleratedGAM([param], lr=0.1)
    passes: list[None] = []

    def closure() -> Tensor:
        passes.append(None)
        loss = param.square().sum()
        if len(passes) == 2:
            loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"backward\(\) in a later pass of a step and not in its first"):
        optimizer.step(closure)
    assert param.tolist() == [1.0, 2.0]
    assert param.grad is None


def test_a_closure_that_returns_something_else_in_a_later_pass_is_refused() -> None:
    param = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = AcceleratedGAM([param], lr=0.1)
    for wrong, message in ((lambda loss: loss.detach(), "is detached"), (lambda loss: None, "must be the scalar loss")):
        losses: list[Tensor] = []

        def closure(wrong: Any = wrong, losses: list[Tensor] = losses) -> Any:
            losses.append(param.square().sum())
            return wrong(losses[-1]) if len(losses) == 3 else losses[-1]

        with pytest.raises((TypeError, ValueError), match=message):
            optimizer.step(closure)
        assert param.tolist() == [1.0, 2.0]


def test_checkpoints_move_to_the_plain_base_optimizer_and_back() -> None:
    problem = problems.gelu_network()
    params = problem.leaves()
    optimizer = AcceleratedGAM(params, torch.optim.AdamW, lr=0.01, interval=2, **NUMBERS)
    for _ in range(3):
        optimizer.step(lambda: problem.loss(params))
    saved = copy.deepcopy(optimizer.state_dict())

    plain = torch.optim.AdamW(problem.leaves(), lr=0.5)
    plain.load_state_dict(saved)
    assert plain.param_groups[0]["lr"] == 0.01
    resumed_params = [p.detach().clone().requires_grad_() for p in params]
    resumed = AcceleratedGAM(resumed_params, torch.optim.AdamW, lr=0.5, interval=2)
    resumed.load_state_dict(saved)
    assert resumed.steps == 3
    assert {name: resumed.param_groups[0][name] for name in NUMBERS} == NUMBERS
    for _ in range(2):
        optimizer.step(lambda: problem.loss(params))
        resumed.step(lambda: problem.loss(resumed_params))
    assert_same(params, resumed_params)

    # Of GAM's: a number that it has no name for stays as it was.
    gams = GAM(problem.leaves(), torch.optim.AdamW, rho=0.01, alpha=0.02, lr=0.01)
    resumed.load_state_dict(gams.state_dict())
    assert {name: resumed.param_groups[0][name] for name in NUMBERS} == {
        **NUMBERS,
        "rho": 0.01,
        "alpha": 0.02,
        "xi": 1e-12,
    }


def test_wrapping_keeps_groups_and_state_and_takes_the_same_steps() -> None:
    problem = problems.gelu_network()
    built, wrapped = problem.leaves(), problem.leaves()
    first = AcceleratedGAM(built, lr=0.1, momentum=0.9, form="released_code", **NUMBERS)
    base = torch.optim.SGD(wrapped, lr=0.1, momentum=0.9)
    second = AcceleratedGAM.wrap(base, form="released_code", **NUMBERS)
    assert second.param_groups is base.param_groups
    for _ in range(3):
        first.step(lambda: problem.loss(built))
        second.step(lambda: problem.loss(wrapped))
    assert_same(built, wrapped)
    assert "AcceleratedGAM around SGD" in repr(second)
    assert_same(copy.deepcopy(second).state_dict()["state"], second.state_dict()["state"])


def test_a_base_optimizer_with_an_alpha_and_a_rho_of_its_own_keeps_them() -> None:
    problem = problems.gelu_network()
    for base, name in ((torch.optim.RMSprop, "alpha"), (torch.optim.Adadelta, "rho")):
        params = problem.leaves()
        optimizer = AcceleratedGAM(params, base, lr=0.01, rho=0.3, alpha=0.25)
        group = optimizer.param_groups[0]
        assert group[f"gam_{name}"] == {"alpha": 0.25, "rho": 0.3}[name]
        assert group[name] == {"alpha": 0.99, "rho": 0.9}[name]
        optimizer.step(lambda params=params: problem.loss(params))  # type: ignore[misc]
        assert float(optimizer.metrics["skipped_steps"]) == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"form": "papers"}, ValueError, "form must be one of 'paper', 'released_code', got 'papers'"),
        ({"rho_prime": -1.0}, ValueError, r"rho_prime must be a finite number >= 0, got -1\.0"),
        ({"beta": "0.5"}, TypeError, "beta must be a number, got '0.5'"),
        ({"gamma": float("nan")}, ValueError, "gamma must be a finite number >= 0, got nan"),
        ({"interval": 0}, ValueError, "interval must be >= 1, got 0; 1 stands for every step"),
        ({"rounding": "up"}, ValueError, "rounding must be one of"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
        ({"model": 3}, TypeError, "model must be a torch.nn.Module or None"),
        ({"hvp": "exact"}, TypeError, "hvp"),
        ({"second_order": "auto"}, TypeError, "second_order"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_argument_is_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AcceleratedGAM(problems.gelu_network().leaves(), lr=0.1, **options)


def test_what_cannot_be_wrapped_and_a_step_without_a_closure_say_what_to_do() -> None:
    params = problems.gelu_network().leaves()
    base = torch.optim.SGD(params, lr=0.1)
    with pytest.raises(TypeError, match=r"use AcceleratedGAM\.wrap\(optimizer"):
        AcceleratedGAM(params, base)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"optimizer must be a plain torch\.optim\.Optimizer"):
        AcceleratedGAM.wrap(GAM(params, lr=0.1))
    with pytest.raises(ValueError, match="LBFGS evaluates a closure itself, which AcceleratedGAM cannot give it"):
        AcceleratedGAM.wrap(torch.optim.LBFGS(params))
    with pytest.raises(TypeError, match=r"call step\(lambda: criterion\(model\(x\), y\)\)\.$"):
        AcceleratedGAM.wrap(base).step()


def test_attention_runs_on_the_fused_kernel_that_has_no_second_derivative() -> None:
    query = nn.Parameter(torch.randn(1, 2, 8, 16))
    optimizer = AcceleratedGAM([query], lr=0.1)
    flash = []

    def closure() -> Tensor:
        flash.append(torch.backends.cuda.flash_sdp_enabled())
        return F.scaled_dot_product_attention(query, query, query).square().sum()

    optimizer.step(closure)
    assert flash == [True] * 4
    assert float(optimizer.metrics["skipped_steps"]) == 0


def test_a_loss_that_reaches_none_of_the_parameters_leaves_them_alone() -> None:
    param, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = AcceleratedGAM([param], lr=0.1)
    optimizer.step(lambda: other.square().sum())
    assert param.tolist() == [1.0, 1.0]
    assert (optimizer.steps, float(optimizer.metrics["skipped_steps"])) == (1, 0.0)


def test_a_step_is_ten_launches_of_the_native_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """θ kept; a norm and a shift, thrice; the sums, the decomposition, and the landing."""
    if kernels.available()["native"] is not None:
        pytest.skip(str(kernels.available()["native"]))
    calls: list[str] = []
    native = kernels.resolve("native")
    launch = type(native)._launch
    monkeypatch.setattr(
        type(native),
        "_launch",
        lambda self, name, *args, **options: calls.append(name) or launch(self, name, *args, **options),
    )
    problem = problems.gelu_network()
    params = problem.leaves()
    AcceleratedGAM(params, backend="native", lr=0.1).step(lambda: problem.loss(params))
    ahead = ["l2_norm", "shift_"]
    ascent = ["difference_norm", "shift_"]
    assert calls == ["restore_", *ahead, *ascent, *ahead, "projection", "decompose_", "sgd_step_"]
