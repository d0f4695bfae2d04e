"""Back from the adversarial point, with or without combining the gradients."""
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
from gam_fused.kernels.triton_rules import combined, narrow, number, penalty_scale, widen


@triton.jit
def _restore_chunk(
    pointers, tensors, tensor, begin, count, T: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    params = elements_of(pointers, 0, tensors, tensor, begin, T, WHOLE)
    backups = elements_of(pointers, 1, tensors, tensor, begin, T, WHOLE)
    for start in range(0, end_of(count, CHUNK, WHOLE), BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = mask_of(offsets, count, WHOLE)
        tl.store(params + offsets, tl.load(backups + offsets, mask=mask), mask=mask)


@triton.jit
def restore(
    pointers, rows, tensors, tensor, begin, count, T: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Backups into parameters, and nothing else."""
    if is_whole_and_aligned(pointers, rows, tensors, tensor, count, CHUNK):
        _restore_chunk(pointers, tensors, tensor, begin, count, T, CHUNK, BLOCK, True)
    else:
        _restore_chunk(pointers, tensors, tensor, begin, count, T, CHUNK, BLOCK, False)


@kernel
def restore_kernel(pointers, plan, tensors, chunks, T: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Rows: params, backups."""
    tensor, begin, count = chunk_of_program(plan, tensors, chunks, CHUNK)
    restore(pointers, 2, tensors, tensor, begin, count, T, CHUNK, BLOCK)


@triton.jit
def _combine_chunk(
    pointers, tensors, tensor, begin, count, scale, T: tl.constexpr, A: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    params = elements_of(pointers, 0, tensors, tensor, begin, T, WHOLE)
    backups = elements_of(pointers, 1, tensors, tensor, begin, T, WHOLE)
    grads = elements_of(pointers, 2, tensors, tensor, begin, T, WHOLE)
    hvps = elements_of(pointers, 3, tensors, tensor, begin, T, WHOLE)
    for start in range(0, end_of(count, CHUNK, WHOLE), BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = mask_of(offsets, count, WHOLE)
        theta = tl.load(backups + offsets, mask=mask)
        grad = widen(tl.load(grads + offsets, mask=mask), A)
        hvp = widen(tl.load(hvps + offsets, mask=mask), A)
        tl.store(params + offsets, theta, mask=mask)
        tl.store(grads + offsets, narrow(combined(grad, hvp, scale), T), mask=mask)


@kernel
def combine_kernel(
    pointers,
    plan,
    tensors,
    chunks,
    adversarial_norm,
    rho: tl.int64,
    alpha: tl.int64,
    xi: tl.int64,
    T: tl.constexpr,
    A: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows: params, backups, grads, hvps."""
    tensor, begin, count = chunk_of_program(plan, tensors, chunks, CHUNK)
    scale = penalty_scale(tl.load(adversarial_norm), number(rho, A), number(alpha, A), number(xi, A))
    if is_whole_and_aligned(pointers, 4, tensors, tensor, count, CHUNK):
        _combine_chunk(pointers, tensors, tensor, begin, count, scale, T, A, CHUNK, BLOCK, True)
    else:
        _combine_chunk(pointers, tensors, tensor, begin, count, scale, T, A, CHUNK, BLOCK, False)
