"""What every kernel does first: which elements of which tensor a program works on."""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from gam_fused.kernels.triton_rules import narrow, random_bits, round_stochastically

# Triton would compile a kernel anew for a number of 1 or one that 16 divides, for one that needs more bits, and for a
# tensor at another alignment, such as the second of two norms.
_NUMBERS = [
    *("tensors", "chunks", "middle", "end", "guard_count", "launch_key", "rho", "alpha", "xi", "lr", "weight_decay"),
    *("momentum", "one_minus_dampening", "beta2", "one_minus_beta1", "one_minus_beta2", "log_beta1", "log_beta2"),
    *("eps", "weight0", "weight1", "weight2", "weight3", "row"),
]
_READ_ONCE = (
    *("direction_norm", "grad_norm", "norm", "adversarial_norm", "guards", "found_inf", "grad_scale", "lr_tensor"),
    *("projection", "plus_norm", "partials", "results", "state_steps"),
)
kernel = triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_READ_ONCE)


@triton.jit
def chunk_of_program(plan, tensors, chunks, CHUNK: tl.constexpr):
    """This program's tensor, its first element there and how many elements it has."""
    place = plan + tensors + tl.program_id(0)
    tensor = tl.load(place)
    begin = tl.load(place + chunks) * CHUNK
    count = tl.minimum(tl.load(plan + tensor) - begin, CHUNK).to(tl.int32)
    return tensor, begin, count


@triton.jit
def elements_of(pointers, row, tensors, tensor, begin, T: tl.constexpr, ALIGNED: tl.constexpr):
    """The address of the chunk's first element in the list of that row."""
    elements = tl.load(pointers + row * tensors + tensor).to(tl.pointer_type(T)) + begin
    if ALIGNED:
        elements = tl.multiple_of(elements, 16)
    return elements


@triton.jit
def is_whole_and_aligned(pointers, rows, tensors, tensor, count, CHUNK: tl.constexpr):
    """Whether the chunk may be read and written without a mask, 16 bytes at a time."""
    return (count == CHUNK) & (tl.load(pointers + rows * tensors + tensor) != 0)


@triton.jit
def end_of(count, CHUNK: tl.constexpr, WHOLE: tl.constexpr):
    """Where the loop over the chunk's elements ends."""
    if WHOLE:
        return CHUNK
    else:
        return count


@triton.jit
def mask_of(offsets, count, WHOLE: tl.constexpr):
    """Which of the offsets are elements."""
    if WHOLE:
        return tl.full(offsets.shape, 1, tl.int1)  # as good as none; Triton 3.6 returns no None from a function
    else:
        return offsets < count


@triton.jit
def rounded(value, key, begin, offsets, T: tl.constexpr, STOCHASTIC: tl.constexpr):
    """A parameter's new value in its dtype."""
    if STOCHASTIC:
        places = (begin & 0xFFFFFFFF).to(tl.uint32) + offsets.to(tl.uint32)
        return round_stochastically(value, random_bits(key, places), T)
    else:
        return narrow(value, T)
