"""One step of GAM by the literal formulas, for losses that are written with modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gam_fused import reference

LossFunction = Callable[[list[Tensor]], Tensor]


def as_function(model: nn.Module, loss: Callable[[Callable[..., Any]], Tensor]) -> LossFunction:
    """``loss(model)`` as a function of the model's parameters; each call starts from the buffers of this moment."""
    twin = copy.deepcopy(model)
    names = [name for name, _ in twin.named_parameters()]
    buffers = {name: buffer.clone() for name, buffer in twin.named_buffers()}

    def of_parameters(params: list[Tensor]) -> Tensor:
        fresh = {name: buffer.clone() for name, buffer in buffers.items()}
        tensors = {**dict(zip(names, params, strict=True)), **fresh}
        return loss(lambda *args, **kwargs: torch.func.functional_call(twin, tensors, args, kwargs))

    return of_parameters


def combined_gradient(
    loss: LossFunction, params: Iterable[Tensor], *, rho: float, alpha: float, xi: float = 1e-12
) -> list[Tensor]:
    """g + α h, what a step leaves in ``.grad``."""
    return reference.gam_terms(loss, copies(params), rho, alpha, xi).combined


def step(
    loss: LossFunction, params: Iterable[Tensor], *, rho: float, alpha: float, lr: float, xi: float = 1e-12
) -> list[Tensor]:
    """The parameters after one GAM step around plain SGD."""
    theta = copies(params)
    combined = combined_gradient(loss, theta, rho=rho, alpha=alpha, xi=xi)
    return reference.SGD(lr=lr).step(theta, combined)


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def assert_equal_bits(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    torch.testing.assert_close(list(actual), list(expected), rtol=0, atol=0, equal_nan=True)


def assert_equal_to_rounding(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Within 1e-12, for float64 numbers of the order of 1 that were computed along two ways."""
    actual, expected = list(actual), list(expected)
    assert all(tensor.dtype == torch.float64 for tensor in [*actual, *expected])
    torch.testing.assert_close(copies(actual), copies(expected), rtol=1e-12, atol=1e-12)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
