"""Multi-tensor kernels in Triton: one program for each chunk of each tensor, whatever the number of tensors.

Every kernel begins with the same four arguments, which :mod:`gam_fused.kernels.pointer_tables` makes:

* ``pointers``: int64, ``[rows + 1, tensors]``: the addresses of each list's tensors, then whether all addresses of a
  tensor are multiples of 16 bytes;
* ``plan``: int64: the number of elements of each tensor, then for each chunk its tensor, then for each chunk its number
  within the tensor;
* ``tensors`` and ``chunks``, their numbers.

A whole chunk of aligned tensors is read and written without a mask, in 16 bytes a thread; any other one with a mask,
and under no promise of alignment. Scalars come as bits, see :func:`~gam_fused.kernels.triton_rules.number`; norms and
guards are read from the device. Neither values nor alignments of either make Triton compile a kernel again.

mypy cannot read Triton's language: the module is checked by the tests alone.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from gam_fused.kernels.triton_rules import (
    adamw_step,
    combined,
    divide,
    is_finite,
    minus_expm1,
    moves,
    narrow,
    number,
    penalty_scale,
    perturbation_scale,
    perturbed,
    random_bits,
    round_stochastically,
    sgd_step,
    square_root,
    tensor_key,
    widen,
)

# Triton would compile a kernel anew for a number of 1 or one that 16 divides, for one that needs more bits, and for a
# tensor at another alignment, such as the second of two norms.
_NUMBERS = (
    *("tensors", "chunks", "middle", "end", "guard_count", "rho", "alpha", "xi", "launch_key", "lr", "weight_decay"),
    *(
        "momentum",
        "one_minus_dampening",
        "beta2",
        "one_minus_beta1",
        "one_minus_beta2",
        "log_beta1",
        "log_beta2",
        "eps",
    ),
)
_READ_ONCE = (
    *("direction_norm", "grad_norm", "adversarial_norm", "guards", "found_inf", "grad_scale", "lr_tensor"),
    *("partials", "results", "state_steps"),
)
_kernel = triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_READ_ONCE)

# ---------------------------------------------------------------- chunks


@triton.jit
def _chunk(plan, tensors, chunks, CHUNK: tl.constexpr):
    """This program's tensor, its first element there and how many elements it has."""
    place = plan + tensors + tl.program_id(0)
    tensor = tl.load(place)
    begin = tl.load(place + chunks) * CHUNK
    count = tl.minimum(tl.load(plan + tensor) - begin, CHUNK).to(tl.int32)
    return tensor, begin, count


@triton.jit
def _elements(pointers, row, tensors, tensor, begin, T: tl.constexpr, ALIGNED: tl.constexpr):
    elements = tl.load(pointers + row * tensors + tensor).to(tl.pointer_type(T)) + begin
    if ALIGNED:
        elements = tl.multiple_of(elements, 16)
    return elements


@triton.jit
def _is_whole_and_aligned(pointers, rows, tensors, tensor, count, CHUNK: tl.constexpr):
    return (count == CHUNK) & (tl.load(pointers + rows * tensors + tensor) != 0)


@triton.jit
def _end(count, CHUNK: tl.constexpr, WHOLE: tl.constexpr):
    if WHOLE:
        return CHUNK
    else:
        return count


