"""Hessian-vector products from two gradients, for models that cannot be differentiated twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gam_fused.closures import Evaluation
from gam_fused.kernels.interface import accumulation_dtype
from gam_fused.transaction import Transaction

# Only guards 0/0 for a zero vector: perturb_ divides by ‖v‖ + ξ².
_XI = 1e-12


def finite_difference_hvp(
    transaction: Transaction,
    run: Callable[[], Evaluation],
    indices: Sequence[int],
    params: Sequence[Tensor],
    vectors: Sequence[Tensor],
    vector_norm: Tensor,
    epsilon: float,
) -> list[Tensor]:
    """H v ≈ (∇L(θ + ε v/‖v‖) − ∇L(θ)) ‖v‖/ε for v = ∇L(θ), by one more run of the closure.

    Args:
        transaction: moves the parameters and brings them back, bit for bit.
        run: runs the closure where the parameters are.
        indices: the places of ``params`` among all parameters that ``run`` differentiates by.
        params: the parameters, at θ.
        vectors: ∇L(θ), the same shapes and dtypes; not written.
        vector_norm: ‖v‖, 0-d.
        epsilon: length of the step, in units of the parameters.
    """
    moves = transaction.moves
    directions = [vector.clone() for vector in vectors]
    same = len(params)
    transaction.move(params, directions, vector_norm, torch.zeros_like(vector_norm), [epsilon] * same, [_XI] * same)
    ahead = run().gradients.total
    transaction.move_back(moves)
    return [
        _difference_quotient(ahead[i], vector, vector_norm / epsilon)
        for i, vector in zip(indices, vectors, strict=True)
    ]


def _difference_quotient(ahead: Tensor | None, here: Tensor, scale: Tensor) -> Tensor:
    wide = accumulation_dtype(here.dtype)
    there = torch.zeros_like(here) if ahead is None else ahead
    return ((there.to(wide) - here.to(wide)) * scale.to(here.device, wide)).to(here.dtype)
