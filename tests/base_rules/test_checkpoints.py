"""The state of fused steps is torch's, and either goes on from the other's."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.optim import SGD

from tests.base_rules.common import BASES, Task, assert_same_course, bases, fusing
from tests.states import assert_same


@fusing
@bases
def test_a_checkpoint_moves_to_the_plain_optimizer_and_back(base: str, backend: str) -> None:
    task, twin = Task(), Task()
    fused, plain = task.gam(base, backend), twin.gam(base, "foreach")
    for gam, owner in ((fused, task), (plain, twin)):
        gam.step(owner.loss)
    first, second = copy.deepcopy(fused.state_dict()), copy.deepcopy(plain.state_dict())
    fused.load_state_dict(second)
    plain.load_state_dict(first)
    fused.step(task.loss)
    plain.step(twin.loss)
    assert_same_course(task, twin, fused, plain)


def plain_optimizer(base: str, task: Task) -> torch.optim.Optimizer:
    """torch's own, over the same groups."""
    cls, options = BASES[base]
    groups = [
        {"params": list(task.model[0].parameters())},
        {"params": [p for layer in task.model[1:] for p in layer.parameters()], "lr": 0.03},
    ]
    return cls(groups, foreach=False, **options)


def kinds_of_state(stepped: Any, model: nn.Module) -> list[dict[str, Any]]:
    states = [stepped.state.get(param, {}) for param in model.parameters()]
    return [{k: (v.dtype, v.device, v.shape) for k, v in state.items() if v is not None} for state in states]


@fusing
@bases
def test_the_state_of_fused_steps_is_that_of_torch_and_goes_on_there(base: str, backend: str) -> None:
    task, twin = Task(), Task()
    fused, plain = task.gam(base, backend), plain_optimizer(base, twin)
    twin.loss().backward()
    plain.step()
    for _ in range(3):
        fused.step(task.loss)
    assert kinds_of_state(fused, task.model) == kinds_of_state(plain, twin.model)
    twin.model.load_state_dict(task.model.state_dict())
    plain.load_state_dict(copy.deepcopy(fused.base_optimizer.state_dict()))
    # From the same numbers, the same step.
    for param, mine in zip(twin.model.parameters(), task.model.parameters(), strict=True):
        param.grad = mine.grad.clone()
    for group in (*fused.param_groups, *plain.param_groups):
        group["foreach"] = False
    fused.base_optimizer.step()
    plain.step()
    assert_same([p.detach() for p in twin.model.parameters()], [p.detach() for p in task.model.parameters()])


@fusing
@bases
def test_fused_steps_go_on_from_the_state_of_torch(base: str, backend: str, launches: list[str]) -> None:
    task, twin, trained = Task(), Task(), Task()
    plain = plain_optimizer(base, trained)
    for _ in range(3):
        plain.zero_grad()
        trained.loss().backward()
        plain.step()
    fused, other = task.gam(base, backend), twin.gam(base, "foreach")
    for gam, owner in ((fused, task), (other, twin)):
        owner.model.load_state_dict(trained.model.state_dict())
        gam.load_state_dict(copy.deepcopy(plain.state_dict()))
        for _ in range(2):
            gam.step(owner.loss)
    assert len(launches) == 4
    assert_same_course(task, twin, fused, other)
    counts = {float(state["step"]) for state in fused.state.values() if "step" in state}
    assert counts == (set() if BASES[base][0] is SGD else {5.0})
