"""GAM steps on these layers as on PyTorch's, whatever the closure does."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from gam_fused import GAM
from tests.literal import assert_equal_to_rounding
from tests.second_order.layers_common import draw, every_size_worthwhile, is_ours
from tests.states import assert_same, snapshot

HYPERPARAMETERS: dict[str, Any] = {"lr": 0.1, "rho": 0.1, "alpha": 0.4}
Loss = Callable[[Callable[..., Tensor]], Tensor]


@pytest.fixture(autouse=True, scope="module")
def _every_size() -> Iterator[None]:
    with every_size_worthwhile():
        yield


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.SiLU(),
        nn.Conv2d(4, 4, 3, stride=2, groups=2),
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.ConvTranspose2d(4, 2, 2),
        nn.Flatten(),
        nn.Linear(18, 5),
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(75, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU("tanh"), nn.Linear(8, 5))


class Transformer(nn.Module):
    """A causal encoder layer over the rows of an image, with dropout in attention and elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, 0.2, "gelu", batch_first=True)
        self.first, self.last = nn.Linear(15, 6), nn.Linear(6, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=inputs.dtype)
        hidden = self.layer(self.first(inputs.transpose(1, 2).flatten(2)), src_mask=mask, is_causal=True)
        return self.last(hidden.mean(1))


MODELS: dict[str, Callable[[], nn.Module]] = {"convolutions": conv_net, "mlp": mlp, "transformer": Transformer}
over_models = pytest.mark.parametrize("name", MODELS)


class Task:
    """A model, one mini-batch, and an optimizer."""

    def __init__(self, name: str, **options: Any) -> None:
        torch.manual_seed(4)
        self.model = MODELS[name]().double()
        self.inputs, self.labels = draw(6, 3, 5, 5).detach(), torch.arange(6) % 5
        options = {"second_order": "auto", **options}
        self.optimizer = GAM(self.model.parameters(), momentum=0.9, model=self.model, **HYPERPARAMETERS, **options)

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.inputs), self.labels)

    def after(self, closure: Callable[[], Tensor] | None = None, steps: int = 3) -> list[Tensor]:
        """Parameters, floating buffers and momentum after some steps."""
        torch.manual_seed(6)
        for _ in range(steps):
            self.optimizer.step(closure or self.loss)
        assert int(self.optimizer.metrics["skipped_steps"]) == 0
        buffers = [buffer.double() for buffer in self.model.buffers()]
        momenta = [state["momentum_buffer"] for state in self.optimizer.state.values()]
        return [*self.model.parameters(), *buffers, *momenta]


@over_models
@pytest.mark.parametrize("kind", ["returned", "backward"])
def test_steps_are_those_on_pytorchs_layers(name: str, kind: str) -> None:
    results = []
    for second_order in ("auto", "off"):
        task = Task(name, second_order=second_order)

        def calls_backward(task: Task = task) -> Tensor:
            task.optimizer.zero_grad()
            loss = task.loss()
            loss.backward()
            return loss

        results.append(task.after(calls_backward if kind == "backward" else None))
    assert_equal_to_rounding(*results)


@over_models
def test_steps_with_checkpoints_are_those_without(name: str) -> None:
    plain, saving = Task(name), Task(name)
    saving.model.forward = functools.partial(checkpoint, saving.model.forward, use_reentrant=False)  # type: ignore[assignment]
    # A checkpoint runs batch normalization once more, in PyTorch too: no running statistics are compared.
    for task in (plain, saving):
        for module in task.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats, module.running_mean, module.running_var = False, None, None
                module.num_batches_tracked = None
    assert_equal_to_rounding(saving.after(), plain.after())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [True, True]),
        ({"second_order": "auto"}, [True, True]),
        ({"second_order": "off"}, [False, False]),
        ({"hvp": "finite_difference"}, [False] * 4),
        ({"interval": 2}, [True, True, False]),
    ],
    ids=str,
)
def test_closures_run_on_these_layers_where_they_are_differentiated_twice(
    options: dict[str, Any], expected: list[bool]
) -> None:
    task, seen = Task("convolutions", **options), []

    def closure() -> Tensor:
        seen.append(is_ours(task.model[0](task.inputs)))  # type: ignore[index, operator]
        return task.loss()

    task.after(closure, steps=2 if "interval" in options else 1)
    assert seen == expected
    assert torch._C._len_torch_function_stack() == 0


def test_an_optimizer_that_is_wrapped_takes_the_choice() -> None:
    param = draw(3)
    for choice in ("off", "auto"):
        assert GAM.wrap(torch.optim.SGD([param], lr=0.1), second_order=choice).second_order == choice
    assert GAM.wrap(torch.optim.SGD([param], lr=0.1)).second_order == GAM([param], lr=0.1).second_order == "auto"


