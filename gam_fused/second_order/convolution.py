"""Convolutions and transposed convolutions whose double backward is at most three native calls.

A convolution y = conv(x, w) + b is linear in x and in w, and so are its gradients

    g_x = convᵀ(g_y, w),    g_w = corr(x, g_y),    g_b = Σ g_y.

Given gradients v_x, v_w, v_b of these three, the double backward therefore is

    of g_y:  conv(v_x, w) + conv(x, v_w) + v_b
    of x:    convᵀ(g_y, v_w),  the input gradient of a convolution with the weight v_w
    of w:    corr(v_x, g_y),   the weight gradient of a convolution of the input v_x

of which ``aten::convolution`` computes the products of the first line, and one ``aten::convolution_backward`` of v_x
and v_w the other two. PyTorch's own formula takes the last one as a convolution with batch and channels exchanged, for
which its back ends are not made, and loops over groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import index
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gam_fused.second_order import autocast
from gam_fused.second_order.graphs import makes_graph

_Options = tuple[list[int], list[int], list[int], bool, list[int], int]
"""stride, padding, dilation, transposed, output_padding, groups"""

_convolve: Callable[..., Tensor] = torch.convolution
_backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.ops.aten.convolution_backward.default


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, options: _Options) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.options = options
        ctx.bias_sizes = None if bias is None else [bias.shape[0]]
        return _convolve(input, weight, bias, *options)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        mask = ctx.needs_input_grad[:3]
        if makes_graph(grad_output):
            grads = _convolution_backward(grad_output, input, weight, ctx.bias_sizes, mask, ctx.options)
        else:
            grads = _backward(grad_output, input, weight, ctx.bias_sizes, *ctx.options, mask)
        return *grads, None


class _ConvolutionBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        bias_sizes: list[int] | None,
        mask: tuple[bool, bool, bool],
        options: _Options,
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(grad_output, input, weight)
        ctx.set_materialize_grads(False)
        ctx.options = options
        return _backward(grad_output, input, weight, bias_sizes, *options, mask)

    @staticmethod
    def backward(
        ctx: Any, v_input: Tensor | None, v_weight: Tensor | None, v_bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        # Every operator below is differentiable in turn, so that third derivatives need nothing else.
        grad_output, input, weight = ctx.saved_tensors
        options: _Options = ctx.options
        needs_grad_output, needs_input, needs_weight = ctx.needs_input_grad[:3]
        of_grad_output = of_input = of_weight = None
        if needs_grad_output:
            of_grad_output = _of_grad_output(grad_output, input, weight, v_input, v_weight, v_bias, options)
        of_both = needs_input and v_weight is not None, needs_weight and v_input is not None, False
        if any(of_both):
            # The input gradient looks at no value of the input, nor the weight gradient at one of the weight.
            point = input if v_input is None else v_input, weight if v_weight is None else v_weight
            of_input, of_weight, _ = _backward(grad_output, *point, None, *options, of_both)
        return of_grad_output, of_input, of_weight, None, None, None


_layer: Callable[..., Tensor] = _Convolution.apply
_convolution_backward: Callable[..., tuple[Tensor | None, ...]] = _ConvolutionBackward.apply


def _of_grad_output(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    v_input: Tensor | None,
    v_weight: Tensor | None,
    v_bias: Tensor | None,
    options: _Options,
) -> Tensor | None:
    """conv(v_x, w) + conv(x, v_w) + v_b."""
    result = None
    if v_weight is not None:
        result = _convolve(input, v_weight, v_bias, *options)
        v_bias = None
    if v_input is not None:
        other = _convolve(v_input, weight, v_bias, *options)
        return other if result is None else result.add_(other)
    if v_bias is not None:
        return v_bias.view(-1, *[1] * (grad_output.dim() - 2)).expand_as(grad_output)
    return result


def _numbers(value: int | Sequence[int], dims: int) -> list[int]:
    """One number per spatial dimension."""
    if not isinstance(value, list | tuple):
        return [index(value)] * dims  # type: ignore[arg-type]  # numbers of NumPy's, and tensors of one integer, too
    return list(value) if len(value) == dims else list(value) * dims


def _has_batch(input: Tensor, dims: int) -> bool:
    return input.dim() == dims + 2


def _convolution_of(dims: int) -> Callable[..., Tensor]:
    original = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    operator = f"conv{dims}d"
    none = [0] * dims

    def convolve(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        if not _has_batch(input, dims) or weight.dim() != dims + 2:
            return original(input, weight, bias, stride, padding, dilation, groups)
        strides, dilations = _numbers(stride, dims), _numbers(dilation, dims)
        if not isinstance(padding, str):
            paddings = _numbers(padding, dims)
        elif padding == "valid":
            paddings = none
        elif padding == "same" and strides == [1] * dims:
            totals = [step * (size - 1) for step, size in zip(dilations, weight.shape[2:], strict=True)]
            paddings = [total // 2 for total in totals]
            if any(total % 2 for total in totals):  # one more on the far side
                input = F.pad(input, [side for total in reversed(totals) for side in (0, total % 2)])
        else:
            return original(input, weight, bias, stride, padding, dilation, groups)  # it knows what is wrong
        operands = autocast.to_lower_precision(operator, input, weight, bias)
        return _layer(*operands, (strides, paddings, dilations, False, none, groups))

    return convolve


def _transposed_convolution_of(dims: int) -> Callable[..., Tensor]:
    original = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
    operator = ("conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input")[dims - 1]

    def convolve_transposed(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        dilation: int | Sequence[int] = 1,
    ) -> Tensor:
        if not _has_batch(input, dims) or weight.dim() != dims + 2:
            return original(input, weight, bias, stride, padding, output_padding, groups, dilation)
        operands = autocast.to_lower_precision(operator, input, weight, bias)
        strides, paddings, dilations, more = (
            _numbers(value, dims) for value in (stride, padding, dilation, output_padding)
        )
        return _layer(*operands, (strides, paddings, dilations, True, more, groups))

    return convolve_transposed


conv1d, conv2d, conv3d = (_convolution_of(dims) for dims in (1, 2, 3))
conv_transpose1d, conv_transpose2d, conv_transpose3d = (_transposed_convolution_of(dims) for dims in (1, 2, 3))

REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.conv1d: conv1d,
    F.conv2d: conv2d,
    F.conv3d: conv3d,
    F.conv_transpose1d: conv_transpose1d,
    F.conv_transpose2d: conv_transpose2d,
    F.conv_transpose3d: conv_transpose3d,
}
