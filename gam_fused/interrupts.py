"""Ctrl-C at the wrong moment must not split an update in two."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_Signal = tuple[int, FrameType | None]
_Handler = Callable[[int, FrameType | None], Any]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back while the block runs, then deliver them to the handlers that were installed.

    For the few launches that write parameters or optimizer state: they either happen in full or not at all. Python
    runs signal handlers in the main thread only, so in any other thread there is nothing to hold back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    pending: list[_Signal] = []
    held: dict[int, _Handler] = {}
    number: int
    try:
        for number in _SIGNALS:
            # Only handlers written in Python run between bytecodes; SIG_DFL and SIG_IGN are the kernel's business.
            if callable(handler := signal.getsignal(number)):
                held[number] = handler
                signal.signal(number, lambda caught, frame: pending.append((caught, frame)))
        yield
    finally:
        for number, handler in reversed(held.items()):
            signal.signal(number, handler)
        _deliver(pending, held)


def _deliver(pending: list[_Signal], handlers: dict[int, _Handler]) -> None:
    if pending:
        number, frame = pending.pop(0)
        try:
            handlers[number](number, frame)
        finally:  # a handler that raises does not swallow the signals after its own
            _deliver(pending, handlers)
