"""Drawing lists of tensors of all sizes, memory formats and alignments, and comparing them bit for bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from gam_fused.kernels.interface import accumulation_dtype


@dataclass(frozen=True)
class Spec:
    """One tensor of a list: its shape, and how it lies in memory (where it has enough dimensions for that)."""

    shape: tuple[int, ...]
    layout: str


# Around one vector, one PyTorch grain and one chunk; prime and even, some with a remainder at every level.
lengths = st.sampled_from([0, 1, 3, 8, 31, 1024, 4097, 16384, 16385, 32768, 70001])
shapes = st.one_of(
    st.just(()),
    st.tuples(lengths),
    st.tuples(st.integers(0, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 5), st.integers(0, 5)),
)
layouts = st.sampled_from(["contiguous", "transposed", "channels_last", "misaligned", "every other element"])
specs = st.lists(st.builds(Spec, shapes, layouts), max_size=6)
# As many layouts as the longest list: the lists of one operator need not be laid out alike.
other_layouts = st.lists(layouts, min_size=6, max_size=6)
seeds = st.integers(0, 2**32)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """A copy of the values whose surroundings in memory, if any, are NaN: reading them shows."""
    if layout == "transposed" and values.dim() >= 2:
        return values.mT.clone(memory_format=torch.contiguous_format).mT
    if layout == "channels_last" and values.dim() == 4:
        return values.clone(memory_format=torch.channels_last)
    if layout in ("transposed", "channels_last"):
        return values.clone()
    step, offset = {"contiguous": (1, 0), "misaligned": (1, 1), "every other element": (2, 1)}[layout]
    buffer = torch.full((step * values.numel() + 2,), math.nan, dtype=values.dtype, device=values.device)
    return buffer[offset : offset + step * values.numel() : step].view(values.shape).copy_(values)


def surroundings(*lists: Sequence[Tensor]) -> list[Tensor]:
    """The buffers that tensors are views of, with the tensors' own elements blanked out."""
    buffers = []
    for tensor in (tensor for tensors in lists for tensor in tensors):
        if tensor._base is not None:
            view, buffer = _with_own_buffer(tensor, tensor._base)
            view.fill_(0)
            buffers.append(buffer)
    return buffers


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Clones that keep layout and surroundings."""
    return [t.clone() if t._base is None else _with_own_buffer(t, t._base)[0] for t in tensors]


def _with_own_buffer(view: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    buffer = base.clone()
    return buffer.as_strided(view.shape, view.stride(), view.storage_offset()), buffer


class Draw:
    """Lists of random tensors of one dtype and device."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.dtype = dtype
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, specs: Sequence[Spec]) -> list[Tensor]:
        return [
            laid_out(self._to_device(torch.randn(s.shape, generator=self.generator, dtype=torch.float64)), s.layout)
            for s in specs
        ]

    def any_bits(self, specs: Sequence[Spec]) -> list[Tensor]:
        """Every bit random: infinities, subnormals, negative zeros, quiet and signalling NaNs with their payloads."""
        width = torch.empty(0, dtype=self.dtype).element_size()
        tensors = []
        for s in specs:
            shape = (*s.shape, width)
            raw = torch.randint(0, 256, shape, generator=self.generator, dtype=torch.uint8)
            tensors.append(laid_out(self._to_device(raw.view(self.dtype).squeeze(-1)), s.layout))
        return tensors

    def norm(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=accumulation_dtype(self.dtype), device=self.device)

    def _to_device(self, values: Tensor) -> Tensor:
        return values.to(self.device, self.dtype)


def relaid(specs: Sequence[Spec], layouts: Sequence[str]) -> list[Spec]:
    """The same shapes in other layouts."""
    return [Spec(s.shape, layout) for s, layout in zip(specs, layouts, strict=False)]


def bits(tensor: Tensor) -> Tensor:
    """The elements as integers: equal for equal NaNs, different for zeros of different sign."""
    return tensor.detach().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()])


def have_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(torch.equal(bits(a), bits(e)) for a, e in zip(actual, expected, strict=True))


def assert_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(bits(a), bits(e)), f"tensor {i}: {a} is not bitwise {e}"
