"""Checks of what a user hands to an optimizer. One clear error: the argument, the value, the way out."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

SUPPORTED_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_non_negative(name: str, value: Any, where: str = "") -> None:
    """Raise unless ``value`` is a finite number, 0 or more."""
    place = f" ({where})" if where else ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}{place}; pass a Python float.")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}{place}.")


def check_positive(name: str, value: Any) -> None:
    """Raise unless ``value`` is a finite number above 0."""
    check_non_negative(name, value)
    if value == 0:
        raise ValueError(f"{name} must be > 0, got {value!r}.")


def checked_closure(closure: Any, otherwise: str = "") -> Callable[[], Any]:
    """``closure``, or an error if it cannot be called; ``otherwise``: what to do without one."""
    if not callable(closure):
        raise TypeError(
            f"closure must be a function that runs the forward pass and returns the loss, got {closure!r}; "
            f"call step(lambda: criterion(model(x), y)){otherwise}."
        )
    return closure


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_interval(name: str, value: Any) -> None:
    """Raise unless ``value`` is an integer, 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer >= 1, got {value!r}.")
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value!r}; 1 stands for every step.")


def check_fraction(name: str, value: Any) -> None:
    """Raise unless ``value`` is a number above 0 and at most 1."""
    check_positive(name, value)
    if value > 1:
        raise ValueError(f"{name} must be at most 1, which stands for the whole batch, got {value!r}.")


def check_takes_fraction(closure: Callable[..., Any]) -> None:
    """Raise unless ``closure`` can be called with ``batch_fraction``."""
    try:
        parameters = list(inspect.signature(closure).parameters.values())
    except (TypeError, ValueError):  # nothing is known of it
        parameters = []
    if not any(each.name == "batch_fraction" or each.kind is each.VAR_KEYWORD for each in parameters):
        raise TypeError(
            "batch_fraction < 1 needs a closure that can be told to run on a part of its batch, "
            "`def closure(batch_fraction=1.0): ...`, and this one has no such argument; add it, or leave "
            "batch_fraction at 1."
        )


def listed_groups(params: Any) -> list[dict[str, Any]]:
    """Tensors, named tensors or param groups (iterators included) as a checked list of new param-group dictionaries.

    Raises:
        TypeError: ``params`` is a tensor, a dictionary or not iterable; an entry is not a tensor.
        ValueError: nothing to optimize; a tensor that GAM cannot optimize; a tensor given twice.
    """
    if isinstance(params, Tensor | dict) or not isinstance(params, Iterable):
        raise TypeError(
            f"params must be an iterable of tensors, of (name, tensor) pairs or of param groups, got {type(params)}; "
            "pass model.parameters(), or [tensor] for a single one."
        )
    entries = list(params)
    groups = entries if entries and isinstance(entries[0], dict) else [{"params": entries}]
    listed = [listed_group(group) for group in groups]
    if not any(group["params"] for group in listed):
        raise ValueError("params holds no parameters; pass model.parameters() of a model that has some.")
    check_no_repeats(listed)
    return listed


def listed_group(group: dict[str, Any]) -> dict[str, Any]:
    """One param group with its parameters as a checked list, in a new dictionary."""
    if not isinstance(group, dict) or "params" not in group:
        raise TypeError(f"a param group must be a dictionary with the key 'params', got {group!r}.")
    entries = group["params"]
    if isinstance(entries, set):
        raise TypeError("params must be ordered, got a set; pass a list.")
    entries = [entries] if isinstance(entries, Tensor) else list(entries)
    for index, entry in enumerate(entries):
        named = isinstance(entry, tuple) and len(entry) == 2
        _check_param(entry[1] if named else entry, repr(entry[0]) if named else f"params[{index}]")
    return {**group, "params": entries}


def check_no_repeats(groups: Iterable[dict[str, Any]]) -> None:
    """Raise if a parameter appears twice, in one group or in two."""
    seen: dict[int, str] = {}
    for number, group in enumerate(groups):
        for index, entry in enumerate(group["params"]):
            param = entry[1] if isinstance(entry, tuple) else entry
            place = f"group {number}, params[{index}]"
            if id(param) in seen:
                raise ValueError(
                    f"params holds the same tensor twice: {seen[id(param)]} and {place} (shape {tuple(param.shape)}); "
                    "give each parameter once."
                )
            seen[id(param)] = place


def _check_param(param: Any, name: str) -> None:
    if not isinstance(param, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(param)}; pass model.parameters().")
    if param.layout != torch.strided:
        raise ValueError(f"{name} is sparse ({param.layout}); GAM optimizes dense parameters: call .to_dense().")
    if param.is_complex():
        raise ValueError(f"{name} is complex ({param.dtype}); optimize its real view, torch.view_as_real(param).")
    if param.dtype not in SUPPORTED_DTYPES:
        raise ValueError(f"{name} has dtype {param.dtype}; GAM optimizes float64, float32, bfloat16 and float16.")
    if not param.is_leaf:
        raise ValueError(f"{name} is not a leaf tensor; optimize what it was computed from, or param.detach().")


def check_base_optimizer_class(base_optimizer: Any, wrapper: str) -> None:
    """Raise unless ``base_optimizer`` is an optimizer class whose step needs no closure; ``wrapper``: who asks."""
    if isinstance(base_optimizer, Optimizer):
        raise TypeError(
            "base_optimizer must be a class such as torch.optim.SGD, got an optimizer already built; "
            f"use {wrapper}.wrap(optimizer, rho=..., alpha=...)."
        )
    if not (isinstance(base_optimizer, type) and issubclass(base_optimizer, Optimizer)):
        raise TypeError(
            f"base_optimizer must be a torch.optim.Optimizer class, got {base_optimizer!r}; pass torch.optim.SGD."
        )
    closure = inspect.signature(base_optimizer.step).parameters.get("closure")
    needs_closure = closure is not None and closure.default is inspect.Parameter.empty
    if needs_closure or getattr(base_optimizer, "evaluates_closure", False):
        raise ValueError(
            f"base_optimizer {base_optimizer.__name__} evaluates a closure itself, which {wrapper} cannot give it; use "
            "one that steps from gradients, such as torch.optim.SGD or torch.optim.AdamW."
        )
