"""Losses, distances, resampling, transforms, and what is not a layer."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from tests.support.case import Case, Forward, once

_CLASSES = torch.tensor([1, 0, 3])
_BINARY = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0], [1.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
_SIGNS = 2 * _BINARY - 1
_SCORES = (3, 4)
_TARGET = torch.tensor([2, 1])


def _ctc(scores: Tensor) -> Tensor:
    return F.ctc_loss(scores.log_softmax(-1)[:, None], _TARGET[None], torch.tensor([4]), torch.tensor([2]))


def _ctc_by_paths(scores: Tensor) -> Tensor:
    """The probability of every path through the classes that reads as the target without repeats and blanks (0)."""
    log_probabilities = scores.log_softmax(-1)
    paths = []
    for path in itertools.product(range(3), repeat=4):
        reads = [label for label, _ in itertools.groupby(path) if label]
        if reads == _TARGET.tolist():
            paths.append(log_probabilities[range(4), path].sum())
    return -torch.stack(paths).logsumexp(0) / len(_TARGET)


def _multi_margin_by_hand(scores: Tensor) -> Tensor:
    right = scores.gather(1, _CLASSES[:, None])
    others = torch.ones_like(scores).scatter(1, _CLASSES[:, None], 0.0)
    return ((1 - right + scores).relu() * others).sum(1).div(4).mean()


_LABELS = torch.tensor([[1, 3, -1, 0], [0, -1, 0, 0], [2, 1, 0, -1]])  # up to the first −1


def _multilabel_margin_by_hand(scores: Tensor) -> Tensor:
    total = scores.new_zeros(())
    for row, labels in zip(scores, _LABELS.tolist(), strict=True):
        right = labels[: labels.index(-1)]
        total = total + sum((1 - row[j] + row[i]).relu() for j in right for i in range(4) if i not in right)
    return total / 12


def _loss(layer: Forward, *targets: Tensor) -> Forward:
    return lambda scores: layer(scores, *targets)


LOSSES = [
    Case("nn.CrossEntropyLoss", lambda: _loss(nn.CrossEntropyLoss(), _CLASSES), (_SCORES,)),
    Case(
        "nn.CrossEntropyLoss, weighted, with label smoothing",
        lambda: _loss(nn.CrossEntropyLoss(torch.arange(1.0, 5.0, dtype=torch.float64), label_smoothing=0.1), _CLASSES),
        (_SCORES,),
    ),
    Case("nn.CrossEntropyLoss, of probabilities", lambda: nn.CrossEntropyLoss(), (_SCORES, _SCORES)),
    Case("nn.NLLLoss", lambda: lambda scores: F.nll_loss(scores.log_softmax(-1), _CLASSES), (_SCORES,)),
    Case("nn.BCELoss", lambda: lambda scores: F.binary_cross_entropy(scores.sigmoid(), _BINARY), (_SCORES,)),
    Case("nn.BCEWithLogitsLoss", lambda: _loss(nn.BCEWithLogitsLoss(), _BINARY), (_SCORES,)),
    Case(
        "nn.KLDivLoss",
        lambda: lambda p, q: F.kl_div(p.log_softmax(-1), q.softmax(-1), reduction="batchmean"),
        (_SCORES, _SCORES),
    ),
    Case("nn.PoissonNLLLoss", lambda: _loss(nn.PoissonNLLLoss(), _BINARY), (_SCORES,)),
    Case(
        "nn.GaussianNLLLoss",
        lambda: lambda mean, scale: F.gaussian_nll_loss(mean, _BINARY, scale.exp()),
        (_SCORES, _SCORES),
    ),
    Case("nn.MSELoss", lambda: nn.MSELoss(), (_SCORES, _SCORES)),
    Case("nn.HuberLoss", lambda: nn.HuberLoss(), (_SCORES, _SCORES)),
    Case("nn.SmoothL1Loss", lambda: nn.SmoothL1Loss(), (_SCORES, _SCORES)),
    Case("nn.SoftMarginLoss", lambda: _loss(nn.SoftMarginLoss(), _SIGNS), (_SCORES,)),
    Case("nn.MultiLabelSoftMarginLoss", lambda: _loss(nn.MultiLabelSoftMarginLoss(), _BINARY), (_SCORES,)),
    Case("nn.L1Loss", lambda: nn.L1Loss(), (_SCORES, _SCORES), kinks=True),
    Case("nn.HingeEmbeddingLoss", lambda: _loss(nn.HingeEmbeddingLoss(), _SIGNS), (_SCORES,), kinks=True),
    Case(
        "nn.MarginRankingLoss",
        lambda: lambda one, other: F.margin_ranking_loss(one, other, _SIGNS, margin=0.5),
        (_SCORES, _SCORES),
        kinks=True,
    ),
    Case(
        "nn.CosineEmbeddingLoss",
        lambda: lambda one, other: F.cosine_embedding_loss(one, other, -torch.ones(3), margin=-0.2),
        (_SCORES, _SCORES),
        kinks=True,
    ),
    Case("nn.TripletMarginLoss", lambda: nn.TripletMarginLoss(), (_SCORES,) * 3, kinks=True),
    Case("nn.AdaptiveLogSoftmaxWithLoss", lambda: _AdaptiveLogSoftmax(), ((3, 8),)),
    once("nn.CTCLoss", "ctc_loss", _ctc, _ctc_by_paths, (4, 3)),
    Case(
        "nn.MultiMarginLoss",
        lambda: _loss(nn.MultiMarginLoss(), _CLASSES),
        (_SCORES,),
        kinks=True,
        missing="multi_margin_loss",
        twin=lambda: _multi_margin_by_hand,
    ),
    Case(
        "nn.MultiLabelMarginLoss",
        lambda: _loss(nn.MultiLabelMarginLoss(), _LABELS),
        (_SCORES,),
        kinks=True,
        missing="multilabel_margin_loss",
        twin=lambda: _multilabel_margin_by_hand,
    ),
]


class _AdaptiveLogSoftmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.AdaptiveLogSoftmaxWithLoss(8, 6, cutoffs=[2], div_value=2.0)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs, torch.tensor([1, 0, 4])).loss


def _distances(one: Tensor, other: Tensor) -> Tensor:
    return (one[:, None] - other).square().sum(-1).sqrt()


def _distances_between(points: Tensor) -> Tensor:
    first, second = torch.triu_indices(len(points), len(points), 1)
    return (points[first] - points[second]).square().sum(-1).sqrt()


DISTANCES = [
    Case("nn.PairwiseDistance", lambda: nn.PairwiseDistance(), (_SCORES, _SCORES)),
    Case("nn.CosineSimilarity", lambda: nn.CosineSimilarity(), (_SCORES, _SCORES)),
    once("torch.cdist", "cdist", torch.cdist, _distances, (3, 4), (2, 4)),
    once("F.pdist", "pdist", F.pdist, _distances_between, (3, 4)),
]


def _resized(mode: str) -> Case:
    shapes = {"linear": (1, 2, 5), "trilinear": (1, 2, 2, 3, 3)}
    return Case(
        f'nn.Upsample(mode="{mode}")',
        lambda: nn.Upsample(scale_factor=1.5, mode=mode),
        (shapes.get(mode, (1, 2, 4, 5)),),
    )


_IMAGE, _GRID = (1, 2, 4, 4), (1, 3, 3, 2)

SHAPES = [
    *map(_resized, ("nearest", "linear", "bilinear", "bicubic", "trilinear")),
    Case('F.interpolate(mode="area")', lambda: lambda x: F.interpolate(x, size=(2, 3), mode="area"), ((1, 2, 4, 5),)),
    Case(
        "F.interpolate(antialias=True)",
        lambda: lambda x: F.interpolate(x, size=(2, 3), mode="bicubic", antialias=True),
        ((1, 2, 4, 5),),
    ),
    Case(
        'F.grid_sample(mode="bilinear")',
        lambda: lambda image, grid: F.grid_sample(image, grid.tanh(), align_corners=False),
        (_IMAGE, _GRID),
        kinks=True,
    ),
    Case(
        'F.grid_sample(mode="bicubic")',
        lambda: lambda image, grid: F.grid_sample(image, grid.tanh(), mode="bicubic", align_corners=False),
        (_IMAGE, _GRID),
    ),
    Case("F.affine_grid", lambda: lambda x: F.affine_grid(x, [1, 1, 3, 3], align_corners=False), ((1, 2, 3),)),
    Case("nn.PixelShuffle", lambda: nn.PixelShuffle(2), ((1, 4, 2, 3),)),
    Case("nn.PixelUnshuffle", lambda: nn.PixelUnshuffle(2), ((1, 1, 4, 6),)),
    Case("nn.ChannelShuffle", lambda: nn.ChannelShuffle(2), ((1, 4, 2, 3),)),
    Case("nn.ReflectionPad2d", lambda: nn.ReflectionPad2d(1), ((1, 1, 4, 3),)),
    Case("nn.ReplicationPad2d", lambda: nn.ReplicationPad2d(1), ((1, 1, 4, 3),)),
    Case("nn.CircularPad2d", lambda: nn.CircularPad2d(1), ((1, 1, 4, 3),)),
    Case("nn.ZeroPad2d", lambda: nn.ZeroPad2d(1), ((1, 1, 4, 3),)),
]

OPERATORS = [
    Case("torch.einsum", lambda: lambda a, b: torch.einsum("bij,bjk->ik", a, b), ((2, 3, 4), (2, 4, 3))),
    Case("torch.matmul", lambda: torch.matmul, ((2, 3, 4), (4, 3))),
    Case("torch.fft.rfft2", lambda: torch.fft.rfft2, ((3, 4),)),
    Case("torch.fft.fft, and back", lambda: lambda x: torch.fft.ifft(torch.fft.fft(x) ** 2), ((3, 4),)),
    Case(
        "torch.stft", lambda: lambda x: torch.stft(x, 4, window=torch.ones(4).double(), return_complex=True), ((12,),)
    ),
    Case("torch.linalg.solve", lambda: torch.linalg.solve, ((3, 3), (3,))),
    Case("torch.linalg.cholesky", lambda: lambda x: torch.linalg.cholesky(x @ x.T + torch.eye(3)), ((3, 3),)),
    Case("torch.linalg.eigvalsh", lambda: lambda x: torch.linalg.eigvalsh(x + x.T), ((3, 3),)),
    Case("torch.linalg.svdvals", lambda: torch.linalg.svdvals, ((3, 4),)),
    Case("torch.sparse.mm", lambda: lambda x: torch.sparse.mm(torch.eye(3).double().to_sparse(), x), ((3, 4),)),
    Case("torch.logsumexp", lambda: lambda x: torch.logsumexp(x, -1), ((3, 4),)),
    Case("torch.cumsum", lambda: lambda x: x.cumsum(0), ((3, 4),)),
    Case("torch.cumprod", lambda: lambda x: x.cumprod(1), ((3, 4),)),
    Case("torch.sort", lambda: lambda x: x.sort(-1)[0], ((3, 4),), kinks=True),
    Case("torch.topk", lambda: lambda x: x.topk(2)[0], ((3, 4),), kinks=True),
    Case("torch.where", lambda: lambda x: torch.where(x > 0, x.sin(), x), ((3, 4),)),
    once(
        "torch.segment_reduce",
        "segment_reduce",
        lambda x: torch.segment_reduce(x, "sum", lengths=torch.tensor([2, 1])),
        lambda x: torch.stack([x[:2].sum(0), x[2]]),
        (3, 4),
    ),
]


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return tensor**2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * grad * ctx.saved_tensors[0]


class OnceSquare(_Square):
    backward = staticmethod(once_differentiable(_Square.backward))  # type: ignore[assignment]


class _Run(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.3))

    def forward(self, inputs: Tensor) -> Any:
        return self.block(inputs)


class _Rerun(_Run):
    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, inputs: Tensor) -> Any:
        return checkpoint(self.block, inputs, use_reentrant=self.use_reentrant)


def _block() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh())


AROUND = [
    Case("checkpoint(use_reentrant=False)", lambda: _Rerun(use_reentrant=False), ((2, 3),), twin=_Run),
    Case(
        "checkpoint(use_reentrant=True)", lambda: _Rerun(use_reentrant=True), ((2, 3),), refused="use_reentrant=False"
    ),
    Case("torch.autograd.Function", lambda: _Square.apply, ((3, 4),)),
    once("torch.autograd.Function, once_differentiable", "OnceSquare", OnceSquare.apply, torch.square, (3, 4)),
    Case(
        "torch.compile",
        lambda: torch.compile(_block(), backend="aot_eager"),
        ((2, 3),),
        missing="a module under torch.compile",
        twin=_block,
    ),
]
