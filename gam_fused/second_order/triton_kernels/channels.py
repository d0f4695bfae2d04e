"""Sets that are channels: batch normalization; and sums over channels, which group normalization starts from as well.

Tensors are (samples, channels, positions) or, if ``LAST``, (samples, positions, channels). A tile is K channels by J
positions, a step is one tile of one sample, a slice some steps.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from gam_fused.second_order.triton_kernels.rules import (
    constant_norm_coefficients,
    norm_coefficients,
    norm_results,
    set_terms,
    share_of,
    weight_sum,
)
from gam_fused.second_order.triton_kernels.tiles import kernel, load, store, wide

_SLICES_AT_ONCE: tl.constexpr = tl.constexpr(16)


@triton.jit
def tile_of(channel, channel_end, position, channels, positions, LAST: tl.constexpr):
    """Offsets within a sample, and which of them are elements."""
    inside = (channel < channel_end)[:, None] & (position < positions)[None, :]
    if LAST:
        return position[None, :] * channels + channel[:, None], inside
    else:
        return channel[:, None] * positions + position[None, :], inside


@kernel
def channel_sums_kernel(
    grad_output, input, mean, gg_input, partials, samples, channels, positions, of_group, slices, steps,
    A: tl.constexpr, K: tl.constexpr, J: tl.constexpr, VEC: tl.constexpr, LAST: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """``partials[instance, slice, :, channel]``: the sums of u, u d, v, v d and v u over ``steps`` steps.

    An instance is ``samples`` samples with the same means, each of which is that of ``of_group`` channels. Programs:
    instances × slices × tiles of channels.
    """
    tiles = tl.cdiv(channels, K)
    tile, place = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    instance, part = place // slices, place % slices
    channel = tile * K + tl.arange(0, K)
    is_channel = channel < channels
    center = load(mean, instance * (channels // of_group) + channel // of_group, is_channel, A)[:, None]
    channels, positions = wide(channels, VEC, PACKED and LAST), wide(positions, VEC, PACKED and not LAST)
    blocks = tl.cdiv(positions, J).to(tl.int32)
    sum_u, sum_u_d = tl.zeros([K, J], A), tl.zeros([K, J], A)
    sum_v, sum_v_d, sum_v_u = tl.zeros([K, J], A), tl.zeros([K, J], A), tl.zeros([K, J], A)
    for step in range(part * steps, tl.minimum(part * steps + steps, samples * blocks)):
        position = (step % blocks).to(tl.int64) * J + tl.arange(0, J)
        offsets, inside = tile_of(channel, channels, position, channels, positions, LAST)
        base = (instance * samples + step // blocks) * (channels * positions)
        u = load(grad_output, base + offsets, inside, A)
        d = load(input, base + offsets, inside, A) - center
        v = load(gg_input, base + offsets, inside, A)
        sum_u += u
        sum_u_d += u * d
        sum_v += v
        sum_v_d += v * d
        sum_v_u += v * u
    to = partials + place * (5 * channels) + channel
    tl.store(to, tl.sum(sum_u, axis=1), mask=is_channel)
    tl.store(to + channels, tl.sum(sum_u_d, axis=1), mask=is_channel)
    tl.store(to + 2 * channels, tl.sum(sum_v, axis=1), mask=is_channel)
    tl.store(to + 3 * channels, tl.sum(sum_v_d, axis=1), mask=is_channel)
    tl.store(to + 4 * channels, tl.sum(sum_v_u, axis=1), mask=is_channel)


@triton.jit
def _sums_of_slices(partials, channel, channels, slices, K: tl.constexpr, A: tl.constexpr):
    """The five sums of each channel, of all slices of the one instance."""
    u, u_d = tl.zeros([K, _SLICES_AT_ONCE], A), tl.zeros([K, _SLICES_AT_ONCE], A)
    v, v_d = tl.zeros([K, _SLICES_AT_ONCE], A), tl.zeros([K, _SLICES_AT_ONCE], A)
    v_u = tl.zeros([K, _SLICES_AT_ONCE], A)
    for first in range(0, slices, _SLICES_AT_ONCE):
        part = first + tl.arange(0, _SLICES_AT_ONCE)
        inside = (channel < channels)[:, None] & (part < slices)[None, :]
        at = partials + part[None, :] * (5 * channels) + channel[:, None]
        u += tl.load(at, mask=inside, other=0.0)
        u_d += tl.load(at + channels, mask=inside, other=0.0)
        v += tl.load(at + 2 * channels, mask=inside, other=0.0)
        v_d += tl.load(at + 3 * channels, mask=inside, other=0.0)
        v_u += tl.load(at + 4 * channels, mask=inside, other=0.0)
    return tl.sum(u, axis=1), tl.sum(u_d, axis=1), tl.sum(v, axis=1), tl.sum(v_d, axis=1), tl.sum(v_u, axis=1)


@kernel
def batch_norm_kernel(
    grad_output, input, weight, mean, invstd, gg_input, gg_weight, gg_bias, partials, grad_grad_output, grad_input,
    grad_weight, samples, channels, positions, slices, steps,
    A: tl.constexpr, K: tl.constexpr, J: tl.constexpr, VEC: tl.constexpr, LAST: tl.constexpr, PACKED: tl.constexpr,
    CONSTANT: tl.constexpr,
):  # fmt: skip
    """Results, from what :func:`channel_sums_kernel` leaves of one instance and the same slices.

    Where mean and invstd are ``CONSTANT``, only the gradient of the weight needs it. Programs: slices × tiles of
    channels.
    """
    tiles = tl.cdiv(channels, K)
    tile, part = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    channel = tile * K + tl.arange(0, K)
    is_channel = channel < channels
    channels, positions = wide(channels, VEC, PACKED and LAST), wide(positions, VEC, PACKED and not LAST)
    r = load(invstd, channel, is_channel, A)
    w = load(weight, channel, is_channel, A, 1.0)
    a = load(gg_weight, channel, is_channel, A)
    b = load(gg_bias, channel, is_channel, A)
    if partials is not None:
        u_sum, u_d, v_sum, v_d, v_u = _sums_of_slices(partials, channel, channels, slices, K, A)
    if CONSTANT:
        ggo_v, ggo_d, ggo_1, gx_v, gx_u, gx_d, gx_1 = constant_norm_coefficients(w, a, b, r)
        if partials is not None:
            of_weight = r * v_u
    else:
        u_x, v_x, share = u_d * r, v_d * r, share_of(samples * positions, A)
        mean_v, mean_v_x, h_v, h_g, of_1, of_x = set_terms(
            w * u_sum, w * u_x, v_sum, v_x, w * v_u, a * u_sum, a * u_x, share, r, True
        )
        ggo_v, ggo_d, ggo_1, gx_v, gx_u, gx_d, gx_1 = norm_coefficients(
            w, a, b, r, mean_v, mean_v_x, h_v, h_g, of_1, of_x
        )
        of_weight = weight_sum(u_sum, u_x, v_u, r, mean_v, mean_v_x)
    if grad_weight is not None:
        if part == 0:
            store(grad_weight, channel, is_channel, of_weight)
    center = load(mean, channel, is_channel, A)[:, None]
    ggo_v, ggo_d, ggo_1 = ggo_v[:, None], ggo_d[:, None], ggo_1[:, None]
    gx_v, gx_u, gx_d, gx_1 = gx_v[:, None], gx_u[:, None], gx_d[:, None], gx_1[:, None]
    blocks = tl.cdiv(positions, J).to(tl.int32)
    for step in range(part * steps, tl.minimum(part * steps + steps, samples * blocks)):
        position = (step % blocks).to(tl.int64) * J + tl.arange(0, J)
        offsets, inside = tile_of(channel, channels, position, channels, positions, LAST)
        base = (step // blocks) * (channels * positions)
        u = load(grad_output, base + offsets, inside, A)
        d = load(input, base + offsets, inside, A) - center
        v = load(gg_input, base + offsets, inside, A)
        of_grad_output, of_input = norm_results(u, d, v, ggo_v, ggo_d, ggo_1, gx_v, gx_u, gx_d, gx_1, CONSTANT)
        store(grad_grad_output, base + offsets, inside, of_grad_output)
        store(grad_input, base + offsets, inside, of_input)
