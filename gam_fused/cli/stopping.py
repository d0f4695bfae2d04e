"""Ctrl-C as a request: the step under way is finished, the state is saved, then the run ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what job schedulers send before they kill


class StopRequest:
    """``signal`` is the number of the signal that asked the run to stop, or ``None``."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def received(self) -> bool:
        return self.signal is not None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal. A second one comes from someone who will not wait, and interrupts at once."""
        if self.received():
            raise KeyboardInterrupt
        self.signal = number


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """While the block runs, signals that would end the process make a request instead."""
    request = StopRequest()
    previous = {number: signal.signal(number, request.receive) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
