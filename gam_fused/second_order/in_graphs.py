"""The layers that are worth their place in a graph that a compiler will optimize.

A compiler fuses what PyTorch composes of elementwise operators and reductions of rows, better than a layer that nothing
can be fused with. What is left are convolutions, into which it fuses nothing; batch and group normalization, whose
composite double backwards take more passes over memory than need be; functions whose second derivative is wrong in
PyTorch; and embeddings, whose double backward makes a graph for one size of batch only, as do those of convolutions and
of batch normalization.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gam_fused.second_order import convolution, embedding, formulas, native, recurrent, weight_norm
from gam_fused.second_order.batch_norm import BatchNorm
from gam_fused.second_order.eligibility import is_cast_by_autocast
from gam_fused.second_order.formulas import Results
from gam_fused.second_order.group_norm import GroupNorm, is_valid
from gam_fused.second_order.normalization import Needs, Operands, Saved, normalize


class LayersInGraphs(TorchFunctionMode):
    """Where functions of PyTorch run on these layers, for a forward pass that is traced with its derivatives.

    Without the checks of :func:`gam_fused.second_order.layers`, which refuses to be traced. Without ``reroutes``, only
    where PyTorch's own second derivatives are wrong.
    """

    def __init__(self, *, reroutes: bool) -> None:
        super().__init__()
        self._table = _REPLACEMENTS if reroutes else _CORRECTIONS

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._table.get(func, func)(*args, **kwargs or {})


class _BatchNorm(BatchNorm):
    # By operators that have a shape function: cuDNN's choice of them, and what is no operator, cannot be traced.

    def forward(self, input: Tensor, weight: Tensor | None, bias: Tensor | None, *buffers: Any) -> tuple[Tensor, Saved]:
        running_mean, running_var = buffers
        output, mean, invstd = torch.native_batch_norm(
            input, weight, bias, running_mean, running_var, self.training, self.momentum, self.eps
        )
        return output, (mean, invstd, None, *((None, None) if self.training else buffers))

    def backward(
        self, grad_output: Tensor, input: Tensor, weight: Tensor | None, saved: Saved, needs: Needs
    ) -> Results:
        mean, invstd, _, *running = saved
        return torch.ops.aten.native_batch_norm_backward(
            grad_output, input, weight, *running, mean, invstd, self.training, self.eps, list(needs)
        )

    def double_backward(self, kernels: ModuleType, operands: Operands, needs: Needs) -> Results:
        return super().double_backward(_kernels(operands.input), operands, needs)


class _GroupNorm(GroupNorm):
    def double_backward(self, kernels: ModuleType, operands: Operands, needs: Needs) -> Results:
        return super().double_backward(_kernels(operands.input), operands, needs)


def _kernels(input: Tensor) -> ModuleType:
    return native if _is_native(input) else formulas


def _is_native(input: Tensor) -> bool:
    return native.unavailable_reason(input.device) is None


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if input.dim() < 2 or (training and input.numel() == input.shape[1]):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)  # which objects
    return normalize(_BatchNorm(training, momentum, eps), input, weight, bias, running_mean, running_var)


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    # The formulas gain nothing here.
    if (
        not _is_native(input)
        or is_cast_by_autocast(input, weight, bias)
        or not is_valid(input, num_groups, weight, bias)
    ):
        return F.group_norm(input, num_groups, weight, bias, eps)
    dense = input.contiguous(memory_format=native.memory_format(input))
    return normalize(_GroupNorm(num_groups, eps), dense, weight, bias)


_CORRECTIONS: dict[Callable[..., Any], Callable[..., Any]] = {**recurrent.REPLACEMENTS, **weight_norm.REPLACEMENTS}
_REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    **_CORRECTIONS,
    **convolution.REPLACEMENTS,
    **embedding.REPLACEMENTS,
    F.batch_norm: _batch_norm,
    F.group_norm: _group_norm,
    torch.batch_norm: lambda input, weight, bias, mean, var, training, momentum, eps, cudnn_enabled: _batch_norm(
        input, mean, var, weight, bias, training, momentum, eps
    ),
}
