"""Embeddings: values, gradients and double backward are PyTorch's, and right."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gam_fused.second_order.embedding import embedding
from tests.second_order.layers_common import (
    assert_differentiable_twice,
    assert_like_pytorch,
    assert_third_derivative_like_pytorch,
    draw,
    is_ours,
)


@pytest.mark.parametrize("padding_idx", [None, 0, 3, -1])
@pytest.mark.parametrize("shape", [(), (7,), (2, 3)], ids=str)
def test_an_embedding_is_pytorchs(shape: tuple[int, ...], padding_idx: int | None) -> None:
    """Rows that occur several times, not at all, and as padding."""
    indices, weight = torch.randint(4, shape), draw(4, 3)
    ours, theirs = (partial(layer, indices, padding_idx=padding_idx) for layer in (embedding, F.embedding))
    assert is_ours(ours(weight))
    assert_like_pytorch(ours, theirs, [weight])
    assert_third_derivative_like_pytorch(ours, theirs, [weight])


def test_an_embedding_is_differentiable_twice() -> None:
    indices = torch.tensor([[0, 3, 3], [4, 0, 1]])
    assert_differentiable_twice(lambda weight: embedding(indices, weight).sin(), [draw(5, 2)])


@pytest.mark.parametrize(
    "options",
    [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}],
    ids=lambda options: next(iter(options)),
)
def test_what_changes_the_weight_or_counts_is_pytorchs(options: dict[str, Any]) -> None:
    indices, weight = torch.tensor([1, 2, 1]), draw(5, 3)
    with torch.no_grad():
        expected = F.embedding(indices, weight.clone(), **options)
    found = embedding(indices, weight, **options)
    assert not is_ours(found)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("padding_idx", [5, -6])
def test_a_padding_that_is_no_row_is_refused_as_by_pytorch(padding_idx: int) -> None:
    with pytest.raises(AssertionError, match="Padding_idx must be within num_embeddings"):
        embedding(torch.tensor([1]), draw(5, 3), padding_idx)
