"""The gradients of an accelerated step: their two sums, and what of the one is perpendicular to the other."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gam_fused.kernels import Backend
from gam_fused.kernels.grouping import global_projection
from gam_fused.kernels.interface import accumulation_dtype
from gam_fused.kernels.rules import FourGradients
from tests.kernels.operators.common import XI, few_examples
from tests.kernels.tensor_lists import (
    Draw,
    Spec,
    assert_same_bits,
    copies,
    other_layouts,
    relaid,
    seeds,
    specs,
    surroundings,
)

WEIGHTS = (0.25, 0.75, -0.5, 0.3)
weights = st.tuples(*[st.sampled_from([0.0, 0.3, 1.0, -0.5])] * 4)


def four_gradients(draw: Draw, specs: list[Spec], layouts: list[str], weights: Any = WEIGHTS) -> FourGradients:
    other = relaid(specs, layouts)
    return FourGradients(draw.normal(specs), draw.normal(other), draw.normal(other), draw.normal(specs), weights)


def exact_mixtures(gradients: FourGradients) -> tuple[list[Tensor], list[Tensor]]:
    """h⁺ and h⁻ in float64."""
    g0, g1, g2, g3 = ([tensor.double() for tensor in tensors] for tensors in gradients.lists.values())
    w0, w1, w2, w3 = gradients.weights
    plus = [w1 * a + w3 * b for a, b in zip(g1, g3, strict=True)]
    return plus, [w0 * a + w2 * b for a, b in zip(g0, g2, strict=True)]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=torch.float64), *(t.double().cpu().reshape(-1) for t in tensors)])


@few_examples
@given(specs, other_layouts, seeds, weights)
def test_projection_is_that_of_all_elements(
    backend: Backend,
    dtype: torch.dtype,
    device: torch.device,
    specs: list[Spec],
    layouts: list[str],
    seed: int,
    weights: tuple[float, float, float, float],
) -> None:
    gradients = four_gradients(Draw(dtype, device, seed), specs, layouts, weights)
    plus, minus = map(flat, exact_mixtures(gradients))
    projection, plus_norm, minus_norm = (float(number) for number in backend.projection(gradients))
    # As for a norm; each element has three roundings of its own.
    roundoff = torch.finfo(accumulation_dtype(dtype)).eps / 2
    tolerance = (math.sqrt(plus.numel()) + 8) * roundoff
    assert plus_norm == pytest.approx(float(plus.norm()), rel=tolerance, abs=0)
    assert minus_norm == pytest.approx(float(minus.norm()), rel=tolerance, abs=0)
    # Of products of both signs, the sum's error is relative to what it would be without cancellation.
    expected = float(minus @ plus / plus.norm()) if plus_norm else 0.0
    assert projection == pytest.approx(expected, rel=0, abs=2 * tolerance * float(minus.norm()))


@few_examples
@given(specs, other_layouts, seeds, weights)
def test_decompose_leaves_the_gradients_ahead_and_the_perpendicular_part(
    backend: Backend,
    dtype: torch.dtype,
    device: torch.device,
    specs: list[Spec],
    layouts: list[str],
    seed: int,
    weights: tuple[float, float, float, float],
) -> None:
    draw = Draw(dtype, device, seed)
    given = four_gradients(draw, specs, layouts, weights)
    gradients = dataclasses.replace(given, grads=copies(given.grads), grads_ahead=copies(given.grads_ahead))
    unwritten = [*given.adversarial_grads, *given.adversarial_grads_ahead]
    before, gaps = copies(unwritten), surroundings(copies(given.grads), copies(given.grads_ahead))
    projection, plus_norm = draw.norm(-1.7), draw.norm(2.3)

    backend.decompose_(gradients, projection, plus_norm, XI)

    plus, minus = exact_mixtures(given)
    scale = -1.7 * 2.3 / (2.3 + XI) ** 2
    sizes = exact_mixtures(
        FourGradients(*([t.abs() for t in ts] for ts in given.lists.values()), weights=tuple(map(abs, weights)))  # type: ignore[misc]
    )
    for h, p, size in zip(gradients.grads, plus, sizes[0], strict=True):
        assert_rounded(h, p, size)
    for h, m, p, size, size_of_plus in zip(gradients.grads_ahead, minus, plus, sizes[1], sizes[0], strict=True):
        assert_rounded(h, m - scale * p, size + abs(scale) * size_of_plus)
    assert_same_bits(unwritten, before)
    assert_same_bits(surroundings(copies(gradients.grads), copies(gradients.grads_ahead)), gaps)


def assert_rounded(actual: Tensor, expected: Tensor, size: Tensor) -> None:
    """Off by ten roundings of the terms in the accumulation dtype, those of the scale among them, and by a last one."""
    wide = torch.finfo(accumulation_dtype(actual.dtype))
    bound = 10 * wide.eps / 2 * size + wide.smallest_normal
    if actual.dtype in (torch.bfloat16, torch.float16):
        info = torch.finfo(actual.dtype)
        bound += info.eps / 2 * expected.abs() + info.smallest_normal * info.eps / 2
    error = (actual.double() - expected).abs()
    assert bool((error <= bound).all()), f"off by up to {(error / bound).max().item()} times the bound"


@pytest.mark.parametrize("power", [-0.45, 0.0, 0.45])
def test_the_perpendicular_part_is_perpendicular(
    backend: Backend, dtype: torch.dtype, device: torch.device, power: float
) -> None:
    """Squares of these numbers are within the range of their dtype, and not by much."""
    draw = Draw(dtype, device)
    gradients = four_gradients(draw, [Spec((1001,), "contiguous"), Spec((40, 30), "transposed")], ["contiguous"] * 6)
    for tensor in (tensor for tensors in gradients.lists.values() for tensor in tensors):
        tensor.mul_(torch.finfo(dtype).max ** power)
    projection, plus_norm, minus_norm = backend.projection(gradients)
    backend.decompose_(gradients, projection, plus_norm, 0.0)
    plus, perpendicular = flat(list(gradients.grads)), flat(list(gradients.grads_ahead))
    cosine = float(plus @ perpendicular / (plus.norm() * perpendicular.norm()))
    # Rounding errors are independent of each other, of which there are 2,201.
    assert abs(cosine) < 4 * torch.finfo(dtype).eps
    assert float(minus_norm) ** 2 == pytest.approx(
        float(perpendicular.norm()) ** 2 + float(projection) ** 2, rel=8 * torch.finfo(dtype).eps
    )


def test_projection_gives_0d_tensors_of_the_accumulation_dtype(
    backend: Backend, dtype: torch.dtype, device: torch.device
) -> None:
    ones = [[torch.ones(4, dtype=dtype, device=device, requires_grad=True)] for _ in range(4)]
    found = backend.projection(FourGradients(*ones, weights=(1.0, 0.5, -3.0, 0.5)))  # type: ignore[misc]
    for number in found:
        assert (number.shape, number.dtype, number.device.type) == ((), accumulation_dtype(dtype), device.type)
        assert not number.requires_grad
    assert [number.item() for number in found] == [-4.0, 2.0, 4.0]


def test_nothing_has_a_projection_of_zero(backend: Backend, dtype: torch.dtype, device: torch.device) -> None:
    nothing = backend.projection(FourGradients([], [], [], [], WEIGHTS))
    assert [(n.shape, n.dtype, n.device.type, n.item()) for n in nothing] == [((), torch.float32, "cpu", 0.0)] * 3
    empty = [[torch.empty(0, 3, dtype=dtype, device=device)] for _ in range(4)]
    assert [n.item() for n in backend.projection(FourGradients(*empty, weights=WEIGHTS))] == [0.0] * 3  # type: ignore[misc]
    backend.decompose_(FourGradients([], [], [], [], WEIGHTS), torch.zeros(()), torch.zeros(()), XI)


def test_where_the_gradients_ahead_cancel_all_of_the_others_is_perpendicular(
    backend: Backend, dtype: torch.dtype, device: torch.device
) -> None:
    one = [torch.full((3,), value, dtype=dtype, device=device) for value in (2.0, 1.0, 4.0, 1.0)]
    gradients = FourGradients(*([tensor] for tensor in one), weights=(0.5, 0.5, 0.5, -0.5))  # type: ignore[misc]
    projection, plus_norm, _ = backend.projection(gradients)
    assert (projection.item(), plus_norm.item()) == (0.0, 0.0)
    backend.decompose_(gradients, projection, plus_norm, 1e-12)
    assert gradients.grads[0].tolist() == [0.0] * 3
    assert gradients.grads_ahead[0].tolist() == [3.0] * 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", range(4))
def test_what_is_not_finite_shows_in_a_norm(
    backend: Backend, dtype: torch.dtype, device: torch.device, which: int, value: float
) -> None:
    lists = [
        [torch.ones(5, dtype=dtype, device=device), torch.ones(20_001, dtype=dtype, device=device)] for _ in "0123"
    ]
    lists[which][1][20_000] = value
    _, plus_norm, minus_norm = backend.projection(FourGradients(*lists, weights=WEIGHTS))  # type: ignore[misc]
    assert [math.isfinite(plus_norm), math.isfinite(minus_norm)] == [which in (0, 2), which in (1, 3)]


@pytest.mark.parametrize("name", ["projection", "plus_norm", "xi", "w0", "w1", "w2", "w3"])
def test_every_number_given_to_decompose_reaches_the_result(backend: Backend, name: str) -> None:
    results = []
    for changed in (False, True):
        numbers = {"projection": 1.0, "plus_norm": 1.0, "xi": 0.1, "w0": 0.1, "w1": 0.2, "w2": 0.3, "w3": 0.4}
        numbers[name] += 0.5 * changed
        lists = [[torch.ones(1)] for _ in range(4)]
        gradients = FourGradients(*lists, weights=tuple(numbers[f"w{i}"] for i in range(4)))  # type: ignore[misc]
        sums = backend.projection(gradients)
        backend.decompose_(
            gradients, torch.tensor(numbers["projection"]), torch.tensor(numbers["plus_norm"]), numbers["xi"]
        )
        results.append((lists[0][0].item(), lists[1][0].item(), *(number.item() for number in sums)))
    assert results[0][:2] != results[1][:2]
    assert (results[0][2:] != results[1][2:]) == name.startswith("w")


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_parts_of_several_dtypes_and_weights_are_one_vector(backend: Backend, scale: float) -> None:
    parts = []
    for number, dtype in enumerate((torch.float32, torch.float64, torch.float32)):
        draw = Draw(dtype, torch.device("cpu"), seed=number)
        part = four_gradients(draw, [Spec((70 + number,), "contiguous")], ["contiguous"], (*WEIGHTS[:3], 0.2 * number))
        for tensors in part.lists.values():
            tensors[0].mul_(scale)
        parts.append(part)
    plus, minus = (torch.cat([flat(mixtures[which]) for mixtures in map(exact_mixtures, parts)]) for which in (0, 1))
    found = global_projection(backend, parts)
    assert {number.dtype for number in found} == {torch.float64}
    expected = [minus @ plus / plus.norm(), plus.norm(), minus.norm()]
    for number, exact in zip(found, expected, strict=True):
        assert number.item() == pytest.approx(exact.item(), rel=0, abs=1e-6 * minus.norm().item())
    assert [number.item() for number in global_projection(backend, [])] == [0.0] * 3


def test_parts_without_a_length_project_to_zero(backend: Backend) -> None:
    part = FourGradients(*([torch.zeros(3)] for _ in range(4)), weights=WEIGHTS)  # type: ignore[misc]
    assert [number.item() for number in global_projection(backend, [part, part])] == [0.0] * 3
