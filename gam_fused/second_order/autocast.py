"""The casts that autocast makes before an operator, made by hand before the layer that takes its place.

An autograd function written in Python is not on autocast's lists. A layer therefore asks for the dtype in which
PyTorch would have run the operator, casts (differentiably), and computes in that dtype.
"""

from __future__ import annotations

from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

_DISPATCH_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
_NARROW = (torch.float32, torch.float16, torch.bfloat16)


def is_known(device: str) -> bool:
    """Whether autocast's rules for this type of device are known here, or autocast exists and is off there."""
    return device in _DISPATCH_KEYS or (
        torch.amp.is_autocast_available(device) and not torch.is_autocast_enabled(device)
    )


_MaybeTensor = TypeVar("_MaybeTensor", Tensor, Tensor | None)


def to_lower_precision(operator: str, *tensors: _MaybeTensor) -> tuple[_MaybeTensor, ...]:
    """The tensors as autocast hands them to ``operator`` (``"conv2d"``), one of those that run in its lower precision.

    Unchanged where autocast is off, or has no rule for the operator on this device. float64, integers and ``bool`` are
    never cast.
    """
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not torch.is_autocast_enabled(device) or not _has_rule(operator, device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if tensor is None else _cast(tensor, dtype) for tensor in tensors)


def to_float32(operator: str, tensor: Tensor) -> Tensor:
    """As :func:`to_lower_precision`, for an operator of those that run in float32."""
    device = tensor.device.type
    if not torch.is_autocast_enabled(device) or not _has_rule(operator, device):
        return tensor
    return _cast(tensor, torch.float32)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.dtype in _NARROW else tensor


@cache
def _has_rule(operator: str, device: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", _DISPATCH_KEYS[device])
