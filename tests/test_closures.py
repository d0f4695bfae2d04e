"""Closures of every kind take the same step, see ``.grad`` as usual, and leave nothing behind."""

from __future__ import annotations

import copy
import gc
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gam_fused import GAM, reference
from tests import literal
from tests.literal import assert_equal_bits, assert_equal_to_rounding
from tests.states import assert_same, snapshot

RHO, ALPHA, LR = 0.1, 0.4, 0.3
BATCH = 8

MODES: dict[str, dict[str, Any]] = {
    "exact": {"hvp": "exact"},
    "finite_difference": {"hvp": "finite_difference"},
    "between_flatness_steps": {"interval": 2},
}
over_modes = pytest.mark.parametrize("mode", MODES)


class Task:
    """A smooth network on one batch, in float64."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        self.inputs = torch.randn(BATCH, 4, dtype=torch.float64)
        self.labels = torch.randint(3, (BATCH,))

    @property
    def params(self) -> list[Tensor]:
        return list(self.model.parameters())

    def losses(self, start: int = 0, stop: int = BATCH) -> Tensor:
        """Per-sample losses, already divided by the size of the whole batch."""
        rows = slice(start, stop)
        return F.cross_entropy(self.model(self.inputs[rows]), self.labels[rows], reduction="none") / BATCH

    def loss(self, start: int = 0, stop: int = BATCH) -> Tensor:
        return self.losses(start, stop).sum()

    def literal_loss(self) -> literal.LossFunction:
        return literal.as_function(self.model, lambda net: F.cross_entropy(net(self.inputs), self.labels))

    def optimizer(self, mode: str = "exact", **kwargs: Any) -> GAM:
        optimizer = GAM(self.params, rho=RHO, alpha=ALPHA, **{"lr": LR, **MODES[mode], **kwargs})
        if mode == "between_flatness_steps":
            optimizer.step(self.loss)
        return optimizer


class Wrapper:
    """Hands ``backward`` on through plain functions, as training libraries do."""

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        self._scaled(loss, **kwargs)

    def _scaled(self, loss: Tensor, **kwargs: Any) -> None:
        loss.backward(**kwargs)


# ---------------------------------------------------------------------- every kind of closure takes the same step


def returns_the_loss(task: Task, optimizer: GAM) -> Tensor:
    return task.loss()


def calls_backward(task: Task, optimizer: GAM) -> Tensor:
    optimizer.zero_grad()
    loss = task.loss()
    loss.backward()
    return loss


def zeroes_in_place(task: Task, optimizer: GAM) -> Tensor:
    optimizer.zero_grad(set_to_none=False)
    loss = task.loss()
    loss.backward()
    return loss


def zeroes_the_model(task: Task, optimizer: GAM) -> Tensor:
    task.model.zero_grad()
    loss = task.loss()
    loss.backward()
    return loss.detach()


def calls_autograd_backward(task: Task, optimizer: GAM) -> Tensor:
    loss = task.loss()
    torch.autograd.backward(loss)
    return loss


def calls_backward_through_a_wrapper(task: Task, optimizer: GAM) -> Tensor:
    loss = task.loss()
    Wrapper().backward(loss, retain_graph=False)
    return loss


def scales_by_the_gradient_argument(task: Task, optimizer: GAM) -> Tensor:
    loss = task.loss()
    (loss / 4).backward(gradient=torch.tensor(4.0, dtype=torch.float64))
    return loss


def weights_the_samples(task: Task, optimizer: GAM) -> Tensor:
    weights = torch.linspace(0.5, 2.0, BATCH, dtype=torch.float64)
    losses = task.losses()
    (losses / weights).backward(weights)
    return losses.sum()


def weights_two_tensors(task: Task, optimizer: GAM) -> Tensor:
    first, second = task.losses(0, 3), task.loss(3)
    torch.autograd.backward([first, second], [torch.ones(3, dtype=torch.float64), None])
    return first.sum() + second


def weights_by_a_tuple(task: Task, optimizer: GAM) -> Tensor:
    loss = task.loss()
    torch.autograd.backward((loss / 2,), grad_tensors=(torch.tensor(2.0, dtype=torch.float64),))
    return loss


def calls_backward_twice(task: Task, optimizer: GAM) -> Tensor:
    optimizer.zero_grad()
    first = task.loss(0, 3)
    first.backward()
    second = task.loss(3)
    second.backward()
    return first.detach() + second.detach()


def calls_backward_twice_on_one_graph(task: Task, optimizer: GAM) -> Tensor:
    losses = task.losses()
    first, second = losses[:3].sum(), losses[3:].sum()
    first.backward(retain_graph=True)
    second.backward()
    return first + second


def calls_autograd_backward_twice_on_one_graph(task: Task, optimizer: GAM) -> Tensor:
    losses = task.losses()
    torch.autograd.backward(losses[:3].sum(), retain_graph=True)
    torch.autograd.backward(losses[3:].sum())
    return losses.sum()


def asks_for_a_graph_of_the_gradient(task: Task, optimizer: GAM) -> Tensor:
    losses = task.losses()
    losses[:3].sum().backward(create_graph=True)  # which implies retain_graph
    losses[3:].sum().backward()
    return losses.sum()


CLOSURES: dict[str, Callable[[Task, GAM], Tensor]] = {
    function.__name__: function
    for function in (
        returns_the_loss,
        calls_backward,
        zeroes_in_place,
        zeroes_the_model,
        calls_autograd_backward,
        calls_backward_through_a_wrapper,
        scales_by_the_gradient_argument,
        weights_the_samples,
        weights_two_tensors,
        weights_by_a_tuple,
        calls_backward_twice,
        calls_backward_twice_on_one_graph,
        calls_autograd_backward_twice_on_one_graph,
        asks_for_a_graph_of_the_gradient,
    )
}


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


# ---------------------------------------------------------------------- losses of some parameters only

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


# ---------------------------------------------------------------------- what .grad holds


@over_modes
def test_backward_accumulates_into_grad_as_usual(mode: str) -> None:
    task = Task()
    optimizer = task.optimizer(mode)
    theta: list[list[Tensor]] = []
    held: list[list[Tensor]] = []

    def closure() -> Tensor:
        theta.append(literal.copies(task.params))
        assert all(param.grad is None for param in task.params)
        first, second = task.loss(0, 3), task.loss(3)
        for loss in (first, second):
            loss.backward()
            held.append([param.grad.clone() for param in task.params if param.grad is not None])
        return first + second

    optimizer.step(closure)
    assert len(held) == 2 * len(theta) > 0
    for point, after_first, after_second in zip(theta, held[::2], held[1::2], strict=True):
        twin = Task()
        twin.model.load_state_dict(dict(zip(twin.model.state_dict(), point, strict=True)))
        twin.loss(0, 3).backward()
        assert_equal_bits(after_first, [param.grad for param in twin.params if param.grad is not None])
        twin.loss(3).backward()
        assert_equal_bits(after_second, [param.grad for param in twin.params if param.grad is not None])


def test_grads_from_before_the_step_are_not_accumulated_into() -> None:
    task = Task()
    optimizer = task.optimizer()
    expected = literal.step(task.literal_loss(), task.params, rho=RHO, alpha=ALPHA, lr=LR)
    task.loss().backward()
    old = [param.grad for param in task.params if param.grad is not None]
    values = literal.copies(old)

    def closure() -> Tensor:  # no zero_grad
        loss = task.loss()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert_equal_to_rounding(task.params, expected)
    assert_equal_bits(old, values)


@over_modes
@pytest.mark.parametrize("moment", ["before", "between", "after"])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.filterwarnings("ignore:the closure changed .grad")
def test_zeroing_grads_at_any_moment_does_not_change_the_step(set_to_none: bool, moment: str, mode: str) -> None:
    task, twin = Task(), Task()
    optimizer, twin_optimizer = task.optimizer(mode), twin.optimizer(mode)

    def closure() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        if moment == "before":
            optimizer.zero_grad(set_to_none)
        for start, stop in ((0, 3), (3, BATCH)):
            loss = task.loss(start, stop)
            loss.backward()
            if moment == "after" or (moment == "between" and stop < BATCH):
                optimizer.zero_grad(set_to_none)
            total += loss.detach()
        return total

    optimizer.step(closure)
    twin_optimizer.step(lambda: calls_backward_twice(twin, twin_optimizer))
    assert_equal_bits(task.params, twin.params)


@over_modes
def test_writing_into_handed_out_grads_does_not_change_the_step(mode: str) -> None:
    """Also not where a parameter has the only gradient of its step, or the graph's own memory."""
    param, twin = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    kwargs = {"rho": RHO, "alpha": ALPHA, "lr": LR, **MODES[mode]}
    optimizer, twin_optimizer = GAM([param], **kwargs), GAM([twin], **kwargs)

    def closure() -> Tensor:
        loss = (param**3).sum()
        loss.backward()
        assert param.grad is not None
        param.grad.fill_(1e6)
        return loss

    for _ in range(2):
        with pytest.warns(UserWarning, match=r"closure changed \.grad"):
            optimizer.step(closure)
        twin_optimizer.step(lambda: (twin**3).sum())
    assert_equal_bits([param], [twin])


