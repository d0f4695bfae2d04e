"""A linear layer whose derivatives are matrix products and nothing else.

y = x Wᵀ + b has the gradients g_x = g W, g_W = gᵀ x and g_b = Σ g for an incoming g. Given gradients v_x, v_W, v_b of
these three, the double backward is

    of g:  v_x Wᵀ + x v_Wᵀ + v_b,  the second product added to the first by the routine that computes it
    of x:  g v_W
    of W:  gᵀ v_x

PyTorch records a transposition, a product and a view for each of them, and adds their derivatives one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gam_fused.second_order import autocast
from gam_fused.second_order.graphs import makes_graph
from gam_fused.second_order.sizes import is_worthwhile


class _Linear(torch.autograd.Function):
    """Of rows: (vectors, in) to (vectors, out)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return F.linear(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        gradients = _linear_backward if makes_graph(grad_output) else _gradients
        return gradients(grad_output, rows, weight, ctx.needs_input_grad)


class _LinearBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, grad_output: Tensor, rows: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(grad_output, rows, weight)
        ctx.set_materialize_grads(False)
        return _gradients(grad_output, rows, weight, needs)

    @staticmethod
    def backward(
        ctx: Any, v_rows: Tensor | None, v_weight: Tensor | None, v_bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        # Every operator below is differentiable in turn, so that third derivatives need nothing else.
        grad_output, rows, weight = ctx.saved_tensors
        needs_grad_output, needs_rows, needs_weight, _ = ctx.needs_input_grad
        of_grad_output = of_rows = of_weight = None
        if needs_grad_output:
            of_grad_output = _of_grad_output(grad_output, rows, weight, v_rows, v_weight, v_bias)
        if needs_rows and v_weight is not None:
            of_rows = grad_output @ v_weight
        if needs_weight and v_rows is not None:
            of_weight = grad_output.t() @ v_rows
        return of_grad_output, of_rows, of_weight, None


_linear: Callable[..., Tensor] = _Linear.apply
_linear_backward: Callable[..., tuple[Tensor | None, ...]] = _LinearBackward.apply


def _gradients(
    grad_output: Tensor, rows: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    needs_rows, needs_weight, needs_bias = needs
    return (
        grad_output @ weight if needs_rows else None,
        grad_output.t() @ rows if needs_weight else None,
        grad_output.sum(0) if needs_bias else None,
    )


def _of_grad_output(
    grad_output: Tensor,
    rows: Tensor,
    weight: Tensor,
    v_rows: Tensor | None,
    v_weight: Tensor | None,
    v_bias: Tensor | None,
) -> Tensor | None:
    """v_x Wᵀ + x v_Wᵀ + v_b."""
    if v_weight is not None:
        result = F.linear(rows, v_weight, v_bias)
        if v_rows is None:
            return result
        # Where autocast is on around this derivative, it casts for all products but those in place.
        add = result.addmm_ if result.dtype == v_rows.dtype == weight.dtype else partial(torch.addmm, result)
        return add(v_rows, weight.t())
    if v_rows is not None:
        return F.linear(v_rows, weight, v_bias)
    return None if v_bias is None else v_bias.expand_as(grad_output)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`torch.nn.functional.linear`, to be differentiated twice.

    Small ones gain nothing and are left to PyTorch.

    Args:
        input: (..., in).
        weight: (out, in); one of a single dimension is left to PyTorch.
        bias: (out,); others that PyTorch broadcasts are left to it.
    """
    has_shapes = input.dim() >= 2 and weight.dim() == 2 and (bias is None or bias.dim() == 1)
    if not has_shapes or not is_worthwhile(input):
        return F.linear(input, weight, bias)
    # Rows once and for all: each product would make its own copy of an input with gaps.
    rows = _linear(*autocast.to_lower_precision("linear", input.flatten(0, -2), weight, bias))
    return rows if input.dim() == 2 else rows.view(*input.shape[:-1], rows.shape[-1])


REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {F.linear: linear}
