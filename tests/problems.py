"""Small problems in float64 whose losses are functions of a list of parameters, as ``reference.py`` takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LossFunction = Callable[[list[Tensor]], Tensor]


@dataclass
class Problem:
    """Where to start and what to minimize."""

    start: list[Tensor]
    loss: LossFunction

    def leaves(self) -> list[Tensor]:
        """Fresh parameters at the start."""
        return [tensor.clone().requires_grad_() for tensor in self.start]


def quartic() -> Problem:
    """L = ¼ Σ c θ⁴ + ½ θᵀAθ over two tensors; H = diag(3 c θ²) + A in closed form (:func:`quartic_hessian`)."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(6, generator=generator, dtype=torch.float64)
    curvature, coupling = _quartic_constants()

    def loss(params: list[Tensor]) -> Tensor:
        theta = torch.cat([param.reshape(-1) for param in params])
        return 0.25 * (curvature * theta**4).sum() + 0.5 * theta @ coupling @ theta

    return Problem([start[:4].reshape(2, 2).clone(), start[4:].clone()], loss)


def quartic_gradient(theta: Tensor) -> Tensor:
    """c θ³ + A θ of the flattened parameters, by hand."""
    curvature, coupling = _quartic_constants()
    return curvature * theta**3 + coupling @ theta


def quartic_hessian(theta: Tensor) -> Tensor:
    """diag(3 c θ²) + A of the flattened parameters, by hand."""
    curvature, coupling = _quartic_constants()
    return torch.diag(3 * curvature * theta**2) + coupling


def _quartic_constants() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64) / 3
    return torch.linspace(0.2, 1.0, 6, dtype=torch.float64), root @ root.T


def logistic() -> Problem:
    """Mean logistic loss of weights and a bias on 20 labelled points; H = Xᵀ diag(σ(1 − σ)) X / n by hand."""
    inputs, labels = logistic_data()

    def loss(params: list[Tensor]) -> Tensor:
        weight, bias = params
        return F.softplus(-labels * (inputs @ weight + bias)).mean()

    generator = torch.Generator().manual_seed(3)
    return Problem(
        [torch.randn(4, generator=generator, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)], loss
    )


def logistic_data() -> tuple[Tensor, Tensor]:
    """Inputs [20, 4] and labels −1 or 1 [20]."""
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    labels = torch.where(torch.rand(20, generator=generator) < 0.5, -1.0, 1.0).double()
    return inputs, labels


def logistic_gradient(theta: Tensor) -> Tensor:
    """−Σ y σ(−y z) (x, 1) / n of (weights, bias), by hand."""
    inputs, labels = logistic_data()
    extended = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], dim=1)
    return -(extended * (labels * torch.sigmoid(-labels * (extended @ theta)))[:, None]).mean(0)


def logistic_hessian(theta: Tensor) -> Tensor:
    """Σ σ(z) σ(−z) (x, 1)(x, 1)ᵀ / n of (weights, bias), by hand."""
    inputs, _ = logistic_data()
    extended = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], dim=1)
    scores = extended @ theta
    return extended.T @ ((torch.sigmoid(scores) * torch.sigmoid(-scores))[:, None] * extended) / len(inputs)


def gelu_network() -> Problem:
    """Cross-entropy of a 5-8-3 GELU network on 16 points: no closed form, but smooth."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs, labels = draw(16, 5), torch.randint(3, (16,), generator=generator)

    def loss(params: list[Tensor]) -> Tensor:
        weight1, bias1, weight2, bias2 = params
        return F.cross_entropy(F.gelu(inputs @ weight1 + bias1) @ weight2 + bias2, labels)

    return Problem([draw(5, 8) / 2, draw(8) / 10, draw(8, 3) / 3, draw(3) / 10], loss)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "quartic": quartic,
    "logistic": logistic,
    "gelu_network": gelu_network,
}
