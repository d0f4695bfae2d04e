"""Every kind of closure takes the same step, for the parameters that its loss depends on."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gam_fused import GAM
from tests import literal
from tests.closures.common import (
    ALPHA,
    BATCH,
    CLOSURES,
    LR,
    MODES,
    RHO,
    Task,
    over_modes,
)
from tests.literal import assert_equal_bits, assert_equal_to_rounding
from tests.states import assert_same, snapshot


@pytest.mark.parametrize("kind", CLOSURES)
def test_every_kind_of_closure_takes_the_literal_step(kind: str) -> None:
    task = Task()
    optimizer = task.optimizer()
    expected = literal.step(task.literal_loss(), task.params, rho=RHO, alpha=ALPHA, lr=LR)
    value = task.loss().detach()
    loss = optimizer.step(lambda: CLOSURES[kind](task, optimizer))
    assert_equal_to_rounding(task.params, expected)
    assert_equal_to_rounding([loss], [value])


@pytest.mark.parametrize("mode", ["finite_difference", "between_flatness_steps"])
@pytest.mark.parametrize("kind", CLOSURES)
def test_every_kind_of_closure_takes_the_step_of_one_that_returns_the_loss(kind: str, mode: str) -> None:
    task, twin = Task(), Task()
    optimizer, twin_optimizer = task.optimizer(mode), twin.optimizer(mode)
    before = literal.copies(task.params)
    optimizer.step(lambda: CLOSURES[kind](task, optimizer))
    twin_optimizer.step(twin.loss)
    assert_equal_to_rounding(task.params, twin.params)
    assert not torch.equal(literal.flat(task.params), literal.flat(before))


@st.composite
def splits(draw: st.DrawFn) -> list[list[tuple[int, int]]]:
    """The batch cut into consecutive pieces, and the pieces into consecutive calls of ``backward``."""
    cuts = [0, *sorted(draw(st.sets(st.integers(1, BATCH - 1)))), BATCH]
    calls: list[list[tuple[int, int]]] = []
    for piece in itertools.pairwise(cuts):
        if calls and draw(st.booleans()):
            calls[-1].append(piece)
        else:
            calls.append([piece])
    return calls


@given(calls=splits(), shared=st.booleans())
@settings(max_examples=30)
def test_however_the_batch_is_split_the_step_is_that_of_the_sum(
    calls: list[list[tuple[int, int]]], shared: bool
) -> None:
    task = Task()
    expected = literal.step(task.literal_loss(), task.params, rho=RHO, alpha=ALPHA, lr=LR)

    def closure() -> Tensor:
        task.model.zero_grad()
        whole, total = task.losses(), torch.zeros((), dtype=torch.float64)
        for pieces in calls:
            losses = [whole[start:stop].sum() if shared else task.loss(start, stop) for start, stop in pieces]
            torch.autograd.backward(losses, retain_graph=shared)
            total += torch.stack(losses).sum().detach()
        return total

    loss = task.optimizer().step(closure)
    assert_equal_to_rounding(task.params, expected)
    assert_equal_to_rounding([loss], [Task().loss()])


@pytest.mark.parametrize(
    ("kwargs", "passes"),
    [
        ({"hvp": "exact"}, [2, 2, 2, 2]),
        ({"hvp": "finite_difference"}, [4, 4, 4, 4]),
        ({"hvp": "exact", "interval": 2}, [2, 1, 2, 1]),
        ({"hvp": "finite_difference", "interval": 3}, [4, 1, 1, 4]),
    ],
    ids=["exact", "finite_difference", "exact_every_second", "finite_difference_every_third"],
)
@pytest.mark.parametrize("kind", ["returns_the_loss", "calls_backward_twice"])
def test_the_closure_runs_as_often_as_documented(kind: str, kwargs: dict[str, Any], passes: list[int]) -> None:
    task, counts = Task(), []
    optimizer = task.optimizer(**kwargs)

    def closure() -> Tensor:
        counts[-1] += 1
        return CLOSURES[kind](task, optimizer)

    for _ in passes:
        counts.append(0)
        optimizer.step(closure)
    assert counts == passes


def test_the_step_between_flatness_steps_is_that_of_the_base_optimizer() -> None:
    task, twin = Task(), Task()
    optimizer = task.optimizer(interval=2, momentum=0.9)
    optimizer.step(task.loss)
    twin.model.load_state_dict(task.model.state_dict())
    plain = torch.optim.SGD(twin.params, lr=LR, momentum=0.9)
    plain.load_state_dict(copy.deepcopy(optimizer.base_optimizer.state_dict()))  # which would share its tensors
    optimizer.step(task.loss)
    twin.loss().backward()
    plain.step()
    assert_equal_bits(task.params, twin.params)


def test_backward_by_chosen_inputs_is_refused_and_changes_nothing() -> None:
    task = Task()
    optimizer = task.optimizer()
    before = snapshot(task.model, optimizer)
    for backward in (
        lambda loss: loss.backward(inputs=task.params[:1]),
        lambda loss: torch.autograd.backward(loss, inputs=task.params[:1]),
    ):
        with pytest.raises(ValueError, match=r"backward\(inputs=...\).*Leave `inputs` out"):
            optimizer.step(lambda backward=backward: backward(task.loss()))
        assert_same(before, snapshot(task.model, optimizer))


BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("base", BASES)
@over_modes
@pytest.mark.parametrize("kind", ["returned", "backward"])
def test_parameters_that_the_loss_does_not_depend_on_are_bitwise_alone(kind: str, mode: str, base: str) -> None:
    base_class, kwargs = BASES[base]
    used, unused = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    inputs = torch.randn(5, 4, dtype=torch.float64)
    params = [*unused.parameters(), *used.parameters()]
    optimizer = GAM(params, base_class, rho=RHO, alpha=ALPHA, **MODES[mode], **kwargs)
    optimizer.step(lambda: (used(inputs) * unused(inputs)).square().mean())  # all have state now
    before, used_before = literal.copies(unused.parameters()), literal.copies(used.parameters())
    states = [{name: value.clone() for name, value in optimizer.state[param].items()} for param in unused.parameters()]
    assert all(states)

    def closure() -> Tensor:
        loss = used(inputs).square().mean()
        if kind == "backward":
            loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert_equal_bits(unused.parameters(), before)
    assert_same(states, [dict(optimizer.state[param]) for param in unused.parameters()])
    assert all(param.grad is None for param in unused.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(used.parameters(), used_before, strict=True))


@over_modes
@pytest.mark.parametrize("leftover", ["frozen", "set_by_the_closure"])
def test_a_leftover_grad_of_a_parameter_without_gradient_is_not_stepped_along(leftover: str, mode: str) -> None:
    task, spare = Task(), nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = GAM([spare, *task.params], rho=RHO, alpha=ALPHA, lr=LR, weight_decay=0.1, **MODES[mode])
    if mode == "between_flatness_steps":
        optimizer.step(task.loss)
    spare.grad = torch.ones_like(spare)
    spare.requires_grad_(leftover != "frozen")

    def closure() -> Tensor:
        if leftover == "set_by_the_closure":
            spare.grad = torch.ones_like(spare)
        return task.loss()

    optimizer.step(closure)
    assert_equal_bits([spare], [torch.ones(2, dtype=torch.float64)])


def test_a_loss_of_some_parameters_takes_the_literal_step_on_them() -> None:
    task = Task()
    expected = literal.step(
        lambda params: F.cross_entropy(task.inputs @ params[0].T + params[1], task.labels),
        [torch.ones(3, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)],
        rho=RHO,
        alpha=ALPHA,
        lr=LR,
    )
    weight, bias = nn.Parameter(torch.ones(3, 4).double()), nn.Parameter(torch.zeros(3).double())
    spare = nn.Parameter(torch.full((2,), 5.0).double())
    optimizer = GAM([spare, weight, bias], rho=RHO, alpha=ALPHA, lr=LR, weight_decay=0.0)
    optimizer.step(lambda: F.cross_entropy(task.inputs @ weight.T + bias, task.labels))
    assert_equal_to_rounding([weight, bias], expected)


def branching(start: Tensor) -> dict[str, literal.LossFunction]:
    """Losses of (a, b) that use b on one side only: θ is where a still equals ``start``."""

    def alone(a: Tensor) -> Tensor:
        return (a**4).sum() + a.sum()

    def joint(a: Tensor, b: Tensor) -> Tensor:
        return (a**2 * b**2).sum() + (b**3).sum()

    return {
        "at_theta_only": lambda p: alone(p[0]) + (joint(*p) if torch.equal(p[0], start) else 0.0),
        "at_theta_adv_only": lambda p: alone(p[0]) + (0.0 if torch.equal(p[0], start) else joint(*p)),
    }


@pytest.mark.parametrize("kind", ["returned", "backward"])
def test_a_parameter_used_at_theta_only_counts_as_constant_at_theta_adv(kind: str) -> None:
    a, b = (nn.Parameter(torch.rand(3, dtype=torch.float64) + 0.5) for _ in range(2))
    loss = branching(a.detach().clone())["at_theta_only"]
    expected = literal.step(loss, [a, b], rho=RHO, alpha=ALPHA, lr=0.01)

    def closure() -> Tensor:
        value = loss([a, b])
        if kind == "backward":
            value.backward()
        return value

    GAM([a, b], rho=RHO, alpha=ALPHA, lr=0.01).step(closure)
    assert_equal_to_rounding([a, b], expected)


@pytest.mark.parametrize("kind", ["returned", "backward"])
def test_a_parameter_used_at_theta_adv_only_is_left_alone_and_counts_as_constant(kind: str) -> None:
    a, b = (nn.Parameter(torch.rand(3, dtype=torch.float64) + 0.5) for _ in range(2))
    loss = branching(a.detach().clone())["at_theta_adv_only"]
    constant = b.detach().clone()
    expected = literal.step(lambda p: loss([p[0], constant]), [a], rho=RHO, alpha=ALPHA, lr=0.01)

    def closure() -> Tensor:
        value = loss([a, b])
        if kind == "backward":
            value.backward()
        return value

    optimizer = GAM([a, b], rho=RHO, alpha=ALPHA, lr=0.01, weight_decay=0.0, momentum=0.9)
    optimizer.step(closure)
    assert_equal_to_rounding([a], expected)
    assert_equal_bits([b], [constant])
    assert b not in optimizer.state
    assert b.grad is None


def test_a_loss_that_depends_on_no_parameter_of_the_optimizer_changes_nothing() -> None:
    task, foreign = Task(), torch.ones(3, requires_grad=True)
    optimizer = task.optimizer(momentum=0.9, weight_decay=0.1)
    before = snapshot(task.model, optimizer)
    optimizer.step(lambda: foreign.square().sum())
    assert_same(before, snapshot(task.model, optimizer))
