"""timm and transformers, imported without a network."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

_FRAGMENTS: list[torch.library.Library] = []  # what they define lives as long as they do


def imported(name: str) -> ModuleType:
    """The module of that name, of a package that may ask hubs for weights unless it is told not to."""
    with pytest.MonkeyPatch.context() as environment:
        for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
            environment.setenv(variable, "1")
        if name.startswith("timm"):
            _let_torchvision_be_imported()
        return importlib.import_module(name)


def _let_torchvision_be_imported() -> None:
    """timm imports torchvision, which gives fake implementations to operators of its own library.

    PyPI's wheels for Linux are linked to CUDA, so beside a PyTorch without it there are no such operators, and the
    import fails. Nothing here runs them.
    """
    spec = find_spec("torchvision")
    assert spec is not None, "timm needs torchvision"
    assert spec.origin is not None
    try:
        for library in Path(spec.origin).parent.glob("_C.*"):
            torch.ops.load_library(str(library))
    except OSError:
        if not _FRAGMENTS:
            _FRAGMENTS.append(torch.library.Library("torchvision", "DEF"))
            for operator in ("nms", "qnms"):
                _FRAGMENTS[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
