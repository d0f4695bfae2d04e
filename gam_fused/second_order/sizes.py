"""From which size on an elementwise layer is worth its calls from Python."""

from __future__ import annotations

from torch import Tensor

WORTHWHILE = 1 << 17
"""Elements from which the double backward of an elementwise layer on a CPU is faster than PyTorch's composite: about
the size of a core's cache. Below, the operators that are saved cost less than an autograd function in Python."""


def is_worthwhile(input: Tensor) -> bool:
    """Whether ``input`` has that many elements, or lies on an accelerator, where each launch saved counts."""
    return input.numel() >= WORTHWHILE or input.device.type != "cpu"
