"""Triton's kernels, run by Triton's interpreter through the tests of all back ends: in processes of their own.

Whether functions are compiled or interpreted is decided when they are defined.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("tests/kernels/operators", "tests/kernels/base_rules")
SHARED = {
    **{
        str(path.relative_to(ROOT)): "triton"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).glob("test_*.py"))
    },
    "tests/kernels/test_triton.py": "",
    "tests/second_order/test_triton_norms.py": "",
    # What a GPU will be asked, as far as the interpreter can be: it takes its time.
    "tests/gpu/test_on_device.py": "triton and cpu and (whole_step or launches_of_a_step or (bf16 and first))",
    "tests/gpu/test_norms_on_device.py": "cpu and (fp32 or bf16)",
}

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]


def interpreted(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """pytest in ``root``, over what is named there of Triton, interpreted."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**inherited, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root), **environment}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *arguments]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("path", SHARED)
def test_the_tests_of_all_back_ends_pass_interpreted(path: str) -> None:
    run = interpreted(ROOT, path, "-k", SHARED[path])
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None, run.stdout
    assert int(passed[1]) > 1
