"""What a step guarantees holds for a compiled one: all or nothing, nothing non-finite, one function in both passes."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from gam_fused import GAM, AcceleratedGAM, joint_graph
from gam_fused.replay import Replay
from gam_fused.transaction import Transaction
from tests.compiled.common import SETTINGS, Task, compiled, mlp
from tests.interruptions import assert_nothing_left_on, interrupted_at
from tests.states import assert_same, snapshot

inductor = pytest.param(
    "inductor",
    marks=[
        pytest.mark.slow,
        pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # of what it imports
    ],
)


class Planted(Exception):
    """A fault that a test has planted."""


class Faulty:
    """A back end whose graphs fail, or return what a test makes of their results, in one of their runs."""

    def __init__(self, at: int, action: Callable[[list[Tensor]], list[Tensor]]) -> None:
        self.at = at
        self.action = action
        self.runs = 0

    def __call__(self, graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        def run(*values: Any) -> list[Tensor]:
            self.runs += 1
            results = list(graph.forward(*values))
            return self.action(results) if self.runs == self.at else results

        return run


def interrupt(results: list[Tensor]) -> list[Tensor]:
    raise KeyboardInterrupt


def fail(results: list[Tensor]) -> list[Tensor]:
    raise Planted


class WritingBuffers(nn.Module):
    """In the ways that there are: in place, through ``.data``, with ``out=``, and by binding a new tensor."""

    def __init__(self, *, binds: bool) -> None:
        super().__init__()
        self.binds = binds
        self.register_buffer("in_place", torch.zeros(10))
        self.register_buffer("through_data", torch.zeros((), dtype=torch.long))
        self.register_buffer("out", torch.ones(10))
        self.register_buffer("bound", torch.zeros(10))
        self.register_buffer("read", torch.ones(10))

    def forward(self, inputs: Tensor) -> Tensor:
        mean = inputs.detach().mean(0)
        self.in_place.mul_(0.9).add_(mean)
        self.through_data.data.add_(1)
        self.out = torch.add(self.out, mean, out=self.out)
        if self.binds:
            self.bound = 0.9 * self.bound + mean
        return inputs * self.read + self.in_place + self.through_data + self.out + self.bound


# The passes of a step.
RUNS = [
    pytest.param(GAM, SETTINGS, 1, id="at θ"),
    pytest.param(GAM, SETTINGS, 2, id="at θ_adv"),
    pytest.param(AcceleratedGAM, {"lr": 0.1, "momentum": 0.9}, 2, id="accelerated, ahead of θ"),
    pytest.param(AcceleratedGAM, {"lr": 0.1, "momentum": 0.9}, 4, id="accelerated, ahead of θ_adv"),
]


@pytest.mark.parametrize(("kind", "settings", "at"), RUNS)
@pytest.mark.parametrize("action", [fail, interrupt])
@pytest.mark.parametrize("with_model", [False, True])
def test_a_run_that_raises_leaves_everything_as_it_was(
    kind: Any, settings: Any, at: int, with_model: bool, action: Any
) -> None:
    task = mlp(nn.BatchNorm1d(10), nn.Dropout(0.3), WritingBuffers(binds=with_model))
    optimizer = kind(task.model.parameters(), model=task.model if with_model else None, **settings)
    for batch in task.batches[:2]:
        optimizer.step(lambda batch=batch: task.loss(*batch))
    before = snapshot(task.model, optimizer)
    step = compiled(optimizer, task.loss, Faulty(at, action))
    with pytest.raises((Planted, KeyboardInterrupt)):
        step(*task.batches[0])
    assert_same(before, snapshot(task.model, optimizer))
    step(*task.batches[0])  # and the next one is made
    assert optimizer.steps == 3


@pytest.mark.parametrize(("fault", "reaches"), [(Planted, RuntimeError), (KeyboardInterrupt, KeyboardInterrupt)])
def test_a_failed_compilation_leaves_everything_as_it_was(
    fault: type[BaseException], reaches: type[BaseException]
) -> None:
    faults = [fault]

    def compiler(graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        if faults:
            raise faults.pop()
        return graph.forward

    task = mlp(nn.BatchNorm1d(10), nn.Dropout(0.3), WritingBuffers(binds=True))
    optimizer = GAM(task.model.parameters(), model=task.model, **SETTINGS)
    before = snapshot(task.model, optimizer)
    step = compiled(optimizer, task.loss, compiler)
    with pytest.raises(reaches, match="Planted" if fault is Planted else None):
        step(*task.batches[0])
    assert_same(before, snapshot(task.model, optimizer))
    assert optimizer.steps == step.graphs == 0
    step(*task.batches[0])  # and the next one is made
    assert optimizer.steps == step.graphs == 1


@pytest.mark.parametrize(("kind", "settings", "at"), RUNS)
@pytest.mark.parametrize("which", [0, 1, -1], ids=["loss", "first derivative", "last derivative"])
def test_nothing_that_is_not_finite_reaches_the_weights(kind: Any, settings: Any, at: int, which: int) -> None:
    task = mlp(nn.BatchNorm1d(10), nn.Dropout(0.3))
    optimizer = kind(task.model.parameters(), **settings)

    def spoil(results: list[Tensor]) -> list[Tensor]:
        results[which] = results[which] / 0
        return results

    optimizer.step(lambda: task.loss(*task.batches[0]))
    before = snapshot(task.model, optimizer)
    compiled(optimizer, task.loss, Faulty(at, spoil))(*task.batches[0])
    after = snapshot(task.model, optimizer)
    assert int(optimizer.metrics["skipped_steps"]) == 1
    assert_same(before, after)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_buffers_that_a_graph_writes_advance_once_per_step(backend: str) -> None:
    task = mlp(WritingBuffers(binds=False), nn.BatchNorm1d(10))
    forward = copy.deepcopy(task.model)
    step = compiled(GAM(task.model.parameters(), lr=0.0, rho=0.3), task.loss, backend)
    for inputs, labels in task.batches:
        forward(inputs)
        step(inputs, labels)
    for name, buffer in forward.named_buffers():
        torch.testing.assert_close(task.model.get_buffer(name), buffer, rtol=1e-12, atol=1e-12, msg=name)


def test_buffers_that_are_bound_anew_advance_once_per_step_with_model() -> None:
    task = mlp(WritingBuffers(binds=True))
    forward = copy.deepcopy(task.model)
    step = compiled(GAM(task.model.parameters(), lr=0.0, rho=0.3, model=task.model), task.loss)
    for inputs, labels in task.batches:
        forward(inputs)
        step(inputs, labels)
    for name, buffer in forward.named_buffers():
        torch.testing.assert_close(task.model.get_buffer(name), buffer, rtol=1e-12, atol=1e-12, msg=name)


class Growing(nn.Module):
    """Another function in each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.later = nn.Linear(6, 3), nn.Linear(6, 3)
        self.passes = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.passes += 1
        return self.always(inputs) + (self.later(inputs) if self.passes > 1 else 0)


