"""The parameter shapes of well-known networks, in the order in which the networks list them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

Shape = tuple[int, ...]


def resnet18() -> list[Shape]:
    """ResNet-18 as in torchvision: 11,689,512 parameters in 62 tensors."""
    return list(_resnet(blocks=(2, 2, 2, 2), block=_basic_block, expansion=1))


def resnet50() -> list[Shape]:
    """ResNet-50 as in torchvision: 25,557,032 parameters in 161 tensors."""
    return list(_resnet(blocks=(3, 4, 6, 3), block=_bottleneck, expansion=4))


def vit_b() -> list[Shape]:
    """ViT-B/16 as in torchvision: 86,567,656 parameters in 152 tensors."""
    width, patches = 768, (224 // 16) ** 2
    return [
        (1, 1, width),  # class token
        (width, 3, 16, 16),
        (width,),
        (1, patches + 1, width),
        *(shape for _ in range(12) for shape in _transformer_block(width)),
        *_norm(width),
        *_linear(width, 1000),
    ]


def gpt2() -> list[Shape]:
    """GPT-2 small with tied embeddings: 124,439,808 parameters in 148 tensors."""
    width = 768
    return [
        (50257, width),
        (1024, width),
        *(shape for _ in range(12) for shape in _transformer_block(width)),
        *_norm(width),
    ]


def many_small() -> list[Shape]:
    """A narrow network, where what a launch costs counts and not its bytes: 140,160 parameters in 180 tensors."""
    return [shape for _ in range(60) for shape in ((16, 16, 3, 3), *_norm(16))]


def tiny() -> list[Shape]:
    """A few odd sizes, to try out the benchmark itself."""
    return [(7,), (33, 5), (), (1000,)]


SHAPES: dict[str, Callable[[], list[Shape]]] = {
    "resnet18": resnet18,
    "resnet50": resnet50,
    "vit-b": vit_b,
    "gpt2": gpt2,
    "many-small": many_small,
    "tiny": tiny,
}


def _norm(width: int) -> list[Shape]:
    return [(width,), (width,)]


def _linear(inputs: int, outputs: int) -> list[Shape]:
    return [(outputs, inputs), (outputs,)]


def _transformer_block(width: int) -> Iterator[Shape]:
    yield from _norm(width)
    yield from _linear(width, 3 * width)  # queries, keys and values
    yield from _linear(width, width)
    yield from _norm(width)
    yield from _linear(width, 4 * width)
    yield from _linear(4 * width, width)


def _resnet(blocks: Sequence[int], block: Callable[[int, int], Iterator[Shape]], expansion: int) -> Iterator[Shape]:
    inputs = 64
    yield from _convolution(3, inputs, kernel=7)
    for stage, count in enumerate(blocks):
        width = 64 << stage
        for position in range(count):
            yield from block(inputs, width)
            if position == 0 and (stage > 0 or inputs != width * expansion):
                yield from _convolution(inputs, width * expansion, kernel=1)  # of the shortcut
            inputs = width * expansion
    yield from _linear(inputs, 1000)


def _basic_block(inputs: int, width: int) -> Iterator[Shape]:
    yield from _convolution(inputs, width, kernel=3)
    yield from _convolution(width, width, kernel=3)


def _bottleneck(inputs: int, width: int) -> Iterator[Shape]:
    yield from _convolution(inputs, width, kernel=1)
    yield from _convolution(width, width, kernel=3)
    yield from _convolution(width, 4 * width, kernel=1)


def _convolution(inputs: int, outputs: int, kernel: int) -> list[Shape]:
    """Without a bias, and its BatchNorm."""
    return [(outputs, inputs, kernel, kernel), *_norm(outputs)]
