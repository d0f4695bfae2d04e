"""Every number given to a step reaches the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gam_fused.kernels import Backend
from gam_fused.kernels.rules import AdamWRule, Descent, SGDRule
from tests.kernels.base_rules.common import ALPHA, FULL_RULES, RHO, XI, Launch
from tests.kernels.tensor_lists import have_same_bits


def with_rule(**changes: Any) -> Callable[[Launch], None]:
    return lambda launch: setattr(launch, "rule", dataclasses.replace(launch.rule, **changes))


CHANGES: dict[str, Callable[[Launch], Any]] = {
    "rho": lambda launch: launch.numbers.update(rho=0.9),
    "alpha": lambda launch: launch.numbers.update(alpha=0.9),
    "xi": lambda launch: launch.numbers.update(xi=0.9),
    "adversarial_norm": lambda launch: launch.norm.mul_(2),
    "grad_scale": lambda launch: launch.options.update(grad_scale=torch.tensor(2.0)),
    "lr": with_rule(lr=0.2),
    "weight_decay": with_rule(weight_decay=0.5),
    "maximize": with_rule(maximize=True),
}
CHANGES_OF: dict[type, dict[str, Callable[[Launch], Any]]] = {
    SGDRule: {
        **CHANGES,
        "momentum": with_rule(momentum=0.5),
        "dampening": with_rule(dampening=0.5),
        "nesterov": with_rule(nesterov=True),
        "first_step": lambda launch: launch.options.update(first_step=True),
    },
    AdamWRule: {
        **CHANGES,
        "beta1": with_rule(betas=(0.5, 0.7)),
        "beta2": with_rule(betas=(0.8, 0.5)),
        "eps": with_rule(eps=0.5),
        "amsgrad": with_rule(amsgrad=False),
        "state_steps": lambda launch: launch.steps[0].add_(1),
    },
}


@pytest.mark.parametrize(
    ("rule", "change"),
    [(rule, change) for rule in FULL_RULES for change in CHANGES_OF[type(rule)]],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_every_number_given_to_a_step_reaches_the_result(fusing: Backend, rule: Any, change: str) -> None:
    usual, other = Launch(rule), Launch(rule)
    CHANGES_OF[type(rule)][change](other)
    assert not have_same_bits(usual.run(fusing).lists["params"], other.run(fusing).lists["params"])


@pytest.mark.parametrize("device_lr", [0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)], ids=str)
def test_the_learning_rate_may_be_a_tensor(fusing: Backend, device_lr: Any) -> None:
    params = [torch.zeros(2)]
    lists = params, [torch.zeros(2)], [torch.ones(2)], [torch.zeros(2)]
    fusing.sgd_step_(Descent(*lists, torch.tensor(1.0), RHO, ALPHA, XI), [], SGDRule(device_lr))
    assert params[0].tolist() == [-0.5, -0.5]
