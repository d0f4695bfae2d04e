"""One training run: building it from a config, resuming it, and running it with its checkpoints, logs and display."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from rich.console import Console

from gam_fused.cli import random_state
from gam_fused.cli.augmentation import augmentation_for
from gam_fused.cli.checkpoints import load_checkpoint, save_checkpoint, unusable_checkpoint
from gam_fused.cli.config import RunConfig, refuse_contradictions
from gam_fused.cli.data import load_dataset
from gam_fused.cli.errors import Stopped, TrainingDiverged
from gam_fused.cli.history import EpochRecord, History
from gam_fused.cli.logs import RunLog
from gam_fused.cli.models import MODELS
from gam_fused.cli.optimizers import build_optimizer
from gam_fused.cli.progress import ProgressDisplay
from gam_fused.cli.recipes import check_device, resolve
from gam_fused.cli.report import Run, results_table
from gam_fused.cli.run_folder import RunFolder
from gam_fused.cli.stopping import StopRequest, stop_on_signals
from gam_fused.cli.trainer import StepReport, Trainer


class Observer(Protocol):
    """Told of every step and every epoch. May show and record; must not change anything that the run depends on."""

    def step_done(self, report: StepReport) -> None: ...

    def epoch_done(self, history: History) -> None: ...


def new_run(given: Mapping[str, Any], folder: RunFolder) -> Trainer:
    """Start a run with the options ``given`` in ``folder``, which is created when everything else has worked."""
    folder.refuse_if_used()
    trainer = build_trainer(resolve(given))
    folder.create(trainer.config)
    return trainer


def resumed_run(given: Mapping[str, Any], folder: RunFolder) -> Trainer:
    """Continue the run in ``folder`` where its last checkpoint left it; from the beginning if it never wrote one."""
    config = folder.saved_config()
    refuse_contradictions(config, given)
    trainer = build_trainer(config, given.get("data_dir"))
    if folder.checkpoint.exists():
        state = load_checkpoint(folder.checkpoint, config)
        try:
            trainer.load_state_dict(state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            # The file is whole, so it is this program that has changed: a model, an optimizer, PyTorch.
            raise unusable_checkpoint(folder.checkpoint, "was written by another version of gam-fused") from error
    return trainer


def build_trainer(config: RunConfig, data_dir: str | None = None) -> Trainer:
    """Everything that a run of ``config`` consists of, at its beginning. ``data_dir``: where the data have moved to."""
    check_device(config.device)
    random_state.make_deterministic(config.seed, config.threads)
    device = torch.device(config.device)
    dataset = load_dataset(config.data, data_dir or config.data_dir, config.train_size, device)
    model = MODELS[config.model](dataset.shape).to(device)
    augmentation = augmentation_for(config.data, dataset.background) if config.augment else None
    return Trainer(config, dataset, model, build_optimizer(config, model), augmentation)


def run(trainer: Trainer, folder: RunFolder, quiet: bool) -> None:
    """Train to the end, with all that a user sees and finds afterwards. Raises :class:`Stopped` on Ctrl-C."""
    console = Console()
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        log = stack.enter_context(RunLog(folder, trainer.step))
        if trainer.history:
            log.rewrite(trainer.history)
        observers: list[Observer] = [log]
        if not quiet:
            _introduce(trainer, folder, console)
            epochs = trainer.config.epochs
            display = ProgressDisplay(console, epochs, trainer.step, epochs * trainer.batches)
            observers.append(stack.enter_context(display))
        train_to_end(trainer, folder, observers, stop)
    console.print(results_table([Run(folder.name, trainer.config, trainer.history)]))
    if not quiet:
        console.print(f"Curves: {folder.picture}", highlight=False)


def train_to_end(trainer: Trainer, folder: RunFolder, observers: Sequence[Observer], stop: StopRequest) -> None:
    """Run the remaining epochs and write a checkpoint after each.

    When asked to stop, finish the step, write a checkpoint, and raise :class:`Stopped`. If the test loss is no longer a
    number, raise :class:`TrainingDiverged` and keep the checkpoint before it.
    """

    def step_done(report: StepReport) -> None:
        for observer in observers:
            observer.step_done(report)

    while not trainer.finished:
        epoch_complete = trainer.train_epoch(step_done, stop.received)
        if epoch_complete:
            _refuse_divergence(trainer.end_epoch())
        save_checkpoint(folder.checkpoint, trainer.config, trainer.state_dict())
        if epoch_complete:
            for observer in observers:
                observer.epoch_done(trainer.history)
        if stop.signal is not None and not trainer.finished:
            raise Stopped(
                f"stopped at {_place(trainer)}; continue with: gam-fused train --resume --out {folder.path}",
                stop.signal,
            )


def _introduce(trainer: Trainer, folder: RunFolder, console: Console) -> None:
    weights = sum(param.numel() for param in trainer.model.parameters())
    console.print(f"Run folder: {folder.path}", highlight=False, soft_wrap=True)
    console.print(f"Settings: {trainer.config.described()}", highlight=False, soft_wrap=True)
    console.print(
        f"{len(trainer.dataset.train)} training images, {len(trainer.dataset.test)} test images, {weights} weights",
        highlight=False,
        soft_wrap=True,
    )
    if trainer.finished:
        console.print("This run is finished; nothing left to train.")
    elif trainer.step:
        console.print(f"Resuming at {_place(trainer)}", highlight=False)


def _place(trainer: Trainer) -> str:
    epoch, step = divmod(trainer.step, trainer.batches)
    return f"epoch {epoch + 1} of {trainer.config.epochs}, after {step} of {trainer.batches} steps"


def _refuse_divergence(record: EpochRecord) -> None:
    if not math.isfinite(record.test_loss):
        raise TrainingDiverged(
            f"training diverged: the test loss is {record.test_loss} after epoch {record.epoch}; try a smaller --lr"
        )
