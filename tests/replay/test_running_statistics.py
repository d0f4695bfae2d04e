"""Running statistics of the standard layers advance once per step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

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
    over_model,
    over_modes,
)
from tests.states import assert_same


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
