"""Entry point of ``gam-fused``: runs the app and turns expected errors into one line and an exit code."""

from __future__ import annotations

import sys
from typing import NoReturn

_EXTRA = {"typer", "rich", "matplotlib", "tensorboard", "sklearn", "numpy"}
"""Modules that the ``cli`` extra installs."""


def main() -> None:
    """Run the command line in ``sys.argv`` and exit the process."""
    try:
        from gam_fused.cli.app import app
        from gam_fused.cli.errors import CommandError
    except ModuleNotFoundError as error:
        _explain_missing(error)
    try:
        app()
    except CommandError as error:
        print(f"gam-fused: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:  # a command imports what only it needs when it runs
        _explain_missing(error)


def _explain_missing(error: ModuleNotFoundError) -> NoReturn:
    if error.name is None or error.name.split(".")[0] not in _EXTRA:
        raise error
    print(f'gam-fused: the command line needs {error.name}; pip install "gam-fused[cli]"', file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
