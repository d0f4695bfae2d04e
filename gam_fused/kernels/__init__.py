"""Multi-tensor arithmetic of a GAM step behind one interface, with several back ends.

A back end is one file with a subclass of :class:`~gam_fused.kernels.interface.Backend`, and one line below.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch

from gam_fused.kernels.foreach import ForeachBackend
from gam_fused.kernels.interface import Backend
from gam_fused.kernels.native import NativeBackend
from gam_fused.kernels.reference import ReferenceBackend
from gam_fused.kernels.triton import TritonBackend

__all__ = ["Backend", "available", "resolve"]

_VARIABLE = "GAM_FUSED_BACKEND"

# Fastest first: "auto" takes the first that runs here. The last one runs everywhere.
_PREFERENCE: tuple[type[Backend], ...] = (NativeBackend, TritonBackend, ForeachBackend)

# Run only when asked for by name.
_ON_REQUEST: tuple[type[Backend], ...] = (ReferenceBackend,)

_INSTANCES = {cls.name: cls() for cls in (*_PREFERENCE, *_ON_REQUEST)}


def available() -> dict[str, str | None]:
    """Every back end by name, in order of preference: ``None`` if it runs here, otherwise why it does not."""
    return {name: backend.unavailable_reason() for name, backend in _INSTANCES.items()}


def resolve(name: str = "auto", devices: Iterable[torch.device] = ()) -> Backend:
    """The back end of that name, for tensors on all of these devices; the same object at every call.

    ``"auto"`` means the environment variable ``GAM_FUSED_BACKEND`` if it is set, and otherwise the fastest back end
    that runs here. A back end asked for by name, in either way, is never replaced by another one.

    Raises:
        ValueError: there is no back end of that name.
        RuntimeError: the back end cannot run here; the message says why.
    """
    where = list(devices)
    source = "backend"
    if name == "auto":
        source, name = _VARIABLE, os.environ.get(_VARIABLE) or "auto"
    if name == "auto":
        on_cpu = all(device.type == "cpu" for device in where)
        candidates = [cls for cls in _PREFERENCE if not (on_cpu and cls.is_for_tests_on_cpu)]
        return next(_INSTANCES[cls.name] for cls in candidates if _reason(cls, where) is None)
    if name not in _INSTANCES:
        known = ", ".join(repr(known) for known in ("auto", *_INSTANCES))
        raise ValueError(f"{source} must be one of {known}, got {name!r}.")
    reason = _reason(type(_INSTANCES[name]), where)
    if reason is not None:
        raise RuntimeError(f"{source}={name!r} cannot run here: {reason}")
    return _INSTANCES[name]


def _reason(cls: type[Backend], devices: Sequence[torch.device]) -> str | None:
    """Why a back end cannot run on all of the devices; of none, why it cannot run at all."""
    reasons = map(cls.unavailable_reason, devices) if devices else iter([cls.unavailable_reason()])
    return next((reason for reason in reasons if reason is not None), None)
