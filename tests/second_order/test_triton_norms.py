"""The Triton kernels for the double backward of normalization layers, interpreted, beside the formulas in float64.

What a compiler makes of them is in test_triton_compile.py, what a device does in tests/gpu.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gam_fused.second_order import formulas, normalization
from gam_fused.second_order import triton as kernels
from tests.interpreter import wrap_the_language_once
from tests.second_order.common import CASES, Case, assert_close, derivatives, is_ours, over, relative_error
from tests.second_order.norm_calls import DTYPES, KINDS, ROW_KINDS, arguments, function, in_float64

CPU = torch.device("cpu")
REASON = kernels.unavailable_reason(CPU)

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
over_kinds = pytest.mark.parametrize("kind", KINDS)

if REASON is None:
    wrap_the_language_once()

# Of the norm of a result, besides half a unit in the last place by the one rounding to the dtype: sums and terms of
# float32 cancel in sets of few elements, those of float64 leave that much and more to spare.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 4e-3, torch.float16: 6e-4}


@pytest.fixture(autouse=True, scope="module")
def memory_full_of_nan() -> Iterator[None]:
    """What nobody has written is found out."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(kind: str, values: tuple[Any, ...], tolerance: float) -> None:
    found, expected = function(kernels, kind)(*values), function(formulas, kind)(*in_float64(values))
    for one, other, like, is_needed in zip(found, expected, values[:3], values[9:], strict=True):
        assert (one is None) == (other is None) == (not is_needed)
        if one is not None and other is not None:
            assert (one.shape, one.dtype) == (like.shape, like.dtype)
            assert relative_error(one, other) <= tolerance


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, tuple[Any, ...], torch.dtype, int]:
    kind = draw(st.sampled_from(KINDS))
    dtype = draw(st.sampled_from((torch.float64, *DTYPES)))
    around_tiles = st.sampled_from((1, 2, 8, 15, 16, 17, 63, 64, 65, 100, 256, 257))
    if kind in ROW_KINDS:
        shape, groups = (*draw(st.lists(st.integers(1, 5), max_size=2)), draw(around_tiles)), 1
    else:
        groups, spatial = draw(st.integers(1, 3)), draw(st.sampled_from(((), (1,), (1, 1), (3, 5), (4, 4), (2, 2, 4))))
        spatial = draw(st.sampled_from((spatial, (draw(around_tiles),))))
        shape = (draw(st.integers(1, 4)), groups * draw(st.sampled_from((1, 2, 3, 8, 17))), *spatial)
    values = arguments(
        kind,
        shape,
        dtype,
        channels_last=draw(st.booleans()) and kind not in ROW_KINDS,
        missing=draw(st.frozensets(st.sampled_from(("weight", "gg_input", "gg_weight", "gg_bias")))),
        needs=draw(
            st.sampled_from(((True, True, True), (True, True, False), (True, False, True), (False, True, True)))
        ),
        groups=groups,
    )
    return kind, values, dtype, draw(st.sampled_from((1, 4, 512)))


@settings(max_examples=40)
@given(calls())
@example(("batch_norm", arguments("batch_norm", (1, 1)), torch.float64, 512))
@example(("layer_norm", arguments("layer_norm", (1,)), torch.float64, 512))
@example(("group_norm", arguments("group_norm", (1, 1), needs=(False, False, False)), torch.float64, 512))
def test_kernels_follow_the_formulas(call: tuple[str, tuple[Any, ...], torch.dtype, int]) -> None:
    kind, values, dtype, programs = call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_ENOUGH_PROGRAMS", programs)
        patch.setattr(kernels, "_PROGRAMS_OF_ROWS", min(programs, 256))
        check(kind, values, TOLERANCES[dtype])


# Past what the work is cut into: tiles of 1024 elements in float32, of 64 and 16 positions; 16 channels of
# channels_last; 16 slices and samples, 256 channels of a group and 16 weights at once; two tiles a portion; rows of
# 2048 and of 4096 elements, 64 programs.
CUTS = [
    ("batch_norm", (2, 2, 1025), False),
    ("batch_norm", (17, 3, 5), False),
    ("batch_norm", (2, 17, 65), False),
    ("batch_norm", (5, 17, 3, 5), True),
    ("batch_norm", (70, 5), False),
    ("batch_norm-eval", (1, 2, 2048), False),
    ("group_norm", (17, 2, 3), False),
    ("group_norm", (1, 260, 2), False),
    ("group_norm", (2, 2, 2049), False),
    ("group_norm", (1, 34, 17), False),
    ("layer_norm", (3, 2049), False),
    ("layer_norm", (2, 4096), False),
    ("layer_norm", (3, 4097), False),
    ("rms_norm", (3, 5120), False),
    ("layer_norm", (260, 1000), False),
]


