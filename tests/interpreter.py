"""Triton's interpreter in tests. Needs nothing but Triton."""

from __future__ import annotations


def wrap_the_language_once() -> None:
    """Make interpreted launches several times as fast.

    The interpreter wraps Triton's language anew, around what it has wrapped already, at every call from one function to
    another. Once for each launch, which it does as well, is enough for functions of ours; once in all is enough for
    those of the language itself, which it does not unwrap.
    """
    from triton.runtime.interpreter import InterpretedFunction

    call_wrapped = InterpretedFunction.__call__
    wrapped = set()

    def call(self: InterpretedFunction, *args: object, **kwargs: object) -> object:
        module = self.fn.__module__
        if module.startswith("gam_fused.") or module in wrapped:
            return self.rewrite()(*args, **kwargs)
        wrapped.add(module)
        return call_wrapped(self, *args, **kwargs)

    InterpretedFunction.__call__ = call  # type: ignore[method-assign]
