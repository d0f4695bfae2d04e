"""To the adversarial point, with what was there left in the directions."""
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
from gam_fused.kernels.triton_rules import moves, number, perturbation_scale, perturbed, tensor_key, widen


@triton.jit
def _perturb_chunk(
    pointers, tensors, tensor, begin, count, scale, is_moved, key, T: tl.constexpr, A: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, STOCHASTIC: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    params = elements_of(pointers, 0, tensors, tensor, begin, T, WHOLE)
    directions = elements_of(pointers, 1, tensors, tensor, begin, T, WHOLE)
    for start in range(0, end_of(count, CHUNK, WHOLE), BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = mask_of(offsets, count, WHOLE)
        theta = tl.load(params + offsets, mask=mask)
        direction = tl.load(directions + offsets, mask=mask)
        moved = rounded(perturbed(widen(theta, A), widen(direction, A), scale), key, begin, offsets, T, STOCHASTIC)
        tl.store(directions + offsets, theta, mask=mask)
        tl.store(params + offsets, tl.where(is_moved, moved, theta), mask=mask)


@kernel
def perturb_kernel(
    pointers,
    plan,
    tensors,
    chunks,
    direction_norm,
    grad_norm,
    rho: tl.int64,
    xi: tl.int64,
    launch_key: tl.int64,
    T: tl.constexpr,
    A: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """The swap. Rows: params, directions."""
    tensor, begin, count = chunk_of_program(plan, tensors, chunks, CHUNK)
    of_direction, of_grad = tl.load(direction_norm), tl.load(grad_norm)
    scale = perturbation_scale(of_direction, of_grad, number(rho, A), number(xi, A))
    is_moved = moves(of_direction, of_grad, scale)
    key = tensor_key(launch_key.to(tl.int64), tensor, begin >> 32)
    if is_whole_and_aligned(pointers, 2, tensors, tensor, count, CHUNK):
        _perturb_chunk(
            pointers, tensors, tensor, begin, count, scale, is_moved, key, T, A, CHUNK, BLOCK, STOCHASTIC, True
        )
    else:
        _perturb_chunk(
            pointers, tensors, tensor, begin, count, scale, is_moved, key, T, A, CHUNK, BLOCK, STOCHASTIC, False
        )