def clip(task: Task) -> None:
    nn.utils.clip_grad_norm_(task.params, 1e-3)


def scale(task: Task) -> None:
    for param in task.params:
        assert param.grad is not None
        param.grad *= 0.5


def replace(task: Task) -> None:
    task.params[0].grad = torch.zeros_like(task.params[0])


def assign_without_backward(task: Task) -> None:
    nn.Module.zero_grad(task.model)
    task.params[0].grad = torch.zeros_like(task.params[0])


@pytest.mark.parametrize("change", [clip, scale, replace, assign_without_backward])
@over_modes
def test_changing_grads_warns_names_the_way_out_and_does_not_change_the_step(
    mode: str, change: Callable[[Task], None]
) -> None:
    task, twin = Task(), Task()
    optimizer, twin_optimizer = task.optimizer(mode), twin.optimizer(mode)

    def closure() -> Tensor:
        loss = task.loss()
        loss.backward()
        change(task)
        return loss

    with pytest.warns(UserWarning, match=r"closure changed \.grad .*clipping.*base_optimizer\.register_step_pre_hook"):
        optimizer.step(closure)
    twin_optimizer.step(twin.loss)
    assert_equal_bits(task.params, twin.params)


def test_the_way_out_that_the_warning_names_clips_the_combined_gradient() -> None:
    task = Task()
    optimizer = task.optimizer()
    optimizer.base_optimizer.register_step_pre_hook(lambda *_: clip(task))
    combined = literal.combined_gradient(task.literal_loss(), task.params, rho=RHO, alpha=ALPHA)
    shrink = 1e-3 / (reference.global_norm(combined) + 1e-6)
    expected = [param.detach() - LR * shrink * grad for param, grad in zip(task.params, combined, strict=True)]
    optimizer.step(lambda: calls_backward(task, optimizer))
    assert_equal_to_rounding(task.params, expected)


