"""The commands, put together."""

from __future__ import annotations

import typer

from gam_fused.cli.compare import compare
from gam_fused.cli.info import info
from gam_fused.cli.train import train

app = typer.Typer(
    name="gam-fused",
    help="Gradient norm Aware Minimization (GAM) for PyTorch: train, compare, inspect.",
    no_args_is_help=True,
    # A bug's traceback should be Python's own, complete and easy to paste.
    pretty_exceptions_enable=False,
)
app.command()(train)
app.command()(compare)
app.command()(info)
