"""Activations whose double backward is one native backward and a handful of operators in place.

y = f(x) has the gradient g f′(x) for an incoming g. The double backward, for an incoming v, is v f′(x) for g, which is
PyTorch's native backward again, and g v f″(x) for x. PyTorch composes these, and where a graph is asked for the first
backward too, from ten to thirty operators, each of which leaves a tensor behind.

Only what gains from it is here. ReLU and its kin, tanh and sigmoid are native or nearly so already; the composites of
softplus, ELU, SELU, CELU and hardswish are short; Mish takes its time in its native kernels. Small tensors that stay in
the CPU's cache gain nothing either, and are left to PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gam_fused.second_order.sizes import is_worthwhile
from gam_fused.second_order.third_order import differentiable_double_backward


class _Rule(NamedTuple):
    """An activation and its derivatives."""

    function: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    """(g, x) → g f′(x)."""
    bend_: Callable[[Tensor, Tensor], Tensor]
    """(w, x) → w f″(x); may write into w."""


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, rule: _Rule) -> Tensor:
        ctx.save_for_backward(input)
        ctx.rule = rule
        return rule.function(input)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (input,) = ctx.saved_tensors
        if torch.is_grad_enabled():
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
        of_grad_output = rule.backward(double_grad, input) if needs_grad_output else None
        of_input = rule.bend_(grad_output * double_grad, input) if needs_input else None
        return of_grad_output, of_input, None


_activation: Callable[..., Tensor] = _Activation.apply
_activation_backward: Callable[..., Tensor] = _ActivationBackward.apply


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
    "none": _Rule(F.gelu, _gelu_backward, _bend_gelu_),
    "tanh": _Rule(
        partial(F.gelu, approximate="tanh"),
        partial(_gelu_backward, approximate="tanh"),
        _bend_gelu_tanh_,
    ),
}
_SILU = _Rule(F.silu, torch.ops.aten.silu_backward.default, _bend_silu_)


def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """:func:`torch.nn.functional.gelu`, to be differentiated twice."""
    if (rule := _GELU.get(approximate)) is None or not is_worthwhile(input):
        return F.gelu(input, approximate=approximate)
    return _activation(input, rule)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """:func:`torch.nn.functional.silu`, to be differentiated twice; ``inplace`` is left to PyTorch."""
    if inplace or not is_worthwhile(input):
        return F.silu(input, inplace=inplace)
    return _activation(input, _SILU)


REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {F.gelu: gelu, F.silu: silu}
