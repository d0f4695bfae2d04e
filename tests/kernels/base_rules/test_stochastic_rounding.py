"""With a seed, a fused step rounds parameters stochastically, to the same bits in every back end, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gam_fused import kernels
from gam_fused.kernels import Backend
from gam_fused.kernels.rounding import places_of, rounded
from gam_fused.kernels.rules import AdamWRule, SGDRule
from tests.kernels.base_rules.common import FULL_RULES, Launch, over_rules
from tests.kernels.tensor_lists import (
    Spec,
    assert_same_bits,
    copies,
    have_same_bits,
    other_layouts,
    relaid,
    seeds,
    specs,
    surroundings,
)

NARROW = (torch.bfloat16, torch.float16)
rounding_seeds = st.one_of(st.integers(0, 3), st.integers(-(2**65), 2**65))


def sgd_rules(lr: float, momentum: float, dampening: float, weight_decay: float) -> st.SearchStrategy[SGDRule]:
    """With each of the terms and without."""
    return st.builds(
        lambda nesterov, dampens, has_momentum, decays, maximize: SGDRule(
            lr,
            momentum * has_momentum,
            dampening * (dampens and not nesterov),
            weight_decay * decays,
            nesterov and has_momentum,
            maximize,
        ),
        *[st.booleans()] * 5,
    )


adamw_rules = st.builds(
    AdamWRule,
    lr=st.just(0.05),
    betas=st.just((0.9, 0.99)),
    eps=st.just(1e-3),
    weight_decay=st.sampled_from([0.0, 0.1]),
    decoupled_weight_decay=st.booleans(),
    amsgrad=st.booleans(),
    maximize=st.booleans(),
)
options = st.fixed_dictionaries(
    {
        "rounding_seed": rounding_seeds,
        "write_grads": st.booleans(),
        "grad_scale": st.sampled_from([None, torch.tensor(4.0)]),
        "first_step": st.booleans(),
    }
)


def launch_of(
    rule: Any, dtype: torch.dtype, specs: list[Spec], layouts: list[str], seed: int, options: dict[str, Any]
) -> Launch:
    launch = Launch(rule, dtype, specs, seed)
    other = Launch(rule, dtype, relaid(specs, layouts), seed)
    # A list of parameters, one of gradients and one of state may lie otherwise than the rest.
    for name in ("backups", "grads", Launch.STATE[type(rule)][-1]):
        launch.lists[name] = other.lists[name]
    if isinstance(rule, SGDRule) and not rule.momentum:
        launch.lists["momentum_buffers"] = []
    if isinstance(rule, AdamWRule) and not rule.amsgrad:
        launch.lists["max_exp_avg_sqs"] = []
    launch.options = dict(options)
    if isinstance(rule, AdamWRule):
        del launch.options["first_step"]
    return launch


@settings(max_examples=30)
@given(sgd_rules(0.25, 0.5, 0.5, 0.125), specs.filter(bool), other_layouts, seeds, options)
def test_sgd_step_rounds_to_the_bits_of_the_reference(
    fusing: Backend,
    dtype: torch.dtype,
    rule: SGDRule,
    specs: list[Spec],
    layouts: list[str],
    seed: int,
    options: dict[str, Any],
) -> None:
    """Powers of two throughout: what is computed once for a launch is exact, in whatever order that is done."""
    launch, expected = (launch_of(rule, dtype, specs, layouts, seed, options) for _ in range(2))
    for each in (launch, expected):
        each.norm.fill_(2.0)
        each.numbers = {"rho": 0.5, "alpha": -0.5, "xi": 0.0}
    gaps = surroundings(*(copies(tensors) for tensors in launch.lists.values()))
    launch.run(fusing)
    expected.run(kernels.resolve("reference"))
    for name, tensors in expected.lists.items():
        assert_same_bits(launch.lists[name], tensors)
    assert_same_bits(surroundings(*(copies(tensors) for tensors in launch.lists.values())), gaps)


@settings(max_examples=30)
@given(
    st.one_of(sgd_rules(0.05, 0.9, 0.3, 0.01), adamw_rules),
    st.sampled_from(NARROW),
    specs.filter(bool),
    other_layouts,
    seeds,
    options,
)
def test_a_step_rounds_what_it_computes_in_float32(
    fusing: Backend,
    rule: Any,
    dtype: torch.dtype,
    specs: list[Spec],
    layouts: list[str],
    seed: int,
    options: dict[str, Any],
) -> None:
    launch = launch_of(rule, dtype, specs, layouts, seed, options)
    wide = launch_of(rule, dtype, specs, layouts, seed, options)
    places = [places_of(tensors) for tensors in zip(*filter(None, launch.lists.values()), strict=True)]
    wide.lists = {name: [tensor.float() for tensor in tensors] for name, tensors in wide.lists.items()}
    launch.run(fusing)
    wide.run(fusing)
    for i, (param, exact) in enumerate(zip(launch.lists["params"], wide.lists["params"], strict=True)):
        assert_same_bits([param], [rounded(exact, dtype, options["rounding_seed"], i, places[i])])
    for name in launch.written[1:]:
        assert_same_bits(launch.lists[name], [tensor.to(dtype) for tensor in wide.lists[name]])


@over_rules
def test_only_narrow_parameters_are_rounded_stochastically(fusing: Backend, dtype: torch.dtype, rule: Any) -> None:
    """State and gradients are rounded to nearest, float32 and float64 parameters not at all."""
    launches = [Launch(rule, dtype, [Spec((1000,), "contiguous")]) for _ in range(4)]
    for launch, rounding_seed in zip(launches, (None, 0, 0, 1), strict=True):
        launch.options["rounding_seed"] = rounding_seed
        launch.run(fusing)
    params = [launch.lists.pop("params") for launch in launches]
    for launch in launches[1:]:
        assert_same_bits(launch.everything(), launches[0].everything())
    assert_same_bits(params[1], params[2])
    for one, other in ((0, 1), (0, 3), (1, 3)):
        assert have_same_bits(params[one], params[other]) == (dtype not in NARROW)


@pytest.mark.parametrize("rule", FULL_RULES, ids=["sgd", "adamw", "adam"])
def test_a_step_that_is_not_taken_restores_to_the_bit_with_a_seed_too(
    fusing: Backend, dtype: torch.dtype, rule: Any
) -> None:
    launch = Launch(rule, dtype)
    launch.options |= {"found_inf": torch.tensor(1.0), "rounding_seed": 1}
    before = copies(launch.everything())[len(launch.lists["params"]) :]
    launch.run(fusing)
    assert_same_bits(launch.lists["params"], launch.lists["backups"])
    assert_same_bits(launch.everything()[len(launch.lists["params"]) :], before)
