"""``F.multi_head_attention_forward`` with the layers of this package inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from gam_fused.second_order import attention, softmax
from gam_fused.second_order.inner_calls import without_overrides
from gam_fused.second_order.linear import linear

_ORIGINAL = F.multi_head_attention_forward
_SOFTMAX = softmax.REPLACEMENTS[F.softmax]


def multi_head_attention_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """:func:`torch.nn.functional.multi_head_attention_forward`, to be differentiated twice."""
    function = without_overrides(
        _ORIGINAL,
        scaled_dot_product_attention=attention.scaled_dot_product_attention,
        softmax=_SOFTMAX,
        linear=linear,
        _in_projection=without_overrides(F._in_projection, linear=linear),  # type: ignore[attr-defined]
        _in_projection_packed=_in_projection_packed,
    )
    return function(*args, **kwargs)


def _in_projection_packed(q: Tensor, k: Tensor, v: Tensor, w: Tensor, b: Tensor | None = None) -> tuple[Tensor, ...]:
    """Query, key and value, each (..., E), by the weights (3E, E) that are packed in this order.

    PyTorch's own takes the parts of a common product by index: the derivative of each is a tensor of all parts that is
    zero but for one, and these are added. The derivative of ``unbind`` is one copy.
    """
    width = q.size(-1)
    if q is k and k is v:
        return _parts(linear(q, w, b), 3)
    if k is v:
        of_q, of_both = w.split([width, 2 * width])
        b_of_q, b_of_both = (None, None) if b is None else b.split([width, 2 * width])
        return linear(q, of_q, b_of_q), *_parts(linear(k, of_both, b_of_both), 2)
    weights, biases = w.chunk(3), (None,) * 3 if b is None else b.chunk(3)
    return tuple(linear(*each) for each in zip((q, k, v), weights, biases, strict=True))


def _parts(packed: Tensor, count: int) -> tuple[Tensor, ...]:
    """Those of the last dimension, each contiguous."""
    return packed.unflatten(-1, (count, -1)).movedim(-2, 0).contiguous().unbind(0)


REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {_ORIGINAL: multi_head_attention_forward}
