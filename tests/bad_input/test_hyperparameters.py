"""Hyper-parameters that are no finite numbers from 0 on are refused, by the constructor or once they are set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from gam_fused import GAM
from tests.bad_input.common import INF, NAN, Bench, model_and_snapshot, refused
from tests.conformance.common import snapshot

HYPERPARAMETERS = ("rho", "alpha", "xi")
OUT_OF_RANGE = (-1.0, -1e-300, NAN, INF, -INF)
NOT_A_NUMBER = ("0.1", None, True, 1j, [0.1], torch.tensor(0.1))


@pytest.mark.parametrize("through", ["constructor", "group", "wrap", "wrapped-group"])
@pytest.mark.parametrize("value", [*OUT_OF_RANGE, *NOT_A_NUMBER], ids=str)
@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_a_hyperparameter_that_is_no_finite_number_from_0_on_is_refused(name: str, value: Any, through: str) -> None:
    model, unchanged = model_and_snapshot()
    good = {"params": [model.bias]}
    bad = {"params": [model.weight], name: value}
    plain = SGD([good, bad] if "group" in through else model.parameters(), lr=0.1)
    calls: dict[str, Callable[[], Any]] = {
        "constructor": lambda: GAM(model.parameters(), SGD, lr=0.1, **{name: value}),
        "group": lambda: GAM([good, bad], SGD, lr=0.1),
        "wrap": lambda: GAM.wrap(plain, **{name: value}),
        "wrapped-group": lambda: GAM.wrap(plain),
    }
    is_float = isinstance(value, float)
    error, way_out = (ValueError, "finite number >= 0") if is_float else (TypeError, "pass a Python float")
    where = ["param group 1"] if "group" in through else []
    before = snapshot(plain)
    refused(calls[through], error, name, repr(value), way_out, *where, unchanged=unchanged)
    assert snapshot(plain) == before


@pytest.mark.parametrize("value", [-1.0, NAN, INF, torch.tensor(0.1)], ids=str)
@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_a_hyperparameter_broken_by_a_schedule_is_refused_at_the_next_step(name: str, value: Any) -> None:
    bench = Bench()
    group = bench.optimizer.param_groups[0]
    good, group[name] = group[name], value
    loss = bench.loss()
    error = TypeError if isinstance(value, Tensor) else ValueError
    for call in (lambda: bench.optimizer.step(bench.loss), lambda: bench.optimizer.first_step(loss)):
        refused(call, error, name, repr(value), "number", "param group 0", unchanged=bench.snapshot)
    group[name] = good
    bench.optimizer.cancel_step()  # harmless: none has begun


@pytest.mark.parametrize("value", [-1.0, NAN, INF], ids=str)
@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_a_hyperparameter_broken_between_first_and_second_step_cancels_the_step(name: str, value: float) -> None:
    bench = Bench()
    group = bench.optimizer.param_groups[0]
    loss = bench.loss()
    before = bench.snapshot()
    bench.optimizer.first_step(loss)
    good, group[name] = group[name], value
    loss_adv = bench.loss()
    refused(lambda: bench.optimizer.second_step(loss_adv), ValueError, name, repr(value), ">= 0", "param group 0")
    group[name] = good
    after = bench.snapshot()
    # Both forward passes and their random draws were the caller's own.
    assert {k: v for k, v in after.items() if k != "random states"} == {
        k: v for k, v in before.items() if k != "random states"
    }


def test_errors_name_the_key_that_a_clashing_hyperparameter_goes_by() -> None:
    """RMSprop's own ``alpha`` is its own business; the message has to say which one is meant."""
    model, unchanged = model_and_snapshot()
    groups = [{"params": model.parameters(), "gam_alpha": -1.0}]
    fragments = ["gam_alpha", "-1.0", ">= 0", "param group 0"]
    refused(lambda: GAM(groups, torch.optim.RMSprop), ValueError, *fragments, unchanged=unchanged)
