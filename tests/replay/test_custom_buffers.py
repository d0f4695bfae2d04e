"""So does every buffer of a module that nobody has heard of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedBuffer

from gam_fused import GAM
from tests import literal
from tests.literal import assert_equal_to_rounding
from tests.replay.common import (
    ALPHA,
    LAYERS,
    LR,
    MODES,
    RHO,
    Planted,
    draw,
    loss_of,
    over_modes,
)
from tests.states import assert_same


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
