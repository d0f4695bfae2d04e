"""Recurrent networks take the step of their equations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gam_fused import GAM
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


@pytest.mark.parametrize(("cell", "by_hand"), [(nn.LSTM, lstm_by_hand), (nn.GRU, gru_by_hand)], ids=["lstm", "gru"])
def test_a_recurrent_network_takes_the_step_of_its_equations(
    cell: type[nn.LSTM] | type[nn.GRU], by_hand: Callable[[Tensor, list[Tensor]], Tensor]
) -> None:
    model, inputs = cell(3, 4).double(), draw(5, 2, 3)
    assert_module_step_is_literal(
        model, lambda net: net(inputs)[0].square().sum(), lambda params: by_hand(inputs, params).square().sum()
    )


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU], ids=["lstm", "gru"])
def test_a_recurrent_network_in_float32_steps_as_in_float64(cell: type[nn.LSTM] | type[nn.GRU]) -> None:
    narrow, wide = cell(3, 4), cell(3, 4).double()
    wide.load_state_dict(narrow.state_dict())
    inputs = torch.randn(5, 2, 3)
    GAM(narrow.parameters(), rho=RHO, alpha=ALPHA, lr=LR).step(lambda: narrow(inputs)[0].square().sum())
    GAM(wide.parameters(), rho=RHO, alpha=ALPHA, lr=LR).step(lambda: wide(inputs.double())[0].square().sum())
    for one, other in zip(narrow.parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)
