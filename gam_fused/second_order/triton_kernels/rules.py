"""The arithmetic of sets of elements, named as in ``csrc/second_order/norm_rules.h``, which derives it.

d = input - mean, x̂ = d · invstd, u = grad_output, v = gg_input, w = weight, a = gg_weight, b = gg_bias, g = w · u. All
are in the accumulation dtype; arguments broadcast against one another.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from gam_fused.kernels.triton_rules import divide


@triton.jit
def share_of(count, A: tl.constexpr):
    """1 / ``count``, an integer: what makes a mean of a sum."""
    return divide(tl.full([], 1.0, A), count.to(A))


@triton.jit
def set_terms(g, g_x, v, v_x, v_g, a, a_x, share, invstd, CENTERED: tl.constexpr):
    """What follows for a set from its sums of g, g x̂, v, v x̂, v g, a u and a u x̂.

    P(v) = v - mean_v - x̂ mean_v_x; h = a u + h_v v + h_g g; the result for input is invstd h - gx_1 - x̂ gx_x. Where the
    layer subtracts no mean, unless ``CENTERED``, mean_v and gx_1 are 0.
    """
    mean_v_x, mean_g_x = v_x * share, g_x * share
    h_v, h_g = -invstd * mean_g_x, -invstd * mean_v_x
    mean_h_x = a_x * share + h_v * mean_v_x + h_g * mean_g_x
    mean_v_p_g = v_g * share - mean_v_x * mean_g_x
    mean_v, mean_h = 0.0 * invstd, 0.0 * invstd
    if CENTERED:
        mean_v, mean_g = v * share, g * share
        mean_h = a * share + h_v * mean_v + h_g * mean_g
        mean_v_p_g -= mean_v * mean_g
    return mean_v, mean_v_x, h_v, h_g, invstd * mean_h, invstd * (mean_h_x + invstd * mean_v_p_g)


@triton.jit
def norm_coefficients(w, a, b, invstd, mean_v, mean_v_x, h_v, h_g, gx_1, gx_x):
    """Of v, d and 1 for grad_output, of v, u, d and 1 for input; the same for all elements of a channel."""
    scale = w * invstd
    return (
        scale, invstd * (a - scale * mean_v_x), b - scale * mean_v,
        invstd * h_v, invstd * (w * h_g + a), -invstd * gx_x, -gx_1,
    )  # fmt: skip


@triton.jit
def constant_norm_coefficients(w, a, b, invstd):
    """The same where mean and invstd are constants, as in evaluation of batch normalization."""
    zero = 0.0 * invstd
    return w * invstd, a * invstd, b, zero, a * invstd, zero, zero


@triton.jit
def norm_results(u, d, v, ggo_v, ggo_d, ggo_1, gx_v, gx_u, gx_d, gx_1, CONSTANT: tl.constexpr):
    """For grad_output and for input."""
    if CONSTANT:
        of_input = u * gx_u
    else:
        of_input = (v * gx_v + u * gx_u) + (d * gx_d + gx_1)
    return v * ggo_v + (d * ggo_d + ggo_1), of_input


@triton.jit
def row_results(u, d, v, w, a, b, invstd, mean_v, mean_v_x, h_v, h_g, gx_1, gx_x):
    """For grad_output and for input, and what an element adds to the gradient of its weight."""
    p = v * invstd + (d * (-invstd * invstd * mean_v_x) - invstd * mean_v)
    of_input = (v * (invstd * h_v) + u * (w * (invstd * h_g) + a * invstd)) + (d * (-invstd * gx_x) - gx_1)
    return w * p + (a * (d * invstd) + b), of_input, u * p


@triton.jit
def weight_sum(u, u_x, v_u, invstd, mean_v, mean_v_x):
    """What a set adds to the gradient of a weight, from the sums of u, u x̂ and v u over the elements that share it."""
    return invstd * (v_u - mean_v * u - mean_v_x * u_x)