def test_an_unknown_choice_names_the_choices() -> None:
    with pytest.raises(ValueError, match="second_order must be one of 'auto', 'off', got 'on'"):
        GAM([draw(3)], lr=0.1, second_order="on")
    with pytest.raises(ValueError, match="second_order must be one of 'auto', 'off', got True"):
        GAM.wrap(torch.optim.SGD([draw(3)], lr=0.1), second_order=True)  # type: ignore[arg-type]


class PlainLayerNorm(nn.Module):
    """Over the parameters of another one, in plain operators."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, input: Tensor) -> Tensor:
        deviation = input - input.mean(-1, keepdim=True)
        variance = deviation.square().mean(-1, keepdim=True)
        return deviation * (variance + self.eps).rsqrt() * self.weight + self.bias


def test_a_gradient_penalty_inside_the_loss_takes_the_right_step() -> None:
    """The step then needs third derivatives.

    PyTorch's of its layer norm are not right: they leave out how mean and variance depend on the input.
    """
    results = []
    for second_order in ("auto", "off"):
        task = Task("transformer", second_order=second_order)
        if second_order == "off":
            layer = task.model.layer
            layer.norm1, layer.norm2 = PlainLayerNorm(layer.norm1), PlainLayerNorm(layer.norm2)

        def closure(task: Task = task) -> Tensor:
            inputs = task.inputs.clone().requires_grad_()
            loss = F.cross_entropy(task.model(inputs), task.labels)
            (slope,) = torch.autograd.grad(loss, inputs, create_graph=True)
            return loss + 2 * slope.square().sum()

        results.append(task.after(closure, steps=1))
    assert_equal_to_rounding(*results)


def test_a_closure_that_insists_on_a_kernel_without_second_derivative_is_given_one() -> None:
    results = []
    for backend, second_order in ((SDPBackend.FLASH_ATTENTION, "auto"), (SDPBackend.MATH, "off")):
        torch.manual_seed(1)
        params = [draw(1, 2, 4, 3) for _ in range(3)]

        def closure(params: list[Tensor] = params, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*params).square().sum()  # type: ignore[arg-type]

        GAM(params, **HYPERPARAMETERS, second_order=second_order).step(closure)
        results.append(params)
    assert_equal_to_rounding(*results)


class Recording(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("where", ["around the step", "inside the closure"])
def test_a_mode_of_the_users_is_handed_pytorchs_functions(where: str) -> None:
    expected = Task("convolutions", second_order="off").after(steps=1)
    task, mode = Task("convolutions"), Recording()

    def closure() -> Tensor:
        with mode:
            return task.loss()

    if where == "around the step":
        with mode:
            actual = task.after(steps=1)
    else:
        actual = task.after(closure, steps=1)
    assert_equal_to_rounding(actual, expected)
    assert {F.conv2d, F.batch_norm, F.gelu, F.cross_entropy} <= set(mode.seen)


@pytest.mark.parametrize("failing_pass", [1, 2])
def test_a_closure_that_raises_leaves_nothing_behind(failing_pass: int) -> None:
    task, passes = Task("transformer"), []
    task.after(steps=1)
    before = snapshot(task.model, task.optimizer)

    def closure() -> Tensor:
        loss = task.loss()
        passes.append(1)
        if len(passes) == failing_pass:
            raise ZeroDivisionError
        return loss

    with pytest.raises(ZeroDivisionError):
        task.optimizer.step(closure)
    assert_same(before, snapshot(task.model, task.optimizer))
    assert torch._C._len_torch_function_stack() == 0
    assert not is_ours(F.conv2d(draw(1, 1, 3, 3), draw(1, 1, 2, 2)))


def test_float32_steps_are_those_on_pytorchs_layers() -> None:
    inputs, labels, results = torch.randn(16, 3, 5, 5), torch.arange(16) % 5, []
    for second_order in ("auto", "off"):
        torch.manual_seed(2)
        model = conv_net()
        optimizer = GAM(model.parameters(), **HYPERPARAMETERS, model=model, second_order=second_order)
        optimizer.step(lambda model=model: F.cross_entropy(model(inputs), labels))
        results.append([param.detach() for param in model.parameters()])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_autocast_inside_the_closure_takes_the_step_on_pytorchs_layers() -> None:
    inputs, labels, results = torch.randn(16, 3, 5, 5), torch.arange(16) % 5, []
    for second_order in ("auto", "off"):
        torch.manual_seed(2)
        model = conv_net()
        optimizer = GAM(model.parameters(), **HYPERPARAMETERS, model=model, second_order=second_order)

        def closure(model: nn.Module = model) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return F.cross_entropy(model(inputs), labels)

        optimizer.step(closure)
        assert int(optimizer.metrics["skipped_steps"]) == 0
        results.append([param.detach() for param in model.parameters()])
    torch.testing.assert_close(*results, rtol=0, atol=2e-2)
