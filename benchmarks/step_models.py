"""What the step benchmark trains: a model, one mini-batch for it, and the loss of the two.

Nothing is random once they are built (no dropout), so every contender has the same weights, data and function. Data is
noise: what a step costs does not depend on it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.packages import imported
from gam_fused.cli.models import ResidualBlock, SpatialMean

CLASSES = 10
VOCABULARY = 256


@dataclass(frozen=True)
class Problem:
    """A model and the mini-batch that it is trained on."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor

    @property
    def params(self) -> list[nn.Parameter]:
        """Those of the model, shared ones once."""
        return list(self.model.parameters())

    def loss_of(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy over images, or over tokens."""
        return cross_entropy(outputs.flatten(0, -2), targets.flatten())

    def loss(self) -> Tensor:
        """The loss of the model as it is now, with its graph."""
        return self.loss_of(self.model(self.inputs), self.targets)

    def copy(self) -> Problem:
        """An equal model of its own, with the same data."""
        return Problem(copy.deepcopy(self.model), self.inputs, self.targets)

    def to(self, device: torch.device, dtype: torch.dtype) -> Problem:
        """On the device, and in that dtype what is not a number of a class or token."""
        inputs = self.inputs.to(device, dtype if self.inputs.is_floating_point() else None)
        return Problem(self.model.to(device, dtype), inputs, self.targets.to(device))


# ---------------------------------------------------------------- the models


def resnet(batch: int) -> Problem:
    """A residual network with BatchNorm for images of 32 × 32: two blocks each of 16, 32 and 64 channels."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        *(ResidualBlock(16, 16, stride=1) for _ in range(2)),
        ResidualBlock(16, 32, stride=2),
        ResidualBlock(32, 32, stride=1),
        ResidualBlock(32, 64, stride=2),
        ResidualBlock(64, 64, stride=1),
        SpatialMean(),
        nn.Linear(64, CLASSES),
    )
    return _on_images(model, batch, size=32)


def mlp() -> Problem:
    """Two hidden ReLU layers of 512, for 784 pixels."""
    model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, CLASSES))
    return Problem(model, torch.randn(128, 784), torch.randint(CLASSES, (128,)))


class TokenTransformer(nn.Module):
    """Token and position embeddings, PyTorch's own encoder layers (normalised first, GELU), a linear read-out."""

    def __init__(self, tokens: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, width))
        layers = (
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(width)
        self.read_out = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits, from whole numbers of shape (batch, tokens)."""
        return self.read_out(self.norm(self.layers(self.embedding(tokens) + self.positions)))


def transformer() -> Problem:
    """Four layers of width 128, on 16 sequences of 64 tokens."""
    return _on_tokens(TokenTransformer(tokens=64, width=128, depth=4, heads=4), batch=16, tokens=64)


def convnext() -> Problem:
    """The smallest ConvNeXt of timm, on 8 images of 64 × 64."""
    timm = imported("timm", "timm")
    return _on_images(timm.create_model("convnext_atto", num_classes=CLASSES), batch=8, size=64)


def vit() -> Problem:
    """The tiny vision transformer of timm, on 8 images of 64 × 64, in patches of 16 × 16."""
    timm = imported("timm", "timm")
    return _on_images(timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=CLASSES), batch=8, size=64)


class Logits(nn.Module):
    """Of what a model of ``transformers`` returns, the logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits, from whole numbers of shape (batch, tokens)."""
        return self.model(tokens).logits


def gpt2(width: int, depth: int, heads: int, vocabulary: int, batch: int, tokens: int) -> Problem:
    """GPT-2 of ``transformers``, with random weights and without dropout."""
    transformers = imported("transformers", "transformers")
    config = transformers.GPT2Config(
        vocab_size=vocabulary,
        n_positions=tokens,
        n_embd=width,
        n_layer=depth,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = Logits(transformers.GPT2LMHeadModel(config)).train()
    return _on_tokens(model, batch, tokens, vocabulary)


def _on_images(model: nn.Module, batch: int, size: int) -> Problem:
    return Problem(model, torch.randn(batch, 3, size, size), torch.randint(CLASSES, (batch,)))


def _on_tokens(model: nn.Module, batch: int, tokens: int, vocabulary: int = VOCABULARY) -> Problem:
    data = torch.randint(vocabulary, (batch, tokens + 1))
    return Problem(model, data[:, :-1].contiguous(), data[:, 1:].contiguous())


def tiny() -> Problem:
    """For tests: BatchNorm and GELU, a few dozen parameters."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Linear(6, CLASSES))
    return Problem(model, torch.randn(5, 4), torch.randint(CLASSES, (5,)))


MODELS: dict[str, Callable[[], Problem]] = {
    "resnet-8": lambda: resnet(batch=8),
    "resnet-32": lambda: resnet(batch=32),
    "resnet-64": lambda: resnet(batch=64),
    "mlp": mlp,
    "transformer": transformer,
    "convnext": convnext,
    "vit": vit,
    "gpt2-mini": lambda: gpt2(width=256, depth=4, heads=4, vocabulary=1024, batch=4, tokens=64),
    "gpt2": lambda: gpt2(width=768, depth=12, heads=12, vocabulary=50257, batch=4, tokens=128),
    "tiny": tiny,
}


def problem(name: str, device: torch.device) -> Problem:
    """The model and mini-batch of that name, the same in each call; in training mode.

    Raises:
        NotInstalled: the package that has the model cannot be imported.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[name]().to(device, torch.float32)