@pytest.mark.parametrize("kind", CLOSURES)
def test_a_closure_that_leaves_grads_as_they_are_warns_of_nothing(kind: str) -> None:
    task = Task()
    optimizer = task.optimizer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(lambda: CLOSURES[kind](task, optimizer))


@pytest.mark.parametrize("kind", CLOSURES)
def test_after_a_step_grad_is_the_combined_gradient(kind: str) -> None:
    task = Task()
    optimizer = task.optimizer(momentum=0.9)
    combined = literal.combined_gradient(task.literal_loss(), task.params, rho=RHO, alpha=ALPHA)
    optimizer.step(lambda: CLOSURES[kind](task, optimizer))
    assert_equal_to_rounding([param.grad for param in task.params if param.grad is not None], combined)


class Planted(Exception):
    """A fault that a test has planted."""


@pytest.mark.parametrize("failing_pass", [1, 2])
@pytest.mark.parametrize("had_grads", [True, False])
def test_after_a_failure_grads_are_the_very_tensors_from_before(had_grads: bool, failing_pass: int) -> None:
    task = Task()
    optimizer = task.optimizer(momentum=0.9)
    if had_grads:
        task.loss().backward()
    before = [param.grad for param in task.params]
    values = [None if grad is None else grad.clone() for grad in before]
    passes = []

    def closure() -> Tensor:
        passes.append(1)
        optimizer.zero_grad(set_to_none=False)
        loss = calls_backward_twice(task, optimizer)
        if len(passes) == failing_pass:
            raise Planted
        return loss

    with pytest.raises(Planted):
        optimizer.step(closure)
    assert len(passes) == failing_pass
    assert all(param.grad is grad for param, grad in zip(task.params, before, strict=True))
    assert_same(values, [None if param.grad is None else param.grad.clone() for param in task.params])


