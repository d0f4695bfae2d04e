"""The arithmetic in ``torch._foreach_*``: runs wherever PyTorch runs, on any device.

Each public operator is a handful of multi-tensor calls. Temporaries are made in batches, so that they stay bounded by
``_BATCH_BYTES`` or the largest tensor; only ``perturb_`` needs more, and says why.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gam_fused.kernels.interface import Backend, accumulation_dtype, as_scalar
from gam_fused.kernels.rounding import places_of, rounded
from gam_fused.kernels.rules import FourGradients, TensorList
from gam_fused.kernels.validation import checked, validate_lists, validate_shift

# Elements that one thread adds up at one go on the CPU. Left to itself, PyTorch adds up a long vector in one thread or,
# from 32768 elements on and if there are gaps between them, in as many parts as there are threads, which lets the
# number of threads into the last bits of the result.
_CHUNK = 16384

# Elements widened at one go before they are reduced; 1 MiB of float32 stays in cache.
_BLOCK = 16 * _CHUNK

_BATCH_BYTES = 64 * 2**20


class ForeachBackend(Backend):
    """Multi-tensor operators made of PyTorch's own; never synchronises with the device."""

    name = "foreach"

    @staticmethod
    def unavailable_reason(device: torch.device | None = None) -> str | None:
        """``None``: runs wherever PyTorch runs."""
        return None

    @checked(reads=["tensors"], same_shape=False)
    @torch.no_grad()
    def l2_norm(self, tensors: TensorList) -> Tensor:
        """See :meth:`Backend.l2_norm`."""
        if not tensors:
            return torch.zeros((), dtype=torch.float32, device="cpu")
        wide = accumulation_dtype(tensors[0].dtype)
        if tensors[0].device.type != "cpu":
            return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors), 2, dtype=wide)))

        small = [tensor for tensor in tensors if tensor.numel() <= _CHUNK]
        partials = [_chunk_norms(_flat(tensor), wide) for tensor in tensors if tensor.numel() > _CHUNK]
        if small:
            partials.append(torch.stack(torch._foreach_norm(small, 2, dtype=wide)))
        norms = torch.cat(partials)
        while norms.numel() > _CHUNK:
            norms = _chunk_norms(norms, wide)
        return torch.linalg.vector_norm(norms)

    @checked(reads=["ends", "starts"])
    @torch.no_grad()
    def difference_norm(self, ends: TensorList, starts: TensorList) -> Tensor:
        """See :meth:`Backend.difference_norm`."""
        if not ends:
            return self.l2_norm([])
        wide = accumulation_dtype(ends[0].dtype)
        differences = (
            torch._foreach_sub(_cast(ends[batch], wide), _cast(starts[batch], wide)) for batch in _batches(ends)
        )
        return self.l2_norm([self.l2_norm(list(tensors)) for tensors in differences])

    @checked(writes=["params", "directions"])
    @torch.no_grad()
    def perturb_(
        self,
        params: TensorList,
        directions: TensorList,
        direction_norm: Tensor,
        grad_norm: Tensor,
        rho: float,
        xi: float,
        *,
        rounding_seed: int | None = None,
    ) -> None:
        """See :meth:`Backend.perturb_`. Rounds stochastically one tensor after another."""
        if not params:
            return
        wide = accumulation_dtype(params[0].dtype)
        norm_u, norm_g = as_scalar(direction_norm, params), as_scalar(grad_norm, params)
        scale = rho / (norm_u + xi * (norm_g + xi))
        is_finite = norm_u.isfinite() & norm_g.isfinite() & scale.isfinite()
        # The adversarial point of the whole list has to exist before the first backup is written: once all backups are,
        # and no parameter is, the direction is stored nowhere else. So this takes as much temporary memory as the
        # parameters do, and a kernel that swaps element by element takes none.
        adversarial: list[Tensor] = []
        for batch in _batches(params):
            moved = torch._foreach_mul(_cast(directions[batch], wide), scale)
            torch._foreach_add_(moved, _cast(params[batch], wide))
            if rounding_seed is None:
                points = _cast(moved, params[0].dtype)
            else:
                here = zip(range(*batch.indices(len(params))), moved, strict=True)
                points = [
                    rounded(point, params[0].dtype, rounding_seed, i, places_of([params[i], directions[i]]))
                    for i, point in here
                ]
            adversarial += [
                torch.where(is_finite, point, param) for point, param in zip(points, params[batch], strict=True)
            ]
        torch._foreach_copy_(list(directions), list(params))
        torch._foreach_copy_(list(params), adversarial)

    @torch.no_grad()
    def shift_(
        self,
        params: TensorList,
        origins: TensorList,
        ends: TensorList,
        starts: TensorList,
        norm: Tensor,
        rho: float,
        xi: float,
        *,
        rounding_seed: int | None = None,
    ) -> None:
        """See :meth:`Backend.shift_`. Rounds stochastically one tensor after another."""
        validate_shift(params, origins, ends, starts)
        if not params:
            return
        wide = accumulation_dtype(params[0].dtype)
        length = as_scalar(norm, params)
        scale = rho / (length + xi)
        is_finite = length.isfinite() & scale.isfinite()
        origins = origins or params
        for batch in _batches(params):
            directions = _cast(ends[batch], wide)
            if starts:
                directions = list(torch._foreach_sub(directions, _cast(starts[batch], wide)))
            shifted = torch._foreach_mul(directions, scale)
            torch._foreach_add_(shifted, _cast(origins[batch], wide))
            if rounding_seed is None:
                points = _cast(shifted, params[0].dtype)
            else:
                points = [
                    rounded(
                        point,
                        params[0].dtype,
                        rounding_seed,
                        i,
                        places_of([tensors[i] for tensors in (params, origins, ends, starts) if tensors]),
                    )
                    for i, point in zip(range(*batch.indices(len(params))), shifted, strict=True)
                ]
            moved = [torch.where(is_finite, *pair) for pair in zip(points, origins[batch], strict=True)]
            torch._foreach_copy_(list(params[batch]), moved)

    @checked(writes=["params"], reads=["backups"])
    @torch.no_grad()
    def restore_(self, params: TensorList, backups: TensorList) -> None:
        """See :meth:`Backend.restore_`."""
        _copy(params, backups)

    @checked(writes=["params", "grads"], reads=["backups", "hvps"])
    @torch.no_grad()
    def combine_(
        self,
        params: TensorList,
        backups: TensorList,
        grads: TensorList,
        hvps: TensorList,
        adversarial_norm: Tensor,
        rho: float,
        alpha: float,
        xi: float,
    ) -> None:
        """See :meth:`Backend.combine_`."""
        if not params:
            return
        _copy(params, backups)
        wide = accumulation_dtype(params[0].dtype)
        scale = alpha * rho / (as_scalar(adversarial_norm, params) + xi)
        for batch in _batches(grads):
            penalty = torch._foreach_mul(_cast(hvps[batch], wide), scale)
            combined = _cast(grads[batch], wide)
            torch._foreach_add_(combined, penalty)
            if wide != grads[0].dtype:
                torch._foreach_copy_(list(grads[batch]), combined)

    @torch.no_grad()
    def projection(self, gradients: FourGradients) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`Backend.projection`."""
        validate_lists(reads=gradients.lists)
        if not gradients.grads:
            return (self.l2_norm([]),) * 3
        dots, plus_norms, minus_norms = [], [], []
        for batch in _batches(gradients.grads):
            # Flat, and in one order of elements, however tensors of equal index lie in memory.
            plus, minus = (torch.cat([tensor.reshape(-1) for tensor in mixed]) for mixed in _mixed(gradients, batch))
            dots.append(_chunk_sums(plus * minus))
            plus_norms.append(_chunk_norms(plus, plus.dtype))
            minus_norms.append(_chunk_norms(minus, minus.dtype))
        plus_norm, minus_norm = self.l2_norm(plus_norms), self.l2_norm(minus_norms)
        dot = torch.cat(dots)
        while dot.numel() > 1:
            dot = _chunk_sums(dot)
        return torch.where(plus_norm == 0, plus_norm, dot.view(()) / plus_norm), plus_norm, minus_norm

    @torch.no_grad()
    def decompose_(self, gradients: FourGradients, projection: Tensor, plus_norm: Tensor, xi: float) -> None:
        """See :meth:`Backend.decompose_`."""
        lists = gradients.lists
        validate_lists(writes={key: lists.pop(key) for key in ("grads", "grads_ahead")}, reads=lists)
        if not gradients.grads:
            return
        norm = as_scalar(plus_norm, gradients.grads)
        scale = as_scalar(projection, gradients.grads) / (norm + xi) * (norm / (norm + xi))
        for batch in _batches(gradients.grads):
            plus, minus = _mixed(gradients, batch)
            torch._foreach_sub_(minus, torch._foreach_mul(plus, scale))
            torch._foreach_copy_(list(gradients.grads[batch]), plus)
            torch._foreach_copy_(list(gradients.grads_ahead[batch]), minus)


def _mixed(gradients: FourGradients, batch: slice) -> tuple[list[Tensor], list[Tensor]]:
    """h⁺ and h⁻ of the parameters in ``batch``, as new tensors in the accumulation dtype."""
    wide = accumulation_dtype(gradients.grads[0].dtype)
    g0, g1, g2, g3 = (
        list(torch._foreach_mul(_cast(tensors[batch], wide), weight))
        for tensors, weight in zip(gradients.lists.values(), gradients.weights, strict=True)
    )
    torch._foreach_add_(g1, g3)
    torch._foreach_add_(g0, g2)
    return g1, g0


def _copy(to: TensorList, tensors: TensorList) -> None:
    if to:
        torch._foreach_copy_(list(to), list(tensors))


def _cast(tensors: TensorList, dtype: torch.dtype) -> list[Tensor]:
    """The tensors in ``dtype``: themselves where they have it, otherwise copies, rounded once."""
    if tensors[0].dtype == dtype:
        return list(tensors)
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, list(tensors))
    return copies


def _batches(tensors: TensorList) -> Iterator[slice]:
    """Slices of the list whose tensors take up to ``_BATCH_BYTES`` in the accumulation dtype, or one larger tensor."""
    itemsize = accumulation_dtype(tensors[0].dtype).itemsize
    start, size = 0, 0
    for i, tensor in enumerate(tensors):
        nbytes = tensor.numel() * itemsize
        if i > start and size + nbytes > _BATCH_BYTES:
            yield slice(start, i)
            start, size = i, 0
        size += nbytes
    yield slice(start, len(tensors))


def _flat(tensor: Tensor) -> Tensor:
    """All elements in one dimension, in the order of memory: a view of dense tensors, a copy of those with gaps."""
    by_stride = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(by_stride).reshape(-1)


def _chunk_norms(flat: Tensor, dtype: torch.dtype) -> Tensor:
    """2-norms of consecutive chunks of a 1-d contiguous tensor. Threads share out whole chunks, so they leave no trace.

    Chunks are also more exact than a long float32 vector in one go, and widening a narrower one block by block is
    several times faster than ``vector_norm(..., dtype=torch.float32)``.
    """
    norms = []
    for block in torch.split(flat, _BLOCK):
        block = block.to(dtype)
        whole = block.numel() // _CHUNK * _CHUNK
        norms.append(torch.linalg.vector_norm(block[:whole].view(-1, _CHUNK), dim=1))
        if whole < block.numel():
            norms.append(torch.linalg.vector_norm(block[whole:]).view(1))
    return torch.cat(norms)


def _chunk_sums(flat: Tensor) -> Tensor:
    """Sums of consecutive chunks of a 1-d contiguous tensor, one after another as in :func:`_chunk_norms`."""
    whole = flat.numel() // _CHUNK * _CHUNK
    return torch.cat([flat[:whole].view(-1, _CHUNK).sum(dim=1), flat[whole:].sum().view(1)])
