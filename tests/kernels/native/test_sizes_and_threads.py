"""The same bits on any number of threads, and in lists of any size."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.kernels.native.common import LISTS, Call, needs_native, ops, over_dtypes, over_operators
from tests.kernels.tensor_lists import assert_same_bits

pytestmark = needs_native


@over_operators
@pytest.mark.usefixtures("threads_restored")
@over_dtypes
def test_the_same_bits_on_any_number_of_threads_and_in_each_run(name: str, dtype: torch.dtype) -> None:
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        call = Call(name, [(300_007,), (5,), (700, 333), (0,), (16_384,)], dtype)
        outputs = call()
        results.append(
            [*call.tensors(), *([] if outputs is None else [outputs] if isinstance(outputs, torch.Tensor) else outputs)]
        )
    for result in results[1:]:
        assert_same_bits(result, results[0])


@over_dtypes
@pytest.mark.parametrize("offset", [0, 1, 5])
@pytest.mark.parametrize("name", ["restore_", "combine_", "sgd_step_", "adamw_step_"])
def test_lists_larger_than_the_caches_come_out_as_small_ones_do(name: str, offset: int, dtype: torch.dtype) -> None:
    """From 16 MiB on, parameters are written past the caches, line by line, with what is left at both ends."""
    sizes = [(16 * 2**20 // dtype.itemsize,), (3,), (5_001,)]
    torch.manual_seed(0)
    large = Call(name, sizes, dtype)
    frames = []
    for i, param in enumerate(large.lists["params"]):
        frames.append(torch.full((param.numel() + 64,), 7.0, dtype=dtype))
        large.lists["params"][i] = frames[-1][offset : offset + param.numel()]
    torch.manual_seed(0)
    small = Call(name, sizes, dtype)
    args, options = small.arguments()
    for i, (size,) in enumerate(sizes):
        for begin in range(0, size, 2**20):
            part = slice(begin, begin + 2**20)
            # A step count belongs to the tensor: each of its parts gets a copy.
            lists = [[t[i].clone() if t[i].dim() == 0 else t[i][part]] for t in args[: len(LISTS[name])]]
            getattr(ops, name)(*lists, *args[len(LISTS[name]) :], **options)
    large()
    for key in LISTS[name]:
        if key != "state_steps":
            assert_same_bits(large.lists[key], small.lists[key])
    for frame, (size,) in zip(frames, sizes, strict=True):
        assert bool((frame[:offset] == 7).all() and (frame[offset + size :] == 7).all())


def available_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


@pytest.mark.slow
@pytest.mark.skipif(available_memory() < 11 * 2**30, reason="needs 11 GiB of free memory")
def test_a_tensor_of_more_than_2_to_the_31_elements() -> None:
    size = 2**31 + 70_001
    marks = [0, 1, 2**31 - 1, 2**31, 2**31 + 1, size - 1]
    param, direction = torch.zeros(size, dtype=torch.bfloat16), torch.zeros(size, dtype=torch.bfloat16)
    param[marks] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.bfloat16)
    direction[marks] = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 16.0], dtype=torch.bfloat16)
    assert float(ops.l2_norm([param])) == pytest.approx(math.sqrt(91), rel=2e-7)
    ops.perturb_([param], [direction], torch.tensor(1.0), torch.tensor(1.0), 0.5, 0.0)
    assert param[marks].tolist() == [5.0, 4.0, 4.0, 4.5, 5.25, 14.0]
    assert direction[marks].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert float(ops.l2_norm([direction])) == pytest.approx(math.sqrt(91), rel=2e-7)
