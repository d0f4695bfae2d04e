"""Recurrent networks take the step of their equations, on kernels that have a second derivative."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from gam_fused import GAM
from gam_fused.second_order import layers
from tests.derivatives.common import ALPHA, LR, RHO, assert_module_step_is_literal, draw


def lstm_by_hand(inputs: Tensor, params: list[Tensor]) -> Tensor:
    """One layer, all hidden states: [tokens, batch, features] → [tokens, batch, hidden]."""
    w_input, w_hidden, b_input, b_hidden = params
    hidden = cell = torch.zeros(inputs.shape[1], w_hidden.shape[1], dtype=torch.float64)
    states = []
    for x in inputs:
        gates = x @ w_input.T + b_input + hidden @ w_hidden.T + b_hidden
        i, f, g, o = gates.chunk(4, dim=1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        states.append(hidden)
    return torch.stack(states)


def gru_by_hand(inputs: Tensor, params: list[Tensor]) -> Tensor:
    w_input, w_hidden, b_input, b_hidden = params
    hidden = torch.zeros(inputs.shape[1], w_hidden.shape[1], dtype=torch.float64)
    states = []
    for x in inputs:
        r_in, z_in, n_in = (x @ w_input.T + b_input).chunk(3, dim=1)
        r_hid, z_hid, n_hid = (hidden @ w_hidden.T + b_hidden).chunk(3, dim=1)
        reset, update = (r_in + r_hid).sigmoid(), (z_in + z_hid).sigmoid()
        new = (n_in + reset * n_hid).tanh()
        hidden = (1 - update) * new + update * hidden
        states.append(hidden)
    return torch.stack(states)


def rnn_by_hand(inputs: Tensor, params: list[Tensor]) -> Tensor:
    w_input, w_hidden, b_input, b_hidden = params
    hidden = torch.zeros(inputs.shape[1], w_hidden.shape[1], dtype=torch.float64)
    states = []
    for x in inputs:
        hidden = (x @ w_input.T + b_input + hidden @ w_hidden.T + b_hidden).tanh()
        states.append(hidden)
    return torch.stack(states)


CELLS: dict[str, type[nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
BY_HAND = {"lstm": lstm_by_hand, "gru": gru_by_hand, "rnn": rnn_by_hand}
over_cells = pytest.mark.parametrize("cell", CELLS)


@over_cells
def test_a_recurrent_network_takes_the_step_of_its_equations(cell: str) -> None:
    model, inputs, by_hand = CELLS[cell](3, 4).double(), draw(5, 2, 3), BY_HAND[cell]
    assert_module_step_is_literal(
        model, lambda net: net(inputs)[0].square().sum(), lambda params: by_hand(inputs, params).square().sum()
    )


@over_cells
def test_a_stack_of_layers_in_both_directions_with_dropout_takes_the_literal_step(cell: str) -> None:
    """Over sequences of unequal lengths, so that the other form of the functions is called, too."""
    model = CELLS[cell](3, 4, num_layers=2, bidirectional=True, dropout=0.3, batch_first=True).double()
    inputs = draw(3, 5, 3)

    def loss(net: Callable[..., Any]) -> Tensor:
        torch.manual_seed(3)  # the reference draws anew in each of its passes
        packed = nn.utils.rnn.pack_padded_sequence(inputs, torch.tensor([5, 4, 2]), batch_first=True)
        return net(packed)[0].data.square().sum() + net(inputs)[0].square().sum()

    assert_module_step_is_literal(model, loss)


def test_a_network_with_projections_and_one_of_relus_take_the_literal_step() -> None:
    for model in (nn.LSTM(3, 4, proj_size=2).double(), nn.RNN(3, 4, nonlinearity="relu").double()):
        inputs = draw(5, 2, 3)
        assert_module_step_is_literal(model, lambda net, inputs=inputs: net(inputs)[0].square().sum())


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_a_single_cell_takes_the_literal_step(cell: type[nn.RNNCellBase]) -> None:
    model, inputs = cell(3, 4).double(), draw(5, 2, 3)

    def loss(net: Callable[..., Any]) -> Tensor:
        state = None
        for x in inputs:
            state = net(x, state)
        assert state is not None
        return torch.cat(list(state)).square().sum()

    assert_module_step_is_literal(model, loss)


@over_cells
def test_a_recurrent_network_in_float32_steps_as_in_float64(cell: str) -> None:
    narrow, wide = CELLS[cell](3, 4), CELLS[cell](3, 4).double()
    wide.load_state_dict(narrow.state_dict())
    inputs = torch.randn(5, 2, 3)
    GAM(narrow.parameters(), rho=RHO, alpha=ALPHA, lr=LR).step(lambda: narrow(inputs)[0].square().sum())
    GAM(wide.parameters(), rho=RHO, alpha=ALPHA, lr=LR).step(lambda: wide(inputs.double())[0].square().sum())
    for one, other in zip(narrow.parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- cuDNN


KINDS = {"aten::tanh": "recurrent", "aten::tanh_": "recurrent", "aten::convolution": "convolution"}


class CuDNN(TorchDispatchMode):
    """Whether cuDNN is on where a recurrent network runs its gates, and where a convolution runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[bool]] = {"recurrent": [], "convolution": []}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (kind := KINDS.get(func._schema.name)) is not None:
            self.seen[kind].append(torch.backends.cudnn.enabled)
        return func(*args, **(kwargs or {}))


