"""Parameters that cannot be optimized, or not together, are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from gam_fused import GAM
from tests.bad_input.common import model_and_snapshot, param, refused
from tests.conformance.common import bits


def twice_in_one_group() -> list[Tensor]:
    one = param(2, 3)
    return [one, param(1), one]


def twice_in_two_groups() -> list[dict[str, Any]]:
    one = param(2, 3)
    return [{"params": [param(1), one]}, {"params": [one]}]


def named_twice() -> list[tuple[str, Tensor]]:
    one = param(2, 3)
    return [("a", one), ("b", one)]


BAD_PARAMS: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    "empty-list": (list, ValueError, ["params holds no parameters", "model.parameters()"]),
    "empty-iterator": (lambda: iter(()), ValueError, ["params holds no parameters", "model.parameters()"]),
    "no-tensors-in-a-group": (
        lambda: [{"params": []}],
        ValueError,
        ["params holds no parameters", "model.parameters()"],
    ),
    "a-tensor": (lambda: param(2), TypeError, ["params", "Tensor", "[tensor]"]),
    "None": (lambda: None, TypeError, ["params", "NoneType", "model.parameters()"]),
    "a-model": (lambda: nn.Linear(2, 2), TypeError, ["params", "Linear", "model.parameters()"]),
    "a-dictionary": (lambda: {"weight": param(2)}, TypeError, ["params", "dict", "model.parameters()"]),
    "a-number": (lambda: [param(1), 2.0], TypeError, ["params[1]", "float", "model.parameters()"]),
    "a-group-without-params": (lambda: [{"lr": 0.1}], TypeError, ["param group", "{'lr': 0.1}", "'params'"]),
    "a-tensor-among-groups": (
        lambda: [{"params": [param(1)]}, param(1)],
        TypeError,
        ["param group", "tensor"],
    ),
    "a-set": (lambda: [{"params": {param(1)}}], TypeError, ["params", "set", "list"]),
    "complex": (lambda: [param(1, dtype=torch.complex64)], ValueError, ["params[0]", "complex64", "view_as_real"]),
    "sparse": (lambda: [param(1), param(2).to_sparse()], ValueError, ["params[1]", "sparse", "to_dense"]),
    "integer": (lambda: [param(1, dtype=torch.int64)], ValueError, ["params[0]", "torch.int64", "float32"]),
    "bool": (lambda: [param(1, dtype=torch.bool)], ValueError, ["params[0]", "torch.bool", "float32"]),
    "named-complex": (
        lambda: [("w", param(1, dtype=torch.complex64))],
        ValueError,
        ["'w'", "complex64", "real"],
    ),
    "not-a-leaf": (lambda: [param(2) * 2], ValueError, ["params[0]", "leaf", "detach"]),
    "twice-in-one-group": (twice_in_one_group, ValueError, ["twice", "params[0]", "params[2]", "(2, 3)", "once"]),
    "twice-in-two-groups": (twice_in_two_groups, ValueError, ["twice", "group 0", "group 1", "(2, 3)", "once"]),
    "twice-under-two-names": (named_twice, ValueError, ["twice", "params[0]", "params[1]", "(2, 3)", "once"]),
}


@pytest.mark.parametrize("bad", BAD_PARAMS)
def test_parameters_that_cannot_be_optimized_are_refused(bad: str) -> None:
    make, error, fragments = BAD_PARAMS[bad]
    params = make()
    refused(lambda: GAM(params, SGD, lr=0.1), error, *fragments, unchanged=torch.get_rng_state().tolist)


def test_wrap_refuses_parameters_that_gam_cannot_optimize() -> None:
    plain = SGD([param(1, dtype=torch.complex64)], lr=0.1)
    unchanged = lambda: bits([dict(group) for group in plain.param_groups])  # noqa: E731
    refused(lambda: GAM.wrap(plain), ValueError, "params[0]", "complex64", "view_as_real", unchanged=unchanged)


def test_names_for_some_parameters_only_are_refused() -> None:
    model, unchanged = model_and_snapshot()
    params = [("weight", model.weight), model.bias]
    refused(lambda: GAM(params, SGD, lr=0.1), ValueError, "with/without names", unchanged=unchanged)


def test_parameter_given_to_adam_and_gam_alike_is_no_error() -> None:
    """Two optimizers may share parameters, as in PyTorch; only one optimizer must not have a parameter twice."""
    model = nn.Linear(2, 2)
    GAM(model.parameters(), SGD, lr=0.1)
    Adam(model.parameters())
