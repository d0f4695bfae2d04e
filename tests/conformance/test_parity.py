"""Steps of GAM beside the same base optimizer, in float64, fed with the gradient that ``reference.py`` computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW

from gam_fused import GAM, kernels, reference
from gam_fused.kernels.interface import FusingBackend
from tests.conformance.common import (
    ALPHA,
    CLOSE,
    CONFIGURATIONS,
    IMPLEMENTATIONS,
    RHO,
    XI,
    Base,
    Task,
    assert_same_course,
    backends,
    bases,
    bits,
    course,
    plain_step,
    reference_step,
)


@backends
@pytest.mark.parametrize("base", CONFIGURATIONS + IMPLEMENTATIONS)
def test_seven_steps_with_missing_gradients_follow_the_reference(base: Base, backend: str) -> None:
    task, twin = Task(), Task()
    optimizer, plain = base.gam(task.params, backend=backend), base.plain(twin.params)
    elsewhere = torch.ones((), dtype=torch.float64, requires_grad=True)
    for step in range(7):
        task.model.use_middle = twin.model.use_middle = step not in (1, 4)
        if step == 3:  # nothing has a gradient
            optimizer.step(lambda: elsewhere.square())
            plain.zero_grad()
            plain.step()
        else:
            loss = optimizer.step(task.ordinary_closure(optimizer))
            torch.testing.assert_close(loss, reference_step(twin, plain), **CLOSE)
        assert_same_course(optimizer, task.params, plain, twin.params)


@backends
@bases
def test_freezing_and_unfreezing_layers_follows_the_reference(base: Base, backend: str) -> None:
    task, twin = Task(), Task()
    optimizer, plain = base.gam(task.params, backend=backend), base.plain(twin.params)
    for frozen in [(), ("first",), ("first", "middle"), ("last",), ("first", "middle"), (), ("middle",)]:
        for model in (task.model, twin.model):
            for name in ("first", "middle", "last"):
                getattr(model, name).requires_grad_(name not in frozen)
        optimizer.step(task.loss)
        reference_step(twin, plain)
        assert_same_course(optimizer, task.params, plain, twin.params)


@backends
@bases
def test_first_and_second_step_follow_the_reference(base: Base, backend: str) -> None:
    task, twin = Task(), Task()
    optimizer, plain = base.gam(task.params, backend=backend), base.plain(twin.params)
    for _ in range(3):
        optimizer.first_step(task.loss())
        torch.testing.assert_close(optimizer.second_step(task.loss()), reference_step(twin, plain), **CLOSE)
        assert_same_course(optimizer, task.params, plain, twin.params)


@backends
@bases
def test_interval_leaves_the_flatness_term_out_between(base: Base, backend: str) -> None:
    task, twin = Task(), Task()
    optimizer, plain = base.gam(task.params, backend=backend, interval=3), base.plain(twin.params)
    for step in range(7):
        optimizer.step(task.loss)
        reference_step(twin, plain) if step % 3 == 0 else plain_step(twin, plain)
        assert_same_course(optimizer, task.params, plain, twin.params)


@pytest.mark.parametrize("off", [{"alpha": 0.0}, {"rho": 0.0}], ids=["alpha=0", "rho=0"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@backends
@bases
def test_without_a_flatness_term_it_is_the_base_optimizer_bitwise(
    base: Base, backend: str, dtype: torch.dtype, off: dict[str, float]
) -> None:
    task, twin = Task(dtype), Task(dtype)
    optimizer, plain = base.gam(task.params, backend=backend, **off), base.plain(twin.params)
    for _ in range(4):
        assert bits(optimizer.step(task.loss)) == bits(plain_step(twin, plain).detach())
        assert bits(task.params) == bits(twin.params)
    assert bits(optimizer.state_dict()["state"]) == bits(plain.state_dict()["state"])


@pytest.mark.parametrize("name", ["rho", "alpha", "xi", "interval"])
def test_every_knob_changes_the_result(name: str) -> None:
    changed = {"rho": RHO / 2, "alpha": ALPHA / 2, "xi": 0.1, "interval": 2}
    default, other = Task(), Task()
    base = Base(SGD, {"lr": 0.1})
    course(base.gam(default.params), default, 2)
    course(base.gam(other.params, **{name: changed[name]}), other, 2)
    assert bits(default.params) != bits(other.params)


@pytest.mark.parametrize("cls", [SGD, Adam, AdamW])
@backends
def test_tensor_lr_follows_the_reference_and_is_read_anew_at_every_step(
    cls: type[torch.optim.Optimizer], backend: str
) -> None:
    task, twin = Task(), Task()
    # Of the parameters' dtype: with a narrower one, PyTorch computes Adam's step sizes in that.
    base = Base(cls, {"lr": torch.tensor(0.1, dtype=torch.float64)})
    optimizer, plain = base.gam(task.params, backend=backend), base.plain(twin.params)
    for _ in range(4):
        optimizer.step(task.loss)
        reference_step(twin, plain)
        assert_same_course(optimizer, task.params, plain, twin.params)
        for group in (*optimizer.param_groups, *plain.param_groups):
            group["lr"].mul_(0.5)
    assert optimizer.param_groups[0]["lr"] == 0.1 / 16


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_clears_the_gradients_that_a_step_leaves(set_to_none: bool) -> None:
    task = Task()
    optimizer = Base(SGD, {"lr": 0.1}).gam(task.params)
    optimizer.step(task.loss)
    assert all(param.grad.any() for param in task.params)
    optimizer.zero_grad(set_to_none)
    if set_to_none:
        assert all(param.grad is None for param in task.params)
    else:
        assert all(not param.grad.any() for param in task.params)


@pytest.mark.parametrize("closure_sets_to_none", [True, False])
@pytest.mark.parametrize("loop_sets_to_none", [True, False, None])
def test_a_step_does_not_depend_on_how_gradients_are_zeroed(
    closure_sets_to_none: bool, loop_sets_to_none: bool | None
) -> None:
    task, twin = Task(), Task()
    base = Base(SGD, {"lr": 0.1, "momentum": 0.9})
    optimizer, other = base.gam(task.params), base.gam(twin.params)
    for _ in range(3):
        if loop_sets_to_none is not None:  # otherwise gradients of the step before are still there
            optimizer.zero_grad(loop_sets_to_none)
        optimizer.step(task.ordinary_closure(optimizer, set_to_none=closure_sets_to_none))
        other.step(twin.loss)
        assert bits(task.params) == bits(twin.params)


@backends
@bases
def test_step_is_a_no_op_when_no_parameter_has_a_gradient(base: Base, backend: str) -> None:
    task = Task()
    optimizer = base.gam(task.params, backend=backend)
    elsewhere = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer.step(task.loss)
    params, state = bits(task.params), bits(optimizer.state_dict()["state"])
    loss = optimizer.step(lambda: 3 * elsewhere)
    assert (bits(task.params), bits(optimizer.state_dict()["state"])) == (params, state)
    assert loss == 3
    assert elsewhere.grad is None
    assert optimizer.metrics["skipped_steps"] == 0


@pytest.mark.parametrize("ordinary", [False, True], ids=["returns-loss", "calls-backward"])
@backends
def test_step_is_a_no_op_when_every_parameter_is_frozen(backend: str, ordinary: bool) -> None:
    task = Task()
    optimizer = Base(SGD, {"lr": 0.1, "momentum": 0.9}).gam(task.params, backend=backend)
    optimizer.step(task.loss)
    task.model.requires_grad_(False)
    task.inputs.requires_grad_()  # an adversarial example, say: the loss has a graph
    params, state = bits(task.params), bits(optimizer.state_dict()["state"])
    loss = optimizer.step(task.ordinary_closure(optimizer) if ordinary else task.loss)
    assert (bits(task.params), bits(optimizer.state_dict()["state"])) == (params, state)
    assert bits(loss) == bits(task.loss().detach())


@backends
@bases
def test_zero_gradients_move_nothing_but_what_weight_decay_moves(base: Base, backend: str) -> None:
    param, twin = (Parameter(torch.randn(5, 1, dtype=torch.float64)) for _ in range(2))
    twin.data.copy_(param.data)
    optimizer, plain = base.gam([param], backend=backend), base.plain([twin])
    for _ in range(2):
        # Gradient and Hessian are 0, and with them every norm that a step divides by.
        optimizer.step(lambda: 0 * param.square().sum())
        twin.grad = torch.zeros_like(twin)
        plain.step()
        assert bits(param.data) == bits(twin.data)
    assert optimizer.metrics["skipped_steps"] == 0


@backends
@bases
def test_a_linear_loss_has_no_flatness_term(base: Base, backend: str) -> None:
    param, twin = Parameter(torch.ones(3, dtype=torch.float64)), Parameter(torch.ones(3, dtype=torch.float64))
    slope = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    optimizer, plain = base.gam([param], backend=backend), base.plain([twin])
    for _ in range(3):
        optimizer.step(lambda: param @ slope)
        twin.grad = slope.clone()
        plain.step()
        # PyTorch's own rule contracts into fused multiply-adds, ours does not.
        if isinstance(kernels.resolve(backend), FusingBackend):
            torch.testing.assert_close(param.data, twin.data, rtol=4 * torch.finfo(torch.float64).eps, atol=0)
        else:
            assert bits(param.data) == bits(twin.data)


@backends
def test_parameters_without_elements_and_without_dimensions_follow_the_reference(backend: str) -> None:
    def loss_of(values: list[Tensor]) -> Tensor:
        empty, scalar, matrix = values
        return (scalar * matrix).tanh().square().sum() + scalar.cos() + empty.sum()

    start = [torch.empty(0, 3).double(), torch.tensor(0.7).double(), torch.randn(2, 2).double()]
    params, twin = ([Parameter(tensor.clone()) for tensor in start] for _ in range(2))
    base = Base(Adam, {"lr": 0.05})
    optimizer, plain = base.gam(params, backend=backend), base.plain(twin)
    for _ in range(4):
        optimizer.step(lambda: loss_of(params))
        for param, gradient in zip(twin, reference.gam_terms(loss_of, twin, RHO, ALPHA, XI).combined, strict=True):
            param.grad = gradient
        plain.step()
        assert_same_course(optimizer, params, plain, twin)


@backends
def test_only_parameters_without_elements_is_a_no_op(backend: str) -> None:
    empty = Parameter(torch.empty(0, 3))
    optimizer = GAM([empty], SGD, lr=0.1, momentum=0.9, backend=backend)
    assert optimizer.step(lambda: empty.sum()) == 0
    assert empty.shape == (0, 3)
    assert optimizer.metrics["skipped_steps"] == 0


@backends
@bases
def test_gradients_after_a_step_are_the_combined_ones_whatever_the_base_made_of_them(base: Base, backend: str) -> None:
    task, twin = Task(), Task()
    optimizer, plain = base.gam(task.params, backend=backend), base.plain(twin.params)
    for _ in range(2):
        optimizer.step(task.loss)
        reference_step(twin, plain)
        for param, twin_param in zip(task.params, twin.params, strict=True):
            torch.testing.assert_close(param.grad, twin_param.grad, **CLOSE)


@pytest.mark.parametrize("interval", [1, 2])
def test_step_returns_the_detached_loss_before_the_step(interval: int) -> None:
    task = Task()
    optimizer = Base(SGD, {"lr": 0.1}).gam(task.params, interval=interval)
    for closure in [task.loss, task.ordinary_closure(optimizer)] * 2:
        before = task.loss().detach()
        loss = optimizer.step(closure)
        assert bits(loss) == bits(before)
        assert not loss.requires_grad
        assert loss.grad_fn is None


@bases
def test_every_trained_parameter_has_state_or_the_base_keeps_none(base: Base) -> None:
    task, twin = Task(), Task()
    optimizer, plain = base.gam(task.params), base.plain(twin.params)
    optimizer.step(task.loss)
    plain_step(twin, plain)
    keys = [[sorted(opt.state[p]) for p in t.params] for opt, t in ((optimizer, task), (plain, twin))]
    assert keys[0] == keys[1]
