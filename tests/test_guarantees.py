"""What a step guarantees: nothing is lost, nothing non-finite gets in, both passes see one function."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gam_fused import GAM, AcceleratedGAM
from tests.faults import (
    MODES,
    Planted,
    Task,
    assert_equals_an_undisturbed_twin,
    build,
    over_backends,
    over_bases,
    over_dtypes,
    over_modes,
    raise_exit,
    raise_interrupt,
    raise_planted,
)
from tests.states import assert_same, snapshot

STAGES = [(at, stage) for at in (1, 2) for stage in ("forward", "loss", "backward", "double backward")]
over_stages = pytest.mark.parametrize("fault", STAGES, ids=lambda fault: f"{fault[1]} {fault[0]}".replace(" ", "_"))


@over_backends
@over_dtypes
@over_bases
@pytest.mark.parametrize("mode", ["exact", "accelerated"])
def test_lr_zero_leaves_parameters_bitwise_unchanged(mode: str, base: str, dtype: torch.dtype, backend: str) -> None:
    task = Task(dtype)
    optimizer = build(task, backend, base, mode, lr=0.0, weight_decay=0.0)
    before = snapshot(task.model, optimizer)["params"]
    for _ in range(3):
        task.step(optimizer)
    assert float(optimizer.metrics["skipped_steps"]) == 0
    assert float(optimizer.metrics["ascent_norm"]) > 0
    assert_same(before, snapshot(task.model, optimizer)["params"])


@over_backends
@over_stages
@pytest.mark.parametrize(
    ("action", "error"),
    [(raise_planted, Planted), (raise_interrupt, KeyboardInterrupt), (raise_exit, SystemExit)],
    ids=["exception", "keyboard_interrupt", "system_exit"],
)
def test_an_exception_in_any_pass_leaves_everything_bitwise_as_before(
    fault: tuple[int, str], action: Callable[[Tensor], Tensor], error: type[BaseException], backend: str
) -> None:
    task = Task()
    optimizer = build(task, backend)
    torch.manual_seed(1)
    task.step(optimizer)
    before = snapshot(task.model, optimizer)
    with pytest.raises(error):
        task.step(optimizer, fault, action)
    assert_same(before, snapshot(task.model, optimizer))
    assert optimizer.steps == 1

    task.step(optimizer)
    assert_equals_an_undisturbed_twin(task, optimizer, backend)


@over_dtypes
@over_backends
@over_bases
@pytest.mark.parametrize("at", [1, 2])
def test_an_exception_leaves_every_dtype_and_base_optimizer_bitwise_as_before(
    at: int, base: str, backend: str, dtype: torch.dtype
) -> None:
    task = Task(dtype)
    optimizer = build(task, backend, base)
    task.step(optimizer)
    before = snapshot(task.model, optimizer)
    with pytest.raises(Planted):
        task.step(optimizer, (at, "double backward"), raise_planted)
    assert_same(before, snapshot(task.model, optimizer))


@over_backends
@pytest.mark.parametrize("mode", ["finite_difference", "accelerated"])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_an_exception_in_any_of_four_passes_leaves_everything_bitwise_as_before(
    at: int, mode: str, backend: str
) -> None:
    task = Task()
    optimizer = build(task, backend, mode=mode)
    torch.manual_seed(1)
    task.step(optimizer)
    assert task.passes == 4
    before = snapshot(task.model, optimizer)
    for stage in ("forward", "loss", "backward"):
        for action, error in ((raise_planted, Planted), (raise_interrupt, KeyboardInterrupt)):
            with pytest.raises(error):
                task.step(optimizer, (at, stage), action)
            assert_same(before, snapshot(task.model, optimizer))
    assert optimizer.steps == 1

    task.step(optimizer)
    assert_equals_an_undisturbed_twin(task, optimizer, backend, mode)


@over_backends
@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize("stage", ["forward", "loss", "backward"])
def test_a_non_finite_value_in_any_pass_of_an_accelerated_step_skips_it(stage: str, at: int, backend: str) -> None:
    task = Task()
    optimizer = build(task, backend, mode="accelerated")
    for skipped, poison in enumerate(POISONS.values(), start=1):
        task.step(optimizer)
        before = snapshot(task.model, optimizer)
        task.step(optimizer, (at, stage), poison)
        assert_same(before, snapshot(task.model, optimizer))
        assert float(optimizer.metrics["skipped_steps"]) == skipped


@over_backends
def test_an_exception_between_flatness_steps_leaves_everything_bitwise_as_before(backend: str) -> None:
    task = Task()
    optimizer = build(task, backend, interval=2)
    task.step(optimizer)
    before = snapshot(task.model, optimizer)
    with pytest.raises(Planted):
        task.step(optimizer, (1, "backward"), raise_planted)
    assert_same(before, snapshot(task.model, optimizer))


@over_backends
def test_an_exception_before_the_base_step_leaves_everything_bitwise_as_before(backend: str) -> None:
    task = Task()
    optimizer = build(task, backend)
    task.step(optimizer)
    before = snapshot(task.model, optimizer)

    def refuse(*_: Any) -> None:
        raise Planted

    hook = optimizer.base_optimizer.register_step_pre_hook(refuse)
    with pytest.raises(Planted):
        task.step(optimizer)
    hook.remove()
    assert_same(before, snapshot(task.model, optimizer))


@over_backends
def test_an_exception_after_the_base_optimizer_has_written_leaves_a_complete_step(backend: str) -> None:
    task, twin = Task(), Task()
    optimizer, twin_optimizer = build(task, backend), build(twin, backend)
    # With a hook, a step is PyTorch's own; a fused one would round differently.
    twin_optimizer.base_optimizer.register_step_post_hook(lambda *_: None)
    torch.manual_seed(1)
    twin.step(twin_optimizer)
    expected = snapshot(twin.model, twin_optimizer)

    def refuse(*_: Any) -> None:
        raise Planted

    optimizer.base_optimizer.register_step_post_hook(refuse)
    torch.manual_seed(1)
    with pytest.raises(Planted):
        task.step(optimizer)
    assert_same(expected, snapshot(task.model, optimizer))
    assert optimizer.steps == 1


@over_backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_accelerated_gradient_that_overflows_skips_the_step(dtype: torch.dtype, backend: str) -> None:
    """The four gradients, h⁺ and h⊥ are finite, h⁺ − γ h⊥ is not."""
    param = nn.Parameter(torch.tensor([8.0, 4.0, 1.0], dtype=dtype))
    model = nn.ParameterList([param])
    optimizer = AcceleratedGAM([param], rho=1.0, rho_prime=1.0, gamma=torch.finfo(dtype).max, backend=backend, lr=1e-38)
    before = snapshot(model, optimizer)
    optimizer.step(lambda: param.pow(4).sum())
    assert float(optimizer.metrics["skipped_steps"]) == 1
    assert_same(before, snapshot(model, optimizer))


@over_backends
def test_a_combined_gradient_that_overflows_skips_the_step(backend: str) -> None:
    """g and H g_adv are finite in float16, g + α ρ H g_adv / ‖g_adv‖ is not."""
    param = nn.Parameter(torch.full((4,), 8.0, dtype=torch.float16))
    model = nn.ParameterList([param])
    optimizer = GAM([param], rho=1.0, alpha=7e4, backend=backend, lr=1e-4)
    before = snapshot(model, optimizer)
    optimizer.step(lambda: param.square().sum())
    assert_same(before, snapshot(model, optimizer))
    assert float(optimizer.metrics["skipped_steps"]) == 1


POISONS: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": lambda tensor: tensor * float("nan"),
    "inf": lambda tensor: tensor + float("inf"),
    "one_nan": lambda tensor: tensor.reshape(-1).index_fill(0, torch.tensor([0]), float("nan")).view_as(tensor),
}


@over_backends
@over_stages
@pytest.mark.parametrize("poison", POISONS)
def test_a_non_finite_value_in_any_pass_skips_the_step_and_leaves_everything_bitwise_as_before(
    poison: str, fault: tuple[int, str], backend: str
) -> None:
    task = Task()
    optimizer = build(task, backend)
    torch.manual_seed(1)
    task.step(optimizer)
    before = snapshot(task.model, optimizer)
    task.step(optimizer, fault, POISONS[poison])
    assert_same(before, snapshot(task.model, optimizer))
    assert float(optimizer.metrics["skipped_steps"]) == 1

    task.step(optimizer)
    assert float(optimizer.metrics["skipped_steps"]) == 1
    assert_equals_an_undisturbed_twin(task, optimizer, backend)


@over_dtypes
@over_backends
@over_bases
@pytest.mark.parametrize("at", [1, 2])
def test_a_non_finite_hvp_skips_the_step_in_every_dtype_and_base_optimizer(
    at: int, base: str, backend: str, dtype: torch.dtype
) -> None:
    task = Task(dtype)
    optimizer = build(task, backend, base)
    task.step(optimizer)
    before = snapshot(task.model, optimizer)
    task.step(optimizer, (at, "double backward"), POISONS["one_nan"])
    assert_same(before, snapshot(task.model, optimizer))
    assert float(optimizer.metrics["skipped_steps"]) == 1


@over_backends
@over_modes
def test_an_infinite_batch_is_skipped_by_every_mode_and_between_flatness_steps(mode: str, backend: str) -> None:
    task = Task()
    optimizer = build(task, backend, mode=mode, interval=2)
    clean = task.inputs
    for expected in (1, 2):
        task.inputs = torch.full_like(clean, float("inf"))
        before = snapshot(task.model, optimizer)
        task.step(optimizer)
        after = snapshot(task.model, optimizer)
        if expected > 1:  # see the next test
            del before["random"], after["random"]
        assert_same(before, after)
        assert float(optimizer.metrics["skipped_steps"]) == expected
    task.inputs = clean
    task.step(optimizer)
    assert float(optimizer.metrics["skipped_steps"]) == 2


@over_backends
def test_a_closure_that_draws_its_own_data_is_not_stuck_on_a_bad_draw(backend: str) -> None:
    param = nn.Parameter(torch.ones(()))
    optimizer = GAM([param], backend=backend, lr=0.1)
    draws = []

    def closure() -> Tensor:
        draws.append(torch.rand(()))
        return param.square() * (draws[-1] if len(draws) > 8 else float("inf"))

    torch.manual_seed(0)
    for _ in range(6):
        optimizer.step(closure)
    # Skipped twice on the first draw, then once on each draw: the first rewinds, as the guarantee has it.
    assert float(optimizer.metrics["skipped_steps"]) == 4
    torch.manual_seed(0)
    expected = torch.rand(5)
    assert torch.equal(torch.stack(draws[::2]), expected[[0, 0, 1, 2, 3, 4]])


@over_backends
@over_bases
@pytest.mark.parametrize("mode", ["exact", "accelerated"])
def test_a_parameter_without_a_gradient_is_left_alone(mode: str, base: str, backend: str) -> None:
    task = Task()
    optimizer = build(task, backend, base, mode, weight_decay=0.1)
    unused = task.model["unused"]
    for param in unused.parameters():
        param.grad = torch.ones_like(param)  # left over from elsewhere: not a gradient of this step
    before = copy.deepcopy(unused.state_dict())
    for _ in range(3):
        task.step(optimizer)
    assert_same(before, unused.state_dict())
    assert not any(param in optimizer.state for param in unused.parameters())


@over_dtypes
@over_backends
@over_bases
@pytest.mark.parametrize("mode", ["exact", "accelerated"])
def test_the_same_seed_gives_the_same_bits(mode: str, base: str, backend: str, dtype: torch.dtype) -> None:
    runs = []
    for _ in range(2):
        task = Task(dtype)
        optimizer = build(task, backend, base, mode)
        for _ in range(3):
            task.step(optimizer)
        runs.append(snapshot(task.model, optimizer))
    assert_same(*runs)


@over_backends
@pytest.mark.parametrize("mode", ["exact", "accelerated"])
def test_the_number_of_threads_leaves_no_trace(mode: str, backend: str) -> None:
    """The arithmetic around the derivatives; the loss is made of operators that are elementwise, so exact too."""
    threads = torch.get_num_threads()
    runs = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            torch.manual_seed(0)
            params = [nn.Parameter(torch.randn(size)) for size in (1, 300_001, 70_000)]
            wrapper, kwargs = MODES[mode]
            optimizer = wrapper(params, backend=backend, lr=0.1, momentum=0.9, **kwargs)
            for _ in range(3):
                optimizer.step(lambda params=params: Fixed.apply(*params))  # type: ignore[misc]
            runs.append([param.detach().clone() for param in params])
    finally:
        torch.set_num_threads(threads)
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])


class Fixed(torch.autograd.Function):
    """Σ sin θ without the sum, whose rounding would depend on the threads: value 1, gradient cos θ."""

    @staticmethod
    def forward(ctx: Any, *params: Tensor) -> Tensor:
        ctx.save_for_backward(*params)
        return torch.ones(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(grad * param.cos() for param in ctx.saved_tensors)
