"""Where Triton's kernels can run, and the shape of their launches.

With ``TRITON_INTERPRET=1`` kernels run on CPU tensors, slowly: for tests.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gam_fused.kernels.pointer_tables import ALIGNMENT

OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = 70

# Launch geometry. A program moves one chunk of every list of its operator in blocks that give each of its threads one
# or two loads of 16 bytes per list: enough of them in flight for the memory, few enough for the registers, of which
# narrow numbers need one each. At 8192 elements a program lives long enough to pay for its start, and ResNet-50 still
# makes several programs for each place on the largest GPUs, so that the last ones do not leave most of them idle.
CHUNK = 8192
THREADS = 256
_FEW_LISTS = 3

# The interpreter takes as long for a large block as for a small one.
_INTERPRETED_CHUNK = 32768


def unavailable_reason(device: torch.device | None = None) -> str | None:
    """``None`` where Triton is installed and can compile for the device, any GPU if none is given; else why not."""
    if (reason := _version_reason()) is not None:
        return reason
    if device is not None and device.type not in ("cpu", "cuda"):
        return f"there are no Triton kernels for {device.type} devices."
    if (device is not None and device.type == "cpu") or not torch.cuda.is_available():
        if not is_interpreted():
            return "Triton compiles for GPUs only; on CPU tensors it runs interpreted, with TRITON_INTERPRET=1 set."
    elif device is not None and is_interpreted():
        return "TRITON_INTERPRET=1 is set, and interpreted kernels run on CPU tensors; unset it."
    return None if is_interpreted() else _compiler_reason()


def is_interpreted() -> bool:
    """Whether kernels are interpreted: as they were defined, or will be by what ``TRITON_INTERPRET`` says now."""
    rules = sys.modules.get("gam_fused.kernels.triton_rules")
    if rules is not None:
        return bool(rules.IS_INTERPRETED)
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _version_reason() -> str | None:
    oldest = ".".join(map(str, OLDEST_TRITON))
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed; pip install 'triton>={oldest}'."
    try:
        import triton
    except Exception as error:  # a broken installation
        return f"Triton cannot be imported: {error}; pip install 'triton>={oldest}'."
    found = re.match(r"(\d+)\.(\d+)", triton.__version__)
    if found is None or tuple(map(int, found.groups())) < OLDEST_TRITON:
        return f"Triton {triton.__version__} is too old; pip install 'triton>={oldest}'."
    return None


@cache
def _compiler_reason() -> str | None:
    """Tried once: Triton builds a small library with a C compiler to talk to the device's driver."""
    from triton.runtime import driver

    try:
        target = driver.active.get_current_target()
        _ = driver.active.utils
    except Exception as error:  # no compiler, no headers, a folder that cannot be written, no driver, ...
        said = str(error).strip().partition("\n")[0]
        return f"Triton cannot compile here ({said}); it needs a C compiler, Python's headers and the device's driver."
    if target.backend == "cuda" and target.arch < OLDEST_CAPABILITY:
        return f"Triton does not compile for GPUs of compute capability {target.arch / 10}; 7.0 is the oldest."
    return None


def language_dtype(dtype: torch.dtype) -> Any:
    """Triton's name for it."""
    import triton.language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))


def chunk_of(device: torch.device) -> int:
    """Elements that a program works on there."""
    return CHUNK if device.type == "cuda" else _INTERPRETED_CHUNK


def block_size(itemsize: int, lists: int) -> int:
    """Elements of each list that a program moves at one go, by their size in bytes and how many lists there are."""
    loads = 2 if lists <= _FEW_LISTS and itemsize >= 4 else 1
    return THREADS * (ALIGNMENT // itemsize) * loads


def geometry(tensor: Tensor, lists: int) -> dict[str, Any]:
    """The options of a launch over chunks of so many lists of such tensors."""
    chunk = chunk_of(tensor.device)
    return {
        "CHUNK": chunk,
        "BLOCK": block_size(tensor.element_size(), lists) if tensor.device.type == "cuda" else chunk // 2,
        "num_warps": warps_of(THREADS, tensor.device),
        "enable_fp_fusion": False,  # so that results are those of the other back ends
    }


def warps_of(threads: int, device: torch.device) -> int:
    """In how many warps the device runs them."""
    return threads // (torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Where launches go to it."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    import numpy  # the interpreter computes with it

    return numpy.errstate(all="ignore")  # as devices do: infinities and NaN are values like others
