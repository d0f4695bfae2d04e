"""Four small image classifiers, each with its own kind of curvature.

Every model takes ``(batch, channels, size, size)`` and returns ``(batch, classes)`` logits, adapts to the image size,
and uses only operators that PyTorch can differentiate twice, deterministically also on CUDA (so means instead of
adaptive pooling, strides instead of max pooling).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ImageShape:
    """Square images: ``channels`` planes of ``size`` × ``size`` pixels, in ``classes`` classes."""

    channels: int
    size: int
    classes: int


def mlp(shape: ImageShape) -> nn.Module:
    """Two hidden ReLU layers with dropout; 118 k parameters on Fashion-MNIST, 26 k on digits."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(shape.channels * shape.size**2, 128),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(128, shape.classes),
    )


def cnn(shape: ImageShape) -> nn.Module:
    """Three convolutions without normalisation, and dropout before the classifier; 56 k parameters."""
    return nn.Sequential(
        nn.Conv2d(shape.channels, 32, kernel_size=3, stride=_stem_stride(shape), padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        SpatialMean(),
        nn.Dropout(0.1),
        nn.Linear(64, shape.classes),
    )


def resnet(shape: ImageShape) -> nn.Module:
    """A residual network with BatchNorm, 164 k parameters: one block each of 16, 48 and 96 channels."""
    return nn.Sequential(
        nn.Conv2d(shape.channels, 16, kernel_size=3, stride=_stem_stride(shape), padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        ResidualBlock(16, 16, stride=1),
        ResidualBlock(16, 48, stride=2),
        ResidualBlock(48, 96, stride=2),
        SpatialMean(),
        nn.Linear(96, shape.classes),
    )


def vit(shape: ImageShape) -> nn.Module:
    """A small vision transformer with GELU, 140 k parameters: 4 blocks of width 64, 4 × 4 or 7 × 7 patches."""
    return VisionTransformer(shape, patch=2 if shape.size < 16 else 4, width=64, depth=4, heads=4, dropout=0.1)


MODELS: dict[str, Callable[[ImageShape], nn.Module]] = {"mlp": mlp, "cnn": cnn, "resnet": resnet, "vit": vit}


def _stem_stride(shape: ImageShape) -> int:
    """Halve large images at once (a GAM step multiplies every cost); 8 × 8 has nothing to give away."""
    return 1 if shape.size < 16 else 2


class SpatialMean(nn.Module):
    """Mean over height and width."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))


class ResidualBlock(nn.Module):
    """Two 3 × 3 convolutions with BatchNorm beside a shortcut, projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs or stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(self.body(images) + self.shortcut(images))


class VisionTransformer(nn.Module):
    """Patches, learned positions, pre-norm transformer blocks, mean over the patches, linear classifier."""

    def __init__(self, shape: ImageShape, patch: int, width: int, depth: int, heads: int, dropout: float) -> None:
        super().__init__()
        patches = (shape.size // patch) ** 2
        self.patches = nn.Conv2d(shape.channels, width, kernel_size=patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn(patches, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, shape.classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.classifier(self.norm(self.blocks(tokens)).mean(dim=1))


class TransformerBlock(nn.Module):
    """Attention and a GELU MLP of twice the width, each normalised before and added after."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), SelfAttention(width, heads), nn.Dropout(dropout))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(tokens)
        return tokens + self.mlp(tokens)


class SelfAttention(nn.Module):
    """Multi-head attention with an explicit softmax.

    ``scaled_dot_product_attention`` is faster, but its fused kernels cannot be differentiated twice.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inputs = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, width = tokens.shape
        parts = self.inputs(tokens).view(batch, length, 3, self.heads, width // self.heads)
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)
        weights = (queries @ keys.transpose(2, 3) / sqrt(width // self.heads)).softmax(dim=-1)
        return self.output((weights @ values).transpose(1, 2).reshape(batch, length, width))
