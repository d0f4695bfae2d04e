"""The exceptions that the command line turns into a one-line message."""

from __future__ import annotations


class CommandError(Exception):
    """Something the user can put right: the message says what is wrong and what to do about it.

    :func:`gam_fused.cli.main.main` prints it as one line on standard error and exits with ``exit_code``. Anything else
    that escapes a command is a bug and keeps its traceback.
    """

    exit_code = 2


class TrainingDiverged(CommandError):
    """The options were fine, the training was not."""

    exit_code = 1


class Stopped(CommandError):
    """A signal asked the command to stop, and it did, in good order."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal  # what a shell reports for a process that the signal killed
