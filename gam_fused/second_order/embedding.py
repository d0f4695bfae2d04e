"""Embeddings whose double backward keeps sizes symbolic.

y = w[i] has the gradient g_w[r] = Σ of the rows of g at which i = r, which is linear in g: its double backward for an
incoming v is v[i], zero at the padding. PyTorch's own computes the same and, while sizes are symbols, writes down those
that it sees: a graph of it is one for one size of batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_backward: Callable[..., Tensor] = torch.ops.aten.embedding_dense_backward.default


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, indices: Tensor, weight: Tensor, padding_idx: int) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.rows, ctx.padding_idx = weight.shape[0], padding_idx
        return F.embedding(indices, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, None]:
        (indices,) = ctx.saved_tensors
        return None, _embedding_backward(grad_output, indices, ctx.rows, ctx.padding_idx), None


class _EmbeddingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad_output: Tensor, indices: Tensor, rows: int, padding_idx: int) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.padding_idx = padding_idx
        return _backward(grad_output, indices, rows, padding_idx, False)

    @staticmethod
    def backward(ctx: Any, v_weight: Tensor) -> tuple[Tensor, None, None, None]:
        (indices,) = ctx.saved_tensors
        rows = F.embedding(indices, v_weight)
        if ctx.padding_idx >= 0:
            rows = rows.masked_fill((indices == ctx.padding_idx).unsqueeze(-1), 0)
        return rows, None, None, None


_embedding: Callable[..., Tensor] = _Embedding.apply
_embedding_backward: Callable[..., Tensor] = _EmbeddingBackward.apply


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """:func:`torch.nn.functional.embedding`. What changes the weight, or counts indices, is left to PyTorch.

    Args:
        input: integers, of any shape.
        weight: (rows, width).
        padding_idx: a row that gets no gradient; counted from the end if negative.
        max_norm: PyTorch's.
        norm_type: PyTorch's.
        scale_grad_by_freq: PyTorch's.
        sparse: PyTorch's.
    """
    rows = weight.shape[0]
    is_valid = padding_idx is None or -rows <= padding_idx < rows
    if max_norm is not None or scale_grad_by_freq or sparse or not is_valid or not input.numel():
        return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    return _embedding(input, weight, -1 if padding_idx is None else padding_idx % rows)


REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {F.embedding: embedding}