# ---------------------------------------------------------------------- nothing is left behind


def surroundings() -> dict[str, Any]:
    """What code after a step runs under."""
    cuda = torch.backends.cuda
    return {
        "function modes": torch.overrides._len_torch_function_stack(),
        "dispatch modes": torch.utils._python_dispatch._len_torch_dispatch_stack(),
        "grad mode": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "attention": (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()),
        "backward": (Tensor.backward, torch.autograd.backward),
    }


@over_modes
@pytest.mark.parametrize("failing_pass", [None, 1, 2])
@pytest.mark.parametrize("grad_enabled", [True, False])
def test_nothing_is_left_behind_by_a_step_that_succeeds_or_fails(
    grad_enabled: bool, failing_pass: int | None, mode: str
) -> None:
    task = Task()
    optimizer = task.optimizer(mode)
    inside: list[dict[str, Any]] = []

    def closure() -> Tensor:
        inside.append(surroundings())
        if len(inside) == failing_pass:
            raise Planted
        return calls_backward(task, optimizer)

    with torch.set_grad_enabled(grad_enabled):
        before = surroundings()
        fails = failing_pass is not None and (failing_pass == 1 or mode != "between_flatness_steps")
        with pytest.raises(Planted) if fails else warnings.catch_warnings():
            optimizer.step(closure)
        assert surroundings() == before
    assert all(state["grad mode"] for state in inside)
    assert all(state["function modes"] == before["function modes"] + 1 for state in inside)

    twin = Task().loss()
    twin.backward()  # accumulates as ever: nobody takes it over
    task.loss().backward()
    assert all(param.grad is not None for param in task.params)


@pytest.mark.parametrize("end", ["second_step", "second_step_fails", "cancel_step"])
def test_nothing_is_left_behind_by_the_two_phases_wherever_they_end(end: str) -> None:
    """The second half may run under other modes than the first."""
    task = Task()
    optimizer = task.optimizer()
    optimizer.first_step(task.loss())
    with Counting(), Counting(), bfloat16():
        before = surroundings()
        if end == "second_step":
            optimizer.second_step(task.loss())
        elif end == "cancel_step":
            optimizer.cancel_step()
        else:
            with pytest.raises(TypeError, match="second_step"):
                optimizer.second_step(None)  # type: ignore[arg-type]
        assert surroundings() == before
    with torch.no_grad():
        optimizer.step(task.loss)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


