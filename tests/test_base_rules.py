"""When GAM takes a fused step, and that it is the step which the base optimizer would have taken."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from gam_fused import GAM, kernels
from gam_fused.kernels.native import NativeBackend
from gam_fused.kernels.reference import ReferenceBackend
from tests.states import assert_same, snapshot

FUSING = [name for name, reason in kernels.available().items() if reason is None and name in ("native", "reference")]
fusing = pytest.mark.parametrize("backend", FUSING)

BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (SGD, {"lr": 0.1}),
    "momentum": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01}),
    "nesterov": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "maximize": (SGD, {"lr": 0.01, "momentum": 0.9, "maximize": True}),
    "Adam": (Adam, {"lr": 0.02, "weight_decay": 0.1}),
    "amsgrad": (Adam, {"lr": 0.02, "amsgrad": True}),
    "AdamW": (AdamW, {"lr": 0.02, "weight_decay": 0.1}),
}
bases = pytest.mark.parametrize("base", BASES)


class Task:
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(3)
        # No bias before BatchNorm: its gradient is rounding noise, of which Adam makes steps of full length.
        self.model = nn.Sequential(nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 3)).to(dtype)
        self.inputs, self.labels = torch.randn(16, 5, dtype=dtype), torch.randint(3, (16,))
        self.poison: float | None = None

    def loss(self) -> Tensor:
        loss = F.cross_entropy(self.model(self.inputs), self.labels)
        return loss if self.poison is None else loss * self.poison

    def gam(self, base: str, backend: str, **options: Any) -> GAM:
        cls, base_options = BASES[base]
        groups = [
            {"params": list(self.model[0].parameters()), "rho": 0.05},
            {"params": [p for layer in self.model[1:] for p in layer.parameters()], "lr": 0.03},
        ]
        shared = {"rho": 0.1, "alpha": 0.4, "model": self.model, "backend": backend}
        return GAM(groups, cls, **{**shared, **base_options, **options})


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the fused steps that were launched."""
    seen: list[str] = []

    def watch(cls: Any, name: str) -> None:
        original = getattr(cls, name)

        def launch(*args: Any, **options: Any) -> None:
            seen.append(name)
            original(*args, **options)

        monkeypatch.setattr(cls, name, launch)

    for cls in (NativeBackend, ReferenceBackend):
        watch(cls, "sgd_step_")
        watch(cls, "adamw_step_")
    return seen


@fusing
@bases
def test_a_fused_step_is_the_base_optimizers(base: str, backend: str, launches: list[str]) -> None:
    task, twin = Task(), Task()
    fused, plain = task.gam(base, backend), twin.gam(base, "foreach")
    for _ in range(10):
        fused.step(task.loss)
        plain.step(twin.loss)
        for param, other in zip(task.model.parameters(), twin.model.parameters(), strict=True):
            torch.testing.assert_close(param, other, rtol=1e-11, atol=1e-13)
            torch.testing.assert_close(param.grad, other.grad, rtol=1e-11, atol=1e-13)
        states = [gam.base_optimizer.state_dict()["state"] for gam in (fused, plain)]
        torch.testing.assert_close(*states, rtol=1e-11, atol=1e-13, check_dtype=False)
    assert len(launches) == 20  # two groups


@fusing
@bases
def test_a_checkpoint_moves_to_the_plain_optimizer_and_back(base: str, backend: str) -> None:
    task, twin = Task(), Task()
    fused, plain = task.gam(base, backend), twin.gam(base, "foreach")
    for gam, owner in ((fused, task), (plain, twin)):
        gam.step(owner.loss)
    first, second = copy.deepcopy(fused.state_dict()), copy.deepcopy(plain.state_dict())
    fused.load_state_dict(second)
    plain.load_state_dict(first)
    fused.step(task.loss)
    plain.step(twin.loss)
    for param, other in zip(task.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(param, other, rtol=1e-11, atol=1e-13)


class OwnSGD(SGD):
    """Might do anything."""


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
def test_a_subclass_steps_itself(backend: str, launches: list[str]) -> None:
    task = Task()
    GAM(task.model.parameters(), OwnSGD, lr=0.1, backend=backend, model=task.model).step(task.loss)
    assert launches == []


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


@fusing
@bases
def test_a_launch_that_raises_leaves_everything_as_it_was(
    base: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Task()
    gam = task.gam(base, backend)
    before = snapshot(task.model, gam)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    for name in ("sgd_step_", "adamw_step_"):
        monkeypatch.setattr(type(kernels.resolve(backend)), name, fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        gam.step(task.loss)
    assert_same(before, snapshot(task.model, gam))


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
