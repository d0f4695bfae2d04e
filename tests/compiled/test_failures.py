"""Where there is no graph, one clear error: what is in the way, and how to do without. Never a step without a graph."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gam_fused import GAM
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
    backend = JointBackend(lambda graph, inputs: graph.forward, lambda: None, twice=True)
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
    with pytest.warns(UserWarning, match="cdist has no second derivative"):
        step(*task.batches[0])
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
