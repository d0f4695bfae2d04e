"""The compiled double backward of activations beside autograd's in float64."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gam_fused.second_order import activations, native
from tests.second_order.common import Operators, needs_native, threads
from tests.second_order.layers_common import draw, every_size_worthwhile

pytestmark = needs_native

FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[..., tuple[Tensor | None, Tensor | None]]]] = {
    "gelu": (F.gelu, native.gelu_double_backward),
    "gelu_tanh": (partial(F.gelu, approximate="tanh"), native.gelu_tanh_double_backward),
    "silu": (F.silu, native.silu_double_backward),
}
over_functions = pytest.mark.parametrize("name", FUNCTIONS)
# Of the largest of the two factors that are multiplied: the error function of float32 is within 1.5e-7, and a result is
# rounded once.
TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4}


def exact(name: str, grad_output: Tensor, input: Tensor, double_grad: Tensor) -> list[Tensor]:
    """By autograd, in float64."""
    u, x = (tensor.double().detach().requires_grad_() for tensor in (grad_output, input))
    (slope,) = torch.autograd.grad(FUNCTIONS[name][0](x), x, u, create_graph=True)
    return list(torch.autograd.grad(slope, (u, x), double_grad.double()))


def operands(*shape: int, dtype: torch.dtype, scale: float = 3.0) -> list[Tensor]:
    return [(torch.randn(shape, dtype=torch.float64) * factor).to(dtype) for factor in (1.0, scale, 1.0)]


def assert_exact(name: str, tensors: list[Tensor]) -> None:
    found = FUNCTIONS[name][1](*tensors, True, True)
    u, _, v = (tensor.double().abs() for tensor in tensors)
    for one, expected, size in zip(found, exact(name, *tensors), (v, u * v), strict=True):
        assert one is not None
        assert (one.shape, one.dtype) == (expected.shape, tensors[0].dtype)
        tiny = torch.finfo(one.dtype).tiny  # results below it are rounded to something coarser
        assert bool(((one.double() - expected).abs() <= TOLERANCES[one.dtype] * size + tiny).all())


@over_functions
@settings(max_examples=50)
@given(
    shape=st.one_of(
        st.lists(st.integers(0, 5), max_size=5), st.tuples(st.sampled_from([15, 16, 17, 1023, 1024, 1025]))
    ),
    dtype=st.sampled_from(list(TOLERANCES)),
    scale=st.sampled_from([0.1, 3.0, 40.0]),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "channels_last"]),
)
def test_kernels_are_exact_to_rounding(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, scale: float, layout: str
) -> None:
    tensors = operands(*shape, dtype=dtype, scale=scale)
    if layout == "transposed" and len(shape) > 1:
        tensors = [tensor.mT for tensor in tensors]
    elif layout == "sliced" and shape:
        tensors[1] = tensors[1].repeat_interleave(2, -1)[..., ::2]
    elif layout == "channels_last" and len(shape) == 4:
        tensors = [tensor.contiguous(memory_format=torch.channels_last) for tensor in tensors]
    assert_exact(name, tensors)


@over_functions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernels_are_exact_over_the_whole_line(name: str, dtype: torch.dtype) -> None:
    ends = [math.log2(torch.finfo(dtype).max) - 1, -20.0]
    sizes = torch.logspace(ends[1], ends[0], 4001, base=2, dtype=torch.float64)
    line = torch.cat([-sizes, torch.tensor([-0.0, 0.0]).double(), sizes]).to(dtype)
    line = line[line.abs() < 1e6] if name == "gelu_tanh" else line  # PyTorch's own cubes overflow beyond
    ones = torch.ones_like(line)
    assert_exact(name, [ones, line, ones])


@over_functions
def test_infinity_has_the_derivatives_of_its_limit_and_nan_has_none(name: str) -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan])
    first, second = FUNCTIONS[name][1](torch.ones(3), x, torch.ones(3), True, True)
    assert first is not None
    assert second is not None
    torch.testing.assert_close(first[:2], torch.tensor([1.0, 0.0]), rtol=0, atol=1e-30)
    torch.testing.assert_close(second[:2], torch.zeros(2), rtol=0, atol=1e-29)
    assert bool(first[2].isnan())
    assert bool(second[2].isnan())


@over_functions
def test_what_is_not_needed_is_left_out(name: str) -> None:
    tensors = operands(20, dtype=torch.float32)
    kernel = FUNCTIONS[name][1]
    both = kernel(*tensors, True, True)
    first, nothing = kernel(*tensors, True, False)
    assert nothing is None
    assert torch.equal(first, both[0])  # type: ignore[arg-type]
    nothing, second = kernel(*tensors, False, True)
    assert nothing is None
    assert torch.equal(second, both[1])  # type: ignore[arg-type]


@over_functions
def test_results_do_not_depend_on_the_number_of_threads(name: str) -> None:
    tensors = operands(100_003, dtype=torch.float32)
    results = []
    for count in (1, 2):
        with threads(count):
            results.append(FUNCTIONS[name][1](*tensors, True, True))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)  # type: ignore[arg-type]


def digest() -> str:
    """Of what the kernels make of some tensors, on the instruction set in use."""
    torch.manual_seed(0)
    lines = []
    for name, (_, kernel) in FUNCTIONS.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            hashed = hashlib.sha256()
            for result in kernel(*operands(5003, dtype=dtype), True, True):
                assert result is not None
                hashed.update(bytes(result.view(torch.uint8).tolist()))
            lines.append(f"{name} {dtype} {hashed.hexdigest()[:16]}")
    return "\n".join(lines)


@over_functions
def test_a_layer_uses_its_kernel_once(name: str) -> None:
    layer = {
        "gelu": activations.gelu,
        "gelu_tanh": partial(activations.gelu, approximate="tanh"),
        "silu": activations.silu,
    }[name]
    x, direction = draw(3, 50, dtype=torch.float32), draw(3, 50, dtype=torch.float32)
    with every_size_worthwhile():
        (slope,) = torch.autograd.grad(layer(x), x, direction, create_graph=True)
    ones = torch.ones_like(slope)
    with Operators() as operators:
        torch.autograd.grad(slope, (direction, x), ones)
    assert operators.names == [f"gam_fused.{name.removesuffix('_tanh')}_double_backward.default"]


# ---------------------------------------------------------------- what PyTorch is told, and refusals

OPERATORS: dict[str, tuple[Any, tuple[bool, ...]]] = (
    {
        "gelu": (torch.ops.gam_fused.gelu_double_backward.default, (False,)),
        "gelu_tanh": (torch.ops.gam_fused.gelu_double_backward.default, (True,)),
        "silu": (torch.ops.gam_fused.silu_double_backward.default, ()),
    }
    if not needs_native.args[0]
    else {}
)


@over_functions
@pytest.mark.parametrize("needs", [(True, True), (False, True)], ids=str)
def test_opcheck(name: str, needs: tuple[bool, bool]) -> None:
    pytest.importorskip("expecttest", reason="torch.library.opcheck needs expecttest")
    operator, setting = OPERATORS[name]
    torch.library.opcheck(operator, (*operands(3, 4, dtype=torch.float32), *setting, *needs))


@over_functions
def test_fake_results_look_like_the_real_ones(name: str) -> None:
    operator, setting = OPERATORS[name]
    tensors = [t.contiguous(memory_format=torch.channels_last) for t in operands(2, 3, 4, 5, dtype=torch.float32)]
    real = operator(*tensors, *setting, True, False)
    with FakeTensorMode() as mode:
        fake = operator(*map(mode.from_tensor, tensors), *setting, True, False)
    for one, other in zip(fake, real, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


@over_functions
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: [t[0].float(), *t[1:]], "grad_output: dtype, device or shape differs"),
        (lambda t: [*t[:2], t[2][:2]], "gg_input: dtype, device or shape differs"),
        (lambda t: [t[0].mT.contiguous().mT, *t[1:]], "grad_output: strides differ"),
        (lambda t: [each.long() for each in t], "input: expected a strided tensor of float64"),
        (lambda t: [each.to_sparse() for each in t], "input: expected a strided tensor|Could not run"),
        (lambda t: [each.mT for each in t], "input: expected a tensor that is contiguous or channels_last"),
        (lambda t: [each[0, 0] for each in t], "input: expected at least 1 dimension"),
    ],
)
def test_malformed_calls_raise(name: str, change: Callable[[list[Tensor]], list[Tensor]], message: str) -> None:
    operator, setting = OPERATORS[name]
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        operator(*change(operands(3, 4, dtype=torch.float64)), *setting, True, True)
