"""``gam-fused compare``: finished or unfinished runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gam_fused.cli.errors import CommandError
from gam_fused.cli.history import read_csv
from gam_fused.cli.plots import plot_runs
from gam_fused.cli.report import Run, results_table
from gam_fused.cli.run_folder import RunFolder


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Folders that `gam-fused train` wrote.")],
    out: Annotated[Path, typer.Option(help="Where to write the picture.")] = Path("comparison.png"),
) -> None:
    """Print the results of several runs side by side and draw their curves into one picture."""
    if out.suffix.lower() != ".png" or out.is_dir():
        raise CommandError(f"--out {out}: must be a file whose name ends in .png")
    loaded = [_load(RunFolder(path)) for path in runs]
    plot_runs([(run.name, run.history) for run in loaded], out)
    console = Console()
    console.print(results_table(loaded))
    console.print(f"Curves: {out}", highlight=False)


def _load(folder: RunFolder) -> Run:
    config = folder.saved_config()
    history = read_csv(folder.log) if folder.log.exists() else []
    if not history:
        raise CommandError(f"{folder.path} has no finished epoch yet")
    return Run(folder.name, config, history)
