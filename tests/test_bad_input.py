"""Bad input gets one error that names the argument, the value and the way out, and changes nothing at all."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import LBFGS, SGD, Adam

from gam_fused import GAM
from tests.conformance.common import bits, snapshot

NAN, INF = float("nan"), float("inf")

HYPERPARAMETERS = ("rho", "alpha", "xi")
OUT_OF_RANGE = (-1.0, -1e-300, NAN, INF, -INF)
NOT_A_NUMBER = ("0.1", None, True, 1j, [0.1], torch.tensor(0.1))


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


# ---------------------------------------------------------------------- the constructor


def model_and_snapshot() -> tuple[nn.Module, Callable[[], Any]]:
    model = nn.Linear(3, 2)
    # A plain optimizer, only to list what it sees.
    listed = SGD(model.parameters(), lr=0.1)
    return model, lambda: snapshot(listed, model)


@pytest.mark.parametrize("through", ["constructor", "group", "wrap", "wrapped-group"])
@pytest.mark.parametrize("value", [*OUT_OF_RANGE, *NOT_A_NUMBER], ids=str)
@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_a_hyperparameter_that_is_no_finite_number_from_0_on_is_refused(name: str, value: Any, through: str) -> None:
    model, unchanged = model_and_snapshot()
    good = {"params": [model.bias]}
    bad = {"params": [model.weight], name: value}
    plain = SGD([good, bad] if "group" in through else model.parameters(), lr=0.1)
    calls: dict[str, Callable[[], Any]] = {
        "constructor": lambda: GAM(model.parameters(), SGD, lr=0.1, **{name: value}),
        "group": lambda: GAM([good, bad], SGD, lr=0.1),
        "wrap": lambda: GAM.wrap(plain, **{name: value}),
        "wrapped-group": lambda: GAM.wrap(plain),
    }
    is_float = isinstance(value, float)
    error, way_out = (ValueError, "finite number >= 0") if is_float else (TypeError, "pass a Python float")
    where = ["param group 1"] if "group" in through else []
    before = snapshot(plain)
    refused(calls[through], error, name, repr(value), way_out, *where, unchanged=unchanged)
    assert snapshot(plain) == before


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


def param(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=dtype.is_floating_point or dtype.is_complex)


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


def test_wrap_refuses_parameters_that_gam_cannot_optimize() -> None:
    plain = SGD([param(1, dtype=torch.complex64)], lr=0.1)
    unchanged = lambda: bits([dict(group) for group in plain.param_groups])  # noqa: E731
    refused(lambda: GAM.wrap(plain), ValueError, "params[0]", "complex64", "view_as_real", unchanged=unchanged)


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


def test_names_for_some_parameters_only_are_refused() -> None:
    model, unchanged = model_and_snapshot()
    params = [("weight", model.weight), model.bias]
    refused(lambda: GAM(params, SGD, lr=0.1), ValueError, "with/without names", unchanged=unchanged)


# ---------------------------------------------------------------------- hyper-parameters set later


@pytest.mark.parametrize("value", [-1.0, NAN, INF, torch.tensor(0.1)], ids=str)
@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_a_hyperparameter_broken_by_a_schedule_is_refused_at_the_next_step(name: str, value: Any) -> None:
    bench = Bench()
    group = bench.optimizer.param_groups[0]
    good, group[name] = group[name], value
    loss = bench.loss()
    error = TypeError if isinstance(value, Tensor) else ValueError
    for call in (lambda: bench.optimizer.step(bench.loss), lambda: bench.optimizer.first_step(loss)):
        refused(call, error, name, repr(value), "number", "param group 0", unchanged=bench.snapshot)
    group[name] = good
    bench.optimizer.cancel_step()  # harmless: none has begun


@pytest.mark.parametrize("value", [-1.0, NAN, INF], ids=str)
@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_a_hyperparameter_broken_between_first_and_second_step_cancels_the_step(name: str, value: float) -> None:
    bench = Bench()
    group = bench.optimizer.param_groups[0]
    loss = bench.loss()
    before = bench.snapshot()
    bench.optimizer.first_step(loss)
    good, group[name] = group[name], value
    loss_adv = bench.loss()
    refused(lambda: bench.optimizer.second_step(loss_adv), ValueError, name, repr(value), ">= 0", "param group 0")
    group[name] = good
    after = bench.snapshot()
    # Both forward passes and their random draws were the caller's own.
    assert {k: v for k, v in after.items() if k != "random states"} == {
        k: v for k, v in before.items() if k != "random states"
    }


# ---------------------------------------------------------------------- closures


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


@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
@pytest.mark.parametrize("bad", BAD_LOSSES)
def test_a_closure_that_does_not_return_the_loss_is_refused_in_every_pass(bad: str, hvp: str) -> None:
    spoil, error, fragments = BAD_LOSSES[bad]
    passes = 2 if hvp == "exact" else 4
    for spoiled in range(passes):
        bench = Bench(hvp=hvp)
        calls: Iterator[int] = iter(range(passes))

        def closure(bench: Bench = bench, calls: Iterator[int] = calls, spoiled: int = spoiled) -> Any:
            loss = bench.loss()
            return spoil(loss) if next(calls) == spoiled else loss

        refused(
            lambda closure=closure, bench=bench: bench.optimizer.step(closure),
            error,
            "the closure's return value",
            *fragments,
            unchanged=bench.snapshot,
        )
        assert next(calls, passes) == min(spoiled + 1, passes), "the closure ran on after its error"
        assert_still_usable(bench, hvp=hvp)


@pytest.mark.parametrize("bad", BAD_LOSSES)
def test_a_closure_that_does_not_return_the_loss_is_refused_between_two_flatness_terms(bad: str) -> None:
    spoil, error, fragments = BAD_LOSSES[bad]
    bench = Bench(interval=2)
    call = lambda: bench.optimizer.step(lambda: spoil(bench.loss()))  # noqa: E731
    refused(call, error, "the closure's return value", *fragments, unchanged=bench.snapshot)
    assert_still_usable(bench, interval=2)


@pytest.mark.parametrize("bad", [bad for bad in BAD_LOSSES if bad != "detached"])
def test_a_closure_that_calls_backward_must_return_the_loss_too(bad: str) -> None:
    spoil, error, fragments = BAD_LOSSES[bad]
    bench = Bench()

    def closure() -> Any:
        bench.optimizer.zero_grad()
        loss = bench.loss()
        loss.backward()
        return spoil(loss)

    refused(
        lambda: bench.optimizer.step(closure),
        error,
        "the closure's return value",
        *fragments,
        unchanged=bench.snapshot,
    )
    assert_still_usable(bench)


@pytest.mark.parametrize("closure", [None, 0.5, "loss", torch.tensor(0.5)], ids=["None", "float", "string", "tensor"])
def test_what_cannot_be_called_is_refused_as_a_closure(closure: Any) -> None:
    bench = Bench()
    fragments = ["closure", repr(closure), "step(lambda", "first_step"]
    refused(lambda: bench.optimizer.step(closure), TypeError, *fragments, unchanged=bench.snapshot)
    assert_still_usable(bench)


def test_a_step_without_a_closure_is_refused() -> None:
    bench = Bench()
    refused(lambda: bench.optimizer.step(), TypeError, "closure", unchanged=bench.snapshot)
    assert_still_usable(bench)


# ---------------------------------------------------------------------- sparse gradients


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


# ---------------------------------------------------------------------- first_step and second_step


def test_second_step_before_first_step_is_refused() -> None:
    bench = Bench()
    loss = bench.loss()
    fragments = ["second_step()", "before first_step()", "first_step(loss)"]
    refused(lambda: bench.optimizer.second_step(loss), RuntimeError, *fragments, unchanged=bench.snapshot)
    bench.optimizer.first_step(loss)
    bench.optimizer.second_step(bench.loss())
    loss = bench.loss()
    refused(lambda: bench.optimizer.second_step(loss), RuntimeError, *fragments, unchanged=bench.snapshot)


BETWEEN: dict[str, Callable[[Bench, Tensor], Any]] = {
    "first_step()": lambda bench, loss: bench.optimizer.first_step(loss),
    "step()": lambda bench, loss: bench.optimizer.step(bench.loss),
    "state_dict()": lambda bench, loss: bench.optimizer.state_dict(),
    "load_state_dict()": lambda bench, loss: bench.optimizer.load_state_dict({"state": {}, "param_groups": []}),
    "add_param_group()": lambda bench, loss: bench.optimizer.add_param_group({"params": [param(1)]}),
    "copying or pickling": lambda bench, loss: pickle.dumps(bench.optimizer),
    "copying": lambda bench, loss: deepcopy(bench.optimizer),
}


@pytest.mark.parametrize("what", BETWEEN)
def test_what_would_see_the_adversarial_point_is_refused_between_first_and_second_step(what: str) -> None:
    bench, twin = Bench(), Bench()
    for one in (bench, twin):
        torch.manual_seed(1)
        one.optimizer.first_step(one.loss())
    torch.manual_seed(2)
    loss = bench.loss()
    fragments = [what, "between first_step() and second_step()", "second_step(loss_adv)", "cancel_step()"]
    refused(lambda: BETWEEN[what](bench, loss), RuntimeError, *fragments, unchanged=bench.snapshot)
    # The step goes on as if nothing had been asked.
    bench.optimizer.second_step(loss)
    torch.manual_seed(2)
    twin.optimizer.second_step(twin.loss())
    assert bench.snapshot()["parameters"] == twin.snapshot()["parameters"]
    assert bits(bench.optimizer.state_dict()) == bits(twin.optimizer.state_dict())


def test_cancel_step_is_a_way_out_back_to_where_the_step_began() -> None:
    bench = Bench()
    loss = bench.loss()
    before = bench.snapshot()
    bench.optimizer.first_step(loss)
    bench.optimizer.cancel_step()
    assert bench.snapshot() == before
    bench.optimizer.state_dict()
    bench.optimizer.cancel_step()  # harmless when there is nothing to cancel
    assert bench.snapshot() == before


def test_zero_grad_between_first_and_second_step_is_fine() -> None:
    course = []
    for zero in (False, True):
        bench = Bench()
        bench.optimizer.first_step(bench.loss())
        if zero:
            bench.optimizer.zero_grad()
        bench.optimizer.second_step(bench.loss())
        course.append(bench.snapshot()["parameters"])
    assert course[0] == course[1]


@pytest.mark.parametrize("bad", BAD_LOSSES)
def test_first_step_refuses_what_is_not_the_loss(bad: str) -> None:
    spoil, error, fragments = BAD_LOSSES[bad]
    bench = Bench()
    value = spoil(bench.loss())
    fragments = ["the loss given to first_step", *fragments]
    refused(lambda: bench.optimizer.first_step(value), error, *fragments, unchanged=bench.snapshot)
    bench.optimizer.first_step(bench.loss())
    bench.optimizer.second_step(bench.loss())


@pytest.mark.parametrize("bad", BAD_LOSSES)
def test_second_step_refuses_what_is_not_the_loss_and_returns_to_where_the_step_began(bad: str) -> None:
    spoil, error, fragments = BAD_LOSSES[bad]
    bench = Bench()
    loss = bench.loss()
    before = bench.snapshot()
    bench.optimizer.first_step(loss)
    assert bench.snapshot()["parameters"] != before["parameters"]
    value = spoil(bench.loss())
    refused(lambda: bench.optimizer.second_step(value), error, "the loss given to second_step", *fragments)
    after = bench.snapshot()
    for what in before.keys() - {"random states"}:  # those of the second forward pass are the caller's
        assert after[what] == before[what]
    refused(lambda: bench.optimizer.second_step(bench.loss()), RuntimeError, "first_step(loss)")


@pytest.mark.parametrize("kwargs", [{"hvp": "finite_difference"}, {"interval": 2}], ids=str)
def test_first_step_is_refused_where_one_loss_is_not_enough(kwargs: dict[str, Any]) -> None:
    bench = Bench(**kwargs)
    loss = bench.loss()
    ((name, value),) = kwargs.items()
    fragments = ["first_step()", f"{name}={value!r}", "step(closure)"]
    refused(lambda: bench.optimizer.first_step(loss), RuntimeError, *fragments, unchanged=bench.snapshot)
    bench.optimizer.step(bench.loss)


def test_errors_name_the_key_that_a_clashing_hyperparameter_goes_by() -> None:
    """RMSprop's own ``alpha`` is its own business; the message has to say which one is meant."""
    model, unchanged = model_and_snapshot()
    groups = [{"params": model.parameters(), "gam_alpha": -1.0}]
    fragments = ["gam_alpha", "-1.0", ">= 0", "param group 0"]
    refused(lambda: GAM(groups, torch.optim.RMSprop), ValueError, *fragments, unchanged=unchanged)


def test_parameter_given_to_adam_and_gam_alike_is_no_error() -> None:
    """Two optimizers may share parameters, as in PyTorch; only one optimizer must not have a parameter twice."""
    model = nn.Linear(2, 2)
    GAM(model.parameters(), SGD, lr=0.1)
    Adam(model.parameters())
