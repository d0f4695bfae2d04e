"""What the fused base rules share: whether to step at all, along which gradient, how fast."""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from gam_fused.kernels.triton_rules import divide, is_finite, number


@triton.jit
def holds(adversarial_norm, guards, guard_count, found_inf):
    """Whether the step is taken at all."""
    is_taken = is_finite(tl.load(adversarial_norm))
    for i in range(guard_count):
        is_taken = is_taken & is_finite(tl.load(guards + i))
    if found_inf is not None:
        is_taken = is_taken & (tl.load(found_inf) == 0.0)
    return is_taken


@triton.jit
def unscaling_factor(grad_scale, A: tl.constexpr):
    """What undoes a gradient scaler's factor."""
    if grad_scale is not None:
        return divide(tl.full([], 1.0, A), tl.load(grad_scale).to(A))
    else:
        return tl.full([], 1.0, A)


@triton.jit
def learning_rate(lr, lr_tensor, A: tl.constexpr):
    """The tensor's, where there is one."""
    if lr_tensor is not None:
        return tl.load(lr_tensor)
    else:
        return number(lr, A)


@triton.jit
def downhill(grad, MAXIMIZE: tl.constexpr):
    """As in torch.optim, ``maximize`` leaves the gradient itself alone."""
    if MAXIMIZE:
        return -grad
    else:
        return grad
