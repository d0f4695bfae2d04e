"""Linear layers, convolution, pooling, normalization, dropout, embeddings and activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.support.case import Case, Forward, once

_TOKENS = torch.tensor([[0, 2], [3, 3], [1, 2]])
_IMAGE = (2, 4, 4, 6)
_VOLUME = (2, 2, 4, 4, 4)

LINEAR = [
    Case("nn.Linear", lambda: nn.Linear(3, 4), ((2, 3),)),
    Case("nn.Bilinear", lambda: nn.Bilinear(3, 4, 2), ((2, 3), (2, 4))),
    Case("nn.Conv1d", lambda: nn.Conv1d(2, 4, 3, stride=2, groups=2), ((2, 2, 7),)),
    Case("nn.Conv2d", lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2), (_IMAGE,)),
    Case(
        'nn.Conv2d(padding_mode="circular")', lambda: nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular"), (_IMAGE,)
    ),
    Case("nn.Conv3d", lambda: nn.Conv3d(2, 3, 2, dilation=2), (_VOLUME,)),
    Case("nn.ConvTranspose1d", lambda: nn.ConvTranspose1d(2, 4, 3, stride=2, groups=2), ((2, 2, 4),)),
    Case("nn.ConvTranspose2d", lambda: nn.ConvTranspose2d(4, 2, 3, stride=2, output_padding=1), (_IMAGE,)),
    Case("nn.ConvTranspose3d", lambda: nn.ConvTranspose3d(2, 3, 2), ((1, 2, 2, 2, 3),)),
    Case("nn.Fold", lambda: nn.Fold((3, 4), 2), ((1, 4, 6),)),
    Case("nn.Unfold", lambda: nn.Unfold(2), (_IMAGE,)),
]


class _WeightNormed(nn.Module):
    """``parametrizations.weight_norm(nn.Linear(3, 4))`` by hand."""

    def __init__(self) -> None:
        super().__init__()
        linear = parametrizations.weight_norm(nn.Linear(3, 4))
        self.bias, self.g, self.v = (nn.Parameter(param.detach()) for param in linear.parameters())

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.g * self.v / self.v.norm(dim=1, keepdim=True), self.bias)


NORMALIZATION = [
    Case("nn.BatchNorm1d", lambda: nn.BatchNorm1d(3), ((5, 3),)),
    Case("nn.BatchNorm2d", lambda: nn.BatchNorm2d(4), (_IMAGE,)),
    Case("nn.BatchNorm3d", lambda: nn.BatchNorm3d(2), (_VOLUME,)),
    Case("nn.BatchNorm2d, in eval()", lambda: nn.BatchNorm2d(4).eval(), (_IMAGE,)),
    Case("nn.SyncBatchNorm, in one process", lambda: nn.SyncBatchNorm(4), (_IMAGE,)),
    Case("nn.LayerNorm", lambda: nn.LayerNorm(6), (_IMAGE,)),
    Case("nn.GroupNorm", lambda: nn.GroupNorm(2, 4), (_IMAGE,)),
    Case("nn.InstanceNorm1d", lambda: nn.InstanceNorm1d(3, affine=True), ((2, 3, 5),)),
    Case(
        "nn.InstanceNorm2d(track_running_stats=True)",
        lambda: nn.InstanceNorm2d(4, track_running_stats=True),
        (_IMAGE,),
    ),
    Case("nn.InstanceNorm3d", lambda: nn.InstanceNorm3d(2), (_VOLUME,)),
    Case("nn.RMSNorm", lambda: nn.RMSNorm(6, eps=1e-6), (_IMAGE,)),
    Case("nn.LocalResponseNorm", lambda: nn.LocalResponseNorm(2), (_IMAGE,)),
    Case("F.normalize", lambda: F.normalize, ((3, 4),)),
    # PyTorch's own second derivative is wrong.
    Case(
        "parametrizations.weight_norm",
        lambda: parametrizations.weight_norm(nn.Linear(3, 4)),
        ((2, 3),),
        twin=_WeightNormed,
    ),
    # To a derivative its singular vectors are constants, to a difference they are not.
    Case(
        "parametrizations.spectral_norm", lambda: parametrizations.spectral_norm(nn.Linear(3, 4)), ((2, 3),), near=1e-3
    ),
    Case(
        "parametrizations.spectral_norm, in eval()",
        lambda: parametrizations.spectral_norm(nn.Linear(3, 4)).eval(),
        ((2, 3),),
    ),
    Case("parametrizations.orthogonal", lambda: parametrizations.orthogonal(nn.Linear(3, 3)), ((2, 3),)),
]

POOLING = [
    Case("nn.MaxPool1d", lambda: nn.MaxPool1d(2), ((2, 3, 6),), kinks=True),
    Case("nn.MaxPool2d", lambda: nn.MaxPool2d(2), (_IMAGE,), kinks=True),
    Case("nn.MaxPool3d", lambda: nn.MaxPool3d(2), (_VOLUME,), kinks=True),
    Case("nn.AvgPool1d", lambda: nn.AvgPool1d(2), ((2, 3, 6),)),
    Case("nn.AvgPool2d", lambda: nn.AvgPool2d(2), (_IMAGE,)),
    Case("nn.AvgPool3d", lambda: nn.AvgPool3d(2), (_VOLUME,)),
    Case("nn.LPPool2d", lambda: nn.LPPool2d(2.0, 2), (_IMAGE,)),
    Case("nn.AdaptiveAvgPool1d", lambda: nn.AdaptiveAvgPool1d(4), ((2, 3, 6),)),
    Case("nn.AdaptiveAvgPool2d", lambda: nn.AdaptiveAvgPool2d((1, 3)), (_IMAGE,)),
    Case("nn.AdaptiveAvgPool3d", lambda: nn.AdaptiveAvgPool3d((2, 1, 3)), (_VOLUME,)),
    Case("nn.AdaptiveMaxPool1d", lambda: nn.AdaptiveMaxPool1d(4), ((2, 3, 6),), kinks=True),
    Case("nn.AdaptiveMaxPool2d", lambda: nn.AdaptiveMaxPool2d((1, 3)), (_IMAGE,), kinks=True),
    Case("nn.AdaptiveMaxPool3d", lambda: nn.AdaptiveMaxPool3d((2, 1, 3)), (_VOLUME,), kinks=True),
    Case("nn.FractionalMaxPool2d", lambda: nn.FractionalMaxPool2d(2, output_size=(2, 3)), (_IMAGE,), kinks=True),
    Case("nn.FractionalMaxPool3d", lambda: nn.FractionalMaxPool3d(2, output_size=(2, 1, 2)), (_VOLUME,), kinks=True),
    Case(
        "nn.MaxUnpool2d",
        lambda: lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),  # type: ignore[misc]
        (_IMAGE,),
        kinks=True,
    ),
]

DROPOUT = [
    Case("nn.Dropout", lambda: nn.Dropout(0.3), ((3, 4),)),
    Case("nn.Dropout1d", lambda: nn.Dropout1d(0.3), ((2, 3, 4),)),
    Case("nn.Dropout2d", lambda: nn.Dropout2d(0.3), (_IMAGE,)),
    Case("nn.Dropout3d", lambda: nn.Dropout3d(0.3), (_VOLUME,)),
    Case("nn.AlphaDropout", lambda: nn.AlphaDropout(0.3), ((3, 4),)),
    Case("nn.FeatureAlphaDropout", lambda: nn.FeatureAlphaDropout(0.3), (_IMAGE,)),
]


def _bag(mode: str) -> Forward:
    return lambda weight: F.embedding_bag(_TOKENS, weight, mode=mode)


def _weighted_bag(weight: Tensor, scales: Tensor) -> Tensor:
    return F.embedding_bag(_TOKENS, weight, mode="sum", per_sample_weights=scales)


EMBEDDING = [
    Case("nn.Embedding", lambda: lambda weight: F.embedding(_TOKENS, weight, padding_idx=1), ((4, 3),)),
    Case("nn.Embedding(sparse=True)", lambda: nn.Embedding(4, 3, sparse=True), (_TOKENS,), refused="sparse=False"),
    once('nn.EmbeddingBag(mode="sum")', "embedding_bag", _bag("sum"), lambda w: w[_TOKENS].sum(1), (4, 3)),
    once('nn.EmbeddingBag(mode="mean")', "embedding_bag", _bag("mean"), lambda w: w[_TOKENS].mean(1), (4, 3)),
    once(
        "nn.EmbeddingBag, with per_sample_weights",
        "embedding_bag_per_sample_weights",
        _weighted_bag,
        lambda weight, scales: (weight[_TOKENS] * scales[..., None]).sum(1),
        (4, 3),
        (3, 2),
    ),
    Case(
        'nn.EmbeddingBag(mode="max")',
        lambda: _bag("max"),
        ((4, 3),),
        kinks=True,
        missing="embedding_bag",
        twin=lambda: lambda weight: weight[_TOKENS].amax(1),
    ),
]

_SMOOTH: dict[str, Forward] = {
    "nn.GELU": nn.GELU(),
    'nn.GELU("tanh")': nn.GELU("tanh"),
    "nn.SiLU": nn.SiLU(),
    "nn.Mish": nn.Mish(),
    "nn.ELU": nn.ELU(),
    "nn.CELU": nn.CELU(2.0),
    "nn.Softplus": nn.Softplus(),
    "nn.Softsign": nn.Softsign(),
    "nn.Sigmoid": nn.Sigmoid(),
    "nn.Tanh": nn.Tanh(),
    "nn.Tanhshrink": nn.Tanhshrink(),
    "nn.LogSigmoid": nn.LogSigmoid(),
    "nn.GLU": nn.GLU(),
    "nn.Softmax": nn.Softmax(-1),
    "nn.Softmin": nn.Softmin(-1),
    "nn.LogSoftmax": nn.LogSoftmax(-1),
    "F.gumbel_softmax": F.gumbel_softmax,
}
_WITH_KINKS: dict[str, Forward] = {
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU(inplace=True)": nn.ReLU(inplace=True),
    "nn.ReLU6": nn.ReLU6(),
    "nn.LeakyReLU": nn.LeakyReLU(0.2),
    "nn.RReLU": nn.RReLU(),
    "nn.SELU": nn.SELU(),
    "nn.Hardswish": lambda x: F.hardswish(4 * x),
    "nn.Hardtanh": nn.Hardtanh(),
    "nn.Hardshrink": nn.Hardshrink(0.3),
    "nn.Softshrink": nn.Softshrink(0.3),
    "nn.Threshold": nn.Threshold(0.1, 0.2),
}
ACTIVATIONS = [
    *(Case(name, lambda layer=layer: layer, ((3, 4),)) for name, layer in _SMOOTH.items()),  # type: ignore[misc]
    *(Case(name, lambda layer=layer: layer, ((3, 4),), kinks=True) for name, layer in _WITH_KINKS.items()),  # type: ignore[misc]
    Case(
        "nn.Hardsigmoid",
        lambda: nn.Hardsigmoid(),
        ((3, 4),),
        kinks=True,
        missing="hardsigmoid",
        twin=lambda: lambda x: F.relu6(x + 3) / 6,
    ),
    Case("nn.PReLU", lambda: nn.PReLU(4), ((3, 4),), kinks=True),
]
