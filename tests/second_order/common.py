"""The layers beside PyTorch's, and what is compared of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gam_fused.kernels import extension
from gam_fused.second_order.batch_norm import batch_norm
from gam_fused.second_order.group_norm import group_norm, instance_norm
from gam_fused.second_order.layer_norm import layer_norm
from gam_fused.second_order.rms_norm import rms_norm

needs_native = pytest.mark.skipif(
    extension.unavailable_reason() is not None, reason=str(extension.unavailable_reason())
)

Function = Callable[..., Tensor]
EPS = 0.1  # large, so that a derivative that forgets it is not taken for one that rounds


@dataclass(frozen=True)
class Case:
    """A layer with settings: functions of (input, *parameters), PyTorch's and ours."""

    theirs: Function
    ours: Function
    shape: tuple[int, ...]
    parameters: tuple[tuple[int, ...], ...] = field(default=())
    operator: str = ""

    def tensors(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        shifts = (0.4, 1.0, 0.2)
        return [
            (torch.randn(shape, dtype=torch.float64) + shift).to(dtype).requires_grad_()
            for shape, shift in zip((self.shape, *self.parameters), shifts, strict=False)
        ]


def _batch_norm(shape: tuple[int, ...], parameters: int = 2, *, training: bool = True) -> Case:
    channels = shape[1]
    mean, var = torch.linspace(-0.5, 0.7, channels, dtype=torch.float64), torch.linspace(0.4, 2.0, channels).double()

    def of(function: Function) -> Function:
        def call(x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
            running = (None, None) if training else (mean.to(x), var.to(x))
            return function(x, *running, w, b, training, 0.1, EPS)

        return call

    return Case(of(F.batch_norm), of(batch_norm), shape, ((channels,),) * parameters, "batch_norm_double_backward")


def _group_norm(shape: tuple[int, ...], groups: int, parameters: int = 2) -> Case:
    def of(function: Function) -> Function:
        return lambda x, w=None, b=None: function(x, groups, w, b, EPS)

    return Case(of(F.group_norm), of(group_norm), shape, ((shape[1],),) * parameters, "group_norm_double_backward")


def _instance_norm(shape: tuple[int, ...], parameters: int = 2) -> Case:
    def of(function: Function) -> Function:
        return lambda x, w=None, b=None: function(x, None, None, w, b, True, 0.1, EPS)

    operator = "batch_norm_double_backward"
    return Case(of(F.instance_norm), of(instance_norm), shape, ((shape[1],),) * parameters, operator)


def _layer_norm(shape: tuple[int, ...], dims: int, parameters: int = 2) -> Case:
    sizes = shape[len(shape) - dims :]

    def of(function: Function) -> Function:
        return lambda x, w=None, b=None: function(x, list(sizes), w, b, EPS)

    return Case(of(F.layer_norm), of(layer_norm), shape, (sizes,) * parameters, "layer_norm_double_backward")


def _rms_norm(shape: tuple[int, ...], dims: int, parameters: int = 1, eps: float | None = EPS) -> Case:
    sizes = shape[len(shape) - dims :]

    def of(function: Function) -> Function:
        return lambda x, w=None: function(x, list(sizes), w, eps)

    return Case(of(F.rms_norm), of(rms_norm), shape, (sizes,) * parameters, "layer_norm_double_backward")


CASES = {
    "batch_norm": _batch_norm((3, 2, 3, 2)),
    "batch_norm-2d": _batch_norm((5, 3)),
    "batch_norm-3d": _batch_norm((2, 3, 5)),
    "batch_norm-5d": _batch_norm((2, 2, 1, 3, 2)),
    "batch_norm-one-sample": _batch_norm((1, 2, 3, 3)),
    "batch_norm-no-bias": _batch_norm((3, 2, 3, 2), 1),
    "batch_norm-not-affine": _batch_norm((3, 2, 3, 2), 0),
    "batch_norm-eval": _batch_norm((3, 2, 3, 2), training=False),
    "batch_norm-eval-one-element": _batch_norm((1, 3), training=False),
    "batch_norm-eval-not-affine": _batch_norm((3, 2, 3, 2), 0, training=False),
    "group_norm": _group_norm((2, 6, 3, 1), 3),
    "group_norm-one-group": _group_norm((2, 3, 5), 1),
    "group_norm-of-one-channel": _group_norm((2, 3, 5), 3),
    "group_norm-2d": _group_norm((3, 6), 2),
    "group_norm-not-affine": _group_norm((2, 4, 3), 2, 0),
    "instance_norm": _instance_norm((2, 3, 2, 2)),
    "instance_norm-one-sample": _instance_norm((1, 3, 5)),
    "instance_norm-not-affine": _instance_norm((2, 3, 4), 0),
    "layer_norm": _layer_norm((3, 2, 5), 1),
    "layer_norm-2-dims": _layer_norm((4, 3, 2), 2),
    "layer_norm-all-dims": _layer_norm((7,), 1),
    "layer_norm-no-bias": _layer_norm((3, 2, 3), 1, 1),
    "layer_norm-not-affine": _layer_norm((3, 2, 3), 1, 0),
    "rms_norm": _rms_norm((3, 2, 5), 1),
    "rms_norm-2-dims": _rms_norm((4, 3, 2), 2),
    "rms_norm-default-eps": _rms_norm((3, 5), 1, eps=None),
    "rms_norm-not-affine": _rms_norm((3, 5), 1, 0),
}
LARGER = {
    "batch_norm": _batch_norm((8, 5, 17, 13)),
    "batch_norm-2d": _batch_norm((33, 301)),
    "batch_norm-eval": _batch_norm((8, 5, 17, 13), training=False),
    "group_norm": _group_norm((4, 12, 11, 9), 3),
    "instance_norm": _instance_norm((4, 5, 11, 9)),
    "layer_norm": _layer_norm((7, 9, 130), 1),
    "rms_norm": _rms_norm((7, 9, 130), 1),
}


def over(cases: dict[str, Case]) -> Any:
    return pytest.mark.parametrize("case", list(cases.values()), ids=list(cases))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else x,
}
over_layouts = pytest.mark.parametrize("layout", list(LAYOUTS.values()), ids=list(LAYOUTS))


def derivatives(function: Function, tensors: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """Value, gradient and Hessian-vector product of a loss with a curvature of its own; zeros where there is none."""
    output = function(*tensors)
    weights = torch.linspace(0.3, 1.7, output.numel(), dtype=torch.float64).to(output).view(output.shape)
    grads = torch.autograd.grad((output.tanh() * weights).sum(), tensors, create_graph=True)
    generator = torch.Generator().manual_seed(1)
    vectors = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in tensors]
    products = torch.autograd.grad(grads, tensors, vectors, allow_unused=True, materialize_grads=True)
    return {"value": [output.detach()], "gradient": [grad.detach() for grad in grads], "product": list(products)}


def relative_error(found: Tensor, expected: Tensor) -> float:
    scale = expected.double().norm()
    error = (found.double() - expected.double()).norm()
    return float(error / scale) if scale > 0 else float(error)


def assert_close(found: Sequence[Tensor | None], expected: Sequence[Tensor | None], tolerance: float) -> None:
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert (one is None) == (other is None), i
        if one is not None and other is not None:
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            assert relative_error(one, other) <= tolerance, i


def is_ours(output: Tensor) -> bool:
    """Whether the layer was computed by one of ours, perhaps seen through a view."""
    nodes = [output.grad_fn]
    while nodes and nodes[0] is not None and "View" in nodes[0].name():
        nodes = [nodes[0].next_functions[0][0]]
    return nodes[0] is not None and nodes[0].name() == "_ForwardBackward"


class Operators(TorchDispatchMode):
    """What is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
