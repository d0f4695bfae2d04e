"""The guard on the device: what is not finite stays out, though the host never learns of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gam_fused import GAM
from tests.base_rules.common import Task, bases, fusing
from tests.states import assert_same, snapshot


@pytest.fixture
def guard_on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens on a GPU: the host never learns whether a launch has stepped."""
    monkeypatch.setattr(GAM, "_guards_on_device", lambda *_: True)


@fusing
@bases
@pytest.mark.usefixtures("guard_on_device")
def test_the_guard_on_the_device_keeps_everything_that_is_not_finite_out(base: str, backend: str) -> None:
    task = Task()
    gam = task.gam(base, backend)
    gam.step(task.loss)
    before = snapshot(task.model, gam)
    for poison in (float("nan"), float("inf")):
        task.poison = poison
        gam.step(task.loss)
    after = snapshot(task.model, gam)
    for what in ("params", "buffers"):
        assert_same(before[what], after[what])
    assert_same(before["state"], after["state"])
    assert int(gam.metrics["skipped_steps"]) == 2
    assert gam.steps == 3


@fusing
@bases
def test_the_guard_on_the_device_takes_the_same_finite_steps(
    base: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    for on_device in (False, True):
        monkeypatch.setattr(GAM, "_guards_on_device", lambda *_, answer=on_device: answer)
        task = Task()
        gam = task.gam(base, backend)
        for _ in range(4):
            gam.step(task.loss)
        states.append(snapshot(task.model, gam))
    assert_same(*states)


class _Scaled(torch.autograd.Function):
    """Its argument; gradients come out ``scale`` times as large, and gradients of those ``scale_of_second`` times."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: float, scale_of_second: float) -> Tensor:
        ctx.scales = scale, scale_of_second
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        scale, scale_of_second = ctx.scales
        if scale_of_second != 1:
            grad = _Scaled.apply(grad, scale_of_second, 1.0)
        return grad * scale, None, None


class PoisonedTask(Task):
    """The loss, the gradient or the HVP (``what``) is not finite in one pass of a step: the first (0) or second (1)."""

    def __init__(self, what: str, value: float, at: int) -> None:
        super().__init__()
        self.what, self.value, self.at = what, value, at
        self.is_poisoned = False
        self.passes = 0

    def loss(self) -> Tensor:
        is_poisoned = self.is_poisoned and self.passes % 2 == self.at
        self.passes += 1
        loss = F.cross_entropy(self.model(self.inputs), self.labels)
        if not is_poisoned:
            return loss
        if self.what == "loss":
            return loss + self.value  # whose gradient is finite
        scales = (self.value, 1.0) if self.what == "gradient" else (1.0, self.value)
        return loss + _Scaled.apply(self.model[3].bias, *scales).exp().sum()


poisons = pytest.mark.parametrize("what", ["loss", "gradient", "hvp"])


@fusing
@bases
@poisons
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.usefixtures("guard_on_device")
def test_the_guard_on_the_device_looks_at_losses_gradients_and_hvps(
    base: str, backend: str, what: str, at: int, value: float
) -> None:
    task = PoisonedTask(what, value, at)
    gam = task.gam(base, backend)
    for _ in range(2):
        gam.step(task.loss)
    before = snapshot(task.model, gam)
    task.is_poisoned = True
    gam.step(task.loss)
    after = snapshot(task.model, gam)
    for kept in ("params", "buffers", "state", "groups"):
        assert_same(before[kept], after[kept], kept)
    assert (int(gam.metrics["skipped_steps"]), gam.steps) == (1, 3)
    task.is_poisoned = False
    gam.step(task.loss)
    assert int(gam.metrics["skipped_steps"]) == 1
    moved = snapshot(task.model, gam)["params"]
    assert not any(torch.equal(before["params"][name], moved[name]) for name in moved)


@fusing
@bases
@poisons
@pytest.mark.parametrize("bad_steps", [(0,), (0, 1), (2,), (1, 3)], ids=str)
def test_both_guards_go_the_same_way_around_what_is_not_finite(
    base: str, backend: str, what: str, bad_steps: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if base == "momentum" and 0 in bad_steps:
        base = "nesterov"  # on a device, no first step with dampening is fused
    ends = []
    for on_device in (False, True):
        monkeypatch.setattr(GAM, "_guards_on_device", lambda *_, answer=on_device: answer)
        task = PoisonedTask(what, float("nan"), 1)
        gam = task.gam(base, backend)
        for number in range(5):
            task.is_poisoned = number in bad_steps
            gam.step(task.loss)
        end = snapshot(task.model, gam)
        ends.append([end["params"], end["buffers"], end["state"], int(gam.metrics["skipped_steps"]), gam.steps])
    assert_same(*ends)
    assert ends[0][3] == len(bad_steps)
