"""What a run leaves in numbers: one record per epoch."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gam_fused.cli.atomic import write_atomically
from gam_fused.cli.errors import CommandError


@dataclass(frozen=True)
class EpochRecord:
    """One finished epoch. Only the last two fields may differ between two runs of the same config."""

    epoch: int  # from 1
    step: int  # optimizer steps since the beginning
    lr: float  # of the last step
    rho: float | None  # of the last step
    train_loss: float  # mean over the epoch's steps, as trained: with dropout, augmentation and label smoothing
    train_accuracy: float  # likewise; fraction
    test_loss: float
    test_accuracy: float  # fraction
    first_order_flatness: float  # see gam_fused.cli.evaluation
    skipped_steps: int | None  # since the beginning; None: the optimizer does not skip
    step_seconds: float  # mean time of a training step
    seconds: float  # the epoch's training, without evaluation


History = list[EpochRecord]


def write_csv(history: History, path: Path) -> None:
    """Write one row per epoch, atomically. Numbers are written so that they read back exactly."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in fields(EpochRecord)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(record) for record in history)
    write_atomically(path, text.getvalue().encode())


def read_csv(path: Path) -> History:
    """The history that :func:`write_csv` wrote; raises :class:`CommandError` if ``path`` holds something else."""
    try:
        with path.open(newline="") as file:
            return [_record(row) for row in csv.DictReader(file)]
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise CommandError(f"{path} is not the log of a training run ({error})") from error


def _record(row: dict[str, str]) -> EpochRecord:
    values: dict[str, Any] = {}
    for field in fields(EpochRecord):
        number = int if field.type in ("int", "int | None") else float
        text = row[field.name]
        values[field.name] = None if text == "" and field.type.endswith("None") else number(text)
    return EpochRecord(**values)
