"""What a step guarantees holds for a compiled one: all or nothing, nothing non-finite, one function in both passes."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from gam_fused import GAM
from tests.compiled.common import SETTINGS, compiled, mlp
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


def no_compiler(graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
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


@pytest.mark.parametrize("at", [1, 2], ids=["at θ", "at θ_adv"])
@pytest.mark.parametrize("action", [fail, interrupt])
def test_a_run_that_raises_leaves_everything_as_it_was(at: int, action: Any) -> None:
    task = mlp(nn.BatchNorm1d(10), nn.Dropout(0.3), WritingBuffers(binds=True))
    optimizer = GAM(task.model.parameters(), model=task.model, **SETTINGS)
    for batch in task.batches[:2]:
        optimizer.step(lambda batch=batch: task.loss(*batch))
    before = snapshot(task.model, optimizer)
    step = compiled(optimizer, task.loss, Faulty(at, action))
    with pytest.raises((Planted, KeyboardInterrupt)):
        step(*task.batches[0])
    assert_same(before, snapshot(task.model, optimizer))
    step(*task.batches[0])  # and the next one is made
    assert optimizer.steps == 3


def test_a_failed_compilation_leaves_everything_as_it_was() -> None:
    task = mlp(nn.BatchNorm1d(10), nn.Dropout(0.3), WritingBuffers(binds=True))
    optimizer = GAM(task.model.parameters(), model=task.model, **SETTINGS)
    before = snapshot(task.model, optimizer)
    with pytest.raises(RuntimeError, match="Planted"):
        compiled(optimizer, task.loss, no_compiler)(*task.batches[0])
    assert_same(before, snapshot(task.model, optimizer))
    assert optimizer.steps == 0


@pytest.mark.parametrize("at", [1, 2], ids=["at θ", "at θ_adv"])
@pytest.mark.parametrize("which", [0, 1, -1], ids=["loss", "gradient", "hvp"])
def test_nothing_that_is_not_finite_reaches_the_weights(at: int, which: int) -> None:
    task = mlp(nn.BatchNorm1d(10), nn.Dropout(0.3))
    optimizer = GAM(task.model.parameters(), **SETTINGS)

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
