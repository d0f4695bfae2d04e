"""The folder of a run: where each of its files is, and how a folder comes to belong to a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gam_fused.cli.atomic import is_partial
from gam_fused.cli.config import RunConfig
from gam_fused.cli.errors import CommandError


@dataclass(frozen=True)
class RunFolder:
    """``path`` holds everything that one training run writes."""

    path: Path

    @property
    def name(self) -> str:
        """What tables and pictures call the run; also where ``path`` is "."."""
        return self.path.resolve().name

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.pt"

    @property
    def log(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def events(self) -> Path:
        return self.path / "tensorboard"

    @property
    def picture(self) -> Path:
        return self.path / "curves.png"

    def refuse_if_used(self) -> None:
        """Raise :class:`CommandError` if the folder exists and holds anything: a new run never overwrites.

        What a run left that was killed before it had written its settings does not count.
        """
        if self.path.exists() and (not self.path.is_dir() or not all(map(is_partial, self.path.iterdir()))):
            raise CommandError(f"{self.path} already exists; continue that run with --resume, or choose another --out")

    def create(self, config: RunConfig) -> None:
        """Make the folder that of a new run of ``config``, after :meth:`refuse_if_used`."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CommandError(f"{self.path} cannot be created: {error.strerror}") from error
        config.save(self.config)

    def saved_config(self) -> RunConfig:
        """The config of the run in this folder; raises :class:`CommandError` if there is none."""
        if not self.config.exists():
            raise CommandError(f"there is no run in {self.path} (no {self.config.name})")
        return RunConfig.load(self.config)


def default_folder(settings: Mapping[str, Any]) -> RunFolder:
    """Where a run goes that does not say where."""
    return RunFolder(Path("runs") / "-".join(str(settings[name]) for name in ("data", "model", "optimizer", "seed")))
