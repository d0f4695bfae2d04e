"""Malformed calls raise and write nothing: lists, numbers, step counts, and several faults at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gam_fused.kernels import extension
from tests.kernels.native.common import (
    DTYPES,
    LISTS,
    WRITTEN,
    Call,
    FullCall,
    NeedsDispatcher,
    call_directly,
    needs_native,
    ops,
    over_operators,
)
from tests.kernels.tensor_lists import bits

pytestmark = needs_native

refusals = (RuntimeError, TypeError, ValueError, NotImplementedError)


def freed(tensor: Tensor) -> Tensor:
    """A tensor whose storage is gone: behind an offset, its address is no null pointer."""
    view = torch.zeros(tensor.numel() + 8, dtype=tensor.dtype)[8:].view(tensor.shape)
    view.untyped_storage().resize_(0)
    return view


def assert_refused_directly(call: Callable[[], Any]) -> None:
    """A direct call, where there are any, is an error or one for PyTorch's dispatcher, which then raises it."""
    if extension.direct_unavailable_reason() is None:
        with pytest.raises((RuntimeError, NeedsDispatcher)):
            call()


def assert_refused(call: Call, whole: Sequence[Tensor]) -> None:
    """Through PyTorch's dispatcher and past it; the whole tensors keep their bits and versions."""
    before = [bits(tensor).clone() for tensor in whole]
    versions = [tensor._version for tensor in whole]
    with pytest.raises(refusals):
        call()
    assert_refused_directly(call.directly)
    assert all(torch.equal(bits(tensor), old) for tensor, old in zip(whole, before, strict=True))
    assert [tensor._version for tensor in whole] == versions


def assert_taken(call: Call) -> None:
    call()
    if extension.direct_unavailable_reason() is None:
        call.directly()


REPLACEMENTS: dict[str, Callable[[Tensor], Any]] = {
    "a longer shape": lambda t: torch.zeros((*t.shape, 2), dtype=t.dtype),
    "a larger shape": lambda t: torch.zeros((t.numel() + 1,), dtype=t.dtype),
    "integers": lambda t: torch.zeros(t.shape, dtype=torch.int32),
    "complex numbers": lambda t: torch.zeros(t.shape, dtype=torch.complex64),
    "booleans": lambda t: torch.zeros(t.shape, dtype=torch.bool),
    "another dtype": lambda t: t.to(torch.float64 if t.dtype != torch.float64 else torch.float32),
    "float8": lambda t: torch.zeros(t.shape, dtype=torch.float8_e4m3fn),
    "the meta device": lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"),
    "a huge tensor on meta": lambda t: torch.empty(2**59, dtype=t.dtype, device="meta"),
    "gaps": lambda t: torch.zeros(2 * t.numel() + 2, dtype=t.dtype)[::2][: t.numel()].view(t.shape),
    "an expanded tensor": lambda t: torch.zeros(1, dtype=t.dtype).expand(t.numel()).view(t.shape),
    "a sparse tensor": lambda t: torch.zeros(t.shape, dtype=t.dtype).to_sparse(),
    "a freed storage": freed,
    "None": lambda t: None,
    "a number": lambda t: 1.0,
    "a string": lambda t: "tensor",
}


