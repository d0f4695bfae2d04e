"""Pictures of training curves. Matplotlib is used without pyplot, so there is no global state and no display."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gam_fused.cli.atomic import write_atomically
from gam_fused.cli.evaluation import PROBE_RHO
from gam_fused.cli.history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: colours that colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LineStyle = str | tuple[int, tuple[int, int]]
_TRAIN: _LineStyle = (0, (4, 2))
_TEST: _LineStyle = "-"


def plot_runs(runs: Sequence[tuple[str, History]], path: Path) -> None:
    """Draw the loss, accuracy and first-order flatness of named runs, a colour each, into a PNG at ``path``."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    loss, accuracy, flatness = figure.subplots(1, 3)
    for number, (name, history) in enumerate(runs):
        colour = _COLOURS[number % len(_COLOURS)]
        _draw(loss, history, [record.train_loss for record in history], colour, _TRAIN)
        _draw(loss, history, [record.test_loss for record in history], colour, _TEST)
        _draw(accuracy, history, [100 * record.train_accuracy for record in history], colour, _TRAIN)
        _draw(accuracy, history, [100 * record.test_accuracy for record in history], colour, _TEST)
        _draw(flatness, history, [record.first_order_flatness for record in history], colour, _TEST, name)

    for style, label in ((_TEST, "test"), (_TRAIN, "train")):
        accuracy.plot([], [], color="grey", linestyle=style, label=label)
    for axes in (loss, flatness):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    _label(loss, "Loss")
    _label(accuracy, "Accuracy (%)")
    _label(flatness, f"First-order flatness at ρ = {PROBE_RHO}")
    figure.legend(frameon=False, loc="outside lower center", ncols=4)

    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
    write_atomically(path, png.getvalue())


def _draw(
    axes: Axes, history: History, values: list[float], colour: str, style: _LineStyle, label: str | None = None
) -> None:
    epochs = [record.epoch for record in history]
    axes.plot(epochs, values, color=colour, linestyle=style, label=label, marker="o", markersize=3)


def _label(axes: Axes, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left")
    axes.set_xlabel("epoch")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
