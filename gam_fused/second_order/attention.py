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

Forward and backward run on the fused kernel of the CPU where it serves, and otherwise like the double backward: over
blocks of as many heads as fit a cache, at least one, so that no attention matrix outlives its block. Nothing of the
size of an attention matrix is saved but the mask of a dropout, one byte per element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gam_fused.second_order import autocast
from gam_fused.second_order.third_order import differentiable_double_backward

# Elements of one attention matrix per block: half a dozen of them are at work at a time, and have to fit the cache of
# a core; on an accelerator they have to be worth a launch.
_BLOCK = {"cpu": 1 << 16}
_BLOCK_ELSEWHERE = 1 << 24

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class _Options(NamedTuple):
    scale: float
    is_causal: bool
    dropout: float


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
        options: _Options,
    ) -> Tensor:
        ctx.options = options
        ctx.fused = _is_fused(query, value, mask, keep)
        if ctx.fused:
            output, logsumexp = _flash(query, key, value, 0.0, options.is_causal, attn_mask=mask, scale=options.scale)
            ctx.save_for_backward(query, key, value, mask, keep, output, logsumexp)
            return output
        ctx.save_for_backward(query, key, value, mask, keep)
        return _forward(query, key, value, mask, keep, options)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, keep, *results = ctx.saved_tensors
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
        options: _Options,
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
        grads = _double_backward(inputs, mask, keep, ctx.options, ctx.needs_input_grad)
        return *grads, None, None, None, None


_attention: Callable[..., Tensor] = _Attention.apply
_attention_backward: Callable[..., tuple[Tensor, ...]] = _AttentionBackward.apply


def by_matrix_products(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, keep: Tensor | None, options: _Options
) -> Tensor:
    """Attention in differentiable operators of PyTorch: the definition."""
    scores = query @ key.mT * options.scale
    mask = _whole_mask(query, key, mask, options)
    probabilities = torch.softmax(scores, -1) if mask is None else torch._safe_softmax(scores + mask, -1)
    if keep is not None:
        probabilities = probabilities * keep / (1 - options.dropout)
    return probabilities.to(value.dtype) @ value


def _is_fused(query: Tensor, value: Tensor, mask: Tensor | None, keep: Tensor | None) -> bool:
    return (
        query.device.type == "cpu"
        and keep is None
        and query.shape[-1] == value.shape[-1]
        and query.numel() > 0
        and value.numel() > 0
        and query.stride(-1) == value.stride(-1) == 1
        and (mask is None or mask.dtype == query.dtype)
    )


def _first_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    keep: Tensor | None,
    options: _Options,
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
    return _backward(grad_output, query, key, value, mask, keep, options)


# ------------------------------------------------------------------ over blocks of heads


class _Blocks:
    """Tensors [B, H, …] as [B·H, …], and blocks of their first dimension.

    Narrow floating numbers are computed with in float32, block by block.
    """

    def __init__(self, query: Tensor, key: Tensor, mask: Tensor | None, keep: Tensor | None, options: _Options) -> None:
        self._heads = query.shape[1]
        self._mask = _whole_mask(query, key, mask, options)
        self._keep = None if keep is None else keep.flatten(0, 1)
        self._kept = 1 - options.dropout
        self._count = query.shape[0] * self._heads
        matrix = max(1, query.shape[2] * key.shape[2])
        self._size = max(1, _BLOCK.get(query.device.type, _BLOCK_ELSEWHERE) // matrix)
        narrow = query.dtype in (torch.float16, torch.bfloat16)
        self._dtype = torch.float32 if narrow else query.dtype
        self._scale = options.scale

    def __iter__(self) -> Iterator[slice]:
        return (slice(at, min(at + self._size, self._count)) for at in range(0, self._count, self._size))

    def take(self, block: slice, *tensors: Tensor) -> Iterator[Tensor]:
        """The block of each of these [B·H, …], in the dtype to compute with."""
        return (tensor[block].to(self._dtype) for tensor in tensors)

    def probabilities(self, block: slice, query: Tensor, key: Tensor) -> Tensor:
        """P of the block."""
        scores = torch.bmm(query, key.mT).mul_(self._scale)
        if self._mask is None:
            return torch._softmax(scores, -1, False)
        return torch._safe_softmax(scores.add_(self._mask_of(block)), -1)

    def dropout(self, block: slice, matrix: Tensor) -> Tensor:
        """``matrix`` ∘ d: a new tensor, unless there is no dropout."""
        return matrix if self._keep is None else torch.mul(matrix, self._keep[block]).div_(self._kept)

    def _mask_of(self, block: slice) -> Tensor:
        assert self._mask is not None
        batches, heads = self._mask.shape[:2]
        if batches == heads == 1:
            return self._mask[0]
        index = torch.arange(block.start, block.stop, device=self._mask.device)
        batch, head = index // self._heads, index % self._heads
        return self._mask[batch if batches > 1 else 0, head if heads > 1 else 0]


def _whole_mask(query: Tensor, key: Tensor, mask: Tensor | None, options: _Options) -> Tensor | None:
    """The additive mask as [B or 1, H or 1, …], causal or not."""
    if options.is_causal:
        shape = query.shape[-2], key.shape[-2]
        return torch.full(shape, -torch.inf, dtype=query.dtype, device=query.device).triu_(1)[None, None]
    return mask


def _flat(*tensors: Tensor) -> list[Tensor]:
    return [tensor.flatten(0, 1) for tensor in tensors]


def _softmax_derivative(change: Tensor, probabilities: Tensor) -> Tensor:
    """J(w) = P ∘ (w − Σ P w)."""
    return torch._softmax_backward_data(change, probabilities, -1, probabilities.dtype)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, keep: Tensor | None, options: _Options
) -> Tensor:
    blocks = _Blocks(query, key, mask, keep, options)
    output = value.new_empty(*query.shape[:3], value.shape[3])
    out = output.flatten(0, 1)
    inputs = _flat(query, key, value)
    for block in blocks:
        q, k, v = blocks.take(block, *inputs)
        out[block] = torch.bmm(blocks.dropout(block, blocks.probabilities(block, q, k)), v)
    return output


