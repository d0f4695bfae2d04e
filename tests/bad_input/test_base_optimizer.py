"""What is no optimizer that steps from gradients is refused; the base optimizer's own errors pass through."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import LBFGS, SGD

from gam_fused import GAM
from tests.bad_input.common import model_and_snapshot, refused


@pytest.mark.parametrize(
    ("base_optimizer", "error", "fragments"),
    [
        (LBFGS, ValueError, ["base_optimizer", "LBFGS", "closure", "torch.optim.SGD"]),
        (GAM, ValueError, ["base_optimizer", "GAM", "closure", "torch.optim.SGD"]),
        ("SGD", TypeError, ["base_optimizer", "'SGD'", "torch.optim.SGD"]),
        (None, TypeError, ["base_optimizer", "None", "torch.optim.SGD"]),
        (nn.Linear, TypeError, ["base_optimizer", "Linear", "torch.optim.SGD"]),
        (SGD([Parameter(torch.zeros(1))], lr=0.1), TypeError, ["base_optimizer", "class", "GAM.wrap"]),
    ],
    ids=["LBFGS", "GAM", "string", "None", "module", "instance"],
)
def test_what_is_no_optimizer_class_that_steps_from_gradients_is_refused(
    base_optimizer: Any, error: type[Exception], fragments: list[str]
) -> None:
    model, unchanged = model_and_snapshot()
    refused(lambda: GAM(model.parameters(), base_optimizer), error, *fragments, unchanged=unchanged)


@pytest.mark.parametrize(
    ("make", "error", "fragments"),
    [
        (lambda params: LBFGS(params), ValueError, ["LBFGS", "closure", "torch.optim.SGD"]),
        (lambda params: GAM(params, SGD, lr=0.1), TypeError, ["optimizer", "GAM", "torch.optim.Optimizer"]),
        (lambda params: SGD, TypeError, ["optimizer", "type", "torch.optim.Optimizer"]),
        (lambda params: None, TypeError, ["optimizer", "NoneType", "torch.optim.Optimizer"]),
    ],
    ids=["LBFGS", "GAM", "class", "None"],
)
def test_wrap_refuses_what_is_no_plain_optimizer(make: Any, error: type[Exception], fragments: list[str]) -> None:
    model, unchanged = model_and_snapshot()
    optimizer = make(model.parameters())
    refused(lambda: GAM.wrap(optimizer), error, *fragments, unchanged=unchanged)


@pytest.mark.parametrize(
    ("kwargs", "error", "fragments"),
    [
        ({"lr": -1.0}, ValueError, ["learning rate", "-1.0"]),
        ({"momentums": 0.9}, TypeError, ["momentums"]),
        ({"nesterov": True}, ValueError, ["Nesterov", "momentum"]),
    ],
    ids=str,
)
def test_the_base_optimizers_own_errors_pass_through(
    kwargs: dict[str, Any], error: type[Exception], fragments: list[str]
) -> None:
    model, unchanged = model_and_snapshot()
    refused(lambda: GAM(model.parameters(), SGD, **kwargs), error, *fragments, unchanged=unchanged)
