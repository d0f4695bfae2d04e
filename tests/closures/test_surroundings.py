"""Nothing is left behind, and nothing around the step is in the way."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gam_fused import GAM
from tests import literal
from tests.closures.common import (
    ALPHA,
    CLOSURES,
    LR,
    MODES,
    RHO,
    Planted,
    Task,
    calls_backward,
    over_modes,
)
from tests.literal import assert_equal_bits, assert_equal_to_rounding


def surroundings() -> dict[str, Any]:
    """What code after a step runs under."""
    cuda = torch.backends.cuda
    return {
        "function modes": torch.overrides._len_torch_function_stack(),
        "dispatch modes": torch.utils._python_dispatch._len_torch_dispatch_stack(),
        "grad mode": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "attention": (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()),
        "backward": (Tensor.backward, torch.autograd.backward),
    }


@over_modes
@pytest.mark.parametrize("failing_pass", [None, 1, 2])
@pytest.mark.parametrize("grad_enabled", [True, False])
def test_nothing_is_left_behind_by_a_step_that_succeeds_or_fails(
    grad_enabled: bool, failing_pass: int | None, mode: str
) -> None:
    task = Task()
    optimizer = task.optimizer(mode)
    inside: list[dict[str, Any]] = []

    def closure() -> Tensor:
        inside.append(surroundings())
        if len(inside) == failing_pass:
            raise Planted
        return calls_backward(task, optimizer)

    with torch.set_grad_enabled(grad_enabled):
        before = surroundings()
        fails = failing_pass is not None and (failing_pass == 1 or mode != "between_flatness_steps")
        with pytest.raises(Planted) if fails else warnings.catch_warnings():
            optimizer.step(closure)
        assert surroundings() == before
    assert all(state["grad mode"] for state in inside)
    assert all(state["function modes"] == before["function modes"] + 1 for state in inside)

    twin = Task().loss()
    twin.backward()  # accumulates as ever: nobody takes it over
    task.loss().backward()
    assert all(param.grad is not None for param in task.params)


@pytest.mark.parametrize("end", ["second_step", "second_step_fails", "cancel_step"])
def test_nothing_is_left_behind_by_the_two_phases_wherever_they_end(end: str) -> None:
    """The second half may run under other modes than the first."""
    task = Task()
    optimizer = task.optimizer()
    optimizer.first_step(task.loss())
    with Counting(), Counting(), bfloat16():
        before = surroundings()
        if end == "second_step":
            optimizer.second_step(task.loss())
        elif end == "cancel_step":
            optimizer.cancel_step()
        else:
            with pytest.raises(TypeError, match="second_step"):
                optimizer.second_step(None)  # type: ignore[arg-type]
        assert surroundings() == before
    with torch.no_grad():
        optimizer.step(task.loss)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


class Counting(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["returns_the_loss", "calls_backward_twice", "calls_autograd_backward"])
def test_a_function_mode_inside_the_closure_sees_its_calls_and_takes_the_same_step(kind: str) -> None:
    task, twin = Task(), Task()
    optimizer, twin_optimizer = task.optimizer(), twin.optimizer()
    mode = Counting()

    def closure() -> Tensor:
        with mode:
            return CLOSURES[kind](task, optimizer)

    optimizer.step(closure)
    twin_optimizer.step(lambda: CLOSURES[kind](twin, twin_optimizer))
    assert_equal_bits(task.params, twin.params)
    assert mode.calls.count(F.cross_entropy) == 2 * (2 if kind == "calls_backward_twice" else 1)


@pytest.mark.parametrize("kind", ["returns_the_loss", "calls_backward_twice", "calls_autograd_backward"])
def test_a_function_mode_around_the_step_does_not_change_it(kind: str) -> None:
    task, twin = Task(), Task()
    optimizer, twin_optimizer = task.optimizer(), twin.optimizer()
    with Counting() as mode:
        optimizer.step(lambda: CLOSURES[kind](task, optimizer))
    twin_optimizer.step(lambda: CLOSURES[kind](twin, twin_optimizer))
    assert_equal_bits(task.params, twin.params)
    assert F.cross_entropy in mode.calls


def test_no_grad_inside_the_closure_makes_constants_as_usual() -> None:
    task = Task()

    def loss(net: Callable[[Tensor], Tensor]) -> Tensor:
        scores = net(task.inputs)
        with torch.no_grad():
            weights = net(task.inputs).softmax(1)
        return F.cross_entropy(scores, task.labels) + (weights * scores).mean()

    expected = literal.step(literal.as_function(task.model, loss), task.params, rho=RHO, alpha=ALPHA, lr=LR)
    task.optimizer().step(lambda: loss(task.model))
    assert_equal_to_rounding(task.params, expected)


def test_a_step_under_no_grad_differentiates_all_the_same() -> None:
    task = Task()
    expected = literal.step(task.literal_loss(), task.params, rho=RHO, alpha=ALPHA, lr=LR)
    optimizer = task.optimizer()
    with torch.no_grad():
        optimizer.step(lambda: calls_backward(task, optimizer))
    assert_equal_to_rounding(task.params, expected)


@pytest.mark.parametrize("kind", ["returned", "backward"])
def test_a_gradient_penalty_inside_the_loss_takes_the_literal_step(kind: str) -> None:
    task = Task()

    def loss(net: Callable[[Tensor], Tensor]) -> Tensor:
        inputs = task.inputs.clone().requires_grad_()
        value = F.cross_entropy(net(inputs), task.labels)
        (slope,) = torch.autograd.grad(value, [inputs], create_graph=True)
        return value + 3 * slope.square().sum()

    expected = literal.step(literal.as_function(task.model, loss), task.params, rho=RHO, alpha=ALPHA, lr=LR)
    optimizer = task.optimizer()

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(task.model)
        if kind == "backward":
            value.backward()
        return value

    optimizer.step(closure)
    assert_equal_to_rounding(task.params, expected)


def test_a_closure_may_read_gradients_without_taking_part_in_the_step() -> None:
    task = Task()
    expected = literal.step(task.literal_loss(), task.params, rho=RHO, alpha=ALPHA, lr=LR)
    seen = []

    def closure() -> Tensor:
        loss = task.loss()
        seen.append(torch.autograd.grad(loss, task.params, retain_graph=True))
        return loss

    task.optimizer().step(closure)
    assert len(seen) == 2
    assert_equal_to_rounding(task.params, expected)


RHO_16 = 1.0  # far above the resolution of bfloat16


class Linear16:
    """Mean squared error of a linear model whose products are in bfloat16, by autocast or by hand."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.model = nn.Linear(6, 3)
        self.inputs, self.target = torch.randn(7, 6), torch.randn(7, 3)

    def loss(self) -> Tensor:
        return (self.model(self.inputs).float() - self.target).square().mean()

    def by_hand(self, params: list[Tensor]) -> Tensor:
        weight, bias = (param.bfloat16() for param in params)
        return (F.linear(self.inputs.bfloat16(), weight, bias).float() - self.target).square().mean()

    def expected(self) -> list[Tensor]:
        """The step by hand: explicit casts, and nothing that could be remembered between two passes."""
        twin = [param.detach().clone().requires_grad_() for param in self.model.parameters()]
        GAM(twin, rho=RHO_16, alpha=ALPHA, lr=LR).step(lambda: self.by_hand(twin))
        return literal.copies(twin)

    def output(self) -> Tensor:
        """Under autocast, with weights that cannot have been remembered."""
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False), torch.no_grad():
            return self.model(self.inputs)


