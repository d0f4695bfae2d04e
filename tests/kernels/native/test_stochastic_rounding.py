"""Stochastic rounding in C++: its header beside its Python twin, and the operators on any number of threads."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gam_fused.kernels import native
from gam_fused.kernels.rounding import rounded
from tests.kernels.native.common import Call, narrow, needs_native, ops
from tests.kernels.tensor_lists import assert_same_bits, bits

CSRC = Path(__file__).parents[3] / "csrc"
PROGRAM = """
#include <iostream>
#include <vector>
#include "rounding.h"
using namespace gam_fused;
template <typename T>
T read() {
    T value;
    std::cin.read(reinterpret_cast<char*>(&value), sizeof value);
    return value;
}
template <typename T>
void run(const RandomChunk& random, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const T rounded = round_stochastically<T>(float_of(read<uint32_t>()), random[static_cast<uint32_t>(i)]);
        std::cout.write(reinterpret_cast<const char*>(&rounded), sizeof rounded);
    }
}
int main() {
    const auto seed = read<uint64_t>();
    const auto tensor = read<uint64_t>();
    const RandomChunk random(launch_key(seed), tensor, read<int64_t>());
    const auto count = read<int64_t>();
    read<int64_t>() == 0 ? run<bfloat16>(random, count) : run<float16>(random, count);
}
"""

RoundedInC = Callable[[Tensor, torch.dtype, int, int, int], Tensor]


@pytest.fixture(scope="module")
def rounded_in_c(tmp_path_factory: pytest.TempPathFactory) -> RoundedInC:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    program = tmp_path_factory.mktemp("rounding") / "rounding"
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}", "-x", "c++", "-"]
    subprocess.run([compiler, *flags, "-o", str(program)], input=PROGRAM, text=True, check=True)

    def run(values: Tensor, dtype: torch.dtype, seed: int, tensor: int, begin: int) -> Tensor:
        numbers = [number.to_bytes(8, "little") for number in (seed, tensor, begin, values.numel())]
        which = int(dtype == torch.float16).to_bytes(8, "little")
        case = b"".join([*numbers, which, values.numpy().tobytes()])
        done = subprocess.run([str(program)], input=case, check=True, capture_output=True)
        return torch.frombuffer(bytearray(done.stdout), dtype=torch.int16).view(dtype)

    return run


def awkward_values() -> Tensor:
    """Random bits; and around each number of float16, the limits of both dtypes among them."""
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, (40_000,), generator=generator).to(torch.int32).view(torch.float32)
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    nearby = (bits(halves)[:, None] + torch.tensor([-1, 1, 300, 4096], dtype=torch.int32)).flatten().view(torch.float32)
    small = halves[:, None] * torch.tensor([1.25, 2.0**-11, 2.0**-30])
    return torch.cat([anything, halves, nearby, small.flatten(), torch.tensor([65504.0, 65520.0, 65536.0])])


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31 - 1), st.integers(0, 2**40), st.booleans())
@example(seed=0, tensor=0, begin=0, is_half=False)
@example(seed=0, tensor=0, begin=2**32, is_half=False)
@example(seed=5, tensor=3, begin=2**33 - 2**20, is_half=True)
@example(seed=2**64 - 1, tensor=2**31 - 1, begin=7 * 2**32 + 16384, is_half=True)
def test_the_header_rounds_as_its_python_twin_does(
    rounded_in_c: RoundedInC, seed: int, tensor: int, begin: int, is_half: bool
) -> None:
    """Far into a tensor too, where the high half of an element's place is part of the key."""
    dtype = torch.float16 if is_half else torch.bfloat16
    values = awkward_values()
    begin = min(begin, begin // 2**32 * 2**32 + 2**32 - values.numel())  # a chunk does not reach beyond its block
    expected = rounded(values, dtype, seed, tensor, begin + torch.arange(values.numel()))
    actual = rounded_in_c(values, dtype, seed, tensor, begin)
    is_number = ~values.isnan()
    assert_same_bits([actual[is_number]], [expected[is_number]])
    assert bool(actual[~is_number].isnan().all())


@needs_native
@narrow
@pytest.mark.usefixtures("threads_restored")
@pytest.mark.parametrize("name", ["perturb_", "sgd_step_", "adamw_step_"])
def test_the_bits_do_not_depend_on_the_number_of_threads(name: str, dtype: torch.dtype) -> None:
    """What is computed in float32 is rounded as the Python twin does; the second list is written past the caches."""
    for shapes in ([(300_007,), (5,), (0,), (700, 333), (16_384,)], [(3,), (9 * 2**20,)]):
        torch.manual_seed(0)
        wide = Call(name, shapes, dtype)
        wide.lists = {key: [t.float() for t in tensors] for key, tensors in wide.lists.items()}
        wide()
        params = wide.lists["params"]
        places = [torch.arange(param.numel()).view(param.shape) for param in params]
        pairs = enumerate(zip(params, places, strict=True))
        expected = [rounded(param, dtype, 2**63 + 11, i, place) for i, (param, place) in pairs]
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            call = Call(name, shapes, dtype)
            args, options = call.arguments()
            getattr(ops, name)(*args, **options, rounding_seed=native._int64(2**63 + 11))
            assert_same_bits(call.lists["params"], expected)
            for key in ("directions", "grads", "momentum_buffers", "exp_avgs", "exp_avg_sqs"):
                if key in call.lists:
                    assert_same_bits(call.lists[key], [t.to(dtype) for t in wide.lists[key]])
