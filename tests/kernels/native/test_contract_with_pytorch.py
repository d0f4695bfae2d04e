"""What PyTorch is told of the operators: opcheck, graphs, version counters, fake tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.native.common import (
    LISTS,
    WRITTEN,
    Call,
    needs_native,
    ops,
    over_dtypes,
    over_mutations,
    over_operators,
    run_through_backend,
)

pytestmark = needs_native


@over_operators
def test_opcheck(name: str) -> None:
    pytest.importorskip("expecttest", reason="torch.library.opcheck needs expecttest")
    args, options = Call(name, [(3,), (2, 5), ()]).arguments()
    torch.library.opcheck(getattr(ops, name).default, tuple(args), options)


@pytest.mark.parametrize("name", ["perturb_", "shift_", "sgd_step_", "adamw_step_"])
def test_opcheck_with_a_rounding_seed(name: str) -> None:
    pytest.importorskip("expecttest", reason="torch.library.opcheck needs expecttest")
    args, options = Call(name, [(3,), (2, 5), ()], torch.bfloat16).arguments()
    torch.library.opcheck(getattr(ops, name).default, tuple(args), {**options, "rounding_seed": -(2**63)})


@over_mutations
@pytest.mark.parametrize("through", ["torch.ops", "back end"])
def test_a_graph_built_before_a_mutation_does_not_differentiate_after_it(name: str, through: str) -> None:
    call = Call(name, [(3,), (2, 2)])
    for key in WRITTEN[name]:
        call = Call(name, [(3,), (2, 2)])
        if key == "state_steps":
            continue
        watched = call.lists[key][1].requires_grad_()
        loss = watched.square().sum()
        if through == "torch.ops":
            call()
        else:
            run_through_backend(call)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@over_mutations
@pytest.mark.parametrize("through", ["torch.ops", "back end"])
def test_versions_count_what_is_written_and_nothing_else(name: str, through: str) -> None:
    call = Call(name, [(3,), (2, 2)])
    versions = {key: [t._version for t in tensors] for key, tensors in call.lists.items()}
    if through == "torch.ops":
        call()
    else:
        run_through_backend(call)
    for key, tensors in call.lists.items():
        changed = [t._version > old for t, old in zip(tensors, versions[key], strict=True)]
        assert changed == [key in WRITTEN[name]] * 2, key


def fake_call(name: str, dtype: torch.dtype = torch.float32) -> Call:
    call = Call(name, [(3,), (2, 5)], dtype)
    call.norms = [torch.empty((), dtype=norm.dtype) for norm in call.norms]
    return call


@over_operators
@over_dtypes
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fake_tensors_give_the_shapes_of_real_ones(name: str, dtype: torch.dtype, device: str) -> None:
    real = Call(name, [(3,), (2, 5)], dtype)()
    with FakeTensorMode(), torch.device(device):
        fake = fake_call(name, dtype)()
    if real is None:
        assert fake is None
        return
    one, other = ([result] if isinstance(result, Tensor) else list(result) for result in (real, fake))
    assert [(t.shape, t.dtype, t.device.type) for t in other] == [(t.shape, t.dtype, device) for t in one]


MISMATCHES: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "dtype": lambda tensors: [t.to(torch.float64) for t in tensors],
    "shape": lambda tensors: [t[..., None] for t in tensors],
    "length": lambda tensors: tensors[:1],
}


def mismatches() -> list[Any]:
    cases = []
    for name, keys in LISTS.items():
        for key, what in itertools.product(keys[1:], MISMATCHES):
            if name == "l2_norm_pair" and what != "dtype":
                continue
            if key == "state_steps" and what == "shape":
                continue  # one number of any shape
            cases.append(pytest.param(name, key, what))
    return cases


@pytest.mark.parametrize(("name", "key", "what"), mismatches())
def test_real_tensors_that_do_not_match_are_refused(name: str, key: str, what: str) -> None:
    call = Call(name, [(3,), (2, 5)])
    call.lists[key] = MISMATCHES[what](call.lists[key])
    with pytest.raises(RuntimeError, match=rf"^{key}"):
        call()


@pytest.mark.parametrize(("name", "key", "what"), mismatches())
def test_fake_tensors_are_refused_where_real_ones_are(name: str, key: str, what: str) -> None:
    with FakeTensorMode():
        call = fake_call(name)
        call.lists[key] = MISMATCHES[what](call.lists[key])
        with pytest.raises((ValueError, RuntimeError), match=rf"^{key}"):
            call()


# With two empty lists and no number, restore_ has nothing to tell the device by.
@pytest.mark.parametrize("name", ["perturb_", "shift_", "combine_", "decompose_", "sgd_step_", "adamw_step_"])
def test_empty_lists_on_the_meta_device_are_fine(name: str) -> None:
    with torch.device("meta"):
        call = fake_call(name)
        call.lists = {key: [] for key in call.lists}
        call()
