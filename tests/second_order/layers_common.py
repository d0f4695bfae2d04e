"""What the tests of layers share: every derivative of a layer, beside PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck

from gam_fused.second_order import sizes

Function = Callable[..., Tensor]

# Of the largest element: two ways of rounding, a few hundred terms in a sum.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@contextmanager
def every_size_worthwhile() -> Iterator[None]:
    """Layers that leave small tensors to PyTorch take these too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizes, "WORTHWHILE", 0)
        yield


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def is_ours(tensor: Tensor) -> bool:
    """Whether a layer of ours made ``tensor``, or what it is a view or a cast of."""
    nodes = [tensor.grad_fn]
    for _ in range(8):
        for node in nodes:
            function = getattr(type(node), "_forward_cls", None)
            if function is not None and function.__module__.startswith("gam_fused.second_order"):
                return True
        nodes = [following for node in nodes if node is not None for following, _ in node.next_functions]
    return False


def all_derivatives(function: Function, inputs: Sequence[Tensor], seed: int = 1) -> dict[str, Tensor]:
    """Value, gradients and their derivatives in random directions, by name; random numbers start from ``seed``."""
    torch.manual_seed(seed)
    leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs]
    output = function(*leaves)
    after = torch.get_rng_state()
    generator = torch.Generator().manual_seed(2)

    def along(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)

    direction = along(output).requires_grad_()
    by = [leaf for leaf in leaves if leaf.requires_grad]
    once = grad(output, by, direction, retain_graph=True)
    grads = grad(output, by, direction, create_graph=True)
    curved = [tensor for tensor in grads if tensor.requires_grad]
    twice = grad(curved, [direction, *by], [along(tensor) for tensor in curved], allow_unused=True)
    products = [
        torch.zeros_like(leaf) if product is None else product
        for leaf, product in zip([direction, *by], twice, strict=True)
    ]
    results = {"value": output, "random state": after}
    results |= {f"gradient {i}": tensor for i, tensor in enumerate(grads)}
    results |= {f"gradient {i} without a graph": tensor for i, tensor in enumerate(once)}
    results |= {f"double backward {i}": tensor for i, tensor in enumerate(products)}
    return {name: tensor.detach() for name, tensor in results.items()}


def assert_like_pytorch(layer: Function, original: Function, inputs: Sequence[Tensor]) -> None:
    """Value, gradients, double backward, shapes, dtypes and what is drawn of random numbers are the same."""
    actual, expected = all_derivatives(layer, inputs), all_derivatives(original, inputs)
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        found = actual[name]
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype), name
        if not wanted.is_floating_point():
            assert torch.equal(found, wanted), name
        elif wanted.numel():
            size = wanted.abs().max().item()
            error = (found - wanted).abs().max().item()
            # Operands are about one: where terms of their size cancel, what is left of them is rounding.
            assert error <= TOLERANCE[inputs[0].dtype] * max(size, 0.1), f"{name}: {error} of {size}"


def assert_differentiable_twice(layer: Function, inputs: Sequence[Tensor], **options: Any) -> None:
    """By finite differences, in float64."""
    assert gradcheck(layer, tuple(inputs), **options)
    assert gradgradcheck(layer, tuple(inputs), **options)


def third_derivative(function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Of one number made from a gradient penalty, by the inputs: what a step of GAM on such a penalty takes."""
    leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs]
    by = [leaf for leaf in leaves if leaf.requires_grad]
    output = function(*leaves)
    grads = grad((output * output).sum() + output.sin().sum(), by, create_graph=True)
    penalty = torch.stack([tensor.square().sum() for tensor in grads]).sum()
    slopes = grad(penalty, by, create_graph=True)
    return [tensor.detach() for tensor in grad(torch.stack([t.square().sum() for t in slopes]).sum(), by)]


def assert_third_derivative_like_pytorch(layer: Function, original: Function, inputs: Sequence[Tensor]) -> None:
    actual, expected = third_derivative(layer, inputs), third_derivative(original, inputs)
    for found, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11 * wanted.abs().max().item())
