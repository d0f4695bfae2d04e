"""Run ``gam-fused`` and get killed at a chosen point: ``python interrupted_cli.py POINT COUNT [ARGUMENT...]``.

POINT is ``SIGKILL`` or ``SIGINT`` (sent to this process at the end of step COUNT) or ``write`` (SIGKILL when half of
the COUNT-th checkpoint has been written).
"""

from __future__ import annotations

import builtins
import os
import signal
import sys
from typing import Any

from gam_fused.cli import atomic
from gam_fused.cli.logs import RunLog
from gam_fused.cli.main import main
from gam_fused.cli.trainer import StepReport


def signal_in_step(name: str, count: int) -> None:
    original = RunLog.step_done

    def step_done(log: RunLog, report: StepReport) -> None:
        original(log, report)
        if report.step == count:
            os.kill(os.getpid(), signal.Signals[name])

    RunLog.step_done = step_done  # type: ignore[method-assign]


def die_while_writing(count: int) -> None:
    checkpoints = 0

    def open_(path: Any, mode: str = "r") -> Any:
        nonlocal checkpoints
        file = builtins.open(path, mode)  # noqa: SIM115 (handed to the caller)
        if "checkpoint" in path.name and "w" in mode:
            checkpoints += 1
            if checkpoints == count:
                return HalfWriter(file)
        return file

    atomic.open = open_  # type: ignore[attr-defined]


class HalfWriter:
    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> HalfWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def write(self, content: bytes) -> None:
        self._file.write(content[: len(content) // 2])
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    point, count = sys.argv[1], int(sys.argv[2])
    sys.argv[1:3] = []
    if point == "write":
        die_while_writing(count)
    else:
        signal_in_step(point, count)
    main()
