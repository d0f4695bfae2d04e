"""The compiled kernels give the same bits on every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.second_order import test_activation_kernels, test_norm_kernels
from tests.second_order.common import needs_native


def digests() -> list[str]:
    """What the kernels of this process make of some tensors, a line for each kernel and dtype."""
    return [*test_norm_kernels.digest().splitlines(), *test_activation_kernels.digest().splitlines()]


def digests_with(capability: str) -> list[str]:
    """The same of a process that uses other instructions."""
    script = "from tests.second_order.test_instruction_sets import digests; print(*digests(), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"GAM_FUSED_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


@needs_native
@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_bits(capability: str) -> None:
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text(encoding="utf-8", errors="replace").split() if cpu.exists() else []
    if {"avx2": "avx2", "avx512": "avx512bw"}.get(capability, "") not in ("", *flags):
        pytest.skip(f"this processor has no {capability}")
    lines = digests()
    assert len(lines) > 70
    assert digests_with(capability) == lines
