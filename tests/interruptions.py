"""Ctrl-C at a line of the package of the test's choice."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

import gam_fused


def interrupted_at(turn: int | None, run: Callable[[], Any]) -> list[tuple[str, int]]:
    """The lines of the package that ``run`` executes; SIGINT comes as it reaches the one numbered ``turn``."""
    package = str(gam_fused.__path__[0])
    lines: list[tuple[str, int]] = []

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(package):
            return None
        if event == "line":
            lines.append((frame.f_code.co_filename.removeprefix(package), frame.f_lineno))
            if len(lines) - 1 == turn:
                signal.raise_signal(signal.SIGINT)
        return trace

    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        assert turn is not None
    finally:
        sys.settrace(None)
    return lines


def assert_nothing_left_on(where: str) -> None:
    """No mode of PyTorch's, and no switch that a step flips, is other than it was."""
    assert torch._C._len_torch_function_stack() == 0, f"{where}: a function mode was left on"
    assert torch._C._len_torch_dispatch_stack() == 0, f"{where}: a dispatch mode was left on"
    assert torch.is_grad_enabled(), f"{where}: grad mode was left off"
    assert torch.backends.cuda.flash_sdp_enabled(), f"{where}: fused attention was left off"
    assert torch.backends.cudnn.enabled, f"{where}: cuDNN was left off"
