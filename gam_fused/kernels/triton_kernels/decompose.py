"""The gradients ahead, and what of the others is perpendicular to them: the end of a step of Algorithm 2."""
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
)
from gam_fused.kernels.triton_rules import (
    divide,
    mixed,
    narrow,
    number,
    parallel_scale,
    perpendicular,
    square_root,
    widen,
)


@triton.jit
def _load(elements, offsets, mask, A: tl.constexpr, WHOLE: tl.constexpr):
    if WHOLE:
        return widen(tl.load(elements + offsets), A)
    else:
        return widen(tl.load(elements + offsets, mask=mask, other=0.0), A)


@triton.jit
def _mixed_sums(
    pointers, tensors, tensor, begin, count, w0, w1, w2, w3, T: tl.constexpr, A: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    g0 = elements_of(pointers, 0, tensors, tensor, begin, T, WHOLE)
    g1 = elements_of(pointers, 1, tensors, tensor, begin, T, WHOLE)
    g2 = elements_of(pointers, 2, tensors, tensor, begin, T, WHOLE)
    g3 = elements_of(pointers, 3, tensors, tensor, begin, T, WHOLE)
    dot = tl.zeros([BLOCK], A)
    plus_squared = tl.zeros([BLOCK], A)
    minus_squared = tl.zeros([BLOCK], A)
    for start in range(0, end_of(count, CHUNK, WHOLE), BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = mask_of(offsets, count, WHOLE)
        plus = mixed(_load(g1, offsets, mask, A, WHOLE), _load(g3, offsets, mask, A, WHOLE), w1, w3)
        minus = mixed(_load(g0, offsets, mask, A, WHOLE), _load(g2, offsets, mask, A, WHOLE), w0, w2)
        dot += minus * plus
        plus_squared += plus * plus
        minus_squared += minus * minus
    return tl.sum(dot, axis=0), tl.sum(plus_squared, axis=0), tl.sum(minus_squared, axis=0)


@kernel
def sum_mixed_kernel(
    pointers,
    plan,
    tensors,
    chunks,
    partials,
    weight0: tl.int64,
    weight1: tl.int64,
    weight2: tl.int64,
    weight3: tl.int64,
    T: tl.constexpr,
    A: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Over chunk i, the sums of h⁻ h⁺ in ``partials[i]``, of squares of h⁺ and of h⁻ one and two rows below."""
    tensor, begin, count = chunk_of_program(plan, tensors, chunks, CHUNK)
    w0, w1, w2, w3 = number(weight0, A), number(weight1, A), number(weight2, A), number(weight3, A)
    if is_whole_and_aligned(pointers, 4, tensors, tensor, count, CHUNK):
        dot, plus_squared, minus_squared = _mixed_sums(
            pointers, tensors, tensor, begin, count, w0, w1, w2, w3, T, A, CHUNK, BLOCK, True
        )
    else:
        dot, plus_squared, minus_squared = _mixed_sums(
            pointers, tensors, tensor, begin, count, w0, w1, w2, w3, T, A, CHUNK, BLOCK, False
        )
    place = partials + tl.program_id(0)
    tl.store(place, dot)
    tl.store(place + chunks, plus_squared)
    tl.store(place + 2 * chunks, minus_squared)


@triton.jit
def _sum_row(partials, chunks, A: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], A)
    for start in range(0, chunks, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        total += tl.load(partials + offsets, mask=offsets < chunks, other=0.0)
    return tl.sum(total, axis=0)


@kernel
def finish_projection_kernel(partials, results, chunks, row, A: tl.constexpr, BLOCK: tl.constexpr):
    """``results``: ⟨h⁻, h⁺⟩ / ‖h⁺‖, ‖h⁺‖, ‖h⁻‖. Rows of ``partials`` are ``row`` apart."""
    plus_norm = square_root(_sum_row(partials + row, chunks, A, BLOCK))
    quotient = divide(_sum_row(partials, chunks, A, BLOCK), plus_norm)
    tl.store(results, tl.where(plus_norm == 0.0, plus_norm, quotient))
    tl.store(results + 1, plus_norm)
    tl.store(results + 2, square_root(_sum_row(partials + 2 * row, chunks, A, BLOCK)))


@triton.jit
def _decompose_chunk(
    pointers, tensors, tensor, begin, count, scale, w0, w1, w2, w3, T: tl.constexpr, A: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    g0 = elements_of(pointers, 0, tensors, tensor, begin, T, WHOLE)
    g1 = elements_of(pointers, 1, tensors, tensor, begin, T, WHOLE)
    g2 = elements_of(pointers, 2, tensors, tensor, begin, T, WHOLE)
    g3 = elements_of(pointers, 3, tensors, tensor, begin, T, WHOLE)
    for start in range(0, end_of(count, CHUNK, WHOLE), BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = mask_of(offsets, count, WHOLE)
        plus = mixed(_load(g1, offsets, mask, A, WHOLE), _load(g3, offsets, mask, A, WHOLE), w1, w3)
        minus = mixed(_load(g0, offsets, mask, A, WHOLE), _load(g2, offsets, mask, A, WHOLE), w0, w2)
        tl.store(g0 + offsets, narrow(plus, T), mask=mask)
        tl.store(g1 + offsets, narrow(perpendicular(minus, plus, scale), T), mask=mask)


@kernel
def decompose_kernel(
    pointers,
    plan,
    tensors,
    chunks,
    projection,
    plus_norm,
    weight0: tl.int64,
    weight1: tl.int64,
    weight2: tl.int64,
    weight3: tl.int64,
    xi: tl.int64,
    T: tl.constexpr,
    A: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows: grads, grads_ahead, adversarial_grads, adversarial_grads_ahead."""
    tensor, begin, count = chunk_of_program(plan, tensors, chunks, CHUNK)
    w0, w1, w2, w3 = number(weight0, A), number(weight1, A), number(weight2, A), number(weight3, A)
    scale = parallel_scale(tl.load(projection), tl.load(plus_norm), number(xi, A))
    if is_whole_and_aligned(pointers, 4, tensors, tensor, count, CHUNK):
        _decompose_chunk(pointers, tensors, tensor, begin, count, scale, w0, w1, w2, w3, T, A, CHUNK, BLOCK, True)
    else:
        _decompose_chunk(pointers, tensors, tensor, begin, count, scale, w0, w1, w2, w3, T, A, CHUNK, BLOCK, False)