def test_a_parameter_that_only_the_adversarial_point_knows_is_an_error() -> None:
    """Without a graph it is left out of the second derivative, too; in a graph it cannot be."""
    task = Task(Growing(), torch.randn(21, 6))
    optimizer = GAM(task.model.parameters(), **SETTINGS)
    before = snapshot(task.model, optimizer)
    with pytest.raises(RuntimeError, match=r"parameter 2 at the adversarial point and did not at θ.*step\(closure\)"):
        compiled(optimizer, task.loss)(*task.batches[0])
    assert_same(before, snapshot(task.model, optimizer))


def test_batches_are_not_written() -> None:
    task = mlp()
    inputs, labels = task.batches[0]
    versions = inputs._version, labels._version
    step = compiled(GAM(task.model.parameters(), **SETTINGS), task.loss, "aot_eager")
    step(inputs, labels)
    assert (inputs._version, labels._version) == versions
    with torch.inference_mode():
        unwritable = inputs.clone()
    step(unwritable, labels)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.complex64, torch.uint8, torch.bool])
def test_batches_may_have_any_dtype(dtype: torch.dtype) -> None:
    task = mlp()
    optimizer = GAM(task.model.parameters(), **SETTINGS)
    step = compiled(optimizer, lambda x, y, more: task.loss(x, y) + more.to(torch.complex128).real.sum(), "aot_eager")
    without = task.loss(*task.batches[0]).item()
    ones = torch.ones(4).to(dtype)
    assert float(step(*task.batches[0], ones)) == pytest.approx(without + 4)
    if dtype.is_complex:
        step(*task.batches[0], ones.conj())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", [GAM, AcceleratedGAM])
def test_gradients_that_are_one_tensor_in_the_graph_are_the_base_optimizers_to_write(kind: Any, backend: str) -> None:
    """In steps that differentiate once, too: d/da = d/db = 1, in one number's memory."""
    one, other = (nn.Parameter(torch.zeros(5)) for _ in range(2))
    optimizer = kind([one, other], lr=1.0, interval=2)

    def halve_the_first(base: torch.optim.Optimizer, *_: Any) -> None:
        assert one.grad is not None
        one.grad.mul_(0.5)

    optimizer.base_optimizer.register_step_pre_hook(halve_the_first)
    step = compiled(optimizer, lambda: (one + other).sum(), backend)
    for number in (1, 2):
        step()
        assert torch.equal(other, torch.full((5,), -float(number)))
        assert torch.equal(one, other / 2)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", inductor])
@pytest.mark.parametrize("ascent", ["exact", "finite_difference"])
def test_both_passes_see_one_dropout_mask_and_the_next_step_another(ascent: str, backend: str) -> None:
    """Also where the first pass runs a graph without the second derivative, and the second one with it."""
    task = mlp(nn.Dropout(0.5))
    optimizer = GAM(task.model.parameters(), lr=0.0, rho=1e-7, ascent=ascent)
    options = {"options": {"compile_threads": 1}} if backend == "inductor" else {}
    step = compiled(optimizer, task.loss, backend, **options)
    norms = []
    for _ in range(2):
        step(*task.batches[0])
        at_theta, at_adversarial = (float(optimizer.metrics[name]) for name in ("grad_norm", "adversarial_grad_norm"))
        assert at_adversarial == pytest.approx(at_theta, rel=1e-5)
        norms.append(at_theta)
    assert norms[0] != pytest.approx(norms[1], rel=1e-3)


