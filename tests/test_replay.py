"""Every pass of a step draws the same random numbers and starts from the same buffers; both advance once per step."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedBuffer

from gam_fused import GAM
from tests import literal
from tests.literal import assert_equal_bits, assert_equal_to_rounding
from tests.states import assert_same

RHO, ALPHA, LR = 0.1, 0.4, 0.1

MODES: dict[str, dict[str, Any]] = {
    "exact": {"hvp": "exact"},
    "finite_difference": {"hvp": "finite_difference"},
    "between_flatness_steps": {"interval": 2},
}
PASSES = {"exact": [2, 2, 2], "finite_difference": [4, 4, 4], "between_flatness_steps": [2, 1, 2]}
over_modes = pytest.mark.parametrize("mode", MODES)
over_model = pytest.mark.parametrize("with_model", [True, False], ids=["with_model", "without_model"])


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Planted(Exception):
    """A fault that a test has planted."""


# ---------------------------------------------------------------------- random numbers

GENERATOR = torch.Generator()
OTHER_GENERATOR = torch.Generator()
ONES = torch.ones(2, 3, 16)

DRAWS: dict[str, Callable[[], Any]] = {
    "nn.Dropout": lambda: nn.Dropout(0.5)(ONES),
    "F.dropout": lambda: F.dropout(ONES, 0.3),
    "F.alpha_dropout": lambda: F.alpha_dropout(ONES, 0.3, training=True),
    "F.feature_alpha_dropout": lambda: F.feature_alpha_dropout(ONES, 0.3, training=True),
    "nn.Dropout1d": lambda: nn.Dropout1d(0.5)(ONES),
    "F.rrelu": lambda: F.rrelu(-ONES, training=True),
    "F.gumbel_softmax": lambda: F.gumbel_softmax(ONES),
    "torch.bernoulli": lambda: torch.bernoulli(ONES / 2),
    "torch.rand": lambda: torch.rand(5),
    "torch.randn_like": lambda: torch.randn_like(ONES),
    "torch.randperm": lambda: torch.randperm(50),
    "torch.multinomial": lambda: torch.multinomial(torch.ones(50), 5),
    "Tensor.uniform_": lambda: torch.empty(5).uniform_(),
    "torch.rand(generator)": lambda: torch.rand(5, generator=GENERATOR),
    "torch.bernoulli(generator)": lambda: torch.bernoulli(ONES / 2, generator=GENERATOR),
    "Tensor.normal_(generator)": lambda: torch.empty(5).normal_(generator=GENERATOR),
    "two generators": lambda: (torch.rand(5, generator=GENERATOR), torch.rand(5, generator=OTHER_GENERATOR)),
    "nn.init": lambda: nn.init.normal_(torch.empty(5), generator=GENERATOR),
    "random": lambda: torch.tensor([random.random() for _ in range(5)]),
    "random.gauss": lambda: torch.tensor(random.gauss(0.0, 1.0)),  # keeps a second number for the next call
    "random.shuffle": lambda: torch.tensor(random.sample(range(100), 100)),
    "numpy.random.rand": lambda: torch.from_numpy(numpy.random.rand(5)),
    "numpy.random.randn": lambda: torch.from_numpy(numpy.random.randn(5)),  # keeps a second number, too
    "torch.manual_seed": lambda: (torch.manual_seed(random.randrange(10**6)), torch.rand(5))[1],
}


def seed_everything() -> None:
    torch.manual_seed(11)
    random.seed(11)
    numpy.random.seed(11)
    GENERATOR.manual_seed(12)
    OTHER_GENERATOR.manual_seed(13)


def random_states() -> list[Any]:
    return [
        torch.get_rng_state(),
        random.getstate(),
        numpy.random.get_state(),
        GENERATOR.get_state(),
        OTHER_GENERATOR.get_state(),
    ]


class Drawing:
    """A closure that notes what it drew."""

    def __init__(self, source: str, failing_pass: int | None = None) -> None:
        self.param = nn.Parameter(torch.ones(3))
        self.source = source
        self.failing_pass = failing_pass
        self.drawn: list[Any] = []

    def closure(self) -> Tensor:
        first, second = DRAWS[self.source](), DRAWS[self.source]()
        self.drawn.append((first, second))
        if len(self.drawn) == self.failing_pass:
            raise Planted
        return (self.param**3).sum()


@pytest.mark.parametrize("source", DRAWS)
@over_modes
def test_every_pass_draws_the_same_and_a_step_advances_as_one_forward_pass(mode: str, source: str) -> None:
    seed_everything()
    ordinary = Drawing(source)
    for _ in range(3):
        ordinary.closure()
    expected = random_states()

    seed_everything()
    drawing = Drawing(source)
    optimizer = GAM([drawing.param], rho=RHO, lr=LR, **MODES[mode])
    steps: list[list[Any]] = []
    for _ in range(3):
        optimizer.step(drawing.closure)
        steps.append(drawing.drawn.copy())
        drawing.drawn.clear()
    assert_same(expected, random_states())
    for drawn, once in zip(steps, ordinary.drawn, strict=True):
        for passed in drawn:
            assert_same(once, passed)
    assert [len(drawn) for drawn in steps] == PASSES[mode]
    with pytest.raises(AssertionError):  # the next step draws anew
        assert_same(steps[0][0], steps[1][0])


@pytest.mark.parametrize("source", DRAWS)
@pytest.mark.parametrize("failing_pass", [1, 2])
def test_a_step_that_fails_leaves_random_states_as_before(failing_pass: int, source: str) -> None:
    seed_everything()
    drawing = Drawing(source)
    optimizer = GAM([drawing.param], rho=RHO, lr=LR)
    optimizer.step(drawing.closure)
    before = random_states()
    drawing.drawn.clear()
    drawing.failing_pass = failing_pass
    with pytest.raises(Planted):
        optimizer.step(drawing.closure)
    assert len(drawing.drawn) == failing_pass
    assert_same(before, random_states())


def test_a_generator_that_only_the_second_pass_uses_ends_where_it_began() -> None:
    """As after one ordinary forward pass, which at θ draws nothing."""
    seed_everything()
    before = random_states()
    param, passes = nn.Parameter(torch.ones(3)), []

    def closure() -> Tensor:
        passes.append(1)
        if len(passes) == 2:
            torch.rand(5, generator=GENERATOR)
            torch.rand(5)
        return (param**3).sum()

    GAM([param], lr=LR).step(closure)
    assert_same(before, random_states())


def test_dropout_masks_are_constants_of_the_step() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 2)).double()
    inputs = draw(6, 5)
    seed_everything()
    mask = F.dropout(torch.ones(6, 8, dtype=torch.float64), 0.4)

    def loss(params: list[Tensor]) -> Tensor:
        weight1, bias1, weight2, bias2 = params
        hidden = torch.tanh(inputs @ weight1.T + bias1) * mask
        return (hidden @ weight2.T + bias2).square().mean()

    expected = literal.step(loss, model.parameters(), rho=RHO, alpha=ALPHA, lr=LR)
    seed_everything()
    GAM(model.parameters(), rho=RHO, alpha=ALPHA, lr=LR).step(lambda: model(inputs).square().mean())
    assert_equal_to_rounding(model.parameters(), expected)


def test_the_two_phases_leave_random_numbers_to_the_user() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = GAM([param], lr=LR)
    seed_everything()
    expected = [torch.rand(3), torch.rand(3), torch.rand(3)]
    seed_everything()
    drawn = [torch.rand(3)]
    optimizer.first_step((param**3).sum())
    drawn.append(torch.rand(3))
    optimizer.second_step((param**3).sum())
    drawn.append(torch.rand(3))
    assert_equal_bits(drawn, expected)


# ---------------------------------------------------------------------- running statistics of the standard layers


class Network(nn.Module):
    """Two layers around ``norm``, which may run several times."""

    def __init__(self, norm: nn.Module, features: int, dims: int, times: int = 1) -> None:
        super().__init__()
        layer = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.first = layer(2, features, *([1] if dims else []))
        self.norm = norm
        self.times = times
        self.shape = (6, 2, *[3] * dims)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        for _ in range(self.times):
            hidden = self.norm(hidden).sin()
        return hidden


def frozen(norm: nn.Module) -> nn.Module:
    return norm.eval().requires_grad_(False)


LAYERS: dict[str, Callable[[], Network]] = {
    "BatchNorm1d": lambda: Network(nn.BatchNorm1d(3), 3, 0),
    "BatchNorm1d of sequences": lambda: Network(nn.BatchNorm1d(3), 3, 1),
    "BatchNorm2d": lambda: Network(nn.BatchNorm2d(3), 3, 2),
    "BatchNorm3d": lambda: Network(nn.BatchNorm3d(3), 3, 3),
    "cumulative": lambda: Network(nn.BatchNorm1d(3, momentum=None), 3, 0),
    "momentum 1": lambda: Network(nn.BatchNorm1d(3, momentum=1.0), 3, 0),
    "not affine": lambda: Network(nn.BatchNorm1d(3, affine=False), 3, 0),
    "not tracked": lambda: Network(nn.BatchNorm1d(3, track_running_stats=False), 3, 0),
    "eval": lambda: Network(nn.BatchNorm1d(3).eval(), 3, 0),
    "frozen": lambda: Network(frozen(nn.BatchNorm1d(3)), 3, 0),
    "InstanceNorm1d": lambda: Network(nn.InstanceNorm1d(3, track_running_stats=True), 3, 1),
    "InstanceNorm2d": lambda: Network(nn.InstanceNorm2d(3, affine=True, track_running_stats=True), 3, 2),
    "InstanceNorm3d": lambda: Network(nn.InstanceNorm3d(3, track_running_stats=True), 3, 3),
    "InstanceNorm1d eval": lambda: Network(nn.InstanceNorm1d(3, track_running_stats=True).eval(), 3, 1),
    "twice in one pass": lambda: Network(nn.BatchNorm1d(3), 3, 0, times=2),
    "cumulative, twice in one pass": lambda: Network(nn.BatchNorm1d(3, momentum=None), 3, 0, times=2),
    "two in a row": lambda: Network(nn.Sequential(nn.BatchNorm1d(3), nn.Tanh(), nn.BatchNorm1d(3)), 3, 0),
    "subclass": lambda: Network(DoubledBatchNorm(3), 3, 0),
    "functional": lambda: Network(FunctionalBatchNorm(3), 3, 0),
    "functional by keyword": lambda: Network(FunctionalBatchNorm(3, by_keyword=True), 3, 0),
    "torch.batch_norm": lambda: Network(TorchBatchNorm(3), 3, 0),
    "torch.instance_norm": lambda: Network(TorchInstanceNorm(3), 3, 1),
}


class DoubledBatchNorm(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class FunctionalBatchNorm(nn.Module):
    """Running statistics that no layer of PyTorch's owns."""

    def __init__(self, features: int, by_keyword: bool = False) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("variance", torch.ones(features))
        self.by_keyword = by_keyword

    def forward(self, inputs: Tensor) -> Tensor:
        if self.by_keyword:
            return F.batch_norm(inputs, running_mean=self.mean, running_var=self.variance, training=True)
        return F.batch_norm(inputs, self.mean, self.variance, None, None, True)


