"""Keeping freed memory: in a process of its own, since it lasts as long as the process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

import gam_fused

_SCRIPT = """
import resource, sys, torch
import gam_fused

if sys.argv[1] == "keep":
    assert gam_fused.keep_freed_memory() is True

def faults_of_a_tensor():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults_of_a_tensor()
print(min(faults_of_a_tensor() for _ in range(3)))
"""


def page_faults(mode: str) -> int:
    """Of making a tensor of 64 MiB where another such was freed just before."""
    done = subprocess.run([sys.executable, "-c", _SCRIPT, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_used_again() -> None:
    # 16384 pages of 4 KiB, or 32 of 2 MiB.
    assert page_faults("keep") < 8
    assert page_faults("return") >= 32


def test_without_glibc_it_says_that_it_did_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert gam_fused.keep_freed_memory() is False
