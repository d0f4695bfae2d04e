"""The training loop. It knows nothing of files, screens or signals: see :mod:`gam_fused.cli.training` for those."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gam_fused.cli import random_state
from gam_fused.cli.augmentation import Augmentation
from gam_fused.cli.config import RunConfig
from gam_fused.cli.data import Dataset, balanced_indices
from gam_fused.cli.errors import CommandError
from gam_fused.cli.evaluation import first_order_flatness, loss_and_accuracy
from gam_fused.cli.history import EpochRecord, History
from gam_fused.cli.optimizers import TrainingOptimizer
from gam_fused.cli.schedules import Schedules

FLATNESS_IMAGES = 512
"""How many training images the flatness at the end of an epoch is measured on: always the same ones."""


@dataclass
class EpochProgress:
    """What an epoch has added up so far."""

    loss_sum: Tensor  # 0-d float64, over the steps
    correct: Tensor  # 0-d int64, images classified correctly
    batches: int = 0
    seconds: float = 0.0

    @classmethod
    def empty(cls, device: torch.device) -> EpochProgress:
        return cls(
            loss_sum=torch.zeros((), dtype=torch.float64, device=device),
            correct=torch.zeros((), dtype=torch.int64, device=device),
        )


@dataclass(frozen=True)
class StepReport:
    """One finished step. The methods read the training device, and so wait for it: do not call them for every step."""

    step: int  # from 1, since the beginning
    epoch: int  # from 1
    lr: float
    step_loss: Tensor
    progress: EpochProgress  # moves on with the next step
    batch_size: int
    metrics: dict[str, Tensor]  # GAM's; empty for other optimizers

    def loss(self) -> float:
        """Of this step's mini-batch."""
        return self.step_loss.item()

    def mean_loss(self) -> float:
        """Over the epoch so far."""
        return self.progress.loss_sum.item() / self.progress.batches

    def accuracy(self) -> float:
        """Fraction of the epoch's images classified correctly so far."""
        return self.progress.correct.item() / (self.progress.batches * self.batch_size)

    def step_seconds(self) -> float:
        """Mean over the epoch so far."""
        return self.progress.seconds / self.progress.batches

    def flatness(self) -> float | None:
        """First-order flatness of the last flatness step's mini-batch at its rho; ``None`` if there is no such."""
        flatness = self.metrics.get("first_order_flatness")
        return None if flatness is None else flatness.item()


@dataclass
class Trainer:
    """Trains ``model`` as ``config`` says. ``history`` has a record for each finished epoch."""

    config: RunConfig
    dataset: Dataset
    model: nn.Module
    optimizer: TrainingOptimizer
    augmentation: Augmentation | None
    history: History = field(default_factory=list)

    def __post_init__(self) -> None:
        config, train = self.config, self.dataset.train
        self.batches = len(train) // config.batch_size  # the order is new each epoch, so no image is left out for good
        if self.batches == 0:
            raise CommandError(f"--batch-size {config.batch_size}: there are only {len(train)} training images")
        self._schedules = Schedules(
            lr=config.lr,
            lr_warmup_steps=round(config.lr_warmup * self.batches),
            rho=config.rho,
            rho_warmup_steps=round((config.rho_warmup or 0) * self.batches),
            total_steps=config.epochs * self.batches,
        )
        self._criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        self._device = train.labels.device
        self._progress = EpochProgress.empty(self._device)
        self._flatness_split = train.take(balanced_indices(train.labels, FLATNESS_IMAGES))

    @property
    def step(self) -> int:
        """Finished steps since the beginning."""
        return len(self.history) * self.batches + self._progress.batches

    @property
    def finished(self) -> bool:
        return len(self.history) == self.config.epochs

    def train_epoch(self, step_done: Callable[[StepReport], None], should_stop: Callable[[], bool]) -> bool:
        """Do the rest of the current epoch's steps. ``False`` if ``should_stop``, asked after each, left any."""
        epoch, size, batch_size = len(self.history), len(self.dataset.train), self.config.batch_size
        order = random_state.epoch_order(size, self.config.seed, epoch, self._device)
        self.model.train()
        clock = time.perf_counter()
        for batch in range(self._progress.batches, self.batches):
            loss = self._train_step(order[batch * batch_size : (batch + 1) * batch_size])
            clock, before = time.perf_counter(), clock
            self._progress.batches += 1
            self._progress.seconds += clock - before
            step_done(self._report(loss))
            if should_stop():
                break
        return self._progress.batches == self.batches

    def end_epoch(self) -> EpochRecord:
        """Evaluate, add the epoch's record to the history, and begin the next epoch."""
        progress, last_step = self._progress, self.step - 1
        skipped = self._metrics.get("skipped_steps")
        # Reading the sums waits for the device, so that the time below is that of finished work.
        clock = time.perf_counter()
        loss_sum, correct = progress.loss_sum.item(), progress.correct.item()
        seconds = progress.seconds + time.perf_counter() - clock
        test_loss, test_accuracy = loss_and_accuracy(self.model, self.dataset.test)
        record = EpochRecord(
            epoch=len(self.history) + 1,
            step=self.step,
            lr=self._schedules.lr_at(last_step),
            rho=self._schedules.rho_at(last_step),
            train_loss=loss_sum / progress.batches,
            train_accuracy=correct / (progress.batches * self.config.batch_size),
            test_loss=test_loss,
            test_accuracy=test_accuracy,
            first_order_flatness=first_order_flatness(self.model, self._flatness_split),
            skipped_steps=None if skipped is None else int(skipped.item()),
            step_seconds=seconds / progress.batches,
            seconds=seconds,
        )
        self.history.append(record)
        self._progress = EpochProgress.empty(self._device)
        return record

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on, as tensors and plain values. Schedules follow from the step."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": random_state.capture(),
            "progress": vars(self._progress),
            "history": [asdict(record) for record in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned, bit for bit."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        random_state.restore(state["random"])
        progress = EpochProgress(**state["progress"])
        progress.loss_sum = progress.loss_sum.to(self._device)
        progress.correct = progress.correct.to(self._device)
        self._progress = progress
        self.history = [EpochRecord(**record) for record in state["history"]]

    def _train_step(self, indices: Tensor) -> Tensor:
        batch = self.dataset.train.take(indices)
        # Once per step, outside the closure: every pass of an optimizer must see the same images.
        images = batch.images if self.augmentation is None else self.augmentation(batch.images)
        self._schedules.apply(self.optimizer.param_groups, self.step)
        passes: list[Tensor] = []

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            logits = self.model(images)
            loss = self._criterion(logits, batch.labels)
            loss.backward()
            passes.append(logits.detach())
            return loss

        loss: Tensor = self.optimizer.step(closure).detach()
        # The first pass is at θ; what later passes of SAM and GAM see is not the model that is being trained.
        self._progress.correct += (passes[0].argmax(dim=1) == batch.labels).sum()
        self._progress.loss_sum += loss
        return loss

    def _report(self, loss: Tensor) -> StepReport:
        return StepReport(
            step=self.step,
            epoch=len(self.history) + 1,
            lr=self.optimizer.param_groups[0]["lr"],
            step_loss=loss,
            progress=self._progress,
            batch_size=self.config.batch_size,
            metrics=self._metrics,
        )

    @property
    def _metrics(self) -> dict[str, Tensor]:
        return getattr(self.optimizer, "metrics", {})