class TorchBatchNorm(FunctionalBatchNorm):
    def forward(self, inputs: Tensor) -> Tensor:
        return torch.batch_norm(inputs, None, None, self.mean, self.variance, True, 0.1, 1e-5, False)


class TorchInstanceNorm(FunctionalBatchNorm):
    def forward(self, inputs: Tensor) -> Tensor:
        return torch.instance_norm(inputs, None, None, self.mean, self.variance, True, 0.1, 1e-5, False)


def loss_of(model: nn.Module, inputs: Tensor) -> Tensor:
    return model(inputs).square().mean()


@pytest.mark.parametrize("layer", LAYERS)
@over_modes
@over_model
def test_running_statistics_advance_bitwise_as_by_one_ordinary_forward_pass(
    with_model: bool, mode: str, layer: str
) -> None:
    model = LAYERS[layer]().double()
    twin = copy.deepcopy(model)
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = GAM(trained, rho=RHO, alpha=ALPHA, lr=LR, model=model if with_model else None, **MODES[mode])
    for _ in range(3):
        inputs = draw(*model.shape)
        for one, other in zip(twin.parameters(), model.parameters(), strict=True):
            one.data.copy_(other)
        twin(inputs)
        optimizer.step(lambda inputs=inputs: loss_of(model, inputs))
        assert_same(dict(twin.named_buffers()), dict(model.named_buffers()))
        assert int(optimizer.metrics["skipped_steps"]) == 0


