"""What the device decides, what the host decides, and which back end follows parameters to another device."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from gam_fused import GAM, kernels
from gam_fused.kernels import extension
from tests.states import assert_same, snapshot

FUSING = [name for name, reason in kernels.available().items() if reason is None and name in ("native", "reference")]
fusing = pytest.mark.parametrize("backend", FUSING)


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host takes no decision but those that a device cannot."""
    monkeypatch.setattr(GAM, "_guards_on_device", lambda _, transaction, __: not transaction.replay.rebinds)


class Averaging(nn.Module):
    """A linear model whose running mean is written in place, bound anew, resized, or registered under a new name."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, inputs: Tensor) -> Tensor:
        update = 0.9 * self.mean[:1] + 0.1 * inputs.mean()
        if self.how == "written in place":
            self.mean.copy_(update)
        elif self.how == "bound anew":
            self.mean = update
        elif self.how == "resized":
            with torch.no_grad():
                self.mean.resize_(2).fill_(update.item())
        else:
            self.register_buffer("latest", update, persistent=False)
        return (inputs @ self.weight).cos().sum()


@fusing
@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("how", ["written in place", "bound anew", "resized", "a new name"])
def test_a_skipped_step_leaves_every_kind_of_buffer_as_it_was(how: str, backend: str) -> None:
    torch.manual_seed(0)
    model = Averaging(how)
    gam = GAM(model.parameters(), lr=0.1, momentum=0.9, model=model, backend=backend)
    inputs = torch.randn(4, 3)
    gam.step(lambda: model(inputs))
    before = snapshot(model, gam)
    for poison in (float("nan"), float("inf")):
        gam.step(lambda value=poison: model(inputs * value))
    after = snapshot(model, gam)
    assert_same(
        [before[what] for what in ("params", "buffers", "state")], [after[w] for w in ("params", "buffers", "state")]
    )
    assert float(gam.metrics["skipped_steps"]) == 2
    gam.step(lambda: model(inputs + 1))
    assert float(gam.metrics["skipped_steps"]) == 2
    with pytest.raises(AssertionError):  # they go on with the next step that is taken
        assert_same(before["buffers"], snapshot(model, gam)["buffers"])


@fusing
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(("steepness", "steps"), [(1.0, True), (100.0, False)])
def test_launches_of_two_dtypes_take_one_decision(
    steepness: float, steps: bool, on_device: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At θ_adv alone, the gradient is e¹⁰⁰ times as large: float64 can hold its norm, the launch in float32 cannot."""
    monkeypatch.setattr(GAM, "_guards_on_device", lambda *_: on_device)
    wide, narrow = nn.Parameter(torch.zeros(2, dtype=torch.float64)), nn.Parameter(torch.ones(2))
    groups = [{"params": [wide], "lr": 1e-28 if steepness == 100.0 else 0.1}, {"params": [narrow], "lr": 0.1}]
    gam = GAM(groups, torch.optim.SGD, rho=2**0.5, alpha=1e-20, lr=0.1, backend=backend)
    before = [wide.detach().clone(), narrow.detach().clone()]
    gam.step(lambda: (steepness * wide).exp().sum() + 1e-3 * narrow.square().sum())
    has_moved = [not torch.equal(old, new) for old, new in zip(before, (wide, narrow), strict=True)]
    # The host takes the long way, on which nothing overflows; a device must not wait for the host.
    assert has_moved == ([True, True] if steps or not on_device else [False, False])
    assert float(gam.metrics["skipped_steps"]) == (0 if steps or not on_device else 1)


@fusing
@pytest.mark.parametrize("on_device", [False, True])
def test_gradients_in_range_of_float16_step_whatever_their_norm(
    on_device: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """‖g‖ is beyond 65504, the largest float16; no element of it is."""
    monkeypatch.setattr(GAM, "_guards_on_device", lambda *_: on_device)
    param = nn.Parameter(torch.ones(40_000, dtype=torch.float16))
    gam = GAM([param], lr=1e-4, rho=0.01, alpha=0.01, backend=backend)
    gam.step(lambda: (1000 * param.float() + 0.005 * param.float().square()).sum())
    assert float(gam.metrics["grad_norm"]) > torch.finfo(torch.float16).max
    assert float(gam.metrics["skipped_steps"]) == 0
    assert bool((param < 1).all())


@fusing
@pytest.mark.parametrize("on_device", [False, True])
def test_a_combination_that_overflows_float16_is_skipped(
    on_device: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GAM, "_guards_on_device", lambda *_: on_device)
    param = nn.Parameter(torch.full((4,), 8.0, dtype=torch.float16))
    gam = GAM([param], lr=1e-4, rho=1.0, alpha=7e4, backend=backend)
    before = param.detach().clone()
    gam.step(lambda: param.square().sum())
    assert torch.equal(param, before)
    assert float(gam.metrics["skipped_steps"]) == 1


@fusing
def test_a_failure_before_the_launch_leaves_everything_as_it_was(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever may fail comes before the launch that cannot be undone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.GELU())
    gam = GAM(model.parameters(), lr=0.1, momentum=0.9, model=model, backend=backend)
    inputs = torch.randn(8, 3)
    gam.step(lambda: model(inputs).sum())
    before = snapshot(model, gam)

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("gam_fused.replay.Replay.finish", fail)
    with pytest.raises(MemoryError):
        gam.step(lambda: model(inputs).sum())
    assert_same(before, snapshot(model, gam))
    assert gam.steps == 1


# ---------------------------------------------------------------- back ends follow parameters


@pytest.fixture
def native_on_the_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "unavailable_reason", lambda: None)
    monkeypatch.setattr(extension, "cuda_unavailable_reason", lambda: "it has no CUDA kernels.")


def move_to_another_device(gam: GAM) -> None:
    """As model.cuda() does, to a device that is always here."""
    for group in gam.param_groups:
        group["params"] = [nn.Parameter(param.detach().to("meta")) for param in group["params"]]


@pytest.mark.usefixtures("native_on_the_cpu_only")
def test_auto_follows_parameters_to_a_device_that_native_has_no_kernels_for() -> None:
    gam = GAM([nn.Parameter(torch.ones(2))], lr=0.1)
    assert gam.backend == "native"
    move_to_another_device(gam)
    gam._check_ready()
    assert gam.backend == "foreach"
    assert gam.metrics["skipped_steps"].device.type == "meta"
    gam.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    gam._check_ready()
    assert gam.backend == "foreach"


@pytest.mark.usefixtures("native_on_the_cpu_only")
def test_native_asked_for_by_name_does_not_follow() -> None:
    gam = GAM([nn.Parameter(torch.ones(2))], lr=0.1, backend="native")
    move_to_another_device(gam)
    with pytest.raises(RuntimeError, match=r"^backend='native' cannot run here: there are no native kernels for meta"):
        gam.step(lambda: torch.zeros(()))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda gam: pickle.loads(pickle.dumps(gam))])
def test_a_copy_wants_the_back_end_that_was_asked_for(duplicate: object, monkeypatch: pytest.MonkeyPatch) -> None:
    gam = GAM([nn.Parameter(torch.ones(2))], lr=0.1)
    monkeypatch.setenv("GAM_FUSED_BACKEND", "reference")
    assert duplicate(gam).backend == "reference"  # type: ignore[operator]
    by_name = GAM([nn.Parameter(torch.ones(2))], lr=0.1, backend="foreach")
    assert duplicate(by_name).backend == "foreach"  # type: ignore[operator]
