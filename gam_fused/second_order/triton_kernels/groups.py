"""Sets that are some channels of one sample: group normalization. Tensors are (samples, channels, positions)."""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from gam_fused.kernels.triton_rules import widen
from gam_fused.second_order.triton_kernels.channels import tile_of
from gam_fused.second_order.triton_kernels.rules import (
    norm_coefficients,
    norm_results,
    set_terms,
    share_of,
    weight_sum,
)
from gam_fused.second_order.triton_kernels.tiles import kernel, load, store, wide

_CHANNELS_AT_ONCE: tl.constexpr = tl.constexpr(256)
_SAMPLES_AT_ONCE: tl.constexpr = tl.constexpr(16)


@triton.jit
def _terms_of_set(partials, weight, gg_weight, sample, first, of_group, channels, slices, share, r, A: tl.constexpr):
    """:func:`set_terms` of ``of_group`` channels of one sample, from ``first`` on."""
    g, g_d, v_g = tl.zeros([_CHANNELS_AT_ONCE], A), tl.zeros([_CHANNELS_AT_ONCE], A), tl.zeros([_CHANNELS_AT_ONCE], A)
    v, v_d = tl.zeros([_CHANNELS_AT_ONCE], A), tl.zeros([_CHANNELS_AT_ONCE], A)
    a_u, a_d = tl.zeros([_CHANNELS_AT_ONCE], A), tl.zeros([_CHANNELS_AT_ONCE], A)
    for begin in range(0, of_group, _CHANNELS_AT_ONCE):
        within = begin + tl.arange(0, _CHANNELS_AT_ONCE)
        inside = within < of_group
        w = load(weight, first + within, inside, A, 1.0)
        a = load(gg_weight, first + within, inside, A)
        for part in range(slices):
            sums = partials + (sample * slices + part) * (5 * channels) + first + within
            u = tl.load(sums, mask=inside, other=0.0)
            u_d = tl.load(sums + channels, mask=inside, other=0.0)
            g += w * u
            g_d += w * u_d
            v += tl.load(sums + 2 * channels, mask=inside, other=0.0)
            v_d += tl.load(sums + 3 * channels, mask=inside, other=0.0)
            v_g += w * tl.load(sums + 4 * channels, mask=inside, other=0.0)
            a_u += a * u
            a_d += a * u_d
    return set_terms(
        tl.sum(g, axis=0), tl.sum(g_d, axis=0) * r, tl.sum(v, axis=0), tl.sum(v_d, axis=0) * r, tl.sum(v_g, axis=0),
        tl.sum(a_u, axis=0), tl.sum(a_d, axis=0) * r, share, r, True,
    )  # fmt: skip


