"""Scaled dot-product attention with a double backward, on fused kernels that have none.

Of one head with queries q [L, E], keys k [S, E] and values v [S, E_v], with scale s, additive mask m and dropout d
(keep / (1 − p), or 1):

    A = s q kᵀ + m        P = softmax(A)        y = (P ∘ d) v

The gradients for an incoming g [L, E_v], where J(w) = P ∘ (w − Σ P w) is the softmax's own (symmetric) derivative:

    W = (g vᵀ) ∘ d        g_q = s J(W) k        g_k = s J(W)ᵀ q        g_v = (P ∘ d)ᵀ g

The double backward, for incoming a, b, c in the shapes of q, k, v, with T = s (a kᵀ + q bᵀ), the change of A:

    of g:  (J(T) ∘ d) v + (P ∘ d) c
    of v:  (J(T) ∘ d)ᵀ g
    of q:  s (J(Z) k + J(W) b),  of k: s (J(Z)ᵀ q + J(W)ᵀ a)   with Z = (W − Σ P W) ∘ (T − Σ P T) + (g cᵀ) ∘ d

Forward and backward run on the fused kernel of the CPU where it serves, and otherwise as the double backward does: on
blocks of heads (:mod:`~gam_fused.second_order.attention_blocks`). Nothing of the size of an attention matrix is saved
but the mask of a dropout, one byte per element.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gam_fused.second_order import autocast
from gam_fused.second_order.attention_blocks import Options, backward, double_backward, forward, whole_mask
from gam_fused.second_order.graphs import refuse_batch
from gam_fused.second_order.third_order import differentiable_double_backward

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class _Attention(torch.autograd.Function):
    """Of q [B, H, L, E], k [B, H, S, E], v [B, H, S, E_v], mask (floating, broadcasts to [B, H, L, S]) and keep."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        keep: Tensor | None,
        options: Options,
    ) -> Tensor:
        ctx.options = options
        ctx.fused = _is_fused(query, key, value, mask, keep)
        if ctx.fused:
            output, logsumexp = _flash(query, key, value, 0.0, options.is_causal, attn_mask=mask, scale=options.scale)
            ctx.save_for_backward(query, key, value, mask, keep, output, logsumexp)
            return output
        ctx.save_for_backward(query, key, value, mask, keep)
        return forward(query, key, value, mask, keep, options)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, keep, *results = ctx.saved_tensors
        refuse_batch(grad_output, "scaled_dot_product_attention")
        results = tuple(result.detach() for result in results)
        function = _attention_backward if torch.is_grad_enabled() else _first_backward
        return *function(grad_output, query, key, value, mask, keep, ctx.options, results), None, None, None


class _AttentionBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        keep: Tensor | None,
        options: Options,
        results: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        ctx.options = options
        ctx.save_for_backward(grad_output, query, key, value, mask, keep)
        return _first_backward(grad_output, query, key, value, mask, keep, options, results)

    @staticmethod
    def backward(ctx: Any, *double_grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, query, key, value, mask, keep = ctx.saved_tensors
        if torch.is_grad_enabled():
            grads = differentiable_double_backward(
                lambda q, k, v: by_matrix_products(q, k, v, mask, keep, ctx.options),
                [query, key, value],
                grad_output,
                double_grads,
            )
            return *grads, None, None, None, None
        inputs = (grad_output, query, key, value, *double_grads)
        grads = double_backward(inputs, mask, keep, ctx.options, ctx.needs_input_grad)
        return *grads, None, None, None, None


_attention: Callable[..., Tensor] = _Attention.apply
_attention_backward: Callable[..., tuple[Tensor, ...]] = _AttentionBackward.apply


def by_matrix_products(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, keep: Tensor | None, options: Options
) -> Tensor:
    """Attention in differentiable operators of PyTorch: the definition."""
    scores = query @ key.mT * options.scale
    mask = whole_mask(query, key, mask, options)
    probabilities = torch.softmax(scores, -1) if mask is None else torch._safe_softmax(scores + mask, -1)
    if keep is not None:
        probabilities = probabilities * keep / (1 - options.dropout)
    return probabilities.to(value.dtype) @ value


def _is_fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, keep: Tensor | None) -> bool:
    return (
        query.device.type == "cpu"
        and keep is None
        and query.shape[-1] == value.shape[-1]
        and query.numel() > 0
        and value.numel() > 0
        # What the kernel takes for granted of all three.
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        and (mask is None or mask.dtype == query.dtype)
    )


