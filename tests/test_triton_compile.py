"""What Triton's compiler makes of the kernels, for NVIDIA and AMD GPUs: wide loads and stores, no spilled register, no
double arithmetic in narrower kernels.

Needs no GPU: every kernel is compiled for an explicit target and its assembly is read.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

from gam_fused.kernels import triton_launches as launches

triton = pytest.importorskip("triton", reason="Triton is not installed")

if launches.is_interpreted():
    pytest.skip("TRITON_INTERPRET=1 is set: nothing is compiled", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from gam_fused.kernels import triton_kernels  # noqa: E402

pytestmark = pytest.mark.slow

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),  # MI300
}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ALL, NARROW = tuple(DTYPES), ("bf16", "fp16")
SGD = {"WEIGHT_DECAY": True, "NESTEROV": True, "FIRST_STEP": False, "MAXIMIZE": True, "WRITE_GRADS": True}
SHIFT = {"ORIGINS": True, "STARTS": True}
ADAMW = {"WEIGHT_DECAY": True, "DECOUPLED": True, "MAXIMIZE": True, "WRITE_GRADS": True}


@dataclass(frozen=True)
class Kernel:
    """One kernel with its compile-time flags, and how many lists its main loop loads and stores."""

    name: str
    lists: int
    loads: int
    stores: int
    flags: tuple[tuple[str, bool], ...] = ()
    dtypes: tuple[str, ...] = ALL
    restores: bool = False  # besides, where a step is not taken: one list more
    absent: tuple[str, ...] = ("found_inf", "grad_scale", "lr_tensor")  # of the arguments that may be None

    def __str__(self) -> str:
        on = ["scaled"] * (not self.absent)
        on += [
            flag.lower()
            for flag, is_on in self.flags
            if is_on and flag in ("MOMENTUM", "AMSGRAD", "STOCHASTIC", "DIFFERENCES")
        ]
        return "-".join([self.name.removesuffix("_kernel"), *on])


def flags(common: dict[str, bool], **more: bool) -> tuple[tuple[str, bool], ...]:
    return tuple({**common, **more}.items())


KERNELS = [
    Kernel("sgd_kernel", 5, 4, 3, flags(SGD, MOMENTUM=True, STOCHASTIC=False), ("fp32", "bf16"), True, absent=()),
    Kernel("adamw_kernel", 7, 6, 5, flags(ADAMW, AMSGRAD=True, STOCHASTIC=False), ("fp32", "bf16"), True, absent=()),
    Kernel("sum_chunks_kernel", 1, 1, 0, flags({}, DIFFERENCES=False)),
    Kernel("restore_kernel", 2, 1, 1),
    Kernel("combine_kernel", 4, 3, 2),
    Kernel("sum_chunks_kernel", 2, 2, 0, flags({}, DIFFERENCES=True), ("fp32", "bf16")),
    Kernel("sum_mixed_kernel", 4, 4, 0, dtypes=("fp32", "bf16")),
    Kernel("decompose_kernel", 4, 4, 2, dtypes=("fp32", "bf16")),
    Kernel("shift_kernel", 4, 3, 1, flags(SHIFT, STOCHASTIC=False), ("fp32", "bf16")),
    Kernel("shift_kernel", 4, 3, 1, flags(SHIFT, STOCHASTIC=True), ("bf16",)),
    *(
        kernel
        for stochastic, dtypes in ((False, ALL), (True, NARROW))
        for kernel in (
            Kernel("perturb_kernel", 2, 2, 2, flags({}, STOCHASTIC=stochastic), dtypes),
            Kernel("sgd_kernel", 4, 3, 2, flags(SGD, MOMENTUM=False, STOCHASTIC=stochastic), dtypes, True),
            Kernel("sgd_kernel", 5, 4, 3, flags(SGD, MOMENTUM=True, STOCHASTIC=stochastic), dtypes, True),
            Kernel("adamw_kernel", 6, 5, 4, flags(ADAMW, AMSGRAD=False, STOCHASTIC=stochastic), dtypes, True),
            Kernel("adamw_kernel", 7, 6, 5, flags(ADAMW, AMSGRAD=True, STOCHASTIC=stochastic), dtypes, True),
        )
    ),
]

POINTERS = {"pointers": "i64", "plan": "i64", "state_steps": "i64", "found_inf": "fp32", "grad_scale": "fp32"}
COUNTS = ("tensors", "chunks", "guard_count", "middle", "end", "row")


def signature(kernel: str, wide: str, absent: tuple[str, ...]) -> dict[str, str]:
    """The types of the arguments, by name: norms and guards are pointers to the accumulation dtype."""
    types = {}
    for name, parameter in inspect.signature(getattr(triton_kernels, kernel).fn).parameters.items():
        if "constexpr" in str(parameter.annotation) or name in absent:
            types[name] = "constexpr"
        elif name in POINTERS:
            types[name] = f"*{POINTERS[name]}"
        elif name in COUNTS:
            types[name] = "i32"
        elif name.endswith("norm") or name in ("projection", "guards", "partials", "results", "lr_tensor"):
            types[name] = f"*{wide}"
        else:
            types[name] = "i64"  # the bits of a number
    return types


@cache
def compiled(
    kernel: str, dtype: str, target: str, constants: tuple[tuple[str, Any], ...], absent: tuple[str, ...]
) -> Any:
    wide = "fp64" if dtype == "fp64" else "fp32"
    types = signature(kernel, wide, absent)
    known = {"T": getattr(tl, str(DTYPES[dtype]).removeprefix("torch.")), "A": getattr(tl, f"float{wide[2:]}")}
    every = {**known, **dict(constants), **dict.fromkeys(absent)}
    given = {name: value for name, value in every.items() if types.get(name) == "constexpr"}
    source = ASTSource(getattr(triton_kernels, kernel), types, given)
    options = {"num_warps": launches.THREADS // TARGETS[target].warp_size, "enable_fp_fusion": False}
    return triton.compile(source, target=TARGETS[target], options=options)


def main(kernel: Kernel, dtype: str, target: str) -> Any:
    geometry = {"CHUNK": launches.CHUNK, "BLOCK": launches.block_size(DTYPES[dtype].itemsize, kernel.lists)}
    return compiled(kernel.name, dtype, target, (*kernel.flags, *geometry.items()), kernel.absent)


def cases() -> Iterator[Any]:
    for kernel in KERNELS:
        for dtype in kernel.dtypes:
            for target in TARGETS:
                yield pytest.param(kernel, dtype, target, id=f"{kernel}-{dtype}-{target}")


WIDE_LOAD = re.compile(r"\bld\.global\S*\.(?:v4\.b32|v2\.b64)\b|\b(?:buffer|global)_load_dwordx4\b")
WIDE_STORE = re.compile(r"\bst\.global\S*\.(?:v4\.b32|v2\.b64)\b|\b(?:buffer|global)_store_dwordx4\b")
FP64 = re.compile(r"\b\w+(?:\.\w+)*\.f64\b|\bv_\w+_f64\w*")


def assembly(kernel: Any) -> str:
    return kernel.asm["ptx"] if "ptx" in kernel.asm else kernel.asm["amdgcn"]


@pytest.mark.parametrize(("kernel", "dtype", "target"), list(cases()))
def test_a_kernel_loads_and_stores_16_bytes_and_spills_nothing(kernel: Kernel, dtype: str, target: str) -> None:
    found = main(kernel, dtype, target)
    text = assembly(found)
    packs = (
        launches.block_size(DTYPES[dtype].itemsize, kernel.lists) * DTYPES[dtype].itemsize // (launches.THREADS * 16)
    )
    restoring = packs * kernel.restores
    # At least, as AMD's compiler unrolls: of the path on which everything is whole and aligned.
    assert len(WIDE_LOAD.findall(text)) >= packs * kernel.loads + restoring
    assert len(WIDE_STORE.findall(text)) >= packs * kernel.stores + restoring
    if dtype != "fp64":
        assert not FP64.findall(text)
    # Sums of products round twice, as in the other back ends. (AMD divides, and the exponential function in float64
    # is made, of fused steps.)
    if "gfx" not in target and not (dtype == "fp64" and kernel.name == "adamw_kernel"):
        assert not re.findall(r"\bfma\.", text)
    assert_nothing_in_local_memory(found)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("wide", ["fp64", "fp32"])
def test_the_kernels_of_few_numbers_compile(wide: str, target: str) -> None:
    for kernel in ("finish_norms_kernel", "finish_projection_kernel", "count_steps_kernel"):
        found = compiled(kernel, wide, target, (("BLOCK", 1024),), ("found_inf",))
        assert_nothing_in_local_memory(found)
        if wide == "fp32":
            assert not FP64.findall(assembly(found))


def assert_nothing_in_local_memory(kernel: Any) -> None:
    text = assembly(kernel)
    if "ptx" in kernel.asm:
        assert ".local" not in text
        assert registers_and_stack(kernel)[1] == 0
    else:
        assert re.findall(r"\.private_segment_fixed_size: (\d+)", text) == ["0"]
        assert re.findall(r"\.vgpr_spill_count: +(\d+)", text) == ["0"]


def registers_and_stack(kernel: Any) -> tuple[int, int]:
    """Of machine code, as ptxas left it: spilled registers lie on the stack."""
    import subprocess
    import tempfile

    from tests.test_cuda_compile import cuobjdump

    tool = cuobjdump()
    assert tool is not None, "Triton has it"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]), int(found[2]) + int(found[3])
