"""The double backward of normalization layers in Triton kernels, at most two launches each, on CUDA and ROCm devices.

Signatures and results are those of :mod:`formulas`. Sums are made in float32, or in float64 of float64, in an order
that depends on shapes alone. Tensors shaped like the input have to be laid out alike and without gaps: others are
copied. Tensors without memory of their own, such as batches of gradients (``is_grads_batched``), are left to the
formulas.

With ``TRITON_INTERPRET=1`` the same kernels run on CPU tensors, slowly: for tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

from gam_fused.kernels import triton_launches
from gam_fused.kernels.triton_launches import THREADS, language_dtype, on_device, warps_of
from gam_fused.second_order import formulas
from gam_fused.second_order.formulas import Results, accumulation_dtype
from gam_fused.second_order.native import dense, memory_format

_PACK = 16  # bytes that a thread reads or writes at once

# A tile of channels is one pack of each tensor for each thread. It has as many positions as there are, up to the next
# of a few powers of two, each of which is compiled for; in channels_last, channels for two sectors of memory.
_POSITIONS = (16, 64, 256)
_CHANNELS_LAST_BYTES = 64

# The first launch has programs enough to keep the largest GPUs busy, but no more slices than each program of the second
# may be asked to add up. In group normalization these read the sums of a whole group, and take some tiles each for it.
_ENOUGH_PROGRAMS = 512
_MOST_SLICES = 64
_MOST_SLICES_OF_SAMPLE = 16
_TILES_OF_PORTION = 8

# Rows of so many bytes, in the accumulation dtype, stay in registers between their sums and their results; a tile has
# several of them if they are short. Each program leaves a row of sums for the gradient of the weight.
_LONGEST_SHORT_ROW = 16384
_TILE_OF_ROWS = 8192
_SHORTEST_TILE = 16  # elements
_PROGRAMS_OF_ROWS = 256

# Weights whose gradient is one program's to add up.
_CHANNELS_OF_WEIGHT = 16
_PLACES_OF_WEIGHT = 32


@cache
def unavailable_reason(device: torch.device) -> str | None:
    """``None`` where Triton can compile for this device, otherwise one sentence: why not."""
    return triton_launches.unavailable_reason(device)


def _unless_without_memory(function: Callable[..., Results]) -> Callable[..., Results]:
    """The function, or the formula of its name where a tensor has no address."""

    @wraps(function)
    def call(*arguments: Any) -> Results:
        try:
            for argument in arguments:
                if isinstance(argument, Tensor):
                    argument.data_ptr()
        except RuntimeError:
            return getattr(formulas, function.__name__)(*arguments)
        return function(*arguments)

    return call


@_unless_without_memory
def batch_norm_double_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    gg_input: Tensor | None,
    gg_weight: Tensor | None,
    gg_bias: Tensor | None,
    training: bool,
    needs_grad_output: bool,
    needs_input: bool,
    needs_weight: bool,
) -> Results:
    """See :func:`formulas.batch_norm_double_backward`; keeps channels_last."""
    layout = memory_format(input)
    u, x, v = dense(layout, grad_output, input, gg_input)
    w, m, r, a, b = dense(torch.contiguous_format, weight, mean, invstd, gg_weight, gg_bias)
    results = _room((u, x, w), (needs_grad_output, needs_input, needs_weight))
    if not input.numel():
        return _of_nothing(results)
    samples, channels, positions = input.shape[0], input.shape[1], math.prod(input.shape[2:])
    is_last = layout != torch.contiguous_format or positions == 1
    if is_last:
        samples, positions = 1, samples * positions
    constants = _constants(channels if is_last else positions, input, u, v)
    constants |= _tile_of_channels(positions, is_last, constants["VEC"], input) | {"LAST": is_last}
    tiles = _ceil(channels, constants["K"])
    steps = samples * _ceil(positions, constants["J"])
    slices, steps = _shares(steps, min(_ceil(_ENOUGH_PROGRAMS, tiles), _MOST_SLICES))
    kernels, sums = _kernels(), None
    with on_device(input.device):
        if training or needs_weight:
            sums = _numbers(input, slices, 5, channels)
            kernels.channel_sums_kernel[(tiles * slices,)](
                u, x, m, v, sums, samples, channels, positions, 1, slices, steps, **constants
            )
        kernels.batch_norm_kernel[(tiles * slices,)](
            u, x, w, m, r, v, a, b, sums, *results, samples, channels, positions, slices, steps,
            CONSTANT=not training, **constants,
        )  # fmt: skip
    return results


@_unless_without_memory
def group_norm_double_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    gg_input: Tensor | None,
    gg_weight: Tensor | None,
    gg_bias: Tensor | None,
    num_groups: int,
    needs_grad_output: bool,
    needs_input: bool,
    needs_weight: bool,
) -> Results:
    """See :func:`formulas.group_norm_double_backward`. On GPUs PyTorch's own kernels want contiguous tensors, too."""
    u, x, v = dense(torch.contiguous_format, grad_output, input, gg_input)
    w, m, r, a, b = dense(torch.contiguous_format, weight, mean, invstd, gg_weight, gg_bias)
    results = _room((u, x, w), (needs_grad_output, needs_input, needs_weight))
    if not input.numel():
        return _of_nothing(results)
    samples, channels, positions = input.shape[0], input.shape[1], math.prod(input.shape[2:])
    of_group = channels // num_groups
    constants = _constants(positions, input, u, v)
    constants |= _tile_of_channels(positions, False, constants["VEC"], input)
    tiles, blocks = _ceil(channels, constants["K"]), _ceil(positions, constants["J"])
    slices, steps = _shares(blocks, min(_ceil(_ENOUGH_PROGRAMS, tiles * samples), _MOST_SLICES_OF_SAMPLE))
    tiles_of_group = _ceil(of_group, constants["K"]) * blocks
    portions, tiles_of_portion = _shares(tiles_of_group, _ceil(tiles_of_group, _TILES_OF_PORTION))
    programs = samples * num_groups * portions
    kernels, sums = _kernels(), _numbers(input, samples, slices, 5, channels)
    if needs_weight:
        programs += num_groups * _ceil(of_group, _CHANNELS_OF_WEIGHT)
    with on_device(input.device):
        kernels.channel_sums_kernel[(tiles * slices * samples,)](
            u, x, m, v, sums, 1, channels, positions, of_group, slices, steps, LAST=False, **constants
        )
        kernels.group_norm_kernel[(programs,)](
            u, x, w, m, r, v, a, b, sums, *results, samples, channels, positions, of_group, slices, portions,
            tiles_of_portion, CHANNELS=_CHANNELS_OF_WEIGHT, **constants,
        )  # fmt: skip
    return results


