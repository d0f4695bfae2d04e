"""The data sets: loaded whole into memory on the training device, normalised, with a fixed train/test split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gam_fused.cli.errors import CommandError
from gam_fused.cli.idx import IdxError, read_idx
from gam_fused.cli.models import ImageShape

FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package ``dataset-fashion-mnist`` puts the four IDX files."""

CLASSES = 10


@dataclass(frozen=True)
class Split:
    """``images`` (n, channels, size, size) float32, normalised; ``labels`` (n,) int64; both on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Split:
        return Split(self.images[indices], self.labels[indices])

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """A training and a test split of one kind of image.

    ``background`` is the value of a black pixel after normalisation, which is what augmentation pads with.
    """

    train: Split
    test: Split
    shape: ImageShape
    background: float


def load_dataset(name: str, folder: str | Path | None, train_size: int | None, device: torch.device) -> Dataset:
    """The data set ``name``, its training split cut to ``train_size`` images (all if ``None``) in balanced classes.

    ``folder`` is where Fashion-MNIST's files are; ``None`` means :data:`FASHION_MNIST_FOLDER`. The split never depends
    on a seed: two runs always train and test on the same images. Raises :class:`CommandError` for missing or damaged
    files and for a ``train_size`` that cannot be had.
    """
    train, test = _READERS[name](None if folder is None else Path(folder))
    if train_size is not None:
        if not CLASSES <= train_size <= len(train):
            raise CommandError(f"--train-size {train_size}: {name} allows {CLASSES} (one per class) to {len(train)}")
        train = train.take(balanced_indices(train.labels, train_size))
    # Statistics of the images trained on, never of the test images.
    mean, deviation = train.images.mean().item(), train.images.std().item()
    _, channels, size, _ = train.images.shape
    return Dataset(
        train=_normalised(train, mean, deviation).to(device),
        test=_normalised(test, mean, deviation).to(device),
        shape=ImageShape(channels, size, CLASSES),
        background=-mean / deviation,
    )


def balanced_indices(labels: Tensor, count: int) -> Tensor:
    """The first ``count`` indices taking the classes in turn, in ascending order; a class that runs out is skipped."""
    one_hot = torch.nn.functional.one_hot(labels, CLASSES)
    rank_in_class = one_hot.cumsum(dim=0).gather(1, labels[:, None]).squeeze(1)
    return torch.argsort(rank_in_class, stable=True)[:count].sort().values


def _normalised(split: Split, mean: float, deviation: float) -> Split:
    return Split((split.images - mean) / deviation, split.labels)


def _read_digits(folder: Path | None) -> tuple[Split, Split]:
    """The 1,797 handwritten digits of scikit-learn, 8 × 8 pixels: every fifth image of each class is for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    labels = torch.from_numpy(digits.target).long()
    rank_in_class = torch.nn.functional.one_hot(labels, CLASSES).cumsum(dim=0).gather(1, labels[:, None]).squeeze(1)
    is_test = rank_in_class % 5 == 0
    return Split(images[~is_test], labels[~is_test]), Split(images[is_test], labels[is_test])


def _read_fashion_mnist(folder: Path | None) -> tuple[Split, Split]:
    folder = folder or FASHION_MNIST_FOLDER
    return _read_idx_split(folder, "train"), _read_idx_split(folder, "t10k")


def _read_idx_split(folder: Path, prefix: str) -> Split:
    images = _read_idx_file(folder, f"{prefix}-images-idx3-ubyte", dimensions=3)
    labels = _read_idx_file(folder, f"{prefix}-labels-idx1-ubyte", dimensions=1)
    if len(images) != len(labels) or len(labels) == 0 or images.shape[1] != images.shape[2] or labels.max() >= CLASSES:
        raise _fashion_mnist_error(
            f"the {prefix} files in {folder} do not belong together: images {tuple(images.shape)}, "
            f"labels {tuple(labels.shape)} in {CLASSES} classes"
        )
    return Split(images[:, None].float() / 255, labels.long())


def _read_idx_file(folder: Path, name: str, dimensions: int) -> Tensor:
    candidates = [folder / f"{name}.gz", folder / name]
    path = next((candidate for candidate in candidates if candidate.exists()), None)
    if path is None:
        raise _fashion_mnist_error(f"{candidates[0]} not found")
    try:
        return read_idx(path, dimensions)
    except OSError as error:
        raise _fashion_mnist_error(f"{path} cannot be read ({error.strerror})") from error
    except IdxError as error:
        raise _fashion_mnist_error(f"{path} {error}") from error


def _fashion_mnist_error(problem: str) -> CommandError:
    return CommandError(
        f"Fashion-MNIST: {problem}. Install the data with `apt-get install dataset-fashion-mnist`, or name the folder "
        "that holds the four IDX files with --data-dir"
    )


_READERS: dict[str, Callable[[Path | None], tuple[Split, Split]]] = {
    "digits": _read_digits,
    "fashion-mnist": _read_fashion_mnist,
}
