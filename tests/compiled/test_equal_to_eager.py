"""A compiled step is the step without a graph, up to rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from gam_fused import GAM
from tests import literal
from tests.compiled.common import (
    SETTINGS,
    Task,
    assert_same_course,
    compiled,
    convolutions,
    mlp,
    plain,
    transformer,
)

MODELS: dict[str, Callable[[], Task]] = {"mlp": mlp, "convolutions": convolutions, "transformer": transformer}


def on_batches_of_many_sizes(task: Task, optimizer: GAM, step: Callable[..., Tensor]) -> Iterable[Tensor]:
    inputs, labels = task.batches[0]
    for size in (8, 5, 7, 8):
        yield step(inputs[:size], labels[:size])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("model", MODELS)
def test_steps_on_batches_of_many_sizes_by_two_graphs(model: str, backend: str) -> None:
    step = assert_same_course(MODELS[model](), backend, on_batches_of_many_sizes)
    assert step.graphs == 2
    assert step.recompilations == ["tensor 'args[0]' size mismatch at index 0. expected 8, actual 5"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of what Inductor imports
def test_steps_compiled_by_inductor() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(4 * 36, 3),
    )
    # It draws other random numbers than PyTorch unless it is told not to.
    options = {"options": {"fallback_random": True, "compile_threads": 1}}
    assert_same_course(Task(model, torch.randn(16, 2, 8, 8)), "inductor", options=options)


def test_one_step_of_the_literal_formulas() -> None:
    task = mlp(nn.LayerNorm(10))
    inputs, labels = task.batches[0]
    start = literal.copies(task.model.parameters())
    loss = literal.as_function(task.model, lambda model: F.cross_entropy(model(inputs), labels))
    expected = literal.step(loss, start, rho=0.3, alpha=0.7, lr=0.1)
    compiled(GAM(task.model.parameters(), lr=0.1, rho=0.3, alpha=0.7), task.loss, "aot_eager")(inputs, labels)
    literal.assert_equal_to_rounding(task.model.parameters(), expected)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = checkpoint(lambda x: F.dropout(torch.tanh(self.first(x)), 0.3), inputs, use_reentrant=False)
        return self.last(hidden)


class Tied(nn.Module):
    """One matrix under two names, a frozen layer, one that is not used, a parameter that only a constant depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(6, 6), nn.Linear(6, 6)
        self.again.weight = self.first.weight
        self.frozen = nn.Linear(6, 3).requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.stopped = nn.Parameter(torch.randn(3))
        self.empty = nn.Parameter(torch.empty(0))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.again(torch.tanh(self.first(inputs)))
        return self.frozen(hidden) + self.stopped.detach() + self.empty.sum()


