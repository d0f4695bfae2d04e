"""What a launch writes, and what it writes where no step is taken."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gam_fused.kernels import Backend
from gam_fused.kernels.rules import AdamWRule, AdamWState, SGDRule
from tests.kernels.base_rules.common import FULL_RULES, Launch, Step, over_rules
from tests.kernels.tensor_lists import Spec, assert_same_bits, bits, copies, seeds, specs, surroundings


@over_rules
@settings(max_examples=10)
@given(specs, seeds, st.booleans())
def test_a_step_writes_what_it_says_and_nothing_else(
    fusing: Backend, dtype: torch.dtype, rule: Any, specs: list[Spec], seed: int, write_grads: bool
) -> None:
    launch = Launch(rule, dtype, specs, seed)
    before = {name: copies(tensors) for name, tensors in launch.lists.items()}
    gaps = surroundings(*(copies(tensors) for tensors in launch.lists.values()))
    launch.options["write_grads"] = write_grads
    launch.run(fusing)
    for name, tensors in launch.lists.items():
        if name not in launch.written or (name == "grads" and not write_grads):
            assert_same_bits(tensors, before[name])
        elif name != "max_exp_avg_sqs":  # of which some, by chance all, stay
            for now, then in zip(tensors, before[name], strict=True):
                assert now.numel() <= 20 or not torch.equal(bits(now), bits(then)), name
    assert [float(step) for step in launch.steps] == [3.0 + isinstance(rule, AdamWRule)] * len(specs)
    assert_same_bits(surroundings(*(copies(tensors) for tensors in launch.lists.values())), gaps)


@over_rules
def test_parameters_and_state_do_not_depend_on_whether_gradients_are_written(
    fusing: Backend, dtype: torch.dtype, rule: Any
) -> None:
    launches = [Launch(rule, dtype), Launch(rule, dtype)]
    for launch, write_grads in zip(launches, (True, False), strict=True):
        launch.options["write_grads"] = write_grads
        launch.run(fusing)
        launch.lists.pop("grads")
    assert_same_bits(launches[0].everything(), launches[1].everything())


@over_rules
def test_the_gradient_left_by_maximizing_is_the_combined_one(fusing: Backend, dtype: torch.dtype, rule: Any) -> None:
    usual = Launch(rule, dtype).run(fusing)
    maximizing = Launch(dataclasses.replace(rule, maximize=True), dtype).run(fusing)
    assert_same_bits(maximizing.lists["grads"], usual.lists["grads"])


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
    if stopper == "adversarial_norm":
        step.norm = step.norm * value
    guards = [torch.ones_like(step.norm), torch.ones_like(step.norm) * (value if stopper == "guard" else 1)]
    descent = step.descent(guards=guards, found_inf=torch.tensor(1.0 if stopper == "found_inf" else 0.0))
    if isinstance(rule, SGDRule):
        fusing.sgd_step_(descent, state[0], rule)
    else:
        fusing.adamw_step_(descent, AdamWState(*state, steps), rule)
    assert_same_bits(step.params, step.backups)
    for after, then in zip(untouched, before, strict=True):
        assert_same_bits(after, then)


@over_rules
@pytest.mark.parametrize("stopper", ["adversarial_norm", "first guard", "last guard", "found_inf"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("write_grads", [True, False])
def test_a_step_that_is_not_taken_only_restores(
    fusing: Backend, rule: Any, stopper: str, value: float, write_grads: bool
) -> None:
    launch = Launch(rule)
    launch.options |= {"write_grads": write_grads, "found_inf": torch.tensor(0.0), "grad_scale": torch.tensor(2.0)}
    launch.guards = [torch.tensor(1.0) for _ in range(3)]
    stops = {
        "adversarial_norm": launch.norm,
        "first guard": launch.guards[0],
        "last guard": launch.guards[-1],
        "found_inf": launch.options["found_inf"],
    }
    stops[stopper].fill_(value)
    others = len(launch.lists["params"])
    before = copies(launch.everything())[others:]
    launch.run(fusing)
    assert_same_bits(launch.lists["params"], launch.lists["backups"])
    assert_same_bits(launch.everything()[others:], before)


def test_what_a_momentum_buffer_holds_before_the_first_step_does_not_matter(
    fusing: Backend, dtype: torch.dtype
) -> None:
    launches = [Launch(FULL_RULES[0], dtype) for _ in range(2)]
    for launch, value in zip(launches, (0.0, math.nan), strict=True):
        for buffer in launch.lists["momentum_buffers"]:
            buffer.fill_(value)
        launch.options["first_step"] = True
        launch.run(fusing)
    assert_same_bits(launches[0].everything(), launches[1].everything())


@over_rules
def test_a_nan_among_the_combined_gradients_stays_where_it_is(fusing: Backend, dtype: torch.dtype, rule: Any) -> None:
    launch = Launch(rule, dtype)
    launch.lists["hvps"][0][2] = math.nan
    launch.run(fusing)
    for name in launch.written:
        assert launch.lists[name][0].isnan().tolist() == [False, False, True, False, False], name
        assert not launch.lists[name][1].isnan().any()


@over_rules
def test_empty_lists_take_no_step(fusing: Backend, rule: Any) -> None:
    Launch(rule, specs=[]).run(fusing)


@over_rules
def test_a_graph_built_before_a_step_raises_in_backward(fusing: Backend, rule: Any) -> None:
    launch = Launch(rule)
    for tensors in launch.lists.values():
        for tensor in tensors:
            tensor.requires_grad_()
    graphs = {name: tensors[0].square().sum() for name, tensors in launch.lists.items()}
    launch.run(fusing)
    for name, graph in graphs.items():
        if name in launch.written:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                graph.backward()
        else:
            graph.backward()
