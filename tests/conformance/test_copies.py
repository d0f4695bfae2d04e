"""Copies of an optimizer: complete, independent, and printable."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR

from gam_fused import GAM
from tests.conformance.common import CONFIGURATIONS, Base, Task, backends, bases, bits, course


def public_attributes(optimizer: GAM) -> dict[str, Any]:
    return {name: value for name, value in vars(optimizer).items() if not name.startswith("_")}


def unpickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def torch_loaded(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = pytest.mark.parametrize("duplicate", [copy.deepcopy, unpickled, torch_loaded])


@COPIES
@backends
@bases
def test_a_copy_with_its_task_goes_on_bitwise_and_alone(base: Base, backend: str, duplicate: Any) -> None:
    task = Task()
    optimizer = base.gam(task.params, backend=backend, interval=3, model=task.model)
    course(optimizer, task, 2)
    other, twin = duplicate((optimizer, task))
    assert all(mine is not its for mine, its in zip(task.params, twin.params, strict=True))
    assert [id(param) for param in other.param_groups[0]["params"]] == [id(param) for param in twin.params]
    assert other.param_groups is other.base_optimizer.param_groups
    assert other.state is other.base_optimizer.state
    assert other.model is twin.model
    assert other.backend == backend

    there = bits(task.params)
    visited, state_dict = course(other, twin, 3)
    assert bits(task.params) == there, "stepping the copy moved the original"
    assert course(optimizer, task, 3) == (visited, state_dict)


@COPIES
def test_a_copy_alone_takes_copies_of_the_parameters_along(duplicate: Any) -> None:
    task = Task()
    optimizer = Base(SGD, {"lr": 0.1, "momentum": 0.9}).gam(task.params)
    course(optimizer, task, 2)
    other = duplicate(optimizer)
    assert bits(other.state_dict()) == bits(optimizer.state_dict())
    assert bits(other.param_groups[0]["params"]) == bits(task.params)
    before = bits(task.params)
    params = other.param_groups[0]["params"]
    other.step(lambda: sum(param.square().sum() for param in params))
    assert bits(task.params) == before
    assert bits(params) != before


@COPIES
@bases
def test_a_copy_has_every_public_attribute(base: Base, duplicate: Any) -> None:
    task = Task()
    optimizer = base.gam(task.params, interval=2, hvp="finite_difference", fd_epsilon=0.005, model=task.model)
    course(optimizer, task, 3)
    before, after = public_attributes(optimizer), public_attributes(duplicate(optimizer))
    assert before.keys() == after.keys()
    assert bits(before["metrics"]) == bits(after["metrics"])
    for name in ("defaults", "steps", "hvp", "fd_epsilon", "interval"):
        assert bits(before[name]) == bits(after[name])
    assert type(after["base_optimizer"]) is base.cls


@COPIES
@pytest.mark.parametrize("on_base", [False, True], ids=["on-GAM", "on-base"])
def test_a_copy_of_a_scheduled_optimizer_steps_itself(duplicate: Any, on_base: bool) -> None:
    """A scheduler replaces ``step`` of the optimizer it is built on by a function that holds on to that optimizer."""
    task = Task()
    optimizer = Base(SGD, {"lr": 0.1, "momentum": 0.9}).gam(task.params)
    scheduler = ExponentialLR(optimizer.base_optimizer if on_base else optimizer, gamma=0.5)
    optimizer.step(task.loss)
    scheduler.step()
    other, twin = duplicate((optimizer, task))
    before = bits(task.params)
    visited = course(other, twin, 2)
    assert bits(task.params) == before
    assert course(optimizer, task, 2) == visited


@COPIES
def test_a_copy_knows_whether_the_last_step_was_skipped(duplicate: Any) -> None:
    """Or a row of skipped steps would end differently for the copy: see ``OptimizerWrapper._skip``."""
    task = Task()
    optimizer = GAM(task.params, lr=0.1)
    optimizer.step(lambda: task.loss() * float("nan"))
    assert duplicate(optimizer).state_dict()["gam_fused"]["skipped_last"]


def test_a_shallow_copy_shares_parameters_and_state() -> None:
    task = Task()
    optimizer = Base(SGD, {"lr": 0.1, "momentum": 0.9}).gam(task.params)
    other = copy.copy(optimizer)
    assert other.base_optimizer is optimizer.base_optimizer
    assert other.param_groups is optimizer.param_groups
    other.step(task.loss)


@COPIES
def test_a_copy_has_no_hooks_as_with_torchs_own_optimizers(duplicate: Any) -> None:
    calls: list[str] = []
    task = Task()
    optimizer = Base(SGD, {"lr": 0.1}).gam(task.params)
    optimizer.register_step_pre_hook(_fail)
    optimizer.base_optimizer.register_step_pre_hook(_fail)
    other, twin = duplicate((optimizer, task))
    other.step(twin.loss)
    other.register_step_post_hook(lambda *_: calls.append("post"))
    other.step(twin.loss)
    assert calls == ["post"]


def _fail(*_: Any) -> None:
    raise AssertionError("a hook of the original")


@backends
@pytest.mark.parametrize("base", CONFIGURATIONS)
def test_repr_names_both_optimizers_the_back_end_and_every_setting(base: Base, backend: str) -> None:
    task = Task()
    optimizer = base.gam([{"params": layer.parameters()} for layer in task.model.children()], backend=backend)
    text = repr(optimizer)
    header, *lines = text.splitlines()
    assert header.startswith("GAM ")
    assert base.cls.__name__ in header
    assert backend in header
    for number, group in enumerate(optimizer.param_groups):
        assert f"Parameter Group {number}" in lines
        for name, value in group.items():
            assert name == "params" or f"    {name}: {value}" in lines
