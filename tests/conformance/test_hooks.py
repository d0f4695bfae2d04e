"""Every hook that PyTorch's optimizers offer fires on GAM and on its base optimizer, in the order one expects."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import SGD, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tests.conformance.common import (
    MOMENTUM,
    Base,
    Task,
    backends,
    bases,
    bits,
    reference_step,
    snapshot,
)

PLAIN = Base(SGD, {"lr": 0.1})


@bases
def test_step_hooks_fire_once_a_step_in_order_until_removed(base: Base) -> None:
    task = Task()
    optimizer = base.gam(task.params)
    calls: list[str] = []

    def note(name: str) -> Any:
        return lambda opt, args, kwargs: calls.append(f"{name}: {type(opt).__name__}")

    handles = [
        register_optimizer_step_pre_hook(note("global before")),
        register_optimizer_step_post_hook(note("global after")),
        *(opt.register_step_pre_hook(note("before")) for opt in (optimizer, optimizer.base_optimizer)),
        *(opt.register_step_post_hook(note("after")) for opt in (optimizer, optimizer.base_optimizer)),
    ]
    try:
        inner = base.cls.__name__
        once = [
            "global before: GAM",
            "before: GAM",
            f"global before: {inner}",
            f"before: {inner}",
            f"after: {inner}",
            f"global after: {inner}",
            "after: GAM",
            "global after: GAM",
        ]
        optimizer.step(task.loss)
        assert calls == once
        optimizer.step(task.loss)
        assert calls == once * 2
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step(task.loss)
    assert calls == once * 2


def test_a_step_pre_hook_may_replace_the_closure() -> None:
    task, twin = Task(), Task()
    optimizer, other = PLAIN.gam(task.params), PLAIN.gam(twin.params)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((args[0], lambda: 2 * task.loss()), kwargs))
    optimizer.step(task.loss)
    other.step(lambda: 2 * twin.loss())
    assert bits(task.params) == bits(twin.params)


@backends
@bases
def test_a_pre_hook_of_the_base_optimizer_sees_the_parameters_and_the_combined_gradient(
    base: Base, backend: str
) -> None:
    task, twin = Task(), Task()
    optimizer, plain = base.gam(task.params, backend=backend), base.plain(twin.params)

    def clip(opt: Optimizer, args: Any, kwargs: Any) -> None:
        torch.nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], 0.05)

    for opt in (optimizer.base_optimizer, plain):
        opt.register_step_pre_hook(clip)
    for _ in range(3):
        before, seen = bits(task.params), []
        handle = optimizer.base_optimizer.register_step_pre_hook(lambda *_, seen=seen: seen.append(bits(task.params)))
        optimizer.step(task.loss)
        handle.remove()
        assert seen == [before]
        reference_step(twin, plain)
        torch.testing.assert_close(task.params, twin.params, rtol=1e-10, atol=1e-12)


def test_a_post_hook_of_gam_sees_the_parameters_after_the_step() -> None:
    task = Task()
    optimizer = PLAIN.gam(task.params)
    seen: list[Any] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(bits(task.params)))
    optimizer.step(task.loss)
    assert seen == [bits(task.params)]


@pytest.mark.parametrize("on_base", [False, True], ids=["on-GAM", "on-base"])
def test_a_step_pre_hook_that_raises_changes_nothing(on_base: bool) -> None:
    task = Task()
    optimizer = MOMENTUM.gam(task.params)
    optimizer.step(task.loss)

    def fail(*_: Any) -> None:
        raise ArithmeticError("from a hook")

    handle = (optimizer.base_optimizer if on_base else optimizer).register_step_pre_hook(fail)
    before = snapshot(optimizer, task.model)
    before.pop("metrics")
    with pytest.raises(ArithmeticError, match="from a hook"):
        optimizer.step(task.loss)
    after = snapshot(optimizer, task.model)
    after.pop("metrics")
    assert after == before
    handle.remove()
    optimizer.step(task.loss)


def test_no_base_hook_fires_in_a_skipped_step() -> None:
    task = Task()
    optimizer = PLAIN.gam(task.params)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("GAM"))
    optimizer.base_optimizer.register_step_pre_hook(lambda *_: calls.append("base"))
    optimizer.step(lambda: task.loss() * float("inf"))
    assert calls == ["GAM"]


@pytest.mark.parametrize("on_base", [False, True], ids=["on-GAM", "on-base"])
@bases
def test_state_dict_hooks_run_before_and_after(base: Base, on_base: bool) -> None:
    optimizer = base.gam(Task().params)
    hooked = optimizer.base_optimizer if on_base else optimizer

    def before(opt: Optimizer) -> None:
        assert opt is hooked
        opt.state["marker"] = 1

    def after(opt: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        assert opt is hooked
        return {**state_dict, "seen": state_dict["state"].pop("marker", None)}

    handle = hooked.register_state_dict_pre_hook(before)
    assert optimizer.state_dict()["state"]["marker"] == 1
    handle.remove()
    optimizer.state.clear()
    hooked.register_state_dict_post_hook(after)
    assert optimizer.state_dict()["seen"] is None
    hooked.register_state_dict_pre_hook(before)
    state_dict = optimizer.state_dict()
    assert state_dict["seen"] == 1
    assert "marker" not in state_dict["state"]


@pytest.mark.parametrize("on_base", [False, True], ids=["on-GAM", "on-base"])
@bases
def test_load_state_dict_hooks_run_before_and_after_in_order(base: Base, on_base: bool) -> None:
    optimizer = base.gam(Task().params)
    hooked = optimizer.base_optimizer if on_base else optimizer
    calls: list[str] = []

    def in_place(opt: Optimizer, state_dict: dict[str, Any]) -> None:
        calls.append("in place")
        state_dict["param_groups"][0]["lr"] = 0.002

    def replaced(opt: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        calls.append("replaced")
        first, *others = state_dict["param_groups"]
        return {**state_dict, "param_groups": [{**first, "lr": 0.003}, *others]}

    def after(opt: Optimizer) -> None:
        assert opt is hooked
        calls.append(f"after, lr {opt.param_groups[0]['lr']}")

    hooked.register_load_state_dict_pre_hook(in_place)
    hooked.register_load_state_dict_post_hook(after)
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["in place", "after, lr 0.002"]

    calls.clear()
    handle = hooked.register_load_state_dict_pre_hook(replaced)
    hooked.register_load_state_dict_post_hook(lambda opt: calls.append("first after"), prepend=True)
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["in place", "replaced", "first after", "after, lr 0.003"]

    calls.clear()
    handle.remove()
    hooked.register_load_state_dict_pre_hook(replaced, prepend=True)
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["replaced", "in place", "first after", "after, lr 0.002"]
