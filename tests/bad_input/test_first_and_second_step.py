"""first_step() and second_step() are refused in the wrong order, and with what is not the loss."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.bad_input.common import BAD_LOSSES, Bench, param, refused
from tests.conformance.common import bits


def test_second_step_before_first_step_is_refused() -> None:
    bench = Bench()
    loss = bench.loss()
    fragments = ["second_step()", "before first_step()", "first_step(loss)"]
    refused(lambda: bench.optimizer.second_step(loss), RuntimeError, *fragments, unchanged=bench.snapshot)
    bench.optimizer.first_step(loss)
    bench.optimizer.second_step(bench.loss())
    loss = bench.loss()
    refused(lambda: bench.optimizer.second_step(loss), RuntimeError, *fragments, unchanged=bench.snapshot)


BETWEEN: dict[str, Callable[[Bench, Tensor], Any]] = {
    "first_step()": lambda bench, loss: bench.optimizer.first_step(loss),
    "step()": lambda bench, loss: bench.optimizer.step(bench.loss),
    "state_dict()": lambda bench, loss: bench.optimizer.state_dict(),
    "load_state_dict()": lambda bench, loss: bench.optimizer.load_state_dict({"state": {}, "param_groups": []}),
    "add_param_group()": lambda bench, loss: bench.optimizer.add_param_group({"params": [param(1)]}),
    "copying or pickling": lambda bench, loss: pickle.dumps(bench.optimizer),
    "copying": lambda bench, loss: deepcopy(bench.optimizer),
}


@pytest.mark.parametrize("what", BETWEEN)
def test_what_would_see_the_adversarial_point_is_refused_between_first_and_second_step(what: str) -> None:
    bench, twin = Bench(), Bench()
    for one in (bench, twin):
        torch.manual_seed(1)
        one.optimizer.first_step(one.loss())
    torch.manual_seed(2)
    loss = bench.loss()
    fragments = [what, "between first_step() and second_step()", "second_step(loss_adv)", "cancel_step()"]
    refused(lambda: BETWEEN[what](bench, loss), RuntimeError, *fragments, unchanged=bench.snapshot)
    # The step goes on as if nothing had been asked.
    bench.optimizer.second_step(loss)
    torch.manual_seed(2)
    twin.optimizer.second_step(twin.loss())
    assert bench.snapshot()["parameters"] == twin.snapshot()["parameters"]
    assert bits(bench.optimizer.state_dict()) == bits(twin.optimizer.state_dict())


def test_cancel_step_is_a_way_out_back_to_where_the_step_began() -> None:
    bench = Bench()
    loss = bench.loss()
    before = bench.snapshot()
    bench.optimizer.first_step(loss)
    bench.optimizer.cancel_step()
    assert bench.snapshot() == before
    bench.optimizer.state_dict()
    bench.optimizer.cancel_step()  # harmless when there is nothing to cancel
    assert bench.snapshot() == before


def test_zero_grad_between_first_and_second_step_is_fine() -> None:
    course = []
    for zero in (False, True):
        bench = Bench()
        bench.optimizer.first_step(bench.loss())
        if zero:
            bench.optimizer.zero_grad()
        bench.optimizer.second_step(bench.loss())
        course.append(bench.snapshot()["parameters"])
    assert course[0] == course[1]


@pytest.mark.parametrize("bad", BAD_LOSSES)
def test_first_step_refuses_what_is_not_the_loss(bad: str) -> None:
    spoil, error, fragments = BAD_LOSSES[bad]
    bench = Bench()
    value = spoil(bench.loss())
    fragments = ["the loss given to first_step", *fragments]
    refused(lambda: bench.optimizer.first_step(value), error, *fragments, unchanged=bench.snapshot)
    bench.optimizer.first_step(bench.loss())
    bench.optimizer.second_step(bench.loss())


@pytest.mark.parametrize("bad", BAD_LOSSES)
def test_second_step_refuses_what_is_not_the_loss_and_returns_to_where_the_step_began(bad: str) -> None:
    spoil, error, fragments = BAD_LOSSES[bad]
    bench = Bench()
    loss = bench.loss()
    before = bench.snapshot()
    bench.optimizer.first_step(loss)
    assert bench.snapshot()["parameters"] != before["parameters"]
    value = spoil(bench.loss())
    refused(lambda: bench.optimizer.second_step(value), error, "the loss given to second_step", *fragments)
    after = bench.snapshot()
    for what in before.keys() - {"random states"}:  # those of the second forward pass are the caller's
        assert after[what] == before[what]
    refused(lambda: bench.optimizer.second_step(bench.loss()), RuntimeError, "first_step(loss)")


@pytest.mark.parametrize("kwargs", [{"hvp": "finite_difference"}, {"interval": 2}], ids=str)
def test_first_step_is_refused_where_one_loss_is_not_enough(kwargs: dict[str, Any]) -> None:
    bench = Bench(**kwargs)
    loss = bench.loss()
    ((name, value),) = kwargs.items()
    fragments = ["first_step()", f"{name}={value!r}", "step(closure)"]
    refused(lambda: bench.optimizer.first_step(loss), RuntimeError, *fragments, unchanged=bench.snapshot)
    bench.optimizer.step(bench.loss)
