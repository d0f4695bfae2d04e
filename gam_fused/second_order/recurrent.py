"""Recurrent networks without cuDNN, whose kernels for them have no second derivative.

PyTorch's own have one. Convolutions and normalization keep cuDNN, which has second derivatives of those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

FUNCTIONS: frozenset[Callable[..., Any]] = frozenset((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu))
"""What modules such as ``nn.LSTM`` call. Single cells (``nn.LSTMCell``) do not use cuDNN."""


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Where cuDNN (and MIOpen, on AMD GPUs) is off."""
    # Not torch.backends.cudnn.flags(), which changes and puts back precisions as well, also those set for one operator.
    enabled = torch._C._get_cudnn_enabled()
    torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_cudnn_enabled(enabled)
