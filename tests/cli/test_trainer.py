"""The training loop by itself."""

from __future__ import annotations

import io
import itertools
from typing import Any

import pytest
import torch

from gam_fused.cli.evaluation import loss_and_accuracy
from gam_fused.cli.random_state import epoch_order
from gam_fused.cli.recipes import resolve
from gam_fused.cli.schedules import Schedules
from gam_fused.cli.trainer import StepReport, Trainer
from gam_fused.cli.training import build_trainer
from tests.cli.runs import SMALL, TIMES, assert_bitwise_equal, trained, weights

COMBINATIONS = [("mlp", "adamw"), ("cnn", "sam"), ("resnet", "gam"), ("vit", "gam")]


def _ignore(report: StepReport) -> None:
    pass


def _through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _without_times(trainer: Trainer) -> dict[str, Any]:
    state = trainer.state_dict()
    del state["random"], state["progress"]
    state["history"] = [{k: v for k, v in record.items() if k not in TIMES} for record in state["history"]]
    return state


@pytest.mark.parametrize(("model", "optimizer"), COMBINATIONS)
def test_state_dict_continues_bitwise_in_the_middle_of_an_epoch(model: str, optimizer: str) -> None:
    options = {"train_size": 80, "model": model, "optimizer": optimizer}
    config = resolve({**SMALL, **options, "epochs": 2})
    stopped = build_trainer(config)
    calls = itertools.count(1)
    assert not stopped.train_epoch(_ignore, lambda: next(calls) == 3)
    assert stopped.step == 3
    state = _through_a_file(stopped.state_dict())

    resumed = build_trainer(config)
    torch.manual_seed(99)  # whatever the resuming process did before must not matter
    resumed.load_state_dict(state)
    while not resumed.finished:
        resumed.train_epoch(_ignore, lambda: False)
        resumed.end_epoch()
    assert resumed.step == 8
    assert_bitwise_equal(_without_times(resumed), _without_times(trained(2, **options)))


def test_same_seed_same_bits_and_another_seed_others() -> None:
    one, same, other = (weights(trained(seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_epoch_record_agrees_with_a_run_by_hand() -> None:
    """Training loss and accuracy are those of the mini-batches as trained on, before each step."""
    options = {"model": "cnn", "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "lr": 0.05, "epochs": 2}
    config = resolve({**SMALL, **options, "augment": False, "seed": 3})
    trainer, twin = build_trainer(config), build_trainer(config)
    for module in (*trainer.model.modules(), *twin.model.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer.train_epoch(_ignore, lambda: False)
    record = trainer.end_epoch()

    schedules = Schedules(0.05, 0, None, 0, total_steps=16)
    losses, correct = [], 0
    twin.model.train()
    order = epoch_order(160, seed=3, epoch=0, device=torch.device("cpu"))
    for step, indices in enumerate(order.split(20)):
        images, labels = twin.dataset.train.images[indices], twin.dataset.train.labels[indices]
        logits = twin.model(images)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        losses.append(loss.item())
        correct += int((logits.argmax(1) == labels).sum())
        params = list(twin.model.parameters())
        for param, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
            param.data -= schedules.lr_at(step) * grad
    assert record.train_loss == pytest.approx(sum(losses) / 8, rel=1e-6)
    assert record.train_accuracy == correct / 160
    torch.testing.assert_close(weights(trainer), weights(twin), rtol=1e-5, atol=1e-7)
    assert (record.epoch, record.step, record.rho, record.skipped_steps) == (1, 8, None, None)
    assert record.lr == schedules.lr_at(7)


@pytest.mark.parametrize("optimizer", ["sam", "gam", "accelerated-gam"])
def test_training_accuracy_and_loss_are_those_at_theta_not_at_the_adversarial_point(optimizer: str) -> None:
    """With a learning rate of 0 nothing moves, so both can be computed afterwards; rho is large enough to matter."""
    options = {"model": "cnn", "optimizer": optimizer, "lr": 0.0, "rho": 20.0, "augment": False, "seed": 3}
    trainer = build_trainer(resolve({**SMALL, **options}))
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer.train_epoch(_ignore, lambda: False)
    record = trainer.end_epoch()
    loss, accuracy = loss_and_accuracy(trainer.model, trainer.dataset.train)
    assert record.train_accuracy == accuracy
    assert record.train_loss == pytest.approx(loss, rel=1e-6)


def test_a_stop_during_the_last_step_of_an_epoch_leaves_the_epoch_complete() -> None:
    trainer = build_trainer(resolve({**SMALL, "optimizer": "sgd"}))
    steps: list[int] = []
    assert trainer.train_epoch(lambda report: steps.append(report.step), lambda: len(steps) == trainer.batches)
    assert len(steps) == trainer.batches
    assert not trainer.finished
