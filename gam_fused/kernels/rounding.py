"""Stochastic rounding to bfloat16 and float16: a number between two neighbours becomes either, in proportion.

Rounding to nearest drops every change below half a unit in the last place, whatever the changes add up to. Stochastic
rounding keeps them on average: its expected value is the number itself.

The random bits are a function of the launch's seed, the tensor's place in its list and the element's place in the
tensor, as in a counter-based generator: the same on every device and back end, whatever the number of threads, and
without any state. The functions have the names that they have in ``csrc/rounding.h``.

Sources: the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA
2014) makes keys; a 32-bit integer hash of low bias found by C. Wellons ("Prospecting for hash functions", 2018), twice,
makes the bits of an element.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gam_fused.kernels.layouts import are_laid_out_alike

_MASK32 = 0xFFFF_FFFF
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF


def seeds(step: int) -> Iterator[int]:
    """Seeds for the launches of a step, one after another: other steps have other ones."""
    return iter(range(step << 16, (step + 1) << 16))


def mix64(x: int) -> int:
    """A bijection of 64-bit integers: SplitMix64's step and finaliser."""
    x = (x + 0x9E37_79B9_7F4A_7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58_476D_1CE4_E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D0_49BB_1331_11EB) & _MASK64
    return x ^ (x >> 31)


def launch_key(seed: int) -> int:
    """What all tensors of a launch share, 64 bits. ``seed``: any integer, taken modulo 2⁶⁴."""
    return mix64(seed & _MASK64)


def tensor_key(launch_key: int, tensor: int, block: int) -> int:
    """For the 2³² elements of number ``block`` of a tensor, by its place in the list of the launch; 64 bits."""
    return mix64((launch_key + (tensor << 32) + block) & _MASK64)


def _mix32(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x7FEB_352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846C_A68B) & _MASK32
    return x ^ (x >> 16)


def random_bits(seed: int, tensor: int, places: Tensor) -> Tensor:
    """32 random bits for each element, as int64 of the shape of ``places``, the elements' places in the tensor."""
    key = launch_key(seed)
    bits = torch.empty_like(places)
    for block in (places >> 32).unique().tolist():
        of_block = tensor_key(key, tensor, block)
        here = (places >> 32) == block
        bits[here] = _mix32(_mix32((places[here] & _MASK32) ^ (of_block & _MASK32)) ^ (of_block >> 32))
    return bits


def places_of(tensors: Sequence[Tensor]) -> Tensor:
    """The places of the elements of tensors of one shape, int64.

    They are counted as they lie in memory where all tensors are dense and laid out alike, by rows otherwise.
    """
    first = tensors[0]
    count = torch.arange(first.numel(), device=first.device)
    return count.as_strided(first.shape, first.stride()) if are_laid_out_alike(tensors) else count.view(first.shape)


def rounded(values: Tensor, dtype: torch.dtype, seed: int | None, tensor: int, places: Tensor | None) -> Tensor:
    """``values`` in ``dtype``: rounded to nearest without a seed, otherwise stochastically.

    Args:
        values: of the accumulation dtype of ``dtype``. Nothing is rounded where that is ``dtype`` itself. Infinities
            and NaN stay what they are.
        dtype: float64, float32, bfloat16 or float16.
        seed: of the launch.
        tensor: the tensor's place in the lists of the launch.
        places: see :func:`places_of`; needed with a seed only.
    """
    if seed is None or places is None or values.dtype == dtype:
        return values.to(dtype)
    random = random_bits(seed, tensor, places)
    bits = values.view(torch.int32).to(torch.int64) & _MASK32
    if dtype == torch.bfloat16:
        drawn = _float_of((bits + (random >> 16)) & 0xFFFF_0000)
    else:
        normal = _float_of((bits + (random >> 19)) & 0xFFFF_E000)
        # Subnormal float16 numbers are whole multiples of 2^-24.
        multiple = values.abs() * 2.0**24
        below = multiple.floor()
        up = (random >> 8).to(torch.float32) * 2.0**-24 < multiple - below
        subnormal = torch.copysign((below + up) * 2.0**-24, values)
        drawn = torch.where(values.abs() < 2.0**-14, subnormal, normal)
    return torch.where(values.isfinite(), drawn, values).to(dtype)


def _float_of(bits: Tensor) -> Tensor:
    return (bits - ((bits >> 31) << 32)).to(torch.int32).view(torch.float32)
