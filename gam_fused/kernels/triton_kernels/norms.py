"""Global 2-norms in two stages, without atomics: each chunk leaves a sum of squares, one program adds them up."""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from gam_fused.kernels.triton_kernels.chunks import chunk_of_program, elements_of, end_of, is_whole_and_aligned, kernel
from gam_fused.kernels.triton_rules import square_root, widen


@triton.jit
def _value_at(row, offsets, count, A: tl.constexpr, WHOLE: tl.constexpr):
    if WHOLE:
        value = tl.load(row + offsets)
    else:
        value = tl.load(row + offsets, mask=offsets < count, other=0.0)
    return widen(value, A)


@triton.jit
def _sum_of_squares(
    pointers, tensors, tensor, begin, count, T: tl.constexpr, A: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    DIFFERENCES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    elements = elements_of(pointers, 0, tensors, tensor, begin, T, WHOLE)
    subtracted = elements_of(pointers, 1 if DIFFERENCES else 0, tensors, tensor, begin, T, WHOLE)
    total = tl.zeros([BLOCK], A)
    for start in range(0, end_of(count, CHUNK, WHOLE), BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        value = _value_at(elements, offsets, count, A, WHOLE)
        if DIFFERENCES:
            value -= _value_at(subtracted, offsets, count, A, WHOLE)
        total += value * value
    return tl.sum(total, axis=0)


@kernel
def sum_chunks_kernel(
    pointers, plan, tensors, chunks, partials, T: tl.constexpr, A: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, DIFFERENCES: tl.constexpr,
):  # fmt: skip
    """``partials[i]``: the sum of squares over chunk i. Rows: the tensors, and those subtracted if ``DIFFERENCES``."""
    tensor, begin, count = chunk_of_program(plan, tensors, chunks, CHUNK)
    if is_whole_and_aligned(pointers, 2 if DIFFERENCES else 1, tensors, tensor, count, CHUNK):
        total = _sum_of_squares(pointers, tensors, tensor, begin, count, T, A, CHUNK, BLOCK, DIFFERENCES, True)
    else:
        total = _sum_of_squares(pointers, tensors, tensor, begin, count, T, A, CHUNK, BLOCK, DIFFERENCES, False)
    tl.store(partials + tl.program_id(0), total)


@kernel
def finish_norms_kernel(partials, results, middle, end, A: tl.constexpr, BLOCK: tl.constexpr):
    """``results[0]``: the root of the sum of the partial sums before ``middle``; ``results[1]``: of the others."""
    norm = tl.program_id(0)
    begin = tl.where(norm == 0, 0, middle)
    until = tl.where(norm == 0, middle, end)
    total = tl.zeros([BLOCK], A)
    for start in range(begin, until, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        total += tl.load(partials + offsets, mask=offsets < until, other=0.0)
    tl.store(results + norm, square_root(tl.sum(total, axis=0)))
