"""A fused step is the one that the base optimizer would have taken, in every mode and under every schedule."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from tests.base_rules.common import Task, assert_same_course, bases, fusing
from tests.states import assert_same, snapshot


@fusing
@bases
def test_a_fused_step_is_the_base_optimizers(base: str, backend: str, launches: list[str]) -> None:
    task, twin = Task(), Task()
    fused, plain = task.gam(base, backend), twin.gam(base, "foreach")
    for _ in range(10):
        fused.step(task.loss)
        plain.step(twin.loss)
        assert_same_course(task, twin, fused, plain)
    assert len(launches) == 20  # two groups


@fusing
@pytest.mark.parametrize("around", ["GAM", "base"])
def test_a_scheduler_sees_fused_steps(around: str, backend: str, launches: list[str]) -> None:
    task = Task()
    gam = task.gam("SGD", backend)
    scheduler = torch.optim.lr_scheduler.StepLR(gam if around == "GAM" else gam.base_optimizer, 1, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            gam.step(task.loss)
            scheduler.step()
    assert len(launches) == 6
    assert gam.param_groups[0]["lr"] == 0.1 / 8


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda wrapped: lr_scheduler.StepLR(wrapped, 2, 0.5),
    "CosineAnnealingLR": lambda wrapped: lr_scheduler.CosineAnnealingLR(wrapped, 5),
    "OneCycleLR": lambda wrapped: lr_scheduler.OneCycleLR(wrapped, 0.05, total_steps=8),  # momentum or β₁ as well
}


@fusing
@pytest.mark.parametrize("base", ["nesterov", "AdamW"])
@pytest.mark.parametrize("schedule", list(SCHEDULERS))
@pytest.mark.parametrize("around", ["GAM", "base"])
def test_schedules_and_scheduled_steps_are_those_of_the_plain_optimizer(
    around: str, schedule: str, base: str, backend: str, launches: list[str]
) -> None:
    task, twin = Task(), Task()
    fused, plain = task.gam(base, backend), twin.gam(base, "foreach")
    schedulers = [SCHEDULERS[schedule](gam if around == "GAM" else gam.base_optimizer) for gam in (fused, plain)]
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(6):
            for gam, owner, scheduler in zip((fused, plain), (task, twin), schedulers, strict=True):
                gam.step(owner.loss)
                scheduler.step()
            rates.append([scheduler.get_last_lr() for scheduler in schedulers])
            assert_same_course(task, twin, fused, plain)
    assert all(one == other for one, other in rates)
    assert len({tuple(one) for one, _ in rates}) > 1
    assert len(launches) == 12


@fusing
@pytest.mark.parametrize("base", ["momentum", "Adam"])
@pytest.mark.parametrize(
    ("options", "launched"), [({"hvp": "finite_difference"}, 8), ({"interval": 2}, 4), ({"alpha": 0.0}, 0)], ids=str
)
def test_every_mode_takes_the_step_of_the_base_optimizer(
    base: str, options: dict[str, Any], launched: int, backend: str, launches: list[str]
) -> None:
    """Without a flatness term, in a step or in all of them, the base optimizer steps itself."""
    task, twin = Task(), Task()
    fused, plain = task.gam(base, backend, **options), twin.gam(base, "foreach", **options)
    for _ in range(4):
        fused.step(task.loss)
        plain.step(twin.loss)
    assert len(launches) == launched
    if "hvp" not in options:
        assert_same_course(task, twin, fused, plain)
        return
    for param, other in zip(task.model.parameters(), twin.model.parameters(), strict=True):
        # A difference of gradients over a step of 1e-3 or less magnifies what is rounded.
        torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-8)


@fusing
@bases
def test_a_step_in_two_halves_is_fused_as_well(base: str, backend: str, launches: list[str]) -> None:
    task, twin = Task(), Task()
    # The forward passes of the halves are the user's own, on PyTorch's layers.
    halves, whole = task.gam(base, backend), twin.gam(base, backend, second_order="off")
    for _ in range(3):
        halves.first_step(task.loss())
        halves.second_step(task.loss())
        whole.step(twin.loss)
    assert len(launches) == 12
    assert_same(snapshot(task.model, halves), snapshot(twin.model, whole))


@fusing
@bases
def test_parameters_that_join_later_take_their_first_step_beside_others(base: str, backend: str) -> None:
    task, twin = Task(), Task()
    fused, plain = task.gam(base, backend), twin.gam(base, "foreach")
    for number in range(4):
        for gam, owner in ((fused, task), (plain, twin)):
            owner.model[1].requires_grad_(number > 1)  # of the same group as the last layer
            gam.step(owner.loss)
    assert_same_course(task, twin, fused, plain)


@fusing
def test_momentum_may_be_switched_on_between_steps(backend: str, launches: list[str]) -> None:
    task, twin = Task(), Task()
    fused, plain = task.gam("SGD", backend), twin.gam("SGD", "foreach")
    for number in range(5):
        for gam, owner in ((fused, task), (plain, twin)):
            for group in gam.param_groups:
                group.update(momentum=0.9 if number > 1 else 0.0, dampening=0.25)
            gam.step(owner.loss)
        assert_same_course(task, twin, fused, plain)
    assert len(launches) == 10


@fusing
@pytest.mark.parametrize("base", ["momentum", "Adam", "AdamW"])
def test_the_learning_rate_may_be_a_tensor(base: str, backend: str, launches: list[str]) -> None:
    task, twin = Task(), Task()
    fused, plain = task.gam(base, backend), twin.gam(base, "foreach")
    for group, other in zip(fused.param_groups, plain.param_groups, strict=True):
        group["lr"], other["lr"] = torch.tensor(0.0625), 0.0625
    for _ in range(3):
        fused.step(task.loss)
        plain.step(twin.loss)
    assert_same_course(task, twin, fused, plain)
    assert len(launches) == 6
