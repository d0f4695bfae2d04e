"""Small models, and the same steps taken with a graph and without."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gam_fused import GAM, AcceleratedGAM
from gam_fused.compiled import CompiledStep

Loss = Callable[..., Tensor]
AnyGAM = GAM | AcceleratedGAM

SETTINGS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "rho": 0.3, "alpha": 0.7}


class Task:
    """A model, and batches of 8, 8 and 5 for it."""

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        self.model = model.double()
        inputs = inputs.double() if inputs.is_floating_point() else inputs
        labels = torch.randint(3, (len(inputs),))
        self.batches = list(zip(inputs.split(8), labels.split(8), strict=True))
        self.autocast = False

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return F.cross_entropy(self.model(inputs), labels)


def mlp(*more: nn.Module) -> Task:
    model = nn.Sequential(nn.Linear(6, 10), nn.GELU(), *more, nn.Linear(10, 3))
    return Task(model, torch.randn(21, 6))


def convolutions() -> Task:
    """Two- and one-dimensional, strided, in groups and transposed, with batch and group normalization and dropout."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.Conv2d(4, 4, 3, stride=2, groups=2),
        nn.GroupNorm(2, 4),
        nn.Dropout2d(0.3),
        nn.SiLU(),
        nn.ConvTranspose2d(4, 2, 2),
        nn.Flatten(2),
        nn.Conv1d(2, 2, 3, padding="same"),
        nn.BatchNorm1d(2, affine=False),
        nn.Flatten(),
        nn.Linear(2 * 4 * 4, 3),
    )
    return Task(model, torch.randn(21, 2, 8, 8))


class Attention(nn.Module):
    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(
            8, 2, 16, dropout=dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(tokens)).mean(1))


def transformer() -> Task:
    return Task(Attention(), torch.randint(11, (21, 4)))


def compiled(optimizer: AnyGAM, loss_fn: Loss, backend: Any = "eager", **options: Any) -> CompiledStep:
    """By a back end that compiles nothing, unless another is given: what Dynamo has captured runs as it is."""
    return optimizer.compile(loss_fn, backend=backend, **options)


def plain(optimizer: AnyGAM, loss_fn: Loss) -> Callable[..., Tensor]:
    """The same steps without a graph."""
    return lambda *args, **kwargs: optimizer.step(lambda: loss_fn(*args, **kwargs))


Course = Callable[[Task, Any, Callable[..., Tensor]], Iterable[Tensor]]
"""Takes steps and returns their losses."""


def all_batches(task: Task, optimizer: AnyGAM, step: Callable[..., Tensor]) -> list[Tensor]:
    return [step(*batch) for batch in task.batches]


def assert_same_course(
    start: Task,
    backend: Any = "eager",
    course: Course = all_batches,
    *,
    build: Callable[[Task], AnyGAM] = lambda task: GAM(task.model.parameters(), **SETTINGS),
    tolerance: float = 1e-10,
    options: dict[str, Any] | None = None,
) -> CompiledStep:
    """With a graph and without, on copies of ``start``, everything that steps leave agrees.

    Losses, metrics, parameters, buffers, gradients, optimizer state and random states, to ``tolerance`` of each
    tensor's largest element.
    """
    ends = []
    for with_graph in (False, True):
        task = copy.deepcopy(start)
        optimizer = build(task)
        step: Any = (
            compiled(optimizer, task.loss, backend, **options or {}) if with_graph else plain(optimizer, task.loss)
        )
        torch.manual_seed(3)
        losses = [loss.clone() for loss in course(task, optimizer, step)]
        ends.append(_left(task, optimizer, losses))
    expected, actual = ends
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        scale = float(tensor.abs().max()) if tensor.is_floating_point() and tensor.numel() else 0.0
        torch.testing.assert_close(
            actual[name], tensor, rtol=0, atol=tolerance * scale, msg=lambda message, name=name: f"{name}: {message}"
        )
    return step


def _left(task: Task, optimizer: AnyGAM, losses: list[Tensor]) -> dict[str, Tensor]:
    params = dict(task.model.named_parameters())
    grads = {f"{name}.grad": param.grad for name, param in params.items() if param.grad is not None}
    state = {
        f"{name}.{key}": value
        for name, param in params.items()
        for key, value in optimizer.state[param].items()
        if isinstance(value, Tensor)
    }
    return {
        **task.model.state_dict(),
        **grads,
        **state,
        **optimizer.metrics,
        "losses": torch.stack(losses),
        "random": torch.get_rng_state(),
    }
