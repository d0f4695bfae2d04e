"""Attention and recurrent networks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from tests.support.case import Case

_HEADS = ((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4))
_LONG = (5, 2, 3)


def _causal(inputs: Tensor) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(inputs.shape[1], dtype=inputs.dtype)


class _Causal(nn.Module):
    """A layer for sequences in which each position sees those before it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Any:
        return self.layer(inputs, _causal(inputs), is_causal=True)


class _SelfAttention(nn.Module):
    def __init__(self, *, need_weights: bool) -> None:
        super().__init__()
        self.attention, self.need_weights = nn.MultiheadAttention(6, 2, 0.2, batch_first=True), need_weights

    def forward(self, inputs: Tensor) -> Any:
        return self.attention(inputs, inputs, inputs, need_weights=self.need_weights)


class _Packed(nn.Module):
    """Sequences of unequal lengths."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Any:
        packed = nn.utils.rnn.pack_padded_sequence(inputs, torch.tensor([5, 3]))
        return self.layer(packed)[0].data


ATTENTION = [
    Case("F.scaled_dot_product_attention", lambda: F.scaled_dot_product_attention, _HEADS),
    Case(
        "F.scaled_dot_product_attention, causal",
        lambda: lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        ((2, 2, 4, 3),) * 3,
    ),
    Case(
        "F.scaled_dot_product_attention, with mask and dropout",
        lambda: lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, dropout_p=0.3),
        (*_HEADS, (3, 5)),
    ),
    Case(
        "flex_attention",
        lambda: flex_attention,
        _HEADS,
        refused="FlexAttention does not support backward on CPU",
    ),
    Case("nn.MultiheadAttention", lambda: _SelfAttention(need_weights=True), ((2, 4, 6),)),
    Case("nn.MultiheadAttention(…)(need_weights=False)", lambda: _SelfAttention(need_weights=False), ((2, 4, 6),)),
    Case(
        'nn.TransformerEncoderLayer(activation="gelu")',
        lambda: _Causal(nn.TransformerEncoderLayer(6, 2, 5, 0.2, "gelu", batch_first=True)),
        ((2, 4, 6),),
    ),
    Case(
        "nn.TransformerEncoderLayer",
        lambda: nn.TransformerEncoderLayer(6, 2, 5, batch_first=True, norm_first=True),
        ((2, 4, 6),),
        kinks=True,
    ),
    Case(
        "nn.TransformerDecoderLayer",
        lambda: nn.TransformerDecoderLayer(6, 2, 5, 0.2, "gelu", batch_first=True),
        ((2, 3, 6), (2, 4, 6)),
    ),
]

RECURRENCE = [
    Case("nn.LSTM", lambda: nn.LSTM(3, 4), (_LONG,)),
    Case("nn.LSTM(proj_size=…)", lambda: nn.LSTM(3, 4, proj_size=2), (_LONG,)),
    Case("nn.GRU", lambda: nn.GRU(3, 4), (_LONG,)),
    Case("nn.RNN", lambda: nn.RNN(3, 4), (_LONG,)),
    Case('nn.RNN(nonlinearity="relu")', lambda: nn.RNN(3, 4, nonlinearity="relu"), (_LONG,), kinks=True),
    Case(
        "nn.LSTM, in both directions, with dropout, on packed sequences",
        lambda: _Packed(nn.LSTM(3, 4, 2, bidirectional=True, dropout=0.3)),
        (_LONG,),
    ),
    Case(
        "nn.GRU, in both directions, with dropout, on packed sequences",
        lambda: _Packed(nn.GRU(3, 4, 2, bidirectional=True, dropout=0.3)),
        (_LONG,),
    ),
    Case("nn.LSTMCell", lambda: nn.LSTMCell(3, 4), ((2, 3),)),
    Case("nn.GRUCell", lambda: nn.GRUCell(3, 4), ((2, 3),)),
    Case("nn.RNNCell", lambda: nn.RNNCell(3, 4), ((2, 3),)),
]