@pytest.mark.parametrize(("kind", "shape", "channels_last"), CUTS, ids=str)
def test_sizes_around_the_cuts(
    kind: str, shape: tuple[int, ...], channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_TILES_OF_PORTION", 2)
    monkeypatch.setattr(kernels, "_PROGRAMS_OF_ROWS", 2 if shape[0] < 100 else 66)
    groups = 2 if shape[1] % 2 == 0 and shape[1] != 260 else 1
    values = arguments(kind, shape, torch.float32, channels_last=channels_last, groups=groups)
    check(kind, values, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@over_kinds
def test_narrow_dtypes_are_rounded_once(kind: str, dtype: torch.dtype) -> None:
    values = arguments(kind, (5, 6, 41), dtype, groups=3)
    found, exact = function(kernels, kind)(*values), function(formulas, kind)(*in_float64(values))
    for one, other in zip(found, exact, strict=True):
        assert one is not None
        assert other is not None
        # As of the native kernels: half a unit in the last place, and what float32 loses before.
        allowed = other.abs() * (torch.finfo(dtype).eps / 2) + 1e-5 * other.abs().max()
        assert ((one.double() - other).abs() <= allowed + torch.finfo(dtype).smallest_normal).all()


@over_kinds
def test_parameters_may_be_wider_and_tensors_anywhere(kind: str) -> None:
    """float32 parameters beside bfloat16, other strides, an address that 16 does not divide."""
    shape = (3, 8, 16)
    values = list(arguments(kind, shape, torch.bfloat16, groups=2))
    for i in (2, 6, 7):
        values[i] = values[i].float()
    values[0] = values[0].transpose(0, 2).contiguous().transpose(0, 2)
    values[1] = torch.empty(values[1].numel() + 1, dtype=torch.bfloat16)[1:].view(shape).copy_(values[1])
    values[5] = values[5][:1].expand(shape)
    check(kind, tuple(values), TOLERANCES[torch.bfloat16])


@over_kinds
def test_without_elements(kind: str) -> None:
    values = arguments(kind, (0, 4, 5), groups=2)
    found = function(kernels, kind)(*values)
    for one, like in zip(found, values[:3], strict=True):
        assert one is not None
        assert one.shape == like.shape
    assert found[2] is not None
    assert not found[2].any()


def test_channels_last_stays() -> None:
    found = kernels.batch_norm_double_backward(*arguments("batch_norm", (2, 3, 4, 5), channels_last=True))
    for one in found[:2]:
        assert one is not None
        assert one.is_contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------- behind the layers


@pytest.fixture
def in_layers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers on these kernels; the functions that are called."""
    called: list[str] = []

    def noted(name: str, of: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            called.append(name)
            return of(*arguments)

        return call

    for name in ("batch_norm", "group_norm", "layer_norm"):
        of = getattr(kernels, f"{name}_double_backward")
        monkeypatch.setattr(kernels, of.__name__, noted(name, of))
    monkeypatch.setattr(normalization, "kernels_for", lambda device: kernels)
    return called


@over(
    {
        name: CASES[name]
        for name in ("batch_norm", "batch_norm-eval", "group_norm", "instance_norm", "layer_norm-2-dims", "rms_norm")
    }
)
def test_products_are_those_of_pytorch(case: Case, in_layers: list[str]) -> None:
    tensors = case.tensors()
    assert is_ours(case.ours(*tensors))
    found, expected = derivatives(case.ours, tensors), derivatives(case.theirs, tensors)
    assert_close(found["product"], expected["product"], 1e-12)
    assert [f"{name}_double_backward" for name in in_layers] == [case.operator]


def test_a_batch_of_gradients_has_no_address_and_goes_by_the_formulas(in_layers: list[str]) -> None:
    case = CASES["layer_norm"]
    x, *parameters = case.tensors()
    (grad,) = torch.autograd.grad(case.ours(x, *parameters).tanh().sum(), x, create_graph=True)
    vectors = torch.randn(3, *x.shape, dtype=torch.float64)
    (batched,) = torch.autograd.grad(grad, x, vectors, retain_graph=True, is_grads_batched=True)
    single: list[Tensor] = [torch.autograd.grad(grad, x, vector, retain_graph=True)[0] for vector in vectors]
    assert_close([batched], [torch.stack(single)], 1e-12)
    assert len(in_layers) == 4
