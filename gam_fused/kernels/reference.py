"""The arithmetic as plain loops over tensors: what the other back ends are compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gam_fused.kernels.interface import FusingBackend, accumulation_dtype
from gam_fused.kernels.rounding import places_of, rounded
from gam_fused.kernels.rules import AdamWRule, AdamWState, Descent, FourGradients, SGDRule, TensorList
from gam_fused.kernels.validation import checked, validate_lists, validate_shift, validate_steps

# Fewer than the 32768 elements from which on PyTorch may split a sum among threads, which changes its last bits.
_CHUNK = 16384


class ReferenceBackend(FusingBackend):
    """One tensor after another, one formula per line. For tests: slow, and ``auto`` never picks it."""

    name = "reference"

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
        total = torch.zeros((), dtype=wide, device=tensors[0].device)
        for tensor in tensors:
            for chunk in torch.split(tensor.flatten(), _CHUNK):
                total += chunk.to(wide).square().sum()
        return total.sqrt()

    @checked(reads=["ends", "starts"])
    @torch.no_grad()
    def difference_norm(self, ends: TensorList, starts: TensorList) -> Tensor:
        """See :meth:`Backend.difference_norm`."""
        wide = [tensor.to(accumulation_dtype(tensor.dtype)) for tensor in ends]
        return self.l2_norm([end - start.to(end.dtype) for end, start in zip(wide, starts, strict=True)])

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
        """See :meth:`Backend.perturb_`."""
        adversarial = []
        for i, (param, direction) in enumerate(zip(params, directions, strict=True)):
            wide = accumulation_dtype(param.dtype)
            norm_u, norm_g = direction_norm.to(param.device, wide), grad_norm.to(param.device, wide)
            scale = rho / (norm_u + xi * (norm_g + xi))
            moved = param.to(wide) + scale * direction.to(wide)
            moved = rounded(moved, param.dtype, rounding_seed, i, _places(rounding_seed, [param, direction]))
            adversarial.append(torch.where(norm_u.isfinite() & norm_g.isfinite() & scale.isfinite(), moved, param))
        for param, direction in zip(params, directions, strict=True):
            direction.copy_(param)
        for param, moved in zip(params, adversarial, strict=True):
            param.copy_(moved)

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
        """See :meth:`Backend.shift_`."""
        validate_shift(params, origins, ends, starts)
        for i, param in enumerate(params):
            wide = accumulation_dtype(param.dtype)
            origin = origins[i] if origins else param
            direction = ends[i].to(wide) - starts[i].to(wide) if starts else ends[i].to(wide)
            length = norm.to(param.device, wide)
            scale = rho / (length + xi)
            lists = [tensors[i] for tensors in (params, origins, ends, starts) if tensors]
            shifted = origin.to(wide) + scale * direction
            shifted = rounded(shifted, param.dtype, rounding_seed, i, _places(rounding_seed, lists))
            param.copy_(torch.where(length.isfinite() & scale.isfinite(), shifted, origin))

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
        _copy(params, backups)
        for grad, hvp in zip(grads, hvps, strict=True):
            wide = accumulation_dtype(grad.dtype)
            scale = alpha * rho / (adversarial_norm.to(grad.device, wide) + xi)
            grad.copy_(grad.to(wide) + scale * hvp.to(wide))

    @torch.no_grad()
    def projection(self, gradients: FourGradients) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`Backend.projection`."""
        validate_lists(reads=gradients.lists)
        if not gradients.grads:
            return _three_zeros(torch.float32, torch.device("cpu"))
        first = gradients.grads[0]
        dot, plus_squared, minus_squared = _three_zeros(accumulation_dtype(first.dtype), first.device)
        for i in range(len(gradients.grads)):
            plus, minus = (torch.split(mixed.flatten(), _CHUNK) for mixed in _mixed(gradients, i))
            for p, m in zip(plus, minus, strict=True):
                dot += (p * m).sum()
                plus_squared += p.square().sum()
                minus_squared += m.square().sum()
        plus_norm = plus_squared.sqrt()
        return torch.where(plus_norm == 0, plus_norm, dot / plus_norm), plus_norm, minus_squared.sqrt()

    @torch.no_grad()
    def decompose_(self, gradients: FourGradients, projection: Tensor, plus_norm: Tensor, xi: float) -> None:
        """See :meth:`Backend.decompose_`."""
        lists = gradients.lists
        writes = {key: lists.pop(key) for key in ("grads", "grads_ahead")}
        validate_lists(writes=writes, reads=lists)
        for i, (grad, ahead) in enumerate(zip(*writes.values(), strict=True)):
            wide = accumulation_dtype(grad.dtype)
            length, norm = projection.to(grad.device, wide), plus_norm.to(grad.device, wide) + xi
            plus, minus = _mixed(gradients, i)
            scale = length / norm * (plus_norm.to(grad.device, wide) / norm)
            grad.copy_(plus)
            ahead.copy_(minus - scale * plus)

    @torch.no_grad()
    def sgd_step_(
        self, descent: Descent, momentum_buffers: TensorList, rule: SGDRule, *, first_step: bool = False
    ) -> None:
        """See :meth:`FusingBackend.sgd_step_`."""
        _validate(descent, {"momentum_buffers": momentum_buffers} if rule.momentum or momentum_buffers else {})
        _copy(descent.params, descent.backups)
        if not _holds(descent):
            return
        momentum = [momentum_buffers] if momentum_buffers else []
        for i, param in enumerate(descent.params):
            wide = accumulation_dtype(param.dtype)
            theta = param.to(wide)
            d = _combined(descent, i, rule.maximize)
            if rule.weight_decay:
                d = d + rule.weight_decay * theta
            if rule.momentum:
                old = momentum_buffers[i].to(wide)
                buffer = d if first_step else rule.momentum * old + (1 - rule.dampening) * d
                momentum_buffers[i].copy_(buffer)
                d = d + rule.momentum * buffer if rule.nesterov else buffer
            param.copy_(_rounded(theta - float(rule.lr) * d, descent, i, momentum))

    @torch.no_grad()
    def adamw_step_(self, descent: Descent, state: AdamWState, rule: AdamWRule) -> None:
        """See :meth:`FusingBackend.adamw_step_`."""
        moments = {"exp_avgs": state.exp_avgs, "exp_avg_sqs": state.exp_avg_sqs}
        if rule.amsgrad or state.max_exp_avg_sqs:
            moments["max_exp_avg_sqs"] = state.max_exp_avg_sqs
        _validate(descent, moments)
        validate_steps(state.state_steps, descent.params)
        _copy(descent.params, descent.backups)
        if not _holds(descent):
            return
        beta1, beta2 = rule.betas
        lr = float(rule.lr)
        for i, param in enumerate(descent.params):
            wide = accumulation_dtype(param.dtype)
            theta = param.to(wide)
            d = _combined(descent, i, rule.maximize)
            if rule.decoupled_weight_decay:
                theta = theta - lr * rule.weight_decay * theta
            elif rule.weight_decay:
                d = d + rule.weight_decay * theta
            state.state_steps[i] += 1
            step = state.state_steps[i].item()
            mean = state.exp_avgs[i].to(wide)
            mean = mean + (1 - beta1) * (d - mean)
            square = beta2 * state.exp_avg_sqs[i].to(wide) + (1 - beta2) * d * d
            state.exp_avgs[i].copy_(mean)
            state.exp_avg_sqs[i].copy_(square)
            if rule.amsgrad:
                square = torch.maximum(state.max_exp_avg_sqs[i].to(wide), square)
                state.max_exp_avg_sqs[i].copy_(square)
            denominator = square.sqrt() / math.sqrt(1 - beta2**step) + rule.eps
            stepped = theta - lr / (1 - beta1**step) * mean / denominator
            param.copy_(_rounded(stepped, descent, i, list(moments.values())))


