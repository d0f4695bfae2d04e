"""The fused base rules: one launch does what restoring, combining and torch.optim's own step do."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gam_fused.kernels import Backend
from gam_fused.kernels.interface import accumulation_dtype
from gam_fused.kernels.rules import AdamWRule, SGDRule
from tests.kernels.tensor_lists import Draw, Spec, assert_same_bits, copies, other_layouts, relaid, seeds, specs

RHO, ALPHA, XI, NORM = 0.3, 0.7, 0.01, 2.9
CPU = torch.device("cpu")

sgd_rules = st.builds(
    SGDRule,
    lr=st.just(0.05),
    momentum=st.sampled_from([0.0, 0.9]),
    dampening=st.sampled_from([0.0, 0.3]),
    weight_decay=st.sampled_from([0.0, 0.01]),
    maximize=st.booleans(),
)
adamw_rules = st.builds(
    AdamWRule,
    lr=st.just(0.05),
    eps=st.just(1e-3),
    weight_decay=st.sampled_from([0.0, 0.1]),
    decoupled_weight_decay=st.booleans(),
    amsgrad=st.booleans(),
    maximize=st.booleans(),
)


@pytest.fixture(scope="session")
def fusing(backend: Backend) -> Backend:
    if not backend.fuses_base_rules:
        pytest.skip(f"back end {backend.name} has no fused base rules")
    return backend


class Step:
    """The operands of one launch, and the same in float64 for torch.optim."""

    def __init__(self, dtype: torch.dtype, specs: list[Spec], layouts: list[str], seed: int) -> None:
        draw = Draw(dtype, CPU, seed)
        self.params, self.backups = draw.normal(specs), draw.normal(relaid(specs, layouts))
        self.grads, self.hvps = draw.normal(relaid(specs, layouts)), draw.normal(specs)
        self.norm = draw.norm(NORM)
        self.dtype = dtype

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


@settings(max_examples=40)
@given(specs, other_layouts, seeds, sgd_rules, st.booleans())
def test_sgd_step_is_combine_and_torch_sgd(
    fusing: Backend,
    dtype: torch.dtype,
    specs: list[Spec],
    layouts: list[str],
    seed: int,
    rule: SGDRule,
    nesterov: bool,
) -> None:
    if nesterov and rule.momentum and not rule.dampening:
        rule = SGDRule(rule.lr, rule.momentum, 0.0, rule.weight_decay, True, rule.maximize)
    step = Step(dtype, specs, layouts, seed)
    buffers = step.zeros() if rule.momentum else []
    twins = [torch.nn.Parameter(backup.double().clone()) for backup in step.backups] or [
        torch.nn.Parameter(torch.ones(1))
    ]
    plain = torch.optim.SGD(twins, foreach=False, **vars(rule))
    for number in range(3):
        combined = step.combined()
        for twin, gradient, backup in zip(twins, combined, step.backups, strict=False):
            twin.data.copy_(backup)
            twin.grad = gradient
            if number and rule.momentum:
                plain.state[twin]["momentum_buffer"].copy_(buffers[_at(twins, twin)])
        plain.step()
        fusing.sgd_step_(
            step.params,
            step.backups,
            step.grads,
            step.hvps,
            buffers,
            step.norm,
            [],
            RHO,
            ALPHA,
            XI,
            rule,
            first_step=number == 0,
        )
        if not specs:
            return
        assert_close(step.params, [twin.data for twin in twins], dtype, 16)
        assert_close(step.grads, combined, dtype, 16)
        if rule.momentum:
            assert_close(buffers, [plain.state[twin]["momentum_buffer"] for twin in twins], dtype, 16)
        step.backups = copies(step.params)


def _at(twins: list[Any], twin: Any) -> int:
    return next(i for i, other in enumerate(twins) if other is twin)


@settings(max_examples=40)
@given(specs, other_layouts, seeds, adamw_rules)
def test_adamw_step_is_combine_and_torch_adam(
    fusing: Backend, dtype: torch.dtype, specs: list[Spec], layouts: list[str], seed: int, rule: AdamWRule
) -> None:
    if not specs:
        return
    step = Step(dtype, specs, layouts, seed)
    means, squares, maxima = step.zeros(), step.zeros(), step.zeros() if rule.amsgrad else []
    steps = [torch.zeros(()) for _ in step.params]
    twins = [torch.nn.Parameter(backup.double().clone()) for backup in step.backups]
    options = {k: v for k, v in vars(rule).items() if k != "decoupled_weight_decay"}
    plain = (torch.optim.AdamW if rule.decoupled_weight_decay else torch.optim.Adam)(twins, foreach=False, **options)
    for _ in range(3):
        combined = step.combined()
        for i, twin in enumerate(twins):
            twin.data.copy_(step.backups[i])
            twin.grad = combined[i]
            if plain.state[twin]:
                plain.state[twin]["exp_avg"].copy_(means[i])
                plain.state[twin]["exp_avg_sq"].copy_(squares[i])
                if rule.amsgrad:
                    plain.state[twin]["max_exp_avg_sq"].copy_(maxima[i])
        plain.step()
        fusing.adamw_step_(
            step.params,
            step.backups,
            step.grads,
            step.hvps,
            means,
            squares,
            maxima,
            steps,
            step.norm,
            [],
            RHO,
            ALPHA,
            XI,
            rule,
        )
        assert_close(step.params, [twin.data for twin in twins], dtype, 64)
        assert_close(means, [plain.state[twin]["exp_avg"] for twin in twins], dtype, 16)
        assert_close(squares, [plain.state[twin]["exp_avg_sq"] for twin in twins], dtype, 64)
        assert [float(count) for count in steps] == [float(plain.state[twin]["step"]) for twin in twins]
        step.backups = copies(step.params)


@pytest.mark.parametrize("rule", [SGDRule(0.1, 0.9), AdamWRule(0.1, amsgrad=True)], ids=["sgd", "adamw"])
@pytest.mark.parametrize("stopper", ["adversarial_norm", "guard", "found_inf"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_restores_and_writes_nothing_else(
    fusing: Backend, dtype: torch.dtype, rule: Any, stopper: str, value: float
) -> None:
    step = Step(dtype, [Spec((5,), "contiguous"), Spec((2, 3), "transposed")], ["contiguous"] * 6, 0)
    state = [step.zeros() for _ in range(3)]
    steps = [torch.zeros(()) for _ in step.params]
    untouched = [step.backups, step.grads, step.hvps, *state, steps]
    before = copy.deepcopy(untouched)
    norm = step.norm * value if stopper == "adversarial_norm" else step.norm
    guards = [step.norm, step.norm * (value if stopper == "guard" else 1)]
    options = {"found_inf": torch.tensor(1.0)} if stopper == "found_inf" else {}
    lists = (step.params, step.backups, step.grads, step.hvps)
    if isinstance(rule, SGDRule):
        fusing.sgd_step_(*lists, state[0], norm, guards, RHO, ALPHA, XI, rule, first_step=False, **options)
    else:
        fusing.adamw_step_(*lists, *state, steps, norm, guards, RHO, ALPHA, XI, rule, **options)
    assert_same_bits(step.params, step.backups)
    for after, then in zip(untouched, before, strict=True):
        assert_same_bits(after, then)


def test_a_gradient_scale_divides_the_combined_gradient_and_grads_may_be_kept(fusing: Backend) -> None:
    for write_grads in (True, False):
        step = Step(torch.float32, [Spec((50,), "contiguous")], ["contiguous"] * 6, 0)
        before, combined = copies(step.grads), step.combined()
        fusing.sgd_step_(
            *(step.params, step.backups, step.grads, step.hvps, [], step.norm, [], RHO, ALPHA, XI, SGDRule(0.5)),
            first_step=True,
            write_grads=write_grads,
            grad_scale=torch.tensor(4.0),
            found_inf=torch.tensor(0.0),
        )
        assert_close(step.params, [step.backups[0].double() - 0.5 * combined[0] / 4], torch.float32, 8)
        if write_grads:
            assert_close(step.grads, [combined[0] / 4], torch.float32, 8)
        else:
            assert_same_bits(step.grads, before)


@pytest.mark.parametrize("name", ["backups", "grads", "hvps", "momentum_buffers"])
def test_a_list_of_another_length_is_refused_by_name(fusing: Backend, name: str) -> None:
    names = ("params", "backups", "grads", "hvps", "momentum_buffers")
    lists = {key: [torch.ones(3), torch.ones(2)] for key in names}
    lists[name] = lists[name][:1]
    with pytest.raises(ValueError, match=rf"^{name}: 1 tensors, expected 2"):
        fusing.sgd_step_(*lists.values(), torch.tensor(1.0), [], RHO, ALPHA, XI, SGDRule(0.1, 0.9), first_step=False)


@pytest.mark.parametrize("device_lr", [0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)], ids=str)
def test_the_learning_rate_may_be_a_tensor(fusing: Backend, device_lr: Any) -> None:
    params = [torch.zeros(2)]
    fusing.sgd_step_(
        *(params, [torch.zeros(2)], [torch.ones(2)], [torch.zeros(2)], [], torch.tensor(1.0), [], RHO, ALPHA, XI),
        SGDRule(device_lr),
        first_step=True,
    )
    assert params[0].tolist() == [-0.5, -0.5]
