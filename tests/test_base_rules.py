"""When GAM takes a fused step, and that it is the step which the base optimizer would have taken."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, lr_scheduler, optimizer

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


def assert_same_course(task: Task, twin: Task, fused: GAM, plain: GAM) -> None:
    for param, other in zip(task.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(param, other, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(param.grad, other.grad, rtol=1e-11, atol=1e-13)
    states = [gam.base_optimizer.state_dict()["state"] for gam in (fused, plain)]
    torch.testing.assert_close(*states, rtol=1e-11, atol=1e-13, check_dtype=False)


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
    halves, whole = task.gam(base, backend), twin.gam(base, backend)
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
        torch.testing.assert_close(list(task.model.parameters()), list(twin.model.parameters()), rtol=1e-11, atol=1e-13)
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


# ---------------------------------------------------------------- checkpoints


def plain_optimizer(base: str, task: Task) -> torch.optim.Optimizer:
    """torch's own, over the same groups."""
    cls, options = BASES[base]
    groups = [
        {"params": list(task.model[0].parameters())},
        {"params": [p for layer in task.model[1:] for p in layer.parameters()], "lr": 0.03},
    ]
    return cls(groups, foreach=False, **options)


def kinds_of_state(stepped: Any, model: nn.Module) -> list[dict[str, Any]]:
    states = [stepped.state.get(param, {}) for param in model.parameters()]
    return [{k: (v.dtype, v.device, v.shape) for k, v in state.items() if v is not None} for state in states]


@fusing
@bases
def test_the_state_of_fused_steps_is_that_of_torch_and_goes_on_there(base: str, backend: str) -> None:
    task, twin = Task(), Task()
    fused, plain = task.gam(base, backend), plain_optimizer(base, twin)
    twin.loss().backward()
    plain.step()
    for _ in range(3):
        fused.step(task.loss)
    assert kinds_of_state(fused, task.model) == kinds_of_state(plain, twin.model)
    twin.model.load_state_dict(task.model.state_dict())
    plain.load_state_dict(copy.deepcopy(fused.base_optimizer.state_dict()))
    # From the same numbers, the same step.
    for param, mine in zip(twin.model.parameters(), task.model.parameters(), strict=True):
        param.grad = mine.grad.clone()
    for group in (*fused.param_groups, *plain.param_groups):
        group["foreach"] = False
    fused.base_optimizer.step()
    plain.step()
    assert_same([p.detach() for p in twin.model.parameters()], [p.detach() for p in task.model.parameters()])


@fusing
@bases
def test_fused_steps_go_on_from_the_state_of_torch(base: str, backend: str, launches: list[str]) -> None:
    task, twin, trained = Task(), Task(), Task()
    plain = plain_optimizer(base, trained)
    for _ in range(3):
        plain.zero_grad()
        trained.loss().backward()
        plain.step()
    fused, other = task.gam(base, backend), twin.gam(base, "foreach")
    for gam, owner in ((fused, task), (other, twin)):
        owner.model.load_state_dict(trained.model.state_dict())
        gam.load_state_dict(copy.deepcopy(plain.state_dict()))
        for _ in range(2):
            gam.step(owner.loss)
    assert len(launches) == 4
    assert_same_course(task, twin, fused, other)
    counts = {float(state["step"]) for state in fused.state.values() if "step" in state}
    assert counts == (set() if BASES[base][0] is SGD else {5.0})


# ---------------------------------------------------------------- a launch that raises after another one


def second_launches() -> list[Any]:
    return [pytest.param(base, before) for base in BASES for before in (0, 2)]


@fusing
@pytest.mark.parametrize(("base", "steps_before"), second_launches())
def test_a_second_launch_that_raises_leaves_everything_as_it_was(
    base: str, steps_before: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups: one has stepped when the other fails."""
    task = Task()
    gam = task.gam(base, backend)
    for _ in range(steps_before):
        gam.step(task.loss)
    before = snapshot(task.model, gam)
    launched = []
    cls = type(kernels.resolve(backend))
    name = "sgd_step_" if BASES[base][0] is SGD else "adamw_step_"
    original = getattr(cls, name)

    def fail_later(*args: Any, **options: Any) -> None:
        launched.append(name)
        if len(launched) == 2:
            raise RuntimeError("out of memory")
        original(*args, **options)

    monkeypatch.setattr(cls, name, fail_later)
    with pytest.raises(RuntimeError, match="out of memory"):
        gam.step(task.loss)
    assert_same(before, snapshot(task.model, gam))


# ---------------------------------------------------------------- the guard on the device


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
