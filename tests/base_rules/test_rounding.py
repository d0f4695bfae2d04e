"""Stochastic rounding of bfloat16 and float16 parameters in whole steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gam_fused import GAM, kernels

BACKENDS = ("native", "foreach", "reference")
NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if (reason := kernels.available()[request.param]) is not None:
        pytest.skip(reason)
    return str(request.param)


class Training:
    """A small network of smooth layers, and GAM around it."""

    def __init__(self, backend: str, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1)).to(dtype)
        self.inputs, self.targets = torch.randn(64, 16).to(dtype), torch.randn(64, 1).to(dtype)
        options = {"lr": 0.05, "rho": 0.05, "alpha": 0.5, "rounding": "stochastic", **settings}
        self.optimizer = GAM(self.model.parameters(), torch.optim.SGD, backend=backend, **options)
        self.adversarial: list[Tensor] = []

    def closure(self) -> Tensor:
        self.adversarial = [param.detach().clone() for param in self.model.parameters()]
        return nn.functional.mse_loss(self.model(self.inputs), self.targets)

    def train(self, steps: int) -> list[Tensor]:
        for _ in range(steps):
            self.optimizer.step(self.closure)
        assert int(self.optimizer.metrics["skipped_steps"]) == 0
        return self.params

    @property
    def params(self) -> list[Tensor]:
        return [param.detach().clone() for param in self.model.parameters()]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(map(torch.equal, first, second))


@NARROW
def test_it_rounds_otherwise_and_the_same_way_each_time(backend: str, dtype: torch.dtype) -> None:
    first, again = Training(backend, dtype), Training(backend, dtype)
    nearest = Training(backend, dtype, rounding="nearest")
    assert equal(first.train(3), again.train(3))
    assert not equal(first.params, nearest.train(3))


def test_the_adversarial_point_is_rounded_stochastically(backend: str) -> None:
    stochastic, nearest = Training(backend, lr=0.0), Training(backend, lr=0.0, rounding="nearest")
    before = stochastic.params
    stochastic.train(1), nearest.train(1)
    assert not equal(stochastic.adversarial, nearest.adversarial)
    assert equal(stochastic.params, before)  # with lr=0, what there is to round is the parameter itself


def test_two_steps_from_one_point_draw_other_bits(backend: str) -> None:
    training = Training(backend, lr=0.0)
    training.train(1)
    first = training.adversarial
    training.train(1)
    assert not equal(training.adversarial, first)


def test_small_updates_add_up(backend: str) -> None:
    """Each update is a sixteenth of the distance between neighbours: to nearest, nothing ever moves."""
    if backend == "foreach":
        pytest.skip("the base optimizer itself updates, and rounds to nearest")

    def moved(rounding: str) -> float:
        weight = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        step = torch.finfo(torch.bfloat16).eps / 2 / 16  # below 1, neighbours are eps/2 apart
        optimizer = GAM([weight], torch.optim.SGD, lr=step, rho=1e-6, alpha=1e-6, backend=backend, rounding=rounding)
        for _ in range(16):
            optimizer.step(lambda: weight.sum() + 1e-6 * weight.square().sum())
        return float((1 - weight.detach().double()).mean() / (16 * step))

    assert moved("nearest") == 0
    # Each of 4096 weights is the sum of at most 16 draws of probability 1/16: a deviation of 1 in it, 1/64 in the mean.
    assert moved("stochastic") == pytest.approx(1, abs=6 / 64)


def test_a_checkpoint_goes_on_with_the_same_bits(backend: str) -> None:
    whole, first = Training(backend, momentum=0.9), Training(backend, momentum=0.9)
    expected = whole.train(4)
    first.train(2)
    second = Training(backend, momentum=0.9)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    assert equal(second.train(2), expected)


def test_wider_parameters_are_not_rounded(backend: str) -> None:
    stochastic = Training(backend, torch.float32)
    assert equal(stochastic.train(2), Training(backend, torch.float32, rounding="nearest").train(2))


def test_an_unknown_rounding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^rounding must be one of 'nearest', 'stochastic', got 'up'\.$"):
        Training("auto", rounding="up")
    wrapped = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match=r"^rounding must be one of"):
        GAM.wrap(wrapped, rounding="up")
    assert GAM.wrap(wrapped, rounding="stochastic").rounding == "stochastic"