class Sequences(nn.Module):
    """A convolution over time, and then a recurrent network over it, with or without a checkpoint around."""

    def __init__(self, cell: str, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.convolution, self.recurrent = nn.Conv1d(3, 3, 2), CELLS[cell](3, 4, batch_first=True)
        self.checkpointed = checkpointed
        self.double()

    def body(self, inputs: Tensor) -> Tensor:
        return self.recurrent(self.convolution(inputs).transpose(1, 2))[0]

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = checkpoint(self.body, inputs, use_reentrant=False) if self.checkpointed else self.body(inputs)
        assert isinstance(outputs, Tensor)
        return outputs.square().mean()


@over_cells
@pytest.mark.parametrize("second_order", ["auto", "off"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_recurrent_networks_alone_run_without_cudnn(cell: str, second_order: str, checkpointed: bool) -> None:
    model, inputs = Sequences(cell, checkpointed=checkpointed), draw(2, 3, 5)
    assert torch.backends.cudnn.enabled
    with CuDNN() as cudnn:
        GAM(model.parameters(), lr=LR, second_order=second_order).step(lambda: model(inputs))
    # Four time steps with one tanh or, in an LSTM, two, at two points; a checkpoint computes them again and again.
    passes, rest = divmod(len(cudnn.seen["recurrent"]), 2 * 4 * (2 if cell == "lstm" else 1))
    assert rest == 0
    assert passes > 1 if checkpointed else passes == 1
    assert not any(cudnn.seen["recurrent"])
    assert cudnn.seen["convolution"]
    assert all(cudnn.seen["convolution"])
    assert torch.backends.cudnn.enabled


@pytest.mark.parametrize("second_order", ["auto", "off"])
def test_a_gradient_penalty_of_a_checkpointed_network_runs_it_without_cudnn(second_order: str) -> None:
    model, inputs = Sequences("lstm", checkpointed=True), draw(2, 3, 5).requires_grad_()

    def loss() -> Tensor:
        value = model(inputs)
        (slope,) = torch.autograd.grad(value, inputs, create_graph=True)
        return value + slope.square().sum()

    with CuDNN() as cudnn:
        GAM(model.parameters(), lr=LR, second_order=second_order).step(loss)
    assert cudnn.seen["recurrent"]
    assert not any(cudnn.seen["recurrent"])


@pytest.mark.parametrize(
    "options", [{"hvp": "finite_difference"}, {"interval": 2}], ids=lambda options: next(iter(options))
)
def test_first_derivatives_are_taken_with_cudnn(options: dict[str, Any]) -> None:
    model, inputs = Sequences("gru"), draw(2, 3, 5)
    optimizer = GAM(model.parameters(), lr=LR, **options)
    optimizer.step(lambda: model(inputs))
    with CuDNN() as cudnn:
        optimizer.step(lambda: model(inputs))
    assert cudnn.seen["recurrent"]
    assert all(cudnn.seen["recurrent"])


def test_what_a_closure_does_not_differentiate_runs_with_cudnn() -> None:
    model, inputs = Sequences("gru"), draw(2, 3, 5)

    def loss() -> Tensor:
        with torch.no_grad(), cudnn:
            model(inputs)
        return model(inputs)

    cudnn = CuDNN()
    GAM(model.parameters(), lr=LR).step(loss)
    assert cudnn.seen["recurrent"]
    assert all(cudnn.seen["recurrent"])


@pytest.mark.parametrize("context", [nullcontext, layers])
def test_layers_run_recurrent_networks_without_cudnn(context: Callable[[], AbstractContextManager[Any]]) -> None:
    with CuDNN() as cudnn, context():
        Sequences("lstm")(draw(2, 3, 5))
    assert set(cudnn.seen["recurrent"]) == {context is nullcontext}


@pytest.mark.parametrize("enabled", [True, False])
def test_cudnn_is_as_before_after_a_recurrent_network_that_raises(enabled: bool) -> None:
    model, state = Sequences("lstm"), torch.zeros(1, 2, 4)  # in float32
    weights, settings = list(model.recurrent.parameters()), (True, 1, 0.0, True, False, False)
    with torch.backends.cudnn.flags(enabled=enabled):
        with pytest.raises(RuntimeError, match="dtype"):
            GAM(model.parameters(), lr=LR).step(
                lambda: torch.lstm(draw(5, 2, 3), [state] * 2, weights, *settings)[0].sum()
            )
        assert torch.backends.cudnn.enabled == enabled
        GAM(model.parameters(), lr=LR).step(lambda: model(draw(2, 3, 5)))
        assert torch.backends.cudnn.enabled == enabled


@pytest.mark.cuda
@over_cells
def test_a_recurrent_network_on_a_gpu_steps_as_on_the_cpu(cell: str) -> None:
    here, there = Sequences(cell), Sequences(cell).cuda()
    there.load_state_dict(here.state_dict())
    inputs = draw(2, 3, 5)
    for model in (here, there):
        on_device = inputs.to(next(model.parameters()).device)
        GAM(model.parameters(), rho=RHO, alpha=ALPHA, lr=LR).step(lambda m=model, x=on_device: m(x))
    for one, other in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(one, other.cpu(), rtol=1e-9, atol=1e-9)
