"""GAM's formulas in float64, as literally as PyTorch can say them: the oracle of every test.

Written to be read beside the paper (arXiv 2303.03108). It normalises copies where the fast path uses the linearity of
the Hessian-vector product, evaluates the loss anew for each derivative, returns new tensors and changes nothing it is
given. Nothing in the package imports it.

A *loss function* maps a list of parameters to a scalar and must be deterministic: :func:`gam_terms` and
:func:`accelerated_terms` call it five times. Parameters are float64 tensors of any shapes; whether they require grad
does not matter. Every function raises ``ValueError`` for parameters of another dtype, since rounding would hide what a
test is after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

LossFunction = Callable[[list[Tensor]], Tensor]


class GamTerms(NamedTuple):
    """The terms of one GAM step by the paper's symbols. Lists have the parameters' shapes, all tensors are detached."""

    loss: Tensor
    """L(θ), 0-d."""
    g: list[Tensor]
    """Gradient ∇L(θ)."""
    f: list[Tensor]
    """Gradient of the gradient norm, H(θ) g / (‖g‖ + ξ)."""
    theta_adv: list[Tensor]
    """Adversarial point θ + ρ f / (‖f‖ + ξ)."""
    g_adv: list[Tensor]
    """Gradient there, ∇L(θ_adv)."""
    h: list[Tensor]
    """Gradient of the flatness penalty, ρ H(θ_adv) g_adv / (‖g_adv‖ + ξ)."""
    combined: list[Tensor]
    """What the base optimizer is given, g + α h."""


def gam_terms(loss_fn: LossFunction, params: Sequence[Tensor], rho: float, alpha: float, xi: float) -> GamTerms:
    """One GAM step at θ = ``params`` up to the base optimizer: radius ρ, penalty weight α, ξ added to every norm."""
    theta = _checked(params)
    loss = loss_fn(theta).detach()

    g = gradient(loss_fn, theta)
    f = hessian_vector_product(loss_fn, theta, _normalised(g, xi))
    theta_adv = [p + rho * d for p, d in zip(theta, _normalised(f, xi), strict=True)]
    g_adv = gradient(loss_fn, theta_adv)
    h = [rho * product for product in hessian_vector_product(loss_fn, theta_adv, _normalised(g_adv, xi))]
    combined = [gi + alpha * hi for gi, hi in zip(g, h, strict=True)]

    return GamTerms(loss, g, f, theta_adv, g_adv, h, combined)


class AcceleratedTerms(NamedTuple):
    """The terms of one step of Algorithm 2. Lists have the parameters' shapes, all tensors are detached."""

    loss: Tensor
    """L(θ), 0-d."""
    g0: list[Tensor]
    """Gradient ∇L(θ)."""
    g1: list[Tensor]
    """Gradient ahead, ∇L(θ + ρ′ g0 / (‖g0‖ + ξ))."""
    theta_adv: list[Tensor]
    """Adversarial point θ + ρ (g1 − g0) / (‖g1 − g0‖ + ξ)."""
    g2: list[Tensor]
    """Gradient there, ∇L(θ_adv)."""
    g3: list[Tensor]
    """Gradient ahead of it, ∇L(θ_adv + ρ′ g2 / (‖g2‖ + ξ))."""
    h_plus: list[Tensor]
    """α g1 + (1 − α) g3."""
    h_minus: list[Tensor]
    """β g0 + (1 − β) g2; in the form of the released code, g0 + |1 − β| g2."""
    h_perpendicular: list[Tensor]
    """h⁻ − ⟨h⁻, n⟩ n with n = h⁺ / (‖h⁺‖ + ξ)."""
    combined: list[Tensor]
    """What the base optimizer is given, h⁺ − γ h⊥."""


def accelerated_terms(
    loss_fn: LossFunction,
    params: Sequence[Tensor],
    rho: float,
    rho_prime: float,
    alpha: float,
    beta: float,
    gamma: float,
    xi: float,
    form: str = "paper",
) -> AcceleratedTerms:
    """One step of Algorithm 2 at θ = ``params`` up to the base optimizer; ``form`` as in :class:`AcceleratedTerms`."""
    theta = _checked(params)
    loss = loss_fn(theta).detach()

    g0 = gradient(loss_fn, theta)
    g1 = gradient(loss_fn, [p + rho_prime * d for p, d in zip(theta, _normalised(g0, xi), strict=True)])
    ascent = _normalised([g1i - g0i for g0i, g1i in zip(g0, g1, strict=True)], xi)
    theta_adv = [p + rho * d for p, d in zip(theta, ascent, strict=True)]
    g2 = gradient(loss_fn, theta_adv)
    g3 = gradient(loss_fn, [p + rho_prime * d for p, d in zip(theta_adv, _normalised(g2, xi), strict=True)])

    h_plus = [alpha * g1i + (1 - alpha) * g3i for g1i, g3i in zip(g1, g3, strict=True)]
    if form == "paper":
        h_minus = [beta * g0i + (1 - beta) * g2i for g0i, g2i in zip(g0, g2, strict=True)]
    else:
        h_minus = [g0i + abs(1 - beta) * g2i for g0i, g2i in zip(g0, g2, strict=True)]
    n = _normalised(h_plus, xi)
    length = _sum((h * ni).sum() for h, ni in zip(h_minus, n, strict=True))
    h_perpendicular = [h - length * ni for h, ni in zip(h_minus, n, strict=True)]
    combined = [h - gamma * p for h, p in zip(h_plus, h_perpendicular, strict=True)]

    return AcceleratedTerms(loss, g0, g1, theta_adv, g2, g3, h_plus, h_minus, h_perpendicular, combined)


