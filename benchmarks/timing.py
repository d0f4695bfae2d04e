"""Timing calls beside each other, so that what disturbs one disturbs all."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)
Call = Callable[[], object]

_MAX_CALLS = 100

_WARM_UPS = 2


@dataclass(frozen=True)
class Sample:
    """Seconds for one call: until its work was done and, where that is not the same, until it came back."""

    seconds: float
    host_seconds: float | None = None


@dataclass(frozen=True)
class Timing:
    """The samples of one call."""

    samples: list[Sample]

    @property
    def median(self) -> float:
        """Seconds."""
        return self.quartiles[1]

    @property
    def fastest(self) -> float:
        """Seconds."""
        return min(sample.seconds for sample in self.samples)

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """First quartile, median and third quartile, in seconds."""
        seconds = [sample.seconds for sample in self.samples]
        if len(seconds) < 2:
            return seconds[0], seconds[0], seconds[0]
        first, second, third = statistics.quantiles(seconds, n=4, method="inclusive")
        return first, second, third

    @property
    def host_median(self) -> float | None:
        """Seconds until the call came back, where the work was done elsewhere."""
        seconds = [sample.host_seconds for sample in self.samples if sample.host_seconds is not None]
        return statistics.median(seconds) if seconds else None


class Timer(Protocol):
    """How to time a call on one kind of device."""

    def prepare(self, call: Call) -> int:
        """Warm up; how often the call is to be repeated in each sample."""
        ...

    def sample(self, call: Call, times: int) -> Sample:
        """Time the call."""
        ...


@dataclass(frozen=True)
class HostTimer:
    """Wall clock. Caches are as the call before left them, which is one of the others that are measured, or its own."""

    sample_seconds: float = 1e-3
    """A sample repeats short calls until it has lasted this long."""
    after_its_own: bool = False
    """Whether each sample comes after a call of the same kind that is not timed, as in a loop of nothing else."""

    def prepare(self, call: Call) -> int:
        """Warm up; how often the call is to be repeated in each sample."""
        for _ in range(_WARM_UPS):
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
        return min(_MAX_CALLS, math.ceil(self.sample_seconds / seconds))

    def sample(self, call: Call, times: int) -> Sample:
        """Time the call."""
        if self.after_its_own:
            call()
        start = time.perf_counter()
        for _ in range(times):
            call()
        return Sample((time.perf_counter() - start) / times)


class CudaTimer:
    """CUDA events, with nothing of the call's data in the second-level cache.

    Before each call the device writes a buffer four times as large as its second-level cache, then idles for a
    millisecond or so. Meanwhile the host queues the call's kernels, so that the events time the device and not the
    host, unless the host takes longer than that; what the host takes is in ``host_seconds``.
    """

    _STALL_CYCLES = 3_000_000

    def __init__(self, device: torch.device) -> None:
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._device = device
        self._flush = torch.empty(max(4 * cache_bytes, 64 * 2**20), dtype=torch.int8, device=device)

    def prepare(self, call: Call) -> int:
        """Warm up; how often the call is to be repeated in each sample."""
        for _ in range(_WARM_UPS):
            call()
        torch.cuda.synchronize(self._device)
        return 1

    def sample(self, call: Call, times: int) -> Sample:
        """Time the call."""
        with torch.cuda.device(self._device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            torch.cuda._sleep(self._STALL_CYCLES)
            start.record()
            host_start = time.perf_counter()
            for _ in range(times):
                call()
            host_seconds = time.perf_counter() - host_start
            end.record()
            end.synchronize()
        return Sample(start.elapsed_time(end) / 1e3 / times, host_seconds / times)


def timer_for(device: torch.device) -> Timer:
    """The timer for work on this device."""
    return CudaTimer(device) if device.type == "cuda" else HostTimer()


def measure(calls: Mapping[Key, Call], timer: Timer, repeats: int) -> dict[Key, Timing | str]:
    """Time all calls ``repeats`` times, each time in another order, after each has been warmed up.

    A call that raises ``RuntimeError`` or ``ValueError`` while it is warmed up is left out; its result is the reason.
    """
    results: dict[Key, Timing | str] = {}
    times: dict[Key, int] = {}
    for key, call in calls.items():
        try:
            times[key] = timer.prepare(call)
            results[key] = Timing([])
        except (RuntimeError, ValueError) as error:
            results[key] = (str(error).splitlines() or [type(error).__name__])[0]
    shuffle = random.Random(0).shuffle
    order = list(times)
    for _ in range(repeats):
        shuffle(order)
        for key in order:
            timing = results[key]
            assert isinstance(timing, Timing)
            timing.samples.append(timer.sample(calls[key], times[key]))
    return results
