"""No data race with the launches of a device, and what the harness says of kernels that are broken."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from gam_fused.kernels.rounding import rounded
from tests.cuda_host.common import (
    CHUNK,
    Common,
    assert_bitwise,
    assert_rounded,
    copies,
    double,
    needs_compiler,
    norm_of,
    random_list,
    run_adamw,
    run_sgd,
)
from tests.cuda_host.kernels_on_host import ADDRESS, THREAD, KernelsFailed, KernelsOnHost, build, mutated

pytestmark = needs_compiler


def perturbs(kernels: KernelsOnHost) -> None:
    sizes = (1, 6, 3000, CHUNK + 1, 2, 3, 4)  # more chunks than the six blocks
    theta, direction = random_list(torch.float32, sizes), random_list(torch.float32, sizes)
    params, directions = copies(theta), copies(direction)
    scalars = [torch.tensor(1.0), torch.tensor(1.0)]
    kernels.call(
        "perturb", [params, directions], numbers=[0.5, 0.0], scalars=scalars, offsets=[[0, 0, 1, 0, 0, 0, 0]] * 2
    )
    assert_bitwise(directions, theta)
    assert_rounded(params, [t + 0.5 * u for t, u in zip(double(theta), double(direction), strict=True)])


def rounds_stochastically(kernels: KernelsOnHost) -> None:
    # More tensors than the smaller tables hold, one without elements among them.
    sizes = (5, 0, *range(1, 9), CHUNK + 9)
    theta, direction = random_list(torch.bfloat16, sizes), random_list(torch.bfloat16, sizes)
    params = copies(theta)
    scalars = [torch.tensor(1.0), torch.tensor(1.0)]
    kernels.call("perturb", [params, copies(direction)], numbers=[0.5, 0.0], scalars=scalars, rounding_seed=3)
    moved = [t.float() + 0.5 * u.float() for t, u in zip(theta, direction, strict=True)]
    assert_bitwise(params, [rounded(m, torch.bfloat16, 3, i, torch.arange(len(m))) for i, m in enumerate(moved)])


def takes_norms(kernels: KernelsOnHost) -> None:
    # Several chunks for each of the four blocks, so that shared memory is used again.
    tensors = [torch.ones(size) for size in (CHUNK,) * 8 + (100,)]
    assert norm_of(kernels, tensors).item() == pytest.approx(math.sqrt(8 * CHUNK + 100), rel=1e-7)


def shifts(kernels: KernelsOnHost) -> None:
    theta, ends, starts = (random_list(torch.float32, (CHUNK,) * 5 + (100, 3)) for _ in range(3))
    params, norm = copies(theta), torch.full((), -1.0)
    kernels.call("difference_norm", [ends, starts], numbers=[], scalars=[norm])
    kernels.call("shift", [params, theta, ends, starts], numbers=[True, True, 0.5, 0.0], scalars=[norm])
    moved = torch.cat(params).double() - torch.cat(theta).double()
    assert float(moved.norm()) == pytest.approx(0.5, rel=1e-5)


def decomposes(kernels: KernelsOnHost) -> None:
    gradients = [random_list(torch.float32, (CHUNK,) * 5 + (100, 3)) for _ in range(4)]
    results = [torch.full((), -1.0) for _ in range(3)]
    kernels.call("projection", gradients, numbers=[0.3, 0.7, -0.2, 0.6], scalars=results)
    kernels.call("decompose", gradients, numbers=[0.3, 0.7, -0.2, 0.6, 0.0], scalars=results[:2])
    plus, perpendicular = torch.cat(double(gradients[0])), torch.cat(double(gradients[1]))
    assert abs(float(plus @ perpendicular)) < 1e-6 * float(plus.norm() * perpendicular.norm())


def test_no_data_race(threads):
    perturbs(threads)
    rounds_stochastically(threads)
    takes_norms(threads)
    shifts(threads)
    decomposes(threads)
    lists = [random_list(torch.bfloat16, (9, 4000)) for _ in range(5)]
    run_sgd(threads, Common(), {"momentum": 0.9}, lists[:4], lists[4])
    state = {"exp_avg": lists[4], "exp_avg_sq": [t.square() for t in lists[4]], "step": [torch.zeros(())] * 2}
    run_adamw(threads, torch.optim.AdamW, Common(), {}, lists[:4], state)


@pytest.mark.parametrize(("operator", "lists", "count"), [("restore", 2, 1200), ("combine", 4, 800)])
def test_more_tensors_than_a_launch_takes_on_a_device(threads, operator, lists, count):
    tensors = [random_list(torch.float32, tuple(1 + i % 7 for i in range(count))) for _ in range(lists)]
    arguments = {"restore": ([], []), "combine": ([0.1, 0.3, 0.0], [torch.tensor(1.0)])}
    numbers, scalars = arguments[operator]
    threads.call(operator, tensors, numbers=numbers, scalars=scalars)
    assert_bitwise(tensors[0], tensors[1])


BREAKS = {
    "no barrier before the sums of warps are read": (
        "l2_norm", "cuda/scaled_sum.cuh", "    __syncthreads();\n    if (warp == 0)", "    if (warp == 0)",
        THREAD, takes_norms, "data race",
    ),
    "no barrier before the sums of warps are written again": (
        "l2_norm", "cuda/scaled_sum.cuh", "__syncthreads();  // before", "// before", THREAD, takes_norms, "data race",
    ),
    "a shuffle that leaves half a warp out": (
        "l2_norm", "cuda/scaled_sum.cuh",
        "unsigned distance = kWarp / 2; distance > 0; distance /= 2) {\n        const A sum",
        "unsigned distance = kWarp / 4; distance > 0; distance /= 2) {\n        const A sum",
        ADDRESS, takes_norms, "assert",
    ),
    "a tail that is one element too long": (
        "perturb", "cuda/multi_tensor.cuh", "first + lane < count", "first + lane <= count", ADDRESS, perturbs,
        "heap-buffer-overflow",
    ),
    "packs of tensors that are not aligned": (
        "perturb", "cuda/multi_tensor.cuh", "% sizeof(Pack<T>) == 0", "% sizeof(Pack<T>) < 16", ADDRESS, perturbs,
        "misaligned address",
    ),
    "a search that finds the tensor before": (
        "perturb", "cuda/multi_tensor.cuh", "first_chunk[middle] <= number", "first_chunk[middle] < number", ADDRESS,
        perturbs, "assert",
    ),
    "a block that skips every second of its chunks": (
        "perturb", "cuda/multi_tensor.cuh", "number += gridDim.x", "number += 2 * gridDim.x", ADDRESS, perturbs,
        "assert",
    ),
    "a tensor that is numbered without those that have no elements": (
        "perturb", "cuda/multi_tensor.cuh",
        "for (size_t i = launch.begin; i < launch.end; ++i) {",
        "for (size_t i = launch.begin; i < launch.end; ++i) {\n            if (numels[i] == 0) continue;",
        ADDRESS, rounds_stochastically, "assert",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_the_harness_notices(tmp_path, name):
    """Each break is made in a copy of the sources; the same call passes without it (test_no_data_race)."""
    source, file, old, new, sanitizer, call, message = BREAKS[name]
    broken = build(tmp_path / "build", sanitizer, mutated(tmp_path, file, old, new), (source,))
    check: Callable[[KernelsOnHost], None] = call
    with pytest.raises(AssertionError) as failure:
        check(broken)
    if message == "assert":
        assert not isinstance(failure.value, KernelsFailed)
    else:
        assert message in str(failure.value)
