"""What the tests of fused steps watch."""

from __future__ import annotations

from typing import Any

import pytest

from gam_fused.kernels.native import NativeBackend
from gam_fused.kernels.reference import ReferenceBackend


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the fused steps that were launched."""
    seen: list[str] = []

    def watch(cls: Any, name: str) -> None:
        original = getattr(cls, name)

        def launch(*args: Any, **options: Any) -> None:
            seen.append(name)
            original(*args, **options)

        monkeypatch.setattr(cls, name, launch)

    for cls in (NativeBackend, ReferenceBackend):
        watch(cls, "sgd_step_")
        watch(cls, "adamw_step_")
    return seen
