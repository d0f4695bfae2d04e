"""Gradients of several outputs at once, and their derivatives: PyTorch's, or a clear error."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import grad

from gam_fused.second_order import layers
from tests.second_order.layers_common import draw, every_size_worthwhile, is_ours

Function = Callable[[Tensor, Tensor], Tensor]

LAYERS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Function]] = {
    "linear": ((3, 4), (2, 4), F.linear),
    "conv2d": ((2, 2, 5, 5), (3, 2, 3, 3), F.conv2d),
    "batch_norm": ((4, 3, 2), (3,), lambda x, w: F.batch_norm(x, None, None, w, training=True)),
    "layer_norm": ((3, 4), (4,), lambda x, w: F.layer_norm(x, (4,), w)),
    "gelu": ((3, 4), (4,), lambda x, w: F.gelu(x * w)),
    "relu": ((3, 4), (4,), lambda x, w: F.relu(x * w)),
    "softmax": ((3, 4), (4,), lambda x, w: F.softmax(x * w, -1)),
    "log_softmax": ((3, 4), (4,), lambda x, w: F.log_softmax(x * w, -1)),
}


@pytest.fixture(autouse=True)
def _every_size() -> Iterator[None]:
    with every_size_worthwhile():
        yield


def penalty(function: Function, x: Tensor, w: Tensor) -> list[Tensor]:
    """The gradient of the squares of three rows of a Jacobian."""
    output = function(x, w)
    directions = torch.linspace(-1, 2, 3 * output.numel(), dtype=torch.float64).sin().view(3, *output.shape)
    rows = grad(output, [x, w], directions, create_graph=True, is_grads_batched=True)
    total = torch.stack([row.square().sum() for row in rows]).sum() + output.square().sum()
    return [total.detach(), *grad(total, [x, w])]


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_derivatives_of_a_batch_of_gradients_are_pytorchs(name: str) -> None:
    shape, weights, function = LAYERS[name]
    x, w = draw(*shape), draw(*weights)
    expected = penalty(function, x, w)
    with layers():
        assert is_ours(function(x, w))
        found = penalty(function, x, w)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", ["cross_entropy", "group_norm", "rms_norm", "scaled_dot_product_attention", "silu"])
def test_what_cannot_be_batched_names_the_way_out(name: str) -> None:
    functions: dict[str, Function] = {
        "cross_entropy": lambda x, w: F.cross_entropy(x[0, 0] * w, torch.tensor([0, 1]), reduction="none"),
        "group_norm": lambda x, w: F.group_norm(x[0] * w, 1),
        "rms_norm": lambda x, w: F.rms_norm(x * w, (4,)),
        "silu": lambda x, w: F.silu(x * w),
        "scaled_dot_product_attention": lambda x, w: F.scaled_dot_product_attention(x * w, x, x),
    }
    with layers(), pytest.raises(RuntimeError, match=f"through {name}: .* or use second_order='off'"):
        penalty(functions[name], draw(1, 1, 2, 4), draw(4))
