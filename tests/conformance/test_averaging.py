"""Weight averaging beside GAM: the average is of the weights that steps end with, never of an adversarial point."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from gam_fused import GAM
from tests.conformance.common import CLOSE, Base, Task, backends, bits

BASE = Base(SGD, {"lr": 0.1, "momentum": 0.9})


@backends
def test_equal_average_is_the_mean_of_the_weights_after_each_step(backend: str) -> None:
    task = Task()
    optimizer = BASE.gam(task.params, backend=backend)
    averaged = AveragedModel(task.model)
    visited = []
    for _ in range(5):
        optimizer.step(task.loss)
        averaged.update_parameters(task.model)
        visited.append([param.detach().clone() for param in task.params])
    means = [torch.stack(values).mean(0) for values in zip(*visited, strict=True)]
    torch.testing.assert_close([param.detach() for param in averaged.parameters()], means, **CLOSE)


@backends
def test_exponential_average_updated_by_a_step_hook_is_of_the_weights_after_each_step(backend: str) -> None:
    task, decay = Task(), 0.7
    optimizer = BASE.gam(task.params, backend=backend)
    averaged = AveragedModel(task.model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    optimizer.register_step_post_hook(lambda *_: averaged.update_parameters(task.model))
    expected: list[Tensor] = []
    for _ in range(5):
        optimizer.step(task.loss)
        if not expected:
            expected = [param.detach().clone() for param in task.params]
        else:
            expected = [decay * e + (1 - decay) * p.detach() for e, p in zip(expected, task.params, strict=True)]
    torch.testing.assert_close([param.detach() for param in averaged.parameters()], expected, **CLOSE)


def test_a_model_used_only_as_teacher_in_the_closure_is_left_alone() -> None:
    task = Task()
    optimizer = BASE.gam(task.params)
    teacher = AveragedModel(task.model)
    before = bits(dict(teacher.state_dict()))
    for _ in range(2):
        optimizer.step(lambda: task.loss() + F.mse_loss(task.model(task.inputs), teacher(task.inputs).detach()))
    assert bits(dict(teacher.state_dict())) == before
    assert all(param.grad is None for param in teacher.parameters())


def test_averaged_buffers_and_update_bn_see_statistics_that_advance_once_a_step() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    inputs, targets = torch.randn(8, 3).double(), torch.randn(8, 2).double()
    optimizer = GAM(model.parameters(), SGD, rho=0.2, alpha=0.7, lr=0.0, model=model)
    averaged = AveragedModel(model, use_buffers=True)
    for _ in range(3):
        optimizer.step(lambda: F.mse_loss(model(inputs), targets))
        averaged.update_parameters(model)
    # With lr = 0 every step sees one batch of one distribution: r ← 0.9 r + 0.1 m, from 0.
    features = model[0](inputs).detach()
    tracked = [features.mean(0) * (1 - 0.9**k) for k in (1, 2, 3)]
    assert model[1].num_batches_tracked == 3
    torch.testing.assert_close(model[1].running_mean, tracked[-1], **CLOSE)
    torch.testing.assert_close(averaged.module[1].running_mean, torch.stack(tracked).mean(0), **CLOSE)
    update_bn([inputs], averaged)
    torch.testing.assert_close(averaged.module[1].running_mean, features.mean(0), **CLOSE)


@pytest.mark.parametrize("on_base", [False, True], ids=["on-GAM", "on-base"])
def test_swa_schedule_anneals_the_learning_rate_of_the_steps(on_base: bool) -> None:
    task = Task()
    optimizer = Base(SGD, {"lr": 0.4}).gam(task.params)
    target: Any = optimizer.base_optimizer if on_base else optimizer
    scheduler = SWALR(target, swa_lr=0.1, anneal_epochs=3, anneal_strategy="linear")
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step(task.loss)
        scheduler.step()
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.1])
