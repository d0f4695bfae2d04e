"""What nvcc makes of the CUDA kernels: no warning, wide loads and stores, no spilled register, no double arithmetic.

Needs no GPU. The machine code of every architecture is read with cuobjdump, which CUDA and Triton ship.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

CUDA = Path(__file__).parents[1] / "csrc" / "cuda"
SOURCES = sorted(path.stem for path in CUDA.glob("*.cu"))
ARCHITECTURES = ("80", "90", "100", "120")
FLAGS = ("-std=c++17", "-O3", "--fmad=false", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror")
DTYPES = {"d": "fp64", "f": "fp32", "8bfloat16": "bf16", "7float16": "fp16"}

# Kernels that write parameters in two ways: their last template argument says how they are rounded.
ROUNDING = {"perturb_kernel", "shift_kernel", "sgd_kernel", "adamw_kernel"}

# What a kernel's main loop loads and stores, each with one instruction of 128 bits at least: its lists and, in fused
# steps, one load and one store more, where the step is not taken and parameters are restored only.
LOADS_AND_STORES = {
    "perturb_kernel": (2, 2),
    "shift_kernel": (4, 1),  # loads that a flag leaves out, among them
    "restore_kernel": (1, 1),
    "combine_kernel": (3, 2),
    "sum_differences_kernel": (4, 0),  # two packs of two lists
    "sum_mixed_kernel": (4, 0),  # it stores three sums for each chunk
    "decompose_kernel": (4, 2),
    "sgd_kernel, 0": (4, 3),
    "sgd_kernel, 1": (5, 4),
    "adamw_kernel, 0": (6, 5),
    "adamw_kernel, 1": (7, 6),
    "sum_chunks_kernel": (4, 0),  # four packs of one list; it stores one sum for each chunk
}
# Kernels that touch a few numbers for each tensor or chunk.
SMALL = ("finish_norms_kernel", "finish_projection_kernel", "count_step_kernel")

# Arithmetic and conversions; DEPBAR and the like are not among them.
FP64 = re.compile(r"\b(DADD|DMUL|DFMA|DSETP|DMNMX|F2F\.\S*F64\S*|F2I\.\S*F64\S*|I2F\.\S*F64\S*|MUFU\.\S*64H\S*)\b")
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def cuobjdump() -> str | None:
    folders = [Path(NVCC).resolve().parent] if NVCC else []
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.submodule_search_locations:
        folders += [Path(place, "backends", "nvidia", "bin") for place in triton.submodule_search_locations]
    beside = (shutil.which("cuobjdump", path=str(folder)) for folder in folders)
    return shutil.which("cuobjdump") or next(filter(None, beside), None)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="nvcc is not installed"),
    pytest.mark.skipif(cuobjdump() is None, reason="cuobjdump is not installed; CUDA's toolkit and triton have it"),
]


@dataclass(frozen=True)
class Kernel:
    """One instance of a kernel template on one architecture."""

    name: str  # with its compile-time flag, as in LOADS_AND_STORES
    dtype: str
    is_stochastic: bool
    architecture: str
    registers: int
    stack: int
    instructions: str

    def __str__(self) -> str:
        rounding = ", stochastic" if self.is_stochastic else ""
        return f"{self.name}, {self.dtype}{rounding}, sm_{self.architecture}"


def parsed_name(symbol: str) -> tuple[str, str, bool]:
    """Kernel, dtype and rounding of a mangled name: `…14restore_kernelINS_7float16EEEv…`,
    `…10sgd_kernelIfLb1ENS0_9ToNearestEEEv…`.
    """
    names = "|".join({name.split(",")[0] for name in (*LOADS_AND_STORES, *SMALL)})
    found = re.search(rf"({names})I(?:NS_)?(d|f|8bfloat16|7float16)E?(?:Lb([01])E)?(.*?)EEv", symbol)
    assert found is not None, symbol
    kernel, dtype, flag, rest = found.groups()
    assert ("9ToNearest" in rest or "14Stochastically" in rest) == (kernel in ROUNDING), symbol
    return (kernel if flag is None else f"{kernel}, {flag}"), DTYPES[dtype], "14Stochastically" in rest


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=SOURCES)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    """The kernels of one source, compiled once for all architectures; compiling says nothing, not even a warning."""
    target = tmp_path_factory.mktemp("cuda") / f"{request.param}.o"
    generate = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]
    run(NVCC, *FLAGS, *generate, "-c", CUDA / f"{request.param}.cu", "-o", target)

    usage = {}
    for part in re.split(r"^Fatbin elf code:$", run(cuobjdump(), "-res-usage", target), flags=re.MULTILINE):
        architecture = re.search(r"arch = sm_(\d+)", part)
        for symbol, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", part):
            usage[architecture[1], symbol] = int(registers), int(stack)
    kernels = []
    for part in re.split(r"^Fatbin elf code:$", run(cuobjdump(), "-sass", target), flags=re.MULTILINE):
        architecture = re.search(r"arch = sm_(\d+)", part)
        for symbol, instructions in re.findall(r"Function : (\S+)\n(.*?)(?=Function :|\Z)", part, flags=re.DOTALL):
            number = architecture[1]
            kernels.append(Kernel(*parsed_name(symbol), number, *usage[number, symbol], instructions))
    assert {kernel.architecture for kernel in kernels} == set(ARCHITECTURES)
    return kernels


def test_every_list_moves_128_bits_at_a_time(kernels):
    for kernel in kernels:
        if kernel.name not in SMALL:
            loads, stores = LOADS_AND_STORES[kernel.name]
            assert len(re.findall(r"\bLDG\.E\.\S*128", kernel.instructions)) >= loads, str(kernel)
            assert len(re.findall(r"\bSTG\.E\.\S*128", kernel.instructions)) >= stores, str(kernel)


def test_no_register_is_spilled(kernels, record_property):
    for kernel in kernels:
        record_property(str(kernel), kernel.registers)
        print(f"{kernel}: {kernel.registers} registers")
        assert kernel.stack == 0, str(kernel)
        assert not re.search(r"\b(LDL|STL)\b", kernel.instructions), str(kernel)


def test_only_float64_kernels_do_float64_arithmetic(kernels):
    for kernel in kernels:
        found = FP64.search(kernel.instructions)
        if kernel.dtype != "fp64":
            assert found is None, (str(kernel), found and found[0])
        elif kernel.name not in ("restore_kernel", "count_step_kernel"):
            assert found is not None, str(kernel)  # or the pattern would miss it elsewhere, too


def test_every_kernel_is_there_in_every_dtype(kernels):
    for name in {kernel.name for kernel in kernels}:
        dtypes, drawn = (
            {kernel.dtype for kernel in kernels if kernel.name == name and kernel.is_stochastic == stochastic}
            for stochastic in (False, True)
        )
        assert dtypes == ({"fp64", "fp32"} if name in SMALL else set(DTYPES.values())), name
        assert drawn == ({"bf16", "fp16"} if name.split(",")[0] in ROUNDING else set()), name
        assert name in SMALL or name in LOADS_AND_STORES
