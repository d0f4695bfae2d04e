"""Every pass draws the same random numbers, and a step draws once."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gam_fused import GAM
from tests import literal
from tests.literal import assert_equal_bits, assert_equal_to_rounding
from tests.replay.common import (
    ALPHA,
    LR,
    MODES,
    PASSES,
    RHO,
    Planted,
    draw,
    over_modes,
)
from tests.states import assert_same

GENERATOR = torch.Generator()
OTHER_GENERATOR = torch.Generator()
ONES = torch.ones(2, 3, 16)

DRAWS: dict[str, Callable[[], Any]] = {
    "nn.Dropout": lambda: nn.Dropout(0.5)(ONES),
    "F.dropout": lambda: F.dropout(ONES, 0.3),
    "F.alpha_dropout": lambda: F.alpha_dropout(ONES, 0.3, training=True),
    "F.feature_alpha_dropout": lambda: F.feature_alpha_dropout(ONES, 0.3, training=True),
    "nn.Dropout1d": lambda: nn.Dropout1d(0.5)(ONES),
    "F.rrelu": lambda: F.rrelu(-ONES, training=True),
    "F.gumbel_softmax": lambda: F.gumbel_softmax(ONES),
    "torch.bernoulli": lambda: torch.bernoulli(ONES / 2),
    "torch.rand": lambda: torch.rand(5),
    "torch.randn_like": lambda: torch.randn_like(ONES),
    "torch.randperm": lambda: torch.randperm(50),
    "torch.multinomial": lambda: torch.multinomial(torch.ones(50), 5),
    "Tensor.uniform_": lambda: torch.empty(5).uniform_(),
    "torch.rand(generator)": lambda: torch.rand(5, generator=GENERATOR),
    "torch.bernoulli(generator)": lambda: torch.bernoulli(ONES / 2, generator=GENERATOR),
    "Tensor.normal_(generator)": lambda: torch.empty(5).normal_(generator=GENERATOR),
    "two generators": lambda: (torch.rand(5, generator=GENERATOR), torch.rand(5, generator=OTHER_GENERATOR)),
    "nn.init": lambda: nn.init.normal_(torch.empty(5), generator=GENERATOR),
    "random": lambda: torch.tensor([random.random() for _ in range(5)]),
    "random.gauss": lambda: torch.tensor(random.gauss(0.0, 1.0)),  # keeps a second number for the next call
    "random.shuffle": lambda: torch.tensor(random.sample(range(100), 100)),
    "numpy.random.rand": lambda: torch.from_numpy(numpy.random.rand(5)),
    "numpy.random.randn": lambda: torch.from_numpy(numpy.random.randn(5)),  # keeps a second number, too
    "torch.manual_seed": lambda: (torch.manual_seed(random.randrange(10**6)), torch.rand(5))[1],
}


def seed_everything() -> None:
    torch.manual_seed(11)
    random.seed(11)
    numpy.random.seed(11)
    GENERATOR.manual_seed(12)
    OTHER_GENERATOR.manual_seed(13)


def random_states() -> list[Any]:
    return [
        torch.get_rng_state(),
        random.getstate(),
        numpy.random.get_state(),
        GENERATOR.get_state(),
        OTHER_GENERATOR.get_state(),
    ]


class Drawing:
    """A closure that notes what it drew."""

    def __init__(self, source: str, failing_pass: int | None = None) -> None:
        self.param = nn.Parameter(torch.ones(3))
        self.source = source
        self.failing_pass = failing_pass
        self.drawn: list[Any] = []

    def closure(self) -> Tensor:
        first, second = DRAWS[self.source](), DRAWS[self.source]()
        self.drawn.append((first, second))
        if len(self.drawn) == self.failing_pass:
            raise Planted
        return (self.param**3).sum()


@pytest.mark.parametrize("source", DRAWS)
@over_modes
def test_every_pass_draws_the_same_and_a_step_advances_as_one_forward_pass(mode: str, source: str) -> None:
    seed_everything()
    ordinary = Drawing(source)
    for _ in range(3):
        ordinary.closure()
    expected = random_states()

    seed_everything()
    drawing = Drawing(source)
    optimizer = GAM([drawing.param], rho=RHO, lr=LR, **MODES[mode])
    steps: list[list[Any]] = []
    for _ in range(3):
        optimizer.step(drawing.closure)
        steps.append(drawing.drawn.copy())
        drawing.drawn.clear()
    assert_same(expected, random_states())
    for drawn, once in zip(steps, ordinary.drawn, strict=True):
        for passed in drawn:
            assert_same(once, passed)
    assert [len(drawn) for drawn in steps] == PASSES[mode]
    with pytest.raises(AssertionError):  # the next step draws anew
        assert_same(steps[0][0], steps[1][0])


@pytest.mark.parametrize("source", DRAWS)
@pytest.mark.parametrize("failing_pass", [1, 2])
def test_a_step_that_fails_leaves_random_states_as_before(failing_pass: int, source: str) -> None:
    seed_everything()
    drawing = Drawing(source)
    optimizer = GAM([drawing.param], rho=RHO, lr=LR)
    optimizer.step(drawing.closure)
    before = random_states()
    drawing.drawn.clear()
    drawing.failing_pass = failing_pass
    with pytest.raises(Planted):
        optimizer.step(drawing.closure)
    assert len(drawing.drawn) == failing_pass
    assert_same(before, random_states())


def test_a_generator_that_only_the_second_pass_uses_ends_where_it_began() -> None:
    """As after one ordinary forward pass, which at θ draws nothing."""
    seed_everything()
    before = random_states()
    param, passes = nn.Parameter(torch.ones(3)), []

    def closure() -> Tensor:
        passes.append(1)
        if len(passes) == 2:
            torch.rand(5, generator=GENERATOR)
            torch.rand(5)
        return (param**3).sum()

    GAM([param], lr=LR).step(closure)
    assert_same(before, random_states())


def test_dropout_masks_are_constants_of_the_step() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 2)).double()
    inputs = draw(6, 5)
    seed_everything()
    mask = F.dropout(torch.ones(6, 8, dtype=torch.float64), 0.4)

    def loss(params: list[Tensor]) -> Tensor:
        weight1, bias1, weight2, bias2 = params
        hidden = torch.tanh(inputs @ weight1.T + bias1) * mask
        return (hidden @ weight2.T + bias2).square().mean()

    expected = literal.step(loss, model.parameters(), rho=RHO, alpha=ALPHA, lr=LR)
    seed_everything()
    GAM(model.parameters(), rho=RHO, alpha=ALPHA, lr=LR).step(lambda: model(inputs).square().mean())
    assert_equal_to_rounding(model.parameters(), expected)


def test_the_two_phases_leave_random_numbers_to_the_user() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = GAM([param], lr=LR)
    seed_everything()
    expected = [torch.rand(3), torch.rand(3), torch.rand(3)]
    seed_everything()
    drawn = [torch.rand(3)]
    optimizer.first_step((param**3).sum())
    drawn.append(torch.rand(3))
    optimizer.second_step((param**3).sum())
    drawn.append(torch.rand(3))
    assert_equal_bits(drawn, expected)
