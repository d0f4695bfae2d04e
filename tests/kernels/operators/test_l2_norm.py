"""The norm of a list, of whatever is in it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given

from gam_fused.kernels import Backend
from gam_fused.kernels.interface import accumulation_dtype
from tests.kernels.operators.common import few_examples
from tests.kernels.tensor_lists import Draw, Spec, assert_same_bits, seeds, specs


@few_examples
@given(specs, seeds)
def test_l2_norm_is_that_of_all_elements(
    backend: Backend, dtype: torch.dtype, device: torch.device, specs: list[Spec], seed: int
) -> None:
    tensors = Draw(dtype, device, seed).normal(specs)
    norm = backend.l2_norm(tensors)
    expected = math.sqrt(sum(t.double().square().sum().item() for t in tensors))
    # n roundings of partial sums, independent of each other, give √n units of roundoff in the sum of squares, which the
    # root halves. Twice that, for bad luck, and up to two levels of squares and roots above.
    n = sum(t.numel() for t in tensors)
    roundoff = torch.finfo(accumulation_dtype(dtype)).eps / 2
    assert norm.item() == pytest.approx(expected, rel=(math.sqrt(n) + 4) * roundoff, abs=0)


def test_l2_norm_is_a_0d_tensor_of_the_accumulation_dtype(
    backend: Backend, dtype: torch.dtype, device: torch.device
) -> None:
    norm = backend.l2_norm([torch.ones(4, dtype=dtype, device=device, requires_grad=True)])
    assert (norm.shape, norm.dtype, norm.device.type) == ((), accumulation_dtype(dtype), device.type)
    assert not norm.requires_grad
    assert norm.item() == 2


def test_l2_norm_of_no_tensors_is_a_float32_zero_on_the_cpu(backend: Backend) -> None:
    norm = backend.l2_norm([])
    assert (norm.shape, norm.dtype, norm.device) == ((), torch.float32, torch.device("cpu"))
    assert norm.item() == 0


def test_l2_norm_of_no_elements_is_zero(backend: Backend, dtype: torch.dtype, device: torch.device) -> None:
    assert backend.l2_norm([torch.empty(0, 3, dtype=dtype, device=device)] * 2).item() == 0


def test_l2_norm_of_many_small_tensors(backend: Backend, dtype: torch.dtype, device: torch.device) -> None:
    tensors = [torch.ones(i % 4, dtype=dtype, device=device) for i in range(2000)]
    # Sums of ones are exact; the roots and the squares of those are not, and there may be one of each per tensor.
    tolerance = math.sqrt(2000) * torch.finfo(accumulation_dtype(dtype)).eps
    assert backend.l2_norm(tensors).item() == pytest.approx(math.sqrt(3000), rel=tolerance)


def test_l2_norm_reads_expanded_and_repeated_tensors(backend: Backend, dtype: torch.dtype) -> None:
    four = torch.full((1,), 2.0, dtype=dtype).expand(4, 4)
    assert backend.l2_norm([four, four, four, four]).item() == 16


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 17, 40_000, -1])
def test_l2_norm_of_non_finite_input_is_not_finite(
    backend: Backend, dtype: torch.dtype, device: torch.device, value: float, place: int
) -> None:
    tensors = [torch.ones(5, dtype=dtype, device=device), torch.ones(70_001, dtype=dtype, device=device)]
    tensors[1][place] = value
    norm = backend.l2_norm(tensors)
    assert not math.isfinite(norm.item())
    assert math.isnan(norm.item()) == math.isnan(value)


@pytest.mark.usefixtures("threads_restored")
def test_l2_norm_does_not_depend_on_the_number_of_threads(backend: Backend, dtype: torch.dtype) -> None:
    draw = Draw(dtype, torch.device("cpu"))
    single = [
        [Spec((n,), layout)]
        for n in (32_768, 70_001, 400_003)
        for layout in ("contiguous", "misaligned", "every other element")
    ]
    images = [[Spec((16, 8, 33, 35), layout)] for layout in ("contiguous", "channels_last")]
    matrices = [[Spec((300, 1001), "transposed")], [Spec((2, 70_001), "contiguous"), Spec((5,), "contiguous")]]
    # Enough that the partial sums of some back ends are themselves added up by several threads. The interpreter, which
    # has one, takes a millisecond for each.
    many_small = draw.normal([Spec((3,), "contiguous")] * 500) * (1 if backend.name == "triton" else 70)
    for tensors in [*map(draw.normal, [*single, *images, *matrices]), many_small]:
        norms = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            norms.append(backend.l2_norm(tensors))
        assert_same_bits(norms[1:], norms[:1] * 2)
