"""Layer normalization with a fused double backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gam_fused.second_order import formulas
from gam_fused.second_order.eligibility import has_normalized_shape, is_cast_by_autocast, is_differentiated
from gam_fused.second_order.formulas import Results
from gam_fused.second_order.normalization import Needs, Operands, Saved, normalize


def layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """:func:`torch.nn.functional.layer_norm` with a fused double backward.

    Value and gradient come from the same kernels of PyTorch's. Calls that are not differentiated, or not by autograd
    alone, are passed on to it.

    Args:
        input: (..., *normalized_shape); float32, float64, bfloat16 or float16.
        normalized_shape: the last dimensions of ``input``.
        weight: of shape ``normalized_shape``.
        bias: the same.
        eps: added to the variance.
    """
    if (
        is_differentiated(input, weight, bias)
        and not is_cast_by_autocast(input, weight, bias)
        and has_normalized_shape(tuple(normalized_shape), input, weight, bias)
    ):
        return normalize(LayerNorm(tuple(normalized_shape), eps), input, weight, bias)
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


@dataclass(frozen=True)
class LayerNorm:
    """One call; see :class:`~gam_fused.second_order.normalization.Normalization`."""

    normalized_shape: tuple[int, ...]
    eps: float

    def forward(self, input: Tensor, weight: Tensor | None, bias: Tensor | None, *buffers: Any) -> tuple[Tensor, Saved]:
        """Saves mean and invstd, and the bias, which PyTorch's backward wants to see."""
        output, mean, invstd = torch.native_layer_norm(input, self.normalized_shape, weight, bias, self.eps)
        return output, (mean, invstd, bias)

    def backward(
        self,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor | None,
        saved: Saved,
        needs: Needs,
    ) -> Results:
        """PyTorch's."""
        mean, invstd, bias = saved
        return torch.ops.aten.native_layer_norm_backward(
            grad_output, input, self.normalized_shape, mean, invstd, weight, bias, list(needs)
        )

    def statistics(self, input: Tensor, saved: Saved, *, differentiable: bool) -> tuple[Tensor | None, Tensor]:
        """Of each row."""
        mean, invstd, _ = saved
        assert invstd is not None
        if not differentiable:
            return mean, invstd
        set_dims = tuple(range(-len(self.normalized_shape), 0))
        return formulas.statistics(input, invstd, set_dims, centered=True)

    def double_backward(self, kernels: ModuleType, operands: Operands, needs: Needs) -> Results:
        """In one call."""
        return kernels.layer_norm_double_backward(*operands, len(self.normalized_shape), *needs)


REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {F.layer_norm: layer_norm}
"""PyTorch's functions, and what to call in their place."""
