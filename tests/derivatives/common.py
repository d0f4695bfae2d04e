"""What the tests of derivatives share: random leaves, and one step compared with the literal formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gam_fused import GAM
from tests import literal
from tests.literal import assert_equal_to_rounding

RHO, ALPHA, LR = 0.1, 0.4, 0.5


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def leaf(*shape: int) -> nn.Parameter:
    return nn.Parameter(draw(*shape))


def assert_module_step_is_literal(
    model: nn.Module, loss: Callable[[Callable[..., Any]], Tensor], by_hand: literal.LossFunction | None = None
) -> None:
    """One step of GAM on ``loss(model)`` equals the literal formulas for ``by_hand``, or for the same modules."""
    function = literal.as_function(model, loss) if by_hand is None else by_hand
    expected = literal.step(function, model.parameters(), rho=RHO, alpha=ALPHA, lr=LR)
    before = literal.copies(model.parameters())
    optimizer = GAM(model.parameters(), rho=RHO, alpha=ALPHA, lr=LR, model=model)
    optimizer.step(lambda: loss(model))
    assert int(optimizer.metrics["skipped_steps"]) == 0
    assert_equal_to_rounding(model.parameters(), expected)
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True) if a.numel())
