"""The double backward of normalization layers in plain, differentiable operators, on any device.

A layer normalizes sets of elements: with x̂ = (input - mean) · invstd, mean and invstd of the set, its backward is, for
u = grad_output and g = weight · u,

    grad_input = invstd · P(g),  P(g) = g - mean(g) - x̂ · mean(g · x̂)
    grad_weight = Σ u · x̂,  grad_bias = Σ u  over the elements that share a weight.

Differentiating <gg_input, grad_input> + <gg_weight, grad_weight> + <gg_bias, grad_bias>, with P symmetric and
∂invstd/∂input = -invstd² · x̂ / (elements of the set), gives, with v = gg_input,

    for grad_output   weight · invstd · P(v) + gg_weight · x̂ + gg_bias
    for weight        Σ u · invstd · P(v)
    for input         invstd · P(h) - invstd² · x̂ · mean(v · P(g))
                      with h = gg_weight · u - invstd · (v · mean(g · x̂) + g · mean(v · x̂)).

RMS normalization subtracts no mean, in x̂ and in P. Where mean and invstd are constants (batch normalization in
evaluation), P is the identity and h = gg_weight · u, without the last term for input.

The functions have the signatures of the operators of the same names under ``torch.ops.gam_fused``, and are what these
are tested against. They compute in float32 or float64. Results not asked for are ``None``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Results = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Gradients of grad_output, input and weight."""


def batch_norm_double_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    gg_input: Tensor | None,
    gg_weight: Tensor | None,
    gg_bias: Tensor | None,
    training: bool,
    needs_grad_output: bool,
    needs_input: bool,
    needs_weight: bool,
) -> Results:
    """For ``input`` of shape (N, C, ...) and everything else of shape (C,); constant statistics unless ``training``."""
    shape = channel_shape(input)
    grads = _double_backward(
        grad_output,
        input,
        _reshaped(weight, shape),
        mean.reshape(shape),
        invstd.reshape(shape),
        gg_input,
        _reshaped(gg_weight, shape),
        _reshaped(gg_bias, shape),
        set_dims=channel_dims(input),
        constant_statistics=not training,
        needs=(needs_grad_output, needs_input, needs_weight),
    )
    return _like(grads, grad_output, input, weight)


def group_norm_double_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    gg_input: Tensor | None,
    gg_weight: Tensor | None,
    gg_bias: Tensor | None,
    num_groups: int,
    needs_grad_output: bool,
    needs_input: bool,
    needs_weight: bool,
) -> Results:
    """For ``input`` of shape (N, C, ...), statistics of shape (N, num_groups) and the rest of shape (C,)."""
    per_weight = (1, num_groups, input.shape[1] // num_groups, 1)
    grads = _double_backward(
        in_groups(grad_output, num_groups),
        in_groups(input, num_groups),
        _reshaped(weight, per_weight),
        mean.reshape(-1, num_groups, 1, 1),
        invstd.reshape(-1, num_groups, 1, 1),
        None if gg_input is None else in_groups(gg_input, num_groups),
        _reshaped(gg_weight, per_weight),
        _reshaped(gg_bias, per_weight),
        set_dims=GROUP_DIMS,
        needs=(needs_grad_output, needs_input, needs_weight),
    )
    return _like(grads, grad_output, input, weight)


def layer_norm_double_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor,
    gg_input: Tensor | None,
    gg_weight: Tensor | None,
    gg_bias: Tensor | None,
    normalized_dims: int,
    needs_grad_output: bool,
    needs_input: bool,
    needs_weight: bool,
) -> Results:
    """For sets in the last ``normalized_dims`` dimensions; RMS normalization where ``mean`` is ``None``."""
    set_dims = tuple(range(-normalized_dims, 0))
    per_set = (*input.shape[:-normalized_dims], *(1 for _ in set_dims))
    grads = _double_backward(
        grad_output,
        input,
        weight,
        None if mean is None else mean.reshape(per_set),
        invstd.reshape(per_set),
        gg_input,
        gg_weight,
        gg_bias,
        set_dims=set_dims,
        needs=(needs_grad_output, needs_input, needs_weight),
    )
    return _like(grads, grad_output, input, weight)


