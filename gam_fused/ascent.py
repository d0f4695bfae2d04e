"""An ascent direction that is kept for some steps, instead of being computed anew in each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gam_fused.landing import Active


@dataclass(frozen=True)
class KeptAscent:
    """u = H(θ) g of an earlier step.

    Args:
        directions: u by parameter, of those that had a gradient in that step.
        uses: in how many steps it has been the ascent direction.
    """

    directions: dict[Tensor, Tensor]
    uses: int = 1

    def used(self) -> KeptAscent:
        """After one more step."""
        return KeptAscent(self.directions, self.uses + 1)

    def of(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Copies, to be written into; zeros for a parameter that had no gradient then."""
        return [
            torch.zeros_like(param) if (kept := self.directions.get(param)) is None else kept.to(param, copy=True)
            for param in params
        ]

    def state(self, params: Sequence[Tensor]) -> dict[str, Any]:
        """For a state dict: directions by the places of their parameters among all ``params``."""
        places = {i: self.directions[param] for i, param in enumerate(params) if param in self.directions}
        return {"directions": places, "uses": self.uses}


_Product = Callable[[Any, Active, list[Tensor]], list[Tensor]]


class Keeping:
    """Computes a direction, and has a copy of it for later steps in ``kept``."""

    def __init__(self, product: _Product) -> None:
        self._product = product
        self.kept: KeptAscent | None = None

    def __call__(self, at: Any, active: Active, vectors: list[Tensor]) -> list[Tensor]:
        """u, anew."""
        directions = self._product(at, active, vectors)
        self.kept = KeptAscent({param: u.clone() for param, u in zip(active.params, directions, strict=True)})
        return directions


class Reusing:
    """Has the direction of an earlier step; one use more is counted in ``kept``."""

    def __init__(self, kept: KeptAscent) -> None:
        self.kept = kept.used()

    def __call__(self, at: Any, active: Active, vectors: list[Tensor]) -> list[Tensor]:
        """u, as it was."""
        return self.kept.of(active.params)


def loaded(state: dict[str, Any] | None, params: Sequence[Tensor]) -> KeptAscent | None:
    """The opposite of :meth:`KeptAscent.state`, for all of an optimizer's parameters.

    Raises:
        ValueError: it is of other parameters.
    """
    if state is None:
        return None
    for i, direction in state["directions"].items():
        if i >= len(params) or direction.shape != params[i].shape:
            there = "no such parameter" if i >= len(params) else f"one of shape {tuple(params[i].shape)}"
            raise ValueError(
                f"the state dict keeps an ascent direction of shape {tuple(direction.shape)} for parameter {i}, "
                f"and here is {there}; load it into an optimizer of the same parameters."
            )
    directions = {params[i]: direction.clone() for i, direction in state["directions"].items()}
    return KeptAscent(directions, int(state["uses"]))
