"""Seeding, capturing and restoring every generator; the order of the images."""

from __future__ import annotations

import io
import random

import numpy as np
import torch

from gam_fused.cli import random_state

CPU = torch.device("cpu")


def _draw() -> tuple[float, float, float, float]:
    # The second normal number comes from the first one's leftover, which is a part of the state of its own.
    return torch.rand(()).item(), random.random(), np.random.standard_normal(), np.random.standard_normal()


def test_every_generator_continues_where_it_was_captured() -> None:
    random_state.make_deterministic(seed=3, threads=1)
    _draw()
    np.random.standard_normal()
    file = io.BytesIO()
    torch.save(random_state.capture(), file)
    expected = _draw()
    file.seek(0)
    random_state.make_deterministic(seed=4, threads=1)
    random_state.restore(torch.load(file, weights_only=True))
    assert _draw() == expected


def test_seed_decides_every_generator() -> None:
    draws = []
    for seed in (1, 1, 2):
        random_state.make_deterministic(seed=seed, threads=1)
        draws.append(_draw())
    assert draws[0] == draws[1]
    assert all(one != other for one, other in zip(draws[0], draws[2], strict=True))


def test_order_is_a_permutation_of_its_own_for_each_seed_and_epoch() -> None:
    orders = {
        (seed, epoch): random_state.epoch_order(50, seed, epoch, CPU).tolist()
        for seed in range(3)
        for epoch in range(3)
    }
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 9
    assert random_state.epoch_order(50, 2, 1, CPU).tolist() == orders[2, 1]
