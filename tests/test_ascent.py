"""Ascent directions that cost less than the algorithm's, and flatness terms that weigh what they stand for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gam_fused import GAM, gam, reference
from gam_fused.closures import evaluate
from tests import problems
from tests.literal import assert_equal_bits, assert_equal_to_rounding, copies
from tests.states import assert_same, snapshot

RHO, ALPHA, LR, XI = 0.3, 0.7, 0.1, 1e-12
LossFunction = reference.LossFunction


class Run:
    """A problem of which a closure may use the first part, an optimizer, and the literal formulas beside it."""

    def __init__(self, **options: Any) -> None:
        self.problem = problems.gelu_network()
        self.params = self.problem.leaves()
        self.optimizer = GAM(self.params, lr=LR, rho=RHO, alpha=ALPHA, xi=XI, **options)
        self.calls: list[float] = []

    def loss(self, params: list[Tensor], batch_fraction: float = 1.0) -> Tensor:
        # Another function where only a part is asked for, as another part of the data would make it.
        part = 0.0 if batch_fraction == 1.0 else batch_fraction
        return self.problem.loss(params) + part * sum((param.sin() * param).sum() for param in params)

    def closure(self, batch_fraction: float = 1.0) -> Tensor:
        self.calls.append(batch_fraction)
        return self.loss(self.params, batch_fraction)

    def step(self) -> None:
        self.calls.clear()
        self.optimizer.step(self.closure)

    def literal_step(self, ascent: list[Tensor], alpha: float = ALPHA) -> list[Tensor]:
        """θ − η (g + α h), with h at θ + ρ u/‖u‖ for the given u."""
        theta = copies(self.params)
        g = reference.gradient(self.loss, theta)
        scale = RHO / reference.global_norm(ascent)
        theta_adv = [p + scale * u for p, u in zip(theta, ascent, strict=True)]
        g_adv = reference.gradient(self.loss, theta_adv)
        hvp = reference.hessian_vector_product(self.loss, theta_adv, g_adv)
        weight = alpha * RHO / reference.global_norm(g_adv)
        return [p - LR * (gi + weight * h) for p, gi, h in zip(theta, g, hvp, strict=True)]

    def exact_ascent(self, batch_fraction: float = 1.0) -> list[Tensor]:
        theta = copies(self.params)

        def loss(params: list[Tensor]) -> Tensor:
            return self.loss(params, batch_fraction)

        return reference.hessian_vector_product(loss, theta, reference.gradient(loss, theta))


# ---------------------------------------------------------------- finite differences


def test_an_ascent_by_finite_differences_is_the_difference_quotients_and_the_descent_stays_exact() -> None:
    epsilon = 0.05
    run = Run(ascent="finite_difference", fd_epsilon=epsilon)
    theta = copies(run.params)
    g = reference.gradient(run.loss, theta)
    step = epsilon / reference.global_norm(g)
    ahead = reference.gradient(run.loss, [p + step * gi for p, gi in zip(theta, g, strict=True)])
    expected = run.literal_step([(a - gi) / step for a, gi in zip(ahead, g, strict=True)])
    exact = run.literal_step(run.exact_ascent())
    run.step()
    assert_equal_to_rounding(run.params, expected)
    assert any((one - other).abs().max() > 1e-6 for one, other in zip(expected, exact, strict=True))
    assert run.calls == [1, 1, 1]  # at θ, ahead, and at the adversarial point


# ---------------------------------------------------------------- reuse


def test_a_direction_is_used_again_until_it_is_due() -> None:
    run = Run(ascent="reuse", ascent_interval=3)
    for refreshed in (True, False, False, True, False):
        if refreshed:
            ascent = run.exact_ascent()
        expected = run.literal_step(ascent)
        run.step()
        assert_equal_to_rounding(run.params, expected)
        torch.testing.assert_close(run.optimizer.metrics["ascent_norm"], reference.global_norm(ascent))
        assert run.calls == [1, 1]


def test_an_interval_of_one_is_the_exact_ascent_to_the_bit() -> None:
    one, other = Run(ascent="reuse", ascent_interval=1), Run()
    for _ in range(3):
        one.step()
        other.step()
    assert_equal_bits(one.params, other.params)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"ascent": "reuse", "ascent_interval": 2}, [[True, True], [False, True]]),
        ({"ascent": "finite_difference"}, [[False, False, True], [False, False, True]]),
        ({"batch_fraction": 0.5}, [[False, True, True], [False, True, True]]),
        ({"interval": 2}, [[True, True], [False]]),
        ({"ascent": "reuse", "hvp": "finite_difference"}, [[False] * 4, [False] * 3]),
    ],
    ids=str,
)
def test_graphs_are_made_only_where_something_is_differentiated_twice(
    options: dict[str, Any], expected: list[list[bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[bool] = []

    def noting(*args: Any, **kwargs: Any) -> Any:
        graphs.append(kwargs["create_graph"])
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(gam, "evaluate", noting)
    run = Run(**options)
    for of_step in expected:
        graphs.clear()
        run.step()
        assert graphs == of_step


def test_a_resumed_run_goes_on_with_the_same_direction() -> None:
    run, resumed = Run(ascent="reuse", ascent_interval=3), Run(ascent="reuse", ascent_interval=3)
    for _ in range(2):
        run.step()
    state = copy.deepcopy(run.optimizer.state_dict())
    resumed.optimizer.load_state_dict(state)
    with torch.no_grad():
        for param, other in zip(resumed.params, run.params, strict=True):
            param.copy_(other)
    for _ in range(3):
        run.step()
        resumed.step()
        assert_equal_bits(run.params, resumed.params)


def test_a_direction_of_other_parameters_is_refused_and_changes_nothing() -> None:
    run = Run(ascent="reuse")
    run.step()
    state = run.optimizer.state_dict()
    params = [torch.zeros(7, requires_grad=True) for _ in run.params]
    optimizer = GAM(params, lr=LR, ascent="reuse")
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"ascent direction of shape .* for parameter 0, and here is one of sh"):
        optimizer.load_state_dict(state)
    assert_same(before, optimizer.state_dict())


def test_a_checkpoint_without_a_direction_computes_one() -> None:
    run, plain = Run(ascent="reuse"), Run()
    run.step()
    run.optimizer.load_state_dict(plain.optimizer.state_dict())
    assert run.optimizer.kept_ascent is None


@pytest.mark.parametrize("refreshing", [True, False])
def test_a_skipped_or_failed_step_keeps_the_direction_as_it_was(refreshing: bool) -> None:
    run = Run(ascent="reuse", ascent_interval=1 if refreshing else 5)
    run.step()
    kept = run.optimizer.kept_ascent
    passes = 0

    def closure(last: float = float("nan")) -> Tensor:
        nonlocal passes
        passes += 1
        return run.closure() * (last if passes == 2 else 1.0)

    before = copies(run.params)
    run.optimizer.step(closure)
    assert int(run.optimizer.metrics["skipped_steps"]) == 1
    assert run.optimizer.kept_ascent is kept

    def failing() -> Tensor:
        nonlocal passes
        passes += 1
        if passes == 4:
            raise KeyboardInterrupt
        return run.closure()

    with pytest.raises(KeyboardInterrupt):
        run.optimizer.step(failing)
    assert run.optimizer.kept_ascent is kept
    assert_equal_bits(run.params, before)


def test_a_parameter_that_had_no_gradient_when_the_direction_was_made_stays_where_it_is() -> None:
    model = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)]).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    optimizer = GAM(model.parameters(), lr=LR, rho=RHO, alpha=ALPHA, ascent="reuse")
    used = [model[0]]
    seen: list[Tensor] = []

    def closure() -> Tensor:
        seen.append(model[1].weight.detach().clone())
        return torch.stack([layer(x).square().mean() for layer in used]).sum()

    optimizer.step(closure)
    used.append(model[1])
    optimizer.step(closure)
    assert torch.equal(seen[-1], seen[-2])


@pytest.mark.parametrize("resumed", [False, True])
def test_a_direction_stays_with_its_parameter_when_others_are_frozen(resumed: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    seen: list[Tensor] = []

    def closure() -> Tensor:
        seen.append(model[2].weight.detach().clone())
        return model(x).square().sum()

    optimizer = GAM(model.parameters(), lr=LR, rho=RHO, alpha=ALPHA, ascent="reuse")
    optimizer.step(closure)
    assert optimizer.kept_ascent is not None
    direction = optimizer.kept_ascent.directions[model[2].weight].clone()
    model[0].requires_grad_(False)
    if resumed:
        state = copy.deepcopy(optimizer.state_dict())
        optimizer = GAM(model.parameters(), lr=LR, rho=RHO, alpha=ALPHA, ascent="reuse")
        optimizer.load_state_dict(state)
    seen.clear()
    optimizer.step(closure)
    moved = seen[1] - seen[0]
    torch.testing.assert_close(moved / moved.norm(), direction / direction.norm(), rtol=0, atol=1e-12)


def test_a_copy_of_the_optimizer_has_the_direction() -> None:
    run = Run(ascent="reuse")
    run.step()
    again = copy.deepcopy(run.optimizer)
    assert again.kept_ascent is not None
    assert run.optimizer.kept_ascent is not None
    assert_equal_bits(again.kept_ascent.directions.values(), run.optimizer.kept_ascent.directions.values())


# ---------------------------------------------------------------- a part of the batch


@pytest.mark.parametrize("ascent", ["exact", "finite_difference"])
def test_the_ascent_is_that_of_the_part_and_all_else_that_of_the_whole(ascent: str) -> None:
    run = Run(batch_fraction=0.25, ascent=ascent, fd_epsilon=1e-6)
    expected = run.literal_step(run.exact_ascent(0.25))
    whole = run.literal_step(run.exact_ascent())
    run.step()
    tolerance = 1e-12 if ascent == "exact" else 1e-5
    for param, one in zip(run.params, expected, strict=True):
        torch.testing.assert_close(param, one, rtol=0, atol=tolerance)
    assert any((one - other).abs().max() > 1e-4 for one, other in zip(expected, whole, strict=True))
    assert run.calls == ([1, 0.25, 1] if ascent == "exact" else [1, 0.25, 0.25, 1])


def test_statistics_advance_as_the_whole_batch_has_it_and_masks_are_replayed() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.4), nn.Linear(4, 1)).double()
    twin = copy.deepcopy(model)
    x = torch.randn(8, 3, dtype=torch.float64)
    torch.manual_seed(3)
    twin(x)
    after = torch.get_rng_state()
    optimizer = GAM(model.parameters(), lr=LR, rho=RHO, alpha=ALPHA, batch_fraction=0.5, model=model)

    def closure(batch_fraction: float = 1.0) -> Tensor:
        return model(x[: round(batch_fraction * len(x))]).square().mean()

    torch.manual_seed(3)
    optimizer.step(closure)
    for ours, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_an_exception_in_any_pass_changes_nothing(failing: int) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.4), nn.Linear(4, 1)).double()
    x = torch.randn(8, 3, dtype=torch.float64)
    options: dict[str, Any] = {"batch_fraction": 0.5, "ascent": "reuse", "model": model, "momentum": 0.9}
    optimizer = GAM(model.parameters(), lr=LR, **options)
    calls = 0

    def closure(batch_fraction: float = 1.0) -> Tensor:
        nonlocal calls
        calls += 1
        loss = model(x[: round(batch_fraction * len(x))]).square().mean()
        if calls == failing:
            raise KeyboardInterrupt
        return loss

    before = snapshot(model, optimizer)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert_same(before, snapshot(model, optimizer))
    assert optimizer.kept_ascent is None


def test_a_closure_that_knows_no_part_names_the_way_out() -> None:
    run = Run(batch_fraction=0.5)
    with pytest.raises(TypeError, match="batch_fraction < 1 needs a closure that can be told"):
        run.optimizer.step(lambda: run.loss(run.params))
    assert run.optimizer.steps == 0


# ---------------------------------------------------------------- flatness terms now and then


def test_an_unbiased_term_weighs_as_much_as_those_it_stands_for() -> None:
    run = Run(interval=3, interval_scaling="unbiased")
    expected = run.literal_step(run.exact_ascent(), alpha=3 * ALPHA)
    run.step()
    assert_equal_to_rounding(run.params, expected)
    theta = copies(run.params)
    g = reference.gradient(run.loss, theta)
    run.step()
    assert_equal_to_rounding(run.params, [p - LR * gi for p, gi in zip(theta, g, strict=True)])


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ascent": "none"}, "ascent must be one of 'exact', 'finite_difference', 'reuse', got 'none'"),
        ({"ascent_interval": 0}, "ascent_interval must be >= 1, got 0"),
        ({"ascent_interval": 1.5}, "ascent_interval must be an integer >= 1, got 1.5"),
        ({"batch_fraction": 0}, "batch_fraction must be > 0, got 0"),
        ({"batch_fraction": 1.5}, "batch_fraction must be at most 1, which stands for the whole batch, got 1.5"),
        ({"interval_scaling": "biased"}, "interval_scaling must be one of 'none', 'unbiased', got 'biased'"),
    ],
)
def test_wrong_options_name_the_argument_the_value_and_the_choices(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        GAM([torch.zeros(2, requires_grad=True)], lr=LR, **options)
    with pytest.raises((TypeError, ValueError), match=message):
        GAM.wrap(torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=LR), **options)


@pytest.mark.parametrize("options", [{"ascent": "reuse"}, {"batch_fraction": 0.5}], ids=str)
def test_the_two_halves_of_a_step_refuse_what_needs_a_closure(options: dict[str, Any]) -> None:
    run = Run(**options)
    with pytest.raises(RuntimeError, match="first_step\\(\\) needs hvp='exact', ascent='exact'"):
        run.optimizer.first_step(run.loss(run.params))
