"""RMS normalization with a fused double backward."""

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
from gam_fused.second_order.graphs import refuse_batch
from gam_fused.second_order.normalization import Needs, Operands, Saved, normalize


def rms_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """:func:`torch.nn.functional.rms_norm` with a fused double backward.

    Calls that are not differentiated, or not by autograd alone, are passed on to PyTorch.

    Args:
        input: (..., *normalized_shape); float32, float64, bfloat16 or float16.
        normalized_shape: the last dimensions of ``input``.
        weight: of shape ``normalized_shape``.
        eps: added to the mean of squares; PyTorch's choice if ``None``.
    """
    if (
        is_differentiated(input, weight)
        and not is_cast_by_autocast(input, weight)
        and has_normalized_shape(tuple(normalized_shape), input, weight)
        and (weight is None or weight.dtype == input.dtype)  # PyTorch's kernels have no mixture of dtypes
    ):
        return normalize(RMSNorm(tuple(normalized_shape), eps), input, weight, None)
    return F.rms_norm(input, normalized_shape, weight, eps)


@dataclass(frozen=True)
class RMSNorm:
    """One call; see :class:`~gam_fused.second_order.normalization.Normalization`."""

    normalized_shape: tuple[int, ...]
    eps: float | None

    def forward(self, input: Tensor, weight: Tensor | None, bias: Tensor | None, *buffers: Any) -> tuple[Tensor, Saved]:
        """Saves invstd, here 1 / sqrt(mean of squares + eps)."""
        output, invstd = torch.ops.aten._fused_rms_norm(input, self.normalized_shape, weight, self.eps)
        return output, (invstd,)

    def backward(
        self,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor | None,
        saved: Saved,
        needs: Needs,
    ) -> Results:
        """PyTorch's kernel where it has one; it has none for the CPU, and composes the backward of plain operators."""
        refuse_batch(grad_output, "rms_norm")
        (invstd,) = saved
        assert invstd is not None
        if input.device.type == "cuda":
            grads = torch.ops.aten._fused_rms_norm_backward(
                grad_output, input, self.normalized_shape, invstd, weight, list(needs[:2])
            )
            return *grads, None
        dtype = formulas.accumulation_dtype(input)
        u, x_hat = grad_output.to(dtype), input.to(dtype) * invstd
        u_x_hat = u * x_hat
        grad_input = grad_weight = None
        if needs[1]:
            assert weight is not None
            grad_weight = u_x_hat.sum_to_size(weight.shape).to(weight.dtype)
        if needs[0]:
            set_dims = self._set_dims()
            if weight is not None:
                u, u_x_hat = u * weight, u_x_hat * weight
            # x̂ takes the result: it is not needed any more, and was made above.
            torch.addcmul(u, x_hat, u_x_hat.mean(set_dims, keepdim=True), value=-1, out=x_hat)
            grad_input = x_hat.mul_(invstd).to(input.dtype)
        return grad_input, grad_weight, None

    def statistics(self, input: Tensor, saved: Saved, *, differentiable: bool) -> tuple[Tensor | None, Tensor]:
        """No mean: the layer subtracts none."""
        (invstd,) = saved
        assert invstd is not None
        if not differentiable:
            return None, invstd
        return None, formulas.statistics(input, invstd, self._set_dims(), centered=False)[1]

    def double_backward(self, kernels: ModuleType, operands: Operands, needs: Needs) -> Results:
        """In one call."""
        return kernels.layer_norm_double_backward(*operands, len(self.normalized_shape), *needs)

    def _set_dims(self) -> tuple[int, ...]:
        return tuple(range(-len(self.normalized_shape), 0))


REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {F.rms_norm: rms_norm}
"""PyTorch's functions, and what to call in their place."""