def _three_zeros(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = torch.zeros(3, dtype=dtype, device=device).unbind()
    return first, second, third


def _mixed(gradients: FourGradients, i: int) -> tuple[Tensor, Tensor]:
    """h⁺ and h⁻ of the parameter number ``i``, in the accumulation dtype."""
    wide = accumulation_dtype(gradients.grads[i].dtype)
    g0, g1, g2, g3 = (tensors[i].to(wide) for tensors in gradients.lists.values())
    w0, w1, w2, w3 = gradients.weights
    return w1 * g1 + w3 * g3, w0 * g0 + w2 * g2


def _copy(to: TensorList, tensors: TensorList) -> None:
    for target, tensor in zip(to, tensors, strict=True):
        target.copy_(tensor)


def _places(rounding_seed: int | None, tensors: TensorList) -> Tensor | None:
    return None if rounding_seed is None else places_of(tensors)


def _rounded(stepped: Tensor, descent: Descent, i: int, state: Sequence[TensorList]) -> Tensor:
    lists = [descent.params, descent.backups, descent.grads, descent.hvps, *state]
    places = _places(descent.rounding_seed, [tensors[i] for tensors in lists])
    return rounded(stepped, descent.params[i].dtype, descent.rounding_seed, i, places)


def _validate(descent: Descent, state: dict[str, TensorList]) -> None:
    validate_lists(
        writes={"params": descent.params, "grads": descent.grads, **state},
        reads={"backups": descent.backups, "hvps": descent.hvps},
    )


def _holds(descent: Descent) -> bool:
    finite = all(bool(norm.isfinite()) for norm in [descent.adversarial_norm, *descent.guards])
    return finite and (descent.found_inf is None or float(descent.found_inf) == 0)


def _combined(descent: Descent, i: int, maximize: bool) -> Tensor:
    """The gradient that the base rule steps along."""
    grad = descent.grads[i]
    wide = accumulation_dtype(grad.dtype)
    norm = descent.adversarial_norm.to(grad.device, wide)
    scale = descent.alpha * descent.rho / (norm + descent.xi)
    combined = grad.to(wide) + scale * descent.hvps[i].to(wide)
    if descent.grad_scale is not None:
        combined = combined / descent.grad_scale.to(grad.device, wide)
    if descent.write_grads:
        grad.copy_(combined)
    return -combined if maximize else combined
