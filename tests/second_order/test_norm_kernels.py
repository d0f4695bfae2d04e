"""The compiled double backward of normalization layers beside the formulas in plain operators."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gam_fused.second_order import formulas, native
from gam_fused.second_order.batch_norm import batch_norm
from gam_fused.second_order.layer_norm import layer_norm
from tests.second_order.common import assert_close, needs_native, relative_error, threads
from tests.second_order.norm_calls import DTYPES, KINDS, ROW_KINDS, arguments, function, in_float64

pytestmark = needs_native

over_kinds = pytest.mark.parametrize("kind", KINDS)


def check(kind: str, values: tuple[Any, ...], tolerance: float) -> None:
    found, expected = function(native, kind)(*values), function(formulas, kind)(*in_float64(values))
    for one, other, like in zip(found, expected, (values[0], values[1], values[2]), strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert (one.shape, one.dtype) == (like.shape, like.dtype)
            assert relative_error(one, other) <= tolerance


# Past what the kernels cut the work into: vectors, blocks of 1024 elements, segments of 16384, tiles of 256 channels,
# 4 and 64 rows, tasks of 32768 elements, sets beyond a cache.
CUTS = [(2, 3, 16385), (1, 1, 40_000), (3, 258, 5), (70, 300), (130, 4, 2), (5, 2, 1023), (2, 6, 45_000), (260, 130)]


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", CUTS, ids=str)
@over_kinds
def test_sizes_around_the_cuts(kind: str, shape: tuple[int, ...], channels_last: bool) -> None:
    if channels_last and kind in ROW_KINDS:
        return
    groups = 2 if shape[1] % 2 == 0 else 1
    check(kind, arguments(kind, shape, channels_last=channels_last, groups=groups), 1e-12)


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, tuple[Any, ...], torch.dtype]:
    kind = draw(st.sampled_from(KINDS))
    groups, of_group = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    spatial = draw(st.lists(st.integers(1, 9), max_size=3))
    shape = (draw(st.integers(1, 9)), groups * of_group, *spatial)
    dtype = draw(st.sampled_from((torch.float64, torch.float32)))
    values = arguments(
        kind,
        shape,
        dtype,
        channels_last=draw(st.booleans()) and kind not in ROW_KINDS,
        missing=draw(st.frozensets(st.sampled_from(("weight", "gg_input", "gg_weight", "gg_bias")))),
        needs=draw(st.tuples(st.booleans(), st.booleans(), st.booleans())),
        groups=groups,
    )
    return kind, values, dtype


@settings(max_examples=150)
@given(calls())
@example(("batch_norm", arguments("batch_norm", (1, 1)), torch.float64))
def test_kernels_follow_the_formulas(call: tuple[str, tuple[Any, ...], torch.dtype]) -> None:
    kind, values, dtype = call
    check(kind, values, 1e-11 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@over_kinds
def test_narrow_dtypes_are_rounded_once(kind: str, channels_last: bool, dtype: torch.dtype) -> None:
    shape = (5, 6, 41) if kind in ROW_KINDS or not channels_last else (5, 6, 41, 1)
    values = arguments(kind, shape, dtype, channels_last=channels_last and len(shape) == 4, groups=3)
    found, exact = function(native, kind)(*values), function(formulas, kind)(*in_float64(values))
    for one, other in zip(found, exact, strict=True):
        assert one is not None
        assert other is not None
        # Half a unit in the last place by the only rounding to the dtype, and what float32 loses before that: sums of
        # at most 1230 terms, and four products that may cancel.
        allowed = other.abs() * (torch.finfo(dtype).eps / 2) + 1e-5 * other.abs().max()
        assert ((one.double() - other).abs() <= allowed + torch.finfo(dtype).smallest_normal).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 8, 96, 97), (16, 8, 48, 48), (2, 3, 45_000), (3000, 90)], ids=str)
@over_kinds
def test_results_do_not_depend_on_the_number_of_threads(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    formats = [False] if len(shape) < 4 or kind in ROW_KINDS else [False, True]
    for channels_last in formats:
        values = arguments(kind, shape, dtype, channels_last=channels_last, groups=shape[1] // 2 or 1)
        with threads(1):
            expected = function(native, kind)(*values)
        for count in (2, 3):
            with threads(count):
                found = function(native, kind)(*values)
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["batch_norm", "layer_norm"])
def test_float32_loses_no_more_than_in_pytorch(kind: str) -> None:
    def product(of: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        x = (torch.randn(16, 4, 64, 64, generator=generator) + 3).to(dtype).requires_grad_()
        w = torch.ones(4 if kind == "batch_norm" else 64, dtype=dtype, requires_grad=True)
        output = of(x, None, None, w, None, True) if kind == "batch_norm" else of(x, [64], w)
        (grad,) = torch.autograd.grad(output.sin().sum(), x, create_graph=True)
        vector = torch.randn(grad.shape, generator=generator).to(dtype)
        return list(torch.autograd.grad(grad, [x, w], vector))

    ours, theirs = {"batch_norm": (batch_norm, F.batch_norm), "layer_norm": (layer_norm, F.layer_norm)}[kind]
    exact = product(theirs, torch.float64)
    errors = [
        [relative_error(one, other) for one, other in zip(product(of, torch.float32), exact, strict=True)]
        for of in (ours, theirs)
    ]
    for mine, other in zip(*errors, strict=True):
        assert mine <= other + torch.finfo(torch.float32).eps


# ---------------------------------------------------------------- instruction sets


def digest() -> str:
    """Of many results, in the instruction set of this process."""
    generator = torch.Generator().manual_seed(0)
    lines = []
    for kind in KINDS:
        for dtype in DTYPES:
            for shape in ((3, 6, 7, 5), (2, 6, 1500), (33, 300)):
                for channels_last in {False, len(shape) == 4 and kind not in ROW_KINDS}:
                    values = arguments(kind, shape, dtype, channels_last=channels_last, groups=3, generator=generator)
                    hashed = hashlib.sha256()
                    for result in function(native, kind)(*values):
                        assert result is not None
                        hashed.update(bytes(result.contiguous().view(-1).view(torch.uint8).tolist()))
                    lines.append(f"{kind} {dtype} {shape} {channels_last} {hashed.hexdigest()[:16]}")
    return "\n".join(lines)


# ---------------------------------------------------------------- what PyTorch is told, and refusals


@over_kinds
def test_opcheck(kind: str) -> None:
    pytest.importorskip("expecttest", reason="torch.library.opcheck needs expecttest")
    operator = function(torch.ops.gam_fused, kind).default  # type: ignore[attr-defined]
    for needs in ((True, True, True), (False, True, False)):
        torch.library.opcheck(operator, arguments(kind, (3, 4, 5), torch.float32, groups=2, needs=needs))


@over_kinds
def test_fake_results_look_like_the_real_ones(kind: str) -> None:
    channels_last = kind not in ROW_KINDS
    values = arguments(kind, (3, 4, 5, 6), channels_last=channels_last, groups=2)
    real = function(native, kind)(*values)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(value) if isinstance(value, Tensor) else value for value in values]
        fake = function(native, kind)(*fakes)
    for one, other in zip(fake, real, strict=True):
        assert one is not None
        assert other is not None
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


@over_kinds
def test_without_elements(kind: str) -> None:
    values = arguments(kind, (0, 4, 5), groups=2)
    found = function(native, kind)(*values)
    for one, like in zip(found, values[:3], strict=True):
        assert one is not None
        assert one.shape == like.shape
    assert found[2] is not None
    assert not found[2].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.__setitem__(0, v[0].float()), "grad_output: dtype, device or shape differs"),
        (lambda v: v.__setitem__(5, v[5][:2]), "gg_input: dtype, device or shape differs"),
        (lambda v: v.__setitem__(0, v[0].transpose(0, 1).contiguous().transpose(0, 1)), "grad_output: strides differ"),
        (lambda v: v.__setitem__(2, v[2][:3]), "weight: expected a contiguous floating point tensor of 4"),
        (lambda v: v.__setitem__(7, v[7].repeat_interleave(2)[::2]), "gg_bias: expected a contiguous"),
        (lambda v: v.__setitem__(4, v[4].long()), "invstd: expected a contiguous floating point tensor"),
        (lambda v: v.__setitem__(1, v[1].long()), "input: expected a strided tensor of float64"),
        (lambda v: v.__setitem__(2, None), "needs_weight: there is no weight"),
    ],
)
def test_malformed_calls_raise(change: Callable[[list[Any]], None], message: str) -> None:
    values = list(arguments("batch_norm", (3, 4, 5)))
    change(values)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.gam_fused.batch_norm_double_backward(*values)


def test_malformed_settings_raise() -> None:
    values = arguments("group_norm", (3, 4, 5))
    with pytest.raises(RuntimeError, match="num_groups: 3 does not divide the number of channels, 4"):
        torch.ops.gam_fused.group_norm_double_backward(*values[:8], 3, *values[9:])
    values = arguments("layer_norm", (3, 4, 5))
    with pytest.raises(RuntimeError, match="normalized_dims: expected 1 to 3, got 4"):
        torch.ops.gam_fused.layer_norm_double_backward(*values[:8], 4, *values[9:])
    transposed = [v.transpose(0, 1) if i in (0, 1, 5) else v for i, v in enumerate(arguments("layer_norm", (3, 4, 5)))]
    with pytest.raises(RuntimeError, match="input: expected a contiguous tensor"):
        torch.ops.gam_fused.layer_norm_double_backward(*transposed)
    transposed = [v.transpose(0, 2) if i in (0, 1, 5) else v for i, v in enumerate(arguments("batch_norm", (3, 4, 5)))]
    with pytest.raises(RuntimeError, match="input: expected a tensor that is contiguous or channels_last"):
        torch.ops.gam_fused.batch_norm_double_backward(*transposed)


def test_results_are_close_where_the_layer_is_degenerate() -> None:
    """Sets of one element, and of equal elements, have no spread: what is left is finite and that of the formulas."""
    x = torch.ones(1, 3, 4, dtype=torch.float64)
    values = list(arguments("group_norm", (1, 3, 4), groups=3))
    values[1], values[3], values[4] = x, torch.ones(1, 3).double(), torch.full((1, 3), 1e3).double()
    found, expected = native.group_norm_double_backward(*values), formulas.group_norm_double_backward(*values)
    assert_close(found, expected, 1e-12)


def test_a_weight_of_another_size_raises_beside_an_empty_input() -> None:
    empty = torch.randn(0, 5000)
    with pytest.raises(RuntimeError, match="weight: expected 5000 numbers, got 1"):
        torch.ops.gam_fused.layer_norm_double_backward(
            empty, empty, torch.ones(1), None, torch.zeros(0), empty, None, None, 1, True, True, True
        )
