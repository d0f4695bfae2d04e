"""Checkpointed networks step as without checkpoints; reentrant checkpoints are refused."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gam_fused import GAM
from tests.derivatives.common import ALPHA, LR, RHO, draw
from tests.literal import assert_equal_bits
from tests.states import assert_same, snapshot


class Checkpointed(nn.Module):
    """Two blocks between two layers; ``rerun`` recomputes a block's activations in the backward pass, or does not."""

    def __init__(self, rerun: Callable[..., Tensor] | None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.3)) for _ in range(2))
        self.rerun = rerun

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        for block in self.blocks:
            hidden = block(hidden) if self.rerun is None else self.rerun(block, hidden)
        return self.last(hidden)


@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
def test_a_checkpointed_network_steps_bitwise_as_without_checkpoints(hvp: str) -> None:
    inputs = draw(7, 4)
    plain = Checkpointed(None).double()
    saving = Checkpointed(functools.partial(checkpoint, use_reentrant=False)).double()
    saving.load_state_dict(plain.state_dict())
    for model in (plain, saving):
        optimizer = GAM(model.parameters(), rho=RHO, alpha=ALPHA, lr=LR, hvp=hvp, model=model)
        torch.manual_seed(1)
        for _ in range(2):
            optimizer.step(lambda model=model: model(inputs).square().mean())
    assert_equal_bits(saving.parameters(), plain.parameters())


@contextmanager
def nothing_changes(model: nn.Module, optimizer: GAM) -> Iterator[None]:
    before = snapshot(model, optimizer)
    yield
    assert_same(before, snapshot(model, optimizer))


def test_reentrant_checkpoints_name_the_way_out_and_change_nothing() -> None:
    model = Checkpointed(functools.partial(checkpoint, use_reentrant=True)).double()
    optimizer = GAM(model.parameters(), lr=LR)
    with nothing_changes(model, optimizer), pytest.raises(RuntimeError, match="use_reentrant=False"):
        optimizer.step(lambda: model(draw(7, 4)).square().mean())


def test_reentrant_checkpoints_that_hide_parameters_name_the_way_out_and_change_nothing() -> None:
    """Where nothing before the checkpoint is trained, PyTorch itself raises nothing and calls the block unused."""
    model = Checkpointed(functools.partial(checkpoint, use_reentrant=True)).double()
    model.first.requires_grad_(False)
    optimizer = GAM(model.parameters(), lr=LR)
    inputs = draw(7, 4).requires_grad_()
    with nothing_changes(model, optimizer), pytest.raises(RuntimeError, match="use_reentrant=False"):
        optimizer.step(lambda: model(inputs).square().mean())
