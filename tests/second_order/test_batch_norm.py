"""Running statistics, and which batches there are statistics of."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gam_fused.second_order.batch_norm import REPLACEMENTS, batch_norm
from tests.second_order.common import derivatives, is_ours, relative_error

SHAPES = {
    "2d": (6, 3),
    "3d": (4, 3, 5),
    "4d": (4, 3, 5, 2),
    "channels_last": (4, 3, 5, 2),
    "5d": (2, 3, 2, 3, 2),
}
over_shapes = pytest.mark.parametrize("name", SHAPES)


def batch(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(SHAPES[name], dtype=dtype) * 2 + 1
    return x.to(memory_format=torch.channels_last) if name == "channels_last" else x


def test_replaces_pytorchs() -> None:
    assert {F.batch_norm: batch_norm} == REPLACEMENTS


@over_shapes
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_running_statistics_are_pytorchs_to_the_bit(name: str, momentum: float, dtype: torch.dtype) -> None:
    x = batch(name, dtype).requires_grad_()
    running = []
    for function in (batch_norm, F.batch_norm):
        statistics = [torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)]
        for _ in range(3):
            output = function(x, *statistics, training=True, momentum=momentum)
        if function is batch_norm:
            assert is_ours(output)
        running.append(statistics)
    for one, other in zip(*running, strict=True):
        assert torch.equal(one, other)


def test_a_module_with_cumulative_statistics_counts_alike() -> None:
    states = []
    for function in (batch_norm, F.batch_norm):
        torch.manual_seed(0)
        module = nn.BatchNorm2d(3, momentum=None)
        for _ in range(3):
            x = torch.randn(4, 3, 5, 2, requires_grad=True)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(F, "batch_norm", function)
                module(x).sum().backward()
        states.append(module.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


@over_shapes
def test_channels_keep_their_place_in_memory(name: str) -> None:
    x = batch(name).requires_grad_()
    output = batch_norm(x, None, None, training=True)
    assert output.stride() == x.stride()
    grad_output = torch.randn_like(output).requires_grad_()
    (grad,) = torch.autograd.grad(output, x, grad_output, create_graph=True)
    products = torch.autograd.grad(grad, [grad_output, x], torch.randn_like(grad))
    assert [product.stride() for product in products] == [x.stride()] * 2


def test_running_statistics_may_change_before_the_second_derivative() -> None:
    x = batch("4d", torch.float64).requires_grad_()
    mean, var = torch.zeros(3).double(), torch.ones(3).double()

    def changing(x: Tensor) -> Tensor:
        output = batch_norm(x, mean, var, training=True)
        mean.zero_()
        var.fill_(1)
        return output

    found = derivatives(changing, [x])
    expected = derivatives(lambda x: F.batch_norm(x, None, None, training=True), [x])
    assert relative_error(found["product"][0], expected["product"][0]) <= 1e-12


def test_in_evaluation_a_change_of_running_statistics_is_not_overlooked() -> None:
    x = batch("4d").requires_grad_()
    mean, var = torch.zeros(3), torch.ones(3)
    w = torch.ones(3, requires_grad=True)
    output = batch_norm(x, mean, var, w)
    var.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(output.sum(), x)


@pytest.mark.parametrize(
    ("shape", "running", "options", "message"),
    [
        ((1, 3), (None, None), {"training": True}, "more than 1 value per channel"),
        ((1, 3, 1, 1), (None, None), {"training": True}, "more than 1 value per channel"),
        ((4, 3), (None, None), {"training": True, "eps": 0.0}, "eps must be positive"),
        ((4, 3), (torch.zeros(3), torch.ones(3)), {"eps": -1.0}, "eps must be non-negative"),
        ((4, 3), (None, None), {}, "running_mean and running_var must be defined|running_mean"),
        ((4, 3), (torch.zeros(2), torch.ones(2)), {"training": True}, "running_mean should contain 3 elements"),
    ],
)
def test_refuses_what_pytorch_refuses(
    shape: tuple[int, ...], running: tuple[Tensor | None, ...], options: dict[str, float], message: str
) -> None:
    x = torch.randn(shape, requires_grad=True)
    for function in (F.batch_norm, batch_norm):
        with pytest.raises((RuntimeError, ValueError), match=message):
            function(x, *running, **options)
