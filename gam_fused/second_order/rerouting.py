"""The layers of this package in the place of PyTorch's, while a ``with`` statement lasts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

from gam_fused.second_order import (
    activations,
    attention,
    autocast,
    batch_norm,
    convolution,
    group_norm,
    layer_norm,
    linear,
    multi_head_attention,
    recurrent,
    rms_norm,
    softmax,
    weight_norm,
)
from gam_fused.second_order.inner_calls import without_overrides

_MODULES = (
    activations,
    attention,
    batch_norm,
    convolution,
    group_norm,
    layer_norm,
    linear,
    multi_head_attention,
    rms_norm,
    softmax,
)
_REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    original: layer for module in _MODULES for original, layer in module.REPLACEMENTS.items()
}
"""By each function of PyTorch, the layer that takes its place: the same arguments, the same result."""

_CORRECTIONS: dict[Callable[..., Any], Callable[..., Any]] = recurrent.REPLACEMENTS | weight_norm.REPLACEMENTS
"""The same of functions whose second derivative is missing or wrong in PyTorch. For tensors of any kind."""

_ARGUMENTS: dict[Callable[..., Any], frozenset[str]] = {
    original: frozenset(inspect.signature(layer).parameters) for original, layer in _REPLACEMENTS.items()
}
"""The names of each layer's arguments: calls by others, such as ``axis`` and ``out``, are left to PyTorch."""

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_DTYPES = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))


def layers() -> TorchFunctionMode:
    """Where functions of ``torch.nn.functional`` run on layers that are made to be differentiated twice.

    Example, a gradient penalty::

        with gam_fused.second_order.layers():
            output = critic(images)
        (slope,) = torch.autograd.grad(output.sum(), images, create_graph=True)
        (slope.square().sum(dim=(1, 2, 3)).sqrt() - 1).square().mean().backward()

    Only the forward pass has to be inside, unless ``torch.utils.checkpoint`` runs it again in the backward pass: then
    that, too. Values and derivatives are PyTorch's up to rounding, dtypes are exactly its, and so are draws of random
    numbers on the CPU (attention: those of its plain form).
    What has no layer here runs as before: other functions, tensor subclasses, integer, complex and sparse tensors,
    calls in which nothing requires gradients, ``torch.func`` transforms, forward-mode differentiation,
    ``torch.compile`` and ``torch.jit``. So does everything inside of a ``TorchFunctionMode`` that was there before:
    it is handed the calls that it would have been handed.

    Recurrent networks run without cuDNN, which has no second derivative of them, and weight normalization by operators
    whose second derivative is right.

    The mode is this thread's alone; nothing is patched.
    """
    return TwiceDifferentiable(reroutes=True)


class TwiceDifferentiable(TorchFunctionMode):
    """As :func:`layers`; without ``reroutes``, only where PyTorch's own second derivatives are missing or wrong."""

    def __init__(self, *, reroutes: bool) -> None:
        super().__init__()
        self._reroutes = reroutes

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return call(func, types, args, kwargs or {}, reroutes=self._reroutes)


def call(func: Callable[..., Any], types: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, reroutes: bool) -> Any:
    """``func(*args, **kwargs)``; with ``reroutes`` by the layer for ``func`` if there is one and it can.

    For the ``__torch_function__`` of a mode, whose arguments these are.
    """
    if (correct := _CORRECTIONS.get(func)) is not None:
        is_recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return (correct if is_recorded else func)(*args, **kwargs)
    if reroutes and (layer := _REPLACEMENTS.get(func)) is not None:
        if (
            _PLAIN.issuperset(types)
            and _has_arguments(func, kwargs)
            and _is_eager()
            and _can_take([*args, *kwargs.values()])
        ):
            return layer(*args, **kwargs)
    elif (differentiate := _DIFFERENTIATION.get(func)) is not None and _PLAIN.issuperset(types) and not _other_modes():
        with TwiceDifferentiable(reroutes=reroutes):
            return differentiate(*args, **kwargs)
    return func(*args, **kwargs)


def _has_arguments(func: Callable[..., Any], kwargs: Iterable[str]) -> bool:
    names = _ARGUMENTS[func]
    return names.issuperset(kwargs) or "kwargs" in names


def _grad(*args: Any, **kwargs: Any) -> Any:
    return without_overrides(torch.autograd.grad)(*args, **kwargs)


def _backward(*args: Any, **kwargs: Any) -> None:
    without_overrides(torch.autograd.backward)(*args, **kwargs)


def _tensor_backward(
    tensor: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    _backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)


_DIFFERENTIATION: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.autograd.grad: _grad,
    torch.autograd.backward: _backward,
    Tensor.backward: _tensor_backward,
}
"""What may run a checkpoint's part of the forward pass again, for which the mode has to be on."""


def _is_eager() -> bool:
    """Whether nothing but autograd records what is called, and it does."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not _other_modes()
    )


def _other_modes() -> bool:
    """Whether a mode of the user's lies below the one whose handler runs: it wants to see PyTorch's own functions."""
    below = torch._C._len_torch_function_stack()
    # torch.set_default_device is one, which has no say in calls that are given tensors.
    return any(not isinstance(torch._C._get_function_stack_at(i), DeviceContext) for i in range(below))


def _can_take(arguments: Iterable[Any]) -> bool:
    differentiated: Tensor | None = None
    for argument in arguments:
        if type(argument) in _PLAIN:
            if argument.layout is not torch.strided or argument.is_nested:
                return False
            if argument.requires_grad:
                if argument.dtype not in _DTYPES:
                    return False
                differentiated = argument
        elif isinstance(argument, Tensor):
            return False
    return differentiated is not None and autocast.is_known(differentiated.device.type)
