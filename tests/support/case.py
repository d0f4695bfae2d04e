"""One row of the support table: a layer, and what becomes of it in either mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[..., Any]


class Applied(nn.Module):
    """A layer on inputs of its own, which are differentiated like parameters where they are given by their shapes."""

    def __init__(self, layer: Forward, inputs: Iterable[tuple[int, ...] | Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.inputs = [
            given if isinstance(given, Tensor) else nn.Parameter(torch.randn(given, dtype=torch.float64))
            for given in inputs
        ]
        for place, given in enumerate(self.inputs):
            if isinstance(given, nn.Parameter):
                self.register_parameter(f"input{place}", given)
        self.double()

    def forward(self) -> Tensor:
        """A loss with a curvature of its own, over everything that the layer returns."""
        torch.manual_seed(3)  # for layers that draw: GAM replays what they draw, the formulas do not
        given = (getattr(self, f"input{place}", tensor) for place, tensor in enumerate(self.inputs))
        # Layers that write into their input may not be given a parameter.
        outputs = list(_tensors(self.layer(*(tensor.clone() for tensor in given))))
        return torch.stack([_curved(output) for output in outputs]).sum()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_complex():
            yield torch.view_as_real(output)
        elif output.is_floating_point():
            yield output
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _tensors(part)


def _curved(output: Tensor) -> Tensor:
    weights = torch.linspace(0.3, 1.7, output.numel(), dtype=torch.float64).view(output.shape)
    return (output.tanh() * weights).sum()


@dataclass(frozen=True)
class Case:
    """A layer, on small inputs in float64."""

    name: str
    """As users write it."""
    layer: Callable[[], Forward]
    inputs: tuple[tuple[int, ...] | Tensor, ...]
    kinks: bool = False
    """Its first derivative jumps somewhere."""
    missing: str = ""
    """The operator without a second derivative, as the error calls it."""
    twin: Callable[[], Forward] | None = None
    """The same function by operators that have a right one, where its own do not."""
    near: float = 1e-4
    """Relative error of a step by differences, a few times their length of 1e-5."""
    refused: str = ""
    """The way out that the error names in both modes, where neither works."""

    def model(self) -> Applied:
        """The same weights and inputs each time."""
        return self._seeded(self.layer)

    def twice_differentiable(self) -> Applied:
        """The same function of the same parameters, by operators with second derivatives."""
        return self._seeded(self.twin or self.layer)

    def _seeded(self, layer: Callable[[], Forward]) -> Applied:
        torch.manual_seed(1)
        return Applied(layer(), self.inputs)


def once(name: str, missing: str, layer: Forward, twin: Forward, *inputs: tuple[int, ...] | Tensor) -> Case:
    """A function without a second derivative, and its twin."""
    return Case(name, lambda: layer, inputs, missing=missing, twin=lambda: twin)
