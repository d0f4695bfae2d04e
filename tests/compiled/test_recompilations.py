"""What makes a graph anew is told, and one compiled step does not weigh on another."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from gam_fused import GAM
from tests.compiled.common import SETTINGS, compiled, mlp


def test_one_graph_does_where_sizes_are_known_to_vary() -> None:
    task = mlp(nn.BatchNorm1d(10))
    step = compiled(GAM(task.model.parameters(), **SETTINGS), task.loss, "aot_eager", dynamic=True)
    for batch in task.batches:
        step(*batch)
    assert (step.graphs, step.recompilations) == (1, [])


def test_every_recompilation_from_the_third_on_is_a_warning_that_names_the_cause() -> None:
    task = mlp()
    step = compiled(GAM(task.model.parameters(), **SETTINGS), task.loss, dynamic=False)
    inputs, labels = task.batches[0]
    for size in (8, 7, 6):
        step(inputs[:size], labels[:size])
    with pytest.warns(UserWarning, match=r"for the 3\. time.* size mismatch at index 0.* dynamic=True") as caught:
        step(inputs[:5], labels[:5])
    assert caught[0].filename == __file__
    assert len(step.recompilations) == 3
    assert "3 recompilations" not in repr(step)
    assert "4 graphs" in repr(step)


def test_the_limit_of_recompilations_is_an_error_and_not_a_step_without_a_graph() -> None:
    task = mlp()
    optimizer = GAM(task.model.parameters(), **SETTINGS)
    step = compiled(optimizer, task.loss, dynamic=False)
    inputs, labels = task.batches[0]
    with torch._dynamo.config.patch(recompile_limit=2):
        step(inputs, labels)
        step(inputs[:7], labels[:7])
        with pytest.raises(RuntimeError, match="recompile"):
            step(inputs[:6], labels[:6])
        step(inputs, labels)
    assert optimizer.steps == 3


def test_a_flag_of_the_model_makes_another_graph() -> None:
    task = mlp(nn.Dropout(0.3))
    step = compiled(GAM(task.model.parameters(), **SETTINGS), task.loss)
    step(*task.batches[0])
    task.model.eval()
    step(*task.batches[0])
    (cause,) = step.recompilations
    assert "training" in cause


def test_graphs_that_the_compiler_forgets_are_made_anew() -> None:
    task = mlp()
    optimizer = GAM(task.model.parameters(), **SETTINGS)
    step = compiled(optimizer, task.loss)
    step(*task.batches[0])
    torch.compiler.reset()
    step(*task.batches[0])
    assert (step.graphs, len(step.recompilations), optimizer.steps) == (2, 1, 2)


def test_many_compiled_steps_know_nothing_of_each_other() -> None:
    with warnings.catch_warnings(), torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(4):
            task = mlp()
            step = compiled(GAM(task.model.parameters(), **SETTINGS), task.loss)
            for batch in task.batches:
                step(*batch)
            assert step.graphs == 2


def test_steps_without_flatness_term_have_a_graph_of_their_own() -> None:
    task = mlp()
    step = compiled(GAM(task.model.parameters(), interval=3, **SETTINGS), task.loss)
    counts = []
    for _ in range(5):
        step(*task.batches[0])
        counts.append(step.graphs)
    assert counts == [1, 2, 2, 2, 2]
    assert step.recompilations == []
