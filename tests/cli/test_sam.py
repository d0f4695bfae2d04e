"""The SAM baseline against its formula in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from gam_fused import reference
from gam_fused.cli.sam import SAM


def _problem() -> tuple[nn.Module, Callable[[list[Tensor]], Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)).double()
    inputs, targets = torch.randn(16, 4, dtype=torch.float64), torch.randint(0, 3, (16,))
    names = [name for name, _ in model.named_parameters()]

    def loss(params: list[Tensor]) -> Tensor:
        outputs = functional_call(model, dict(zip(names, params, strict=True)), (inputs,))
        return nn.functional.cross_entropy(outputs, targets)

    return model, loss


@pytest.mark.parametrize("rho", [0.01, 0.5])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_follow_the_reference(rho: float, momentum: float) -> None:
    model, loss = _problem()
    params = list(model.parameters())
    expected = [param.detach().clone() for param in params]
    rule = reference.SGD(lr=0.3, momentum=momentum)
    groups = [{"params": params[:1]}, {"params": params[1:]}]  # the norm must not be taken by group
    sam = SAM(torch.optim.SGD(groups, lr=0.3, momentum=momentum), rho, model)

    def closure() -> Tensor:
        sam.zero_grad()
        value = loss(params)
        value.backward()
        return value

    for _ in range(10):
        at_theta = loss(expected)
        returned = sam.step(closure)
        expected = rule.step(expected, reference.sam_gradient(loss, expected, rho))
        torch.testing.assert_close(returned, at_theta, rtol=1e-10, atol=0.0)
        assert not returned.requires_grad
    torch.testing.assert_close([param.detach() for param in params], expected, rtol=1e-9, atol=1e-12)


def test_rho_of_a_group_is_used() -> None:
    results = []
    for rho in (0.1, 0.4):
        model, loss = _problem()
        params = list(model.parameters())
        sam = SAM(torch.optim.SGD(params, lr=0.3), 0.1, model)
        sam.param_groups[0]["rho"] = rho
        loss_fn = loss

        def closure(sam: SAM = sam, params: list[Tensor] = params) -> Tensor:
            sam.zero_grad()
            value = loss_fn(params)  # noqa: B023
            value.backward()
            return value

        sam.step(closure)
        results.append(params[0].detach().clone())
    assert not torch.equal(*results)


class Noisy(nn.Module):
    """Dropout and BatchNorm; remembers what the dropout did in each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Linear(6, 6)  # so that what is normalised moves with the weights
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)
        self.output = nn.Linear(6, 1)
        self.masks: list[Tensor] = []

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.dropout(self.norm(self.input(inputs)))
        self.masks.append(hidden.detach() == 0)
        return self.output(hidden)


def _noisy_closure(model: Noisy, optimizer: SAM, fail_in_pass: int | None = None) -> Callable[[], Tensor]:
    inputs = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        if len(model.masks) == fail_in_pass:
            raise KeyboardInterrupt
        loss.backward()
        return loss

    return closure


def test_both_passes_see_one_dropout_mask_and_statistics_advance_once() -> None:
    torch.manual_seed(0)
    model, twin = Noisy(), Noisy()
    twin.load_state_dict(model.state_dict())
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), 0.5, model)
    state = torch.get_rng_state()
    sam.step(_noisy_closure(model, sam))
    after_step = torch.get_rng_state()

    torch.set_rng_state(state)
    twin(torch.randn(32, 6, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(*model.masks)
    assert torch.equal(model.masks[0], twin.masks[0])
    assert torch.equal(after_step, torch.get_rng_state())
    for ours, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_failure_in_the_second_pass_leaves_the_weights_where_they_were() -> None:
    torch.manual_seed(0)
    model = Noisy()
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), 0.5, model)
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(KeyboardInterrupt):
        sam.step(_noisy_closure(model, sam, fail_in_pass=2))
    assert all(torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))
