"""Settings out of their range are refused."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from torch.optim import SGD

from gam_fused import GAM
from tests.bad_input.common import NAN, model_and_snapshot, refused
from tests.conformance.common import snapshot

SETTINGS: list[tuple[str, Any, type[Exception], list[str]]] = [
    ("interval", 0, ValueError, [">= 1"]),
    ("interval", -3, ValueError, [">= 1"]),
    ("interval", 1.0, TypeError, ["integer >= 1"]),
    ("interval", True, TypeError, ["integer >= 1"]),
    ("interval", "2", TypeError, ["integer >= 1"]),
    ("interval", None, TypeError, ["integer >= 1"]),
    ("hvp", "approximate", ValueError, ["'exact'", "'finite_difference'"]),
    ("hvp", None, ValueError, ["'exact'", "'finite_difference'"]),
    ("fd_epsilon", 0.0, ValueError, ["> 0"]),
    ("fd_epsilon", -1.0, ValueError, [">= 0"]),
    ("fd_epsilon", NAN, ValueError, [">= 0"]),
    ("fd_epsilon", "small", TypeError, ["pass a Python float"]),
    ("backend", "abacus", ValueError, ["'auto'", "'foreach'", "'reference'"]),
    ("backend", None, ValueError, ["'auto'", "'foreach'", "'reference'"]),
    ("model", "resnet", TypeError, ["torch.nn.Module"]),
    ("model", nn.Linear, TypeError, ["torch.nn.Module"]),
]


@pytest.mark.parametrize("wrap", [False, True], ids=["constructor", "wrap"])
@pytest.mark.parametrize(
    ("name", "value", "error", "fragments"), [pytest.param(*case, id=f"{case[0]}={case[1]}") for case in SETTINGS]
)
def test_a_setting_out_of_its_range_is_refused(
    name: str, value: Any, error: type[Exception], fragments: list[str], wrap: bool
) -> None:
    model, unchanged = model_and_snapshot()
    plain = SGD(model.parameters(), lr=0.1)
    before = snapshot(plain)

    def construct() -> GAM:
        kwargs = {name: value}
        return GAM.wrap(plain, **kwargs) if wrap else GAM(model.parameters(), SGD, lr=0.1, **kwargs)

    shown = repr(type(value)) if name == "model" else repr(value)
    refused(construct, error, name, shown, *fragments, unchanged=unchanged)
    assert snapshot(plain) == before


def test_an_unknown_back_end_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, unchanged = model_and_snapshot()
    monkeypatch.setenv("GAM_FUSED_BACKEND", "abacus")
    fragments = ["GAM_FUSED_BACKEND", "'abacus'", "'foreach'"]
    refused(lambda: GAM(model.parameters(), SGD, lr=0.1), ValueError, *fragments, unchanged=unchanged)
