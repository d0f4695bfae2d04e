"""The Triton kernels for the double backward of normalization on a device: against the formulas, in a graph, when huge.

What can be asked of the CPU as well is asked of it too, where the kernels are interpreted.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gam_fused.second_order import formulas, normalization
from gam_fused.second_order import triton as kernels
from tests.gpu.workload import assert_same_bits, no_synchronisation
from tests.second_order.common import CASES, Case, derivatives, is_ours, over, relative_error
from tests.second_order.norm_calls import KINDS, arguments, function, in_float64

CUDA = torch.device("cuda")
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4}

# A tile, a few, and the rest of one; short and long rows.
SMALL = dict.fromkeys(KINDS, (3, 4, 5, 9))
LARGE = {
    "batch_norm": (32, 24, 29, 41),
    "batch_norm-eval": (32, 24, 29, 41),
    "group_norm": (32, 24, 29, 41),
    "layer_norm": (1500, 1000),
    "rms_norm": (300, 10_007),
}
WHOLE = {**dict.fromkeys(LARGE, (32, 64, 32, 32)), "layer_norm": (2048, 1024), "rms_norm": (300, 8192)}
over_kinds = pytest.mark.parametrize("kind", KINDS)
over_layouts = pytest.mark.parametrize(
    ("kind", "channels_last"), [*((kind, False) for kind in KINDS), ("batch_norm", True), ("batch_norm-eval", True)]
)


@pytest.fixture(autouse=True)
def needs_triton(request: pytest.FixtureRequest) -> None:
    device = request.getfixturevalue("device") if "device" in request.fixturenames else CUDA
    reason = kernels.unavailable_reason(device)
    if reason is not None:
        pytest.skip(reason)


def given(kind: str, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = False) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    return arguments(kind, shape, dtype, channels_last=channels_last, groups=4, generator=generator)


def on(device: torch.device, values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.to(device) if isinstance(value, Tensor) else value for value in values)


def check(kind: str, values: tuple[Any, ...], device: torch.device) -> None:
    expected = function(formulas, kind)(*in_float64(on(device, values)))
    for one, other in zip(function(kernels, kind)(*on(device, values)), expected, strict=True):
        assert one is not None
        assert other is not None
        assert relative_error(one, other) <= TOLERANCES[values[1].dtype]


@over_layouts
def test_results_are_those_of_the_formulas(
    kind: str, channels_last: bool, dtype: torch.dtype, device: torch.device
) -> None:
    check(kind, given(kind, SMALL[kind], dtype, channels_last), device)


@pytest.mark.cuda
@over_layouts
@pytest.mark.parametrize("shapes", [LARGE, WHOLE], ids=["large", "whole"])
def test_large_results_are_those_of_the_formulas(
    kind: str, shapes: dict[str, tuple[int, ...]], channels_last: bool, dtype: torch.dtype
) -> None:
    check(kind, given(kind, shapes[kind], dtype, channels_last), CUDA)


@pytest.mark.cuda
@over_kinds
def test_two_runs_give_the_same_bits_without_synchronising(kind: str) -> None:
    values = on(CUDA, given(kind, LARGE[kind], torch.float32))
    first = function(kernels, kind)(*values)
    with no_synchronisation(CUDA):
        second = function(kernels, kind)(*values)
    assert_same_bits([tensor for tensor in first if tensor is not None], [t for t in second if t is not None])


@pytest.mark.cuda
@over_kinds
def test_a_graph_gives_the_bits_of_an_eager_call(kind: str) -> None:
    values = on(CUDA, given(kind, SMALL[kind], torch.float32))
    expected = function(kernels, kind)(*values)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = function(kernels, kind)(*values)
    graph.replay()
    assert_same_bits([tensor for tensor in found if tensor is not None], [t for t in expected if t is not None])


@pytest.mark.cuda
def test_more_than_two_billion_elements() -> None:
    """Everything a channel of batch normalization gets depends on that channel alone."""
    if torch.cuda.mem_get_info()[0] < 2**35:
        pytest.skip("needs 32 GiB of free memory on the device")
    shape = (1, 33, 2**13, 2**13)
    generator = torch.Generator(CUDA).manual_seed(0)

    def activations() -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=CUDA, generator=generator)

    big = [activations() for _ in range(3)]
    small = [torch.rand(33, device=CUDA, generator=generator) + 0.5 for _ in range(5)]
    u, x, v = big
    w, m, r, a, b = small
    found = kernels.batch_norm_double_backward(u, x, w, m, r, v, a, b, True, True, True, True)
    last = [tensor[:, -1:].clone() for tensor in big], [tensor[-1:] for tensor in small]
    (u, x, v), (w, m, r, a, b) = last
    expected = kernels.batch_norm_double_backward(u, x, w, m, r, v, a, b, True, True, True, True)
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert one is not None
        assert other is not None
        assert relative_error(one[:, -1:], other) <= TOLERANCES[torch.bfloat16]


@pytest.mark.cuda
@over({name: CASES[name] for name in ("batch_norm", "batch_norm-eval", "group_norm", "instance_norm", "layer_norm")})
def test_layers_on_a_device_take_these_kernels(case: Case) -> None:
    assert normalization.kernels_for(CUDA) is kernels
    tensors = [tensor.detach().to(CUDA).requires_grad_() for tensor in case.tensors()]
    assert is_ours(case.ours(*tensors))
    found, expected = derivatives(case.ours, tensors), derivatives(case.theirs, tensors)
    for one, other in zip(found["product"], expected["product"], strict=True):
        assert relative_error(one, other) <= 1e-11
