"""Triton's interpreter in tests. Needs nothing but Triton."""

from __future__ import annotations


def wrap_the_language_once() -> None:
    """Make interpreted launches several times as fast.

    The interpreter wraps Triton's language anew, around what it has wrapped already, at every call from one function to
    another. Once for each launch, which it does as well, is enough for functions of ours.
    """
    from triton.runtime.interpreter import InterpretedFunction

    call_wrapped = InterpretedFunction.__call__

    def call(self: InterpretedFunction, *args: object, **kwargs: object) -> object:
        if self.fn.__module__.startswith("gam_fused."):
            return self.rewrite()(*args, **kwargs)
        return call_wrapped(self, *args, **kwargs)

    InterpretedFunction.__call__ = call  # type: ignore[method-assign]
