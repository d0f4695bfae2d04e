"""The loss of a convex problem moves the right way, under every configuration and schedule that PyTorch tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adagrad
from torch.optim.lr_scheduler import ReduceLROnPlateau

from gam_fused import GAM
from tests.conformance.common import BACKENDS, CONFIGURATIONS, INFOS, Base

STEPS = 20

# Twenty steps have to get somewhere; SGD's stays below 2 over the largest curvature.
LEARNING_RATES = {SGD: 0.02, Adagrad: 0.5}

SCHEDULES = [
    pytest.param(Base(info.optim_cls), constructors, id=f"{info.name}-schedule{number}")
    for info in INFOS
    for number, constructors in enumerate(info.scheduler_inputs)
]


def brisk(base: Base) -> Base:
    lr = LEARNING_RATES.get(base.cls, 0.1)
    return base.replace(lr=torch.tensor(lr) if isinstance(base.kwargs.get("lr"), Tensor) else lr)


class LeastSquares:
    """‖W x + b‖², 10 residuals; its minimum is 0."""

    def __init__(self, contiguous: bool = True) -> None:
        self.inputs = torch.randn(5)
        if contiguous:
            self.weight, self.bias = Parameter(torch.randn(10, 5)), Parameter(torch.randn(10))
        else:
            self.weight, self.bias = Parameter(torch.randn(10, 5, 2)[..., 0]), Parameter(torch.randn(10, 2)[..., 0])

    def loss(self) -> Tensor:
        return (self.weight.mv(self.inputs) + self.bias).square().sum()

    def train(self, optimizer: GAM, schedulers: list[Any] | None = None) -> float:
        """The ratio of the loss after so many steps of an ordinary training loop to the loss before."""

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        initial = self.loss().item()
        for _ in range(STEPS):
            loss = optimizer.step(closure)
            for scheduler in schedulers or []:
                scheduler.step(loss) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
        return self.loss().item() / initial


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("base", CONFIGURATIONS)
def test_loss_falls_by_half_or_doubles_when_maximized(base: Base, backend: str, contiguous: bool) -> None:
    problem = LeastSquares(contiguous)
    optimizer = brisk(base).gam([problem.weight, problem.bias], backend=backend)
    ratio = problem.train(optimizer)
    assert ratio > 2 if base.maximize else ratio < 0.5


@pytest.mark.parametrize("on_base", [False, True], ids=["on-GAM", "on-base"])
@pytest.mark.parametrize(("base", "constructors"), SCHEDULES)
def test_loss_falls_by_half_under_a_schedule_of_two_groups(
    base: Base, constructors: list[Callable[..., Any]], on_base: bool
) -> None:
    problem = LeastSquares()
    lr = LEARNING_RATES.get(base.cls, 0.1)
    optimizer = brisk(base).gam([{"params": [problem.weight]}, {"params": [problem.bias], "lr": lr / 2}])
    schedulers = [constructor(optimizer.base_optimizer if on_base else optimizer) for constructor in constructors]
    assert problem.train(optimizer, schedulers) < 0.5
