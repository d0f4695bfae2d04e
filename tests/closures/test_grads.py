"""What .grad holds before, in and after a closure."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gam_fused import GAM, reference
from tests import literal
from tests.closures.common import (
    ALPHA,
    BATCH,
    CLOSURES,
    LR,
    MODES,
    RHO,
    Planted,
    Task,
    calls_backward,
    calls_backward_twice,
    over_modes,
)
from tests.literal import assert_equal_bits, assert_equal_to_rounding
from tests.states import assert_same


@over_modes
def test_backward_accumulates_into_grad_as_usual(mode: str) -> None:
    task = Task()
    optimizer = task.optimizer(mode)
    theta: list[list[Tensor]] = []
    held: list[list[Tensor]] = []

    def closure() -> Tensor:
        theta.append(literal.copies(task.params))
        assert all(param.grad is None for param in task.params)
        first, second = task.loss(0, 3), task.loss(3)
        for loss in (first, second):
            loss.backward()
            held.append([param.grad.clone() for param in task.params if param.grad is not None])
        return first + second

    optimizer.step(closure)
    assert len(held) == 2 * len(theta) > 0
    for point, after_first, after_second in zip(theta, held[::2], held[1::2], strict=True):
        twin = Task()
        twin.model.load_state_dict(dict(zip(twin.model.state_dict(), point, strict=True)))
        twin.loss(0, 3).backward()
        assert_equal_bits(after_first, [param.grad for param in twin.params if param.grad is not None])
        twin.loss(3).backward()
        assert_equal_bits(after_second, [param.grad for param in twin.params if param.grad is not None])


def test_grads_from_before_the_step_are_not_accumulated_into() -> None:
    task = Task()
    optimizer = task.optimizer()
    expected = literal.step(task.literal_loss(), task.params, rho=RHO, alpha=ALPHA, lr=LR)
    task.loss().backward()
    old = [param.grad for param in task.params if param.grad is not None]
    values = literal.copies(old)

    def closure() -> Tensor:  # no zero_grad
        loss = task.loss()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert_equal_to_rounding(task.params, expected)
    assert_equal_bits(old, values)


@over_modes
@pytest.mark.parametrize("moment", ["before", "between", "after"])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.filterwarnings("ignore:the closure changed .grad")
def test_zeroing_grads_at_any_moment_does_not_change_the_step(set_to_none: bool, moment: str, mode: str) -> None:
    task, twin = Task(), Task()
    optimizer, twin_optimizer = task.optimizer(mode), twin.optimizer(mode)

    def closure() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        if moment == "before":
            optimizer.zero_grad(set_to_none)
        for start, stop in ((0, 3), (3, BATCH)):
            loss = task.loss(start, stop)
            loss.backward()
            if moment == "after" or (moment == "between" and stop < BATCH):
                optimizer.zero_grad(set_to_none)
            total += loss.detach()
        return total

    optimizer.step(closure)
    twin_optimizer.step(lambda: calls_backward_twice(twin, twin_optimizer))
    assert_equal_bits(task.params, twin.params)


@over_modes
def test_writing_into_handed_out_grads_does_not_change_the_step(mode: str) -> None:
    """Also not where a parameter has the only gradient of its step, or the graph's own memory."""
    param, twin = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    kwargs = {"rho": RHO, "alpha": ALPHA, "lr": LR, **MODES[mode]}
    optimizer, twin_optimizer = GAM([param], **kwargs), GAM([twin], **kwargs)

    def closure() -> Tensor:
        loss = (param**3).sum()
        loss.backward()
        assert param.grad is not None
        param.grad.fill_(1e6)
        return loss

    for _ in range(2):
        with pytest.warns(UserWarning, match=r"closure changed \.grad"):
            optimizer.step(closure)
        twin_optimizer.step(lambda: (twin**3).sum())
    assert_equal_bits([param], [twin])


def clip(task: Task) -> None:
    nn.utils.clip_grad_norm_(task.params, 1e-3)


def scale(task: Task) -> None:
    for param in task.params:
        assert param.grad is not None
        param.grad *= 0.5


def replace(task: Task) -> None:
    task.params[0].grad = torch.zeros_like(task.params[0])


def assign_without_backward(task: Task) -> None:
    nn.Module.zero_grad(task.model)
    task.params[0].grad = torch.zeros_like(task.params[0])


@pytest.mark.parametrize("change", [clip, scale, replace, assign_without_backward])
@over_modes
def test_changing_grads_warns_names_the_way_out_and_does_not_change_the_step(
    mode: str, change: Callable[[Task], None]
) -> None:
    task, twin = Task(), Task()
    optimizer, twin_optimizer = task.optimizer(mode), twin.optimizer(mode)

    def closure() -> Tensor:
        loss = task.loss()
        loss.backward()
        change(task)
        return loss

    with pytest.warns(UserWarning, match=r"closure changed \.grad .*clipping.*base_optimizer\.register_step_pre_hook"):
        optimizer.step(closure)
    twin_optimizer.step(twin.loss)
    assert_equal_bits(task.params, twin.params)


def test_the_way_out_that_the_warning_names_clips_the_combined_gradient() -> None:
    task = Task()
    optimizer = task.optimizer()
    optimizer.base_optimizer.register_step_pre_hook(lambda *_: clip(task))
    combined = literal.combined_gradient(task.literal_loss(), task.params, rho=RHO, alpha=ALPHA)
    shrink = 1e-3 / (reference.global_norm(combined) + 1e-6)
    expected = [param.detach() - LR * shrink * grad for param, grad in zip(task.params, combined, strict=True)]
    optimizer.step(lambda: calls_backward(task, optimizer))
    assert_equal_to_rounding(task.params, expected)


@pytest.mark.parametrize("kind", CLOSURES)
def test_a_closure_that_leaves_grads_as_they_are_warns_of_nothing(kind: str) -> None:
    task = Task()
    optimizer = task.optimizer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(lambda: CLOSURES[kind](task, optimizer))


@pytest.mark.parametrize("kind", CLOSURES)
def test_after_a_step_grad_is_the_combined_gradient(kind: str) -> None:
    task = Task()
    optimizer = task.optimizer(momentum=0.9)
    combined = literal.combined_gradient(task.literal_loss(), task.params, rho=RHO, alpha=ALPHA)
    optimizer.step(lambda: CLOSURES[kind](task, optimizer))
    assert_equal_to_rounding([param.grad for param in task.params if param.grad is not None], combined)


@pytest.mark.parametrize("failing_pass", [1, 2])
@pytest.mark.parametrize("had_grads", [True, False])
def test_after_a_failure_grads_are_the_very_tensors_from_before(had_grads: bool, failing_pass: int) -> None:
    task = Task()
    optimizer = task.optimizer(momentum=0.9)
    if had_grads:
        task.loss().backward()
    before = [param.grad for param in task.params]
    values = [None if grad is None else grad.clone() for grad in before]
    passes = []

    def closure() -> Tensor:
        passes.append(1)
        optimizer.zero_grad(set_to_none=False)
        loss = calls_backward_twice(task, optimizer)
        if len(passes) == failing_pass:
            raise Planted
        return loss

    with pytest.raises(Planted):
        optimizer.step(closure)
    assert len(passes) == failing_pass
    assert all(param.grad is grad for param, grad in zip(task.params, before, strict=True))
    assert_same(values, [None if param.grad is None else param.grad.clone() for param in task.params])
