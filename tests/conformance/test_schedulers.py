"""Learning-rate schedulers built on GAM or on its base optimizer steer the steps exactly as they steer a plain one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiplicativeLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from gam_fused import GAM
from tests.conformance.common import Base, Task, assert_same_course, bits, reference_step

Schedule = Callable[[Optimizer], Any]

SCHEDULES: dict[str, Schedule] = {
    "StepLR": lambda opt: StepLR(opt, step_size=2, gamma=0.5),
    "ExponentialLR": lambda opt: ExponentialLR(opt, gamma=0.8),
    "LambdaLR-by-group": lambda opt: LambdaLR(opt, [lambda step: 0.9**step, lambda step: 1 / (1 + step)]),
    "MultiplicativeLR": lambda opt: MultiplicativeLR(opt, lambda step: 0.7),
    "PolynomialLR": lambda opt: PolynomialLR(opt, total_iters=5, power=2.0),
    "CosineAnnealingLR": lambda opt: CosineAnnealingLR(opt, T_max=6),
    "CosineAnnealingWarmRestarts": lambda opt: CosineAnnealingWarmRestarts(opt, T_0=3),
    "OneCycleLR": lambda opt: OneCycleLR(opt, max_lr=0.2, total_steps=8),
    "CyclicLR": lambda opt: CyclicLR(opt, base_lr=0.01, max_lr=0.2, step_size_up=2),
    "SequentialLR": lambda opt: SequentialLR(
        opt, [LinearLR(opt, start_factor=0.1, total_iters=3), CosineAnnealingLR(opt, T_max=4)], milestones=[3]
    ),
    "ChainedScheduler": lambda opt: ChainedScheduler([ExponentialLR(opt, 0.9), StepLR(opt, 3)], optimizer=opt),
    "ReduceLROnPlateau": lambda opt: ReduceLROnPlateau(opt, patience=0, threshold=0.5, factor=0.5),
}
BASES = [
    pytest.param(Base(SGD, {"lr": 0.1, "momentum": 0.9}), id="SGD"),
    pytest.param(Base(AdamW, {"lr": 0.05}), id="AdamW"),
    pytest.param(Base(SGD, {"lr": torch.tensor(0.1), "momentum": 0.9}), id="SGD-tensor-lr"),
]


def two_groups(task: Task) -> list[dict[str, Any]]:
    model = task.model
    return [{"params": [*model.first.parameters(), *model.middle.parameters()]}, {"params": model.last.parameters()}]


def settings(optimizer: Optimizer) -> Any:
    """Whatever a scheduler may set."""
    return [
        {name: bits(group[name]) for name in ("lr", "momentum", "betas") if name in group}
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("on_base", [False, True], ids=["on-GAM", "on-base"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("base", BASES)
def test_a_schedule_steers_gam_as_it_steers_a_plain_optimizer(base: Base, schedule: str, on_base: bool) -> None:
    task, twin = Task(), Task()
    optimizer, plain = base.gam(two_groups(task)), base.plain(two_groups(twin))
    scheduler = SCHEDULES[schedule](optimizer.base_optimizer if on_base else optimizer)
    plain_scheduler = SCHEDULES[schedule](plain)
    course = []
    for _ in range(7):
        assert settings(optimizer) == settings(plain)
        course.append(settings(optimizer))
        loss = optimizer.step(task.loss)
        reference_step(twin, plain)
        assert_same_course(optimizer, task.params, plain, twin.params)
        for one in (scheduler, plain_scheduler):
            one.step(loss) if isinstance(one, ReduceLROnPlateau) else one.step()
    assert any(now != course[0] for now in course), "the schedule did nothing"


@pytest.mark.parametrize("on_base", [False, True], ids=["on-GAM", "on-base"])
@pytest.mark.parametrize("cls", [SGD, Adam])
def test_one_cycle_cycles_momentum(cls: type[Optimizer], on_base: bool) -> None:
    task = Task()
    base = Base(cls, {"momentum": 0.9} if cls is SGD else {})
    optimizer = base.replace(lr=0.1).gam(task.params)
    scheduler = OneCycleLR(optimizer.base_optimizer if on_base else optimizer, max_lr=0.1, total_steps=10)

    def momentum() -> float:
        group = optimizer.param_groups[0]
        return group["momentum"] if cls is SGD else group["betas"][0]

    seen = []
    for _ in range(10):
        seen.append(momentum())
        optimizer.step(task.loss)
        if len(seen) < 10:
            scheduler.step()
    # As OneCycleLR documents: from max_momentum down to base_momentum while lr rises, and back.
    assert seen[0] == pytest.approx(0.95)
    assert min(seen) == pytest.approx(0.85)
    assert seen[-1] == pytest.approx(0.95)


@pytest.mark.parametrize("on_base", [False, True], ids=["on-GAM", "on-base"])
def test_a_schedule_follows_first_and_second_step_without_a_warning(on_base: bool) -> None:
    task, twin = Task(), Task()
    base = Base(SGD, {"lr": 0.1})
    optimizer, plain = base.gam(task.params), base.plain(twin.params)
    scheduler = ExponentialLR(optimizer.base_optimizer if on_base else optimizer, gamma=0.5)
    plain_scheduler = ExponentialLR(plain, gamma=0.5)
    for _ in range(3):
        optimizer.first_step(task.loss())
        optimizer.second_step(task.loss())
        reference_step(twin, plain)
        assert_same_course(optimizer, task.params, plain, twin.params)
        scheduler.step()
        plain_scheduler.step()


@pytest.mark.parametrize("on_base", [False, True], ids=["on-GAM", "on-base"])
def test_stepping_the_scheduler_first_warns_as_pytorch_does(on_base: bool) -> None:
    optimizer = Base(SGD, {"lr": 0.1}).gam(Task().params)
    scheduler = ExponentialLR(optimizer.base_optimizer if on_base else optimizer, gamma=0.5)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


@pytest.mark.parametrize("on_base", [False, True], ids=["on-GAM", "on-base"])
def test_a_resumed_run_continues_its_schedule_bitwise(on_base: bool) -> None:
    def build(task: Task) -> tuple[GAM, Any]:
        optimizer = Base(SGD, {"lr": 0.1, "momentum": 0.9}).gam(task.params, interval=2)
        return optimizer, SCHEDULES["OneCycleLR"](optimizer.base_optimizer if on_base else optimizer)

    def train(task: Task, optimizer: GAM, scheduler: Any, steps: int) -> None:
        for _ in range(steps):
            optimizer.step(task.loss)
            scheduler.step()

    straight = Task()
    train(straight, *build(straight), 7)

    first = Task()
    optimizer, scheduler = build(first)
    train(first, optimizer, scheduler, 3)
    resumed = Task()
    resumed.model.load_state_dict(first.model.state_dict())
    optimizer_again, scheduler_again = build(resumed)
    scheduler_again.load_state_dict(scheduler.state_dict())
    optimizer_again.load_state_dict(optimizer.state_dict())
    train(resumed, optimizer_again, scheduler_again, 4)
    assert bits(resumed.params) == bits(straight.params)


def test_a_scheduler_attached_before_wrap_stays_in_force() -> None:
    task, twin = Task(), Task()
    base = Base(SGD, {"lr": 0.1})
    plain, other = base.plain(task.params), base.plain(twin.params)
    scheduler, other_scheduler = (ExponentialLR(opt, gamma=0.5) for opt in (plain, other))
    optimizer = GAM.wrap(plain, rho=0.2, alpha=0.7)
    for _ in range(3):
        optimizer.step(task.loss)
        reference_step(twin, other, rho=0.2, alpha=0.7)
        assert_same_course(optimizer, task.params, other, twin.params)
        scheduler.step()
        other_scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.1 / 8


@pytest.mark.parametrize("name", ["rho", "alpha", "xi"])
def test_a_schedule_of_gams_own_hyperparameters_takes_effect_in_the_next_step(name: str) -> None:
    task, twin = Task(), Task()
    base = Base(SGD, {"lr": 0.1})
    optimizer, plain = base.gam(task.params), base.plain(twin.params)
    for value in (0.0, 0.05, 0.5):
        optimizer.param_groups[0][name] = value
        optimizer.step(task.loss)
        reference_step(twin, plain, **{name: value})
        assert_same_course(optimizer, task.params, plain, twin.params)
