"""Builds in isolation against the PyTorch that is already installed.

The extensions need PyTorch's headers. As a plain build requirement, PyTorch would be downloaded into every isolated
build environment: gigabytes, for headers that usually lie beside the environment already. So PyTorch is a build
requirement only where the environment that pip installs into has none, and ``setup.py`` takes it from there otherwise.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 the hooks that stay as they are

OLDEST_TORCH = (2, 10)


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """What building a wheel takes beside ``[build-system] requires``."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _missing_torch()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """The same for an editable installation."""
    return build_meta.get_requires_for_build_editable(config_settings) + _missing_torch()


def _missing_torch() -> list[str]:
    if os.environ.get("GAM_FUSED_NATIVE") == "0":
        return []
    make_torch_importable()
    return [] if _torch_is_new_enough() else [f"torch>={'.'.join(map(str, OLDEST_TORCH))}"]


def make_torch_importable() -> None:
    """Let this process import PyTorch from the environment around an isolated build, if it has none of its own.

    pip runs an isolated build in the interpreter of the environment that it installs into and hides that environment
    through ``PYTHONPATH``, which ``-E`` ignores. Its paths go last, so that only what the build lacks comes from there.
    Front ends that isolate by a virtual environment (``python -m build``, ``uv``) have nothing around them to be seen.
    """
    if _torch_is_new_enough():
        return
    script = "import json, sys; print(json.dumps([path for path in sys.path if path]))"
    done = subprocess.run([sys.executable, "-E", "-c", script], capture_output=True, text=True)
    if done.returncode == 0:
        around = [path for path in json.loads(done.stdout) if path not in sys.path]
        if _torch_is_new_enough(around):
            sys.path += around


def _torch_is_new_enough(paths: list[str] | None = None) -> bool:
    found = next(iter(metadata.distributions(name="torch", path=sys.path if paths is None else paths)), None)
    release = re.match(r"(\d+)\.(\d+)", found.version) if found else None
    return release is not None and tuple(map(int, release.groups())) >= OLDEST_TORCH
