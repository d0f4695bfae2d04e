"""Attention and its derivatives over blocks of heads: the attention matrices of one block at a time.

The formulas and their names stand in :mod:`gam_fused.second_order.attention`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of one attention matrix per block: half a dozen of them are at work at a time, and have to fit the cache of
# a core; on an accelerator they have to be worth a launch. A block is one head at least.
BLOCK = {"cpu": 1 << 16}
BLOCK_ELSEWHERE = 1 << 24


class Options(NamedTuple):
    """Of one call: the factor of q kᵀ, whether row i sees columns 0 to i only, and the probability of dropout."""

    scale: float
    is_causal: bool
    dropout: float


def whole_mask(query: Tensor, key: Tensor, mask: Tensor | None, options: Options) -> Tensor | None:
    """The additive mask as [B or 1, H or 1, …], whether it was given or is the causal one."""
    if options.is_causal:
        shape = query.shape[-2], key.shape[-2]
        return torch.full(shape, -torch.inf, dtype=query.dtype, device=query.device).triu_(1)[None, None]
    return mask


class _Blocks:
    """Blocks of the first dimension of tensors [B·H, …].

    Narrow floating numbers are computed with in float32, block by block.
    """

    def __init__(self, query: Tensor, key: Tensor, mask: Tensor | None, keep: Tensor | None, options: Options) -> None:
        self._heads = query.shape[1]
        self._mask = whole_mask(query, key, mask, options)
        # A row that sees nothing attends to nothing: 0, where a plain softmax gives NaN.
        self._softmax = torch._safe_softmax if mask is not None and _may_have_empty_rows(mask) else torch.softmax
        self._keep = None if keep is None else keep.flatten(0, 1)
        self._kept = 1 - options.dropout
        self._count = query.shape[0] * self._heads
        matrix = max(1, query.shape[2] * key.shape[2])
        self._size = max(1, BLOCK.get(query.device.type, BLOCK_ELSEWHERE) // matrix)
        narrow = query.dtype in (torch.float16, torch.bfloat16)
        self._dtype = torch.float32 if narrow else query.dtype
        self._scale = options.scale

    def __iter__(self) -> Iterator[slice]:
        return (slice(at, min(at + self._size, self._count)) for at in range(0, self._count, self._size))

    def take(self, block: slice, *tensors: Tensor) -> Iterator[Tensor]:
        """The block of each of these, in the dtype to compute with."""
        return (tensor[block].to(self._dtype) for tensor in tensors)

    def probabilities(self, block: slice, query: Tensor, key: Tensor) -> Tensor:
        """P of the block."""
        if self._mask is None:
            return self._softmax(torch.bmm(query * self._scale, key.mT), -1)
        mask = self._mask_of(block).to(self._dtype)
        return self._softmax(torch.baddbmm(mask, query * self._scale, key.mT), -1)

    def dropout(self, block: slice) -> Tensor | None:
        """The factors d of the block; ``None``: there is no dropout."""
        return None if self._keep is None else self._keep[block].to(self._dtype).div_(self._kept)

    def _mask_of(self, block: slice) -> Tensor:
        assert self._mask is not None
        batches, heads = self._mask.shape[:2]
        if batches == heads == 1:
            return self._mask[0]
        index = torch.arange(block.start, block.stop, device=self._mask.device)
        batch, head = index // self._heads, index % self._heads
        return self._mask[batch if batches > 1 else 0, head if heads > 1 else 0]


def _may_have_empty_rows(mask: Tensor) -> bool:
    if mask.device.type != "cpu" or not mask.numel():
        return True  # to look would wait for the device
    return bool((mask.amax(-1) == -torch.inf).any())


def _flat(*tensors: Tensor) -> list[Tensor]:
    return [tensor.flatten(0, 1) for tensor in tensors]


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _times(matrix: Tensor, factors: Tensor | None) -> Tensor:
    return matrix if factors is None else matrix * factors


def _softmax_derivative(change: Tensor, probabilities: Tensor) -> Tensor:
    """J(w) = P ∘ (w − Σ P w)."""
    return torch._softmax_backward_data(change, probabilities, -1, probabilities.dtype)


def forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, keep: Tensor | None, options: Options
) -> Tensor:
    """Attention [B, H, L, E_v] of q [B, H, L, E], k [B, H, S, E] and v [B, H, S, E_v]."""
    blocks = _Blocks(query, key, mask, keep, options)
    output = value.new_empty(*query.shape[:3], value.shape[3])
    out = output.flatten(0, 1)
    inputs = _flat(query, key, value)
    for block in blocks:
        q, k, v = blocks.take(block, *inputs)
        out[block] = torch.bmm(_times(blocks.probabilities(block, q, k), blocks.dropout(block)), v)
    return output


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    keep: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    blocks = _Blocks(query, key, mask, keep, options)
    of_query, of_key, of_value = (_empty_like(tensor) for tensor in (query, key, value))
    out_query, out_key, out_value = _flat(of_query, of_key, of_value)
    inputs = _flat(grad_output, query, key, value)
    for block in blocks:
        g, q, k, v = blocks.take(block, *inputs)
        probabilities, dropout = blocks.probabilities(block, q, k), blocks.dropout(block)
        out_value[block] = torch.bmm(_times(probabilities, dropout).mT, g)
        of_scores = _softmax_derivative(_times(torch.bmm(g, v.mT), dropout), probabilities)
        out_query[block] = torch.bmm(of_scores, k * options.scale)
        out_key[block] = torch.bmm(of_scores.mT, q * options.scale)
    return of_query, of_key, of_value


def double_backward(
    inputs: tuple[Tensor, ...],
    mask: Tensor | None,
    keep: Tensor | None,
    options: Options,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """The gradients of g, q, k and v, where ``needed``; ``inputs`` are g, q, k, v, a, b and c."""
    blocks = _Blocks(inputs[1], inputs[2], mask, keep, options)
    scale = options.scale
    results = [_empty_like(tensor) if need else None for tensor, need in zip(inputs[:4], needed[:4], strict=True)]
    out_g, out_q, out_k, out_v = (None if result is None else result.flatten(0, 1) for result in results)
    flat = _flat(*inputs)
    for block in blocks:
        g, q, k, v, a, b, c = blocks.take(block, *flat)
        probabilities, dropout = blocks.probabilities(block, q, k), blocks.dropout(block)
        change = torch.bmm(a, k.mT).baddbmm_(q, b.mT, beta=scale, alpha=scale)  # T
        change.sub_((probabilities * change).sum(-1, keepdim=True))
        if out_g is not None or out_v is not None:
            turned = _times(probabilities * change, dropout)  # J(T) ∘ d
            if out_v is not None:
                out_v[block] = torch.bmm(turned.mT, g)
            if out_g is not None:
                out_g[block] = torch.bmm(turned, v).baddbmm_(_times(probabilities, dropout), c)
            del turned
        if out_q is None and out_k is None:
            continue
        first = _softmax_derivative(_times(torch.bmm(g, v.mT), dropout), probabilities)  # J(W)
        # P ∘ Z, of which P ∘ (W − Σ P W) = J(W) is a factor, and then J(Z) = P ∘ Z − P Σ P ∘ Z.
        second = change.mul_(first).addcmul_(probabilities, _times(torch.bmm(g, c.mT), dropout))
        second.addcmul_(probabilities, second.sum(-1, keepdim=True), value=-1)
        if out_q is not None:
            out_q[block] = torch.bmm(second, k).baddbmm_(first, b, beta=scale, alpha=scale)
        if out_k is not None:
            out_k[block] = torch.bmm(second.mT, q).baddbmm_(first.mT, a, beta=scale, alpha=scale)
    return results
