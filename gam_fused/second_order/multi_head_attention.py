"""``F.multi_head_attention_forward`` with the layers of this package inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from gam_fused.second_order import attention, softmax
from gam_fused.second_order.inner_calls import without_overrides

_ORIGINAL = F.multi_head_attention_forward
_SOFTMAX = softmax.REPLACEMENTS[F.softmax]


def multi_head_attention_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """:func:`torch.nn.functional.multi_head_attention_forward`, to be differentiated twice."""
    function = without_overrides(
        _ORIGINAL, scaled_dot_product_attention=attention.scaled_dot_product_attention, softmax=_SOFTMAX
    )
    return function(*args, **kwargs)


REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {_ORIGINAL: multi_head_attention_forward}
