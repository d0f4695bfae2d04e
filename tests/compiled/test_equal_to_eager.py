"""A compiled step is the step without a graph, up to rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from gam_fused import GAM, AcceleratedGAM
from gam_fused.second_order import in_graphs
from tests import literal
from tests.compiled.common import (
    SETTINGS,
    AnyGAM,
    Attention,
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
    # PyTorch would take its fused kernel, which has no second derivative.
    "attention without dropout": lambda: Task(Attention(dropout=0.0), torch.randint(11, (21, 4))),
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


def four_batches(task: Task, optimizer: GAM, step: Callable[..., Tensor]) -> Iterable[Tensor]:
    return [step(*batch) for batch in 2 * task.batches[:2]]


def accelerated(task: Task, **options: Any) -> AcceleratedGAM:
    return AcceleratedGAM(task.model.parameters(), lr=0.1, momentum=0.9, rho=0.3, gamma=0.5, **options)


BUILDS: dict[str, Callable[[Task], AnyGAM]] = {
    "interval": lambda task: GAM(task.model.parameters(), interval=2, **SETTINGS),
    "finite differences": lambda task: GAM(task.model.parameters(), hvp="finite_difference", **SETTINGS),
    "ascent by differences": lambda task: GAM(task.model.parameters(), ascent="finite_difference", **SETTINGS),
    "ascent kept": lambda task: GAM(task.model.parameters(), ascent="reuse", ascent_interval=2, **SETTINGS),
    "AdamW": lambda task: GAM(task.model.parameters(), torch.optim.AdamW, lr=0.01, rho=0.3, alpha=0.7),
    "with model": lambda task: GAM(task.model.parameters(), model=task.model, **SETTINGS),
    "reference": lambda task: GAM(task.model.parameters(), backend="reference", **SETTINGS),
    "PyTorch's layers": lambda task: GAM(task.model.parameters(), second_order="off", **SETTINGS),
    "accelerated": accelerated,
    "accelerated with interval": lambda task: accelerated(task, interval=2, form="released_code"),
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
    assert_same_course(mlp(nn.BatchNorm1d(10), nn.Dropout(0.3)), course=four_batches, build=BUILDS[kind])


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
    optimizer.first_step(task.loss(*task.batches[1]))
    yield optimizer.second_step(task.loss(*task.batches[1]))
    yield step(*task.batches[0])


def evaluate_between(task: Task, optimizer: GAM, step: Callable[..., Tensor]) -> Iterable[Tensor]:
    for training in (True, False, True):
        task.model.train(training)
        yield step(*task.batches[0])


def resume(task: Task, optimizer: GAM, step: Callable[..., Tensor]) -> Iterable[Tensor]:
    yield step(*task.batches[0])
    saved = copy.deepcopy((task.model.state_dict(), optimizer.state_dict()))
    yield step(*task.batches[1])
    task.model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    yield step(*task.batches[0])


def hook(task: Task, optimizer: GAM, step: Callable[..., Tensor]) -> Iterable[Tensor]:
    yield step(*task.batches[0])
    handle = task.model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    yield step(*task.batches[0])
    handle.remove()
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


# Optimizers that are told of the model advance its buffers in halves of steps, too.
COURSES = {
    "evaluation between": evaluate_between,
    "a checkpoint loaded": resume,
    "a hook of a module": hook,
    "mixed": mix,
}


@pytest.mark.parametrize("course", COURSES)
def test_courses_of(course: str) -> None:
    task = mlp(nn.BatchNorm1d(10), nn.Dropout(0.3))
    assert_same_course(task, course=COURSES[course], build=BUILDS["with model"])


class Structured(Task):
    """Takes a dictionary and numbers."""

    def loss(self, batch: dict[str, Tensor], *, weight: float, count: int) -> Tensor:  # type: ignore[override]
        logits = self.model(batch["inputs"])
        losses = F.cross_entropy(logits, batch["labels"], reduction="none")
        return weight * losses.where(batch["mask"], 0).sum() / count


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_batches_of_any_structure_and_numbers_without_a_graph_for_each(backend: str) -> None:
    def course(task: Task, optimizer: GAM, step: Callable[..., Tensor]) -> Iterable[Tensor]:
        inputs, labels = task.batches[0]
        batch = {"inputs": inputs, "labels": labels, "mask": torch.arange(8) < 5}
        for weight, count in ((0.5, 2), (0.1, 3), (0.7, 5), (0.2, 7)):
            yield step(batch, weight=weight, count=count)

    step = assert_same_course(Structured(mlp().model, torch.randn(21, 6)), backend, course)
    assert step.graphs == 2
    assert step.recompilations == ["kwargs['weight'] == 0.5"]


@pytest.mark.parametrize("kind", BUILDS)
def test_micro_batches_are_terms_of_one_loss(kind: str) -> None:
    task = mlp()
    twin = copy.deepcopy(task)
    optimizer, expected = BUILDS[kind](task), BUILDS[kind](twin)
    step = compiled(optimizer, lambda batches: sum(task.loss(*batch) for batch in batches))

    def closure() -> Tensor:
        losses = [twin.loss(*batch) for batch in twin.batches]
        for loss in losses:
            loss.backward()
        return torch.stack(losses).sum()

    for _ in range(2):
        torch.testing.assert_close(step(task.batches), expected.step(closure), rtol=1e-12, atol=1e-12)
    literal.assert_equal_to_rounding(task.model.parameters(), [param.detach() for param in twin.model.parameters()])


def test_several_compiled_steps_of_one_loss_and_of_one_optimizer() -> None:
    """Two optimizers that share a loss, one of them with a second loss."""
    task = mlp()
    twin = copy.deepcopy(task)

    def penalty_of(task: Task) -> Callable[..., Tensor]:
        return lambda inputs, labels: task.model(inputs).square().mean()

    def steps(task: Task, take: Callable[..., Callable[..., Tensor]]) -> list[Callable[..., Tensor]]:
        first = GAM(task.model[0].parameters(), **SETTINGS)
        last = GAM(task.model[-1].parameters(), **SETTINGS)
        loss = task.loss
        return [take(first, loss), take(last, loss), take(first, penalty_of(task))]

    pairs = zip(steps(task, compiled), steps(twin, plain), strict=True)
    for ours, theirs in [*pairs] * 2:
        for batch in task.batches:
            torch.testing.assert_close(ours(*batch), theirs(*batch), rtol=1e-12, atol=1e-12)
    literal.assert_equal_to_rounding(task.model.parameters(), [param.detach() for param in twin.model.parameters()])


@pytest.mark.parametrize("second_order", ["auto", "off"])
def test_layers_stand_in_graphs_where_the_optimizer_has_them(
    second_order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    layer = in_graphs._REPLACEMENTS[F.conv2d]
    monkeypatch.setitem(in_graphs._REPLACEMENTS, F.conv2d, lambda *args: [called.append(0), layer(*args)][1])
    assert_same_course(
        convolutions(),
        "aot_eager",
        lambda task, optimizer, step: [step(*task.batches[0])],
        build=lambda task: GAM(task.model.parameters(), second_order=second_order, **SETTINGS),
    )
    assert bool(called) is (second_order == "auto")


def test_what_is_wrong_in_pytorch_is_right_in_graphs_of_its_layers() -> None:
    task = mlp(parametrizations.weight_norm(nn.Linear(10, 10)), nn.Tanh())
    assert_same_course(task, "aot_eager", two_batches, build=BUILDS["PyTorch's layers"])


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