GROUP_DIMS = (2, 3)
"""The dimensions of a set in what :func:`in_groups` returns."""


def in_groups(tensor: Tensor, num_groups: int) -> Tensor:
    """(N, C, ...) as (N, groups, channels of a group, elements)."""
    batch, channels, *spatial = tensor.shape
    return tensor.reshape(batch, num_groups, channels // num_groups, math.prod(spatial))


def channel_shape(input: Tensor) -> tuple[int, ...]:
    """What one number for each channel of (N, C, ...) has to look like beside it."""
    return (1, -1, *(1 for _ in input.shape[2:]))


def channel_dims(input: Tensor) -> tuple[int, ...]:
    """All dimensions but that of the channels."""
    return (0, *range(2, input.dim()))


def accumulation_dtype(input: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def statistics(input: Tensor, invstd: Tensor, set_dims: tuple[int, ...], *, centered: bool) -> tuple[Tensor, Tensor]:
    """Mean and invstd as differentiable functions of the input, invstd with the values of the one given.

    That is 1 / sqrt(variance + eps), whatever eps was; with ``centered=False`` the mean of squares takes the place of
    the variance, and the mean is meaningless. ``invstd`` keeps the dimensions of ``input``, those of the set being 1.
    """
    x = input.to(accumulation_dtype(input))
    mean = x.mean(set_dims, keepdim=True)
    variance = ((x - mean if centered else x) ** 2).mean(set_dims, keepdim=True)
    eps = (invstd.to(x.dtype) ** -2 - variance).detach()
    return mean, (variance + eps).rsqrt()


def _double_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor,
    gg_input: Tensor | None,
    gg_weight: Tensor | None,
    gg_bias: Tensor | None,
    *,
    set_dims: tuple[int, ...],
    constant_statistics: bool = False,
    needs: tuple[bool, bool, bool],
) -> Results:
    """All tensors broadcast against ``input``; the gradient of the weight has ``weight``'s shape."""
    dtype = accumulation_dtype(input)
    x, u = input.to(dtype), grad_output.to(dtype)
    zero, one = x.new_zeros(()), x.new_ones(())
    w = one if weight is None else weight.to(dtype)
    v = zero.expand_as(x) if gg_input is None else gg_input.to(dtype)
    a = zero if gg_weight is None else gg_weight.to(dtype)
    b = zero if gg_bias is None else gg_bias.to(dtype)
    r = invstd.to(dtype)
    x_hat = (x if mean is None else x - mean.to(dtype)) * r

    def average(values: Tensor) -> Tensor:
        return values.mean(set_dims, keepdim=True)

    def projection(values: Tensor) -> Tensor:
        if constant_statistics:
            return values
        centered = values if mean is None else values - average(values)
        return centered - x_hat * average(values * x_hat)

    for_grad_output = for_input = for_weight = None
    p_v = r * projection(v)
    if needs[0]:
        for_grad_output = w * p_v + a * x_hat + b
    if needs[1]:
        if constant_statistics:
            for_input = (a * r * u).expand_as(x)
        else:
            g = w * u
            h = a * u - r * (v * average(g * x_hat) + g * average(v * x_hat))
            for_input = r * projection(h) - r**2 * x_hat * average(v * projection(g))
    if needs[2]:
        assert weight is not None
        for_weight = (u * p_v).sum_to_size(weight.shape)
    return for_grad_output, for_input, for_weight


def _reshaped(tensor: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    return None if tensor is None else tensor.reshape(shape)


def _like(grads: Results, *tensors: Tensor | None) -> Results:
    """In the shapes and dtypes of what they are gradients of."""
    first, second, third = (
        None if grad is None or tensor is None else grad.reshape(tensor.shape).to(tensor.dtype)
        for grad, tensor in zip(grads, tensors, strict=True)
    )
    return first, second, third
