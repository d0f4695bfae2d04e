"""Learning-rate and rho schedules against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from gam_fused.cli.schedules import Schedules


def _schedules(lr_warmup: int = 0, rho_warmup: int = 0, rho: float | None = 0.2) -> Schedules:
    return Schedules(lr=0.8, lr_warmup_steps=lr_warmup, rho=rho, rho_warmup_steps=rho_warmup, total_steps=100)


def test_cosine_from_the_peak_to_almost_nothing() -> None:
    schedules = _schedules()
    assert schedules.lr_at(0) == 0.8
    assert schedules.lr_at(50) == pytest.approx(0.4)
    assert schedules.lr_at(25) == pytest.approx(0.4 * (1 + math.sqrt(0.5)))
    assert 0 < schedules.lr_at(99) < 1e-3
    assert all(schedules.lr_at(step) > schedules.lr_at(step + 1) for step in range(99))


def test_cosine_agrees_with_pytorch() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.8)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    for step in range(100):
        assert _schedules().lr_at(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()


def test_warm_ups_are_linear_reach_the_peak_and_never_waste_a_step() -> None:
    schedules = _schedules(lr_warmup=10, rho_warmup=4)
    assert [schedules.lr_at(step) for step in range(10)] == pytest.approx([0.08 * k for k in range(1, 11)])
    assert schedules.lr_at(10) == 0.8
    assert schedules.lr_at(55) == pytest.approx(0.4)
    assert [schedules.rho_at(step) for step in range(6)] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2, 0.2])


def test_warm_up_longer_than_the_run_only_rises() -> None:
    schedules = _schedules(lr_warmup=1000)
    assert schedules.lr_at(99) == pytest.approx(0.08)


def test_apply_sets_every_group_and_leaves_rho_out_where_there_is_none() -> None:
    groups = [{"lr": 1.0, "rho": 1.0}, {"lr": 2.0, "rho": 2.0}]
    _schedules(rho_warmup=4).apply(groups, 1)
    assert [group["rho"] for group in groups] == [0.1, 0.1]
    assert groups[0]["lr"] == groups[1]["lr"] == _schedules().lr_at(1)

    plain = [{"lr": 1.0}]
    _schedules(rho=None).apply(plain, 0)
    assert plain == [{"lr": 0.8}]
