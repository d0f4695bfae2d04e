"""When GAM takes a fused step, and when the base optimizer steps itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import SGD, optimizer

from gam_fused import GAM
from tests.base_rules.common import Task, fusing


def hooked_before(gam: GAM) -> None:
    gam.base_optimizer.register_step_pre_hook(lambda *_: None)


def hooked_after(gam: GAM) -> None:
    gam.base_optimizer.register_step_post_hook(lambda *_: None)


def with_its_own_step(gam: GAM) -> None:
    original = gam.base_optimizer.step
    gam.base_optimizer.step = lambda *args: original(*args)  # type: ignore[method-assign]


def differentiable(gam: GAM) -> None:
    gam.param_groups[0]["differentiable"] = True


def with_state_of_another_dtype(gam: GAM) -> None:
    for param in gam.param_groups[0]["params"]:
        gam.state[param]["momentum_buffer"] = torch.zeros_like(param, dtype=torch.float32)


def without_flatness(gam: GAM) -> None:
    for group in gam.param_groups:
        group["alpha"] = 0.0


@fusing
@pytest.mark.parametrize(
    "change",
    [hooked_before, hooked_after, with_its_own_step, differentiable, with_state_of_another_dtype, without_flatness],
)
def test_the_base_optimizer_steps_itself_where_somebody_may_notice(
    change: Any, backend: str, launches: list[str]
) -> None:
    task = Task()
    gam = task.gam("momentum", backend)
    change(gam)
    gam.step(task.loss)
    assert launches == []


@fusing
@pytest.mark.parametrize(
    "register", [optimizer.register_optimizer_step_pre_hook, optimizer.register_optimizer_step_post_hook]
)
def test_the_base_optimizer_steps_itself_where_a_global_hook_listens(
    register: Any, backend: str, launches: list[str]
) -> None:
    task = Task()
    gam = task.gam("momentum", backend)
    heard: list[Any] = []
    handle = register(lambda stepping, *_: heard.append(stepping))
    try:
        gam.step(task.loss)
    finally:
        handle.remove()
    assert launches == []
    assert gam.base_optimizer in heard
    gam.step(task.loss)
    assert launches == ["sgd_step_"] * 2  # nobody listens any more


@fusing
def test_hooks_of_gam_itself_do_not_stop_it_from_fusing(backend: str, launches: list[str]) -> None:
    task = Task()
    gam = task.gam("momentum", backend)
    heard: list[str] = []
    gam.register_step_pre_hook(lambda *_: heard.append("before"))
    gam.register_step_post_hook(lambda *_: heard.append("after"))
    gam.step(task.loss)
    assert (launches, heard) == (["sgd_step_"] * 2, ["before", "after"])


class OwnSGD(SGD):
    """Might do anything."""


@fusing
def test_a_subclass_steps_itself(backend: str, launches: list[str]) -> None:
    task = Task()
    GAM(task.model.parameters(), OwnSGD, lr=0.1, backend=backend, model=task.model).step(task.loss)
    assert launches == []
