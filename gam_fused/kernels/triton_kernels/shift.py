"""To another point, from where the parameters are or from elsewhere, along one list or from one to the other."""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from gam_fused.kernels.triton_kernels.chunks import (
    chunk_of_program,
    elements_of,
    end_of,
    is_whole_and_aligned,
    kernel,
    mask_of,
    rounded,
)
from gam_fused.kernels.triton_rules import is_finite, number, perturbed, shift_scale, tensor_key, widen


@triton.jit
def _shift_chunk(
    pointers, tensors, tensor, begin, count, scale, is_moved, key, T: tl.constexpr, A: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, ORIGINS: tl.constexpr, STARTS: tl.constexpr, STOCHASTIC: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    params = elements_of(pointers, 0, tensors, tensor, begin, T, WHOLE)
    origins = elements_of(pointers, ORIGINS, tensors, tensor, begin, T, WHOLE)
    ends = elements_of(pointers, 1 + ORIGINS, tensors, tensor, begin, T, WHOLE)
    starts = elements_of(pointers, 1 + ORIGINS + STARTS, tensors, tensor, begin, T, WHOLE)
    for start in range(0, end_of(count, CHUNK, WHOLE), BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = mask_of(offsets, count, WHOLE)
        origin = tl.load(origins + offsets, mask=mask)
        direction = widen(tl.load(ends + offsets, mask=mask), A)
        if STARTS:
            direction = direction - widen(tl.load(starts + offsets, mask=mask), A)
        moved = rounded(perturbed(widen(origin, A), direction, scale), key, begin, offsets, T, STOCHASTIC)
        tl.store(params + offsets, tl.where(is_moved, moved, origin), mask=mask)


@kernel
def shift_kernel(
    pointers,
    plan,
    tensors,
    chunks,
    norm,
    rho: tl.int64,
    xi: tl.int64,
    launch_key: tl.int64,
    T: tl.constexpr,
    A: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ORIGINS: tl.constexpr,
    STARTS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """Rows: params, origins (if ``ORIGINS`` is 1, else 0), ends, starts (if ``STARTS``)."""
    ROWS: tl.constexpr = 2 + ORIGINS + STARTS
    tensor, begin, count = chunk_of_program(plan, tensors, chunks, CHUNK)
    length = tl.load(norm)
    scale = shift_scale(length, number(rho, A), number(xi, A))
    is_moved = is_finite(length) & is_finite(scale)
    key = tensor_key(launch_key.to(tl.int64), tensor, begin >> 32)
    if is_whole_and_aligned(pointers, ROWS, tensors, tensor, count, CHUNK):
        _shift_chunk(
            pointers, tensors, tensor, begin, count, scale, is_moved, key, T, A, CHUNK, BLOCK, ORIGINS, STARTS,
            STOCHASTIC, True,
        )  # fmt: skip
    else:
        _shift_chunk(
            pointers, tensors, tensor, begin, count, scale, is_moved, key, T, A, CHUNK, BLOCK, ORIGINS, STARTS,
            STOCHASTIC, False,
        )  # fmt: skip
