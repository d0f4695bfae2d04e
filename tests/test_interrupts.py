"""Signals are held back while a block runs, and reach the handlers that were installed as soon as it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest

from gam_fused.interrupts import uninterrupted

SIGNALS = [signal.SIGINT, signal.SIGTERM]
over_signals = pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)


class Handled(Exception):
    """What a handler that raises raises."""


@pytest.fixture(autouse=True)
def handlers_restored() -> Iterator[None]:
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    try:
        assert [signal.getsignal(number) for number in SIGNALS] in (before, INSTALLED)
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)
        INSTALLED.clear()


INSTALLED: list[Any] = []
"""The handlers that a test has installed: they have to be there when it ends."""


def install(handler: Any) -> None:
    for number in SIGNALS:
        signal.signal(number, handler)
    INSTALLED[:] = [handler] * len(SIGNALS)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_ctrl_c_interrupts_after_the_block_and_not_in_it() -> None:
    steps = []
    install(signal.default_int_handler)  # a process that was started in the background has none

    def work() -> None:
        with uninterrupted():
            steps.append("before")
            send(signal.SIGINT)
            steps.append("after")
        steps.append("never")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert steps == ["before", "after"]


@over_signals
def test_a_custom_handler_gets_the_signal_once_and_after_the_block(number: signal.Signals) -> None:
    caught: list[tuple[int, FrameType | None]] = []
    install(lambda *arguments: caught.append(arguments))
    with uninterrupted():
        send(number)
        assert caught == []
    assert [arguments[0] for arguments in caught] == [number]
    assert caught[0][1] is not None
    assert caught[0][1].f_code.co_name in ("send", "test_a_custom_handler_gets_the_signal_once_and_after_the_block")
    send(number)
    assert len(caught) == 2


def test_signals_are_delivered_in_their_order() -> None:
    caught: list[int] = []
    install(lambda number, frame: caught.append(number))
    order = [signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGTERM]
    with uninterrupted():
        for number in order:
            signal.raise_signal(number)
    assert caught == order


def test_a_handler_that_raises_does_not_swallow_the_signals_after_its_own() -> None:
    caught: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        raise Handled

    @uninterrupted()
    def block() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)

    install(handler)
    with pytest.raises(Handled):
        block()
    assert caught == [signal.SIGINT, signal.SIGTERM]


@over_signals
def test_without_a_signal_nothing_is_called_and_handlers_stay(number: signal.Signals) -> None:
    caught: list[int] = []
    install(lambda caught_number, frame: caught.append(caught_number))
    with uninterrupted():
        pass
    assert caught == []


def test_blocks_nest_and_the_outermost_delivers() -> None:
    caught: list[int] = []
    install(lambda number, frame: caught.append(number))
    with uninterrupted():
        with uninterrupted():
            send(signal.SIGINT)
            with uninterrupted():
                send(signal.SIGTERM)
        assert caught == []
        send(signal.SIGINT)
        assert caught == []
    assert sorted(caught) == [signal.SIGINT, signal.SIGINT, signal.SIGTERM]


def test_a_block_that_raises_restores_handlers_and_passes_its_exception_on() -> None:
    install(lambda number, frame: None)
    with pytest.raises(ZeroDivisionError), uninterrupted():
        raise ZeroDivisionError


@uninterrupted()
def interrupted_and_broken() -> None:
    send(signal.SIGINT)
    raise ZeroDivisionError


def test_a_block_that_raises_still_delivers_what_it_held_back() -> None:
    caught: list[int] = []
    install(lambda number, frame: caught.append(number))
    with pytest.raises(ZeroDivisionError):
        interrupted_and_broken()
    assert caught == [signal.SIGINT]


def test_ctrl_c_during_a_block_that_raises_keeps_the_first_exception_as_its_context() -> None:
    install(signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        interrupted_and_broken()
    assert isinstance(interrupt.value.__context__, ZeroDivisionError)


@over_signals
def test_an_ignored_signal_stays_ignored(number: signal.Signals) -> None:
    install(signal.SIG_IGN)
    with uninterrupted():
        send(number)
        assert signal.getsignal(number) is signal.SIG_IGN
    send(number)


def test_the_systems_own_handling_is_not_touched() -> None:
    """``SIG_DFL`` kills the process as ever: in the block as outside of it."""
    script = """
import os, signal
from gam_fused.interrupts import uninterrupted
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
with uninterrupted():
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    os.kill(os.getpid(), signal.SIGTERM)
print("survived")
"""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path}, capture_output=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, b"")


def test_in_another_thread_a_block_is_transparent() -> None:
    """Signals reach the main thread only, and only that one may change their handlers."""
    caught: list[int] = []
    install(lambda number, frame: caught.append(number))
    inside, leave = threading.Event(), threading.Event()
    finished: list[bool] = []

    def work() -> None:
        with uninterrupted():
            inside.set()
            leave.wait()
        finished.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(timeout=60)
    send(signal.SIGINT)
    assert caught == [signal.SIGINT]  # at once, though the other thread is in its block
    leave.set()
    thread.join()
    assert finished == [True]


def test_in_another_thread_an_exception_passes_through() -> None:
    caught: list[BaseException] = []

    def work() -> None:
        try:
            with uninterrupted():
                raise ZeroDivisionError
        except ZeroDivisionError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(caught) == 1
