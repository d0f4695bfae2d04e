"""The compiled extensions: whether they are there, why not, and how they were built.

``gam_fused._C`` defines the operators under ``torch.ops.gam_fused`` and their CPU kernels, ``gam_fused._C_cuda`` adds
the CUDA kernels. ``gam_fused._C_direct`` lets the operators be called past PyTorch's dispatcher; it uses what is not in
PyTorch's stable ABI and serves beside the one release only that it was built against. Importing this module loads what
can be loaded and never raises: a package without native kernels is slower, not broken.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from gam_fused._version import __version__

# Written by setup.py beside the extensions: why those that are missing could not be built.
_RECORD = Path(__file__).parents[1] / "_native_build.json"


def unavailable_reason() -> str | None:
    """``None`` when the operators and their CPU kernels are loaded, otherwise one sentence: why not, and what to do."""
    return _CPU if isinstance(_CPU, str) else None


def cuda_unavailable_reason() -> str | None:
    """``None`` when the CUDA kernels are loaded (with or without a device), otherwise why not and what to do."""
    return _CUDA if isinstance(_CUDA, str) else None


def direct_unavailable_reason() -> str | None:
    """``None`` when operators can be called past PyTorch's dispatcher, otherwise why not and what to do."""
    return _DIRECT if isinstance(_DIRECT, str) else None


def direct_calls() -> Mapping[str, Callable[..., Any]]:
    """The operators by name as functions that skip PyTorch's dispatcher (``csrc/direct/python_calls.h``); may be none.

    They take what the schemas name, count their mutations and give the operators' results and errors (``MemoryError``
    where memory runs out), or ``NotImplemented``, with nothing done, where the dispatcher is needed: for tensors other
    than plain ones on the CPU, under modes, transforms and profilers, where an argument without ``None`` for a default
    is left out, and for more than 4,194,304 elements, since other threads wait meanwhile. A kernel that somebody has
    registered in the place of this package's is not called.
    """
    return {} if isinstance(_DIRECT, str) else _DIRECT


def build_info() -> dict[str, Any] | None:
    """What the extensions were built by, for and with; ``None`` when there are none.

    Keys: ``version`` of gam_fused, ``torch`` whose headers were used and ``abi``, the oldest release of PyTorch that
    the extensions run beside; ``compiler`` and ``flags``; ``cuda``, the toolkit's version, and ``architectures``, both
    ``None`` where the CUDA kernels are not loaded.
    """
    if isinstance(_CPU, str):
        return None
    info: dict[str, Any] = {**_CPU.build_info(), "cuda": None, "architectures": None}
    if not isinstance(_CUDA, str):
        info |= {key: _CUDA.build_info()[key] for key in ("cuda", "architectures")}
    return info


def _load(name: str) -> ModuleType | str:
    """The extension, or the reason why it cannot be had."""
    full_name = f"gam_fused.{name}"
    if importlib.util.find_spec(full_name) is None:
        return _not_built(name)
    try:
        module = importlib.import_module(full_name)
    except Exception as error:  # undefined symbols, a missing library, operators registered twice, ...
        return f"{full_name} does not load beside PyTorch {torch.__version__}: {error}; build gam_fused again."
    built_for = module.build_info()["version"]
    if built_for != __version__:
        return f"{full_name} was built for gam_fused {built_for}, and this is {__version__}; build it again."
    return module


def _not_built(name: str) -> str:
    try:
        reason = json.loads(_RECORD.read_text(encoding="utf-8")).get(name)
    except (OSError, ValueError):
        reason = None
    return reason or (
        "gam_fused was installed without its native kernels: GAM_FUSED_NATIVE=0 was set, or this is a source tree that "
        "nothing has built yet (`pip install -e .`)."
    )


def _load_cuda() -> ModuleType | str:
    if isinstance(_CPU, str):
        return _CPU
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} was built without CUDA."
    return _load("_C_cuda")


def _load_direct() -> Mapping[str, Callable[..., Any]] | str:
    if isinstance(_CPU, str):
        return _CPU
    module = _load("_C_direct")
    if isinstance(module, str):
        return module
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return "gam_fused._C_direct needs Python's global interpreter lock, which is off; run Python without -X gil=0."
    # The two share structs that no version tells apart.
    folders = {Path(extension.__file__ or "").parent for extension in (_CPU, module)}
    if len(folders) > 1:
        where = " and ".join(sorted(map(str, folders)))
        return f"gam_fused._C and gam_fused._C_direct are of two builds, in {where}; install gam_fused again."
    built_for = module.build_info()["torch"]
    if built_for != torch.__version__:
        return (
            f"gam_fused._C_direct was built for PyTorch {built_for}, and this is {torch.__version__}; "
            "install gam_fused again."
        )
    try:
        calls: Mapping[str, Callable[..., Any]] = _CPU.python_calls(module.tensor_access)
    except Exception as error:
        return f"gam_fused._C and gam_fused._C_direct do not go together: {error}; install gam_fused again."
    return calls


_CPU = _load("_C")
_CUDA = _load_cuda()
_DIRECT = _load_direct()
