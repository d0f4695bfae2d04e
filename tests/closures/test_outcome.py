"""What a step returns and what it frees."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.closures.common import (
    BATCH,
    CLOSURES,
    Task,
    over_modes,
)
from tests.literal import assert_equal_bits


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
