"""The arithmetic as plain loops over tensors: what the other back ends are compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gam_fused.kernels.interface import TensorList, accumulation_dtype
from gam_fused.kernels.rules import AdamWRule, SGDRule
from gam_fused.kernels.validating import ValidatingBackend
from gam_fused.kernels.validation import validate_lists, validate_steps

# Fewer than the 32768 elements from which on PyTorch may split a sum among threads, which changes its last bits.
_CHUNK = 16384


class ReferenceBackend(ValidatingBackend):
    """One tensor after another, one formula per line. For tests: slow, and ``auto`` never picks it."""

    name = "reference"
    fuses_base_rules = True

    @staticmethod
    def unavailable_reason(device: torch.device | None = None) -> str | None:
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

    @torch.no_grad()
    def sgd_step_(
        self,
        params: TensorList,
        backups: TensorList,
        grads: TensorList,
        hvps: TensorList,
        momentum_buffers: TensorList,
        adversarial_norm: Tensor,
        guards: TensorList,
        rho: float,
        alpha: float,
        xi: float,
        rule: SGDRule,
        *,
        first_step: bool,
        write_grads: bool = True,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """See :meth:`Backend.sgd_step_`."""
        state = {"momentum_buffers": momentum_buffers} if rule.momentum or momentum_buffers else {}
        validate_lists(writes={"params": params, "grads": grads, **state}, reads={"backups": backups, "hvps": hvps})
        self._restore_(params, backups)
        if not _holds([adversarial_norm, *guards], found_inf):
            return
        for i, param in enumerate(params):
            wide = accumulation_dtype(param.dtype)
            theta = param.to(wide)
            d = _combined(grads[i], hvps[i], adversarial_norm, rho, alpha, xi, grad_scale)
            if write_grads:
                grads[i].copy_(d)
            d = -d if rule.maximize else d
            if rule.weight_decay:
                d = d + rule.weight_decay * theta
            if rule.momentum:
                old = momentum_buffers[i].to(wide)
                buffer = d if first_step else rule.momentum * old + (1 - rule.dampening) * d
                momentum_buffers[i].copy_(buffer)
                d = d + rule.momentum * buffer if rule.nesterov else buffer
            param.copy_(theta - float(rule.lr) * d)

    @torch.no_grad()
    def adamw_step_(
        self,
        params: TensorList,
        backups: TensorList,
        grads: TensorList,
        hvps: TensorList,
        exp_avgs: TensorList,
        exp_avg_sqs: TensorList,
        max_exp_avg_sqs: TensorList,
        state_steps: TensorList,
        adversarial_norm: Tensor,
        guards: TensorList,
        rho: float,
        alpha: float,
        xi: float,
        rule: AdamWRule,
        *,
        write_grads: bool = True,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """See :meth:`Backend.adamw_step_`."""
        state = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
        if rule.amsgrad or max_exp_avg_sqs:
            state["max_exp_avg_sqs"] = max_exp_avg_sqs
        validate_lists(writes={"params": params, "grads": grads, **state}, reads={"backups": backups, "hvps": hvps})
        validate_steps(state_steps, params)
        self._restore_(params, backups)
        if not _holds([adversarial_norm, *guards], found_inf):
            return
        beta1, beta2 = rule.betas
        lr = float(rule.lr)
        for i, param in enumerate(params):
            wide = accumulation_dtype(param.dtype)
            theta = param.to(wide)
            d = _combined(grads[i], hvps[i], adversarial_norm, rho, alpha, xi, grad_scale)
            if write_grads:
                grads[i].copy_(d)
            d = -d if rule.maximize else d
            if rule.decoupled_weight_decay:
                theta = theta - lr * rule.weight_decay * theta
            elif rule.weight_decay:
                d = d + rule.weight_decay * theta
            state_steps[i] += 1
            step = state_steps[i].item()
            mean = exp_avgs[i].to(wide)
            mean = mean + (1 - beta1) * (d - mean)
            square = beta2 * exp_avg_sqs[i].to(wide) + (1 - beta2) * d * d
            exp_avgs[i].copy_(mean)
            exp_avg_sqs[i].copy_(square)
            if rule.amsgrad:
                square = torch.maximum(max_exp_avg_sqs[i].to(wide), square)
                max_exp_avg_sqs[i].copy_(square)
            denominator = square.sqrt() / math.sqrt(1 - beta2**step) + rule.eps
            param.copy_(theta - lr / (1 - beta1**step) * mean / denominator)


def _holds(norms: list[Tensor], found_inf: Tensor | None) -> bool:
    return all(bool(norm.isfinite()) for norm in norms) and (found_inf is None or float(found_inf) == 0)


def _combined(
    grad: Tensor,
    hvp: Tensor,
    adversarial_norm: Tensor,
    rho: float,
    alpha: float,
    xi: float,
    grad_scale: Tensor | None,
) -> Tensor:
    wide = accumulation_dtype(grad.dtype)
    scale = alpha * rho / (adversarial_norm.to(grad.device, wide) + xi)
    combined = grad.to(wide) + scale * hvp.to(wide)
    return combined if grad_scale is None else combined / grad_scale.to(grad.device, wide)
