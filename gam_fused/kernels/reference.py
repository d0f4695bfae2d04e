"""The arithmetic as plain loops over tensors: what the other back ends are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from gam_fused.kernels.interface import Backend, TensorList, accumulation_dtype

# Fewer than the 32768 elements from which on PyTorch may split a sum among threads, which changes its last bits.
_CHUNK = 16384


class ReferenceBackend(Backend):
    """One tensor after another, one formula per line. For tests: slow, and ``auto`` never picks it."""

    name = "reference"

    @staticmethod
    def unavailable_reason() -> str | None:
        """``None``: runs wherever PyTorch runs."""
        return None

    @torch.no_grad()
    def _l2_norm(self, tensors: TensorList) -> Tensor:
        if not tensors:
            return torch.zeros((), dtype=torch.float32, device="cpu")
        wide = accumulation_dtype(tensors[0].dtype)
        total = torch.zeros((), dtype=wide, device=tensors[0].device)
        for tensor in tensors:
            for chunk in torch.split(tensor.flatten(), _CHUNK):
                total += chunk.to(wide).square().sum()
        return total.sqrt()

    @torch.no_grad()
    def _perturb_(
        self,
        params: TensorList,
        directions: TensorList,
        direction_norm: Tensor,
        grad_norm: Tensor,
        rho: float,
        xi: float,
    ) -> None:
        adversarial = []
        for param, direction in zip(params, directions, strict=True):
            wide = accumulation_dtype(param.dtype)
            norm_u, norm_g = direction_norm.to(param.device, wide), grad_norm.to(param.device, wide)
            scale = rho / (norm_u + xi * (norm_g + xi))
            moved = (param.to(wide) + scale * direction.to(wide)).to(param.dtype)
            adversarial.append(torch.where(norm_u.isfinite() & norm_g.isfinite() & scale.isfinite(), moved, param))
        for param, direction in zip(params, directions, strict=True):
            direction.copy_(param)
        for param, moved in zip(params, adversarial, strict=True):
            param.copy_(moved)

    @torch.no_grad()
    def _restore_(self, params: TensorList, backups: TensorList) -> None:
        for param, backup in zip(params, backups, strict=True):
            param.copy_(backup)

    @torch.no_grad()
    def _combine_(
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
        self._restore_(params, backups)
        for grad, hvp in zip(grads, hvps, strict=True):
            wide = accumulation_dtype(grad.dtype)
            scale = alpha * rho / (adversarial_norm.to(grad.device, wide) + xi)
            grad.copy_(grad.to(wide) + scale * hvp.to(wide))