def test_a_compiled_step_that_is_dropped_frees_the_model() -> None:
    task = mlp()
    step = compiled(GAM(task.model.parameters(), **SETTINGS), task.loss)
    step(*task.batches[0])
    model = weakref.ref(task.model)
    del task, step
    gc.collect()
    assert model() is None


def test_nothing_of_a_step_outlives_it() -> None:
    task = mlp(nn.BatchNorm1d(10))
    optimizer = GAM(task.model.parameters(), interval=2, **SETTINGS)
    step = compiled(optimizer, task.loss)

    def alive() -> list[object]:
        gc.collect()
        return [kept for kept in gc.get_objects() if type(kept) in (joint_graph.Results, Transaction, Replay)]

    of_others = alive()  # a failure that some other test has caught, say
    for _ in range(2):
        step(*task.batches[0])
        assert len(alive()) <= len(of_others)


def test_hooks_and_schedulers_see_one_step() -> None:
    task = mlp()
    optimizer = GAM(task.model.parameters(), **SETTINGS)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    step = compiled(optimizer, task.loss)
    step(*task.batches[0])
    scheduler.step()  # warns unless it has seen the step
    assert calls == ["before", "after"]
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_the_closure_of_a_compiled_step_is_a_plain_one_to_others() -> None:
    task = mlp()
    optimizer = GAM(task.model.parameters(), **SETTINGS)
    seen: list[Tensor] = []

    def pre_hook(_: Any, arguments: tuple[Any, ...], __: Any) -> None:
        seen.append(arguments[1]())

    optimizer.register_step_pre_hook(pre_hook)
    loss = compiled(optimizer, task.loss)(*task.batches[0])
    assert torch.equal(seen[0], loss)


@pytest.mark.slow
@pytest.mark.usefixtures("ctrl_c_raises")
def test_ctrl_c_at_any_line_of_a_graphs_runs_leaves_the_step_undone() -> None:
    """A real SIGINT at every line of what runs graphs and keeps buffers, at its first and its last turn."""
    task = mlp(nn.BatchNorm1d(10), nn.Dropout(0.3))
    optimizer = GAM(task.model.parameters(), backend="foreach", **SETTINGS)
    step = compiled(optimizer, task.loss)
    step(*task.batches[0])
    before = snapshot(task.model, optimizer)
    saved = copy.deepcopy((task.model.state_dict(), optimizer.state_dict(), torch.get_rng_state()))

    def go_back() -> None:
        weights, state, random_state = copy.deepcopy(saved)
        task.model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        torch.set_rng_state(random_state)

    turns: dict[tuple[str, int], list[int]] = {}
    for turn, line in enumerate(interrupted_at(None, lambda: step(*task.batches[0]))):
        if line[0].endswith(("compiled.py", "joint_graph.py", "replay.py")):
            turns.setdefault(line, []).append(turn)
    assert {Path(file).name for file, _ in turns} == {"compiled.py", "joint_graph.py", "replay.py"}
    after = snapshot(task.model, optimizer)
    for line, at in turns.items():
        for turn in {at[0], at[-1]}:
            go_back()
            interrupted_at(turn, lambda: step(*task.batches[0]))
            assert_nothing_left_on(f"{line}, turn {turn}")
            now, expected = snapshot(task.model, optimizer), after if optimizer.steps == 2 else before
            for part in ("params", "buffers", "state", "random"):
                assert_same(expected[part], now[part], f"{line}, turn {turn}: {part}")


@pytest.mark.usefixtures("ctrl_c_raises")
def test_ctrl_c_in_a_graphs_first_run_leaves_the_step_undone() -> None:
    """When nobody knows yet which buffers it writes."""
    start = Task(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)), torch.randn(8, 6))

    def first_step(task: Task, optimizer: GAM) -> Callable[[], Tensor]:
        step = compiled(optimizer, task.loss)
        return lambda: step(*task.batches[0])

    def anew() -> tuple[Task, GAM]:
        task = copy.deepcopy(start)
        return task, GAM(task.model.parameters(), **SETTINGS)

    lines = interrupted_at(None, first_step(*anew()))
    first_run = {line for *_, line in joint_graph._JointGraph._run_first.__code__.co_lines()}
    turns = [turn for turn, (file, line) in enumerate(lines) if file.endswith("joint_graph.py") and line in first_run]
    assert len(turns) > 20
    for turn in turns[len(turns) // 2 :]:  # the graph has run by then
        task, optimizer = anew()
        before = snapshot(task.model, optimizer)
        interrupted_at(turn, first_step(task, optimizer))
        assert_nothing_left_on(f"{lines[turn]}, turn {turn}")
        assert optimizer.steps == 0
        assert_same(before, snapshot(task.model, optimizer), f"{lines[turn]}, turn {turn}")
