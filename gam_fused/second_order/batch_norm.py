"""Batch normalization with a fused double backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gam_fused.second_order import formulas
from gam_fused.second_order.eligibility import is_differentiated
from gam_fused.second_order.formulas import Results
from gam_fused.second_order.normalization import Needs, Operands, Saved, normalize


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """:func:`torch.nn.functional.batch_norm` with a fused double backward.

    Value, gradient and running statistics come from the same kernels of PyTorch's. Calls that are not differentiated,
    or not by autograd alone, and those that PyTorch refuses, are passed on to it.

    Args:
        input: (N, C) or (N, C, ...); float32, float64, bfloat16 or float16; channels_last stays channels_last.
        running_mean: (C,), updated in place if ``training``; not needed then.
        running_var: the same.
        weight: (C,).
        bias: (C,).
        training: normalize by statistics of the batch, not by the running ones.
        momentum: how far running statistics go towards those of the batch.
        eps: added to the variance.
    """
    if (
        is_differentiated(input, weight, bias)
        and _are_buffers(input, running_mean, running_var)
        and _is_valid(input, running_mean, running_var, training, eps)
    ):
        return normalize(BatchNorm(training, momentum, eps), input, weight, bias, running_mean, running_var)
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _are_buffers(input: Tensor, *running: Tensor | None) -> bool:
    return all(
        each is None or (type(each) is Tensor and each.device == input.device and not each.requires_grad)
        for each in running
    )


def _is_valid(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, training: bool, eps: float
) -> bool:
    """Whether ``torch.nn.functional.batch_norm`` has nothing to say against it; what it says is left to it."""
    if input.dim() < 2:
        return False
    if training:
        return input.numel() > input.shape[1] and eps > 0
    return running_mean is not None and running_var is not None and eps >= 0


@dataclass
class BatchNorm:
    """One call; see :class:`~gam_fused.second_order.normalization.Normalization`."""

    training: bool
    momentum: float
    eps: float
    implementation: int = 0  # PyTorch's, cuDNN's or another, as the forward chose; its backward has to be the same

    def forward(self, input: Tensor, weight: Tensor | None, bias: Tensor | None, *buffers: Any) -> tuple[Tensor, Saved]:
        """Saves no running statistics in training, where they are updated and not needed."""
        running_mean, running_var = buffers
        output, mean, invstd, reserve, self.implementation = torch._batch_norm_impl_index(
            input,
            weight,
            bias,
            running_mean,
            running_var,
            self.training,
            self.momentum,
            self.eps,
            torch.backends.cudnn.enabled,
        )
        return output, (mean, invstd, reserve, *((None, None) if self.training else buffers))

    def backward(
        self,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor | None,
        saved: Saved,
        needs: Needs,
    ) -> Results:
        """By the implementation of the forward."""
        mean, invstd, reserve, *running = saved
        return torch.ops.aten._batch_norm_impl_index_backward(
            self.implementation,
            input,
            grad_output,
            weight,
            *running,
            mean,
            invstd,
            self.training,
            self.eps,
            list(needs),
            reserve,
        )

    def statistics(self, input: Tensor, saved: Saved, *, differentiable: bool) -> tuple[Tensor | None, Tensor]:
        """Of the batch, or the running ones."""
        mean, invstd, _, running_mean, running_var = saved
        if not self.training:
            assert running_var is not None
            return running_mean, (running_var.to(formulas.accumulation_dtype(input)) + self.eps).rsqrt()
        assert invstd is not None
        if not differentiable:
            return mean, invstd
        shape = formulas.channel_shape(input)
        set_dims = formulas.channel_dims(input)
        return formulas.statistics(input, invstd.view(shape), set_dims, centered=True)

    def double_backward(self, kernels: ModuleType, operands: Operands, needs: Needs) -> Results:
        """In one call."""
        return kernels.batch_norm_double_backward(*operands, self.training, *needs)


REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {F.batch_norm: batch_norm}
"""PyTorch's functions, and what to call in their place."""
