"""Groups of channels, and one channel of one sample."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gam_fused.second_order.group_norm import REPLACEMENTS, group_norm, instance_norm
from tests.second_order.common import assert_close, derivatives, is_ours


def test_replaces_pytorchs() -> None:
    assert {F.group_norm: group_norm, F.instance_norm: instance_norm} == REPLACEMENTS


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_every_number_of_groups(groups: int) -> None:
    x = torch.randn(3, 8, 5, dtype=torch.float64, requires_grad=True)
    w, b = (torch.randn(8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    found = derivatives(lambda x, w, b: group_norm(x, groups, w, b), [x, w, b])
    expected = derivatives(lambda x, w, b: F.group_norm(x, groups, w, b), [x, w, b])
    assert_close(found["product"], expected["product"], 1e-12)


def test_parameters_need_not_be_contiguous() -> None:
    x = torch.randn(3, 8, 5, dtype=torch.float64, requires_grad=True)
    w, b = (torch.randn(16, dtype=torch.float64)[::2].requires_grad_() for _ in range(2))
    found = derivatives(lambda x, w, b: group_norm(x, 4, w, b), [x, w, b])
    expected = derivatives(lambda x, w, b: F.group_norm(x, 4, w, b), [x, w, b])
    assert_close(found["product"], expected["product"], 1e-12)


@pytest.mark.parametrize(
    ("shape", "groups", "error"),
    [
        ((1, 4), 4, "more than 1 value per channel"),
        ((2, 4, 3), 3, "divisible"),
        ((5,), 1, "at least 2 dimensions"),
    ],
)
def test_refuses_what_pytorch_refuses(shape: tuple[int, ...], groups: int, error: str) -> None:
    x = torch.randn(shape, requires_grad=True)
    for function in (F.group_norm, group_norm):
        with pytest.raises((RuntimeError, ValueError), match=error):
            function(x, groups)


# ---------------------------------------------------------------- instance normalization


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("momentum", [0.1, 1.0])
def test_running_statistics_are_pytorchs_to_the_bit(momentum: float, memory_format: torch.memory_format) -> None:
    x = torch.randn(4, 3, 5, 2).to(memory_format=memory_format).requires_grad_()
    running = []
    for function in (instance_norm, F.instance_norm):
        statistics = [torch.zeros(3), torch.ones(3)]
        for _ in range(3):
            output = function(x, *statistics, momentum=momentum)
        if function is instance_norm:
            assert is_ours(output)
        running.append(statistics)
    for one, other in zip(*running, strict=True):
        assert torch.equal(one, other)


def test_running_statistics_in_place_of_the_inputs() -> None:
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    w, b = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mean, var = torch.randn(3).double(), torch.rand(3).double() + 0.5
    found = derivatives(lambda x, w, b: instance_norm(x, mean, var, w, b, use_input_stats=False), [x, w, b])
    expected = derivatives(lambda x, w, b: F.instance_norm(x, mean, var, w, b, use_input_stats=False), [x, w, b])
    for what, values in found.items():
        assert_close(values, expected[what], 1e-12)
    assert is_ours(instance_norm(x, mean, var, use_input_stats=False))


def test_refuses_one_element_to_a_channel_as_pytorch_does() -> None:
    x = torch.randn(4, 3, 1, requires_grad=True)
    for function in (F.instance_norm, instance_norm):
        with pytest.raises(ValueError, match="more than 1 spatial element"):
            function(x)