@over_operators
@settings(max_examples=1000)
@given(data=st.data())
def test_malformed_calls_raise_and_write_nothing(name: str, data: st.DataObject) -> None:
    """1,000 for each of the eleven operators."""
    count = data.draw(st.integers(1, 4))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    shapes = [data.draw(st.sampled_from([(4,), (2, 3), (3, 1, 2), (17,)])) for _ in range(count)]
    call = Call(name, shapes, dtype)
    key = data.draw(st.sampled_from(list(LISTS[name])))
    at = data.draw(st.integers(0, count - 1))
    whole = call.tensors()
    kinds = ["replace"]
    if not name.startswith("l2_norm"):
        kinds += ["shorter", "longer"]
    if WRITTEN[name]:
        kinds += ["alias", "overlap", "scalar"]
    kind = data.draw(st.sampled_from(kinds))
    if kind == "replace":
        # A single number can neither have gaps nor repeat an element.
        fine_for_one = ("gaps", "an expanded tensor") if key == "state_steps" else ()
        replacements = [what for what in REPLACEMENTS if what not in fine_for_one]
        replacement = REPLACEMENTS[data.draw(st.sampled_from(replacements))](call.lists[key][at])
        is_alone = count == 1 and name == "l2_norm"
        if isinstance(replacement, Tensor) and (is_alone or name.startswith("l2_norm")):
            # Of a list that is only read, sizes are free, and one dtype or device is as good as another.
            fine = replacement.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
            is_dense = replacement.layout == torch.strided and replacement.is_contiguous()
            if (
                fine
                and is_dense
                and (is_alone or replacement.dtype == dtype)
                and replacement.untyped_storage().nbytes()
            ):
                replacement = replacement.to(torch.int32)
        call.lists[key][at] = replacement
    elif kind == "shorter":
        call.lists[key].pop()
        if key in ("origins", "starts", "momentum_buffers", "max_exp_avg_sqs") and not call.lists[key]:
            call.lists[key] = [torch.zeros(1, dtype=dtype)] * (count + 1)
    elif kind == "longer":
        call.lists[key].append(torch.zeros(3, dtype=dtype))
    elif kind in ("alias", "overlap"):
        written = data.draw(st.sampled_from(WRITTEN[name]))
        others = [
            other
            for other in LISTS[name]
            if other != written and (other == "state_steps") == (written == "state_steps")
        ]
        if not others:
            call.lists[written] = [call.lists[written][0]] * (count + 1)
        else:
            victim, other = call.lists[written][at], data.draw(st.sampled_from(others))
            if kind == "overlap":
                buffer = torch.zeros(victim.numel() + 1, dtype=victim.dtype)
                call.lists[written][at] = buffer[:-1].view(victim.shape)
                victim = buffer[1:].view(victim.shape)
            call.lists[other][at] = victim
    elif name == "restore_":
        call.lists["params"] = []
        call.lists["backups"] = [torch.zeros(1)]
    else:
        wrong = [torch.tensor([1.0, 2.0]), torch.tensor(1), torch.tensor(1.0, device="meta"), torch.tensor(1.0).half()]
        call.norms[0] = data.draw(st.sampled_from(wrong))
    assert_refused(call, whole)


# The numbers that are tensors, and where they stand: a position, a position in a list of guards, or a name.
NUMBERS: list[tuple[str, Any]] = [
    ("perturb_", 2),
    ("perturb_", 3),
    ("shift_", 4),
    ("combine_", 4),
    ("decompose_", 4),
    ("decompose_", 5),
    ("sgd_step_", 5),
    ("sgd_step_", (6, 0)),
    ("sgd_step_", (6, 1)),
    ("adamw_step_", 8),
    ("adamw_step_", (9, 0)),
    ("adamw_step_", (9, 1)),
    *itertools.product(("sgd_step_", "adamw_step_"), ("lr_tensor", "grad_scale", "found_inf")),
]

BAD_NUMBERS: dict[str, Callable[[Tensor], Any]] = {
    "two": lambda t: torch.ones(2, dtype=t.dtype),
    "none": lambda t: torch.ones(0, dtype=t.dtype),
    "an integer": lambda t: torch.ones((), dtype=torch.int64),
    "complex": lambda t: torch.ones((), dtype=torch.complex64),
    "half": lambda t: torch.ones((), dtype=torch.float16),
    "the other dtype": lambda t: torch.ones((), dtype=torch.float32 if t.dtype == torch.float64 else torch.float64),
    "on meta": lambda t: torch.ones((), dtype=t.dtype, device="meta"),
    "sparse": lambda t: torch.ones(1, dtype=t.dtype).to_sparse(),
    "freed": freed,
    "a list": lambda t: [t],
    "a string": lambda t: "1.0",
}