@pytest.mark.parametrize("layer", LAYERS)
@over_model
@pytest.mark.parametrize("failing_pass", [1, 2])
def test_running_statistics_are_bitwise_as_before_a_step_that_fails(
    failing_pass: int, with_model: bool, layer: str
) -> None:
    model = LAYERS[layer]().double()
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = GAM(trained, rho=RHO, alpha=ALPHA, lr=LR, model=model if with_model else None)
    inputs = draw(*model.shape)
    optimizer.step(lambda: loss_of(model, inputs))
    before, passes = copy.deepcopy(dict(model.named_buffers())), []

    def closure() -> Tensor:
        loss = loss_of(model, inputs)
        passes.append(1)
        if len(passes) == failing_pass:
            raise Planted
        return loss

    with pytest.raises(Planted):
        optimizer.step(closure)
    assert len(passes) == failing_pass
    assert_same(before, dict(model.named_buffers()))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_step_through_running_statistics_is_the_literal_one(layer: str) -> None:
    model = LAYERS[layer]().double()
    inputs = draw(*model.shape)
    trained = [name for name, param in model.named_parameters() if param.requires_grad]
    frozen_params = [param.detach().clone() for name, param in model.named_parameters() if name not in trained]
    function = literal.as_function(model, lambda net: net(inputs).square().mean())
    params = [param for param in model.parameters() if param.requires_grad]
    expected = literal.step(lambda theta: function([*theta, *frozen_params]), params, rho=RHO, alpha=ALPHA, lr=LR)
    GAM(params, rho=RHO, alpha=ALPHA, lr=LR, model=model).step(lambda: loss_of(model, inputs))
    assert_equal_to_rounding(params, expected)


