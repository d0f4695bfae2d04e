"""The data sets: what is in them, how they are split, and what happens when files are missing or damaged."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gam_fused.cli.data import FASHION_MNIST_FOLDER, Dataset, balanced_indices, load_dataset
from gam_fused.cli.errors import CommandError
from tests.cli.conftest import Cli
from tests.cli.test_idx import idx_bytes

CPU = torch.device("cpu")
REMEDY = "`apt-get install dataset-fashion-mnist`, or name the folder that holds the four IDX files with --data-dir"


def _digits(train_size: int | None = None) -> Dataset:
    return load_dataset("digits", None, train_size, CPU)


def test_digits_split_is_complete_disjoint_and_stratified() -> None:
    from sklearn.datasets import load_digits

    data = _digits()
    assert data.train.images.shape == (1442, 1, 8, 8)
    assert data.test.images.shape == (355, 1, 8, 8)
    pixels = torch.cat([data.train.images, data.test.images]).flatten(1) - data.background
    restored = (16 * pixels / pixels.max()).round().int().tolist()
    # The same images, with the same multiplicity, as in scikit-learn: nothing lost, nothing in both halves.
    assert sorted(restored) == sorted(load_digits().data.astype(int).tolist())
    for label in range(10):
        in_train, in_test = (int((split.labels == label).sum()) for split in (data.train, data.test))
        assert in_test == (in_train + in_test) // 5


def test_split_does_not_depend_on_the_seed() -> None:
    torch.manual_seed(1)
    one = _digits()
    torch.manual_seed(2)
    other = _digits()
    assert torch.equal(one.train.images, other.train.images)
    assert torch.equal(one.test.labels, other.test.labels)


def test_training_images_are_normalised_and_background_is_a_black_pixel() -> None:
    data = _digits(train_size=300)
    assert data.train.images.mean().item() == pytest.approx(0, abs=1e-5)
    assert data.train.images.std().item() == pytest.approx(1, abs=1e-5)
    assert data.train.images.min().item() == pytest.approx(data.background, abs=1e-6)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.data())
def test_balanced_indices(labels: list[int], data: st.DataObject) -> None:
    """The first images of each class; no class has two more than another that still has images left."""
    tensor = torch.tensor(labels)
    count = data.draw(st.integers(1, len(labels)))
    chosen = balanced_indices(tensor, count).tolist()
    assert chosen == sorted(set(chosen))
    assert len(chosen) == count
    taken = {label: [i for i in chosen if labels[i] == label] for label in set(labels)}
    for label, indices in taken.items():
        assert indices == [i for i, other in enumerate(labels) if other == label][: len(indices)]
        if len(indices) < labels.count(label):
            assert len(indices) + 1 >= max(map(len, taken.values()))


@pytest.mark.parametrize("size", [0, 9, 1443, -5])
def test_impossible_train_size_is_refused(size: int) -> None:
    with pytest.raises(CommandError, match=rf"--train-size {size}: digits allows 10 .* to 1442"):
        _digits(train_size=size)


def write_fashion_mnist(folder: Path, compress: bool = True) -> None:
    """A tiny stand-in: 20 training and 10 test images of 28 × 28, image i all of grey level i, label i mod 10."""
    for prefix, count in (("train", 20), ("t10k", 10)):
        images = torch.arange(count, dtype=torch.uint8)[:, None, None].expand(count, 28, 28)
        labels = (torch.arange(count) % 10).to(torch.uint8)
        for name, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
            content = idx_bytes(array)
            path = folder / (f"{name}.gz" if compress else name)
            path.write_bytes(gzip.compress(content) if compress else content)


@pytest.mark.parametrize("compress", [True, False])
def test_fashion_mnist_files_are_read(compress: bool, tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path, compress)
    data = load_dataset("fashion-mnist", tmp_path, None, CPU)
    assert data.train.images.shape == (20, 1, 28, 28)
    assert data.test.labels.tolist() == list(range(10))
    grey = torch.arange(20) / 255
    deviation = grey.repeat_interleave(784).std()
    torch.testing.assert_close(data.train.images[:, 0, 5, 7], (grey - grey.mean()) / deviation)


FILES = [f"{prefix}-{kind}-ubyte.gz" for prefix in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign", "other"])
def test_bad_file_gets_one_error_with_the_way_out(name: str, damage: str, tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    path = tmp_path / name
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "foreign":
        path.write_bytes(b"<html>not found</html>")
    else:  # a good file of the right kind, but of another set
        shape = (7, 28, 28) if "images" in name else (7,)
        path.write_bytes(idx_bytes(torch.zeros(shape, dtype=torch.uint8)))
    with pytest.raises(CommandError) as caught:
        load_dataset("fashion-mnist", tmp_path, None, CPU)
    assert str(caught.value).endswith(REMEDY)
    assert str(tmp_path) in str(caught.value)


def test_labels_beyond_ten_classes_are_refused(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    labels = torch.full((20,), 10, dtype=torch.uint8)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(idx_bytes(labels))
    with pytest.raises(CommandError, match="do not belong together"):
        load_dataset("fashion-mnist", tmp_path, None, CPU)


def test_missing_data_on_the_command_line_leaves_no_folder(cli: Cli, tmp_path: Path) -> None:
    result = cli("train", "--data", "fashion-mnist", "--data-dir", tmp_path / "nowhere", "--out", tmp_path / "run")
    assert result.code == 2
    assert result.err.startswith(f"gam-fused: Fashion-MNIST: {tmp_path}/nowhere/train-images-idx3-ubyte.gz not found.")
    assert len(result.err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(
    not FASHION_MNIST_FOLDER.exists(), reason=f"Debian package dataset-fashion-mnist: no {FASHION_MNIST_FOLDER}"
)
def test_fashion_mnist_itself() -> None:
    data = load_dataset("fashion-mnist", None, None, CPU)
    assert data.train.images.shape == (60_000, 1, 28, 28)
    assert data.test.images.shape == (10_000, 1, 28, 28)
    assert data.train.labels.bincount().tolist() == [6_000] * 10
    assert data.test.labels.bincount().tolist() == [1_000] * 10
    # Published statistics of the training images: mean 0.2860, standard deviation 0.3530.
    assert data.background == pytest.approx(-0.2860 / 0.3530, abs=2e-4)
    assert data.train.labels[:5].tolist() == [9, 0, 0, 3, 0]
