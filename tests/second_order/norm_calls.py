"""Calls of the double backward of normalization layers, for every implementation of it. Needs nothing but torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gam_fused.second_order import formulas

ROW_KINDS = ("layer_norm", "rms_norm")  # without channels
KINDS = ("batch_norm", "batch_norm-eval", "group_norm", *ROW_KINDS)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def arguments(
    kind: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    *,
    channels_last: bool = False,
    missing: frozenset[str] = frozenset(),
    needs: tuple[bool, bool, bool] = (True, True, True),
    groups: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[Any, ...]:
    """Arguments of an operator. Statistics are any numbers: the formulas hold for all of them."""
    wide = formulas.accumulation_dtype(torch.empty((), dtype=dtype))

    def numbers(size: tuple[int, ...], of: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(of)

    def activations() -> Tensor:
        x = numbers(shape)
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x

    is_by_channel = kind in ("batch_norm", "batch_norm-eval", "group_norm")
    of_weight = shape[1:2] if is_by_channel else shape[-1:]
    of_sets = (shape[0], groups) if kind == "group_norm" else of_weight if is_by_channel else (*shape[:-1], 1)
    setting = {"batch_norm": True, "batch_norm-eval": False, "group_norm": groups}.get(kind, 1)
    named = {
        "grad_output": activations(),
        "input": activations(),
        "weight": numbers(of_weight),
        "mean": None if kind == "rms_norm" else numbers(of_sets, wide),
        "invstd": numbers(of_sets, wide).abs() + 0.5,
        "gg_input": activations(),
        "gg_weight": numbers(of_weight),
        "gg_bias": numbers(of_weight),
    }
    named |= dict.fromkeys(missing)
    return *named.values(), setting, *needs[:2], needs[2] and named["weight"] is not None


def function(module: Any, kind: str) -> Callable[..., tuple[Tensor | None, ...]]:
    name = {"batch_norm-eval": "batch_norm", "rms_norm": "layer_norm"}.get(kind, kind)
    return getattr(module, f"{name}_double_backward")


def in_float64(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.double() if isinstance(value, Tensor) else value for value in values)
