"""One task, the modes of a step, and a library that hands backward() on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gam_fused import GAM
from tests import literal

RHO, ALPHA, LR = 0.1, 0.4, 0.3
BATCH = 8

MODES: dict[str, dict[str, Any]] = {
    "exact": {"hvp": "exact"},
    "finite_difference": {"hvp": "finite_difference"},
    "between_flatness_steps": {"interval": 2},
}
over_modes = pytest.mark.parametrize("mode", MODES)


class Task:
    """A smooth network on one batch, in float64."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        self.inputs = torch.randn(BATCH, 4, dtype=torch.float64)
        self.labels = torch.randint(3, (BATCH,))

    @property
    def params(self) -> list[Tensor]:
        return list(self.model.parameters())

    def losses(self, start: int = 0, stop: int = BATCH) -> Tensor:
        """Per-sample losses, already divided by the size of the whole batch."""
        rows = slice(start, stop)
        return F.cross_entropy(self.model(self.inputs[rows]), self.labels[rows], reduction="none") / BATCH

    def loss(self, start: int = 0, stop: int = BATCH) -> Tensor:
        return self.losses(start, stop).sum()

    def literal_loss(self) -> literal.LossFunction:
        return literal.as_function(self.model, lambda net: F.cross_entropy(net(self.inputs), self.labels))

    def optimizer(self, mode: str = "exact", **kwargs: Any) -> GAM:
        optimizer = GAM(self.params, rho=RHO, alpha=ALPHA, **{"lr": LR, **MODES[mode], **kwargs})
        if mode == "between_flatness_steps":
            optimizer.step(self.loss)
        return optimizer


class Wrapper:
    """Hands ``backward`` on through plain functions, as training libraries do."""

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        self._scaled(loss, **kwargs)

    def _scaled(self, loss: Tensor, **kwargs: Any) -> None:
        loss.backward(**kwargs)


def returns_the_loss(task: Task, optimizer: GAM) -> Tensor:
    return task.loss()


def calls_backward(task: Task, optimizer: GAM) -> Tensor:
    optimizer.zero_grad()
    loss = task.loss()
    loss.backward()
    return loss


def zeroes_in_place(task: Task, optimizer: GAM) -> Tensor:
    optimizer.zero_grad(set_to_none=False)
    loss = task.loss()
    loss.backward()
    return loss


def zeroes_the_model(task: Task, optimizer: GAM) -> Tensor:
    task.model.zero_grad()
    loss = task.loss()
    loss.backward()
    return loss.detach()


def calls_autograd_backward(task: Task, optimizer: GAM) -> Tensor:
    loss = task.loss()
    torch.autograd.backward(loss)
    return loss


def calls_backward_through_a_wrapper(task: Task, optimizer: GAM) -> Tensor:
    loss = task.loss()
    Wrapper().backward(loss, retain_graph=False)
    return loss


def scales_by_the_gradient_argument(task: Task, optimizer: GAM) -> Tensor:
    loss = task.loss()
    (loss / 4).backward(gradient=torch.tensor(4.0, dtype=torch.float64))
    return loss


def weights_the_samples(task: Task, optimizer: GAM) -> Tensor:
    weights = torch.linspace(0.5, 2.0, BATCH, dtype=torch.float64)
    losses = task.losses()
    (losses / weights).backward(weights)
    return losses.sum()


def weights_two_tensors(task: Task, optimizer: GAM) -> Tensor:
    first, second = task.losses(0, 3), task.loss(3)
    torch.autograd.backward([first, second], [torch.ones(3, dtype=torch.float64), None])
    return first.sum() + second


def weights_by_a_tuple(task: Task, optimizer: GAM) -> Tensor:
    loss = task.loss()
    torch.autograd.backward((loss / 2,), grad_tensors=(torch.tensor(2.0, dtype=torch.float64),))
    return loss


def calls_backward_twice(task: Task, optimizer: GAM) -> Tensor:
    optimizer.zero_grad()
    first = task.loss(0, 3)
    first.backward()
    second = task.loss(3)
    second.backward()
    return first.detach() + second.detach()


def calls_backward_twice_on_one_graph(task: Task, optimizer: GAM) -> Tensor:
    losses = task.losses()
    first, second = losses[:3].sum(), losses[3:].sum()
    first.backward(retain_graph=True)
    second.backward()
    return first + second


def calls_autograd_backward_twice_on_one_graph(task: Task, optimizer: GAM) -> Tensor:
    losses = task.losses()
    torch.autograd.backward(losses[:3].sum(), retain_graph=True)
    torch.autograd.backward(losses[3:].sum())
    return losses.sum()


def asks_for_a_graph_of_the_gradient(task: Task, optimizer: GAM) -> Tensor:
    losses = task.losses()
    losses[:3].sum().backward(create_graph=True)  # which implies retain_graph
    losses[3:].sum().backward()
    return losses.sum()


CLOSURES: dict[str, Callable[[Task, GAM], Tensor]] = {
    function.__name__: function
    for function in (
        returns_the_loss,
        calls_backward,
        zeroes_in_place,
        zeroes_the_model,
        calls_autograd_backward,
        calls_backward_through_a_wrapper,
        scales_by_the_gradient_argument,
        weights_the_samples,
        weights_two_tensors,
        weights_by_a_tuple,
        calls_backward_twice,
        calls_backward_twice_on_one_graph,
        calls_autograd_backward_twice_on_one_graph,
        asks_for_a_graph_of_the_gradient,
    )
}


class Planted(Exception):
    """A fault that a test has planted."""
