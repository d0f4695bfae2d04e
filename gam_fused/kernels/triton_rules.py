"""The arithmetic of one element, as Triton functions named and rounded as in ``csrc/update_rules.h``.

``A`` is the accumulation dtype: operands are widened to it, every rule is computed in it, and results are rounded once
on the way back. Kernels are compiled without contraction into fused multiply-adds, so that both agree.

mypy cannot read Triton's language: the module is checked by the tests alone.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction


@triton.jit
def _probe():
    pass


# The interpreter's own conversions from and to bfloat16 cut off where devices round to nearest, and are wrong for
# subnormal numbers.
IS_INTERPRETED = not isinstance(_probe, JITFunction)
_INTERPRETED: tl.constexpr = tl.constexpr(IS_INTERPRETED)


@triton.jit
def number(bits, A: tl.constexpr):
    """A scalar argument: Triton would make a float32 of any Python number, so it comes as the bits of its own dtype."""
    if A == tl.float64:
        return bits.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def is_finite(value):
    """Neither infinite nor NaN."""
    return value - value == 0.0


@triton.jit
def divide(a, b):
    """The quotient, correctly rounded."""
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)  # `/` is an approximation in float32


@triton.jit
def square_root(value):
    """The root, correctly rounded."""
    if value.dtype == tl.float64:
        return tl.sqrt(value)
    else:
        return tl.sqrt_rn(value)


@triton.jit
def widen(value, A: tl.constexpr):
    """To the accumulation dtype; exact."""
    if _INTERPRETED and value.dtype == tl.bfloat16:
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(A)


@triton.jit
def narrow(value, T: tl.constexpr):
    """To the tensors' dtype, rounded to nearest."""
    if _INTERPRETED and T == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        kept = tl.where(value == value, nearest, (bits >> 16) | 0x40)  # a NaN stays one
        return kept.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(T)


# ---------------------------------------------------------------- stochastic rounding (kernels/rounding.py)


@triton.jit
def mix64(x):
    """A bijection of 64-bit integers; uint64."""
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def tensor_key(launch_key, tensor, block):
    """``launch_key``: int64; ``tensor`` and ``block``: int64. Returns uint64."""
    place = (tensor << 32) + block
    return mix64(launch_key.to(tl.uint64, bitcast=True) + place.to(tl.uint64, bitcast=True))


