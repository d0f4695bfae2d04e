"""Augmented images are shifted, perhaps mirrored copies of the originals, and nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gam_fused.cli.augmentation import Augmentation, augmentation_for

BACKGROUND = -0.75


def _shifted(image: torch.Tensor, rows: int, columns: int, mirrored: bool) -> torch.Tensor:
    """The literal form, pixel by pixel: each pixel comes from ``rows`` below and ``columns`` to its right."""
    height, width = image.shape[1:]
    result = torch.full_like(image, BACKGROUND)
    for y in range(height):
        for x in range(width):
            source_y, source_x = y + rows, (width - 1 - x if mirrored else x) + columns
            if 0 <= source_y < height and 0 <= source_x < width:
                result[:, y, x] = image[:, source_y, source_x]
    return result


@given(
    batch=st.integers(1, 4),
    channels=st.integers(1, 3),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    padding=st.integers(0, 2),
    flip=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_image_is_a_shifted_copy(
    batch: int, channels: int, height: int, width: int, padding: int, flip: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    images = torch.rand(batch, channels, height, width)
    augmented = Augmentation(padding, flip, BACKGROUND)(images)
    assert augmented.shape == images.shape
    shifts = range(-padding, padding + 1)
    for before, after in zip(images, augmented, strict=True):
        candidates = [
            _shifted(before, rows, columns, mirrored)
            for rows in shifts
            for columns in shifts
            for mirrored in ([False, True] if flip else [False])
        ]
        assert any(torch.equal(after, candidate) for candidate in candidates)


def test_all_shifts_and_both_orientations_occur_and_images_move_independently() -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 1, 4, 4)
    augmented = Augmentation(padding=1, flip=True, background=BACKGROUND)(image.expand(500, 1, 4, 4))
    distinct = {tuple(result.flatten().tolist()) for result in augmented}
    assert len(distinct) == 3 * 3 * 2


def test_nothing_to_do_changes_nothing() -> None:
    images = torch.rand(5, 1, 6, 6)
    assert torch.equal(Augmentation(padding=0, flip=False, background=0.0)(images), images)


def test_originals_are_left_alone_and_the_global_generator_decides() -> None:
    images = torch.rand(8, 1, 6, 6)
    before = images.clone()
    augmentation = Augmentation(padding=2, flip=True, background=0.0)
    state = torch.get_rng_state()
    first = augmentation(images)
    second = augmentation(images)
    torch.set_rng_state(state)
    again = augmentation(images)
    assert torch.equal(images, before)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("data", "flip"), [("digits", False), ("fashion-mnist", True)])
def test_digits_are_never_mirrored(data: str, flip: bool) -> None:
    assert augmentation_for(data, background=BACKGROUND).flip is flip
