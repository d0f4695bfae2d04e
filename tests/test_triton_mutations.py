"""That the tests of Triton's kernels can fail: with one mistake in a copy of the package, one of them does."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from tests.test_triton_interpreted import ROOT, interpreted

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]

OPERATORS, RULES = "tests/kernels/operators/test_perturb.py", "tests/kernels/base_rules/test_written.py"
ADAMW = "tests/kernels/base_rules/test_torch_optim.py"
ROUNDING, NORMS = "tests/kernels/test_triton.py", "tests/second_order/test_triton_norms.py"
SELECTED = {ROUNDING: "chunk or bits", NORMS: "narrow or 2049"}
MISTAKES = {
    "two pointers swapped": (
        "kernels/pointer_tables.py",
        "rows = [tuple(map(Tensor.data_ptr, tensors)) for tensors in lists]",
        "rows = [tuple(map(Tensor.data_ptr, tensors)) for tensors in reversed(lists)]",
        OPERATORS,
    ),
    "the tail dropped": (
        "kernels/triton_kernels/chunks.py",
        "        return count\n",
        "        return count // CHUNK * CHUNK\n",
        OPERATORS,
    ),
    "the last element left out": (
        "kernels/triton_kernels/chunks.py",
        "return offsets < count",
        "return offsets < count - 1",
        OPERATORS,
    ),
    "the guard skipped": (
        "kernels/triton_kernels/steps.py",
        "is_taken = is_taken & is_finite(tl.load(guards + i))",
        "pass",
        RULES,
    ),
    "found_inf not heeded": (
        "kernels/triton_kernels/steps.py",
        "(tl.load(found_inf) == 0.0)",
        "(tl.load(found_inf) < 9.0)",
        RULES,
    ),
    "steps not counted": (
        "kernels/triton_kernels/adamw.py",
        "tl.load(counts, mask=mask) + 1.0",
        "tl.load(counts, mask=mask)",
        ADAMW,
    ),
    "one key for all chunks": (
        "kernels/triton_kernels/chunks.py",
        "places = (begin & 0xFFFFFFFF).to(tl.uint32) + offsets.to(tl.uint32)",
        "places = offsets.to(tl.uint32)",
        ROUNDING,
    ),
    "a weaker hash": ("kernels/triton_rules.py", "x = (x ^ (x >> 15)) * 0x846CA68B", "x = x ^ (x >> 15)", ROUNDING),
    "dampening in the wrong place": (
        "kernels/triton_rules.py",
        "momentum * buffer + one_minus_dampening * d",
        "one_minus_dampening * (momentum * buffer + d)",
        "tests/kernels/base_rules/test_torch_optim.py",
    ),
    "always moved": ("kernels/triton_kernels/perturb.py", "tl.where(is_moved, moved, theta)", "moved", OPERATORS),
    "what lies beyond a plane summed with it": (
        "second_order/triton_kernels/channels.py",
        "(position < positions)[None, :]",
        "(position <= positions)[None, :]",
        NORMS,
    ),
    "a program's first rows taken for all": (
        "second_order/triton_kernels/rows.py",
        "for tile in range(tl.program_id(0), tl.cdiv(rows, R), programs):",
        "for tile in range(tl.program_id(0), tl.program_id(0) + 1, programs):",
        NORMS,
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str, tmp_path: Path) -> None:
    file, right, wrong, tests = MISTAKES[mistake]
    for folder in ("gam_fused", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    broken = tmp_path / "gam_fused" / file
    source = broken.read_text()
    assert source.count(right) == 1
    broken.write_text(source.replace(right, wrong))
    only = SELECTED.get(tests, "triton and fp32")
    run = interpreted(tmp_path, tests, "-x", "-k", only, HYPOTHESIS_NO_SHRINK="1")
    assert run.returncode == 1, run.stdout + run.stderr  # a test failed
