"""Signals: the first asks, the second interrupts, and handlers are put back."""

from __future__ import annotations

import os
import signal

import pytest

from gam_fused.cli.stopping import stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_asks_second_interrupts(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as request:
        assert not request.received()
        os.kill(os.getpid(), number)
        assert request.signal == number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
