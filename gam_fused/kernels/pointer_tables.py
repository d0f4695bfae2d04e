"""Tables in device memory that let one launch walk over any number of tensors.

A plan depends on sizes alone and a row of addresses on where tensors lie, so both are made once and found again while
neither changes: parameters and optimizer state never move, and gradients mostly come back to where they were. A table
that is not there yet costs one asynchronous copy from pinned memory, for which the host does not wait (it may for the
first pieces of pinned memory to be allocated).

A CUDA graph that is being captured can only use tables that are there already, and keeps them: see
:meth:`DeviceTables.find`. So it can capture launches over tensors that stay where they are, and not a whole step of an
optimizer, whose gradients autograd allocates anew in the graph's own memory.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes of the widest load."""


class Plan(NamedTuple):
    """Which program works on which chunk; see :mod:`gam_fused.kernels.triton_kernels`."""

    table: Tensor
    tensors: int
    chunks: int


@dataclass
class _Entry:
    table: Tensor
    stream: Any
    uploaded: Any  # the event after the copy; None on the CPU
    served: list[Any] = field(default_factory=list)  # other streams that have waited for it


class DeviceTables:
    """A bounded number of int64 tables in device memory, by key; the least recently used ones make room.

    Args:
        capacity: how many tables are kept at least. A step of a model whose gradients move needs a few new ones.
    """

    def __init__(self, capacity: int = 64) -> None:
        self._capacity = capacity
        self._lock = Lock()  # optimizers of several threads share a back end
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._captured: dict[Hashable, _Entry] = {}

    def find(self, key: Hashable, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        """The table of that key on the device; ``make`` gives its values, on the CPU, if there is none yet.

        Raises:
            RuntimeError: a CUDA graph is being captured and needs a table that is not there.
        """
        with self._lock:
            return self._find((device, key), device, make)

    def _find(self, key: Hashable, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        entry = self._entries.get(key) or self._captured.get(key)
        if entry is None:
            if capturing:
                raise RuntimeError(
                    "a CUDA graph is being captured, and the Triton kernels have no table yet of the addresses that "
                    "this launch uses. Make the same launch once before the capture, on the very tensors that the "
                    "graph will use. A whole optimizer step, whose gradients lie in the graph's own memory, needs "
                    "backend='native', whose launches take no tables."
                )
            entry = _upload(make(), device)
            self._entries[key] = entry
            while len(self._entries) > self._capacity:
                self._entries.popitem(last=False)
        elif capturing:
            self._captured[key] = entry  # replays read it, and nobody says when the graph is gone
        elif key in self._entries:
            self._entries.move_to_end(key)
        if entry.uploaded is not None and not capturing:
            _make_usable_here(entry, device)
        return entry.table

    def plan(self, numels: Sequence[int], chunk: int, device: torch.device) -> Plan:
        """The plan for tensors of these sizes, cut into chunks of ``chunk`` elements."""
        chunks = sum(-(-numel // chunk) for numel in numels)
        table = self.find(("plan", chunk, tuple(numels)), device, lambda: _planned(numels, chunk))
        return Plan(table, len(numels), chunks)

    def addresses(
        self, lists: Sequence[Sequence[Tensor]], device: torch.device, extra: Sequence[Tensor] = ()
    ) -> Tensor:
        """``[lists, tensors]`` addresses, for each tensor whether all of its addresses are aligned, then ``extra``.

        ``extra``: one more tensor for each, of another kind, whose alignment does not matter.
        """
        rows = [tuple(map(Tensor.data_ptr, tensors)) for tensors in lists]
        more = tuple(map(Tensor.data_ptr, extra))

        def make() -> Tensor:
            flags = [
                int(not any(address % ALIGNMENT for address in of_tensor)) for of_tensor in zip(*rows, strict=True)
            ]
            return _table(array("q", [address for row in (*rows, flags, more) for address in row]))

        return self.find(("addresses", *rows, more), device, make)


def _planned(numels: Sequence[int], chunk: int) -> Tensor:
    sizes = torch.tensor(numels, dtype=torch.int64, device="cpu")
    counts = (sizes + chunk - 1) // chunk
    tensors = torch.repeat_interleave(counts)
    numbers = torch.arange(len(tensors), device="cpu") - (counts.cumsum(0) - counts)[tensors]
    return torch.cat([sizes, tensors, numbers])


def _table(values: array[int]) -> Tensor:
    return torch.frombuffer(values, dtype=torch.int64) if values else torch.empty(0, dtype=torch.int64, device="cpu")


def _upload(values: Tensor, device: torch.device) -> _Entry:
    if device.type == "cpu":
        return _Entry(values, None, None)
    # PyTorch's allocator for pinned memory knows of the copy and does not hand the memory out again before its end.
    table = values.pin_memory().to(device, non_blocking=True)
    stream = torch.cuda.current_stream(device)
    return _Entry(table, stream, stream.record_event())


def _make_usable_here(entry: _Entry, device: torch.device) -> None:
    here = torch.cuda.current_stream(device)
    if here != entry.stream and here not in entry.served:
        here.wait_event(entry.uploaded)
        entry.table.record_stream(here)
        entry.served.append(here)
