"""``hvp="auto"``: exact Hessian-vector products, and finite differences once a model turns out not to have them."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gam_fused.derivatives import NoSecondDerivative
from gam_fused.landing import LandingOptimizer

# Between warnings.warn() and whoever takes a step stand functions of this package (more for a compiled step), and what
# PyTorch puts around every step() of an optimizer (more of it with a scheduler).
_INNER = tuple(os.path.join(os.path.dirname(path), "") for path in (__file__, torch.__file__))


class SwitchingOptimizer(LandingOptimizer):
    """An optimizer that is asked for exact Hessian-vector products, for finite differences, or to find out."""

    hvp: str
    """What was asked for."""

    switched_by: str | None = None
    """The operator without second derivative that ``hvp="auto"`` has met."""

    @property
    def hvp_in_use(self) -> str:
        """``"exact"`` or ``"finite_difference"``: what the next step takes."""
        if self.hvp != "auto":
            return self.hvp
        return "exact" if self.switched_by is None else "finite_difference"

    def _or_by_differences(self, attempt: Callable[[], Tensor]) -> Tensor:
        """``attempt()``; once more, by finite differences, where an operator has no second derivative.

        The first attempt has to leave everything as it was when it raises.
        """
        try:
            return attempt()
        except NoSecondDerivative as error:
            if self.hvp != "auto" or self.switched_by is not None:
                raise
            self._switch(error)
        # Not within the except clause: the exception keeps what the first attempt has computed.
        return attempt()

    def _switch(self, error: NoSecondDerivative) -> None:
        warnings.warn(
            f"{error.operator} has no second derivative ({error.reason}): hvp='auto' takes finite differences, in this "
            "step and in all later ones. On networks with kinks, such as ReLU, that is another algorithm, for which "
            "other hyper-parameters may suit. hvp='finite_difference' does the same without this warning.",
            stacklevel=_stack_level(),
        )
        self.switched_by = error.operator

    def _further_state(self) -> dict[str, Any]:
        return {**super()._further_state(), "switched_by": self.switched_by}

    def _load_further_state(self, own: dict[str, Any]) -> None:
        super()._load_further_state(own)
        self.switched_by = own.get("switched_by") if self.hvp == "auto" else None

    def _header(self) -> str:
        in_use = f" ({self.hvp_in_use})" if self.hvp == "auto" else ""
        return f"{super()._header()}, hvp {self.hvp}{in_use}"


def _stack_level() -> int:
    """Of the code that takes the step, for a warning in the function that asks."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INNER):
        frame, level = frame.f_back, level + 1
    return level
