"""Every knob turns something: changing one option changes the trained weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cli.runs import trained, weights

SGD = {"optimizer": "sgd"}
ADAMW = {"optimizer": "adamw"}
SAM = {"optimizer": "sam"}
GAM = {"optimizer": "gam"}
ACCELERATED = {"optimizer": "accelerated-gam"}
KNOBS = [
    (SGD, {"lr": 0.05}),
    (SGD, {"lr_warmup": 1.0}),
    (SGD, {"momentum": 0.5}),
    (SGD, {"weight_decay": 0.01}),
    (SGD, {"label_smoothing": 0.1}),
    (SGD, {"augment": False}),
    (SGD, {"batch_size": 16}),
    (SGD, {"train_size": 180}),
    (SGD, {"seed": 1}),
    (SGD, {"epochs": 2}),
    (SGD, {"optimizer": "gam"}),
    (ADAMW, {"weight_decay": 0.5}),
    (SAM, {"rho": 0.2}),
    (SAM, {"rho_warmup": 1.0}),
    (SAM, {"base": "adamw"}),
    (GAM, {"rho": 0.2}),
    (GAM, {"rho_warmup": 1.0}),
    (GAM, {"alpha": 0.6}),
    (GAM, {"hvp": "finite_difference"}),
    (GAM, {"interval": 2}),
    (GAM, {"base": "adamw"}),
    (GAM, {"optimizer": "accelerated-gam", "rho": 0.05, "alpha": 0.1}),
    (ACCELERATED, {"rho": 0.4}),
    (ACCELERATED, {"rho_prime": 0.2}),
    (ACCELERATED, {"alpha": 0.1}),
    (ACCELERATED, {"beta": 0.1}),
    (ACCELERATED, {"gamma": 0.3}),
    (ACCELERATED, {"form": "released_code"}),
    (ACCELERATED, {"interval": 2}),
]


@pytest.mark.parametrize(("common", "change"), KNOBS, ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()))
def test_knob_changes_the_weights(common: dict[str, Any], change: dict[str, Any]) -> None:
    # An sgd and an adamw run differ by default settings too; here only the named option may.
    settings = {**common, "weight_decay": 1e-3, "lr": 0.02, "train_size": 80}
    assert not torch.equal(weights(trained(**settings)), weights(trained(**{**settings, **change})))


def test_alpha_zero_is_the_base_optimizer() -> None:
    """The other side of the test above: without the penalty, GAM is SGD, whatever rho."""
    sgd = weights(trained(optimizer="sgd"))
    gam = weights(trained(optimizer="gam", alpha=0.0, rho=0.3))
    torch.testing.assert_close(gam, sgd, rtol=1e-4, atol=1e-6)
    assert torch.allclose(weights(trained(optimizer="sam", rho=0.0)), sgd, rtol=1e-4, atol=1e-6)


def test_back_end_reaches_gam() -> None:
    """Back ends agree up to rounding, so the weights cannot tell; the optimizer can."""
    names = {
        name: trained(optimizer="gam", train_size=20, backend=name).optimizer.backend
        for name in ("foreach", "reference")
    }
    assert names == {"foreach": "foreach", "reference": "reference"}
