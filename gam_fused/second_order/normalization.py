"""What normalization layers have in common: how autograd comes to PyTorch's kernels, and to a fused double backward."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gam_fused.second_order import formulas, native, triton
from gam_fused.second_order.formulas import Results
from gam_fused.second_order.graphs import makes_graph

Saved = Sequence[Tensor | None]
Needs = tuple[bool, bool, bool]


class Operands(NamedTuple):
    """What the double backward of every layer starts from, in the order in which its functions take it."""

    grad_output: Tensor
    input: Tensor
    weight: Tensor | None
    mean: Tensor | None
    invstd: Tensor
    gg_input: Tensor | None
    gg_weight: Tensor | None
    gg_bias: Tensor | None


class Normalization(Protocol):
    """One call of a layer: its settings, and its derivatives."""

    def forward(self, input: Tensor, weight: Tensor | None, bias: Tensor | None, *buffers: Any) -> tuple[Tensor, Saved]:
        """The output, and what the backward needs besides grad_output, input and weight."""
        ...

    def backward(
        self,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor | None,
        saved: Saved,
        needs: Needs,
    ) -> Results:
        """Gradients of input, weight and bias; what is not needed may be anything."""
        ...

    def statistics(self, input: Tensor, saved: Saved, *, differentiable: bool) -> tuple[Tensor | None, Tensor]:
        """Mean and invstd of each set; if ``differentiable``, as functions of the input."""
        ...

    def double_backward(
        self,
        kernels: ModuleType,
        operands: Operands,
        needs: Needs,
    ) -> Results:
        """Gradients of grad_output, input and weight by the layer's function in ``kernels``."""
        ...


def kernels_for(device: torch.device) -> ModuleType:
    """The fastest implementation of the double backward on this device."""
    if device.type == "cuda" and triton.unavailable_reason(device) is None:
        return triton
    return formulas if native.unavailable_reason(device) else native


def normalize(
    layer: Normalization, input: Tensor, weight: Tensor | None, bias: Tensor | None, *buffers: Tensor | None
) -> Tensor:
    """The layer's output, with its derivatives of every order.

    Alive until the second derivative: what PyTorch's own layer keeps, that is input, weight and statistics, and
    grad_output from the first derivative on. Third and higher derivatives are made of plain operators.
    """
    return _Forward.apply(layer, input, weight, bias, *buffers)  # type: ignore[no-untyped-call]


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layer: Normalization, input: Tensor, weight: Tensor | None, bias: Tensor | None, *buffers: Any
    ) -> Tensor:
        output, saved = layer.forward(input, weight, bias, *buffers)
        ctx.layer = layer
        ctx.buffers = len(buffers)
        ctx.save_for_backward(input, weight, *saved)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        input, weight, *saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:4]
        if makes_graph(grad_output):
            arguments = ctx.layer, needs, grad_output, input, weight, *saved
            grads = _Backward.apply(*arguments)  # type: ignore[no-untyped-call]
        else:
            grads = _only(needs, ctx.layer.backward(grad_output, input, weight, saved, needs))
        return None, *grads, *(None for _ in range(ctx.buffers))


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layer: Normalization,
        needs: Needs,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor | None,
        *saved: Any,
    ) -> Results:
        ctx.set_materialize_grads(False)
        ctx.layer = layer
        ctx.save_for_backward(grad_output, input, weight, *saved)
        return _only(needs, layer.backward(grad_output, input, weight, saved, needs))

    @staticmethod
    def backward(ctx: Any, *double_grads: Tensor | None) -> tuple[Any, ...]:
        grad_output, input, weight, *saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:5]
        is_differentiable = torch.is_grad_enabled()
        kernels = formulas if is_differentiable else kernels_for(input.device)
        grads: Results = (None, None, None)
        if any(grad is not None for grad in double_grads):
            statistics = ctx.layer.statistics(input, saved, differentiable=is_differentiable)
            operands = Operands(grad_output, input, weight, *statistics, *double_grads)
            grads = ctx.layer.double_backward(kernels, operands, needs)
        return None, None, *grads, *(None for _ in saved)


def _only(needs: Needs, grads: Results) -> Results:
    first, second, third = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return first, second, third
