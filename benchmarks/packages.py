"""Packages of others, which not everyone has: imported without a network, or with a reason why not."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch

# Of hubs that would otherwise be asked for weights.
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")

_FRAGMENTS: list[torch.library.Library] = []  # what they define lives as long as they do


class NotInstalled(Exception):
    """Something that a model or a contender is made of is not there; the message says what to do."""


def imported(module: str, package: str) -> ModuleType:
    """The module, out of a package that not everyone has.

    Raises:
        NotInstalled: it cannot be imported, because it is missing or because its own imports fail.
    """
    root = module.partition(".")[0]
    try:
        with _offline():
            if root in ("timm", "transformers"):
                _let_torchvision_be_imported()
            importlib.import_module(root)
            return importlib.import_module(module)
    except Exception as error:  # whatever the modules of others do when they are imported
        if isinstance(error, ModuleNotFoundError) and error.name == root:
            raise NotInstalled(f"{package} is not installed; pip install {package}") from error
        raise NotInstalled(f"{package} cannot be imported: {type(error).__name__}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Of its message."""
    return (str(error).splitlines() or [""])[0]


@contextmanager
def _offline() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _OFFLINE}
    os.environ.update(dict.fromkeys(_OFFLINE, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _let_torchvision_be_imported() -> None:
    """Timm and transformers import torchvision, which gives fake implementations to operators of its own library.

    PyPI's wheels for Linux are linked to CUDA, so beside a PyTorch without it there are no such operators, and the
    import fails. Nothing here runs them.
    """
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    try:
        for library in Path(spec.origin).parent.glob("_C.*"):
            torch.ops.load_library(str(library))
    except OSError:
        if not _FRAGMENTS:
            _FRAGMENTS.append(torch.library.Library("torchvision", "DEF"))
            for operator in ("nms", "qnms"):
                _FRAGMENTS[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
