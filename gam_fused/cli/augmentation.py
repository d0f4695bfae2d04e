"""Random shifts and flips of a whole batch at once, on the batch's device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """Crop at random from images padded by ``padding`` pixels of value ``background``; flip half of them if ``flip``.

    Cropping after padding is a shift by up to ``padding`` pixels in each direction. Random numbers come from PyTorch's
    global generator of the images' device, so a checkpoint of that generator covers augmentation too.
    """

    padding: int
    flip: bool
    background: float

    def __call__(self, images: Tensor) -> Tensor:
        """Augmented copies of ``images`` (batch, channels, height, width); same shape, dtype and device."""
        batch, channels, height, width = images.shape
        device = images.device
        rows = torch.arange(height, device=device) + self._offsets(batch, device)
        columns = torch.arange(width, device=device) + self._offsets(batch, device)
        if self.flip:
            flipped = torch.rand(batch, 1, device=device) < 0.5
            columns = torch.where(flipped, columns.flip(1), columns)
        padded = torch.nn.functional.pad(images, (self.padding,) * 4, value=self.background)
        samples = torch.arange(batch, device=device)[:, None, None, None]
        planes = torch.arange(channels, device=device)[None, :, None, None]
        return padded[samples, planes, rows[:, None, :, None], columns[:, None, None, :]]

    def _offsets(self, batch: int, device: torch.device) -> Tensor:
        """One corner of the crop per image, (batch, 1); ``padding`` is the middle, where nothing moves."""
        return torch.randint(0, 2 * self.padding + 1, (batch, 1), device=device)


def augmentation_for(data: str, background: float) -> Augmentation:
    """The augmentation that suits a data set: clothes may be mirrored, digits may not."""
    if data == "digits":
        return Augmentation(padding=1, flip=False, background=background)
    return Augmentation(padding=2, flip=True, background=background)
