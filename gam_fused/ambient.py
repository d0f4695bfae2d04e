"""Switches of PyTorch that a step flips while it runs, and how to find them as they were."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.backends import cuda as switches
from torch.overrides import _pop_mode
from torch.utils._python_dispatch import _pop_mode as _pop_dispatch_mode

_KERNELS: tuple[tuple[Callable[[], bool], Callable[[bool], None]], ...] = (
    (switches.flash_sdp_enabled, switches.enable_flash_sdp),
    (switches.mem_efficient_sdp_enabled, switches.enable_mem_efficient_sdp),
    (switches.cudnn_sdp_enabled, switches.enable_cudnn_sdp),
    (switches.math_sdp_enabled, switches.enable_math_sdp),
    (torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled),
)


class Ambient:
    """Torch function and dispatch modes, grad mode and choice of kernels in force when it was made.

    Context managers put these back, unless Ctrl-C comes after the body of a ``with`` statement and before its exit has
    done its work: CPython runs signal handlers there too, and then a mode would stay on for good.
    """

    def __init__(self) -> None:
        self._modes = torch._C._len_torch_function_stack()
        self._dispatch_modes = torch._C._len_torch_dispatch_stack()
        self._grad_enabled = torch.is_grad_enabled()
        self._kernels = [is_enabled() for is_enabled, _ in _KERNELS]

    def restore(self) -> None:
        """Back to that, from whatever a step has left on."""
        while torch._C._len_torch_function_stack() > self._modes:
            _pop_mode()
        while torch._C._len_torch_dispatch_stack() > self._dispatch_modes:
            _pop_dispatch_mode()
        torch.set_grad_enabled(self._grad_enabled)
        for (_, enable), enabled in zip(_KERNELS, self._kernels, strict=True):
            enable(enabled)
