"""Group and instance normalization with a fused double backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gam_fused.second_order import formulas
from gam_fused.second_order.batch_norm import batch_norm
from gam_fused.second_order.eligibility import is_cast_by_autocast, is_differentiated
from gam_fused.second_order.formulas import Results
from gam_fused.second_order.graphs import refuse_batch
from gam_fused.second_order.native import memory_format
from gam_fused.second_order.normalization import Needs, Operands, Saved, normalize


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """:func:`torch.nn.functional.group_norm` with a fused double backward.

    Value and gradient come from PyTorch's kernels, the gradient also where PyTorch itself would compose it of plain
    operators, as it does when it is to be differentiated once more. Calls that are not differentiated, or not by
    autograd alone, and those that PyTorch refuses, are passed on to it.

    Args:
        input: (N, C, ...); float32, float64, bfloat16 or float16; on the CPU, channels_last stays channels_last.
        num_groups: divides C.
        weight: (C,).
        bias: (C,).
        eps: added to the variance.
    """
    if (
        is_differentiated(input, weight, bias)
        and not is_cast_by_autocast(input, weight, bias)
        and is_valid(input, num_groups, weight, bias)
    ):
        kept = memory_format(input) if input.device.type == "cpu" else torch.contiguous_format
        return normalize(GroupNorm(num_groups, eps), input.contiguous(memory_format=kept), weight, bias)
    return F.group_norm(input, num_groups, weight, bias, eps)


def is_valid(input: Tensor, num_groups: int, *parameters: Tensor | None) -> bool:
    """Whether ``torch.nn.functional.group_norm`` has nothing to say against it; what it says is left to it."""
    if input.dim() < 2 or num_groups < 1 or input.shape[1] % num_groups != 0 or input.numel() == input.shape[1]:
        return False
    return all(each is None or each.shape == (input.shape[1],) for each in parameters)


@dataclass(frozen=True)
class GroupNorm:
    """One call; see :class:`~gam_fused.second_order.normalization.Normalization`."""

    num_groups: int
    eps: float

    def forward(self, input: Tensor, weight: Tensor | None, bias: Tensor | None, *buffers: Any) -> tuple[Tensor, Saved]:
        """Saves mean and invstd. The input is contiguous or, on the CPU, channels_last."""
        if weight is not None:
            weight = weight.contiguous()
        if bias is not None:
            bias = bias.contiguous()
        sizes = input.shape[0], input.shape[1], math.prod(input.shape[2:])
        output, mean, invstd = torch.native_group_norm(input, weight, bias, *sizes, self.num_groups, self.eps)
        return output, (mean, invstd)

    def backward(
        self,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor | None,
        saved: Saved,
        needs: Needs,
    ) -> Results:
        """PyTorch's, which wants both tensors laid out alike."""
        refuse_batch(grad_output, "group_norm")
        if weight is not None:
            weight = weight.contiguous()
        return torch.ops.aten.native_group_norm_backward(
            grad_output.contiguous(memory_format=memory_format(input)),
            input,
            *saved,
            weight,
            input.shape[0],
            input.shape[1],
            math.prod(input.shape[2:]),
            self.num_groups,
            list(needs),
        )

    def statistics(self, input: Tensor, saved: Saved, *, differentiable: bool) -> tuple[Tensor | None, Tensor]:
        """Of each group of each sample."""
        mean, invstd = saved
        assert invstd is not None
        if not differentiable:
            return mean, invstd
        groups = formulas.in_groups(input, self.num_groups)
        return formulas.statistics(groups, invstd.view(-1, self.num_groups, 1, 1), formulas.GROUP_DIMS, centered=True)

    def double_backward(self, kernels: ModuleType, operands: Operands, needs: Needs) -> Results:
        """In one call."""
        return kernels.group_norm_double_backward(*operands, self.num_groups, *needs)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """:func:`torch.nn.functional.instance_norm` with a fused double backward.

    As in PyTorch, this is batch normalization of one sample in which every channel of every sample is a channel of its
    own, and running statistics become the mean over samples of what they become there.

    Args:
        input: (N, C, ...); float32, float64, bfloat16 or float16.
        running_mean: (C,), updated in place if ``use_input_stats``; not needed then.
        running_var: the same.
        weight: (C,).
        bias: (C,).
        use_input_stats: normalize by statistics of the input, not by the running ones.
        momentum: how far running statistics go towards those of the input.
        eps: added to the variance.
    """
    arguments = (input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    running = [each for each in (running_mean, running_var) if each is not None]
    if (
        not is_differentiated(input, weight, bias, *running)
        or any(each.requires_grad for each in running)
        or input.dim() < 3
        or math.prod(input.shape[2:]) == 1
        or (not use_input_stats and len(running) < 2)
        or any(each.shape != (input.shape[1],) for each in (weight, bias, *running) if each is not None)
    ):
        return F.instance_norm(*arguments)
    batch, channels, *spatial = input.shape
    repeated = [None if each is None else each.repeat(batch) for each in (running_mean, running_var, weight, bias)]
    one_sample = input.contiguous().view(1, batch * channels, *spatial)
    means, variances, weights, biases = repeated
    output = batch_norm(one_sample, means, variances, weights, biases, use_input_stats, momentum, eps)
    if use_input_stats:
        for buffer, of_samples in ((running_mean, means), (running_var, variances)):
            if buffer is not None and of_samples is not None:
                buffer.copy_(of_samples.view(batch, channels).mean(0))
    return output.view(input.shape)


REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {F.group_norm: group_norm, F.instance_norm: instance_norm}
"""PyTorch's functions, and what to call in their place."""
