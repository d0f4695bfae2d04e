"""What Triton's compiler makes of the double backward of normalization layers, for NVIDIA and AMD GPUs.

Needs no GPU: the functions are called on CPU tensors, with a driver that says which GPU to compile for, and whatever
they would launch there is compiled and read instead.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gam_fused.kernels import triton_launches as launches
from gam_fused.second_order import triton as kernels
from tests.second_order.norm_calls import arguments, function

pytest.importorskip("triton", reason="Triton is not installed")

if launches.is_interpreted():
    pytest.skip("TRITON_INTERPRET=1 is set: nothing is compiled", allow_module_level=True)

from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tests.test_triton_compile import (
    DTYPES,
    FP64,
    TARGETS,
    WIDE_LOAD,
    WIDE_STORE,
    assembly,
    assert_nothing_in_local_memory,
)

pytestmark = pytest.mark.slow


Launches = dict[str, list[Any]]


@pytest.fixture
def launches(target: str, monkeypatch: pytest.MonkeyPatch) -> Launches:
    """All that would have been launched on ``target``: compiled kernels, by name."""
    gpu = TARGETS[target]
    # A device of its own for every target: what is compiled is remembered by device.
    active = SimpleNamespace(
        get_current_device=lambda: target, get_current_stream=lambda device: 0, get_current_target=lambda: gpu
    )
    made: Launches = defaultdict(list)
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        made[self.fn.__name__].append(kernel)
        return kernel

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", active)
    monkeypatch.setattr(kernels, "warps_of", lambda threads, device: threads // gpu.warp_size)
    return made


# Calls, with the kernels that they launch and how many tensors each of these loads and stores in its main loops.
SUMS, RESULTS = ("channel_sums_kernel", 3, 0), ("batch_norm_kernel", 3, 2)
ROWS, WEIGHTS = ("short_rows_kernel", 3, 2), ("add_partials_kernel", 0, 0)
CASES = {
    "batch_norm": ("batch_norm", (4, 8, 40, 40), False, (SUMS, RESULTS)),
    "batch_norm-small": ("batch_norm", (4, 8, 4, 4), False, (SUMS, RESULTS)),
    "batch_norm-channels_last": ("batch_norm", (4, 32, 8, 8), True, (SUMS, RESULTS)),
    "batch_norm-eval": ("batch_norm-eval", (4, 8, 16, 16), False, (SUMS, RESULTS)),
    "group_norm": ("group_norm", (4, 8, 40, 40), False, (SUMS, ("group_norm_kernel", 3, 2))),
    "layer_norm": ("layer_norm", (8, 768), False, (ROWS, WEIGHTS)),
    "layer_norm-4096": ("layer_norm", (8, 4096), False, (ROWS, WEIGHTS)),
    "rms_norm-long": ("rms_norm", (8, 8192), False, (("long_rows_kernel", 6, 2), WEIGHTS)),
}


VARIANTS = ("batch_norm-small", "batch_norm-eval", "layer_norm-4096")


def cases() -> Iterator[Any]:
    """Each call for each target, and in each dtype on one of them, since compiling takes its time; variants for two."""
    for i, name in enumerate(CASES):
        for j, target in enumerate(TARGETS):
            if name not in VARIANTS:
                yield pytest.param(name, list(DTYPES)[(i + j) % len(DTYPES)], target)
    for name in VARIANTS:
        yield pytest.param(name, "fp32", "gfx942")
        yield pytest.param(name, "bf16", "sm_90")


@pytest.mark.parametrize(("name", "dtype", "target"), list(cases()))
def test_launches_load_and_store_16_bytes_and_spill_nothing(
    name: str, dtype: str, target: str, launches: Launches
) -> None:
    kind, shape, channels_last, expected = CASES[name]
    values = arguments(kind, shape, DTYPES[dtype], channels_last=channels_last, groups=2)
    function(kernels, kind)(*values)
    assert {kernel: len(made) for kernel, made in launches.items()} == {kernel: 1 for kernel, _, _ in expected}
    for kernel, loads, stores in expected:
        (found,) = launches[kernel]
        text = assembly(found)
        packs = 2 if kernel == "short_rows_kernel" and dtype in ("fp64", "fp32") else 1
        assert len(WIDE_LOAD.findall(text)) >= packs * loads  # at least, as AMD's compiler unrolls
        assert len(WIDE_STORE.findall(text)) >= packs * stores
        if dtype != "fp64":
            assert not FP64.findall(text)
        assert_nothing_in_local_memory(found)


@pytest.mark.parametrize("target", ["sm_90"])
def test_sizes_compile_nothing_anew(target: str, launches: Launches) -> None:
    """Whole tiles and the rest of one, one of everything, sizes that 16 divides, aligned rows all of them."""
    for shape in ((4, 8, 40, 40), (1, 1, 260), (2, 300, 1024), (128, 16, 512)):
        for kind in ("batch_norm", "group_norm"):
            function(kernels, kind)(*arguments(kind, shape, torch.float32, groups=shape[1]))
    for rows, size in ((1, 768), (5, 516), (1024, 1024), (2000, 1000)):
        kernels.layer_norm_double_backward(*arguments("layer_norm", (rows, size), torch.float32))
    assert {name: len(set(map(id, made))) for name, made in launches.items()} == dict.fromkeys(launches, 1)
    assert len(launches["channel_sums_kernel"]) == 8


@pytest.mark.parametrize("target", ["sm_90"])
def test_only_tensors_and_rows_at_multiples_of_16_bytes_are_read_16_bytes_at_once(
    target: str, launches: Launches
) -> None:
    values = list(arguments("layer_norm", (4, 1024), torch.float32))
    values[5] = torch.empty(4097)[1:].view(4, 1024)
    kernels.layer_norm_double_backward(*values)
    kernels.layer_norm_double_backward(*arguments("layer_norm", (4, 1022), torch.float32))
    found = [len(WIDE_LOAD.findall(assembly(kernel))) for kernel in launches["short_rows_kernel"]]
    assert found == [2 * 2, 0]  # two packs a thread of the two others
