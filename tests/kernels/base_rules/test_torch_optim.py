"""One launch does what restoring, combining and torch.optim's own step do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gam_fused.kernels import Backend
from gam_fused.kernels.rules import AdamWRule, AdamWState, SGDRule
from tests.kernels.base_rules.common import ALPHA, CPU, NORM, RHO, XI, Launch, Step, assert_close
from tests.kernels.tensor_lists import Draw, Spec, assert_same_bits, copies, other_layouts, seeds, specs

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
        fusing.sgd_step_(step.descent(), buffers, rule, first_step=number == 0)
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
        fusing.adamw_step_(step.descent(), AdamWState(means, squares, maxima, steps), rule)
        assert_close(step.params, [twin.data for twin in twins], dtype, 64)
        assert_close(means, [plain.state[twin]["exp_avg"] for twin in twins], dtype, 16)
        assert_close(squares, [plain.state[twin]["exp_avg_sq"] for twin in twins], dtype, 64)
        assert [float(count) for count in steps] == [float(plain.state[twin]["step"]) for twin in twins]
        step.backups = copies(step.params)


def test_a_gradient_scale_divides_the_combined_gradient_and_grads_may_be_kept(fusing: Backend) -> None:
    for write_grads in (True, False):
        step = Step(torch.float32, [Spec((50,), "contiguous")], ["contiguous"] * 6, 0)
        before, combined = copies(step.grads), step.combined()
        scaled = {"grad_scale": torch.tensor(4.0), "found_inf": torch.tensor(0.0)}
        fusing.sgd_step_(step.descent(write_grads=write_grads, **scaled), [], SGDRule(0.5))
        assert_close(step.params, [step.backups[0].double() - 0.5 * combined[0] / 4], torch.float32, 8)
        if write_grads:
            assert_close(step.grads, [combined[0] / 4], torch.float32, 8)
        else:
            assert_same_bits(step.grads, before)


COURSES: dict[str, tuple[Any, type[torch.optim.Optimizer]]] = {
    "sgd": (SGDRule(0.05), torch.optim.SGD),
    "momentum": (SGDRule(0.05, 0.9, dampening=0.3, weight_decay=0.01), torch.optim.SGD),
    "nesterov": (SGDRule(0.05, 0.9, nesterov=True, maximize=True), torch.optim.SGD),
    "adam": (AdamWRule(0.05, eps=1e-3, weight_decay=0.1, decoupled_weight_decay=False), torch.optim.Adam),
    "adamw": (AdamWRule(0.05, eps=1e-3, weight_decay=0.1), torch.optim.AdamW),
    "amsgrad": (AdamWRule(0.05, eps=1e-3, amsgrad=True, maximize=True), torch.optim.AdamW),
}


@pytest.mark.parametrize("course", list(COURSES))
@pytest.mark.parametrize("scale", [None, 4.0])
def test_ten_steps_in_a_row_are_those_of_torch(fusing: Backend, course: str, scale: float | None) -> None:
    """Nothing is carried from one to the other: state that is kept wrongly adds up. In float64, to the last digits."""
    rule, optimizer = COURSES[course]
    launch = Launch(rule, torch.float64)
    for name in launch.STATE[type(rule)]:
        launch.lists[name] = [torch.zeros_like(tensor) for tensor in launch.lists[name]]
    launch.steps = [torch.tensor(0.0) for _ in launch.steps]
    used = {"momentum_buffers": getattr(rule, "momentum", 1), "max_exp_avg_sqs": getattr(rule, "amsgrad", 1)}
    launch.lists |= {name: [] for name in launch.lists if not used.get(name, 1)}
    launch.options |= {} if scale is None else {"grad_scale": torch.tensor(scale)}
    twins = [torch.nn.Parameter(backup.clone()) for backup in launch.lists["backups"]]
    options = {name: value for name, value in vars(rule).items() if name != "decoupled_weight_decay"}
    plain = optimizer(twins, foreach=False, **options)
    draw = Draw(torch.float64, CPU, 5)
    shapes = [Spec(tuple(twin.shape), "contiguous") for twin in twins]
    for number in range(10):
        launch.lists["grads"], launch.lists["hvps"] = draw.normal(shapes), draw.normal(shapes)
        for twin, g, h in zip(twins, launch.lists["grads"], launch.lists["hvps"], strict=True):
            twin.grad = (g + ALPHA * RHO / (NORM + XI) * h) / (scale or 1)
        if isinstance(rule, SGDRule):
            launch.options["first_step"] = number == 0
        launch.run(fusing)
        plain.step()
        launch.lists["backups"] = copies(launch.lists["params"])
        # Ten steps of less than 64 roundings each, of numbers that stay below 10.
        torch.testing.assert_close(launch.lists["params"], [t.detach() for t in twins], rtol=0, atol=10 * 640 * 2**-53)
        torch.testing.assert_close(launch.lists["grads"], [t.grad for t in twins], rtol=0, atol=64 * 2**-53)
