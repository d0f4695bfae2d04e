"""How much of a perturbation survives in bfloat16 weights, rounded to nearest and stochastically.

    python -m benchmarks.bench_rounding

Weights are normal with deviation σ, and move by ρ along a random direction. What survives is the projection of their
actual move on that direction, over ρ: 1 where nothing is lost.
"""

from __future__ import annotations

import torch

from benchmarks.tables import aligned
from gam_fused import kernels

WEIGHTS, RHO = 2**20, 0.1
DEVIATIONS = (0.1, 0.3, 1.0)


def surviving(deviation: float, rounding_seed: int | None) -> float:
    """The part of a perturbation of radius ``RHO`` that arrives in ``WEIGHTS`` weights of that deviation."""
    generator = torch.Generator().manual_seed(0)
    theta = (torch.randn(WEIGHTS, generator=generator) * deviation).bfloat16()
    direction = torch.randn(WEIGHTS, generator=generator).bfloat16()
    norm = torch.linalg.vector_norm(direction, dtype=torch.float32)
    params, directions = [theta.clone()], [direction.clone()]
    kernels.resolve().perturb_(params, directions, norm, norm, RHO, 0.0, rounding_seed=rounding_seed)
    moved = params[0].double() - theta.double()
    return float((moved * direction.double()).sum() / norm.double() / RHO)


def main() -> None:
    """The command."""
    rows = [[str(each), f"{surviving(each, None):.3f}", f"{surviving(each, 1):.3f}"] for each in DEVIATIONS]
    lines = [["deviation", "to nearest", "stochastically"], *rows]
    print("\n".join(aligned(lines, [None] * len(lines), names=0)))


if __name__ == "__main__":
    main()
