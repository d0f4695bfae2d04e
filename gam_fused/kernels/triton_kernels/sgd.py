"""Restore, combine and torch.optim.SGD in one launch."""
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
from gam_fused.kernels.triton_kernels.combine import restore
from gam_fused.kernels.triton_kernels.steps import downhill, holds, learning_rate, unscaling_factor
from gam_fused.kernels.triton_rules import combined, narrow, number, penalty_scale, sgd_step, tensor_key, widen


@triton.jit
def _sgd_chunk(
    pointers, tensors, tensor, begin, count, scale, factor, key, lr, weight_decay, momentum, one_minus_dampening,
    T: tl.constexpr, A: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, WEIGHT_DECAY: tl.constexpr,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, FIRST_STEP: tl.constexpr, MAXIMIZE: tl.constexpr,
    WRITE_GRADS: tl.constexpr, STOCHASTIC: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    params = elements_of(pointers, 0, tensors, tensor, begin, T, WHOLE)
    backups = elements_of(pointers, 1, tensors, tensor, begin, T, WHOLE)
    grads = elements_of(pointers, 2, tensors, tensor, begin, T, WHOLE)
    hvps = elements_of(pointers, 3, tensors, tensor, begin, T, WHOLE)
    if MOMENTUM:
        buffers = elements_of(pointers, 4, tensors, tensor, begin, T, WHOLE)
    for start in range(0, end_of(count, CHUNK, WHOLE), BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = mask_of(offsets, count, WHOLE)
        theta = widen(tl.load(backups + offsets, mask=mask), A)
        grad = widen(tl.load(grads + offsets, mask=mask), A)
        hvp = widen(tl.load(hvps + offsets, mask=mask), A)
        buffer = tl.zeros([BLOCK], A)
        if MOMENTUM and not FIRST_STEP:
            buffer = widen(tl.load(buffers + offsets, mask=mask), A)
        grad = combined(grad, hvp, scale) * factor
        theta, buffer = sgd_step(
            theta, buffer, downhill(grad, MAXIMIZE), lr, weight_decay, momentum, one_minus_dampening, WEIGHT_DECAY,
            MOMENTUM, NESTEROV, FIRST_STEP,
        )  # fmt: skip
        if MOMENTUM:
            tl.store(buffers + offsets, narrow(buffer, T), mask=mask)
        if WRITE_GRADS:
            tl.store(grads + offsets, narrow(grad, T), mask=mask)
        tl.store(params + offsets, rounded(theta, key, begin, offsets, T, STOCHASTIC), mask=mask)


@kernel
def sgd_kernel(
    pointers,
    plan,
    tensors,
    chunks,
    adversarial_norm,
    guards,
    guard_count,
    found_inf,
    grad_scale,
    rho: tl.int64,
    alpha: tl.int64,
    xi: tl.int64,
    launch_key: tl.int64,
    lr: tl.int64,
    lr_tensor,
    weight_decay: tl.int64,
    momentum: tl.int64,
    one_minus_dampening: tl.int64,
    T: tl.constexpr,
    A: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    FIRST_STEP: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    WRITE_GRADS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """Rows: params, backups, grads, hvps and, with momentum, momentum_buffers."""
    ROWS: tl.constexpr = 5 if MOMENTUM else 4
    tensor, begin, count = chunk_of_program(plan, tensors, chunks, CHUNK)
    if holds(adversarial_norm, guards, guard_count, found_inf):
        scale = penalty_scale(tl.load(adversarial_norm), number(rho, A), number(alpha, A), number(xi, A))
        factor = unscaling_factor(grad_scale, A)
        key = tensor_key(launch_key.to(tl.int64), tensor, begin >> 32)
        rate, decay = learning_rate(lr, lr_tensor, A), number(weight_decay, A)
        mu, share = number(momentum, A), number(one_minus_dampening, A)
        if is_whole_and_aligned(pointers, ROWS, tensors, tensor, count, CHUNK):
            _sgd_chunk(
                pointers, tensors, tensor, begin, count, scale, factor, key, rate, decay, mu, share, T, A, CHUNK, BLOCK,
                WEIGHT_DECAY, MOMENTUM, NESTEROV, FIRST_STEP, MAXIMIZE, WRITE_GRADS, STOCHASTIC, True,
            )  # fmt: skip
        else:
            _sgd_chunk(
                pointers, tensors, tensor, begin, count, scale, factor, key, rate, decay, mu, share, T, A, CHUNK, BLOCK,
                WEIGHT_DECAY, MOMENTUM, NESTEROV, FIRST_STEP, MAXIMIZE, WRITE_GRADS, STOCHASTIC, False,
            )  # fmt: skip
    else:
        restore(pointers, ROWS, tensors, tensor, begin, count, T, CHUNK, BLOCK)