@pytest.mark.parametrize("fault", list(BAD_NUMBERS))
@pytest.mark.parametrize(("name", "place"), NUMBERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_malformed_number_raises_and_nothing_is_written(
    name: str, place: Any, fault: str, dtype: torch.dtype
) -> None:
    call = FullCall(name, [(4,), (2, 3)], dtype)
    args, options = call.arguments()
    holder: Any = options if isinstance(place, str) else args
    if isinstance(place, tuple):
        holder, place = args[place[0]], place[1]
    before = [bits(tensor).clone() for tensor in call.tensors()]
    versions = [tensor._version for tensor in call.tensors()]
    holder[place] = BAD_NUMBERS[fault](holder[place])
    with pytest.raises(refusals):
        getattr(ops, name)(*args, **options)
    assert_refused_directly(lambda: call_directly(name, args, options))
    assert all(torch.equal(bits(t), old) for t, old in zip(call.tensors(), before, strict=True))
    assert [t._version for t in call.tensors()] == versions
    assert_taken(call)  # the same call without the fault


@over_operators
@settings(max_examples=300)
@given(data=st.data())
def test_several_faults_at_once_raise_and_write_nothing(name: str, data: st.DataObject) -> None:
    call = FullCall(name, [(4,), (2, 3), (5, 1)], data.draw(st.sampled_from(DTYPES)))
    whole = call.tensors()
    places = st.tuples(st.sampled_from(LISTS[name]), st.integers(0, 2))
    # PyTorch's own message about what is no tensor prints all the others, and crashes where a storage is freed.
    excluded = data.draw(st.sampled_from([("a freed storage",), ("None", "a number", "a string")]))
    replacements = [what for what in REPLACEMENTS if what not in excluded]
    if name == "l2_norm_pair":  # see test_norms_of_two_devices_are_refused
        replacements = [what for what in replacements if "meta" not in what]
    certain = [what for what in replacements if what in ("integers", "a sparse tensor", "a freed storage", "None")]
    # One that is always a fault, and others that may be any replacement at all.
    for number, (key, at) in enumerate(data.draw(st.lists(places, min_size=2, max_size=5, unique=True))):
        kind = data.draw(st.sampled_from(replacements if number else certain))
        call.lists[key][at] = REPLACEMENTS[kind](call.lists[key][at])
    assert_refused(call, whole)


@over_operators
@pytest.mark.parametrize("missing", [0, 1, 3])
def test_a_storage_must_reach_to_the_end_of_a_view_behind_an_offset(name: str, missing: int) -> None:
    """``missing`` elements too short; 3 are as many as lie before the view."""
    for key in LISTS[name]:
        call = Call(name, [(5,), (2, 3)], torch.float32)
        last = call.lists[key][1]
        view = torch.zeros(last.numel() + 3)[3:].view(last.shape).copy_(last)
        view.untyped_storage().resize_((last.numel() + 3 - missing) * last.element_size())
        call.lists[key][1] = view
        if missing:
            assert_refused(call, [tensor for tensor in call.tensors() if tensor is not view])
        else:
            assert_taken(call)


@pytest.mark.parametrize("order", [1, -1])
def test_norms_of_two_devices_are_refused(order: int) -> None:
    lists = [[torch.ones(3)], [torch.ones(3, device="meta")]][::order]
    with pytest.raises(refusals):
        ops.l2_norm_pair(*lists)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: [torch.zeros(()), torch.zeros((), dtype=torch.float64)],
        lambda: [torch.zeros((), dtype=torch.float64) for _ in range(2)],
        lambda: [torch.zeros((), dtype=torch.int64) for _ in range(2)],
        lambda: [torch.zeros(2), torch.zeros(2)],
        lambda: [torch.zeros(())] * 2,
        lambda: [torch.zeros(())],
        lambda: [torch.zeros(()) for _ in range(3)],
        lambda: [torch.zeros((), device="meta") for _ in range(2)],
    ],
    ids=["mixed", "float64", "int64", "two numbers", "one twice", "too few", "too many", "meta"],
)
def test_malformed_step_counts_raise_and_nothing_is_written(wrong: Callable[[], list[Tensor]]) -> None:
    call = Call("adamw_step_", [(4,), (2, 3)])
    call.lists["state_steps"] = wrong()
    assert_refused(call, [tensor for tensor in call.tensors() if tensor.device.type == "cpu"])