@_unless_without_memory
def layer_norm_double_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor,
    gg_input: Tensor | None,
    gg_weight: Tensor | None,
    gg_bias: Tensor | None,
    normalized_dims: int,
    needs_grad_output: bool,
    needs_input: bool,
    needs_weight: bool,
) -> Results:
    """See :func:`formulas.layer_norm_double_backward`."""
    u, x, v = dense(torch.contiguous_format, grad_output, input, gg_input)
    w, m, r, a, b = dense(torch.contiguous_format, weight, mean, invstd, gg_weight, gg_bias)
    results = _room((u, x, w), (needs_grad_output, needs_input, needs_weight))
    if not input.numel():
        return _of_nothing(results)
    size = math.prod(input.shape[-normalized_dims:])
    rows = input.numel() // size
    constants = _constants(size, input, u, v)
    tile = _tile_of_rows(size, constants["VEC"], input)
    programs = min(_ceil(rows, tile.get("R", 1)), _PROGRAMS_OF_ROWS)
    kernels, sums = _kernels(), _numbers(input, programs, size) if needs_weight else None
    operands = u, x, w, m, r, v, a, b
    with on_device(input.device):
        if "R" in tile:
            launch = kernels.short_rows_kernel[(programs,)]
            launch(*operands, sums, *results[:2], rows, size, programs, **constants | tile)
        else:
            terms = _numbers(input, 6, rows)
            launch = kernels.long_rows_kernel[(programs,)]
            launch(*operands, terms, sums, *results[:2], rows, size, programs, **constants | tile)
        if needs_weight:
            launch = kernels.add_partials_kernel[(_ceil(size, _PLACES_OF_WEIGHT),)]
            options = _options(THREADS, input)
            launch(sums, results[2], size, programs, A=constants["A"], PLACES=_PLACES_OF_WEIGHT, **options)
    return results


def _kernels() -> Any:
    from gam_fused.second_order import triton_kernels

    return triton_kernels


def _room(like: Sequence[Tensor | None], needs: Sequence[bool]) -> Results:
    """For the results that are needed, laid out as what they are gradients of."""
    first, second, third = (
        torch.empty_like(tensor) if is_needed and tensor is not None else None
        for tensor, is_needed in zip(like, needs, strict=True)
    )
    return first, second, third


def _of_nothing(results: Results) -> Results:
    """Results of an input without elements."""
    if results[2] is not None:
        results[2].zero_()
    return results


def _numbers(input: Tensor, *shape: int) -> Tensor:
    """Room for some in the accumulation dtype."""
    return torch.empty(shape, dtype=accumulation_dtype(input), device=input.device)


def _constants(row: int, input: Tensor, *others: Tensor | None) -> dict[str, Any]:
    """What kernels are compiled for, by the tensors shaped like the input, ``row`` elements of which lie in a row."""
    itemsizes = [tensor.element_size() for tensor in (input, *others) if tensor is not None]
    vec = _PACK // min(itemsizes)
    dtype = language_dtype(accumulation_dtype(input))
    return {"A": dtype, "VEC": vec, "PACKED": row % vec == 0, **_options(THREADS, input)}


def _options(threads: int, tensor: Tensor) -> dict[str, Any]:
    """Without contraction into fused multiply-adds, as everywhere in this package."""
    return {"num_warps": warps_of(threads, tensor.device), "enable_fp_fusion": False}


def _tile_of_channels(positions: int, is_last: bool, vec: int, input: Tensor) -> dict[str, int]:
    """K channels by J positions."""
    elements = THREADS * vec
    if is_last:
        channels = _CHANNELS_LAST_BYTES // input.element_size()
        return {"K": channels, "J": elements // channels}
    along = next((size for size in _POSITIONS if positions <= size), elements)
    return {"K": elements // along, "J": along}


def _tile_of_rows(size: int, vec: int, input: Tensor) -> dict[str, Any]:
    """R rows by COLUMNS; no R where one row does not fit."""
    itemsize = accumulation_dtype(input).itemsize
    if size * itemsize > _LONGEST_SHORT_ROW:
        return {"COLUMNS": THREADS * vec}
    columns = max(_SHORTEST_TILE, 1 << (size - 1).bit_length())
    rows = max(1, _TILE_OF_ROWS // (columns * itemsize))
    threads = THREADS * rows * columns * itemsize // _TILE_OF_ROWS
    return {"R": rows, "COLUMNS": columns, **_options(threads, input)}


def _shares(whole: int, most: int) -> tuple[int, int]:
    """Into how many shares something is divided, and how much each gets, but for the last one, which gets the rest."""
    share = _ceil(whole, most)
    return _ceil(whole, share), share


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
