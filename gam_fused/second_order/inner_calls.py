"""PyTorch's own Python functions, with a torch function mode reaching what they call.

A mode is handed the call of such a function before its first line, and is off from then on. To have the inner calls as
well, the function is run with other meanings of the names in it; nothing of PyTorch's is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any


def without_overrides(function: Callable[..., Any], **names: Any) -> Callable[..., Any]:
    """``function``, which asks no mode and no tensor subclass before it runs, and in which ``names`` mean these.

    The function itself if it is not a plain Python function, which is what PyTorch has it be.
    """
    if not isinstance(function, FunctionType):
        return function
    meanings = function.__globals__ | {"has_torch_function": lambda _: False} | names
    inner = FunctionType(function.__code__, meanings, function.__name__, function.__defaults__, function.__closure__)
    inner.__kwdefaults__ = function.__kwdefaults__
    return inner