def bfloat16(**kwargs: Any) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, **kwargs)


@pytest.mark.parametrize("kind", ["returned", "backward_inside", "backward_outside"])
def test_autocast_inside_the_closure_takes_the_step_of_explicit_casts(kind: str) -> None:
    task = Linear16()
    expected = task.expected()

    def closure() -> Tensor:
        with bfloat16():
            loss = task.loss()
            if kind == "backward_inside":
                loss.backward()
        if kind == "backward_outside":
            loss.backward()
        return loss

    GAM(task.model.parameters(), rho=RHO_16, alpha=ALPHA, lr=LR).step(closure)
    assert_equal_bits(task.model.parameters(), expected)


@pytest.mark.parametrize("kind", ["returned", "backward"])
def test_autocast_around_the_step_sees_the_moved_weights_in_the_second_pass(kind: str) -> None:
    task = Linear16()
    expected = task.expected()
    optimizer = GAM(task.model.parameters(), rho=RHO_16, alpha=ALPHA, lr=LR)

    def closure() -> Tensor:
        loss = task.loss()
        if kind == "backward":
            loss.backward()
        return loss

    with bfloat16():
        optimizer.step(closure)
    assert_equal_bits(task.model.parameters(), expected)


def test_autocast_around_finite_differences_sees_the_moved_weights_in_every_pass() -> None:
    task, twin = Linear16(), Linear16()
    kwargs: dict[str, Any] = {"rho": RHO_16, "alpha": ALPHA, "lr": LR, "hvp": "finite_difference", "fd_epsilon": 1.0}
    optimizer, twin_optimizer = (GAM(t.model.parameters(), **kwargs) for t in (task, twin))
    with bfloat16():
        optimizer.step(task.loss)
    twin_optimizer.step(lambda: twin.by_hand(list(twin.model.parameters())))
    assert_equal_bits(task.model.parameters(), twin.model.parameters())


@over_modes
def test_autocast_around_several_steps_sees_the_weights_after_each(mode: str) -> None:
    task = Linear16()
    optimizer = GAM(task.model.parameters(), rho=RHO_16, alpha=ALPHA, lr=LR, **MODES[mode])
    with bfloat16():
        for _ in range(3):
            optimizer.step(task.loss)
            assert_equal_bits([task.model(task.inputs)], [task.output()])


@pytest.mark.parametrize("failing_pass", [1, 2])
def test_autocast_around_a_step_that_fails_sees_the_weights_from_before(failing_pass: int) -> None:
    task = Linear16()
    optimizer = GAM(task.model.parameters(), rho=RHO_16, alpha=ALPHA, lr=LR)
    passes = []

    def closure() -> Tensor:
        loss = task.loss()
        passes.append(1)
        if len(passes) == failing_pass:
            raise Planted
        return loss

    before = task.output()
    with bfloat16():
        with pytest.raises(Planted):
            optimizer.step(closure)
        assert_equal_bits([task.model(task.inputs)], [before])


def test_autocast_around_both_phases_sees_the_moved_weights_in_the_second() -> None:
    task = Linear16()
    expected = task.expected()
    optimizer = GAM(task.model.parameters(), rho=RHO_16, alpha=ALPHA, lr=LR)
    with bfloat16():
        optimizer.first_step(task.loss())
        optimizer.second_step(task.loss())
        assert_equal_bits([task.model(task.inputs)], [task.output()])
    assert_equal_bits(task.model.parameters(), expected)


def test_autocast_around_a_cancelled_step_sees_the_weights_from_before() -> None:
    task = Linear16()
    optimizer = GAM(task.model.parameters(), rho=RHO_16, alpha=ALPHA, lr=LR)
    before = task.output()
    with bfloat16():
        optimizer.first_step(task.loss())
        assert not torch.equal(task.model(task.inputs), before)
        optimizer.cancel_step()
        assert_equal_bits([task.model(task.inputs)], [before])