def sam_gradient(loss_fn: LossFunction, params: Sequence[Tensor], rho: float) -> list[Tensor]:
    """SAM's gradient (arXiv 2010.01412): ∇L at θ + ρ g/‖g‖. Not a number where g = 0."""
    theta = _checked(params)
    ascent = _normalised(gradient(loss_fn, theta), xi=0.0)
    return gradient(loss_fn, [p + rho * d for p, d in zip(theta, ascent, strict=True)])


def gradient(loss_fn: LossFunction, params: Sequence[Tensor]) -> list[Tensor]:
    """∇L(θ): detached tensors of the parameters' shapes, zeros for a parameter that the loss does not depend on."""
    theta = _leaves(params)
    return _derivative(loss_fn(theta), theta)


def hessian_vector_product(loss_fn: LossFunction, params: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
    """H(θ) v = ∇(∇L · v) by double backward, for ``vectors`` of the parameters' shapes.

    Detached tensors of the parameters' shapes, zeros for a parameter that the gradient does not depend on.
    """
    theta = _leaves(params)
    g = _derivative(loss_fn(theta), theta, create_graph=True)
    g_dot_v = _sum((gi * vi).sum() for gi, vi in zip(g, vectors, strict=True))
    return _derivative(g_dot_v, theta)


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """2-norm over all elements of all tensors, 0-d."""
    return _sum(t.square().sum() for t in tensors).sqrt()


@dataclass(kw_only=True)
class SGD:
    """``torch.optim.SGD`` as its documentation states it."""

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    _buffers: list[Tensor] | None = field(default=None, init=False, repr=False)

    def step(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
        """The parameters after one step along ``grads``; both lists in the same order at every step."""
        theta = _checked(params)
        g = [-gi if self.maximize else gi for gi in grads]
        g = [gi + self.weight_decay * p for gi, p in zip(g, theta, strict=True)]
        if self.momentum != 0:
            if self._buffers is None:
                b = g
            else:
                b = [self.momentum * bi + (1 - self.dampening) * gi for bi, gi in zip(self._buffers, g, strict=True)]
            g = [gi + self.momentum * bi for gi, bi in zip(g, b, strict=True)] if self.nesterov else b
            self._buffers = b
        return [p - self.lr * gi for p, gi in zip(theta, g, strict=True)]


@dataclass(kw_only=True)
class Adam:
    """``torch.optim.Adam`` as its documentation states it: weight decay is added to the gradient."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    maximize: bool = False
    _t: int = field(default=0, init=False, repr=False)
    _m: list[Tensor] = field(default_factory=list, init=False, repr=False)
    _v: list[Tensor] = field(default_factory=list, init=False, repr=False)
    _v_max: list[Tensor] = field(default_factory=list, init=False, repr=False)

    def step(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
        """The parameters after one step along ``grads``; both lists in the same order at every step."""
        theta = _checked(params)
        if self._t == 0:
            self._m, self._v, self._v_max = ([torch.zeros_like(p) for p in theta] for _ in range(3))
        self._t += 1
        beta1, beta2 = self.betas

        stepped = []
        for i, (p, g) in enumerate(zip(theta, grads, strict=True)):
            p, g = self._decay(p, -g if self.maximize else g)
            self._m[i] = beta1 * self._m[i] + (1 - beta1) * g
            self._v[i] = beta2 * self._v[i] + (1 - beta2) * g.square()
            self._v_max[i] = torch.maximum(self._v_max[i], self._v[i])
            m_hat = self._m[i] / (1 - beta1**self._t)
            v_hat = (self._v_max[i] if self.amsgrad else self._v[i]) / (1 - beta2**self._t)
            stepped.append(p - self.lr * m_hat / (v_hat.sqrt() + self.eps))
        return stepped

    def _decay(self, p: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return p, g + self.weight_decay * p


@dataclass(kw_only=True)
class AdamW(Adam):
    """``torch.optim.AdamW`` as its documentation states it: weight decay shrinks the parameter."""

    weight_decay: float = 1e-2

    def _decay(self, p: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return p - self.lr * self.weight_decay * p, g


def _checked(params: Sequence[Tensor]) -> list[Tensor]:
    for i, p in enumerate(params):
        if p.dtype != torch.float64:
            raise ValueError(f"params[{i}]: dtype {p.dtype}, expected torch.float64; convert with .double()")
    return [p.detach() for p in params]


def _leaves(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.clone().requires_grad_() for p in _checked(params)]


def _derivative(value: Tensor, leaves: list[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    if not value.requires_grad:  # constant: nothing to differentiate
        return [torch.zeros_like(p) for p in leaves]
    return list(torch.autograd.grad(value, leaves, create_graph=create_graph, materialize_grads=True))


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return sum(terms, start=torch.zeros((), dtype=torch.float64))


def _normalised(tensors: Sequence[Tensor], xi: float) -> list[Tensor]:
    norm = global_norm(tensors)
    return [t / (norm + xi) for t in tensors]