@triton.jit
def mix32(x):
    """A bijection of 32-bit integers; uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_bits(key, places):
    """32 random bits for each of ``places``, uint32, within their block of 2³² elements."""
    return mix32(mix32(places ^ (key & 0xFFFFFFFF).to(tl.uint32)) ^ (key >> 32).to(tl.uint32))


@triton.jit
def round_stochastically(value, random, T: tl.constexpr):
    """Float32 to bfloat16 or float16, up or down in proportion; ``random`` is uint32."""
    bits = value.to(tl.uint32, bitcast=True)
    if T == tl.bfloat16:
        drawn = ((bits + (random >> 16)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        normal = ((bits + (random >> 19)) & 0xFFFFE000).to(tl.float32, bitcast=True)
        # Subnormal float16 numbers are whole multiples of 2^-24.
        magnitude = tl.abs(value)
        multiple = magnitude * 16777216.0
        below = tl.floor(multiple)
        up = (random >> 8).to(tl.float32) * 5.9604644775390625e-08 < multiple - below
        subnormal = (below + tl.where(up, 1.0, 0.0)) * 5.9604644775390625e-08
        signed = subnormal.to(tl.uint32, bitcast=True) | (bits & 0x80000000)
        drawn = tl.where(magnitude < 6.103515625e-05, signed.to(tl.float32, bitcast=True), normal)
    return narrow(tl.where(is_finite(value), drawn, value), T)


# ---------------------------------------------------------------- perturb


@triton.jit
def perturbation_scale(direction_norm, grad_norm, rho, xi):
    """ρ / (‖u‖ + ξ (‖g‖ + ξ)): what the ascent direction u is multiplied by."""
    return divide(rho, direction_norm + xi * (grad_norm + xi))


@triton.jit
def moves(direction_norm, grad_norm, scale):
    """Whether parameters move at all: not to a point that is none."""
    return is_finite(direction_norm) & is_finite(grad_norm) & is_finite(scale)


@triton.jit
def perturbed(theta, direction, scale):
    """The adversarial point: θ + scale · u."""
    return theta + scale * direction


# ---------------------------------------------------------------- shift


@triton.jit
def shift_scale(norm, rho, xi):
    """ρ / (‖d‖ + ξ): what the direction d is multiplied by."""
    return divide(rho, norm + xi)


# ---------------------------------------------------------------- combine


@triton.jit
def penalty_scale(adversarial_norm, rho, alpha, xi):
    """α ρ / (‖g_adv‖ + ξ): what the Hessian-vector product is multiplied by."""
    return divide(alpha * rho, adversarial_norm + xi)


@triton.jit
def combined(grad, hvp, scale):
    """The combined gradient: g + scale · H(θ_adv) g_adv."""
    return grad + scale * hvp


# ---------------------------------------------------------------- decompose (the paper's Algorithm 2)


@triton.jit
def mixed(first, second, first_weight, second_weight):
    """h⁺ = w1 g1 + w3 g3, of the gradients ahead; h⁻ = w0 g0 + w2 g2, of those where the steps ahead begin."""
    return first_weight * first + second_weight * second


@triton.jit
def parallel_scale(projection, plus_norm, xi):
    """⟨h⁻, h⁺⟩ / (‖h⁺‖ + ξ)², out of ⟨h⁻, h⁺⟩ / ‖h⁺‖: how much of h⁺ there is in h⁻."""
    norm = plus_norm + xi
    return divide(projection, norm) * divide(plus_norm, norm)


@triton.jit
def perpendicular(minus, plus, scale):
    """h⊥ = h⁻ − scale · h⁺."""
    return minus - scale * plus


# ---------------------------------------------------------------- SGD (torch.optim.SGD)


@triton.jit
def sgd_step(
    theta,
    buffer,
    grad,
    lr,
    weight_decay,
    momentum,
    one_minus_dampening,
    WEIGHT_DECAY: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    FIRST_STEP: tl.constexpr,
):
    """θ − lr · d with d the gradient after weight decay and momentum, and the new momentum buffer."""
    d = grad
    if WEIGHT_DECAY:
        d = d + weight_decay * theta
    if MOMENTUM:
        if FIRST_STEP:  # the momentum buffer holds nothing yet
            buffer = d
        else:
            buffer = momentum * buffer + one_minus_dampening * d
        if NESTEROV:
            d = d + momentum * buffer
        else:
            d = buffer
    return theta - lr * d, buffer


# ---------------------------------------------------------------- Adam and AdamW (torch.optim.Adam, torch.optim.AdamW)


@triton.jit
def minus_expm1(x, A: tl.constexpr):
    """1 − eˣ for x ≤ 0, without cancellation near 0."""
    near = tl.full([], 1.0, A)
    for i in tl.static_range(18, 1, -1):  # 0.5¹⁸/18! is below a unit in the last place of float64
        near = 1.0 + divide(x, tl.full([], i, A)) * near
    return tl.where(x > -0.5, -x * near, 1.0 - tl.exp(x))


@triton.jit
def adamw_step(
    theta,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,
    grad,
    lr,
    beta2,
    one_minus_beta1,
    one_minus_beta2,
    eps,
    weight_decay,
    first_correction,
    second_correction_root,
    WEIGHT_DECAY: tl.constexpr,
    DECOUPLED: tl.constexpr,
    AMSGRAD: tl.constexpr,
):
    """The new θ, exp_avg, exp_avg_sq and max_exp_avg_sq. Corrections: 1 − β₁ᵗ and √(1 − β₂ᵗ) after t steps."""
    d = grad
    if WEIGHT_DECAY:
        if DECOUPLED:  # AdamW: shrinks the parameter instead of adding to the gradient
            theta = theta - lr * weight_decay * theta
        else:
            d = d + weight_decay * theta
    exp_avg = exp_avg + one_minus_beta1 * (d - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * d * d
    second_moment = exp_avg_sq
    if AMSGRAD:
        # NaN counts as larger than any number, as in torch.maximum.
        max_exp_avg_sq = tl.where(exp_avg_sq <= max_exp_avg_sq, max_exp_avg_sq, exp_avg_sq)
        second_moment = max_exp_avg_sq
    denominator = divide(square_root(second_moment), second_correction_root) + eps
    theta = theta - divide(divide(lr, first_correction) * exp_avg, denominator)
    return theta, exp_avg, exp_avg_sq, max_exp_avg_sq
