"""What a run shows while it trains: a line per epoch, and in a terminal a live bar below them."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gam_fused.cli.history import History
from gam_fused.cli.trainer import StepReport

SECONDS_BETWEEN_READINGS = 0.5
"""Reading a number from the device makes the training loop wait for it, so the bar does it only so often."""


class ProgressDisplay:
    """Shows a run of ``epochs``, ``step`` of its ``steps`` already done. Off the terminal there is no bar."""

    def __init__(self, console: Console, epochs: int, step: int, steps: int) -> None:
        self._console = console
        self._epochs = epochs
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=step)
        self._next_reading = 0.0
        self._last_flatness: float | None = None

    def __enter__(self) -> ProgressDisplay:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def step_done(self, report: StepReport) -> None:
        self._bar.update(self._task, completed=report.step)
        now = time.monotonic()
        if self._console.is_terminal and now >= self._next_reading:
            self._next_reading = now + SECONDS_BETWEEN_READINGS
            self._bar.update(self._task, description=self._describe(report))

    def _describe(self, report: StepReport) -> str:
        numbers = [
            f"epoch {report.epoch}/{self._epochs}",
            f"loss {report.mean_loss():.3f}",
            f"acc {report.accuracy():.1%}",
            f"{report.step_seconds() * 1e3:.0f} ms/step",
        ]
        # GAM knows the flatness of each step; for the others, that of the last epoch has to do.
        flatness = report.flatness() or self._last_flatness
        if flatness is not None:
            numbers.append(f"flatness {flatness:.3f}")
        return " ".join(numbers)

    def epoch_done(self, history: History) -> None:
        record = history[-1]
        self._last_flatness = record.first_order_flatness
        self._console.print(
            f"epoch {record.epoch}/{self._epochs}: "
            f"train loss {record.train_loss:.3f}, accuracy {record.train_accuracy:.1%}; "
            f"test loss {record.test_loss:.3f}, accuracy {record.test_accuracy:.1%}; "
            f"flatness {record.first_order_flatness:.4f}; {record.seconds:.1f} s",
            highlight=False,
            soft_wrap=True,
        )
