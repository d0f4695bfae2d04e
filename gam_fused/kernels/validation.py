"""What every operator asks of its lists of tensors, checked before the first byte is written.

It runs several times per step over hundreds of tensors, so the path on which nothing is wrong reads each attribute in
one C-level pass per list and looks for an index only once a pass has found a difference.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from operator import add, attrgetter, le
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_dtype = attrgetter("dtype")
_device = attrgetter("device")
_shape = attrgetter("shape")
_nbytes = attrgetter("nbytes")


def validate_lists(
    *,
    writes: Mapping[str, Sequence[Tensor]] | None = None,
    reads: Mapping[str, Sequence[Tensor]] | None = None,
    same_shape: bool = True,
) -> None:
    """Check the lists of one operator against its first list, and written memory against all other memory.

    All tensors must be strided and share one device and one dtype among float64, float32, bfloat16 and float16; all
    lists must have the length and, with ``same_shape``, index by index the shapes of the first one.

    No element may be written twice, or both written and read, through different elements of the lists. The test is
    exact: views of one storage that interleave without sharing an element, such as the columns of a matrix, pass (they
    cost time proportional to their number of contiguous runs). Tensors that are only read may overlap, be expanded, or
    be one and the same.

    Args:
        writes: lists that the operator writes, by argument name.
        reads: lists that it only reads, by argument name.
        same_shape: whether tensors of equal index must have equal shapes.

    Raises:
        ValueError: names the list and the index, what was found and what was expected.
    """
    writes, reads = writes or {}, reads or {}
    lists = {**writes, **reads}
    check_lengths(lists)
    tensors = [tensor for tensors in lists.values() for tensor in tensors]
    if not tensors:
        return
    try:
        check_alike(lists, same_shape)
        starts = list(map(Tensor.data_ptr, tensors))
    except (AttributeError, RuntimeError):  # not a tensor, or one without a memory of its own
        _check_strided(lists)
        raise
    written = sum(map(len, writes.values()))
    if written:
        _check_disjoint(lists, tensors, starts, written)


def checked(
    *, writes: Sequence[str] = (), reads: Sequence[str] = (), same_shape: bool = True
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate an operator: :func:`validate_lists` looks at its arguments of these names first."""

    def decorate(operator: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(operator)

        @functools.wraps(operator)
        def check_and_run(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind(*args, **kwargs).arguments
            validate_lists(
                writes={name: given[name] for name in writes},
                reads={name: given[name] for name in reads},
                same_shape=same_shape,
            )
            return operator(*args, **kwargs)

        return check_and_run

    return decorate


def validate_shift(
    params: Sequence[Tensor], origins: Sequence[Tensor], ends: Sequence[Tensor], starts: Sequence[Tensor]
) -> None:
    """:func:`validate_lists` of a shift, whose ``origins`` and ``starts`` may be left out by being empty."""
    optional = {name: tensors for name, tensors in (("origins", origins), ("starts", starts)) if tensors}
    validate_lists(writes={"params": params}, reads={"ends": ends, **optional})


def validate_steps(state_steps: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    """Check Adam's step counts: one float32 number for each parameter, on its device, each in memory of its own.

    Raises:
        ValueError: names the index, what was found and what was expected.
    """
    if len(state_steps) != len(params):
        raise ValueError(f"state_steps: {len(state_steps)} tensors, expected {len(params)} as in params")
    for i, (step, param) in enumerate(zip(state_steps, params, strict=True)):
        if step.dtype != torch.float32 or step.numel() != 1:
            found = f"dtype {step.dtype}, {step.numel()} elements"
            raise ValueError(f"state_steps[{i}]: {found}, expected a float32 tensor of one element")
        if step.device != param.device:
            raise ValueError(f"state_steps[{i}]: device {step.device}, expected {param.device} as params[{i}]")
    validate_lists(writes={"state_steps": state_steps})


def _check_strided(lists: Mapping[str, Sequence[Any]]) -> None:
    for name, items in lists.items():
        for i, item in enumerate(items):
            if not isinstance(item, Tensor):
                raise ValueError(f"{name}[{i}]: {type(item).__name__}, expected a tensor")
            if item.layout != torch.strided:
                raise ValueError(f"{name}[{i}]: layout {item.layout}, expected {torch.strided}")


def check_lengths(lists: Mapping[str, Sequence[Tensor]]) -> None:
    """All lists have the length of the first one."""
    first_name, first = next(iter(lists.items()))
    for name, tensors in lists.items():
        if len(tensors) != len(first):
            missing, spare = (name, first_name) if len(tensors) < len(first) else (first_name, name)
            raise ValueError(
                f"{name}: {len(tensors)} tensors, expected {len(first)} as in {first_name}; "
                f"{spare}[{min(len(tensors), len(first))}] has no counterpart in {missing}"
            )


def check_alike(lists: Mapping[str, Sequence[Tensor]], same_shape: bool) -> None:
    """One dtype, one device and, index by index, one shape. Reads no memory: meta and fake tensors will do."""
    first_name, first = next(iter(lists.items()))
    if not first:
        return
    if first[0].dtype not in _FLOATING:
        expected = "a real floating dtype (float64, float32, bfloat16 or float16)"
        raise ValueError(f"{first_name}[0]: dtype {first[0].dtype}, expected {expected}")
    dtypes, devices = [first[0].dtype] * len(first), [first[0].device] * len(first)
    shapes = list(map(_shape, first)) if same_shape else []
    for name, tensors in lists.items():
        _check_equal("dtype", name, list(map(_dtype, tensors)), dtypes, first_name)
        _check_equal("device", name, list(map(_device, tensors)), devices, first_name)
        if same_shape and name != first_name:
            _check_equal("shape", name, list(map(_shape, tensors)), shapes, first_name)


def _check_equal(what: str, name: str, found: list[Any], expected: list[Any], first_name: str) -> None:
    if found == expected:
        return
    i = next(i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
    shown = [tuple(value) if isinstance(value, torch.Size) else value for value in (found[i], expected[i])]
    counterpart = f"{first_name}[{0 if name == first_name else i}]"
    raise ValueError(f"{name}[{i}]: {what} {shown[0]}, expected {shown[1]} as {counterpart}")


def _check_disjoint(
    lists: Mapping[str, Sequence[Tensor]], tensors: list[Tensor], starts: list[int], written: int
) -> None:
    """The first ``written`` of all ``tensors`` must overlap neither themselves nor any other one."""
    ends = list(map(add, starts, map(_nbytes, tensors)))
    if not all(map(Tensor.is_contiguous, tensors)):
        for i, tensor in enumerate(tensors):
            if tensor.is_contiguous() or _is_channels_last(tensor):
                continue
            ends[i] = starts[i] + _extent(tensor)
            if i < written and _overlaps_itself(tensor):
                raise ValueError(
                    f"{_name(lists, i)}: stride {tensor.stride()} for shape {tuple(tensor.shape)} addresses an element "
                    "more than once, expected separate memory for each element; use .contiguous()"
                )

    if _ranges_are_disjoint(starts, ends):
        return
    for i, j in _crossing_ranges(starts, ends):
        i, j = min(i, j), max(i, j)
        if i < written and _overlaps(tensors[i], tensors[j]):
            raise ValueError(
                f"{_name(lists, j)}: overlaps {_name(lists, i)} in memory, expected separate memory as one is written"
            )


def _name(lists: Mapping[str, Sequence[Tensor]], position: int) -> str:
    """The list and index of a tensor from its position in all lists together."""
    for name, tensors in lists.items():
        if position < len(tensors):
            return f"{name}[{position}]"
        position -= len(tensors)
    raise IndexError(position)


def _ranges_are_disjoint(starts: list[int], ends: list[int]) -> bool:
    """Whether no two of the ranges [start, end) share a byte.

    Sorted separately, the k-th end must not lie beyond the (k+1)-th start: if it does, a point between them has k+1
    starts but at most k−1 ends at or before it, so two ranges are open there.
    """
    return all(map(le, sorted(ends), islice(sorted(starts), 1, None)))


def _crossing_ranges(starts: list[int], ends: list[int]) -> Iterator[tuple[int, int]]:
    """Pairs of indices whose ranges share a byte; a tensor without elements has address 0 and no bytes."""
    order = sorted(range(len(starts)), key=starts.__getitem__)
    for position, i in enumerate(order):
        for j in islice(order, position + 1, None):
            if starts[j] >= ends[i]:
                break
            yield i, j


def _is_channels_last(tensor: Tensor) -> bool:
    """Dense like a contiguous tensor, and common enough to be worth a shortcut."""
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def _extent(tensor: Tensor) -> int:
    """Bytes from the first byte of a tensor with elements to one past its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _overlaps_itself(tensor: Tensor) -> bool:
    steps = [(stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    span = 1
    for stride, size in sorted(steps):
        if stride == 0:
            return True
        if stride < span:  # a step may land among the elements of the smaller steps: look at every run
            starts, length = _runs(tensor)
            return bool((starts.diff() < length).any())
        span += (size - 1) * stride
    return False


def _overlaps(written: Tensor, other: Tensor) -> bool:
    """Whether two tensors with elements share one; ``written`` must not overlap itself."""
    starts, length = _runs(written)
    other_starts, other_length = _runs(other)
    # Of the runs that start before a run of the other tensor ends, the last one also ends last.
    last = torch.searchsorted(starts, other_starts + other_length) - 1
    return bool(((last >= 0) & (starts[last] + length > other_starts)).any())


def _runs(tensor: Tensor) -> tuple[Tensor, int]:
    """First bytes of the contiguous runs that make up a tensor with elements, ascending, and their length in bytes.

    1-d int64 on the CPU. Only shape and strides are read, so that this costs a CUDA tensor no synchronisation.
    """
    length = 1
    starts = torch.zeros(1, dtype=torch.int64, device="cpu")
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if stride == length:
            length *= size
        elif stride != 0 and size > 1:
            starts = (starts[:, None] + stride * torch.arange(size, device="cpu")).flatten()
    return tensor.data_ptr() + starts.sort().values * tensor.element_size(), length * tensor.element_size()