def _first_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    keep: Tensor | None,
    options: Options,
    results: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    if results:
        output, logsumexp = results
        return _flash_backward(
            grad_output,
            query,
            key,
            value,
            output,
            logsumexp,
            0.0,
            options.is_causal,
            attn_mask=mask,
            scale=options.scale,
        )
    return backward(grad_output, query, key, value, mask, keep, options)


# ------------------------------------------------------------------ in the place of PyTorch's


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """:func:`torch.nn.functional.scaled_dot_product_attention`, to be differentiated twice.

    Arguments, shapes and result as there. With dropout, the draws are those of PyTorch's plain form
    (``SDPBackend.MATH``) on the CPU. A mask that requires gradients, and whatever is an error, is left to PyTorch.
    """
    query, key, value = autocast.to_lower_precision("scaled_dot_product_attention", query, key, value)
    shapes = _shapes(query, key, value, attn_mask, is_causal, enable_gqa)
    if shapes is None or dropout_p >= 1:  # nothing is kept, or it is an error
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    leading, heads = shapes
    if enable_gqa and heads > 1:
        key, value = (tensor.repeat_interleave(heads // tensor.shape[-3], -3) for tensor in (key, value))
    mask = None if attn_mask is None else _additive(attn_mask, query.dtype)
    if len(leading) != 2:
        query, key, value = (_as_4d(tensor, leading) for tensor in (query, key, value))
        mask = None if mask is None else _as_4d(mask, leading)
    elif mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
    keep = None
    if dropout_p > 0:
        keep = torch.empty(*query.shape[:3], key.shape[2], dtype=torch.bool, device=query.device)
        keep.bernoulli_(1 - dropout_p)
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1]) if query.shape[-1] else 1.0
    output = _attention(query, key, value, mask, keep, Options(scale, is_causal, dropout_p))
    return output if len(leading) == 2 else output.reshape(*leading, *output.shape[2:])


def _shapes(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, grouped: bool
) -> tuple[tuple[int, ...], int] | None:
    """The dimensions before [L, E], and the number of heads; ``None`` for what is PyTorch's to compute or to refuse."""
    leading = tuple(query.shape[:-2])
    if min(query.dim(), key.dim(), value.dim()) < 2 or not query.dtype == key.dtype == value.dtype:
        return None
    if key.shape[-1] != query.shape[-1] or value.shape[-2] != key.shape[-2] or (is_causal and mask is not None):
        return None
    if mask is not None and (mask.requires_grad or not (mask.dtype == torch.bool or mask.is_floating_point())):
        return None
    heads = leading[-1] if leading else 1
    if grouped:
        if query.dim() < 3 or any(not t.shape[-3] or heads % t.shape[-3] for t in (key, value)):
            return None
        if not leading[:-1] == tuple(key.shape[:-3]) == tuple(value.shape[:-3]):
            return None
    elif not leading == tuple(key.shape[:-2]) == tuple(value.shape[:-2]):
        return None
    if mask is not None:
        whole = (*leading, query.shape[-2], key.shape[-2])
        fits = mask.dim() <= len(whole) and all(
            size in (1, full) for size, full in zip(reversed(mask.shape), reversed(whole), strict=False)
        )
        if not fits or mask.dim() < 2:
            return None
    return leading, heads


def _as_4d(tensor: Tensor, leading: tuple[int, ...]) -> Tensor:
    """[*leading, …, …] as [B, H, …, …]; a mask may lack leading dimensions, or have ones in their place."""
    if tensor.dim() - 2 < len(leading) or tuple(tensor.shape[:-2]) != leading:
        if all(size == 1 for size in tensor.shape[:-2]):
            return tensor.reshape(1, 1, *tensor.shape[-2:])
        tensor = tensor.expand(*leading, *tensor.shape[-2:])
    return tensor.reshape(-1, leading[-1] if leading else 1, *tensor.shape[-2:])


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    return mask.to(dtype)


REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: scaled_dot_product_attention,
}
