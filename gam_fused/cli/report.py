"""The final table, of one run or of several side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table

from gam_fused.cli.config import RunConfig
from gam_fused.cli.evaluation import PROBE_RHO
from gam_fused.cli.history import History


@dataclass(frozen=True)
class Run:
    """A run as the table and the pictures show it; ``history`` holds at least one epoch."""

    name: str
    config: RunConfig
    history: History


_ROWS: dict[str, Callable[[Run], str]] = {
    "data": lambda run: run.config.data,
    "model": lambda run: run.config.model,
    "optimizer": lambda run: _optimizer(run.config),
    "rho": lambda run: _or_dash(run.config.rho),
    "alpha": lambda run: _or_dash(run.config.alpha),
    "seed": lambda run: str(run.config.seed),
    "epochs": lambda run: f"{len(run.history)} of {run.config.epochs}",
    "train loss": lambda run: f"{run.history[-1].train_loss:.4f}",
    "train accuracy": lambda run: f"{run.history[-1].train_accuracy:.2%}",
    "test loss": lambda run: f"{run.history[-1].test_loss:.4f}",
    "test accuracy": lambda run: f"{run.history[-1].test_accuracy:.2%}",
    "best test accuracy": lambda run: _best(run.history),
    "first-order flatness": lambda run: f"{run.history[-1].first_order_flatness:.4f}",
    "skipped steps": lambda run: _or_dash(run.history[-1].skipped_steps),
    "time per step": lambda run: f"{run.history[-1].step_seconds * 1e3:.1f} ms",
    "time per epoch": lambda run: f"{run.history[-1].seconds:.1f} s",
    "training time": lambda run: f"{sum(record.seconds for record in run.history):.1f} s",
}


def results_table(runs: Sequence[Run]) -> Table:
    """One column per run, one row per result."""
    table = Table(
        "after the last epoch",
        *(run.name for run in runs),
        caption=f"First-order flatness of the training loss at ρ = {PROBE_RHO}: lower is flatter.",
        caption_justify="left",
    )
    for label, value in _ROWS.items():
        table.add_row(label, *(value(run) for run in runs))
    return table


def _optimizer(config: RunConfig) -> str:
    return config.optimizer if config.base == config.optimizer else f"{config.optimizer} on {config.base}"


def _best(history: History) -> str:
    best = max(history, key=lambda record: record.test_accuracy)
    return f"{best.test_accuracy:.2%} (epoch {best.epoch})"


def _or_dash(value: float | None) -> str:
    return "–" if value is None else str(value)
