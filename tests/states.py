"""Everything that a step may change, as one value to compare bit by bit."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from gam_fused.wrapping import OptimizerWrapper


def snapshot(model: nn.Module, optimizer: OptimizerWrapper) -> dict[str, Any]:
    """Parameters, buffers, ``.grad``, optimizer state, param groups and random states, copied."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return {
        "params": {name: _bits(param) for name, param in model.named_parameters()},
        "buffers": {name: _bits(buffer) for name, buffer in model.named_buffers()},
        "grads": {name: None if param.grad is None else _bits(param.grad) for name, param in model.named_parameters()},
        "state": [_copied(optimizer.state[param]) for param in model.parameters() if param in optimizer.state],
        "groups": _copied(groups),
        "random": (_bits(torch.get_rng_state()), random.getstate(), _copied(numpy.random.get_state())),
    }


def assert_same(before: Any, after: Any, where: str = "") -> None:
    """Equal structure and equal bits, NaN payloads and signed zeros included."""
    assert type(before) is type(after), where
    if isinstance(before, dict):
        assert before.keys() == after.keys(), where
        for key in before:
            assert_same(before[key], after[key], f"{where}.{key}")
    elif isinstance(before, list | tuple):
        assert len(before) == len(after), where
        for i, (one, other) in enumerate(zip(before, after, strict=True)):
            assert_same(one, other, f"{where}[{i}]")
    elif isinstance(before, Tensor):
        assert torch.equal(before, after), where
    elif isinstance(before, numpy.ndarray):
        assert numpy.array_equal(before, after), where
    else:
        assert before == after, where


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().contiguous().reshape(-1).view(torch.uint8)


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(entry) for entry in value)
    return _bits(value) if isinstance(value, Tensor) else value