@over_model
def test_running_statistics_of_micro_batches_advance_once_for_each(with_model: bool) -> None:
    model = LAYERS["cumulative"]().double()
    twin, inputs = copy.deepcopy(model), draw(3, 6, 2)

    def closure() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for piece in inputs:
            loss = loss_of(model, piece)
            loss.backward()
            total += loss.detach()
        return total

    GAM(model.parameters(), rho=RHO, lr=LR, model=model if with_model else None).step(closure)
    for piece in inputs:
        twin(piece)
    assert_same(dict(twin.named_buffers()), dict(model.named_buffers()))
    assert int(model.norm.num_batches_tracked) == 3


@over_model
def test_counters_of_the_users_own_are_not_taken_for_those_of_a_layer(with_model: bool) -> None:
    """Only what belongs to running statistics is replayed without ``model``: the closure's own state is its own."""
    model, samples_seen = LAYERS["BatchNorm1d"]().double(), torch.zeros((), dtype=torch.long)
    inputs = draw(*model.shape)

    def closure() -> Tensor:
        samples_seen.add_(1)
        loss = loss_of(model, inputs)
        samples_seen.add_(10)
        return loss

    GAM(model.parameters(), rho=RHO, lr=LR, model=model if with_model else None).step(closure)
    assert int(samples_seen) == 2 * 11
    assert int(model.norm.num_batches_tracked) == 1


