"""Every pass of a step sees the same function: the same random numbers, the same buffers.

A GAM step runs the user's forward pass several times on one mini-batch. Dropout masks must be the same each time, and
running statistics (BatchNorm's, or any other buffer that a forward pass changes) must advance once per step, as the
pass at θ left them.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_Bindings = list[tuple[nn.Module, dict[str, Tensor | None]]]


class _Source:
    """Something with a state that a pass consumes: how to read it, how to set it, and its two values of interest."""

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], Any]) -> None:
        self._read = read
        self._write = write
        self._before = self._after = read()

    def mark(self) -> None:
        self._after = self._read()

    def to_before(self) -> None:
        self._write(self._before)

    def to_after(self) -> None:
        self._write(self._after)


@dataclass
class _Buffer:
    tensor: Tensor
    before: Tensor
    after: Tensor


class Replay:
    """Random states and buffers, before a step and after its first pass.

    Args:
        model: every buffer of this module (and of its submodules) is kept, whatever the class of the module that owns
            it. ``None``: only what :meth:`watch_buffer` is told of.
        params: the parameters. Their devices' global random number generators are kept, beside the CPU's, Python's
            ``random`` and, when it has been imported, NumPy's. A buffer that shares memory with one of them goes where
            it goes, and is not kept.
        keep_random_states: off for passes that the user runs, whose draws are the user's.
    """

    def __init__(self, model: nn.Module | None, params: Sequence[Tensor], *, keep_random_states: bool = True) -> None:
        self._sources = _global_sources(param.device for param in params) if keep_random_states else []
        self._parameter_memory = {param.untyped_storage().data_ptr() for param in params if param.numel() > 0}
        self._generators: set[torch.Generator] = set()
        self._passes = 0

        # A module may write into a buffer, bind a new tensor to its name, or register a new name: all is to be undone.
        self._model = model
        self._bindings = self._bindings_after = _bindings(model)
        self._buffers: dict[int, _Buffer] = {}
        self._watch_all(self._bindings)

    def watch_buffer(self, buffer: Tensor, before: Tensor | None = None) -> None:
        """Keep ``buffer``, which was ``before`` (or is now) what it was before the step. Telling twice is harmless."""
        if id(buffer) not in self._buffers and _is_writable(buffer) and not self._is_parameter(buffer):
            value = buffer.detach().clone() if before is None else before
            self._buffers[id(buffer)] = _Buffer(buffer, value, value)  # all at once: Ctrl-C may come between two lines

    def watch_generator(self, generator: torch.Generator) -> None:
        """Keep the state of a generator that the forward pass uses explicitly. Telling twice is harmless."""
        if generator not in self._generators:
            self._generators.add(generator)
            self._sources.append(_Source(generator.get_state, generator.set_state))

    def begin_pass(self) -> None:
        """Every pass after the first starts from the state before the step."""
        if self._passes:
            self.rewind()
        self._passes += 1

    def end_pass(self) -> None:
        """The first pass leaves the state that the step will end with."""
        if self._passes > 1:
            return
        for source in self._sources:
            source.mark()
        self._bindings_after = _bindings(self._model)
        self._watch_all(self._bindings_after)
        for buffer in self._buffers.values():
            buffer.after = buffer.tensor.detach().clone()

    def rewind(self) -> None:
        """Back to the state before the step."""
        for source in self._sources:
            source.to_before()
        self._write_buffers(self._bindings, [buffer.before for buffer in self._buffers.values()])

    def finish(self) -> None:
        """On to the state after the first pass."""
        self.finish_random_states()
        self._write_buffers(self._bindings_after, [buffer.after for buffer in self._buffers.values()])

    @property
    def rebinds(self) -> bool:
        """Whether the first pass has bound other tensors to buffers' names, or resized a buffer."""
        # Values of buffers tell nothing here, and tensors do not compare to one truth.
        bound = [
            [(module, name, id(buffer)) for module, buffers in bindings for name, buffer in buffers.items()]
            for bindings in (self._bindings, self._bindings_after)
        ]
        return bound[0] != bound[1] or any(
            buffer.before.shape != buffer.after.shape for buffer in self._buffers.values()
        )

    def finish_where(self, condition: Tensor) -> None:
        """As :meth:`finish`, but buffers stay as they were before the step where ``condition`` (0-d, bool) is false.

        Not for a pass that :attr:`rebinds`: the host has to know what a name stands for.
        """
        for buffer in self._buffers.values():
            buffer.after = torch.where(condition.to(buffer.after.device), buffer.after, buffer.before)
        self.finish()

    def finish_random_states(self) -> None:
        """As :meth:`finish`, for the random states alone."""
        for source in self._sources:
            source.to_after()

    def _is_parameter(self, buffer: Tensor) -> bool:
        return buffer.untyped_storage().data_ptr() in self._parameter_memory

    def _watch_all(self, bindings: _Bindings) -> None:
        for _, buffers in bindings:
            for buffer in buffers.values():
                if buffer is not None:
                    self.watch_buffer(buffer)

    def _write_buffers(self, bindings: _Bindings, values: list[Tensor]) -> None:
        for module, buffers in bindings:
            for name in module._buffers.keys() - buffers.keys():
                del module._buffers[name]
            module._buffers.update(buffers)
        if values:
            with torch.no_grad():
                torch._foreach_copy_([buffer.tensor for buffer in self._buffers.values()], values)


def _global_sources(devices: Iterable[torch.device]) -> list[_Source]:
    sources = [_Source(torch.get_rng_state, torch.set_rng_state), _Source(random.getstate, random.setstate)]
    if (numpy := sys.modules.get("numpy")) is not None:
        sources.append(_Source(numpy.random.get_state, numpy.random.set_state))
    return sources + [_device_source(device) for device in dict.fromkeys(devices) if device.type != "cpu"]


def _bindings(model: nn.Module | None) -> _Bindings:
    """The tensor that each buffer's name stands for."""
    return [] if model is None else [(module, dict(module._buffers)) for module in model.modules()]


def _is_writable(buffer: Tensor) -> bool:
    # A lazy module has no values yet. What is not strided (sparse, nested) has no common way of being written. Several
    # elements in one place: PyTorch refuses to write into such a tensor, so no forward pass can have done it.
    if nn.parameter.is_lazy(buffer) or buffer.layout != torch.strided or buffer.is_nested:
        return False
    return not any(stride == 0 and size > 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True))


def _device_source(device: torch.device) -> _Source:
    module = torch.get_device_module(device)
    if device.type == "mps":  # one device, so its functions take none
        return _Source(module.get_rng_state, module.set_rng_state)
    return _Source(lambda: module.get_rng_state(device), lambda state: module.set_rng_state(state, device))
