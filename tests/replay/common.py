"""What the replay tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

RHO, ALPHA, LR = 0.1, 0.4, 0.1

MODES: dict[str, dict[str, Any]] = {
    "exact": {"hvp": "exact"},
    "finite_difference": {"hvp": "finite_difference"},
    "between_flatness_steps": {"interval": 2},
}
PASSES = {"exact": [2, 2, 2], "finite_difference": [4, 4, 4], "between_flatness_steps": [2, 1, 2]}
over_modes = pytest.mark.parametrize("mode", MODES)
over_model = pytest.mark.parametrize("with_model", [True, False], ids=["with_model", "without_model"])


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Planted(Exception):
    """A fault that a test has planted."""


class Network(nn.Module):
    """Two layers around ``norm``, which may run several times."""

    def __init__(self, norm: nn.Module, features: int, dims: int, times: int = 1) -> None:
        super().__init__()
        layer = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.first = layer(2, features, *([1] if dims else []))
        self.norm = norm
        self.times = times
        self.shape = (6, 2, *[3] * dims)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        for _ in range(self.times):
            hidden = self.norm(hidden).sin()
        return hidden


def frozen(norm: nn.Module) -> nn.Module:
    return norm.eval().requires_grad_(False)


LAYERS: dict[str, Callable[[], Network]] = {
    "BatchNorm1d": lambda: Network(nn.BatchNorm1d(3), 3, 0),
    "BatchNorm1d of sequences": lambda: Network(nn.BatchNorm1d(3), 3, 1),
    "BatchNorm2d": lambda: Network(nn.BatchNorm2d(3), 3, 2),
    "BatchNorm3d": lambda: Network(nn.BatchNorm3d(3), 3, 3),
    "cumulative": lambda: Network(nn.BatchNorm1d(3, momentum=None), 3, 0),
    "momentum 1": lambda: Network(nn.BatchNorm1d(3, momentum=1.0), 3, 0),
    "not affine": lambda: Network(nn.BatchNorm1d(3, affine=False), 3, 0),
    "not tracked": lambda: Network(nn.BatchNorm1d(3, track_running_stats=False), 3, 0),
    "eval": lambda: Network(nn.BatchNorm1d(3).eval(), 3, 0),
    "frozen": lambda: Network(frozen(nn.BatchNorm1d(3)), 3, 0),
    "InstanceNorm1d": lambda: Network(nn.InstanceNorm1d(3, track_running_stats=True), 3, 1),
    "InstanceNorm2d": lambda: Network(nn.InstanceNorm2d(3, affine=True, track_running_stats=True), 3, 2),
    "InstanceNorm3d": lambda: Network(nn.InstanceNorm3d(3, track_running_stats=True), 3, 3),
    "InstanceNorm1d eval": lambda: Network(nn.InstanceNorm1d(3, track_running_stats=True).eval(), 3, 1),
    "twice in one pass": lambda: Network(nn.BatchNorm1d(3), 3, 0, times=2),
    "cumulative, twice in one pass": lambda: Network(nn.BatchNorm1d(3, momentum=None), 3, 0, times=2),
    "two in a row": lambda: Network(nn.Sequential(nn.BatchNorm1d(3), nn.Tanh(), nn.BatchNorm1d(3)), 3, 0),
    "subclass": lambda: Network(DoubledBatchNorm(3), 3, 0),
    "functional": lambda: Network(FunctionalBatchNorm(3), 3, 0),
    "functional by keyword": lambda: Network(FunctionalBatchNorm(3, by_keyword=True), 3, 0),
    "torch.batch_norm": lambda: Network(TorchBatchNorm(3), 3, 0),
    "torch.instance_norm": lambda: Network(TorchInstanceNorm(3), 3, 1),
}


class DoubledBatchNorm(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class FunctionalBatchNorm(nn.Module):
    """Running statistics that no layer of PyTorch's owns."""

    def __init__(self, features: int, by_keyword: bool = False) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("variance", torch.ones(features))
        self.by_keyword = by_keyword

    def forward(self, inputs: Tensor) -> Tensor:
        if self.by_keyword:
            return F.batch_norm(inputs, running_mean=self.mean, running_var=self.variance, training=True)
        return F.batch_norm(inputs, self.mean, self.variance, None, None, True)


class TorchBatchNorm(FunctionalBatchNorm):
    def forward(self, inputs: Tensor) -> Tensor:
        return torch.batch_norm(inputs, None, None, self.mean, self.variance, True, 0.1, 1e-5, False)


class TorchInstanceNorm(FunctionalBatchNorm):
    def forward(self, inputs: Tensor) -> Tensor:
        return torch.instance_norm(inputs, None, None, self.mean, self.variance, True, 0.1, 1e-5, False)


def loss_of(model: nn.Module, inputs: Tensor) -> Tensor:
    return model(inputs).square().mean()
