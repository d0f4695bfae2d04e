"""Recurrent networks without cuDNN, whose kernels for them have no second derivative.

PyTorch's own have one. Convolutions and normalization keep cuDNN, which has second derivatives of those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """Where cuDNN (and MIOpen, on AMD GPUs) is off."""
    # Not torch.backends.cudnn.flags(), which changes and puts back precisions as well, also those set for one operator.
    enabled = torch._C._get_cudnn_enabled()
    torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_cudnn_enabled(enabled)


def _pytorchs_own(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _without_cudnn():
            return function(*args, **kwargs)

    return run


REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    function: _pytorchs_own(function) for function in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
}
"""Of what modules such as ``nn.LSTM`` call. Single cells (``nn.LSTMCell``) do not use cuDNN."""
