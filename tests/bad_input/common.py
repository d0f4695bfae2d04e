"""Bad input gets one error that names the argument, the value and the way out, and changes nothing at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from gam_fused import GAM
from tests.conformance.common import bits, snapshot

NAN, INF = float("nan"), float("inf")


class Bench:
    """An optimizer in use on a model with dropout and BatchNorm: buffers, random states and momentum to lose."""

    def __init__(self, **kwargs: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 2))
        self.inputs, self.targets = torch.randn(8, 3), torch.randn(8, 2)
        settings = {"rho": 0.1, "alpha": 0.3, "lr": 0.1, "momentum": 0.9, "model": self.model, **kwargs}
        self.optimizer = GAM(self.model.parameters(), SGD, **settings)
        self.optimizer.step(self.loss)

    def loss(self) -> Tensor:
        return F.mse_loss(self.model(self.inputs), self.targets)

    def snapshot(self) -> dict[str, Any]:
        return snapshot(self.optimizer, self.model)


def refused(
    call: Callable[[], Any], error: type[Exception], *fragments: str, unchanged: Callable[[], Any] | None = None
) -> str:
    """Require this one error, these fragments in its message, and ``unchanged()`` to be equal before and after."""
    before = unchanged() if unchanged else None
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is error
    assert caught.value.__context__ is None, "an error while handling another one is two errors"
    assert not [fragment for fragment in fragments if fragment not in message], message
    if unchanged:
        assert unchanged() == before
    return message


def assert_still_usable(bench: Bench, **kwargs: Any) -> None:
    """The next step is the one of an optimizer that never saw the bad input."""
    twin = Bench(**kwargs)
    losses, after = [], []
    for one in (bench, twin):
        torch.manual_seed(1)
        losses.append(bits(one.optimizer.step(one.loss)))
        after.append(one.snapshot())
    assert losses[0] == losses[1]
    for what in ("parameters", "buffers", "random states", "steps", "metrics"):
        assert after[0][what] == after[1][what]
    assert list(after[0]["state"].values()) == list(after[1]["state"].values())


def model_and_snapshot() -> tuple[nn.Module, Callable[[], Any]]:
    model = nn.Linear(3, 2)
    # A plain optimizer, only to list what it sees.
    listed = SGD(model.parameters(), lr=0.1)
    return model, lambda: snapshot(listed, model)


def param(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=dtype.is_floating_point or dtype.is_complex)


BAD_LOSSES: dict[str, tuple[Callable[[Tensor], Any], type[Exception], list[str]]] = {
    "None": (lambda loss: None, TypeError, ["None", "return loss"]),
    "float": (lambda loss: 0.5, TypeError, ["0.5", "return loss"]),
    "int": (lambda loss: 3, TypeError, ["3", "return loss"]),
    "tuple": (lambda loss: (loss, 1), TypeError, ["(tensor", "return loss"]),
    "non-scalar": (lambda loss: loss.expand(3), ValueError, ["shape (3,)", "loss.mean()"]),
    "matrix": (lambda loss: loss.expand(2, 2), ValueError, ["shape (2, 2)", "loss.mean()"]),
    "empty": (lambda loss: loss.expand(0), ValueError, ["shape (0,)", "loss.mean()"]),
    "complex": (lambda loss: loss * (1 + 1j), ValueError, ["complex64", "real"]),
    "integer": (lambda loss: torch.tensor(3), ValueError, ["int64", "real"]),
    "detached": (lambda loss: loss.detach(), ValueError, ["detached", "not loss.detach()", "no_grad"]),
}
