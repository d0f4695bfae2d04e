"""The layers with their compiled double backward, and with the plain one."""

from __future__ import annotations

import pytest

from gam_fused.second_order import formulas, native, normalization
from tests.second_order.common import needs_native


@pytest.fixture(params=[pytest.param("native", marks=needs_native), "formulas"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    chosen = {"native": native, "formulas": formulas}[request.param]
    monkeypatch.setattr(normalization, "kernels_for", lambda device: chosen)
    return request.param
