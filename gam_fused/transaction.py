"""A step happens in full or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gam_fused.interrupts import uninterrupted
from gam_fused.kernels.grouping import buckets, take
from gam_fused.kernels.interface import Backend
from gam_fused.replay import Replay


class _Move(NamedTuple):
    params: list[Tensor]
    backups: list[Tensor]
    versions: list[int]


class Transaction:
    """Everything that a step may change before it is sure to succeed, and how to put it back.

    Moves parameters with the swap of :meth:`Backend.perturb_` (the direction buffer becomes the backup) or, from copies
    on, with :meth:`Backend.shift_`, and keeps the way back; keeps random states, buffers (:class:`Replay`) and
    ``.grad``. :meth:`roll_back` is safe at every moment, in the middle of a move included.

    Args:
        backend: moves and restores.
        params: all trainable parameters of the optimizer.
        groups: the param group of each.
        model: see :class:`Replay`.
        keep_random_states: off for passes that the user runs (:meth:`GAM.first_step`), whose draws are the user's.
        rounding_seeds: one for each launch that writes parameters, to round them stochastically; ``None`` to round to
            nearest.
    """

    def __init__(
        self,
        backend: Backend,
        params: Sequence[Tensor],
        groups: Sequence[dict[str, Any]],
        model: nn.Module | None,
        *,
        keep_random_states: bool = True,
        rounding_seeds: Iterator[int] | None = None,
    ) -> None:
        self._backend = backend
        self.params = params
        self.groups = groups
        self._grads = [param.grad for param in params]
        self._moves: list[_Move] = []
        self._committed = False
        self._rounding_seeds = rounding_seeds
        self.replay = Replay(model, params, keep_random_states=keep_random_states)

    def move(
        self,
        params: Sequence[Tensor],
        directions: Sequence[Tensor],
        direction_norm: Tensor,
        grad_norm: Tensor,
        rhos: Sequence[float],
        xis: Sequence[float],
    ) -> None:
        """θ ← θ + ρ u / (‖u‖ + ξ (‖g‖ + ξ)) for directions u, which hold θ from now on."""
        for (_, _, rho, xi), indices in buckets(params, list(zip(rhos, xis, strict=True))).items():
            moved, backups = take(params, indices), take(directions, indices)
            with uninterrupted():
                # Noted before the launch: if it fails half-way, the versions tell whether parameters were written.
                self._moves.append(_Move(moved, backups, [param._version for param in moved]))
                seed = self.rounding_seed()
                self._backend.perturb_(moved, backups, direction_norm, grad_norm, rho, xi, rounding_seed=seed)
        _forget_derived_weights()

    def keep(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Copies of the parameters, which :meth:`shift` may move from now on."""
        copies = [torch.empty_like(param, requires_grad=False) for param in params]
        for indices in buckets(params).values():
            kept, backups = take(params, indices), take(copies, indices)
            self._backend.restore_(backups, kept)
            # Noted after the copy, and before the first launch that moves them.
            self._moves.append(_Move(kept, backups, [param._version for param in kept]))
        return copies

    def shift(
        self,
        params: Sequence[Tensor],
        ends: Sequence[Tensor],
        norm: Tensor,
        rhos: Sequence[float],
        xis: Sequence[float],
        *,
        starts: Sequence[Tensor] = (),
        origins: Sequence[Tensor] = (),
    ) -> None:
        """θ + ρ d / (‖d‖ + ξ) for d = ends (− starts), where θ are the origins or the parameters themselves."""
        for (_, _, rho, xi), at in buckets(params, list(zip(rhos, xis, strict=True))).items():
            moved, along = take(params, at), take(ends, at)
            begin, start = (take(tensors, at) if tensors else [] for tensors in (origins, starts))
            with uninterrupted():  # between writing and counting, a version would say that nothing was written
                seed = self.rounding_seed()
                self._backend.shift_(moved, begin, along, start, norm, rho, xi, rounding_seed=seed)
        _forget_derived_weights()

    def rounding_seed(self) -> int | None:
        """For the next launch that writes parameters."""
        return None if self._rounding_seeds is None else next(self._rounding_seeds)

    def move_back(self, count: int = 0) -> None:
        """Undo the moves after the first ``count``, the last one first. Bitwise, since backups are copies."""
        while len(self._moves) > count:
            params, backups, versions = self._moves[-1]
            # A parameter that was not written has no backup yet: its direction buffer still holds the direction.
            if any(param._version != version for param, version in zip(params, versions, strict=True)):
                self._backend.restore_(params, backups)
            self._moves.pop()
        _forget_derived_weights()

    @property
    def moves(self) -> int:
        """How many launches have moved parameters so far."""
        return len(self._moves)

    def forget_moves(self) -> None:
        """Another launch has restored the parameters."""
        self._moves.clear()

    def commit(self) -> None:
        """The base optimizer has stepped: nothing rolls back now."""
        _forget_derived_weights()
        self._committed = True

    def roll_back(self) -> None:
        """Parameters, buffers, random states and ``.grad`` as they were when the transaction began."""
        if self._committed:
            return
        with uninterrupted():
            self.move_back()
            self.replay.rewind()
            for param, grad in zip(self.params, self._grads, strict=True):
                param.grad = grad


def _forget_derived_weights() -> None:
    # Autocast keeps cast copies of the weights until its outermost context ends, and parametrize.cached() what it has
    # computed from them. Where that context is outside of the step, they are of the weights before they were written.
    torch.clear_autocast_cache()
    parametrize._cache.clear()