@over_modes
def test_checkpointed_running_statistics_advance_once_per_step(mode: str) -> None:
    """In a plain loop they advance twice: once more when the backward pass runs the block again."""
    model = LAYERS["BatchNorm1d"]().double()
    twin, inputs = copy.deepcopy(model), draw(6, 2)
    optimizer = GAM(model.parameters(), rho=RHO, alpha=ALPHA, lr=LR, model=model, **MODES[mode])
    twin_optimizer = GAM(twin.parameters(), rho=RHO, alpha=ALPHA, lr=LR, model=twin, **MODES[mode])
    for _ in range(2):
        optimizer.step(lambda: torch.utils.checkpoint.checkpoint(model, inputs, use_reentrant=False).square().mean())
        twin_optimizer.step(lambda: loss_of(twin, inputs))
    assert_same(twin.state_dict(), model.state_dict())


# ---------------------------------------------------------------------- buffers of custom modules


class InPlaceAverage(nn.Module):
    """An average that the layer writes itself, without PyTorch's functions for it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.register_buffer("average", torch.zeros(3))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int32))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.layer(inputs)
        self.average.lerp_(hidden.detach().mean(0), 0.1)
        self.count += 1
        return hidden.tanh()


class Rebinding(InPlaceAverage):
    """The same average, in a new tensor each time."""

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.layer(inputs)
        self.average = 0.9 * self.average + 0.1 * hidden.detach().mean(0)
        self.count = self.count + 1
        return hidden.tanh()


class RebindingAndWriting(InPlaceAverage):
    """A new tensor, written once more after it was bound."""

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.layer(inputs)
        self.average = self.average.clone()
        self.average.lerp_(hidden.detach().mean(0), 0.1)
        self.count.add_(1)
        return hidden.tanh()


class Renormalizing(InPlaceAverage):
    """Batch renormalization's way: the training pass reads the running statistics that it then changes."""

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.layer(inputs)
        output = (hidden - self.average).tanh() + hidden.mean(0)
        self.average.lerp_(hidden.detach().mean(0), 0.5)
        self.count += 1
        return output


class RenormalizingAndRebinding(InPlaceAverage):
    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.layer(inputs)
        output = (hidden - self.average).tanh() + hidden.mean(0)
        self.average = self.average.lerp(hidden.detach().mean(0), 0.5)
        return output


class Quantizing(nn.Module):
    """A codebook that follows what it quantizes (VQ-VAE's moving averages), with a straight-through gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.register_buffer("codebook", torch.linspace(-1, 1, 12).view(4, 3))
        self.register_buffer("usage", torch.ones(4))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.layer(inputs)
        nearest = (hidden.detach()[:, None] - self.codebook).square().sum(-1).argmin(1)
        quantized = self.codebook[nearest]
        output = hidden + (quantized - hidden).detach() + 0.25 * (hidden - quantized) ** 2
        self.usage.mul_(0.9).index_add_(0, nearest, torch.full_like(hidden[:, 0].detach(), 0.1))
        self.codebook.index_copy_(0, nearest[:1], 0.5 * (self.codebook[nearest[:1]] + hidden.detach()[:1]))
        return output


class FirstBatch(nn.Module):
    """A buffer that is ``None`` until the first batch sets it (data-dependent initialization)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.register_buffer("shift", None)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.layer(inputs)
        if self.shift is None:
            self.shift = hidden.detach().mean(0)
        else:
            self.shift.lerp_(hidden.detach().mean(0), 0.1)
        return (hidden - self.shift).tanh()


