"""``F.multi_head_attention_forward`` with the layers of this package inside.

A torch function mode sees the call of that function, but nothing that it calls in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from gam_fused.second_order import attention, softmax

_ORIGINAL = F.multi_head_attention_forward


def multi_head_attention_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """PyTorch's own function, run with other meanings of the names that it calls: nothing of PyTorch's is changed."""
    if not isinstance(_ORIGINAL, FunctionType):  # somebody has wrapped it
        return _ORIGINAL(*args, **kwargs)
    names = vars(F) | {
        "scaled_dot_product_attention": attention.scaled_dot_product_attention,
        "softmax": softmax.REPLACEMENTS[F.softmax],
        "has_torch_function": lambda tensors: False,  # the arguments are plain tensors: nobody else to ask
    }
    function = FunctionType(_ORIGINAL.__code__, names, _ORIGINAL.__name__, _ORIGINAL.__defaults__)
    function.__kwdefaults__ = _ORIGINAL.__kwdefaults__
    return function(*args, **kwargs)


REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {_ORIGINAL: multi_head_attention_forward}
