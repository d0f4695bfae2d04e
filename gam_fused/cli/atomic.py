"""Writing a file so that a reader, or a machine that loses power, sees the old content or the new, never a mixture."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from gam_fused.cli.errors import CommandError


def write_atomically(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content`` in one step, durably. Raises :class:`CommandError`, and ``path`` is as before.

    The bytes go to a hidden neighbour first, because a rename is atomic only within one file system. The neighbour's
    name is fixed, so whatever a killed process left behind is overwritten by the next write instead of piling up.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):  # on a full disk, half a file must not keep it full
            partial.unlink(missing_ok=True)
        raise CommandError(f"{path} cannot be written: {error.strerror}") from error


def is_partial(path: Path) -> bool:
    """Whether ``path`` is what a process that was killed left of a file that it was writing."""
    return path.name.startswith(".") and path.name.endswith(".partial")


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable: the new name lives in the folder, not in the file."""
    if os.name == "nt":  # Windows cannot open a folder, and its file system journals renames.
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
