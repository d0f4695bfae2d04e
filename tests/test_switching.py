"""``hvp="auto"``: exact while that goes, then as ``hvp="finite_difference"`` to the bit, with one warning."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gam_fused import GAM
from gam_fused.derivatives import NoSecondDerivative
from tests.interruptions import assert_nothing_left_on, interrupted_at
from tests.states import assert_same, snapshot

Operator = Callable[[Tensor], Tensor]


class OnceCube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return tensor**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 3 * grad * ctx.saved_tensors[0] ** 2


def distances(hidden: Tensor) -> Tensor:
    return torch.cdist(hidden, hidden.new_ones(3, hidden.shape[1]).cumsum(0))


OPERATORS: dict[str, Operator] = {"cdist": distances, "OnceCube": OnceCube.apply}
"""Found when the gradient is differentiated; found when the loss is."""
over_operators = pytest.mark.parametrize("name", OPERATORS)


class Task:
    """A network with BatchNorm and dropout on one batch; what follows it is differentiable once or, if None, twice."""

    def __init__(self, operator: str | None, hvp: str = "auto", **options: Any) -> None:
        torch.manual_seed(7)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 3))
        self.model.double()
        self.inputs = torch.randn(9, 4, dtype=torch.float64)
        self.operator, self.passes, self.generator = operator, 0, torch.Generator().manual_seed(3)
        options = {"momentum": 0.9, "model": self.model, **options}
        self.optimizer = GAM(self.model.parameters(), rho=0.05, alpha=0.3, lr=0.05, hvp=hvp, **options)

    def loss(self) -> Tensor:
        self.passes += 1
        noise = torch.randn(self.inputs.shape, generator=self.generator, dtype=torch.float64)
        hidden = self.model(self.inputs + 0.1 * noise)
        return (hidden if self.operator is None else OPERATORS[self.operator](hidden)).square().mean()

    def calls_backward(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    def step(self) -> int:
        """And how many times the closure has run."""
        before = self.passes
        self.optimizer.step(self.loss)
        return self.passes - before

    def state(self) -> Any:
        """Everything, and the generator."""
        return snapshot(self.model, self.optimizer), self.generator.get_state(), dict(self.optimizer.metrics)


def switches(name: str) -> Any:
    return pytest.warns(UserWarning, match=rf"^{name} has no second derivative \(.*hvp='auto' takes finite differences")


@over_operators
@pytest.mark.parametrize(
    "options", [{}, {"model": None}, {"second_order": "auto"}, {"rounding": "stochastic"}], ids=str
)
def test_steps_are_those_by_finite_differences_to_the_bit(name: str, options: dict[str, Any]) -> None:
    task, twin = Task(name, **options), Task(name, hvp="finite_difference", **options)
    passes = []
    for each in (task, twin):
        torch.manual_seed(1)
        with switches(name) if each is task else nullcontext():
            passes.append([each.step()])
        passes[-1] += [each.step() for _ in range(2)]  # a warning would be an error
    assert_same(task.state(), twin.state())
    assert passes[1] == [4, 4, 4]
    assert passes[0] == [5, 4, 4]


@over_operators
def test_an_ordinary_closure_switches_as_well(name: str) -> None:
    task, twin = Task(name), Task(name, hvp="finite_difference")
    for each in (task, twin):
        torch.manual_seed(1)
        with switches(name) if each is task else nullcontext():
            each.optimizer.step(each.calls_backward)
        each.optimizer.step(each.calls_backward)
    assert_same(task.state(), twin.state())


@over_operators
def test_steps_are_exact_until_the_operator_is_met(name: str) -> None:
    task, exact = Task(None), Task(None, hvp="exact")
    for each in (task, exact):
        torch.manual_seed(1)
        assert [each.step() for _ in range(3)] == [2, 2, 2]
    assert_same(task.state(), exact.state())
    assert task.optimizer.hvp_in_use == "exact"

    twin = copy.deepcopy(task)
    twin.optimizer.hvp = "finite_difference"
    random_state = torch.get_rng_state()
    for each in (task, twin):
        each.operator = name
        torch.set_rng_state(random_state)
        with switches(name) if each is task else nullcontext():
            each.step()
        each.operator = None
        each.step()  # by differences from now on, whatever the loss
    assert_same(task.state(), twin.state())
    assert task.optimizer.hvp_in_use == "finite_difference"


@over_operators
def test_an_operator_that_appears_at_the_adversarial_point_alone_is_enough(name: str) -> None:
    task, twin = Task(None), Task(None, hvp="finite_difference")

    def closure(each: Task, changed: int) -> Tensor:
        each.operator = name if each.passes + 1 in (changed, changed + 1) else None
        return each.loss()

    torch.manual_seed(1)
    with switches(name):  # 1, 2: the exact attempt; 3, 4: at θ; 5, 6: at θ_adv
        task.optimizer.step(lambda: closure(task, 5 if task.passes >= 2 else 2))
    torch.manual_seed(1)
    twin.optimizer.step(lambda: closure(twin, 3))
    assert_same(task.state(), twin.state())


def test_the_warning_points_at_the_step() -> None:
    task = Task("cdist")
    with switches("cdist") as caught:
        task.optimizer.step(task.loss)
    (warning,) = caught
    assert Path(warning.filename) == Path(__file__)


def test_steps_between_flatness_terms_meet_nothing() -> None:
    task = Task(None, interval=2)
    task.step()
    task.operator = "OnceCube"
    assert task.step() == 1
    with switches("OnceCube"):
        task.step()


def test_what_is_in_use_can_be_seen() -> None:
    for hvp in ("exact", "finite_difference"):
        optimizer = Task(None, hvp=hvp).optimizer
        assert (optimizer.hvp_in_use, optimizer.switched_by) == (hvp, None)
        assert f"hvp {hvp}\n" in repr(optimizer) or f"hvp {hvp} " in repr(optimizer)
    task = Task("cdist")
    assert (task.optimizer.hvp_in_use, task.optimizer.switched_by) == ("exact", None)
    assert "hvp auto (exact)" in repr(task.optimizer)
    with switches("cdist"):
        task.step()
    assert task.optimizer.hvp == "auto"
    assert (task.optimizer.hvp_in_use, task.optimizer.switched_by) == ("finite_difference", "cdist")
    assert "hvp auto (finite_difference)" in repr(task.optimizer)


# ---------------------------------------------------------------- checkpoints


def saved(task: Task) -> dict[str, Any]:
    """As a checkpoint on disk gives it back."""
    file = io.BytesIO()
    torch.save({"model": task.model.state_dict(), "optimizer": task.optimizer.state_dict()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@over_operators
def test_a_resumed_run_goes_on_by_differences_without_another_warning(name: str) -> None:
    task = Task(name)
    with switches(name):
        task.step()
    resumed = Task(name)
    checkpoint = saved(task)
    resumed.model.load_state_dict(checkpoint["model"])
    resumed.optimizer.load_state_dict(checkpoint["optimizer"])
    resumed.generator.set_state(task.generator.get_state())
    for each in (task, resumed):
        torch.manual_seed(1)
        assert each.step() == 4
    assert_same(task.state(), resumed.state())
    assert resumed.optimizer.switched_by == name


def test_a_checkpoint_from_before_the_switch_undoes_it() -> None:
    task = Task(None)
    task.step()
    checkpoint = saved(task)
    task.operator = "cdist"
    with switches("cdist"):
        task.step()
    task.optimizer.load_state_dict(checkpoint["optimizer"])
    assert (task.optimizer.hvp_in_use, task.optimizer.switched_by) == ("exact", None)


@pytest.mark.parametrize("kind", ["older", "plain"])
def test_checkpoints_that_know_nothing_of_it_begin_with_exact_products(kind: str) -> None:
    task = Task("cdist")
    with switches("cdist"):
        task.step()
    state = copy.deepcopy(task.optimizer.state_dict())
    if kind == "older":
        del state["gam_fused"]["switched_by"]
    else:
        state = copy.deepcopy(task.optimizer.base_optimizer.state_dict())
    task.optimizer.load_state_dict(state)
    assert (task.optimizer.hvp_in_use, task.optimizer.switched_by) == ("exact", None)


@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
def test_who_asked_for_one_mode_keeps_it_whatever_the_checkpoint_says(hvp: str) -> None:
    task, other = Task("cdist"), Task(None, hvp=hvp)
    with switches("cdist"):
        task.step()
    other.optimizer.load_state_dict(task.optimizer.state_dict())
    assert (other.optimizer.hvp_in_use, other.optimizer.switched_by) == (hvp, None)
    assert other.step() == {"exact": 2, "finite_difference": 4}[hvp]


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda task: pickle.loads(pickle.dumps(task))], ids=["copy", "pickle"]
)
def test_a_copy_knows_of_the_switch(duplicate: Callable[[GAM], GAM]) -> None:
    task = Task("cdist")
    with switches("cdist"):
        task.step()
    other = duplicate(task.optimizer)
    assert (other.hvp_in_use, other.switched_by) == ("finite_difference", "cdist")


# ---------------------------------------------------------------- guarantees


@over_operators
@pytest.mark.parametrize("failing", range(5))
def test_a_closure_that_raises_in_any_pass_changes_nothing(name: str, failing: int) -> None:
    task = Task(None)
    task.step()
    task.operator, first = name, task.passes
    before = task.state()

    def closure() -> Tensor:
        loss = task.loss()
        if task.passes - first == failing + 1:
            raise ZeroDivisionError
        return loss

    with pytest.raises(ZeroDivisionError), switches(name) if failing else nullcontext():
        task.optimizer.step(closure)
    assert_same(before, task.state())
    assert task.optimizer.hvp_in_use == ("finite_difference" if failing else "exact")

    twin = Task(None)
    twin.step()
    twin.operator, twin.optimizer.hvp = name, "finite_difference"
    for each in (task, twin):
        torch.manual_seed(1)
        with switches(name) if each is task and not failing else nullcontext():
            each.step()
    assert_same(task.state(), twin.state())


@over_operators
def test_a_warning_that_is_an_error_changes_nothing(name: str) -> None:
    task = Task(name)
    before = task.state()
    for _ in range(2):
        with pytest.raises(UserWarning, match="has no second derivative"):
            task.step()
        assert_same(before, task.state())
        assert task.optimizer.hvp_in_use == "exact"


def test_a_step_that_is_skipped_after_the_switch_changes_nothing() -> None:
    task = Task("cdist")
    before = task.state()
    with switches("cdist"):
        task.optimizer.step(lambda: task.loss() * float("nan"))
    after = task.state()
    for what in ("params", "buffers", "state", "random"):
        assert_same(before[0][what], after[0][what], what)
    assert int(task.optimizer.metrics["skipped_steps"]) == 1
    assert task.step() == 4


def test_other_errors_do_not_switch() -> None:
    task = Task(None)

    def closure() -> Tensor:
        raise RuntimeError("the derivative for 'dinner' is not implemented")

    with pytest.raises(RuntimeError, match="dinner"):
        task.optimizer.step(closure)
    assert task.optimizer.hvp_in_use == "exact"


@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
def test_who_did_not_ask_for_it_is_not_switched(hvp: str) -> None:
    task = Task("cdist", hvp=hvp)
    if hvp == "exact":
        with pytest.raises(NoSecondDerivative, match="hvp='auto', which turns"):
            task.step()
    else:
        task.step()
    assert (task.optimizer.hvp_in_use, task.optimizer.switched_by) == (hvp, None)


def test_first_step_needs_exact_products() -> None:
    task = Task(None)
    with pytest.raises(RuntimeError, match=r"first_step\(\) needs hvp='exact'.* got hvp='auto'.* use step\(closure\)"):
        task.optimizer.first_step(task.loss())


@over_operators
def test_the_exact_attempt_is_freed_before_the_second(name: str) -> None:
    class Mark:
        """Lives as long as the graph."""

    task, marks = Task(name), []

    def closure() -> Tensor:
        alive.append([mark() is not None for mark in marks])
        output = OPERATORS[name](task.model[0](task.inputs))
        mark = Mark()
        output.grad_fn.metadata["mark"] = mark  # type: ignore[union-attr]
        marks.append(weakref.ref(mark))
        return output.square().mean()

    alive: list[list[bool]] = []
    gc.collect()
    gc.disable()
    try:
        with switches(name):
            task.optimizer.step(closure)
    finally:
        gc.enable()
    assert alive[1] == [False]


@pytest.mark.usefixtures("ctrl_c_raises")
def test_ctrl_c_while_it_switches_leaves_the_step_undone() -> None:
    """At every line from the one that raises to the second attempt."""
    task = Task("OnceCube")
    untouched, random_state, before = copy.deepcopy(task), torch.get_rng_state(), task.state()

    def step(each: Task) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            each.step()

    lines = interrupted_at(None, lambda: step(task))
    files = [file for file, _ in lines]
    end = len(files) - files[::-1].index("/switching.py")
    start = max(turn for turn in range(end) if files[turn] == "/derivatives.py")
    for turn in {lines[turn]: turn for turn in reversed(range(start, end))}.values():
        each = copy.deepcopy(untouched)
        torch.set_rng_state(random_state)
        interrupted_at(turn, lambda each=each: step(each))  # type: ignore[misc]
        assert_nothing_left_on(f"{lines[turn]}, turn {turn}")
        assert_same(before, each.state(), f"turn {turn}: {lines[turn]}")