@triton.jit
def _mask(offsets, count, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.full(offsets.shape, 1, tl.int1)  # as good as none; Triton 3.6 returns no None from a function
    else:
        return offsets < count


@triton.jit
def _rounded(value, key, begin, offsets, T: tl.constexpr, STOCHASTIC: tl.constexpr):
    if STOCHASTIC:
        places = (begin & 0xFFFFFFFF).to(tl.uint32) + offsets.to(tl.uint32)
        return round_stochastically(value, random_bits(key, places), T)
    else:
        return narrow(value, T)


# ---------------------------------------------------------------- norms


@triton.jit
def _sum_of_squares(
    pointers, tensors, tensor, begin, count, T: tl.constexpr, A: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    elements = _elements(pointers, 0, tensors, tensor, begin, T, WHOLE)
    total = tl.zeros([BLOCK], A)
    for start in range(0, _end(count, CHUNK, WHOLE), BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        if WHOLE:
            value = widen(tl.load(elements + offsets), A)
        else:
            value = widen(tl.load(elements + offsets, mask=offsets < count, other=0.0), A)
        total += value * value
    return tl.sum(total, axis=0)


@_kernel
def sum_chunks_kernel(
    pointers, plan, tensors, chunks, partials, T: tl.constexpr, A: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``partials[i]``: the sum of squares over chunk i. Rows: the tensors."""
    tensor, begin, count = _chunk(plan, tensors, chunks, CHUNK)
    if _is_whole_and_aligned(pointers, 1, tensors, tensor, count, CHUNK):
        total = _sum_of_squares(pointers, tensors, tensor, begin, count, T, A, CHUNK, BLOCK, True)
    else:
        total = _sum_of_squares(pointers, tensors, tensor, begin, count, T, A, CHUNK, BLOCK, False)
    tl.store(partials + tl.program_id(0), total)


@_kernel
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


# ---------------------------------------------------------------- perturb


@triton.jit
def _perturb_chunk(
    pointers, tensors, tensor, begin, count, scale, is_moved, key, T: tl.constexpr, A: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, STOCHASTIC: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    params = _elements(pointers, 0, tensors, tensor, begin, T, WHOLE)
    directions = _elements(pointers, 1, tensors, tensor, begin, T, WHOLE)
    for start in range(0, _end(count, CHUNK, WHOLE), BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = _mask(offsets, count, WHOLE)
        theta = tl.load(params + offsets, mask=mask)
        direction = tl.load(directions + offsets, mask=mask)
        moved = _rounded(perturbed(widen(theta, A), widen(direction, A), scale), key, begin, offsets, T, STOCHASTIC)
        tl.store(directions + offsets, theta, mask=mask)
        tl.store(params + offsets, tl.where(is_moved, moved, theta), mask=mask)


@_kernel
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
    tensor, begin, count = _chunk(plan, tensors, chunks, CHUNK)
    of_direction, of_grad = tl.load(direction_norm), tl.load(grad_norm)
    scale = perturbation_scale(of_direction, of_grad, number(rho, A), number(xi, A))
    is_moved = moves(of_direction, of_grad, scale)
    key = tensor_key(launch_key.to(tl.int64), tensor, begin >> 32)
    if _is_whole_and_aligned(pointers, 2, tensors, tensor, count, CHUNK):
        _perturb_chunk(
            pointers, tensors, tensor, begin, count, scale, is_moved, key, T, A, CHUNK, BLOCK, STOCHASTIC, True
        )
    else:
        _perturb_chunk(
            pointers, tensors, tensor, begin, count, scale, is_moved, key, T, A, CHUNK, BLOCK, STOCHASTIC, False
        )


# ---------------------------------------------------------------- restore


@triton.jit
def _restore_chunk(
    pointers, tensors, tensor, begin, count, T: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    params = _elements(pointers, 0, tensors, tensor, begin, T, WHOLE)
    backups = _elements(pointers, 1, tensors, tensor, begin, T, WHOLE)
    for start in range(0, _end(count, CHUNK, WHOLE), BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = _mask(offsets, count, WHOLE)
        tl.store(params + offsets, tl.load(backups + offsets, mask=mask), mask=mask)


@triton.jit
def _restore(
    pointers, rows, tensors, tensor, begin, count, T: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    if _is_whole_and_aligned(pointers, rows, tensors, tensor, count, CHUNK):
        _restore_chunk(pointers, tensors, tensor, begin, count, T, CHUNK, BLOCK, True)
    else:
        _restore_chunk(pointers, tensors, tensor, begin, count, T, CHUNK, BLOCK, False)


@_kernel
def restore_kernel(pointers, plan, tensors, chunks, T: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Rows: params, backups."""
    tensor, begin, count = _chunk(plan, tensors, chunks, CHUNK)
    _restore(pointers, 2, tensors, tensor, begin, count, T, CHUNK, BLOCK)


# ---------------------------------------------------------------- combine


@triton.jit
def _combine_chunk(
    pointers, tensors, tensor, begin, count, scale, T: tl.constexpr, A: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    params = _elements(pointers, 0, tensors, tensor, begin, T, WHOLE)
    backups = _elements(pointers, 1, tensors, tensor, begin, T, WHOLE)
    grads = _elements(pointers, 2, tensors, tensor, begin, T, WHOLE)
    hvps = _elements(pointers, 3, tensors, tensor, begin, T, WHOLE)
    for start in range(0, _end(count, CHUNK, WHOLE), BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = _mask(offsets, count, WHOLE)
        theta = tl.load(backups + offsets, mask=mask)
        grad = widen(tl.load(grads + offsets, mask=mask), A)
        hvp = widen(tl.load(hvps + offsets, mask=mask), A)
        tl.store(params + offsets, theta, mask=mask)
        tl.store(grads + offsets, narrow(combined(grad, hvp, scale), T), mask=mask)


@_kernel
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
    tensor, begin, count = _chunk(plan, tensors, chunks, CHUNK)
    scale = penalty_scale(tl.load(adversarial_norm), number(rho, A), number(alpha, A), number(xi, A))
    if _is_whole_and_aligned(pointers, 4, tensors, tensor, count, CHUNK):
        _combine_chunk(pointers, tensors, tensor, begin, count, scale, T, A, CHUNK, BLOCK, True)
    else:
        _combine_chunk(pointers, tensors, tensor, begin, count, scale, T, A, CHUNK, BLOCK, False)


# ---------------------------------------------------------------- what the fused base rules share


@triton.jit
def _holds(adversarial_norm, guards, guard_count, found_inf):
    """Whether the step is taken at all."""
    holds = is_finite(tl.load(adversarial_norm))
    for i in range(guard_count):
        holds = holds & is_finite(tl.load(guards + i))
    if found_inf is not None:
        holds = holds & (tl.load(found_inf) == 0.0)
    return holds


@triton.jit
def _unscaling_factor(grad_scale, A: tl.constexpr):
    if grad_scale is not None:
        return divide(tl.full([], 1.0, A), tl.load(grad_scale).to(A))
    else:
        return tl.full([], 1.0, A)


@triton.jit
def _learning_rate(lr, lr_tensor, A: tl.constexpr):
    if lr_tensor is not None:
        return tl.load(lr_tensor)
    else:
        return number(lr, A)


@triton.jit
def _downhill(grad, MAXIMIZE: tl.constexpr):
    """As in torch.optim, ``maximize`` leaves the gradient itself alone."""
    if MAXIMIZE:
        return -grad
    else:
        return grad


# ---------------------------------------------------------------- SGD


@triton.jit
def _sgd_chunk(
    pointers, tensors, tensor, begin, count, scale, factor, key, lr, weight_decay, momentum, one_minus_dampening,
    T: tl.constexpr, A: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, WEIGHT_DECAY: tl.constexpr,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, FIRST_STEP: tl.constexpr, MAXIMIZE: tl.constexpr,
    WRITE_GRADS: tl.constexpr, STOCHASTIC: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    params = _elements(pointers, 0, tensors, tensor, begin, T, WHOLE)
    backups = _elements(pointers, 1, tensors, tensor, begin, T, WHOLE)
    grads = _elements(pointers, 2, tensors, tensor, begin, T, WHOLE)
    hvps = _elements(pointers, 3, tensors, tensor, begin, T, WHOLE)
    if MOMENTUM:
        buffers = _elements(pointers, 4, tensors, tensor, begin, T, WHOLE)
    for start in range(0, _end(count, CHUNK, WHOLE), BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = _mask(offsets, count, WHOLE)
        theta = widen(tl.load(backups + offsets, mask=mask), A)
        grad = widen(tl.load(grads + offsets, mask=mask), A)
        hvp = widen(tl.load(hvps + offsets, mask=mask), A)
        buffer = tl.zeros([BLOCK], A)
        if MOMENTUM and not FIRST_STEP:
            buffer = widen(tl.load(buffers + offsets, mask=mask), A)
        grad = combined(grad, hvp, scale) * factor
        theta, buffer = sgd_step(
            theta, buffer, _downhill(grad, MAXIMIZE), lr, weight_decay, momentum, one_minus_dampening, WEIGHT_DECAY,
            MOMENTUM, NESTEROV, FIRST_STEP,
        )  # fmt: skip
        if MOMENTUM:
            tl.store(buffers + offsets, narrow(buffer, T), mask=mask)
        if WRITE_GRADS:
            tl.store(grads + offsets, narrow(grad, T), mask=mask)
        tl.store(params + offsets, _rounded(theta, key, begin, offsets, T, STOCHASTIC), mask=mask)


@_kernel
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
    tensor, begin, count = _chunk(plan, tensors, chunks, CHUNK)
    if _holds(adversarial_norm, guards, guard_count, found_inf):
        scale = penalty_scale(tl.load(adversarial_norm), number(rho, A), number(alpha, A), number(xi, A))
        factor = _unscaling_factor(grad_scale, A)
        key = tensor_key(launch_key.to(tl.int64), tensor, begin >> 32)
        rate, decay = _learning_rate(lr, lr_tensor, A), number(weight_decay, A)
        mu, share = number(momentum, A), number(one_minus_dampening, A)
        if _is_whole_and_aligned(pointers, ROWS, tensors, tensor, count, CHUNK):
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
        _restore(pointers, ROWS, tensors, tensor, begin, count, T, CHUNK, BLOCK)


# ---------------------------------------------------------------- Adam and AdamW


@triton.jit
def _adamw_chunk(
    pointers, tensors, tensor, begin, count, scale, factor, key, lr, beta2, one_minus_beta1, one_minus_beta2, eps,
    weight_decay, first_correction, second_correction_root, T: tl.constexpr, A: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, WEIGHT_DECAY: tl.constexpr, DECOUPLED: tl.constexpr, AMSGRAD: tl.constexpr,
    MAXIMIZE: tl.constexpr, WRITE_GRADS: tl.constexpr, STOCHASTIC: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    params = _elements(pointers, 0, tensors, tensor, begin, T, WHOLE)
    backups = _elements(pointers, 1, tensors, tensor, begin, T, WHOLE)
    grads = _elements(pointers, 2, tensors, tensor, begin, T, WHOLE)
    hvps = _elements(pointers, 3, tensors, tensor, begin, T, WHOLE)
    exp_avgs = _elements(pointers, 4, tensors, tensor, begin, T, WHOLE)
    exp_avg_sqs = _elements(pointers, 5, tensors, tensor, begin, T, WHOLE)
    if AMSGRAD:
        max_exp_avg_sqs = _elements(pointers, 6, tensors, tensor, begin, T, WHOLE)
    for start in range(0, _end(count, CHUNK, WHOLE), BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = _mask(offsets, count, WHOLE)
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
            theta, exp_avg, exp_avg_sq, max_exp_avg_sq, _downhill(grad, MAXIMIZE), lr, beta2, one_minus_beta1,
            one_minus_beta2, eps, weight_decay, first_correction, second_correction_root, WEIGHT_DECAY, DECOUPLED,
            AMSGRAD,
        )  # fmt: skip
        tl.store(exp_avgs + offsets, narrow(exp_avg, T), mask=mask)
        tl.store(exp_avg_sqs + offsets, narrow(exp_avg_sq, T), mask=mask)
        if AMSGRAD:
            tl.store(max_exp_avg_sqs + offsets, narrow(max_exp_avg_sq, T), mask=mask)
        if WRITE_GRADS:
            tl.store(grads + offsets, narrow(grad, T), mask=mask)
        tl.store(params + offsets, _rounded(theta, key, begin, offsets, T, STOCHASTIC), mask=mask)


@_kernel
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
    tensor, begin, count = _chunk(plan, tensors, chunks, CHUNK)
    if _holds(adversarial_norm, guards, guard_count, found_inf):
        scale = penalty_scale(tl.load(adversarial_norm), number(rho, A), number(alpha, A), number(xi, A))
        factor = _unscaling_factor(grad_scale, A)
        key = tensor_key(launch_key.to(tl.int64), tensor, begin >> 32)
        rate, decay, epsilon = _learning_rate(lr, lr_tensor, A), number(weight_decay, A), number(eps, A)
        keep2, add1, add2 = number(beta2, A), number(one_minus_beta1, A), number(one_minus_beta2, A)
        state_step = tl.load(pointers + (ROWS + 1) * tensors + tensor).to(tl.pointer_type(tl.float32))
        step = tl.load(state_step).to(A) + 1.0
        first = minus_expm1(step * number(log_beta1, A), A)
        second_root = square_root(minus_expm1(step * number(log_beta2, A), A))
        if _is_whole_and_aligned(pointers, ROWS, tensors, tensor, count, CHUNK):
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
        _restore(pointers, ROWS, tensors, tensor, begin, count, T, CHUNK, BLOCK)


@_kernel
def count_steps_kernel(
    state_steps, tensors, adversarial_norm, guards, guard_count, found_inf, BLOCK: tl.constexpr
):  # fmt: skip
    """Count a step that was taken: after :func:`adamw_kernel`, whose programs read the count.

    ``state_steps``: int64, the addresses of float32 numbers.
    """
    if _holds(adversarial_norm, guards, guard_count, found_inf):
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < tensors
        counts = tl.load(state_steps + offsets, mask=mask, other=0).to(tl.pointer_type(tl.float32))
        tl.store(counts, tl.load(counts, mask=mask) + 1.0, mask=mask)
