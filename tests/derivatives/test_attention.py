"""Attention takes the step of attention by hand, with the kernels that have a second derivative."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gam_fused import GAM
from tests import literal
from tests.derivatives.common import ALPHA, LR, RHO, assert_module_step_is_literal, draw, leaf
from tests.literal import assert_equal_to_rounding


def attention_by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    return torch.softmax(scores, dim=-1) @ value


def split_heads(tensor: Tensor, heads: int) -> Tensor:
    """[batch, tokens, features] → [batch, heads, tokens, features / heads]."""
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)


def self_attention_by_hand(inputs: Tensor, in_weight: Tensor, in_bias: Tensor, heads: int) -> Tensor:
    """Up to the output projection."""
    query, key, value = F.linear(inputs, in_weight, in_bias).chunk(3, dim=-1)
    attended = attention_by_hand(*(split_heads(tensor, heads) for tensor in (query, key, value)))
    return attended.transpose(1, 2).flatten(-2)


def test_scaled_dot_product_attention_takes_the_step_of_attention_by_hand() -> None:
    params = [leaf(2, 2, 3, 4), leaf(2, 2, 5, 4), leaf(2, 2, 5, 4)]
    expected = literal.step(lambda theta: attention_by_hand(*theta).square().sum(), params, rho=RHO, alpha=ALPHA, lr=LR)
    GAM(params, rho=RHO, alpha=ALPHA, lr=LR).step(
        lambda: F.scaled_dot_product_attention(*params).square().sum()  # type: ignore[arg-type]
    )
    assert_equal_to_rounding(params, expected)


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_takes_the_step_of_attention_by_hand(need_weights: bool) -> None:
    model, inputs = nn.MultiheadAttention(6, 2, batch_first=True).double(), draw(3, 4, 6)
    with torch.no_grad():
        model.in_proj_bias.copy_(draw(18))

    def by_hand(params: list[Tensor]) -> Tensor:
        in_weight, in_bias, out_weight, out_bias = params
        return F.linear(self_attention_by_hand(inputs, in_weight, in_bias, 2), out_weight, out_bias).square().sum()

    assert_module_step_is_literal(
        model, lambda net: net(inputs, inputs, inputs, need_weights=need_weights)[0].square().sum(), by_hand
    )


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_transformer_layer_in_training_takes_the_step_of_attention_by_hand(norm_first: bool) -> None:
    model = nn.TransformerEncoderLayer(
        6, 2, dim_feedforward=5, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first
    ).double()
    inputs, target = draw(3, 4, 6), draw(3, 4, 6)
    assert model.training

    def by_hand(params: list[Tensor]) -> Tensor:
        in_weight, in_bias, out_weight, out_bias, w1, b1, w2, b2, scale1, shift1, scale2, shift2 = params
        attend = lambda x: F.linear(self_attention_by_hand(x, in_weight, in_bias, 2), out_weight, out_bias)  # noqa: E731
        feed = lambda x: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)  # noqa: E731
        norm1 = lambda x: F.layer_norm(x, (6,), scale1, shift1)  # noqa: E731
        norm2 = lambda x: F.layer_norm(x, (6,), scale2, shift2)  # noqa: E731
        x = inputs
        if norm_first:
            x = x + attend(norm1(x))
            x = x + feed(norm2(x))
        else:
            x = norm1(x + attend(x))
            x = norm2(x + feed(x))
        return F.mse_loss(x, target)

    assert_module_step_is_literal(model, lambda net: F.mse_loss(net(inputs), target), by_hand)


def test_the_choice_of_attention_kernels_is_as_before_after_a_step() -> None:
    def choice() -> tuple[bool, ...]:
        cuda = torch.backends.cuda
        return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()

    param, seen = leaf(1, 1, 3, 4), []

    def closure() -> Tensor:
        seen.append(choice())
        return F.scaled_dot_product_attention(param, param, param).square().sum()

    before = choice()
    GAM([param], lr=LR).step(closure)
    assert choice() == before
    assert seen == [(False, False, True)] * 2
    with pytest.raises(ZeroDivisionError):
        GAM([param], lr=LR).step(lambda: closure() / (1 // 0))
    assert choice() == before


def test_first_derivatives_keep_the_fast_attention_kernels() -> None:
    param, seen = leaf(1, 1, 3, 4), []

    def closure() -> Tensor:
        seen.append(torch.backends.cuda.flash_sdp_enabled())
        return F.scaled_dot_product_attention(param, param, param).square().sum()

    optimizer = GAM([param], lr=LR, interval=2)
    optimizer.step(closure)
    optimizer.step(closure)
    GAM([param], lr=LR, hvp="finite_difference").step(closure)
    assert seen == [False, False, True, True, True, True, True]