def _backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    keep: Tensor | None,
    options: _Options,
) -> tuple[Tensor, Tensor, Tensor]:
    blocks = _Blocks(query, key, mask, keep, options)
    of_query, of_key, of_value = (_empty_like(tensor) for tensor in (query, key, value))
    out_query, out_key, out_value = _flat(of_query, of_key, of_value)
    inputs = _flat(grad_output, query, key, value)
    for block in blocks:
        g, q, k, v = blocks.take(block, *inputs)
        probabilities = blocks.probabilities(block, q, k)
        out_value[block] = torch.bmm(blocks.dropout(block, probabilities).mT, g)
        of_probabilities = blocks.dropout(block, torch.bmm(g, v.mT))
        of_scores = _softmax_derivative(of_probabilities, probabilities).mul_(options.scale)
        out_query[block] = torch.bmm(of_scores, k)
        out_key[block] = torch.bmm(of_scores.mT, q)
    return of_query, of_key, of_value


def _double_backward(
    inputs: tuple[Tensor, ...],
    mask: Tensor | None,
    keep: Tensor | None,
    options: _Options,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """The gradients of g, q, k and v, where needed. The names are those of the module's formulas."""
    blocks = _Blocks(inputs[1], inputs[2], mask, keep, options)
    scale = options.scale
    results = [_empty_like(tensor) if need else None for tensor, need in zip(inputs[:4], needed[:4], strict=True)]
    out_g, out_q, out_k, out_v = (None if result is None else result.flatten(0, 1) for result in results)
    flat = _flat(*inputs)
    for block in blocks:
        g, q, k, v, a, b, c = blocks.take(block, *flat)
        probabilities = blocks.probabilities(block, q, k)
        change = torch.bmm(a, k.mT).baddbmm_(q, b.mT, beta=scale, alpha=scale)  # T
        of_probabilities = blocks.dropout(block, torch.bmm(g, v.mT))  # W
        if out_g is not None or out_v is not None:
            turned = blocks.dropout(block, _softmax_derivative(change, probabilities))  # J(T) ∘ d
            if out_v is not None:
                out_v[block] = torch.bmm(turned.mT, g)
            if out_g is not None:
                result = torch.bmm(turned, v)
                out_g[block] = result.baddbmm_(blocks.dropout(block, probabilities), c)
            del turned
        if out_q is None and out_k is None:
            continue
        first = _softmax_derivative(of_probabilities, probabilities)  # J(W)
        change.sub_((probabilities * change).sum(-1, keepdim=True))
        of_probabilities.sub_((probabilities * of_probabilities).sum(-1, keepdim=True))
        bent = of_probabilities.mul_(change).add_(blocks.dropout(block, torch.bmm(g, c.mT)))  # Z
        second = _softmax_derivative(bent, probabilities)  # J(Z)
        if out_q is not None:
            out_q[block] = torch.bmm(second, k).baddbmm_(first, b, beta=scale, alpha=scale)
        if out_k is not None:
            out_k[block] = torch.bmm(second.mT, q).baddbmm_(first.mT, a, beta=scale, alpha=scale)
    return results


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


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
    if shapes is None:
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
    output = _attention(query, key, value, mask, keep, _Options(scale, is_causal, dropout_p))
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
