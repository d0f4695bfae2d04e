"""Activations whose double backward is one native backward and a handful of operators in place.

y = f(x) has the gradient g f′(x) for an incoming g. The double backward, for an incoming v, is v f′(x) for g, which is
PyTorch's native backward again, and g v f″(x) for x. PyTorch composes these, and where a graph is asked for the first
backward too, from ten to thirty operators, each of which leaves a tensor behind. Where the extension is built, both
come from one kernel on the CPU.

ReLU has no second derivative: PyTorch makes a tensor of zeros of it, and adds that.

Only what gains from it is here. Tanh and sigmoid are native or nearly so already; the composites of softplus, ELU,
SELU, CELU and hardswish are short; Mish takes its time in its native kernels. Small tensors that stay in the CPU's
cache gain nothing either, and are left to PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gam_fused.second_order import native
from gam_fused.second_order.graphs import makes_graph, refuse_batch
from gam_fused.second_order.sizes import is_worthwhile
from gam_fused.second_order.third_order import differentiable_double_backward


class _Rule(NamedTuple):
    """An activation and its derivatives."""

    function: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    """(g, x) → g f′(x)."""
    bend_: Callable[[Tensor, Tensor], Tensor]
    """(w, x) → w f″(x); may write into w."""
    kernel: Callable[..., tuple[Tensor | None, Tensor | None]]
    """(g, x, v, needs_grad_output, needs_input) → v f′(x), g v f″(x), compiled."""


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, rule: _Rule) -> Tensor:
        ctx.save_for_backward(input)
        ctx.rule = rule
        return rule.function(input)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (input,) = ctx.saved_tensors
        if makes_graph(grad_output):
            return _activation_backward(grad_output, input, ctx.rule), None
        return ctx.rule.backward(grad_output, input), None


class _ActivationBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad_output: Tensor, input: Tensor, rule: _Rule) -> Tensor:
        ctx.save_for_backward(grad_output, input)
        ctx.rule = rule
        return rule.backward(grad_output, input)

    @staticmethod
    def backward(ctx: Any, double_grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, input = ctx.saved_tensors
        rule: _Rule = ctx.rule
        if torch.is_grad_enabled():
            return *differentiable_double_backward(rule.function, [input], grad_output, [double_grad]), None
        needs_grad_output, needs_input, _ = ctx.needs_input_grad
        if _has_kernel(input):
            return *rule.kernel(grad_output, input, double_grad, needs_grad_output, needs_input), None
        of_grad_output = rule.backward(double_grad, input) if needs_grad_output else None
        of_input = rule.bend_(grad_output * double_grad, input) if needs_input else None
        return of_grad_output, of_input, None


def _has_kernel(input: Tensor) -> bool:
    # In float64 the C library's functions, which do not vectorise, are slower than PyTorch's operators.
    return input.dtype != torch.float64 and native.unavailable_reason(input.device) is None


_activation: Callable[..., Tensor] = _Activation.apply
_activation_backward: Callable[..., Tensor] = _ActivationBackward.apply


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        output = torch.relu(input)
        ctx.save_for_backward(output)  # not the input, which may be needed for nothing else
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (output,) = ctx.saved_tensors
        return _masked(grad_output, output.detach()) if makes_graph(grad_output) else _mask(grad_output, output)


class _Masked(torch.autograd.Function):
    """Linear in the first argument, and piecewise constant in the second."""

    @staticmethod
    def forward(ctx: Any, grad_output: Tensor, output: Tensor) -> Tensor:
        ctx.save_for_backward(output)
        return _mask(grad_output, output)

    @staticmethod
    def backward(ctx: Any, double_grad: Tensor) -> tuple[Tensor, None]:
        (output,) = ctx.saved_tensors
        return (_masked if torch.is_grad_enabled() else _mask)(double_grad, output), None


_rectify: Callable[..., Tensor] = _ReLU.apply
_masked: Callable[..., Tensor] = _Masked.apply


def _mask(tensor: Tensor, output: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward.default(tensor, output, 0)


# ------------------------------------------------------------------ second derivatives

_DENSITY = 1 / math.sqrt(2 * math.pi)
_TANH_SCALE = math.sqrt(2 / math.pi)
_TANH_CUBIC = 0.044715  # of GELU's approximation by tanh (Hendrycks and Gimpel, arXiv 1606.08415)

_sigmoid_backward = torch.ops.aten.sigmoid_backward.default
_tanh_backward = torch.ops.aten.tanh_backward.default


def _bend_gelu_(weight: Tensor, x: Tensor) -> Tensor:
    """f″ = φ(x) (2 − x²), with φ the density of the normal distribution."""
    square = x * x
    weight.mul_(torch.rsub(square, 2 * _DENSITY, alpha=_DENSITY))
    return weight.mul_(square.mul_(-0.5).exp_())


def _bend_gelu_tanh_(weight: Tensor, x: Tensor) -> Tensor:
    """f″ = (1 − t²) (u′ + ½ x u″ − x t u′²), where f = ½ x (1 + t), t = tanh u, u = k (x + c x³)."""
    square = x * x
    slope = (square * (3 * _TANH_CUBIC * _TANH_SCALE)).add_(_TANH_SCALE)  # u′
    tanh = square.mul(_TANH_CUBIC * _TANH_SCALE).add_(_TANH_SCALE).mul_(x).tanh_()
    bend = square.mul_(3 * _TANH_CUBIC * _TANH_SCALE).add_(slope)  # u′ + ½ x u″
    bend.addcmul_(slope.square_().mul_(x), tanh, value=-1)
    return _tanh_backward(weight.mul_(bend), tanh)


def _bend_silu_(weight: Tensor, x: Tensor) -> Tensor:
    """f″ = σ (1 − σ) (2 + x (1 − 2 σ))."""
    sigmoid = torch.sigmoid(x)
    return _sigmoid_backward(weight.mul_((x + 2).addcmul_(x, sigmoid, value=-2)), sigmoid)


# ------------------------------------------------------------------ in the place of PyTorch's

_gelu_backward = torch.ops.aten.gelu_backward.default

_GELU = {
    "none": _Rule(F.gelu, _gelu_backward, _bend_gelu_, native.gelu_double_backward),
    "tanh": _Rule(
        partial(F.gelu, approximate="tanh"),
        partial(_gelu_backward, approximate="tanh"),
        _bend_gelu_tanh_,
        native.gelu_tanh_double_backward,
    ),
}


def _silu_backward(grad_output: Tensor, input: Tensor) -> Tensor:
    refuse_batch(grad_output, "silu")  # PyTorch's kernel has no derivative
    return torch.ops.aten.silu_backward.default(grad_output, input)


_SILU = _Rule(F.silu, _silu_backward, _bend_silu_, native.silu_double_backward)


def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """:func:`torch.nn.functional.gelu`, to be differentiated twice."""
    if (rule := _GELU.get(approximate)) is None or not is_worthwhile(input):
        return F.gelu(input, approximate=approximate)
    return _activation(input, rule)


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """:func:`torch.nn.functional.relu`, to be differentiated twice; ``inplace`` is left to PyTorch."""
    if inplace or not is_worthwhile(input):
        return F.relu(input, inplace=inplace)
    return _rectify(input)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """:func:`torch.nn.functional.silu`, to be differentiated twice; ``inplace`` is left to PyTorch."""
    if inplace or not is_worthwhile(input):
        return F.silu(input, inplace=inplace)
    return _activation(input, _SILU)


REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.gelu: gelu,
    F.relu: relu,
    F.silu: silu,
    torch.relu: relu,
    Tensor.relu: relu,
}