class RegisteredLate(FirstBatch):
    """The same, and not even the name exists before the first batch."""

    def __init__(self) -> None:
        super().__init__()
        del self.shift

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.layer(inputs)
        if not hasattr(self, "shift"):
            self.register_buffer("shift", hidden.detach().mean(0))
        else:
            self.shift.lerp_(hidden.detach().mean(0), 0.1)
        return (hidden - self.shift).tanh()


class Dropping(InPlaceAverage):
    """A buffer that is gone after the first batch."""

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.layer(inputs)
        if self.average is not None:
            hidden = hidden * 2
            self.average = None
        return hidden.tanh()


class Sharing(nn.Module):
    """One tensor, and a view of it, under the names of several modules."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.third = InPlaceAverage(), InPlaceAverage(), InPlaceAverage()
        shared = torch.zeros(6)
        self.one.average = self.other.average = shared[:3]
        self.third.average = shared[2:5]
        self.register_buffer("whole", shared)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.one(inputs) + self.other(inputs) * self.third(inputs)


class Assorted(nn.Module):
    """Buffers of many dtypes and layouts, all of which the forward pass changes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3).double()
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("bytes", torch.tensor([1, 2], dtype=torch.uint8))
        self.register_buffer("phases", torch.tensor([1 + 2j]))
        self.register_buffer("narrow", torch.tensor([0.1], dtype=torch.float16))
        self.register_buffer("passing", torch.tensor([3.0]), persistent=False)
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("columns", torch.arange(12.0).view(3, 4).t())
        self.register_buffer("scalar", torch.tensor(1.0))
        self.register_buffer("nan", torch.tensor([float("nan"), -0.0]))

    def forward(self, inputs: Tensor) -> Tensor:
        self.flags.copy_(self.flags.flip(0))
        for buffer in self.buffers():
            if buffer is not self.flags:
                buffer.add_(1)
        self.nan.fill_(float("nan"))
        return self.layer(inputs).tanh()


MODULES: dict[str, Callable[[], nn.Module]] = {
    module.__name__: lambda module=module: module() if module is Assorted else module().double()
    for module in (
        InPlaceAverage,
        Rebinding,
        RebindingAndWriting,
        Renormalizing,
        RenormalizingAndRebinding,
        Quantizing,
        FirstBatch,
        RegisteredLate,
        Dropping,
        Sharing,
        Assorted,
    )
}
over_modules = pytest.mark.parametrize("module", MODULES)


@over_modules
@over_modes
def test_custom_buffers_advance_bitwise_as_by_one_ordinary_forward_pass(mode: str, module: str) -> None:
    model = nn.Sequential(MODULES[module](), nn.Tanh())
    twin = copy.deepcopy(model)
    optimizer = GAM(model.parameters(), rho=RHO, alpha=ALPHA, lr=LR, model=model, **MODES[mode])
    for _ in range(3):
        inputs = draw(6, 2)
        for one, other in zip(twin.parameters(), model.parameters(), strict=True):
            one.data.copy_(other)
        twin(inputs)
        optimizer.step(lambda inputs=inputs: loss_of(model, inputs))
        assert_same(bits(twin), bits(model))
        assert list(twin.state_dict()) == list(model.state_dict())
        assert int(optimizer.metrics["skipped_steps"]) == 0


