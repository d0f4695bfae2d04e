"""What defines a training run: every setting that reaches the numbers, resolved, and saved with the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gam_fused.cli.atomic import write_atomically
from gam_fused.cli.errors import CommandError

MAY_CHANGE_ON_RESUME = {"data_dir"}
"""Where the data lie does not reach the numbers. Everything else does."""


@dataclass(frozen=True)
class RunConfig:
    """One training run. ``None`` marks a setting that the optimizer or the data set at hand does not have.

    The same config on the same machine gives the same bits, which is why the number of threads is part of it.
    """

    data: str
    data_dir: str | None
    train_size: int | None  # images; None: all of them
    augment: bool
    model: str
    label_smoothing: float
    optimizer: str
    base: str  # the rule that applies the gradient: for sgd and adamw, the optimizer itself
    lr: float  # the cosine schedule's peak
    lr_warmup: float  # epochs
    momentum: float | None
    weight_decay: float
    rho: float | None
    rho_warmup: float | None  # epochs
    rho_prime: float | None
    alpha: float | None
    beta: float | None
    gamma: float | None
    form: str | None
    hvp: str | None
    backend: str | None
    interval: int | None  # steps
    epochs: int
    batch_size: int
    seed: int
    threads: int
    device: str

    def save(self, path: Path) -> None:
        write_atomically(path, (json.dumps(asdict(self), indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> RunConfig:
        """The config in ``path``; raises :class:`CommandError` if it is not one that :meth:`save` wrote."""
        try:
            return cls(**json.loads(path.read_bytes()))
        except OSError as error:
            raise CommandError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, TypeError) as error:
            raise CommandError(f"{path} is not the config of a training run: {error}") from error

    def described(self) -> str:
        """The settings that this run has, on one line."""
        return ", ".join(
            f"{name.replace('_', '-')} {value}" for name, value in asdict(self).items() if value is not None
        )


def refuse_contradictions(config: RunConfig, given: Mapping[str, Any]) -> None:
    """Raise :class:`CommandError` if an option ``given`` on the command line differs from the saved ``config``.

    A longer ``--epochs`` is a contradiction too: the cosine schedule has been following the shorter run all along.
    """
    for name, value in given.items():
        saved = getattr(config, name)
        if value != saved and name not in MAY_CHANGE_ON_RESUME:
            raise CommandError(
                f"{option(name)} {value} contradicts the run to resume, which has {saved}; "
                "leave the option out, or start a new run with another --out"
            )


def option(name: str) -> str:
    """How the command line spells the setting ``name``."""
    return "--" + name.replace("_", "-")
