"""Sparse gradients are refused in every kind of step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from gam_fused import GAM
from tests.bad_input.common import refused
from tests.conformance.common import snapshot


@pytest.mark.parametrize("calls_backward", [False, True], ids=["returns-loss", "calls-backward"])
@pytest.mark.parametrize("kwargs", [{}, {"hvp": "finite_difference"}, {"interval": 2}], ids=str)
def test_a_sparse_gradient_is_refused(kwargs: dict[str, Any], calls_backward: bool) -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = GAM(embedding.parameters(), SGD, lr=0.1, momentum=0.9, **kwargs)
    indices = torch.tensor([1, 3])

    def closure() -> Tensor:
        loss = embedding(indices).square().sum()
        if calls_backward:
            loss.backward()
        return loss

    def unchanged() -> Any:
        return snapshot(optimizer, embedding)

    fragments = ["gradient of parameter 0", "(5, 3)", "sparse_coo", "sparse=False"]
    refused(lambda: optimizer.step(closure), RuntimeError, *fragments, unchanged=unchanged)
    if "interval" in kwargs:  # between two flatness terms too, although SGD alone would take it
        optimizer.step(lambda: embedding.weight.square().sum())
        refused(lambda: optimizer.step(closure), RuntimeError, *fragments, unchanged=unchanged)
    elif "hvp" not in kwargs:
        loss = embedding(indices).square().sum()
        refused(lambda: optimizer.first_step(loss), RuntimeError, *fragments, unchanged=unchanged)
