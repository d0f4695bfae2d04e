"""``gam-fused info``: what a bug report should contain."""

from __future__ import annotations

import platform

import torch
from rich.console import Console
from rich.table import Table

import gam_fused
from gam_fused import kernels
from gam_fused.kernels import extension


def info() -> None:
    """Show versions, devices, and which back ends can run here."""
    table = Table(show_header=False)
    table.add_row("gam_fused", gam_fused.__version__)
    table.add_row("torch", torch.__version__)
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    table.add_row("cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        table.add_row(f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    for name, problem in kernels.available().items():
        table.add_row(f"back end {name}", "available" if problem is None else f"not available: {problem}")
    table.add_row("back end auto", _automatic_backend())
    for name, row in _native_build().items():
        table.add_row(name, row)
    Console().print(table)


def _automatic_backend() -> str:
    try:
        return f"means {kernels.resolve().name} here"
    except (ValueError, RuntimeError) as error:  # the environment variable asks for what cannot be had
        return f"fails: {error}"


def _native_build() -> dict[str, str]:
    """What the compiled kernels were built with, or why they are missing."""
    built = extension.build_info()
    if built is None:
        return {"native build": f"none: {extension.unavailable_reason()}"}
    missing = extension.cuda_unavailable_reason()
    return {
        "native build": f"by {built['compiler']} against torch {built['torch']}, for torch {built['abi']} and newer",
        "native flags": built["flags"],
        "native CUDA": f"toolkit {built['cuda']}, for {built['architectures']}"
        if missing is None
        else f"none: {missing}",
        "past the dispatcher": extension.direct_unavailable_reason() or "small, plain CPU tensors",
    }
