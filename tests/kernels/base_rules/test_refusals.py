"""Malformed lists and step counts are refused by name before anything is written."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gam_fused.kernels import Backend
from gam_fused.kernels.rules import Descent, SGDRule
from tests.kernels.base_rules.common import ALPHA, FULL_RULES, RHO, XI, Launch, over_rules
from tests.kernels.tensor_lists import assert_same_bits, copies


@pytest.mark.parametrize("name", ["backups", "grads", "hvps", "momentum_buffers"])
def test_a_list_of_another_length_is_refused_by_name(fusing: Backend, name: str) -> None:
    names = ("params", "backups", "grads", "hvps", "momentum_buffers")
    lists = {key: [torch.ones(3), torch.ones(2)] for key in names}
    lists[name] = lists[name][:1]
    buffers = lists.pop("momentum_buffers")
    with pytest.raises(ValueError, match=rf"^{name}: 1 tensors, expected 2"):
        fusing.sgd_step_(Descent(*lists.values(), torch.tensor(1.0), RHO, ALPHA, XI), buffers, SGDRule(0.1, 0.9))


FAULTS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "dtype": (lambda t: t.to(torch.float16), "dtype torch.float16, expected torch.float32 as params"),
    "integers": (lambda t: t.to(torch.int32), "dtype torch.int32, expected torch.float32 as params"),
    "shape": (lambda t: t.flatten()[:5], r"shape \(5,\), expected \(2, 3\) as params\[1\]"),
    "device": (lambda t: t.to("meta"), "device meta, expected cpu as params"),
    "sparse": (lambda t: t.to_sparse(), "layout torch.sparse_coo, expected torch.strided"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
@pytest.mark.parametrize(
    ("rule", "name"),
    [(rule, name) for rule in FULL_RULES[:2] for name in (*Launch.LISTS[1:], *Launch.STATE[type(rule)])],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_malformed_tensor_is_refused_by_list_and_index(fusing: Backend, rule: Any, name: str, fault: str) -> None:
    launch = Launch(rule)
    intact = launch.everything()
    before, versions = copies(intact), [tensor._version for tensor in intact]
    replace, message = FAULTS[fault]
    launch.lists[name] = [replace(t) if i == 1 else t for i, t in enumerate(launch.lists[name])]
    with pytest.raises(ValueError, match=rf"^{name}\[1\]: {message}"):
        launch.run(fusing)
    assert_same_bits(intact, before)
    assert [tensor._version for tensor in intact] == versions


@over_rules
def test_memory_that_is_written_twice_is_refused(fusing: Backend, rule: Any) -> None:
    for written, other in itertools.permutations(Launch(rule).lists, 2):
        launch = Launch(rule)
        if written not in launch.written:
            continue
        launch.lists[other][0] = launch.lists[written][0]
        before = copies(launch.everything())
        with pytest.raises(ValueError, match=r"\[0\]: overlaps \w+\[0\] in memory"):
            launch.run(fusing)
        assert_same_bits(launch.everything(), before)


@over_rules
@pytest.mark.parametrize("length", [0, 2, 4])
def test_a_list_of_state_of_another_length_is_refused(fusing: Backend, rule: Any, length: int) -> None:
    for name in Launch.STATE[type(rule)]:
        launch = Launch(rule)
        launch.lists[name] = [torch.zeros(5) for _ in range(length)]
        before = copies(launch.everything())
        with pytest.raises(ValueError, match=rf"^{name}: {length} tensors, expected 3 as in params"):
            launch.run(fusing)
        assert_same_bits(launch.everything(), before)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda step: [step.double() for _ in range(3)],
        lambda step: [step.long() for _ in range(3)],
        lambda step: [step.repeat(2) for _ in range(3)],
        lambda step: [step] * 3,
    ],
    ids=["float64", "int64", "two numbers", "one for all"],
)
def test_malformed_step_counts_are_refused_by_index(fusing: Backend, wrong: Callable[[Tensor], list[Tensor]]) -> None:
    launch = Launch(FULL_RULES[1])
    launch.steps = wrong(launch.steps[0])
    with pytest.raises(ValueError, match=r"^state_steps\[\d\]: "):
        launch.run(fusing)
