"""What holds for all normalization layers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gam_fused import GAM
from gam_fused.second_order import formulas, native, normalization, triton
from tests.second_order.common import (
    CASES,
    LARGER,
    Case,
    Function,
    Operators,
    assert_close,
    derivatives,
    is_ours,
    needs_native,
    over,
    over_layouts,
    relative_error,
)

# Of float64: a few roundings of 1e-16 each, in sums of up to some thousand terms.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}


@over(CASES)
def test_second_derivative_agrees_with_finite_differences(case: Case, kernels: str) -> None:
    tensors = case.tensors()
    assert is_ours(case.ours(*tensors))
    assert torch.autograd.gradcheck(case.ours, tensors)
    assert torch.autograd.gradgradcheck(case.ours, tensors)


@over_layouts
@over({name: CASES[name] for name in ("batch_norm", "batch_norm-3d", "group_norm", "instance_norm", "layer_norm")})
def test_second_derivative_agrees_with_finite_differences_in_any_layout(
    case: Case, layout: Callable[[Tensor], Tensor]
) -> None:
    tensors = case.tensors()

    def in_layout(x: Tensor, *parameters: Tensor) -> Tensor:
        return case.ours(layout(x), *parameters)

    assert torch.autograd.gradgradcheck(in_layout, tensors)


@over_layouts
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@over({**CASES, **{f"{name}-larger": case for name, case in LARGER.items()}})
def test_value_gradient_and_product_are_those_of_pytorch(
    case: Case, dtype: torch.dtype, layout: Callable[[Tensor], Tensor], kernels: str
) -> None:
    tensors = case.tensors(dtype)
    inputs = [layout(tensors[0].detach()).requires_grad_(), *tensors[1:]]
    found, expected = derivatives(case.ours, inputs), derivatives(case.theirs, inputs)
    assert torch.equal(found["value"][0], expected["value"][0])
    assert found["value"][0].stride() == expected["value"][0].stride()
    for what in ("gradient", "product"):
        assert_close(found[what], expected[what], TOLERANCES[dtype])


@pytest.mark.parametrize("parameter_dtype", ["same", torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@over({name: LARGER[name] for name in ("batch_norm", "batch_norm-2d", "group_norm", "instance_norm", "layer_norm")})
def test_narrow_dtypes_lose_no_more_than_in_pytorch(
    case: Case, dtype: torch.dtype, parameter_dtype: torch.dtype | str, kernels: str
) -> None:
    x, *parameters = case.tensors(dtype)
    if isinstance(parameter_dtype, torch.dtype):
        parameters = [p.detach().to(parameter_dtype).requires_grad_() for p in parameters]
    tensors = [x, *parameters]
    found, other = derivatives(case.ours, tensors), derivatives(case.theirs, tensors)
    exact = derivatives(case.theirs, [t.detach().double().requires_grad_() for t in tensors])
    assert is_ours(case.ours(*tensors))
    for what, values in exact.items():
        for one, theirs, expected in zip(found[what], other[what], values, strict=True):
            assert one.dtype == theirs.dtype
            # Both round what the layer is given and what it returns; one more such rounding is neither's fault.
            assert relative_error(one, expected) <= relative_error(theirs, expected) + torch.finfo(dtype).eps


@over(LARGER)
def test_gradient_without_a_graph_is_pytorchs_to_the_bit(case: Case) -> None:
    tensors = case.tensors(torch.float32)
    grads = [torch.autograd.grad(f(*tensors).tanh().sum(), tensors) for f in (case.ours, case.theirs)]
    is_rms = case is LARGER["rms_norm"]
    for one, other in zip(*grads, strict=True):
        # PyTorch's CPU kernels have no backward of RMS normalization; the order of its operators is not ours.
        assert relative_error(one, other) <= 1e-6 if is_rms else torch.equal(one, other)


@over(LARGER)
@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_frozen_inputs_and_parameters_get_no_derivative(case: Case, trained: tuple[int, ...], kernels: str) -> None:
    chosen = [i for i in trained if i <= len(case.parameters)]
    if not chosen:
        return
    tensors = [t.detach().requires_grad_(i in chosen) for i, t in enumerate(case.tensors())]

    def of_chosen(function: Function) -> Function:
        return lambda *values: function(*(values[chosen.index(i)] if i in chosen else t for i, t in enumerate(tensors)))

    used = [tensors[i] for i in chosen]
    found, expected = derivatives(of_chosen(case.ours), used), derivatives(of_chosen(case.theirs), used)
    for what, values in found.items():
        assert_close(values, expected[what], 1e-12)


@over(LARGER)
@pytest.mark.parametrize("given", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
def test_double_gradients_may_be_missing(case: Case, given: tuple[int, ...], kernels: str) -> None:
    tensors = case.tensors()
    given = tuple(i for i in given if i < len(tensors))
    products = []
    for function in (case.ours, case.theirs):
        output = function(*tensors)
        grad_output = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape).requires_grad_()
        grads = torch.autograd.grad(output, tensors, grad_output, create_graph=True)
        wanted = [grad_output, *tensors[:2]]
        outputs = [grads[i] for i in given if grads[i].requires_grad]
        if not outputs:
            return
        vectors = [torch.linspace(0.5, 2, g.numel(), dtype=g.dtype).view(g.shape) for g in outputs]
        products.append(torch.autograd.grad(outputs, wanted, vectors, allow_unused=True, materialize_grads=True))
    assert_close(*products, 1e-12)


@over({name: CASES[name] for name in ("batch_norm", "batch_norm-eval", "group_norm", "layer_norm", "rms_norm")})
def test_third_derivative_is_right(case: Case) -> None:
    tensors = case.tensors()
    vectors = [torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view(t.shape) for t in tensors]

    def product_of(function: Function) -> Callable[..., tuple[Tensor, ...]]:
        def product(*inputs: Tensor) -> tuple[Tensor, ...]:
            output = function(*inputs)
            weights = torch.linspace(0.3, 1.7, output.numel(), dtype=output.dtype).view(output.shape)
            grads = torch.autograd.grad((output.tanh() * weights).sum(), inputs, create_graph=True)
            return torch.autograd.grad(grads, inputs, vectors, create_graph=True)

        return product

    ours, theirs = product_of(case.ours), product_of(case.theirs)
    assert is_ours(case.ours(*tensors))
    assert torch.autograd.gradcheck(ours, tensors)
    # A product of another function than the layer's would agree with its own derivative, too.
    products = [[each.detach() for each in product(*tensors)] for product in (ours, theirs)]
    assert_close(*products, 1e-12)


@pytest.mark.parametrize("frozen", [0, 1, 2], ids=["grad_output", "input", "weight"])
@over(LARGER)
def test_nothing_is_computed_for_what_is_frozen(case: Case, frozen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []

    def note(*arguments: Any) -> Any:
        computed.append(arguments[-3:])
        return getattr(formulas, case.operator)(*arguments)

    monkeypatch.setattr(normalization, "kernels_for", lambda device: SimpleNamespace(**{case.operator: note}))
    x, weight, *bias = case.tensors()
    grad_output = torch.randn_like(x).requires_grad_()
    [grad_output, x, weight][frozen].requires_grad_(False)
    inputs = [t for t in (x, weight, *bias) if t.requires_grad]
    grads = torch.autograd.grad(case.ours(x, weight, *bias), inputs, grad_output, create_graph=True)
    used = [t for t in (grad_output, x, weight) if t.requires_grad]
    torch.autograd.grad(grads, used, [torch.ones_like(grad) for grad in grads], allow_unused=True)
    assert computed == [tuple(i != frozen for i in range(3))]


@needs_native
@over({name: case for name, case in LARGER.items() if name != "instance_norm"})
def test_a_double_backward_is_one_operator(case: Case) -> None:
    tensors = case.tensors(torch.float32)
    output = case.ours(*tensors)
    grad_output = torch.randn_like(output).requires_grad_()
    grads = torch.autograd.grad(output, tensors, grad_output, create_graph=True)
    vectors = [torch.randn_like(grad) for grad in grads]
    with Operators() as operators:
        torch.autograd.grad(grads, [grad_output, *tensors[:2]], vectors)
    of_running_statistics = ["aten.add.Tensor", "aten.rsqrt.default"] if case is LARGER["batch_norm-eval"] else []
    assert operators.names == [*of_running_statistics, f"gam_fused.{case.operator}.default"]


@over(LARGER)
def test_no_more_is_kept_for_the_double_backward_than_by_pytorch(case: Case) -> None:
    tensors = case.tensors(torch.float32)
    kept = []
    for function in (case.ours, case.theirs):
        storages: dict[int, int] = {}

        def note(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = function(*tensors)
            grad_output = torch.randn_like(output).requires_grad_()
            grads = torch.autograd.grad(output, tensors, grad_output, create_graph=True)
        kept.append(sum(storages.values()))
        del grads
    assert kept[0] <= kept[1]


@over(LARGER)
def test_checkpoints_run_a_layer_again(case: Case) -> None:
    tensors = case.tensors()

    def checkpointed(*inputs: Tensor) -> Tensor:
        output = torch.utils.checkpoint.checkpoint(case.ours, *inputs, use_reentrant=False)
        assert isinstance(output, Tensor)
        return output

    found, expected = derivatives(checkpointed, tensors), derivatives(case.theirs, tensors)
    assert_close(found["product"], expected["product"], 1e-12)


@over(LARGER)
def test_gam_steps_as_it_does_on_pytorchs_layer(case: Case) -> None:
    weights = []
    start = case.tensors()
    x = start[0].detach()
    for function in (case.ours, case.theirs):
        params = [torch.nn.Parameter(t.detach().clone()) for t in start]
        optimizer = GAM(params, torch.optim.SGD, rho=0.1, alpha=0.5, lr=0.1)

        def closure(function: Function = function, params: list[torch.nn.Parameter] = params) -> Tensor:
            output = function(x * params[0].tanh(), *params[1:])
            return (output.sin() * x.cos()).mean()

        for _ in range(2):
            optimizer.step(closure)
        weights.append([param.detach() for param in params])
    assert_close(*weights, 1e-12)


def test_kernels_are_chosen_by_device() -> None:
    assert normalization.kernels_for(torch.device("meta")) is formulas
    native_is_there = native.unavailable_reason(torch.device("cpu")) is None
    assert normalization.kernels_for(torch.device("cpu")) is (native if native_is_there else formulas)


@pytest.mark.parametrize(("reason", "chosen"), [(None, triton), ("there is no C compiler.", formulas)])
def test_on_cuda_triton_is_chosen_where_it_runs(
    reason: str | None, chosen: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "unavailable_reason", lambda device: reason)
    assert normalization.kernels_for(torch.device("cuda", 1)) is chosen
    assert normalization.kernels_for(torch.device("cpu")) is not triton
