"""What a step costs beside time: the operators that it dispatches, and the memory that it takes.

**Operators** are those that reach PyTorch's dispatcher below autograd, views included: each of ``aten``'s that is not
put together from others, and each of ``gam_fused``'s, counts as one.

**Memory** is what PyTorch's allocator has handed out. On CUDA the allocator keeps the peak itself. On the CPU the
profiler is told of every block as it is allocated and freed, temporary ones inside of operators too, and the peak is
the largest running sum of these. That is exact and the same in each run, down to a few bytes and for small models,
which the process's resident memory is not: that counts pages, never shrinks while the process lives, and holds the
interpreter and what the C library has not returned. What oneDNN and MKL allocate for themselves is in neither.

A contender is measured from before it is built until after a step of it, and its model counts: whatever it frees has
then been seen to be allocated, and what it keeps between steps (weights, gradients, state) is in the peak.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

# Optimizers allocate their state in the first step, and free gradients of the one before in the second.
_STEPS_BEFORE = 2


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.operators += 1
        return func(*args, **(kwargs or {}))


def count_operators(call: Callable[[], object]) -> int:
    """How many operators one call dispatches, backward passes included."""
    with _Counter() as counter:
        call()
    return counter.operators


@dataclass(frozen=True)
class Memory:
    """Bytes: the most that was allocated at any moment of a step, and what stays allocated after it."""

    peak: int
    kept: int


def step_memory(build: Callable[[], Callable[[], object]], device: torch.device) -> Memory:
    """What a step takes that ``build`` makes; of all that is allocated, what was not there before ``build``."""
    gc.collect()
    return _on_cuda(build, device) if device.type == "cuda" else _on_cpu(build)


def _on_cuda(build: Callable[[], Callable[[], object]], device: torch.device) -> Memory:
    before = torch.cuda.memory_allocated(device)
    step = build()
    for _ in range(_STEPS_BEFORE):
        step()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return Memory(torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before)


_LAST_STEP = "the step whose memory is measured"

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler says on stderr that it starts and stops


def _on_cpu(build: Callable[[], Callable[[], object]]) -> Memory:
    profiler: AbstractContextManager[Any] = profile(use_device=None, profile_memory=True)
    with profiler as profiled:
        step = build()
        for _ in range(_STEPS_BEFORE):
            step()
        with torch.profiler.record_function(_LAST_STEP):
            step()
    events = sorted(profiled.kineto_results.events(), key=lambda event: event.start_ns())
    (begin,) = [event.start_ns() for event in events if event.name() == _LAST_STEP]
    allocated = peak = 0
    for event in events:
        if event.name() != "[memory]":
            continue
        if event.start_ns() >= begin:
            peak = max(peak, allocated)  # as the step begins, and before a block is freed
        allocated += event.nbytes()
    return Memory(max(peak, allocated), allocated)
