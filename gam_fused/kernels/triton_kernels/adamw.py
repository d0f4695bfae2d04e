"""Restore, combine and torch.optim.Adam or AdamW in one launch, and a small one that counts the steps."""
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
from gam_fused.kernels.triton_rules import (
    adamw_step,
    combined,
    minus_expm1,
    narrow,
    number,
    penalty_scale,
    square_root,
    tensor_key,
    widen,
)


@triton.jit
def _adamw_chunk(
    pointers, tensors, tensor, begin, count, scale, factor, key, lr, beta2, one_minus_beta1, one_minus_beta2, eps,
    weight_decay, first_correction, second_correction_root, T: tl.constexpr, A: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, WEIGHT_DECAY: tl.constexpr, DECOUPLED: tl.constexpr, AMSGRAD: tl.constexpr,
    MAXIMIZE: tl.constexpr, WRITE_GRADS: tl.constexpr, STOCHASTIC: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    params = elements_of(pointers, 0, tensors, tensor, begin, T, WHOLE)
    backups = elements_of(pointers, 1, tensors, tensor, begin, T, WHOLE)
    grads = elements_of(pointers, 2, tensors, tensor, begin, T, WHOLE)
    hvps = elements_of(pointers, 3, tensors, tensor, begin, T, WHOLE)
    exp_avgs = elements_of(pointers, 4, tensors, tensor, begin, T, WHOLE)
    exp_avg_sqs = elements_of(pointers, 5, tensors, tensor, begin, T, WHOLE)
    if AMSGRAD:
        max_exp_avg_sqs = elements_of(pointers, 6, tensors, tensor, begin, T, WHOLE)
    for start in range(0, end_of(count, CHUNK, WHOLE), BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = mask_of(offsets, count, WHOLE)
        theta = widen(tl.load(backups + offsets, mask=mask), A)
        grad = widen(tl.load(grads + offsets, mask=mask), A)
        hvp = widen(tl.load(hvps + offsets, mask=mask), A)
        exp_avg = widen(tl.load(exp_avgs + offsets, mask=mask), A)
        exp_avg_sq = widen(tl.load(exp_avg_sqs + offsets, mask=mask), A)
        max_exp_avg_sq = exp_avg_sq
        if AMSGRAD:
            max_exp_avg_sq = widen(tl.load(max_exp_avg_sqs + offsets, mask=mask), A)
        grad = combined(grad, hvp, scale) * factor
        theta, exp_avg, exp_avg_sq, max_exp_avg_sq = adamw_step(
            theta, exp_avg, exp_avg_sq, max_exp_avg_sq, downhill(grad, MAXIMIZE), lr, beta2, one_minus_beta1,
            one_minus_beta2, eps, weight_decay, first_correction, second_correction_root, WEIGHT_DECAY, DECOUPLED,
            AMSGRAD,
        )  # fmt: skip
        tl.store(exp_avgs + offsets, narrow(exp_avg, T), mask=mask)
        tl.store(exp_avg_sqs + offsets, narrow(exp_avg_sq, T), mask=mask)
        if AMSGRAD:
            tl.store(max_exp_avg_sqs + offsets, narrow(max_exp_avg_sq, T), mask=mask)
        if WRITE_GRADS:
            tl.store(grads + offsets, narrow(grad, T), mask=mask)
        tl.store(params + offsets, rounded(theta, key, begin, offsets, T, STOCHASTIC), mask=mask)


@kernel
def adamw_kernel(
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
    beta2: tl.int64,
    one_minus_beta1: tl.int64,
    one_minus_beta2: tl.int64,
    log_beta1: tl.int64,
    log_beta2: tl.int64,
    eps: tl.int64,
    T: tl.constexpr,
    A: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
    DECOUPLED: tl.constexpr,
    AMSGRAD: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    WRITE_GRADS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """Rows: params, backups, grads, hvps, exp_avgs, exp_avg_sqs, with amsgrad max_exp_avg_sqs; the flags; state_steps.

    ``state_steps``: addresses of float32 numbers, which count the steps before this one.
    """
    ROWS: tl.constexpr = 7 if AMSGRAD else 6
    tensor, begin, count = chunk_of_program(plan, tensors, chunks, CHUNK)
    if holds(adversarial_norm, guards, guard_count, found_inf):
        scale = penalty_scale(tl.load(adversarial_norm), number(rho, A), number(alpha, A), number(xi, A))
        factor = unscaling_factor(grad_scale, A)
        key = tensor_key(launch_key.to(tl.int64), tensor, begin >> 32)
        rate, decay, epsilon = learning_rate(lr, lr_tensor, A), number(weight_decay, A), number(eps, A)
        keep2, add1, add2 = number(beta2, A), number(one_minus_beta1, A), number(one_minus_beta2, A)
        state_step = tl.load(pointers + (ROWS + 1) * tensors + tensor).to(tl.pointer_type(tl.float32))
        step = tl.load(state_step).to(A) + 1.0
        first = minus_expm1(step * number(log_beta1, A), A)
        second_root = square_root(minus_expm1(step * number(log_beta2, A), A))
        if is_whole_and_aligned(pointers, ROWS, tensors, tensor, count, CHUNK):
            _adamw_chunk(
                pointers, tensors, tensor, begin, count, scale, factor, key, rate, keep2, add1, add2, epsilon, decay,
                first, second_root, T, A, CHUNK, BLOCK, WEIGHT_DECAY, DECOUPLED, AMSGRAD, MAXIMIZE, WRITE_GRADS,
                STOCHASTIC, True,
            )  # fmt: skip
        else:
            _adamw_chunk(
                pointers, tensors, tensor, begin, count, scale, factor, key, rate, keep2, add1, add2, epsilon, decay,
                first, second_root, T, A, CHUNK, BLOCK, WEIGHT_DECAY, DECOUPLED, AMSGRAD, MAXIMIZE, WRITE_GRADS,
                STOCHASTIC, False,
            )  # fmt: skip
    else:
        restore(pointers, ROWS, tensors, tensor, begin, count, T, CHUNK, BLOCK)


@kernel
def count_steps_kernel(
    state_steps, tensors, adversarial_norm, guards, guard_count, found_inf, BLOCK: tl.constexpr
):  # fmt: skip
    """Count a step that was taken: after :func:`adamw_kernel`, whose programs read the count.

    ``state_steps``: int64, the addresses of float32 numbers.
    """
    if holds(adversarial_norm, guards, guard_count, found_inf):
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < tensors
        counts = tl.load(state_steps + offsets, mask=mask, other=0).to(tl.pointer_type(tl.float32))
        tl.store(counts, tl.load(counts, mask=mask) + 1.0, mask=mask)