@triton.jit
def _write_portion(
    grad_output, input, weight, mean, invstd, gg_input, gg_weight, gg_bias, partials, grad_grad_output, grad_input,
    program, channels, positions, of_group, slices, portions, steps,
    A: tl.constexpr, K: tl.constexpr, J: tl.constexpr, VEC: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Results for grad_output and for input: ``steps`` tiles, of K channels by J positions, of one set."""
    place, portion = program // portions, program % portions
    groups = channels // of_group
    sample, first = place // groups, place % groups * of_group
    channels, positions = channels.to(tl.int64), wide(positions, VEC, PACKED)
    center, r = widen(tl.load(mean + place), A), widen(tl.load(invstd + place), A)
    share = share_of(of_group * positions, A)
    mean_v, mean_v_x, h_v, h_g, of_1, of_x = _terms_of_set(
        partials, weight, gg_weight, sample, first, of_group, channels, slices, share, r, A
    )
    blocks = tl.cdiv(positions, J).to(tl.int32)
    base = (sample * channels + first) * positions
    for step in range(portion * steps, tl.minimum(portion * steps + steps, tl.cdiv(of_group, K) * blocks)):
        within = step // blocks * K + tl.arange(0, K)
        position = (step % blocks).to(tl.int64) * J + tl.arange(0, J)
        offsets, inside = tile_of(within, of_group, position, channels, positions, False)
        w = load(weight, first + within, within < of_group, A, 1.0)[:, None]
        a = load(gg_weight, first + within, within < of_group, A)[:, None]
        b = load(gg_bias, first + within, within < of_group, A)[:, None]
        ggo_v, ggo_d, ggo_1, gx_v, gx_u, gx_d, gx_1 = norm_coefficients(
            w, a, b, r, mean_v, mean_v_x, h_v, h_g, of_1, of_x
        )
        u = load(grad_output, base + offsets, inside, A)
        d = load(input, base + offsets, inside, A) - center
        v = load(gg_input, base + offsets, inside, A)
        of_grad_output, of_input = norm_results(u, d, v, ggo_v, ggo_d, ggo_1, gx_v, gx_u, gx_d, gx_1, False)
        store(grad_grad_output, base + offsets, inside, of_grad_output)
        store(grad_input, base + offsets, inside, of_input)


@triton.jit
def _write_weights(
    invstd, partials, grad_weight, program, samples, channels, positions, of_group, slices, A: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradient of ``CHANNELS`` weights of one group, over all samples."""
    tiles = tl.cdiv(of_group, CHANNELS)
    group, tile = program // tiles, program % tiles
    first, groups = group * of_group, channels // of_group
    channels = channels.to(tl.int64)
    share = share_of(of_group * positions.to(tl.int64), A)
    own = tile * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([_SAMPLES_AT_ONCE, CHANNELS], A)
    for begin in range(0, samples, _SAMPLES_AT_ONCE):
        sample = begin + tl.arange(0, _SAMPLES_AT_ONCE)
        is_sample = sample < samples
        r = load(invstd, sample * groups + group, is_sample, A)[:, None]
        sums = partials + (sample * slices)[:, None] * (5 * channels) + first
        v, v_d = tl.zeros([_SAMPLES_AT_ONCE, CHANNELS], A), tl.zeros([_SAMPLES_AT_ONCE, CHANNELS], A)
        for start in range(0, of_group, CHANNELS):
            within = start + tl.arange(0, CHANNELS)
            inside = is_sample[:, None] & (within < of_group)[None, :]
            for part in range(slices):
                at = sums + within[None, :] + part * (5 * channels)
                v += tl.load(at + 2 * channels, mask=inside, other=0.0)
                v_d += tl.load(at + 3 * channels, mask=inside, other=0.0)
        mean_v = (tl.sum(v, axis=1) * share)[:, None]
        mean_v_x = (tl.sum(v_d, axis=1) * share)[:, None] * r
        inside = is_sample[:, None] & (own < of_group)[None, :]
        for part in range(slices):
            at = sums + own[None, :] + part * (5 * channels)
            u = tl.load(at, mask=inside, other=0.0)
            u_x = tl.load(at + channels, mask=inside, other=0.0) * r
            v_u = tl.load(at + 4 * channels, mask=inside, other=0.0)
            total += weight_sum(u, u_x, v_u, r, mean_v, mean_v_x)
    store(grad_weight, first + own, own < of_group, tl.sum(total, axis=0))


@kernel
def group_norm_kernel(
    grad_output, input, weight, mean, invstd, gg_input, gg_weight, gg_bias, partials, grad_grad_output, grad_input,
    grad_weight, samples, channels, positions, of_group, slices, portions, steps,
    A: tl.constexpr, K: tl.constexpr, J: tl.constexpr, VEC: tl.constexpr, PACKED: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Results, from the sums of :func:`channel_sums_kernel` with each sample an instance.

    Programs: samples × groups × portions, then, for the gradient of the weight, groups × tiles of ``CHANNELS``.
    """
    program = tl.program_id(0)
    before = samples * (channels // of_group) * portions
    if program < before:
        _write_portion(
            grad_output, input, weight, mean, invstd, gg_input, gg_weight, gg_bias, partials, grad_grad_output,
            grad_input, program, channels, positions, of_group, slices, portions, steps, A, K, J, VEC, PACKED,
        )  # fmt: skip
    elif grad_weight is not None:
        _write_weights(
            invstd, partials, grad_weight, program - before, samples, channels, positions, of_group, slices, A, CHANNELS
        )
