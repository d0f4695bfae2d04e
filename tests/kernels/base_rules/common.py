"""Launches of the fused base rules: ``Step`` beside torch.optim, ``Launch`` with every list that a rule can have."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from gam_fused.kernels import Backend
from gam_fused.kernels.interface import accumulation_dtype
from gam_fused.kernels.rules import AdamWRule, AdamWState, Descent, SGDRule
from tests.kernels.tensor_lists import Draw, Spec, relaid

RHO, ALPHA, XI, NORM = 0.3, 0.7, 0.01, 2.9
CPU = torch.device("cpu")


class Step:
    """The operands of one launch, and the same in float64 for torch.optim."""

    def __init__(self, dtype: torch.dtype, specs: list[Spec], layouts: list[str], seed: int) -> None:
        draw = Draw(dtype, CPU, seed)
        self.params, self.backups = draw.normal(specs), draw.normal(relaid(specs, layouts))
        self.grads, self.hvps = draw.normal(relaid(specs, layouts)), draw.normal(specs)
        self.norm = draw.norm(NORM)
        self.dtype = dtype

    def descent(self, **options: Any) -> Descent:
        return Descent(self.params, self.backups, self.grads, self.hvps, self.norm, RHO, ALPHA, XI, **options)

    def combined(self) -> list[Tensor]:
        scale = ALPHA * RHO / (float(self.norm) + XI)
        return [g.double() + scale * h.double() for g, h in zip(self.grads, self.hvps, strict=True)]

    def zeros(self) -> list[Tensor]:
        return [torch.zeros_like(param) for param in self.params]


def assert_close(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype, roundings: int) -> None:
    """Within ``roundings`` of the accumulation dtype, relative to numbers of size 1, and one of the dtype itself."""
    wide = torch.finfo(accumulation_dtype(dtype)).eps
    for a, e in zip(actual, expected, strict=True):
        bound = roundings * wide * (1 + e.abs()) + (dtype.itemsize == 2) * torch.finfo(dtype).eps * (e.abs() + 1e-3)
        assert bool(((a.double() - e).abs() <= bound).all())


class Launch:
    """A launch of either rule with every list it can have, to be changed in one place."""

    LISTS = ("params", "backups", "grads", "hvps")
    STATE: ClassVar = {SGDRule: ("momentum_buffers",), AdamWRule: ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")}

    def __init__(
        self, rule: Any, dtype: torch.dtype = torch.float32, specs: list[Spec] | None = None, seed: int = 0
    ) -> None:
        if specs is None:
            specs = [Spec((5,), "contiguous"), Spec((2, 3), "transposed"), Spec((0,), "contiguous")]
        draw = Draw(dtype, CPU, seed)
        self.rule = rule
        self.lists = {name: draw.normal(specs) for name in (*self.LISTS, *self.STATE[type(rule)])}
        for name in ("exp_avg_sqs", "max_exp_avg_sqs"):
            for tensor in self.lists.get(name, []):
                tensor.abs_()
        self.steps = [torch.full((), 3.0) for _ in specs]
        self.norm, self.guards = draw.norm(NORM), [draw.norm(1.0)]
        self.numbers: dict[str, float] = {"rho": RHO, "alpha": ALPHA, "xi": XI}
        self.options: dict[str, Any] = {"first_step": False} if isinstance(rule, SGDRule) else {}

    def run(self, backend: Backend) -> Launch:
        lists = dict(self.lists)
        from_theta = [lists.pop(name) for name in self.LISTS]
        options = {name: value for name, value in self.options.items() if name != "first_step"}
        descent = Descent(*from_theta, self.norm, **self.numbers, guards=self.guards, **options)
        if isinstance(self.rule, SGDRule):
            backend.sgd_step_(descent, *lists.values(), self.rule, first_step=self.options["first_step"])
        else:
            backend.adamw_step_(descent, AdamWState(*lists.values(), self.steps), self.rule)
        return self

    @property
    def written(self) -> tuple[str, ...]:
        return ("params", "grads", *self.STATE[type(self.rule)])

    def everything(self) -> list[Tensor]:
        return [*(tensor for tensors in self.lists.values() for tensor in tensors), *self.steps]


FULL_RULES = [
    SGDRule(0.1, 0.9, dampening=0.2, weight_decay=0.1),
    AdamWRule(0.1, betas=(0.8, 0.7), eps=0.1, weight_decay=0.1, amsgrad=True),
    AdamWRule(0.1, betas=(0.8, 0.7), eps=0.1, weight_decay=0.1, decoupled_weight_decay=False, amsgrad=True),
]
over_rules = pytest.mark.parametrize("rule", FULL_RULES, ids=["sgd", "adamw", "adam"])
