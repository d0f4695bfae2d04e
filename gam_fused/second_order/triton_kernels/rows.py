"""Sets that are rows: layer and RMS normalization. Tensors are (rows, size), with a weight for each place in a row.

A program works on every ``programs``-th row, or tile of rows, and leaves what these add to the gradient of the weight
in ``partials[program, :]``, for a launch that adds up.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from gam_fused.kernels.triton_rules import widen
from gam_fused.second_order.triton_kernels.rules import row_results, set_terms, share_of
from gam_fused.second_order.triton_kernels.tiles import kernel, load, store, wide

_PROGRAMS_AT_ONCE: tl.constexpr = tl.constexpr(64)


@triton.jit
def _terms_of_rows(g, g_d, v, v_d, v_g, a, a_d, share, invstd, CENTERED: tl.constexpr):
    """:func:`set_terms`, from what is to be added up along rows."""
    return set_terms(
        tl.sum(g, axis=-1), tl.sum(g_d, axis=-1) * invstd, tl.sum(v, axis=-1), tl.sum(v_d, axis=-1) * invstd,
        tl.sum(v_g, axis=-1), tl.sum(a, axis=-1), tl.sum(a_d, axis=-1) * invstd, share, invstd, CENTERED,
    )  # fmt: skip


@kernel
def short_rows_kernel(
    grad_output, input, weight, mean, invstd, gg_input, gg_weight, gg_bias, partials, grad_grad_output, grad_input,
    rows, size, programs,
    A: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr, VEC: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Results, for tiles of R whole rows: every element is read once."""
    size = wide(size, VEC, PACKED)
    share = share_of(size, A)
    column = tl.arange(0, COLUMNS)
    is_column = column < size
    w = load(weight, column, is_column, A, 1.0)[None, :]
    a = load(gg_weight, column, is_column, A)[None, :]
    b = load(gg_bias, column, is_column, A)[None, :]
    of_weight = tl.zeros([R, COLUMNS], A)
    for tile in range(tl.program_id(0), tl.cdiv(rows, R), programs):
        row = tile * R + tl.arange(0, R)
        is_row = row < rows
        r = load(invstd, row, is_row, A)
        base, offsets = tile * (R * size), tl.arange(0, R)[:, None] * size + column[None, :]
        inside = is_row[:, None] & is_column[None, :]
        u = load(grad_output, base + offsets, inside, A)
        d = load(input, base + offsets, inside, A)
        if mean is not None:
            d -= load(mean, row, is_row, A)[:, None]
        v = load(gg_input, base + offsets, inside, A)
        mean_v, mean_v_x, h_v, h_g, gx_1, gx_x = _terms_of_rows(
            w * u, w * u * d, v, v * d, v * (w * u), a * u, a * u * d, share, r, mean is not None
        )
        of_grad_output, of_input, added = row_results(
            u, d, v, w, a, b, r[:, None], mean_v[:, None], mean_v_x[:, None], h_v[:, None], h_g[:, None],
            gx_1[:, None], gx_x[:, None],
        )  # fmt: skip
        store(grad_grad_output, base + offsets, inside, of_grad_output)
        store(grad_input, base + offsets, inside, of_input)
        of_weight += added
    if partials is not None:
        store(partials, tl.program_id(0) * size + column, is_column, tl.sum(of_weight, axis=0))


@kernel
def long_rows_kernel(
    grad_output, input, weight, mean, invstd, gg_input, gg_weight, gg_bias, terms, partials, grad_grad_output,
    grad_input, rows, size, programs,
    A: tl.constexpr, COLUMNS: tl.constexpr, VEC: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Results, for rows of any size: first ``terms[:, row]``, then tile by tile, each of all of the program's rows."""
    rows, size = rows.to(tl.int64), wide(size, VEC, PACKED)
    share = share_of(size, A)
    for row in range(tl.program_id(0), rows, programs):
        r = widen(tl.load(invstd + row), A)
        g, g_d, v_g = tl.zeros([COLUMNS], A), tl.zeros([COLUMNS], A), tl.zeros([COLUMNS], A)
        v, v_d = tl.zeros([COLUMNS], A), tl.zeros([COLUMNS], A)
        a_u, a_d = tl.zeros([COLUMNS], A), tl.zeros([COLUMNS], A)
        for start in range(0, size, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = column < size
            w = load(weight, column, inside, A, 1.0)
            a = load(gg_weight, column, inside, A)
            u = load(grad_output, row * size + column, inside, A)
            d = load(input, row * size + column, inside, A)
            if mean is not None:
                d -= widen(tl.load(mean + row), A)
            each_v = load(gg_input, row * size + column, inside, A)
            g += w * u
            g_d += w * u * d
            v += each_v
            v_d += each_v * d
            v_g += each_v * (w * u)
            a_u += a * u
            a_d += a * u * d
        mean_v, mean_v_x, h_v, h_g, gx_1, gx_x = _terms_of_rows(
            g, g_d, v, v_d, v_g, a_u, a_d, share, r, mean is not None
        )
        tl.store(terms + row, mean_v)
        tl.store(terms + rows + row, mean_v_x)
        tl.store(terms + 2 * rows + row, h_v)
        tl.store(terms + 3 * rows + row, h_g)
        tl.store(terms + 4 * rows + row, gx_1)
        tl.store(terms + 5 * rows + row, gx_x)
    tl.debug_barrier()  # every thread reads what one of them wrote
    for start in range(0, size, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < size
        w = load(weight, column, inside, A, 1.0)
        a = load(gg_weight, column, inside, A)
        b = load(gg_bias, column, inside, A)
        of_weight = tl.zeros([COLUMNS], A)
        for row in range(tl.program_id(0), rows, programs):
            u = load(grad_output, row * size + column, inside, A)
            d = load(input, row * size + column, inside, A)
            if mean is not None:
                d -= widen(tl.load(mean + row), A)
            v = load(gg_input, row * size + column, inside, A)
            of_grad_output, of_input, added = row_results(
                u, d, v, w, a, b, widen(tl.load(invstd + row), A), tl.load(terms + row), tl.load(terms + rows + row),
                tl.load(terms + 2 * rows + row), tl.load(terms + 3 * rows + row), tl.load(terms + 4 * rows + row),
                tl.load(terms + 5 * rows + row),
            )  # fmt: skip
            store(grad_grad_output, row * size + column, inside, of_grad_output)
            store(grad_input, row * size + column, inside, of_input)
            of_weight += added
        if partials is not None:
            store(partials, tl.program_id(0) * size + column, inside, of_weight)


@kernel
def add_partials_kernel(partials, grad_weight, size, programs, A: tl.constexpr, PLACES: tl.constexpr):
    """The gradient of the weight, from what each program has left. Programs: tiles of ``PLACES``."""
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    total = tl.zeros([_PROGRAMS_AT_ONCE, PLACES], A)
    for first in range(0, programs, _PROGRAMS_AT_ONCE):
        program = first + tl.arange(0, _PROGRAMS_AT_ONCE)
        inside = (program < programs)[:, None] & (place < size)[None, :]
        places = program[:, None] * size.to(tl.int64) + place[None, :]
        total += tl.load(partials + places, mask=inside, other=0.0)
    store(grad_weight, place, place < size, tl.sum(total, axis=0))
