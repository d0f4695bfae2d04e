"""Which calls of a layer these modules handle; all others go to PyTorch's own function as they came."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_NARROW = (torch.bfloat16, torch.float16)
_DEVICES = ("cpu", "cuda")


def is_differentiated(input: Tensor, *others: Tensor | None) -> bool:
    """Whether autograd, and nothing but autograd, records what is computed of plain tensors like these.

    ``input`` is the layer's input; ``others`` are its parameters, of the same dtype or float32 beside a narrower input.
    ``False`` for subclasses, empty tensors, other devices and dtypes, and while ``torch.func`` transforms, forward-mode
    differentiation, tracing or ``torch.compile`` look on: an ``autograd.Function`` does not do for all of these what
    the operators do that it is put in place of.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    dtype, device = getattr(input, "dtype", None), getattr(input, "device", None)
    if not _is_plain(input) or dtype not in _DTYPES or device is None or device.type not in _DEVICES:
        return False
    is_required = input.requires_grad
    for other in others:
        if other is None:
            continue
        if not _is_plain(other) or other.device != device:
            return False
        if other.dtype != dtype and not (dtype in _NARROW and other.dtype == torch.float32):
            return False
        is_required = is_required or other.requires_grad
    return is_required and input.numel() > 0


def _is_plain(tensor: object) -> bool:
    return (
        isinstance(tensor, Tensor)
        and type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and forward_ad.unpack_dual(tensor).tangent is None
    )


def is_cast_by_autocast(*tensors: Tensor | None) -> bool:
    """Whether autocast is on and would have something to cast for an operator that it runs in float32.

    Which operators these are depends on the device and on PyTorch's version.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    return torch.is_autocast_enabled(given[0].device.type) and any(tensor.dtype in _NARROW for tensor in given)


def has_normalized_shape(normalized_shape: tuple[int, ...], input: Tensor, *parameters: Tensor | None) -> bool:
    """Whether the input ends in these dimensions and parameters consist of them; what is wrong is PyTorch's to say."""
    dims = len(normalized_shape)
    if dims == 0 or input.shape[-dims:] != normalized_shape:
        return False
    return all(parameter is None or parameter.shape == normalized_shape for parameter in parameters)
