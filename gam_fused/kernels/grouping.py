"""From all tensors of a step to the lists of one device and dtype that a back end takes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from gam_fused.kernels.interface import Backend
from gam_fused.kernels.rules import FourGradients

T = TypeVar("T")


def buckets(
    tensors: Sequence[Tensor], keys: Sequence[tuple[Hashable, ...]] | None = None
) -> dict[tuple[Any, ...], list[int]]:
    """Group indices by device, dtype and, where given, one more key per tensor.

    Args:
        tensors: any tensors.
        keys: as many tuples, such as (ρ, ξ) of each tensor's param group; ``None`` for none.

    Returns:
        ``(device, dtype, *key)`` → the indices that share it, ascending; buckets in the order of their first tensors.

    Raises:
        ValueError: ``keys`` and ``tensors`` differ in length.
    """
    if keys is None:
        keys = [()] * len(tensors)
    if len(keys) != len(tensors):
        raise ValueError(f"keys: {len(keys)} given, expected {len(tensors)}, one for each tensor")
    grouped: dict[tuple[Any, ...], list[int]] = {}
    for i, (tensor, key) in enumerate(zip(tensors, keys, strict=True)):
        grouped.setdefault((tensor.device, tensor.dtype, *key), []).append(i)
    return grouped


def take(items: Sequence[T], indices: Sequence[int]) -> list[T]:
    """The items at ``indices``, in that order."""
    return [items[i] for i in indices]


@torch.no_grad()
def global_norm(backend: Backend, tensors: Sequence[Tensor]) -> Tensor:
    """2-norm over all tensors, whatever their devices and dtypes.

    0-d, on the first tensor's device, in the widest accumulation dtype among the tensors; float32 zero on the CPU for
    no tensors. Partial norms are combined in the order of :func:`buckets`, so that equal inputs give equal bits. The
    host waits only where tensors are spread over the CPU and another device.
    """
    return _joined([backend.l2_norm(take(tensors, at)) for at in buckets(tensors).values()], backend, tensors)


def _joined(partials: list[Tensor], backend: Backend, tensors: Sequence[Tensor]) -> Tensor:
    if len(partials) < 2:
        return partials[0] if partials else backend.l2_norm([])
    widest = torch.float64 if any(partial.dtype == torch.float64 for partial in partials) else torch.float32
    return torch.linalg.vector_norm(torch.stack([partial.to(tensors[0].device, widest) for partial in partials]))


@torch.no_grad()
def global_difference_norm(backend: Backend, ends: Sequence[Tensor], starts: Sequence[Tensor]) -> Tensor:
    """2-norm of ends − starts, as :func:`global_norm` would give that of the differences in the accumulation dtypes."""
    return _joined(
        [backend.difference_norm(take(ends, at), take(starts, at)) for at in buckets(ends).values()], backend, ends
    )


@torch.no_grad()
def global_norm_pair(backend: Backend, first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """:func:`global_norm` of two lists, in one launch where all tensors share a device and a dtype."""
    if len({(tensor.device, tensor.dtype) for tensor in (*first, *second)}) == 1:
        return backend.l2_norm_pair(first, second)
    return global_norm(backend, first), global_norm(backend, second)


@torch.no_grad()
def global_projection(backend: Backend, parts: Sequence[FourGradients]) -> tuple[Tensor, Tensor, Tensor]:
    """:meth:`Backend.projection` over all parts, whatever their devices, dtypes and weights: h⁺ and h⁻ are one vector.

    0-d, on the first part's device, in the widest accumulation dtype among them, combined in the order of the parts.
    """
    partials = [backend.projection(part) for part in parts]
    if len(partials) < 2:
        return partials[0] if partials else backend.projection(FourGradients([], [], [], [], (0.0, 0.0, 0.0, 0.0)))
    widest = torch.float64 if any(norm.dtype == torch.float64 for _, norm, _ in partials) else torch.float32
    device = partials[0][0].device
    columns = zip(*partials, strict=True)
    projections, plus_norms, minus_norms = (
        torch.stack([partial.to(device, widest) for partial in column]) for column in columns
    )
    plus_norm, minus_norm = torch.linalg.vector_norm(plus_norms), torch.linalg.vector_norm(minus_norms)
    # Of quotients first, so that nothing overflows on the way.
    projection = (projections * (plus_norms / plus_norm)).sum()
    return torch.where(plus_norm == 0, plus_norm, projection), plus_norm, minus_norm
