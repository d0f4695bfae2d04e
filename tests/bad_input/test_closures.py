"""Closures that do not return the loss, cannot be called or are missing are refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.bad_input.common import BAD_LOSSES, Bench, assert_still_usable, refused


@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
@pytest.mark.parametrize("bad", BAD_LOSSES)
def test_a_closure_that_does_not_return_the_loss_is_refused_in_every_pass(bad: str, hvp: str) -> None:
    spoil, error, fragments = BAD_LOSSES[bad]
    passes = 2 if hvp == "exact" else 4
    for spoiled in range(passes):
        bench = Bench(hvp=hvp)
        calls: Iterator[int] = iter(range(passes))

        def closure(bench: Bench = bench, calls: Iterator[int] = calls, spoiled: int = spoiled) -> Any:
            loss = bench.loss()
            return spoil(loss) if next(calls) == spoiled else loss

        refused(
            lambda closure=closure, bench=bench: bench.optimizer.step(closure),
            error,
            "the closure's return value",
            *fragments,
            unchanged=bench.snapshot,
        )
        assert next(calls, passes) == min(spoiled + 1, passes), "the closure ran on after its error"
        assert_still_usable(bench, hvp=hvp)


@pytest.mark.parametrize("bad", BAD_LOSSES)
def test_a_closure_that_does_not_return_the_loss_is_refused_between_two_flatness_terms(bad: str) -> None:
    spoil, error, fragments = BAD_LOSSES[bad]
    bench = Bench(interval=2)
    call = lambda: bench.optimizer.step(lambda: spoil(bench.loss()))  # noqa: E731
    refused(call, error, "the closure's return value", *fragments, unchanged=bench.snapshot)
    assert_still_usable(bench, interval=2)


@pytest.mark.parametrize("bad", [bad for bad in BAD_LOSSES if bad != "detached"])
def test_a_closure_that_calls_backward_must_return_the_loss_too(bad: str) -> None:
    spoil, error, fragments = BAD_LOSSES[bad]
    bench = Bench()

    def closure() -> Any:
        bench.optimizer.zero_grad()
        loss = bench.loss()
        loss.backward()
        return spoil(loss)

    refused(
        lambda: bench.optimizer.step(closure),
        error,
        "the closure's return value",
        *fragments,
        unchanged=bench.snapshot,
    )
    assert_still_usable(bench)


@pytest.mark.parametrize("closure", [None, 0.5, "loss", torch.tensor(0.5)], ids=["None", "float", "string", "tensor"])
def test_what_cannot_be_called_is_refused_as_a_closure(closure: Any) -> None:
    bench = Bench()
    fragments = ["closure", repr(closure), "step(lambda", "first_step"]
    refused(lambda: bench.optimizer.step(closure), TypeError, *fragments, unchanged=bench.snapshot)
    assert_still_usable(bench)


def test_a_step_without_a_closure_is_refused() -> None:
    bench = Bench()
    refused(lambda: bench.optimizer.step(), TypeError, "closure", unchanged=bench.snapshot)
    assert_still_usable(bench)
