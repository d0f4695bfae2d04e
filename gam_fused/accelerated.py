"""Accelerated GAM: Algorithm 2 of Zhang et al., CVPR 2023, arXiv 2303.03108. Four gradients, no second derivative.

The gradient of the gradient norm is approximated by a difference of two gradients, ∇‖∇L(θ)‖ ≈ (∇L(θ + ρ′ ∇L(θ) /
‖∇L(θ)‖) − ∇L(θ)) / ρ′. One step, all of it on one mini-batch:

    g0     = ∇L(θ)
    g1     = ∇L(θ + ρ′ g0 / (‖g0‖ + ξ))              gradient ahead
    f      = g1 − g0                                 ascent direction, about ρ′ H(θ) g0 / ‖g0‖
    θ_adv  = θ + ρ f / (‖f‖ + ξ)                     ascent to the adversarial point
    g2     = ∇L(θ_adv)
    g3     = ∇L(θ_adv + ρ′ g2 / (‖g2‖ + ξ))          gradient ahead of it
    h⁺     = α g1 + (1 − α) g3
    h⁻     = β g0 + (1 − β) g2
    h⊥     = h⁻ − ⟨h⁻, n⟩ n,  n = h⁺ / (‖h⁺‖ + ξ)    what of h⁻ is perpendicular to h⁺
    θ     ← θ − η (h⁺ − γ h⊥)                        through any base optimizer

Norms and the product are global: over every trainable parameter of every group, each with its own α and β.

What is certain of these formulas: the authors' README (https://github.com/xxgege/GAM) states the difference that
approximates ∇‖∇L‖, and that ρ, ρ′, α, β and γ are all there is to choose. Their code computes the four gradients at
these points, h⁺, the perpendicular part and the descent, and its options are scales of g0, g1, g2 and g3, set to β, α,
1 − β and 1 − α. In h⁻ it departs from its own options: it computes g0 + |1 − β| g2 (``form="released_code"``). In h⊥ it
adds ξ elsewhere than here; with ξ = 1e-12 that is lost in rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gam_fused import arguments
from gam_fused.closures import Closure, Evaluation, evaluate, evaluate_again
from gam_fused.compiled import Compiling
from gam_fused.kernels.grouping import buckets, global_difference_norm, global_norm, global_projection, take
from gam_fused.kernels.interface import accumulation_dtype
from gam_fused.kernels.rules import FourGradients
from gam_fused.landing import Active, Landing, LandingOptimizer
from gam_fused.transaction import Transaction

# What the authors' released code takes for ResNets on CIFAR-100 (its main_cifar.py; ξ is its perturb_eps).
DEFAULT_RHO = 0.2
DEFAULT_RHO_PRIME = 0.02
DEFAULT_ALPHA = 0.6
DEFAULT_BETA = 0.5
DEFAULT_GAMMA = 0.03
DEFAULT_XI = 1e-12

FORMS = ("paper", "released_code")


class AcceleratedGAM(Compiling, LandingOptimizer):
    """GAM out of four first-order gradients a step, around any base optimizer.

    Example::

        optimizer = AcceleratedGAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, model=model)
        for x, y in loader:
            loss = optimizer.step(lambda: criterion(model(x), y))

    Not an approximation of :class:`gam_fused.GAM` with the same settings: α weighs something else here, and the
    settings of one mean nothing to the other. On networks with kinks, such as ReLU, a difference of gradients sees the
    kinks, which a second derivative does not.

    The closure is run four times per step, so it must not draw new data. Closures, compiled steps, guarantees,
    checkpoints and back ends are those of :class:`gam_fused.GAM`; there is no form without a closure.

    The names of the released code's arguments, and where they are found here: ``grad_norm_rho`` is ``rho``,
    ``grad_rho`` is ``rho_prime``, ``grad_beta_1`` is ``alpha`` (its script sets ``grad_beta_3`` to 1 − that),
    ``grad_beta_0`` is ``beta`` (its script sets ``grad_beta_2`` to 1 − that, and only |``grad_beta_2``| is used),
    ``grad_gamma`` is ``gamma`` and ``perturb_eps`` is ``xi``.

    Args:
        params: as for :class:`gam_fused.GAM`. Groups may set ``rho``, ``rho_prime``, ``alpha``, ``beta``, ``gamma`` and
            ``xi`` as they may set ``lr`` (with ``gam_`` before the name where the base optimizer has one of that name).
        base_optimizer: an optimizer class, built over the same groups with ``base_kwargs``. Where it maximizes, the
            steps are those that minimize the negative loss.
        rho: radius ρ ≥ 0 of the ball in which the gradient norm ascends, in units of the parameters' global 2-norm.
        rho_prime: length ρ′ ≥ 0 of the steps ahead, in the same units.
        alpha: weight α ≥ 0 of g1 in h⁺, beside 1 − α of g3.
        beta: weight β ≥ 0 of g0 in h⁻, beside 1 − β of g2.
        gamma: weight γ ≥ 0 of h⊥.
        xi: ξ ≥ 0, keeps divisions by a norm finite.
        form: ``"paper"``, or ``"released_code"``: h⁻ = g0 + |1 − β| g2, what the authors' released code computes.
        model, backend, interval, rounding: as for :class:`gam_fused.GAM`.
        base_kwargs: for the base optimizer: ``lr``, ``momentum``, ``weight_decay``, …

    Attributes:
        metrics: 0-d tensors of the last step: ``loss`` L(θ), ``grad_norm`` ‖g0‖, ``ascent_norm`` ‖f‖ (about ρ′ ‖H g0‖ /
            ‖g0‖, where GAM's is ‖H g0‖), ``adversarial_grad_norm`` ‖g2‖, ``first_order_flatness`` ρ‖g2‖ (the largest ρ
            of the groups), and ``skipped_steps``, counted from the start. In the steps between two flatness terms the
            values of the last one remain.
        steps: how many steps have returned, skipped ones included.

    Raises:
        TypeError, ValueError: an argument is not as above.
        RuntimeError: the back end cannot run here.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: type[Optimizer] = torch.optim.SGD,
        *,
        rho: float = DEFAULT_RHO,
        rho_prime: float = DEFAULT_RHO_PRIME,
        alpha: float = DEFAULT_ALPHA,
        beta: float = DEFAULT_BETA,
        gamma: float = DEFAULT_GAMMA,
        xi: float = DEFAULT_XI,
        form: str = "paper",
        model: nn.Module | None = None,
        backend: str = "auto",
        interval: int = 1,
        rounding: str = "nearest",
        **base_kwargs: Any,
    ) -> None:
        arguments.check_base_optimizer_class(base_optimizer, type(self).__name__)
        base = base_optimizer(arguments.listed_groups(params), **base_kwargs)
        numbers = {"rho": rho, "rho_prime": rho_prime, "alpha": alpha, "beta": beta, "gamma": gamma, "xi": xi}
        self._wrap(base, numbers, backend, model, form=form, interval=interval, rounding=rounding)

    @classmethod
    def wrap(
        cls,
        optimizer: Optimizer,
        *,
        rho: float = DEFAULT_RHO,
        rho_prime: float = DEFAULT_RHO_PRIME,
        alpha: float = DEFAULT_ALPHA,
        beta: float = DEFAULT_BETA,
        gamma: float = DEFAULT_GAMMA,
        xi: float = DEFAULT_XI,
        form: str = "paper",
        model: nn.Module | None = None,
        backend: str = "auto",
        interval: int = 1,
        rounding: str = "nearest",
    ) -> AcceleratedGAM:
        """Around an optimizer already built, whose groups and state it keeps.

        Arguments as for :class:`AcceleratedGAM`. Groups that hold a number of one of these names already keep it.
        """
        gam = cls.__new__(cls)
        numbers = {"rho": rho, "rho_prime": rho_prime, "alpha": alpha, "beta": beta, "gamma": gamma, "xi": xi}
        base = cls._checked_base(optimizer)
        gam._wrap(base, numbers, backend, model, form=form, interval=interval, rounding=rounding)
        return gam

    def _wrap(
        self,
        base: Optimizer,
        hyperparameters: dict[str, float],
        backend: str,
        model: nn.Module | None,
        *,
        form: str,
        interval: int,
        rounding: str,
    ) -> None:
        arguments.check_choice("form", form, FORMS)
        arguments.check_interval("interval", interval)
        arguments.check_choice("rounding", rounding, ("nearest", "stochastic"))
        super().__init__(base, hyperparameters, backend, model)
        self.form = form
        self.interval = interval
        self.rounding = rounding

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """Take one step and return the loss at θ, detached.

        Args:
            closure: runs the forward pass and returns the scalar loss; may call ``backward()`` itself. With several
                ``backward()`` calls (micro-batches) the step is that of the summed loss.
        """
        self._refuse_within_step("step()")
        closure = arguments.checked_closure(closure)
        self._check_ready()
        with_flatness = self.steps % self.interval == 0
        transaction = self._transaction()
        with self._all_or_nothing(transaction):
            self._running = True
            passes = closure, transaction.params, transaction.replay
            at_theta = evaluate(*passes, create_graph=False)  # g0 = ∇L(θ)
            if with_flatness:
                run_again = partial(evaluate_again, *passes, at_theta)
                course = self._explore(transaction, at_theta, run_again)  # g1, g2, g3, by way of θ_adv
                self._descend(transaction, course)  # θ ← θ − η (h⁺ − γ h⊥)
            else:
                self._descend_by_gradient(transaction, at_theta)  # θ ← θ − η g0
        return at_theta.loss

    def _explore(self, transaction: Transaction, at_theta: Evaluation, run: Callable[[], Evaluation]) -> _Course:
        """g0, g1, g2 and g3; the parameters are left ahead of θ_adv."""
        active, losses = self._active(transaction, at_theta), [at_theta.loss]

        def gradient() -> list[Tensor]:
            here = run()
            losses.append(here.loss)
            return active.of(here)

        def uphill(length: str) -> tuple[list[float], list[float]]:
            lengths = [-r if up else r for r, up in zip(active.values(length), active.maximizes, strict=True)]
            return lengths, active.xis

        params, g0 = active.params, active.of(at_theta)
        theta = transaction.keep(params)
        grad_norm = global_norm(self._kernels, g0)
        transaction.shift(params, g0, grad_norm, *uphill("rho_prime"))  # θ + ρ′ g0 / (‖g0‖ + ξ)
        g1 = gradient()
        ascent_norm = global_difference_norm(self._kernels, g1, g0)
        # θ_adv = θ + ρ (g1 − g0) / (‖g1 − g0‖ + ξ)
        transaction.shift(params, g1, ascent_norm, *uphill("rho"), starts=g0, origins=theta)
        g2 = gradient()
        adversarial_norm = global_norm(self._kernels, g2)
        transaction.shift(params, g2, adversarial_norm, *uphill("rho_prime"))  # θ_adv + ρ′ g2 / (‖g2‖ + ξ)
        g3 = gradient()
        return _Course(active, (g0, g1, g2, g3), theta, losses, grad_norm, ascent_norm, adversarial_norm)

    def _descend(self, transaction: Transaction, course: _Course) -> None:
        """Restore θ and let the base optimizer step along h⁺ − γ h⊥."""
        active = course.active
        plus_norm, perpendicular_norm, quotients = self._decompose(active, course.gradients)
        plus, perpendicular, *_ = course.gradients
        self.metrics.update(
            loss=course.losses[0],
            grad_norm=course.grad_norm,
            ascent_norm=course.ascent_norm,
            adversarial_grad_norm=course.adversarial_norm,
            first_order_flatness=course.adversarial_norm * max(active.rhos, default=0.0),
        )
        norms = [course.grad_norm, course.ascent_norm, course.adversarial_norm, plus_norm, perpendicular_norm]
        # The launch that lands adds α ρ / (norm + ξ) times its fourth list to the third.
        penalties = [(1.0, -gamma, 0.0) for gamma in active.values("gamma")]
        landing = Landing(active, penalties, course.theta, plus, perpendicular, torch.ones_like(plus_norm))
        self._land(transaction, landing, [*course.losses, *norms, *quotients], plus_norm, perpendicular_norm)

    def _weights(self, alpha: float, beta: float) -> tuple[float, float, float, float]:
        """Of g0, g1, g2 and g3, in h⁺ = α g1 + (1 − α) g3 and h⁻ = β g0 + (1 − β) g2 or g0 + |1 − β| g2."""
        if self.form == "paper":
            return beta, alpha, 1 - beta, 1 - alpha
        return 1.0, alpha, abs(1 - beta), 1 - alpha

    def _decompose(self, active: Active, gradients: Sequence[list[Tensor]]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Leave h⁺ in the memory of g0 and h⊥ in that of g1.

        Returns ‖h⁺‖, what ‖h⊥‖ is at most, and what launches multiply h⁺ by: not a number where h⁺ and ξ are 0.
        """
        g0, g1, g2, g3 = gradients
        alphas, betas = active.values("alpha"), active.values("beta")
        weights = [self._weights(alpha, beta) for alpha, beta in zip(alphas, betas, strict=True)]
        grouped = buckets(active.params, list(zip(weights, active.xis, strict=True)))
        parts = [
            FourGradients(take(g0, at), take(g1, at), take(g2, at), take(g3, at), weights_of_part)
            for (_, _, weights_of_part, _), at in grouped.items()
        ]
        projection, plus_norm, minus_norm = global_projection(self._kernels, parts)
        for part, (_, _, _, xi) in zip(parts, grouped, strict=True):
            self._kernels.decompose_(part, projection, plus_norm, xi)
        quotients = []
        for _, dtype, _, xi in grouped:
            wide = accumulation_dtype(dtype)  # in which a launch divides, and a small ξ may be 0
            quotients.append(projection.to(wide) / (plus_norm.to(wide) + xi))
        return plus_norm, minus_norm + projection.abs(), quotients


@dataclass
class _Course:
    """What the first half of a step hands to the second, while the parameters stand ahead of θ_adv."""

    active: Active
    gradients: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]
    theta: list[Tensor]
    losses: list[Tensor]
    grad_norm: Tensor
    ascent_norm: Tensor
    adversarial_norm: Tensor
