"""Where, when and with what a measurement was made."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from gam_fused.kernels.extension import build_info

ROOT = Path(__file__).parents[1]


def description(device: torch.device, module: str, arguments: list[str]) -> dict[str, Any]:
    """What has to stand beside numbers measured on ``device`` by ``python -m module arguments``; ready for JSON."""
    return {
        "command": shlex.join(["python", "-m", module, *arguments]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git_commit": git_commit(),
        "build": build_info(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),  # what else the machine was doing
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
    }


def cpu_model() -> str:
    """The processor's name as Linux gives it, elsewhere its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


def git_commit() -> str | None:
    """The commit of this checkout, marked where tracked files differ from it; ``None`` outside of a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:  # no git
        return None
    return done.stdout.strip() or None


def as_lines(header: dict[str, Any]) -> str:
    """The description for a terminal."""
    return "\n".join(f"{name:14}{value}" for name, value in header.items())
