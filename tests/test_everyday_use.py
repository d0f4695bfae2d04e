"""What real training code does around a step: hooks that draw, layers that freeze, caches, nested calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from gam_fused import GAM


def leaf(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def test_what_a_hook_of_the_base_optimizer_draws_is_new_in_every_step() -> None:
    param = leaf(1.0, 2.0)
    optimizer = GAM([param], lr=0.1)
    draws: list[float] = []
    optimizer.base_optimizer.register_step_pre_hook(lambda *_: draws.append(torch.randn(()).item()))
    for _ in range(4):
        optimizer.step(lambda: F.dropout(param, 0.5).square().sum())
    assert len(set(draws)) == 4


def test_what_a_hook_of_the_base_optimizer_writes_into_a_buffer_stays() -> None:
    model = nn.Linear(2, 1)
    model.register_buffer("average", torch.zeros(()))
    optimizer = GAM(model.parameters(), lr=0.1, model=model)
    optimizer.base_optimizer.register_step_post_hook(lambda *_: model.average.add_(1))
    for _ in range(4):
        optimizer.step(lambda: model(torch.ones(3, 2)).square().mean())
    assert float(model.average) == 4


def test_a_buffer_that_is_a_view_of_a_parameter_follows_it() -> None:
    steps = []
    for with_view in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        if with_view:
            model.register_buffer("view", model.weight.detach())
        optimizer = GAM(model.parameters(), rho=0.3, alpha=1.0, lr=0.1, model=model)
        for _ in range(3):
            optimizer.step(lambda model=model: model(torch.eye(3)).pow(4).mean())  # type: ignore[misc]
        steps.append(model.weight.detach().clone())
        assert not with_view or torch.equal(model.view, model.weight)
    assert torch.equal(*steps)


@pytest.mark.parametrize("ordinary", [False, True], ids=["returns_the_loss", "calls_backward"])
def test_a_closure_may_freeze_and_unfreeze_other_parameters(ordinary: bool) -> None:
    """Parameters of one shape, so that a gradient given to the wrong one would go unnoticed by PyTorch."""
    first, second, third = leaf(1.0), leaf(2.0), leaf(3.0)
    first.requires_grad_(False)
    optimizer = GAM([first, second, third], rho=0.0, lr=0.1)

    def closure() -> Tensor:
        first.requires_grad_(True)
        loss = second.square().sum()
        if ordinary:
            loss.backward()
            third.requires_grad_(False)
        return loss

    optimizer.step(closure)
    assert (first.item(), second.item(), third.item()) == (1.0, pytest.approx(1.6, rel=1e-15), 3.0)


def test_a_closure_may_freeze_what_it_does_not_train_before_its_forward_pass() -> None:
    generator, critic = leaf(1.0), leaf(2.0)
    optimizer = GAM([generator, critic], rho=0.0, lr=0.1)

    def closure() -> Tensor:
        critic.requires_grad_(False)
        return (generator * critic).square().sum()

    optimizer.step(closure)
    assert generator.item() == pytest.approx(1.0 - 0.1 * 2 * 4, rel=1e-15)
    assert critic.item() == 2.0


def test_backward_that_reaches_parameters_of_another_optimizer_warns() -> None:
    ours, theirs = leaf(1.0), leaf(2.0)
    optimizer = GAM([ours], lr=0.1)

    def closure() -> Tensor:
        loss = (ours * theirs).square().sum()
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match="reached 1 parameters that GAM was not built with"):
        optimizer.step(closure)


def test_zero_grad_between_two_backward_calls_warns() -> None:
    param = leaf(1.0)
    optimizer = GAM([param], lr=0.1)

    def closure() -> Tensor:
        param.square().sum().backward()
        optimizer.zero_grad()
        loss = param.sum()
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match=r"zero_grad\(\) between two backward"):
        optimizer.step(closure)


def test_a_loss_added_up_in_one_tensor_is_returned_as_it_was_at_theta() -> None:
    param, total = leaf(1.0, 2.0), torch.zeros(1, dtype=torch.float64)
    optimizer = GAM([param], rho=0.5, lr=0.1)

    def closure() -> Tensor:
        total.zero_()
        for value in param:
            value.pow(4).backward()
            total.add_(value.detach().pow(4))
        return total

    loss = optimizer.step(closure)
    assert loss.shape == optimizer.metrics["loss"].shape == ()
    assert loss.item() == optimizer.metrics["loss"].item() == 17.0


@pytest.mark.parametrize("ordinary", [False, True], ids=["returns_the_loss", "calls_backward"])
def test_attention_within_a_checkpoint_takes_the_same_step_as_without(ordinary: bool) -> None:
    steps = []
    for recompute in (False, True):
        torch.manual_seed(0)
        embed = nn.Linear(4, 24).double()
        inputs = torch.randn(2, 5, 4, dtype=torch.float64)
        optimizer = GAM(embed.parameters(), rho=0.1, alpha=1.0, lr=0.1)

        def block(hidden: Tensor, embed: nn.Linear = embed) -> Tensor:
            # [batch, heads, tokens, channels]: what the fused kernel takes, which has no second derivative.
            query, key, value = embed(hidden).unsqueeze(1).chunk(3, dim=-1)
            return F.scaled_dot_product_attention(query, key, value)

        def closure(block: Any = block, inputs: Tensor = inputs, recompute: bool = recompute) -> Tensor:
            out = checkpoint(block, inputs, use_reentrant=False) if recompute else block(inputs)
            loss = out.square().mean()
            if ordinary:
                loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        steps.append(embed.weight.detach().clone())
    torch.testing.assert_close(*steps, rtol=1e-12, atol=1e-14)


def test_a_step_within_parametrize_cached_sees_the_adversarial_point() -> None:
    class Symmetric(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight.triu() + weight.triu(1).T

    steps = []
    for cached in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(3, 3).double()
        parametrize.register_parametrization(model, "weight", Symmetric())
        optimizer = GAM(model.parameters(), rho=0.5, alpha=1.0, lr=0.1)
        inputs = torch.randn(4, 3, dtype=torch.float64)
        for _ in range(3):
            if cached:
                with parametrize.cached():
                    optimizer.step(lambda model=model, inputs=inputs: model(inputs).pow(4).mean())  # type: ignore[misc]
            else:
                optimizer.step(lambda model=model, inputs=inputs: model(inputs).pow(4).mean())  # type: ignore[misc]
        steps.append(model.weight.detach().clone())
    assert torch.equal(*steps)


def test_a_closure_that_refuses_non_finite_weights_is_never_given_any() -> None:
    param = leaf(0.3, 0.7)
    optimizer = GAM([param], lr=0.1)
    bad = torch.tensor([float("inf"), 1.0], dtype=torch.float64)

    def closure() -> Tensor:
        torch.distributions.Categorical(logits=param)  # raises for non-finite logits
        return (param * bad).square().sum()

    optimizer.step(closure)
    assert float(optimizer.metrics["skipped_steps"]) == 1
    assert param.tolist() == [0.3, 0.7]


def test_a_post_accumulate_grad_hook_is_refused_since_it_would_never_run() -> None:
    param = leaf(1.0)
    optimizer = GAM([param], lr=0.1)
    hook = param.register_post_accumulate_grad_hook(lambda _: None)
    with pytest.raises(RuntimeError, match=r"group 0, params\[0\] has a post-accumulate-grad hook"):
        optimizer.step(lambda: param.square().sum())
    hook.remove()
    optimizer.step(lambda: param.square().sum())
    assert param.item() < 1.0


def test_calls_that_would_see_half_a_step_are_refused_within_a_closure() -> None:
    param = leaf(1.0)
    optimizer = GAM([param], lr=0.1)
    calls: list[Any] = [
        optimizer.state_dict,
        lambda: optimizer.load_state_dict({}),
        lambda: optimizer.add_param_group({"params": [leaf(2.0)]}),
        lambda: optimizer.step(lambda: param.sum()),
        lambda: optimizer.first_step(param.square().sum()),
        lambda: optimizer.second_step(param.square().sum()),
    ]

    def closure(call: Any) -> Tensor:
        call()
        return param.square().sum()

    for call in calls:
        with pytest.raises(RuntimeError, match="within a closure of the same optimizer"):
            optimizer.step(lambda call=call: closure(call))  # type: ignore[misc]
        assert param.item() == 1.0
    optimizer.step(lambda: param.square().sum())
    assert optimizer.steps == 1


def test_a_hook_of_the_base_optimizer_may_save_a_checkpoint() -> None:
    param = leaf(1.0)
    optimizer = GAM([param], lr=0.1)
    saved: list[Any] = []
    optimizer.base_optimizer.register_step_post_hook(lambda *_: saved.append(optimizer.state_dict()))
    optimizer.step(lambda: param.square().sum())
    assert len(saved) == 1


def test_step_without_a_closure_says_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"closure must be a function .* first_step\(loss\) and second_step"):
        GAM([leaf(1.0)], lr=0.1).step()
