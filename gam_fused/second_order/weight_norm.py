"""Weight normalization, ``w = g v / ‖v‖`` with a norm per slice, by operators that can be differentiated twice.

The derivative of PyTorch's own operator takes ‖v‖ for a constant, so that its second derivative by v is wrong, without
a word: ``torch.autograd.gradgradcheck`` tells (PyTorch 2.13). The operators below are those that PyTorch takes itself
where it has no fused kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``torch._weight_norm``, which ``nn.utils.parametrizations.weight_norm`` calls."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {torch._weight_norm: weight_norm}