@over_modules
@pytest.mark.parametrize("failing_pass", [1, 2])
@pytest.mark.parametrize("steps_before", [0, 1])
def test_custom_buffers_are_the_very_tensors_from_before_after_a_step_that_fails(
    steps_before: int, failing_pass: int, module: str
) -> None:
    model = nn.Sequential(MODULES[module](), nn.Tanh())
    optimizer = GAM(model.parameters(), rho=RHO, alpha=ALPHA, lr=LR, model=model)
    inputs, passes = draw(6, 2), []
    for _ in range(steps_before):
        optimizer.step(lambda: loss_of(model, inputs))
    before, tensors = bits(model), slots(model)

    def closure() -> Tensor:
        loss = loss_of(model, inputs)
        passes.append(1)
        if len(passes) == failing_pass:
            raise Planted
        return loss

    with pytest.raises(Planted):
        optimizer.step(closure)
    assert len(passes) == failing_pass
    assert_same(before, bits(model))
    assert slots(model).keys() == tensors.keys()
    assert all(buffer is tensors[name] for name, buffer in slots(model).items())


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"Dropping"}))
def test_every_pass_starts_from_the_same_buffers_so_the_step_is_the_literal_one(module: str) -> None:
    model = MODULES[module]()
    model(draw(6, 2))  # has seen a batch
    inputs = draw(6, 2)
    loss = literal.as_function(model, lambda net: net(inputs).square().mean())
    expected = literal.step(loss, model.parameters(), rho=RHO, alpha=ALPHA, lr=LR)
    GAM(model.parameters(), rho=RHO, alpha=ALPHA, lr=LR, model=model).step(lambda: loss_of(model, inputs))
    assert_equal_to_rounding(model.parameters(), expected)


ON_THE_FIRST_BATCH: dict[str, Callable[[Tensor], Tensor]] = {
    "FirstBatch": lambda hidden: (hidden - hidden.detach().mean(0)).tanh(),
    "RegisteredLate": lambda hidden: (hidden - hidden.detach().mean(0)).tanh(),
    "Dropping": lambda hidden: (2 * hidden).tanh(),
}


@pytest.mark.parametrize("module", ON_THE_FIRST_BATCH)
def test_every_pass_of_the_first_step_sees_its_batch_as_the_first(module: str) -> None:
    model, inputs = MODULES[module](), draw(6, 2)

    def loss(params: list[Tensor]) -> Tensor:
        return ON_THE_FIRST_BATCH[module](F.linear(inputs, *params)).square().mean()

    expected = literal.step(loss, model.parameters(), rho=RHO, alpha=ALPHA, lr=LR)
    GAM(model.parameters(), rho=RHO, alpha=ALPHA, lr=LR, model=model).step(lambda: loss_of(model, inputs))
    assert_equal_to_rounding(model.parameters(), expected)


@over_modules
def test_the_two_phases_advance_buffers_once(module: str) -> None:
    model = MODULES[module]()
    twin = copy.deepcopy(model)
    optimizer = GAM(model.parameters(), rho=RHO, alpha=ALPHA, lr=LR, model=model)
    for _ in range(3):
        inputs = draw(6, 2)
        for one, other in zip(twin.parameters(), model.parameters(), strict=True):
            one.data.copy_(other)
        twin(inputs)
        optimizer.first_step(loss_of(model, inputs))
        optimizer.second_step(loss_of(model, inputs))
        assert_same(bits(twin), bits(model))


@pytest.mark.parametrize("layer", LAYERS)
def test_the_two_phases_advance_running_statistics_once(layer: str) -> None:
    model = LAYERS[layer]().double()
    twin = copy.deepcopy(model)
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = GAM(trained, rho=RHO, alpha=ALPHA, lr=LR, model=model)
    for _ in range(3):
        inputs = draw(*model.shape)
        for one, other in zip(twin.parameters(), model.parameters(), strict=True):
            one.data.copy_(other)
        twin(inputs)
        optimizer.first_step(loss_of(model, inputs))
        optimizer.second_step(loss_of(model, inputs))
        assert_same(bits(twin), bits(model))


@pytest.mark.parametrize("module", ["InPlaceAverage", "Rebinding", "FirstBatch"])
def test_cancelling_leaves_buffers_as_the_first_forward_pass_left_them(module: str) -> None:
    """The pass at θ was the user's own and came before the step."""
    model = MODULES[module]()
    inputs = draw(6, 2)
    optimizer = GAM(model.parameters(), rho=RHO, lr=LR, model=model)
    loss = loss_of(model, inputs)
    before = bits(model)
    optimizer.first_step(loss)
    loss_of(model, inputs)
    optimizer.cancel_step()
    assert_same(before, bits(model))


