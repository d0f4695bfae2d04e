"""The double backward of normalization layers and activations in compiled kernels, one call each.

The operators want the tensors that are shaped like the layer's input laid out alike and without gaps; this module hands
over dense copies of those that are not. For normalization, signatures and results are those of :mod:`formulas`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gam_fused.kernels import extension
from gam_fused.second_order.formulas import Results

_MEMORY_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def unavailable_reason(device: torch.device) -> str | None:
    """``None`` where there are kernels for tensors on this device, otherwise one sentence: why not."""
    if device.type != "cpu":
        return f"there are no native double backwards for {device.type} devices."
    return extension.unavailable_reason()


def memory_format(tensor: Tensor) -> torch.memory_format:
    """channels_last where a tensor has that layout and is not contiguous, otherwise the contiguous format."""
    channels_last = _MEMORY_FORMATS.get(tensor.dim())
    if channels_last is None or tensor.is_contiguous() or not tensor.is_contiguous(memory_format=channels_last):
        return torch.contiguous_format
    return channels_last


def batch_norm_double_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    gg_input: Tensor | None,
    gg_weight: Tensor | None,
    gg_bias: Tensor | None,
    training: bool,
    needs_grad_output: bool,
    needs_input: bool,
    needs_weight: bool,
) -> Results:
    """See :func:`formulas.batch_norm_double_backward`; keeps channels_last."""
    big = dense(memory_format(input), grad_output, input, gg_input)
    small = dense(torch.contiguous_format, weight, mean, invstd, gg_weight, gg_bias)
    needs = needs_grad_output, needs_input, needs_weight
    return _call(torch.ops.gam_fused.batch_norm_double_backward.default, big, small, training, needs)


def group_norm_double_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    gg_input: Tensor | None,
    gg_weight: Tensor | None,
    gg_bias: Tensor | None,
    num_groups: int,
    needs_grad_output: bool,
    needs_input: bool,
    needs_weight: bool,
) -> Results:
    """See :func:`formulas.group_norm_double_backward`; keeps channels_last."""
    big = dense(memory_format(input), grad_output, input, gg_input)
    small = dense(torch.contiguous_format, weight, mean, invstd, gg_weight, gg_bias)
    needs = needs_grad_output, needs_input, needs_weight
    return _call(torch.ops.gam_fused.group_norm_double_backward.default, big, small, num_groups, needs)


def layer_norm_double_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor,
    gg_input: Tensor | None,
    gg_weight: Tensor | None,
    gg_bias: Tensor | None,
    normalized_dims: int,
    needs_grad_output: bool,
    needs_input: bool,
    needs_weight: bool,
) -> Results:
    """See :func:`formulas.layer_norm_double_backward`."""
    big = dense(torch.contiguous_format, grad_output, input, gg_input)
    small = dense(torch.contiguous_format, weight, mean, invstd, gg_weight, gg_bias)
    needs = needs_grad_output, needs_input, needs_weight
    return _call(torch.ops.gam_fused.layer_norm_double_backward.default, big, small, normalized_dims, needs)


def gelu_double_backward(
    grad_output: Tensor, input: Tensor, double_grad: Tensor, needs_grad_output: bool, needs_input: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``grad_output`` and ``input``, given that of the backward's result, of the exact GELU.

    All shapes alike, any number of dimensions, strides and elements; keeps channels_last. The error function of float32
    and narrower is within 1.5e-7, which is PyTorch's as well.
    """
    return _of_elements(_GELU, grad_output, input, double_grad, (False, needs_grad_output, needs_input))


def gelu_tanh_double_backward(
    grad_output: Tensor, input: Tensor, double_grad: Tensor, needs_grad_output: bool, needs_input: bool
) -> tuple[Tensor | None, Tensor | None]:
    """As :func:`gelu_double_backward`, of the approximation by tanh."""
    return _of_elements(_GELU, grad_output, input, double_grad, (True, needs_grad_output, needs_input))


def silu_double_backward(
    grad_output: Tensor, input: Tensor, double_grad: Tensor, needs_grad_output: bool, needs_input: bool
) -> tuple[Tensor | None, Tensor | None]:
    """As :func:`gelu_double_backward`, of SiLU."""
    return _of_elements(_SILU, grad_output, input, double_grad, (needs_grad_output, needs_input))


_GELU, _SILU = "gelu_double_backward", "silu_double_backward"


def _of_elements(
    operator: str, grad_output: Tensor, input: Tensor, double_grad: Tensor, settings: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    shape = input.shape
    tensors = [each if shape else each.reshape(1) for each in (grad_output, input, double_grad)]
    tensors = [each.contiguous(memory_format=memory_format(tensors[1])) for each in tensors]
    results = getattr(torch.ops.gam_fused, operator).default(*tensors, *settings)
    first, second = (
        (each if shape else each.reshape(())) if needed else None
        for each, needed in zip(results, settings[-2:], strict=True)
    )
    return first, second


def dense(layout: torch.memory_format, *tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors in this layout, copied where they have another."""
    return [None if tensor is None else tensor.contiguous(memory_format=layout) for tensor in tensors]


def _call(
    operator: Any,
    big: list[Tensor | None],
    small: list[Tensor | None],
    setting: int,
    needs: tuple[bool, bool, bool],
) -> Results:
    grad_output, input, gg_input = big
    weight, mean, invstd, gg_weight, gg_bias = small
    results = operator(grad_output, input, weight, mean, invstd, gg_input, gg_weight, gg_bias, setting, *needs)
    first, second, third = (result if needed else None for result, needed in zip(results, needs, strict=True))
    return first, second, third


def _fake_of_elements(grad_output: Tensor, input: Tensor, double_grad: Tensor, *settings: bool) -> tuple[Tensor, ...]:
    for each in (grad_output, double_grad):
        is_like_input = (each.shape, each.dtype, each.device) == (input.shape, input.dtype, input.device)
        torch._check(is_like_input, lambda: "dtype, device or shape differs from that of input")
    return tuple(torch.empty_like(input) if needed else input.new_empty(0) for needed in settings[-2:])


def _fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor,
    gg_input: Tensor | None,
    gg_weight: Tensor | None,
    gg_bias: Tensor | None,
    setting: int,
    needs_grad_output: bool,
    needs_input: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """For meta and fake tensors: the shapes of the results."""

    def result(like: Tensor | None, is_needed: bool) -> Tensor:
        return input.new_empty(0) if like is None or not is_needed else torch.empty_like(like)

    return result(input, needs_grad_output), result(input, needs_input), result(weight, needs_weight)


_KEPT: list[torch.library.Library] = []  # a library's registrations end with it
if extension.unavailable_reason() is None:
    _KEPT.append(torch.library.Library("gam_fused", "FRAGMENT"))
    for _name in (_GELU, _SILU):
        torch.library.register_fake(f"gam_fused::{_name}", _fake_of_elements, lib=_KEPT[0])
    for _name in ("batch_norm", "group_norm", "layer_norm"):
        torch.library.register_fake(f"gam_fused::{_name}_double_backward", _fake, lib=_KEPT[0])
