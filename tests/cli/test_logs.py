"""What a run writes down can be read back and says what happened."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gam_fused.cli import logs
from gam_fused.cli.errors import CommandError
from gam_fused.cli.history import EpochRecord, History, read_csv, write_csv
from gam_fused.cli.plots import plot_runs
from tests.cli.conftest import Cli
from tests.cli.runs import SMALL, arguments


def _record(epoch: int, loss: float = 0.5) -> EpochRecord:
    return EpochRecord(
        epoch=epoch,
        step=10 * epoch,
        lr=0.1,
        rho=None,
        train_loss=loss,
        train_accuracy=0.5,
        test_loss=loss,
        test_accuracy=0.25,
        first_order_flatness=0.1,
        skipped_steps=None,
        step_seconds=0.01,
        seconds=0.1,
    )


numbers = st.floats(allow_nan=False)
records = st.builds(
    EpochRecord,
    epoch=st.integers(1),
    step=st.integers(1),
    lr=numbers,
    rho=st.none() | numbers,
    train_loss=numbers,
    train_accuracy=numbers,
    test_loss=numbers,
    test_accuracy=numbers,
    first_order_flatness=numbers,
    skipped_steps=st.none() | st.integers(0),
    step_seconds=numbers,
    seconds=numbers,
)


@given(st.lists(records, max_size=4))
def test_csv_reads_back_exactly(tmp_path_factory: pytest.TempPathFactory, history: History) -> None:
    path = tmp_path_factory.mktemp("csv") / "metrics.csv"
    write_csv(history, path)
    assert read_csv(path) == history


@pytest.mark.parametrize("content", ["a,b\n1,2\n", "epoch,step\nx,y\n"])
def test_foreign_csv_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(content)
    with pytest.raises(CommandError, match="is not the log of a training run"):
        read_csv(tmp_path / "metrics.csv")


@pytest.mark.parametrize("losses", [[0.5], [0.5, 0.0], [0.5, math.nan], [1e-9, 1e9], []])
def test_picture_is_drawn_whatever_the_numbers(losses: list[float], tmp_path: Path) -> None:
    history = [_record(epoch, loss) for epoch, loss in enumerate(losses, 1)]
    plot_runs([("one", history), ("other", history[:1])], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def _events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard")).Reload()


def test_tensorboard_has_steps_and_epochs(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "STEPS_BETWEEN_EVENTS", 4)
    folder = tmp_path / "run"
    cli("train", "--out", folder, *arguments({**SMALL, "epochs": 2, "optimizer": "gam"}))
    events = _events(folder)
    assert [event.step for event in events.Scalars("step/loss")] == [4, 8, 12, 16]
    assert [event.step for event in events.Scalars("step/first_order_flatness")] == [4, 8, 12, 16]
    history = read_csv(folder / "metrics.csv")
    measured = [(event.step, event.value) for event in events.Scalars("epoch/test_loss")]
    assert [step for step, _ in measured] == [8, 16]
    assert [value for _, value in measured] == pytest.approx([record.test_loss for record in history], rel=1e-6)


def test_resuming_supersedes_events_after_the_checkpoint(tmp_path: Path) -> None:
    """The first writer got to step 30, its last checkpoint to step 20; step 30 happens again with another value."""
    from gam_fused.cli.run_folder import RunFolder

    folder = RunFolder(tmp_path)
    with logs.RunLog(folder, step=0) as first:
        for epoch in (1, 2, 3):
            first.epoch_done([_record(epoch, loss=1.0)])
    with logs.RunLog(folder, step=20) as resumed:
        resumed.epoch_done([_record(3, loss=2.0)])
    losses = [(event.step, event.value) for event in _events(tmp_path).Scalars("epoch/test_loss")]
    assert losses == [(10, 1.0), (20, 1.0), (30, 2.0)]