class Counting(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["returns_the_loss", "calls_backward_twice", "calls_autograd_backward"])
def test_a_function_mode_inside_the_closure_sees_its_calls_and_takes_the_same_step(kind: str) -> None:
    task, twin = Task(), Task()
    optimizer, twin_optimizer = task.optimizer(), twin.optimizer()
    mode = Counting()

    def closure() -> Tensor:
        with mode:
            return CLOSURES[kind](task, optimizer)

    optimizer.step(closure)
    twin_optimizer.step(lambda: CLOSURES[kind](twin, twin_optimizer))
    assert_equal_bits(task.params, twin.params)
    assert mode.calls.count(F.cross_entropy) == 2 * (2 if kind == "calls_backward_twice" else 1)


@pytest.mark.parametrize("kind", ["returns_the_loss", "calls_backward_twice", "calls_autograd_backward"])
def test_a_function_mode_around_the_step_does_not_change_it(kind: str) -> None:
    task, twin = Task(), Task()
    optimizer, twin_optimizer = task.optimizer(), twin.optimizer()
    with Counting() as mode:
        optimizer.step(lambda: CLOSURES[kind](task, optimizer))
    twin_optimizer.step(lambda: CLOSURES[kind](twin, twin_optimizer))
    assert_equal_bits(task.params, twin.params)
    assert F.cross_entropy in mode.calls


def test_no_grad_inside_the_closure_makes_constants_as_usual() -> None:
    task = Task()

    def loss(net: Callable[[Tensor], Tensor]) -> Tensor:
        scores = net(task.inputs)
        with torch.no_grad():
            weights = net(task.inputs).softmax(1)
        return F.cross_entropy(scores, task.labels) + (weights * scores).mean()

    expected = literal.step(literal.as_function(task.model, loss), task.params, rho=RHO, alpha=ALPHA, lr=LR)
    task.optimizer().step(lambda: loss(task.model))
    assert_equal_to_rounding(task.params, expected)


def test_a_step_under_no_grad_differentiates_all_the_same() -> None:
    task = Task()
    expected = literal.step(task.literal_loss(), task.params, rho=RHO, alpha=ALPHA, lr=LR)
    optimizer = task.optimizer()
    with torch.no_grad():
        optimizer.step(lambda: calls_backward(task, optimizer))
    assert_equal_to_rounding(task.params, expected)


# ---------------------------------------------------------------------- derivatives inside the closure


@pytest.mark.parametrize("kind", ["returned", "backward"])
def test_a_gradient_penalty_inside_the_loss_takes_the_literal_step(kind: str) -> None:
    task = Task()

    def loss(net: Callable[[Tensor], Tensor]) -> Tensor:
        inputs = task.inputs.clone().requires_grad_()
        value = F.cross_entropy(net(inputs), task.labels)
        (slope,) = torch.autograd.grad(value, [inputs], create_graph=True)
        return value + 3 * slope.square().sum()

    expected = literal.step(literal.as_function(task.model, loss), task.params, rho=RHO, alpha=ALPHA, lr=LR)
    optimizer = task.optimizer()

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(task.model)
        if kind == "backward":
            value.backward()
        return value

    optimizer.step(closure)
    assert_equal_to_rounding(task.params, expected)


def test_a_closure_may_read_gradients_without_taking_part_in_the_step() -> None:
    task = Task()
    expected = literal.step(task.literal_loss(), task.params, rho=RHO, alpha=ALPHA, lr=LR)
    seen = []

    def closure() -> Tensor:
        loss = task.loss()
        seen.append(torch.autograd.grad(loss, task.params, retain_graph=True))
        return loss

    task.optimizer().step(closure)
    assert len(seen) == 2
    assert_equal_to_rounding(task.params, expected)


# ---------------------------------------------------------------------- autocast


RHO_16 = 1.0  # far above the resolution of bfloat16


