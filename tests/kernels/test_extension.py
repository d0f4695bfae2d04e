"""What is said about extensions that are missing, stale, or do not load."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch

import gam_fused
from gam_fused.kernels import extension


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No extension is there; returns where the reason is recorded."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(extension, "_RECORD", tmp_path / "record.json")
    return tmp_path / "record.json"


def loads(monkeypatch: pytest.MonkeyPatch, outcome: object) -> None:
    def import_module(name: str) -> object:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib, "import_module", import_module)


def built(version: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(build_info=lambda: {"version": version})


def test_recorded_reason_is_the_one_given(missing: Path) -> None:
    missing.write_text(json.dumps({"_C": "no compiler.", "_C_cuda": "no nvcc."}))
    assert [extension._load("_C"), extension._load("_C_cuda")] == ["no compiler.", "no nvcc."]


@pytest.mark.parametrize("record", [None, "{}", "not JSON"])
def test_without_a_record_the_reason_says_what_to_do(missing: Path, record: str | None) -> None:
    if record is not None:
        missing.write_text(record)
    assert "pip install -e ." in str(extension._load("_C"))


def test_extension_that_does_not_load_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    loads(monkeypatch, ImportError("undefined symbol: x"))
    reason = str(extension._load("_C"))
    assert f"gam_fused._C does not load beside PyTorch {torch.__version__}: undefined symbol: x" in reason


def test_extension_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    loads(monkeypatch, built("0.0.1"))
    assert f"was built for gam_fused 0.0.1, and this is {gam_fused.__version__}" in str(extension._load("_C"))
    current = built(gam_fused.__version__)
    loads(monkeypatch, current)
    assert extension._load("_C") is current


def test_cuda_kernels_need_the_operators_and_a_pytorch_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(extension, "_CPU", built(gam_fused.__version__))
    assert extension._load_cuda() == f"PyTorch {torch.__version__} was built without CUDA."
    monkeypatch.setattr(extension, "_CPU", "no compiler.")
    assert extension._load_cuda() == "no compiler."


def test_direct_calls_are_for_the_release_they_were_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    operators = types.SimpleNamespace(
        python_calls=lambda access: asked.append(access) or {"l2_norm": sum}, __file__="/one/_C.so"
    )
    direct = types.SimpleNamespace(tensor_access="a capsule", build_info=lambda: facts, __file__="/one/_C_direct.so")
    monkeypatch.setattr(extension, "_CPU", operators)
    loads(monkeypatch, direct)
    facts = {"version": gam_fused.__version__, "torch": torch.__version__}
    assert extension._load_direct() == {"l2_norm": sum}
    assert asked == ["a capsule"]
    facts["torch"] = "1.0"
    reason = f"gam_fused._C_direct was built for PyTorch 1.0, and this is {torch.__version__}; install gam_fused again."
    assert extension._load_direct() == reason
    facts["torch"] = torch.__version__
    direct.__file__ = "/two/_C_direct.so"
    reason = "gam_fused._C and gam_fused._C_direct are of two builds, in /one and /two; install gam_fused again."
    assert extension._load_direct() == reason
    assert asked == ["a capsule"]  # nothing of another release's or build's is called
    monkeypatch.setattr(extension, "_CPU", "no compiler.")
    assert extension._load_direct() == "no compiler."


def test_direct_calls_that_do_not_go_together_or_have_no_lock_are_left_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    def python_calls(access: object) -> None:
        raise ValueError("wrong capsule")

    facts = {"version": gam_fused.__version__, "torch": torch.__version__}
    direct = types.SimpleNamespace(tensor_access=None, build_info=lambda: facts, __file__="/one/_C_direct.so")
    monkeypatch.setattr(extension, "_CPU", types.SimpleNamespace(python_calls=python_calls, __file__="/one/_C.so"))
    loads(monkeypatch, direct)
    reason = "gam_fused._C and gam_fused._C_direct do not go together: wrong capsule; install gam_fused again."
    assert extension._load_direct() == reason
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    assert "needs Python's global interpreter lock" in str(extension._load_direct())


def test_without_direct_calls_there_are_none_and_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "_DIRECT", "built for another.")
    assert extension.direct_unavailable_reason() == "built for another."
    assert extension.direct_calls() == {}
    calls = {"l2_norm": sum}
    monkeypatch.setattr(extension, "_DIRECT", calls)
    assert extension.direct_unavailable_reason() is None
    assert extension.direct_calls() == calls


def test_build_info_merges_both_extensions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "_CPU", built("1"))
    monkeypatch.setattr(extension, "_CUDA", "no nvcc.")
    assert extension.build_info() == {"version": "1", "cuda": None, "architectures": None}
    facts = {"version": "1", "cuda": "13.0", "architectures": "9.0"}
    monkeypatch.setattr(extension, "_CUDA", types.SimpleNamespace(build_info=lambda: facts))
    assert extension.build_info() == facts
    monkeypatch.setattr(extension, "_CPU", "no compiler.")
    assert extension.build_info() is None