class WithConstant(nn.Module):
    """A layer beside a buffer that no forward pass can write, or none in a common way."""

    def __init__(self, constant: Tensor) -> None:
        super().__init__()
        self.inner = InPlaceAverage()
        self.register_buffer("constant", constant)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs)


CONSTANTS: dict[str, Callable[[], Tensor]] = {
    "expanded": lambda: torch.arange(4).expand(3, 4),
    "expanded scalar": lambda: torch.tensor(1.0).expand(2, 2),
    "overlapping": lambda: torch.arange(5.0).unfold(0, 3, 1),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "compressed": lambda: torch.eye(3).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "meta": lambda: torch.empty(3, device="meta"),
}


@pytest.mark.parametrize("kind", CONSTANTS)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta", "ignore:The PyTorch API of nested tensors")
def test_buffers_that_cannot_be_written_are_left_alone(kind: str) -> None:
    model = WithConstant(CONSTANTS[kind]())
    constant, inputs = model.constant, torch.randn(6, 2)
    optimizer = GAM(model.parameters(), rho=RHO, lr=LR, model=model)
    optimizer.step(lambda: loss_of(model, inputs))
    assert model.constant is constant
    assert int(model.inner.count) == 1


def test_a_lazy_module_is_materialized_once_and_advances_once_per_step() -> None:
    model, twin = (nn.Sequential(nn.Linear(2, 3), nn.LazyBatchNorm1d(affine=False)).double() for _ in range(2))
    twin[0].load_state_dict(model[0].state_dict())
    inputs = draw(6, 2)
    twin(inputs)
    GAM(model.parameters(), rho=RHO, lr=LR, model=model).step(lambda: loss_of(model, inputs))
    assert_same(bits(twin), bits(model))
    assert int(model[1].num_batches_tracked) == 1


class LazyAverage(LazyModuleMixin, nn.Module):
    """An average whose size the first batch tells."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", UninitializedBuffer(dtype=torch.float64))

    def initialize_parameters(self, inputs: Tensor) -> None:
        if self.has_uninitialized_params():
            self.average.materialize(inputs.shape[1:])
            self.average.zero_()

    def forward(self, inputs: Tensor) -> Tensor:
        self.average.lerp_(inputs.detach().mean(0), 0.5)
        return inputs.sin()


def test_a_lazy_buffer_of_a_custom_module_advances_once_per_step() -> None:
    model, twin = (nn.Sequential(nn.Linear(2, 3).double(), LazyAverage()) for _ in range(2))
    twin[0].load_state_dict(model[0].state_dict())
    inputs = draw(6, 2)
    twin(inputs)
    GAM(model.parameters(), rho=RHO, lr=LR, model=model).step(lambda: loss_of(model, inputs))
    assert_same(bits(twin), bits(model))


def test_buffers_outside_of_the_given_model_are_the_closures_own() -> None:
    inside, outside = InPlaceAverage().double(), InPlaceAverage().double()
    inputs = draw(6, 2)
    params = [*inside.parameters(), *outside.parameters()]
    optimizer = GAM(params, rho=RHO, lr=LR, model=inside)
    optimizer.step(lambda: loss_of(inside, inputs) + loss_of(outside, inputs))
    assert (int(inside.count), int(outside.count)) == (1, 2)


def bits(model: nn.Module) -> dict[str, Any]:
    """Every buffer, non-persistent ones and those that are ``None`` included."""
    return {
        name: None if buffer is None else (buffer.dtype, buffer.detach().clone().reshape(-1).view(torch.uint8))
        for name, buffer in slots(model).items()
    }


def slots(model: nn.Module) -> dict[str, Tensor | None]:
    return {
        f"{prefix}.{name}": buffer
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
    }