class Linear16:
    """Mean squared error of a linear model whose products are in bfloat16, by autocast or by hand."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.model = nn.Linear(6, 3)
        self.inputs, self.target = torch.randn(7, 6), torch.randn(7, 3)

    def loss(self) -> Tensor:
        return (self.model(self.inputs).float() - self.target).square().mean()

    def by_hand(self, params: list[Tensor]) -> Tensor:
        weight, bias = (param.bfloat16() for param in params)
        return (F.linear(self.inputs.bfloat16(), weight, bias).float() - self.target).square().mean()

    def expected(self) -> list[Tensor]:
        """The step by hand: explicit casts, and nothing that could be remembered between two passes."""
        twin = [param.detach().clone().requires_grad_() for param in self.model.parameters()]
        GAM(twin, rho=RHO_16, alpha=ALPHA, lr=LR).step(lambda: self.by_hand(twin))
        return literal.copies(twin)

    def output(self) -> Tensor:
        """Under autocast, with weights that cannot have been remembered."""
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False), torch.no_grad():
            return self.model(self.inputs)


def bfloat16(**kwargs: Any) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, **kwargs)


@pytest.mark.parametrize("kind", ["returned", "backward_inside", "backward_outside"])
def test_autocast_inside_the_closure_takes_the_step_of_explicit_casts(kind: str) -> None:
    task = Linear16()
    expected = task.expected()

    def closure() -> Tensor:
        with bfloat16():
            loss = task.loss()
            if kind == "backward_inside":
                loss.backward()
        if kind == "backward_outside":
            loss.backward()
        return loss

    GAM(task.model.parameters(), rho=RHO_16, alpha=ALPHA, lr=LR).step(closure)
    assert_equal_bits(task.model.parameters(), expected)


@pytest.mark.parametrize("kind", ["returned", "backward"])
def test_autocast_around_the_step_sees_the_moved_weights_in_the_second_pass(kind: str) -> None:
    task = Linear16()
    expected = task.expected()
    optimizer = GAM(task.model.parameters(), rho=RHO_16, alpha=ALPHA, lr=LR)

    def closure() -> Tensor:
        loss = task.loss()
        if kind == "backward":
            loss.backward()
        return loss

    with bfloat16():
        optimizer.step(closure)
    assert_equal_bits(task.model.parameters(), expected)


def test_autocast_around_finite_differences_sees_the_moved_weights_in_every_pass() -> None:
    task, twin = Linear16(), Linear16()
    kwargs: dict[str, Any] = {"rho": RHO_16, "alpha": ALPHA, "lr": LR, "hvp": "finite_difference", "fd_epsilon": 1.0}
    optimizer, twin_optimizer = (GAM(t.model.parameters(), **kwargs) for t in (task, twin))
    with bfloat16():
        optimizer.step(task.loss)
    twin_optimizer.step(lambda: twin.by_hand(list(twin.model.parameters())))
    assert_equal_bits(task.model.parameters(), twin.model.parameters())


@over_modes
def test_autocast_around_several_steps_sees_the_weights_after_each(mode: str) -> None:
    task = Linear16()
    optimizer = GAM(task.model.parameters(), rho=RHO_16, alpha=ALPHA, lr=LR, **MODES[mode])
    with bfloat16():
        for _ in range(3):
            optimizer.step(task.loss)
            assert_equal_bits([task.model(task.inputs)], [task.output()])


@pytest.mark.parametrize("failing_pass", [1, 2])
def test_autocast_around_a_step_that_fails_sees_the_weights_from_before(failing_pass: int) -> None:
    task = Linear16()
    optimizer = GAM(task.model.parameters(), rho=RHO_16, alpha=ALPHA, lr=LR)
    passes = []

    def closure() -> Tensor:
        loss = task.loss()
        passes.append(1)
        if len(passes) == failing_pass:
            raise Planted
        return loss

    before = task.output()
    with bfloat16():
        with pytest.raises(Planted):
            optimizer.step(closure)
        assert_equal_bits([task.model(task.inputs)], [before])


def test_autocast_around_both_phases_sees_the_moved_weights_in_the_second() -> None:
    task = Linear16()
    expected = task.expected()
    optimizer = GAM(task.model.parameters(), rho=RHO_16, alpha=ALPHA, lr=LR)
    with bfloat16():
        optimizer.first_step(task.loss())
        optimizer.second_step(task.loss())
        assert_equal_bits([task.model(task.inputs)], [task.output()])
    assert_equal_bits(task.model.parameters(), expected)


def test_autocast_around_a_cancelled_step_sees_the_weights_from_before() -> None:
    task = Linear16()
    optimizer = GAM(task.model.parameters(), rho=RHO_16, alpha=ALPHA, lr=LR)
    before = task.output()
    with bfloat16():
        optimizer.first_step(task.loss())
        assert not torch.equal(task.model(task.inputs), before)
        optimizer.cancel_step()
        assert_equal_bits([task.model(task.inputs)], [before])


# ---------------------------------------------------------------------- what a step returns and what it frees


@over_modes
@pytest.mark.parametrize("kind", CLOSURES)
def test_the_returned_loss_is_the_one_at_theta_detached(kind: str, mode: str) -> None:
    task = Task()
    optimizer = task.optimizer(mode)
    values: list[Tensor] = []

    def closure() -> Tensor:
        loss = CLOSURES[kind](task, optimizer)
        values.append(loss.detach().clone())
        return loss

    loss = optimizer.step(closure)
    assert not loss.requires_grad
    assert loss.grad_fn is None
    assert_equal_bits([loss, optimizer.metrics["loss"]], values[:1] * 2)
    assert all(not torch.equal(loss, value) for value in values[1:])


class Token:
    """Something that lives as long as the graph that holds it."""


def watched(hidden: Tensor) -> list[weakref.ref[Any]]:
    """The tensor, and its place in the graph."""
    token = Token()
    assert hidden.grad_fn is not None
    hidden.grad_fn.metadata["token"] = token
    return [weakref.ref(hidden), weakref.ref(token)]


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@over_modes
@pytest.mark.parametrize("outcome", ["step", "skip"])
@pytest.mark.parametrize("backward_calls", [0, 1, 2])
def test_no_graph_is_kept_alive_after_a_step(backward_calls: int, outcome: str, mode: str) -> None:
    task = Task()
    optimizer = task.optimizer(mode)
    first, _, last = task.model
    graph: list[weakref.ref[Any]] = []

    def forward(start: int, stop: int) -> Tensor:
        hidden = first(task.inputs[start:stop]).tanh()
        graph.extend(watched(hidden))
        loss = F.cross_entropy(last(hidden), task.labels[start:stop], reduction="sum")
        return loss * float("nan") if outcome == "skip" else loss

    def closure() -> Tensor:
        if not backward_calls:
            return forward(0, BATCH)
        total = torch.zeros((), dtype=torch.float64)
        for i in range(backward_calls):
            loss = forward(i * BATCH // backward_calls, (i + 1) * BATCH // backward_calls)
            loss.backward()
            total += loss.detach()
        return total

    with without_garbage_collection():
        loss = optimizer.step(closure)
        assert len(graph) > 0
        assert [ref() for ref in graph] == [None] * len(graph)
    assert int(optimizer.metrics["skipped_steps"]) == (outcome == "skip")
    assert bool(loss.isfinite()) == (outcome == "step")


def test_no_graph_is_kept_alive_after_both_phases() -> None:
    task = Task()
    optimizer = task.optimizer()
    graph: list[list[weakref.ref[Any]]] = []

    def forward() -> Tensor:
        hidden = task.model[0](task.inputs).tanh()
        graph.append(watched(hidden))
        return F.cross_entropy(task.model[2](hidden), task.labels)

    with without_garbage_collection():
        optimizer.first_step(forward())
        assert [ref() for ref in graph[0]] == [None, None]
        optimizer.second_step(forward())
        assert [ref() for ref in graph[1]] == [None, None]


def test_a_step_on_a_loss_that_the_caller_keeps_frees_what_its_graph_saved() -> None:
    task = Task()
    kept: list[Tensor] = []

    def closure() -> Tensor:
        kept.append(task.loss())
        return kept[-1]

    task.optimizer().step(closure)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        kept[0].backward()
