"""Ctrl-C at any moment of a step leaves it undone or done, and nothing switched on or off."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gam_fused import GAM
from tests.faults import BACKENDS, MODES, Task, build
from tests.interruptions import assert_nothing_left_on, interrupted_at
from tests.states import assert_same, snapshot


@pytest.mark.slow
@pytest.mark.usefixtures("ctrl_c_raises")
@pytest.mark.parametrize(
    ("mode", "backend"),
    [*((mode, "foreach") for mode in MODES), *((mode, "native") for mode in ["accelerated"] if "native" in BACKENDS)],
)
def test_ctrl_c_at_any_line_leaves_the_step_undone_or_done(mode: str, backend: str) -> None:
    """A real SIGINT at every line of the package that a step runs, at its first and its last turn.

    At every turn around native launches, which write first and count what they have written in a line of its own.
    """
    task = Task()
    optimizer = build(task, backend, mode=mode)
    task.step(optimizer)
    start = copy.deepcopy((task, optimizer))
    random_state = torch.get_rng_state()
    before = snapshot(task.model, optimizer)
    lines = interrupted_at(None, lambda: task.step(optimizer))
    after = snapshot(task.model, optimizer)

    turns: dict[tuple[str, int], list[int]] = {}
    for turn, line in enumerate(lines):
        turns.setdefault(line, []).append(turn)
    outcomes = set()
    for line, at in turns.items():
        for turn in at if line[0] == "/kernels/native.py" else {at[0], at[-1]}:
            task, optimizer = copy.deepcopy(start)
            torch.set_rng_state(random_state)
            interrupted_at(turn, lambda task=task, optimizer=optimizer: task.step(optimizer))  # type: ignore[misc]
            assert_nothing_left_on(f"{line}, turn {turn}")
            done = optimizer.steps == 2
            outcomes.add(done)
            now, expected = snapshot(task.model, optimizer), after if done else before
            for part in ("params", "buffers", "state", "random"):
                assert_same(expected[part], now[part], f"{line}, turn {turn}, done {done}: {part}")
    assert outcomes == {False, True}


@pytest.mark.usefixtures("ctrl_c_raises")
def test_ctrl_c_while_a_recurrent_network_runs_without_cudnn_leaves_cudnn_on() -> None:
    model, inputs = nn.GRU(2, 3), torch.randn(4, 1, 2)
    optimizer = GAM(model.parameters(), lr=0.1)

    def step() -> None:
        optimizer.step(lambda: model(inputs)[0].square().sum())

    lines = interrupted_at(None, step)
    turns = [turn for turn, (file, _) in enumerate(lines) if file.endswith("recurrent.py")]
    assert turns
    for turn in turns:
        interrupted_at(turn, step)
        assert torch.backends.cudnn.enabled, f"line {lines[turn]}"
