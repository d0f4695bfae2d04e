"""Learning rate and rho as functions of the step number.

Functions, not objects that count: the step number is their whole state, so a resumed run cannot be out of step with
its schedules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Schedules:
    """Cosine decay of the learning rate to 0 over ``total_steps``, after a linear warm-up; linear warm-up of rho.

    Steps count from 0. A warm-up over n steps takes the value from 1/n of the peak in step 0 to the peak in step
    n − 1: never 0, where a step would be wasted.
    """

    lr: float
    lr_warmup_steps: int
    rho: float | None
    rho_warmup_steps: int
    total_steps: int

    def lr_at(self, step: int) -> float:
        if step < self.lr_warmup_steps:
            return self.lr * (step + 1) / self.lr_warmup_steps
        progress = (step - self.lr_warmup_steps) / (self.total_steps - self.lr_warmup_steps)
        return self.lr * (1 + math.cos(math.pi * progress)) / 2

    def rho_at(self, step: int) -> float | None:
        """``None`` for optimizers without rho."""
        if self.rho is None or step >= self.rho_warmup_steps:
            return self.rho
        return self.rho * (step + 1) / self.rho_warmup_steps

    def apply(self, param_groups: list[dict[str, Any]], step: int) -> None:
        """Set the values of ``step`` in every group."""
        rho = self.rho_at(step)
        for group in param_groups:
            group["lr"] = self.lr_at(step)
            if rho is not None:
                group["rho"] = rho
