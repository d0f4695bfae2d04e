"""Where there is no graph, one clear error: what is in the way, and how to do without. Never a step without a graph."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gam_fused import GAM, AcceleratedGAM
from gam_fused.joint_graph import JointBackend, loss_marker
from tests.compiled.common import SETTINGS, Task, compiled, mlp
from tests.states import assert_same, snapshot


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad * 3 * x**2


def loss_through(layer: Callable[[Tensor], Tensor]) -> Callable[[Task], Callable[..., Any]]:
    return lambda task: lambda inputs, labels: F.cross_entropy(layer(task.model(inputs)), labels)


def printing(x: Tensor) -> Tensor:
    print(x.sum())
    return x


def branching(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def calls_backward(task: Task) -> Callable[..., Any]:
    def loss_fn(inputs: Tensor, labels: Tensor) -> Tensor:
        loss = task.loss(inputs, labels)
        loss.backward()
        return loss

    return loss_fn


def raises(x: Tensor) -> Tensor:
    raise ValueError("out of paper")


# What the loss is, and what the error says.
FAILURES: dict[str, tuple[Callable[[Task], Callable[..., Any]], type[Exception], str]] = {
    "graph break": (loss_through(printing), RuntimeError, r"print.* optimizer\.step\(lambda"),
    "data-dependent branch": (loss_through(branching), RuntimeError, r"branch.* optimizer\.step\(lambda"),
    "backward() in the loss": (calls_backward, RuntimeError, r"backward.* optimizer\.step\(lambda"),
    "loss_fn raises": (loss_through(raises), RuntimeError, r"out of paper.* optimizer\.step\(lambda"),
    "a torch.autograd.Function": (loss_through(Cube.apply), RuntimeError, r"a torch\.autograd\.Function has no second"),
    "no second derivative": (
        loss_through(lambda x: x + torch.cdist(x, x).sum()),
        RuntimeError,
        r"cdist has none.* hvp='finite_difference'",
    ),
    "no reduction": (
        lambda task: lambda x, y: F.cross_entropy(task.model(x), y, reduction="none"),
        ValueError,
        r"what loss_fn returned must be one real number, got shape \(8,\)",
    ),
    "detached": (
        lambda task: lambda x, y: task.loss(x, y).detach(),
        ValueError,
        r"what loss_fn returned is detached",
    ),
    "a number": (
        lambda task: lambda x, y: 1.5,
        TypeError,
        r"what loss_fn returned must be the scalar loss tensor, got 1\.5",
    ),
    "a pair": (
        lambda task: lambda x, y: (task.loss(x, y), x),
        TypeError,
        r"what loss_fn returned must be the scalar loss tensor, got something else",
    ),
}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by Dynamo, of a Function
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", FAILURES)
def test_what_cannot_be_compiled_is_named_and_nothing_is_changed(kind: str, backend: str) -> None:
    make, error, message = FAILURES[kind]
    task = mlp(nn.BatchNorm1d(10), nn.Dropout(0.3))
    optimizer = GAM(task.model.parameters(), **SETTINGS)
    optimizer.step(lambda: task.loss(*task.batches[0]))
    before = snapshot(task.model, optimizer)
    step = compiled(optimizer, make(task), backend)
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        step(*task.batches[0])
    assert_same(before, snapshot(task.model, optimizer))
    assert optimizer.steps == 1


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by Dynamo, of a Function
@pytest.mark.parametrize(
    "build",
    [
        lambda params: GAM(params, hvp="finite_difference", **SETTINGS),
        lambda params: AcceleratedGAM(params, lr=0.1),
    ],
    ids=["finite differences", "accelerated"],
)
def test_what_is_differentiated_once_may_be_a_function_of_the_user(build: Callable[[Any], Any]) -> None:
    task = mlp()
    twin = copy.deepcopy(task)
    step = compiled(build(task.model.parameters()), loss_through(Cube.apply)(task), "aot_eager")
    expected = build(twin.model.parameters())
    for batch in 2 * task.batches[:1]:
        loss = expected.step(lambda batch=batch: loss_through(Cube.apply)(twin)(*batch))
        torch.testing.assert_close(step(*batch), loss, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def halve(tensor: Tensor) -> None:
    tensor.mul_(0.5)


WAYS_TO_WRITE: dict[str, Callable[[Tensor], object]] = {
    "max_norm of an embedding": lambda weight: F.embedding(torch.arange(3), weight, max_norm=0.1),
    "in place": halve,
    "through detach()": lambda weight: halve(weight.detach()),
    "through .data": lambda weight: halve(weight.data),
    "through a view": lambda weight: halve(weight[1]),
    "many at once": lambda weight: torch._foreach_zero_([torch.ones(2), weight.detach()]),
    "by out=": lambda weight: torch.add(weight.detach(), 1.0, out=weight.detach()),
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("way", WAYS_TO_WRITE)
@pytest.mark.parametrize(
    "build",
    [lambda params: GAM(params, **SETTINGS), lambda params: AcceleratedGAM(params, lr=0.1)],
    ids=["exact", "accelerated"],
)
def test_a_loss_that_writes_a_parameter_is_an_error(build: Callable[[Any], Any], way: str, backend: str) -> None:
    """In a graph, its derivatives come out wrong, or the write is lost, without a word."""
    task = mlp(nn.BatchNorm1d(10))
    weight = task.model[-1].weight
    number = [parameter is weight for parameter in task.model.parameters()].index(True)
    optimizer = build(task.model.parameters())

    def loss_fn(inputs: Tensor, labels: Tensor) -> Tensor:
        WAYS_TO_WRITE[way](weight)
        return task.loss(inputs, labels)

    before = snapshot(task.model, optimizer)
    with pytest.raises(RuntimeError, match=rf"writes parameter {number}\b.* optimizer\.step\(lambda"):
        compiled(optimizer, loss_fn, backend)(*task.batches[0])
    assert_same(before, snapshot(task.model, optimizer))
    compiled(optimizer, task.loss, backend)(*task.batches[0])
    assert optimizer.steps == 1


def test_a_hook_of_a_parameter_is_an_error_while_it_is_there() -> None:
    task = mlp()
    optimizer = GAM(task.model.parameters(), **SETTINGS)
    step = compiled(optimizer, task.loss)
    step(*task.batches[0])
    handle = task.model[0].bias.register_hook(lambda grad: 2 * grad)
    before = snapshot(task.model, optimizer)
    with pytest.raises(RuntimeError, match=r"parameter 1 has a hook .* optimizer\.step\(lambda"):
        step(*task.batches[0])
    assert_same(before, snapshot(task.model, optimizer))
    handle.remove()
    step(*task.batches[0])
    assert optimizer.steps == 2


@pytest.mark.filterwarnings("ignore:.*not a leaf Tensor is being accessed:UserWarning")  # by Dynamo
def test_what_has_been_computed_outside_of_the_graph_is_an_error() -> None:
    """Its gradient would be lost."""
    task = mlp()
    optimizer = GAM(task.model.parameters(), **SETTINGS)
    inputs, labels = task.batches[0]
    step = compiled(optimizer, lambda hidden, labels: F.cross_entropy(task.model[1:](hidden), labels))
    hidden = task.model[0](inputs)
    with pytest.raises(RuntimeError, match=r"shape \(8, 10\) .* outside of it.*detach\(\)"):
        step(hidden, labels)
    step(hidden.detach(), labels)
    step(hidden.detach().requires_grad_(), labels)
    assert optimizer.steps == 2


def test_a_step_within_another_is_an_error_and_the_other_goes_on() -> None:
    task = mlp()
    optimizer = GAM(task.model.parameters(), **SETTINGS)
    step = compiled(optimizer, task.loss)
    with pytest.raises(RuntimeError, match="within a closure of the same optimizer"):
        optimizer.step(lambda: step(*task.batches[0]))
    with pytest.raises(RuntimeError, match="within a closure of the same optimizer"):
        compiled(optimizer, lambda *batch: step(*batch).sum())(*task.batches[0])
    assert optimizer.steps == 0
    optimizer.first_step(task.loss(*task.batches[0]))
    with pytest.raises(RuntimeError, match=r"between first_step\(\) and second_step\(\)"):
        step(*task.batches[0])
    optimizer.second_step(task.loss(*task.batches[0]))
    step(*task.batches[0])
    assert optimizer.steps == 2


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_are_refused_and_the_optimizers_are_not(duplicate: Callable[[Any], Any]) -> None:
    """A copy would have parameters of its own, and the loss those of the original."""
    task = mlp()
    optimizer = GAM(task.model.parameters(), **SETTINGS)
    step = compiled(optimizer, task.loss)
    step(*task.batches[0])
    with pytest.raises(TypeError, match=r"cannot be copied or pickled.*optimizer\.compile\(loss_fn\)"):
        duplicate(step)
    duplicate(optimizer)


def test_recurrent_networks_are_named() -> None:
    task = Task(Recurrent(), torch.randn(21, 4, 6))
    step = compiled(GAM(task.model.parameters(), **SETTINGS), task.loss)
    with pytest.raises(RuntimeError, match="LSTM"):
        step(*task.batches[0])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 3, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.lstm(inputs)[0].mean(1)


def test_a_compiler_that_is_switched_off_is_an_error() -> None:
    task = mlp(nn.BatchNorm1d(10), nn.Dropout(0.3))
    optimizer = GAM(task.model.parameters(), **SETTINGS)
    before = snapshot(task.model, optimizer)
    step = compiled(optimizer, task.loss)
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match="switched off"):
        step(*task.batches[0])
    assert_same(before, snapshot(task.model, optimizer))


def test_errors_that_dynamo_is_told_to_swallow_are_errors() -> None:
    task = mlp()
    step = compiled(GAM(task.model.parameters(), **SETTINGS), loss_through(printing)(task))
    with torch._dynamo.config.patch(suppress_errors=True), pytest.raises(RuntimeError, match="print"):
        step(*task.batches[0])


def test_parameters_inside_of_the_graph_are_an_error() -> None:
    """As PyTorch 2.10 captures them where it is told to."""
    graph = torch.fx.Graph()
    graph.output((graph.call_function(loss_marker(), (graph.get_attr("weight"),)),))
    captured = torch.fx.GraphModule(nn.ParameterDict({"weight": torch.ones(())}), graph)
    backend = JointBackend(lambda graph, inputs: graph.forward, lambda: None, twice=True, reroutes=True)
    with pytest.raises(RuntimeError, match="inline_inbuilt_nn_modules"):
        backend(captured, [])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of what Inductor imports
def test_a_compiler_that_is_not_there_is_named() -> None:
    task = mlp()
    options = {"cpp.cxx": ("no-such-compiler",), "compile_threads": 1}
    step = compiled(GAM(task.model.parameters(), **SETTINGS), task.loss, "inductor", options=options)
    with pytest.raises(RuntimeError, match=r"no-such-compiler|C\+\+ compiler"):
        step(*task.batches[0])


def test_hvp_auto_turns_to_finite_differences_in_a_graph() -> None:
    task = mlp()
    optimizer = GAM(task.model.parameters(), hvp="auto", **SETTINGS)
    step = compiled(optimizer, loss_through(lambda x: x + torch.cdist(x, x).sum())(task))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # which wraps step()
    with pytest.warns(UserWarning, match="cdist has no second derivative") as caught:
        step(*task.batches[0])
    assert caught[0].filename == __file__
    step(*task.batches[1])
    assert optimizer.hvp_in_use == "finite_difference"
    assert optimizer.steps == 2


@pytest.mark.parametrize(
    ("loss_fn", "options", "error", "message"),
    [
        (None, {}, TypeError, "loss_fn must be a function of a mini-batch that returns its loss, got None"),
        (abs, {"backend": "inducter"}, ValueError, "backend must be one of .* got 'inducter'"),
        (abs, {"backend": "eager", "mode": "default"}, ValueError, "mode and options are those of backend='inductor'"),
        (abs, {"backend": "eager", "options": {}}, ValueError, "mode and options are those of backend='inductor'"),
        (abs, {"mode": "fastest"}, ValueError, "mode must be one of .* got 'fastest'"),
        (abs, {"mode": "reduce-overhead"}, ValueError, "mode='reduce-overhead' .* captures CUDA graphs"),
        (abs, {"options": {"triton.cudagraphs": True}}, ValueError, "captures CUDA graphs"),
    ],
)
def test_arguments_are_checked_before_anything_is_compiled(
    loss_fn: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    optimizer = GAM(mlp().model.parameters(), **SETTINGS)
    with pytest.raises(error, match=message):
        optimizer.compile(loss_fn, **options)


def test_a_part_of_the_batch_is_for_closures_only() -> None:
    optimizer = GAM(mlp().model.parameters(), batch_fraction=0.5, **SETTINGS)
    with pytest.raises(ValueError, match=r"batch_fraction=1, got 0\.5; use step\(closure\)"):
        optimizer.compile(abs)
