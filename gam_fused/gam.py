"""Gradient norm Aware Minimization (GAM): Zhang et al., CVPR 2023, arXiv 2303.03108.

First-order flatness is R¹_ρ(θ) = ρ · max over the ball B(θ, ρ) of ‖∇L‖; GAM minimizes L + α R¹_ρ. One step, all of it
on one mini-batch, with H the Hessian of its loss:

    g      = ∇L(θ)                                   gradient
    f      = H(θ) g / (‖g‖ + ξ)                      gradient of the gradient norm
    θ_adv  = θ + ρ f / (‖f‖ + ξ)                     ascent to the adversarial point
    g_adv  = ∇L(θ_adv)
    h      = ρ H(θ_adv) g_adv / (‖g_adv‖ + ξ)        gradient of the flatness penalty
    θ     ← θ − η (g + α h)                          through any base optimizer

Norms are global: over every trainable parameter of every group. A Hessian-vector product is linear, so it is taken of
g itself and the division is left to the launch that uses the result: with u = H(θ) g, f/(‖f‖ + ξ) = u / (‖u‖ + ξ(‖g‖ +
ξ)).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gam_fused import arguments
from gam_fused.ascent import Keeping, KeptAscent, Reusing, loaded
from gam_fused.closures import Closure, Evaluation, check_loss, differentiated, evaluate
from gam_fused.compiled import Compiling
from gam_fused.derivatives import owned
from gam_fused.finite_difference import finite_difference_hvp
from gam_fused.kernels.grouping import global_norm, global_norm_pair
from gam_fused.landing import Active, Landing, all_finite
from gam_fused.options import DEFAULT_ASCENT_INTERVAL, DEFAULT_FD_EPSILON, Options
from gam_fused.switching import SwitchingOptimizer
from gam_fused.transaction import Transaction

# Measured: benchmarks/results/rho_alpha_small_data.csv, discussed in the README.
DEFAULT_RHO = 0.05
DEFAULT_ALPHA = 0.1
DEFAULT_XI = 1e-12


class GAM(Compiling, SwitchingOptimizer):
    """Gradient norm Aware Minimization around any base optimizer.

    Example::

        optimizer = GAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, model=model)
        for x, y in loader:
            loss = optimizer.step(lambda: criterion(model(x), y))

    The closure is run twice per step (four times with finite differences), so it must not draw new data. It may also be
    an ordinary PyTorch closure that calls ``zero_grad()`` and ``loss.backward()``, once or several times.

    A step that raises, or that meets a non-finite loss, gradient or Hessian-vector product, leaves parameters,
    optimizer state, buffers and random states bitwise as they were. In the second case it returns normally and
    is counted in ``metrics["skipped_steps"]``; the guard is read once per step on the host, the only synchronisation.
    (A step skipped right after a skipped one lets the random states advance, so that a closure that draws its own data
    is not given the same draw for ever.) On CUDA, the fused rules of the native back end (SGD, Adam, AdamW) decide on
    the device instead, and nothing synchronises: a step skipped there lets random states advance, leaves g in
    ``.grad``, and zeros in optimizer state that there was none of before.

    Args:
        params: tensors, (name, tensor) pairs, or param groups. Groups may set ``rho``, ``alpha`` and ``xi`` as they may
            set ``lr`` (as ``gam_alpha`` or ``gam_rho`` where the base optimizer has an ``alpha`` or ``rho`` of its own,
            such as RMSprop and Adadelta). Dense and real: float64, float32, bfloat16, float16.
        base_optimizer: an optimizer class, built over the same groups with ``base_kwargs``.
        rho: radius ρ ≥ 0 of the ball, in units of the parameters' global 2-norm.
        alpha: weight α ≥ 0 of the flatness penalty, dimensionless.
        xi: ξ ≥ 0, keeps divisions by a norm finite.
        hvp: ``"exact"`` (double backward), ``"finite_difference"`` (first derivatives only; on networks with kinks,
            such as ReLU, a different algorithm), or ``"auto"``: exact until a step meets an operator without second
            derivative. That step is made with finite differences, as are all after it, with one warning.
        fd_epsilon: length of the finite-difference step > 0, in units of the parameters' global 2-norm.
        model: the module whose buffers advance once per step. Without it, running statistics that pass through
            ``torch.nn.functional.batch_norm`` and ``instance_norm`` are found while the closure runs.
        backend: ``"auto"`` or a name from :func:`gam_fused.kernels.available`; ``auto`` heeds ``GAM_FUSED_BACKEND``.
        ascent: where the direction u of the ascent comes from. ``"exact"``: u = H(θ) g as ``hvp`` takes products.
            ``"finite_difference"``: u ≈ (∇L(θ + ε g/‖g‖) − g) ‖g‖/ε, one gradient more instead of a double backward;
            h stays what ``hvp`` makes it. ``"reuse"``: u is computed in every ``ascent_interval``-th flatness step and
            used again in those between, which ascend along an old direction from the present θ; it is kept in memory
            (the size of the parameters) and in the state dict.
        ascent_interval: k ≥ 1, for ``ascent="reuse"``: how many flatness steps one direction is used in.
        batch_fraction: in (0, 1]. Below 1, u is that of a part of the mini-batch: the closure is run at θ once more as
            ``closure(batch_fraction=batch_fraction)``, and decides itself which part that is. g, g_adv and h stay those
            of the whole batch. Buffers advance as the pass over the whole batch has it.
        interval: k ≥ 1: the flatness term in every k-th step, the base optimizer alone between.
        interval_scaling: ``"none"``, or ``"unbiased"``: with ``interval=k``, the flatness term of a k-th step weighs
            k α, so that over k steps it adds up to what it would without ``interval``.
        rounding: ``"nearest"``, or ``"stochastic"`` for bfloat16 and float16 parameters: a perturbation of radius ρ
            spread over millions of them, and a small update, are below half a unit in the last place of most, and
            rounding to nearest drops them; stochastic rounding keeps them on average
            (:mod:`gam_fused.kernels.rounding`). Reproducible: the random bits depend on ``steps``, not on a generator.
            Concerns the adversarial point in every back end, and the update where a fused rule makes it: in steps with
            a flatness term, on native and triton, with SGD, Adam and AdamW. All other updates round as the base
            optimizer does.
        second_order: ``"auto"``: where a closure is differentiated twice, normalization, convolutions, attention,
            activations and the like run on the layers of :mod:`gam_fused.second_order`, the same functions with a
            shorter double backward. ``"off"``: on PyTorch's own.
        base_kwargs: for the base optimizer: ``lr``, ``momentum``, ``weight_decay``, …

    Attributes:
        metrics: 0-d tensors of the last step: ``loss``, ``grad_norm`` ‖g‖, ``ascent_norm`` ‖u‖,
            ``adversarial_grad_norm`` ‖g_adv‖, ``first_order_flatness`` ρ‖g_adv‖ (the largest ρ of the groups), and
            ``skipped_steps``, counted from the start. In the steps between two flatness terms the values of the last
            one remain.
        steps: how many steps have returned, skipped ones included.
        kept_ascent: with ``ascent="reuse"``, the direction that is in use, or ``None``.
        hvp_in_use: ``"exact"`` or ``"finite_difference"``: what the next step takes.
        switched_by: with ``hvp="auto"``, the operator without second derivative that it has met, or ``None``; part of
            the state dict, so that a resumed run goes on alike.

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
        alpha: float = DEFAULT_ALPHA,
        xi: float = DEFAULT_XI,
        hvp: str = "exact",
        fd_epsilon: float = DEFAULT_FD_EPSILON,
        model: nn.Module | None = None,
        backend: str = "auto",
        ascent: str = "exact",
        ascent_interval: int = DEFAULT_ASCENT_INTERVAL,
        batch_fraction: float = 1.0,
        interval: int = 1,
        interval_scaling: str = "none",
        rounding: str = "nearest",
        second_order: str = "auto",
        **base_kwargs: Any,
    ) -> None:
        arguments.check_base_optimizer_class(base_optimizer, type(self).__name__)
        base = base_optimizer(arguments.listed_groups(params), **base_kwargs)
        options = Options(
            hvp=hvp,
            fd_epsilon=fd_epsilon,
            ascent=ascent,
            ascent_interval=ascent_interval,
            batch_fraction=batch_fraction,
            interval=interval,
            interval_scaling=interval_scaling,
            rounding=rounding,
            second_order=second_order,
        )
        self._wrap(base, {"rho": rho, "alpha": alpha, "xi": xi}, backend, model, options)

    @classmethod
    def wrap(
        cls,
        optimizer: Optimizer,
        *,
        rho: float = DEFAULT_RHO,
        alpha: float = DEFAULT_ALPHA,
        xi: float = DEFAULT_XI,
        hvp: str = "exact",
        fd_epsilon: float = DEFAULT_FD_EPSILON,
        model: nn.Module | None = None,
        backend: str = "auto",
        ascent: str = "exact",
        ascent_interval: int = DEFAULT_ASCENT_INTERVAL,
        batch_fraction: float = 1.0,
        interval: int = 1,
        interval_scaling: str = "none",
        rounding: str = "nearest",
        second_order: str = "auto",
    ) -> GAM:
        """GAM around an optimizer already built, whose groups and state it keeps.

        Arguments as for :class:`GAM`. Groups that hold a ``rho``, ``alpha`` or ``xi`` already keep it.
        """
        gam = cls.__new__(cls)
        options = Options(
            hvp=hvp,
            fd_epsilon=fd_epsilon,
            ascent=ascent,
            ascent_interval=ascent_interval,
            batch_fraction=batch_fraction,
            interval=interval,
            interval_scaling=interval_scaling,
            rounding=rounding,
            second_order=second_order,
        )
        gam._wrap(cls._checked_base(optimizer), {"rho": rho, "alpha": alpha, "xi": xi}, backend, model, options)
        return gam

    def _wrap(
        self,
        base: Optimizer,
        hyperparameters: dict[str, float],
        backend: str,
        model: nn.Module | None,
        options: Options,
    ) -> None:
        super().__init__(base, hyperparameters, backend, model)
        self.kept_ascent: KeptAscent | None = None
        self.hvp = options.hvp
        self.fd_epsilon = options.fd_epsilon
        self.ascent = options.ascent
        self.ascent_interval = options.ascent_interval
        self.batch_fraction = options.batch_fraction
        self.interval = options.interval
        self.interval_scaling = options.interval_scaling
        self.rounding = options.rounding
        self.second_order = options.second_order

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """Take one step and return the loss at θ, detached.

        Args:
            closure: runs the forward pass and returns the scalar loss; may call ``backward()`` itself. With several
                ``backward()`` calls (micro-batches) the step is that of the summed loss.
        """
        self._refuse_within_step("step()")
        closure = arguments.checked_closure(closure, ", or use first_step(loss) and second_step(loss_adv)")
        if self.batch_fraction < 1:
            arguments.check_takes_fraction(closure)
        self._check_ready()
        return self._or_by_differences(partial(self._step, closure))

    def _step(self, closure: Closure) -> Tensor:
        with_flatness = self.steps % self.interval == 0
        transaction = self._transaction()
        with self._all_or_nothing(transaction):
            self._running = True
            passes = partial(self._passes, transaction)
            if with_flatness:
                both = passes(closure, is_exact=self.hvp_in_use == "exact")
                at_theta, seek = self._at_theta(passes, closure)  # g = ∇L(θ)
                ascent = self._ascend(transaction, at_theta, seek)  # θ_adv = θ + ρ f / (‖f‖ + ξ)
                self._descend(transaction, ascent, both.run(), both.hvp)  # g_adv = ∇L(θ_adv), θ ← θ − η (g + α h)
                self._keep_ascent(seek)
            else:
                at_theta = passes(closure, is_exact=False).run()
                self._descend_by_gradient(transaction, at_theta)  # θ ← θ − η g
        return at_theta.loss

    def _passes(self, transaction: Transaction, closure: Closure, *, is_exact: bool) -> _Passes:
        run = partial(
            evaluate,
            closure,
            transaction.params,
            transaction.replay,
            create_graph=is_exact,
            second_order=self.second_order,
        )
        return _Passes(run, _exact_hvp if is_exact else partial(self._finite_difference_hvp, transaction, run))

    def _at_theta(self, passes: Callable[..., _Passes], closure: Closure) -> tuple[Evaluation, _HVP]:
        """The gradient g = ∇L(θ), and what gives u = H(θ) g for it, or what the options put in its place."""
        gradient_only = passes(closure, is_exact=False)
        if self.ascent == "reuse" and self.kept_ascent is not None and self.kept_ascent.uses < self.ascent_interval:
            return gradient_only.run(), Reusing(self.kept_ascent)
        is_exact = self.hvp_in_use == "exact" and self.ascent != "finite_difference"
        seek: _HVP
        if self.batch_fraction < 1:
            part = passes(partial(closure, batch_fraction=self.batch_fraction), is_exact=is_exact)
            at_theta, seek = gradient_only.run(), part.own_product
        else:
            whole = passes(closure, is_exact=is_exact)
            at_theta, seek = whole.run(), whole.hvp
        return at_theta, Keeping(seek) if self.ascent == "reuse" else seek

    def _keep_ascent(self, seek: _HVP) -> None:
        """After a step that was made. Of one that the device may have skipped, nothing that is not finite."""
        if isinstance(seek, Keeping | Reusing) and not self._skipped_last and all_finite([self.metrics["ascent_norm"]]):
            self.kept_ascent = seek.kept

    def _ascend(self, transaction: Transaction, at_theta: Evaluation, hvp: _HVP) -> _Ascent:
        """θ_adv = θ + ρ u / (‖u‖ + ξ (‖g‖ + ξ)) with u = H(θ) g."""
        active = self._active(transaction, at_theta)
        grads = active.of(at_theta)
        grad_norm = global_norm(self._kernels, grads)
        directions = owned(hvp(at_theta, active, grads), active.params)
        direction_norm = global_norm(self._kernels, directions)
        # Only now, since the graph that shared these tensors is gone: the combination is written into them.
        grads = owned(grads, active.params)
        transaction.move(active.params, directions, direction_norm, grad_norm, active.rhos, active.xis)
        return _Ascent(active, grads, backups=directions, loss=at_theta.loss, grad_norm=grad_norm, norm=direction_norm)

    def _descend(self, transaction: Transaction, ascent: _Ascent, at_adversarial: Evaluation, hvp: _HVP) -> None:
        """Restore θ and let the base optimizer step along g + α ρ / (‖g_adv‖ + ξ) · H(θ_adv) g_adv."""
        active = ascent.active
        grads_adv = active.of(at_adversarial)
        hvps = owned(hvp(at_adversarial, active, grads_adv), active.params)
        adversarial_norm, hvp_norm = global_norm_pair(self._kernels, grads_adv, hvps)
        self.metrics.update(
            loss=ascent.loss,
            grad_norm=ascent.grad_norm,
            ascent_norm=ascent.norm,
            adversarial_grad_norm=adversarial_norm,
            first_order_flatness=adversarial_norm * max(active.rhos, default=0.0),
        )
        guards = [ascent.loss, at_adversarial.loss, ascent.grad_norm, ascent.norm, adversarial_norm, hvp_norm]
        # In a step of its own only every k-th time, so k times as heavy where the mean is to be that of every step.
        weight = self.interval if self.interval_scaling == "unbiased" else 1
        penalties = [(rho, weight * alpha, xi) for rho, alpha, xi in active.penalties]
        landing = Landing(active, penalties, ascent.backups, ascent.grads, hvps, adversarial_norm)
        self._land(transaction, landing, guards, ascent.grad_norm, hvp_norm)

    def _finite_difference_hvp(
        self,
        transaction: Transaction,
        run: Callable[[], Evaluation],
        at: Evaluation,
        active: Active,
        vectors: list[Tensor],
    ) -> list[Tensor]:
        norm = global_norm(self._kernels, vectors)
        return finite_difference_hvp(transaction, run, active.indices, active.params, vectors, norm, self.fd_epsilon)

    def _check_can_compile(self) -> None:
        if self.batch_fraction < 1:
            raise ValueError(
                f"compiled steps need batch_fraction=1, got {self.batch_fraction!r}; use step(closure) to have the "
                "ascent from a part of the batch."
            )

    @torch.no_grad()
    def first_step(self, loss: Tensor) -> None:
        """Without a closure, first half: from ``loss`` at θ, move the parameters to the adversarial point.

        Run the forward pass again and call :meth:`second_step` with its loss, or :meth:`cancel_step`. Both forward
        passes are yours: dropout masks differ between them unless you replay the random state yourself. The buffers of
        ``model``, if it was given, advance once per step all the same. Step hooks of the base optimizer run; those of
        GAM itself belong to :meth:`step`.
        """
        self._refuse_within_step("first_step()")
        settings = self.hvp, self.ascent, self.interval, self.batch_fraction
        if settings != ("exact", "exact", 1, 1):
            raise RuntimeError(
                "first_step() needs hvp='exact', ascent='exact', interval=1 and batch_fraction=1, got "
                f"hvp={self.hvp!r}, ascent={self.ascent!r}, interval={self.interval!r} and "
                f"batch_fraction={self.batch_fraction!r}; use step(closure), which runs the forward pass as often as "
                "it needs to."
            )
        self._check_ready()
        check_loss(loss, needs_graph=True, name="the loss given to first_step")
        transaction = self._transaction(keep_random_states=False)
        with self._all_or_nothing(transaction):
            at_theta = differentiated(loss, transaction.params, create_graph=True)
            self._pending = transaction, self._ascend(transaction, at_theta, _exact_hvp)

    @torch.no_grad()
    def second_step(self, loss_adv: Tensor) -> Tensor:
        """Without a closure, second half: from the loss at the adversarial point, restore and step.

        Returns the loss at θ, detached. If it raises, the parameters are back at θ and the step is cancelled.
        """
        self._refuse_while_running("second_step()")
        if self._pending is None:
            raise RuntimeError("second_step() came before first_step(); call first_step(loss) at θ first.")
        transaction, ascent = self._pending
        with self._all_or_nothing(transaction):
            self._pending = None
            self._check_ready()
            check_loss(loss_adv, needs_graph=True, name="the loss given to second_step")
            at_adversarial = differentiated(loss_adv, transaction.params, create_graph=True)
            self._descend(transaction, ascent, at_adversarial, _exact_hvp)
        self._opt_called = True  # what an LR scheduler looks for, and notes itself when step() is called
        return ascent.loss

    def cancel_step(self) -> None:
        """Give up a step that :meth:`first_step` began: everything is as before it. Harmless if there is none."""
        if self._pending is not None:
            transaction, _ = self._pending
            transaction.roll_back()
            self._pending = None

    def _further_state(self) -> dict[str, Any]:
        kept = {} if self.kept_ascent is None else {"kept_ascent": self.kept_ascent.state(self._params())}
        return {**super()._further_state(), **kept}

    def _params(self) -> list[Tensor]:
        """All of them: whether they require gradients may change."""
        return [param for group in self.param_groups for param in group["params"]]

    def _check_further_state(self, own: dict[str, Any]) -> None:
        super()._check_further_state(own)
        loaded(own.get("kept_ascent"), self._params())

    def _load_further_state(self, own: dict[str, Any]) -> None:
        super()._load_further_state(own)
        kept = loaded(own.get("kept_ascent"), self._params())
        self.kept_ascent = kept if self.ascent == "reuse" else None


_HVP = Callable[[Evaluation, Active, list[Tensor]], list[Tensor]]
"""H v at the point of an evaluation, for its own gradient v of the active parameters."""


def _exact_hvp(at: Evaluation, active: Active, vectors: list[Tensor]) -> list[Tensor]:
    return at.gradients.hvp(active.indices, vectors)


@dataclass(frozen=True)
class _Passes:
    """How a step runs a closure, and takes Hessian-vector products where it has."""

    run: Callable[[], Evaluation]
    hvp: _HVP

    def own_product(self, at: Evaluation, active: Active, vectors: list[Tensor]) -> list[Tensor]:
        """H g of this closure's own loss where the parameters are, instead of that of ``at``."""
        own = self.run()
        return self.hvp(own, active, active.of(own))


@dataclass
class _Ascent:
    """What the first half of a step hands to the second, while the parameters stand at θ_adv."""

    active: Active
    grads: list[Tensor]
    backups: list[Tensor]
    loss: Tensor
    grad_norm: Tensor
    norm: Tensor
