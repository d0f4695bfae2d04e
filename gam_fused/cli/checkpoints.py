"""Checkpoints: all that a run needs to go on bit for bit, in one file that is always whole."""

from __future__ import annotations

import hashlib
import io
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gam_fused.cli.atomic import write_atomically
from gam_fused.cli.config import RunConfig
from gam_fused.cli.errors import CommandError

_FORMAT = "gam-fused training checkpoint, version 1"
_DIGEST_SIZE = hashlib.sha256().digest_size


def save_checkpoint(path: Path, config: RunConfig, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors and plain Python values) atomically, marked as a checkpoint of ``config``.

    The file is what ``torch.save`` writes, followed by its SHA-256 digest. ``torch.load`` reads it all the same; but it
    does not look at checksums, so by itself it would accept weights with flipped bits.
    """
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, "config": asdict(config), "state": state}, buffer)
    content = buffer.getvalue()
    write_atomically(path, content + hashlib.sha256(content).digest())


def load_checkpoint(path: Path, config: RunConfig) -> dict[str, Any]:
    """The state in ``path``, its tensors on the CPU.

    Raises :class:`CommandError` if the file is damaged, is not such a checkpoint, or belongs to another run.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}") from error
    content, digest = content[:-_DIGEST_SIZE], content[-_DIGEST_SIZE:]
    if hashlib.sha256(content).digest() != digest:
        raise unusable_checkpoint(path, "is damaged, or no checkpoint of gam-fused train")
    try:
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise unusable_checkpoint(path, "cannot be loaded by this version of PyTorch") from error
    if checkpoint["format"] != _FORMAT:
        raise unusable_checkpoint(path, "was written by another version of gam-fused")
    if checkpoint["config"] != asdict(config):
        raise unusable_checkpoint(path, "belongs to a run with another config.json")
    state: dict[str, Any] = checkpoint["state"]
    return state


def unusable_checkpoint(path: Path, problem: str) -> CommandError:
    """The error for a checkpoint with a ``problem``, and the two ways out of it."""
    return CommandError(f"{path} {problem}: put a good copy in its place, or delete it to train from the beginning")