class Padded(nn.Module):
    """Embeddings with a row for padding, the one at the end, and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.padded, self.plain = nn.Embedding(5, 6, padding_idx=-1), nn.Embedding(5, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.padded(tokens) * self.plain(tokens) + self.padded(tokens)).sum(1))


UNUSUAL: dict[str, Callable[[], Task]] = {
    "tied, frozen and unused parameters": lambda: Task(Tied(), torch.randn(21, 6)),
    "checkpointed": lambda: Task(Checkpointed(), torch.randn(21, 6)),
    "padded embeddings": lambda: Task(Padded(), torch.randint(5, (21, 4))),
    # PyTorch's second derivative is wrong, and PyTorch 2.13 compiles just that.
    "weight normalization": lambda: mlp(parametrizations.weight_norm(nn.Linear(10, 10)), nn.Tanh()),
    "spectral normalization": lambda: mlp(parametrizations.spectral_norm(nn.Linear(10, 10)), nn.Tanh()),
    "evaluation mode": lambda: mlp(nn.BatchNorm1d(10).eval(), nn.Dropout(0.3).eval()),
}


def two_batches(task: Task, optimizer: GAM, step: Callable[..., Tensor]) -> Iterable[Tensor]:
    return [step(*batch) for batch in task.batches[:2]]


@pytest.mark.parametrize("kind", UNUSUAL)
def test_steps_of_unusual_models(kind: str) -> None:
    # Without a graph, not every buffer is found unless the optimizer knows the model.
    assert_same_course(UNUSUAL[kind](), "aot_eager", course=two_batches, build=BUILDS["with model"])


def test_a_model_that_is_under_torch_compile_already() -> None:
    task = mlp()
    twin = copy.deepcopy(task)
    model = torch.compile(task.model, backend="eager")
    step = compiled(GAM(task.model.parameters(), **SETTINGS), lambda x, y: F.cross_entropy(model(x), y))
    expected = plain(GAM(twin.model.parameters(), **SETTINGS), twin.loss)
    for batch in task.batches:
        assert torch.equal(step(*batch), expected(*batch))
    literal.assert_equal_bits(task.model.parameters(), twin.model.parameters())


def gradient_between(task: Task, optimizer: GAM, step: Callable[..., Tensor]) -> Iterable[Tensor]:
    return [step(*batch) for batch in 2 * task.batches[:2]]


BUILDS: dict[str, Callable[[Task], GAM]] = {
    "interval": lambda task: GAM(task.model.parameters(), interval=2, **SETTINGS),
    "finite differences": lambda task: GAM(task.model.parameters(), hvp="finite_difference", **SETTINGS),
    "ascent by differences": lambda task: GAM(task.model.parameters(), ascent="finite_difference", **SETTINGS),
    "ascent kept": lambda task: GAM(task.model.parameters(), ascent="reuse", ascent_interval=2, **SETTINGS),
    "AdamW": lambda task: GAM(task.model.parameters(), torch.optim.AdamW, lr=0.01, rho=0.3, alpha=0.7),
    "with model": lambda task: GAM(task.model.parameters(), model=task.model, **SETTINGS),
    "reference": lambda task: GAM(task.model.parameters(), backend="reference", **SETTINGS),
    "groups": lambda task: GAM(
        [
            {"params": list(task.model[0].parameters()), "lr": 0.02, "rho": 0.1, "alpha": 2.0},
            {"params": list(task.model[-1].parameters())},
        ],
        **SETTINGS,
    ),
}


@pytest.mark.parametrize("kind", BUILDS)
def test_steps_of_every_kind_of_optimizer(kind: str) -> None:
    assert_same_course(mlp(nn.BatchNorm1d(10), nn.Dropout(0.3)), course=gradient_between, build=BUILDS[kind])


def freeze_and_thaw(task: Task, optimizer: GAM, step: Callable[..., Tensor]) -> Iterable[Tensor]:
    for frozen in (False, True, False):
        task.model[0].requires_grad_(not frozen)
        yield step(*task.batches[0])


def grow(task: Task, optimizer: GAM, step: Callable[..., Tensor]) -> Iterable[Tensor]:
    yield step(*task.batches[0])
    optimizer.add_param_group({"params": list(task.model[0].parameters()), "lr": 0.5})
    yield step(*task.batches[0])


def replace(task: Task, optimizer: GAM, step: Callable[..., Tensor]) -> Iterable[Tensor]:
    yield step(*task.batches[0])
    task.model[0].weight = nn.Parameter(task.model[0].weight.detach() / 2)  # which the optimizer does not know
    yield step(*task.batches[0])


def mix(task: Task, optimizer: GAM, step: Callable[..., Tensor]) -> Iterable[Tensor]:
    yield step(*task.batches[0])
    yield optimizer.step(lambda: task.loss(*task.batches[1]))
    yield step(*task.batches[0])


def without_the_first_layer(task: Task) -> GAM:
    return GAM(task.model[1:].parameters(), **SETTINGS)


def test_a_layer_may_be_frozen_and_thawed() -> None:
    assert_same_course(mlp(nn.Linear(10, 10)), course=freeze_and_thaw)


def test_a_param_group_may_be_added_for_what_the_graph_has_seen() -> None:
    step = assert_same_course(mlp(), course=grow, build=without_the_first_layer)
    assert step.recompilations == ["other tensors have become the optimizer's parameters"]


def test_a_parameter_may_be_replaced_by_one_that_the_optimizer_does_not_have() -> None:
    assert_same_course(mlp(), course=replace)


def test_compiled_steps_mix_with_others() -> None:
    assert_same_course(mlp(nn.BatchNorm1d(10), nn.Dropout(0.3)), course=mix)


def under_autocast(task: Task, optimizer: GAM, step: Callable[..., Tensor]) -> Iterable[Tensor]:
    for batch in task.batches[:2]:
        with torch.autocast("cpu", torch.bfloat16, enabled=not task.autocast):
            yield step(*batch)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("inside", [False, True], ids=["around the step", "inside of the loss"])
def test_autocast(inside: bool, backend: str) -> None:
    task = mlp(nn.Linear(10, 10))
    task.model.float()
    task.batches = [(inputs.float(), labels) for inputs, labels in task.batches]
    task.autocast = inside
    assert_same_course(task, backend, under_autocast, tolerance=0)
