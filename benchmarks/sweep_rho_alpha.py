"""How rho and alpha change what a small network learns from 1,000 images: the measurement behind GAM's defaults.

    python -m benchmarks.sweep_rho_alpha --out benchmarks/results/rho_alpha_small_data.csv --workers 2
    python -m benchmarks.sweep_rho_alpha --summarise benchmarks/results/rho_alpha_small_data.csv

Two networks, each with the base optimizer that suits it, learn 1,000 Fashion-MNIST images, mirrored and shifted by a
pixel at random, for 800 steps. First the base optimizer's learning rate is tuned alone, on 5,000 other training images
(validation), and then held. Every point of the grid over rho and alpha then trains from the same seeds, hence the same
initial weights and mini-batches, as the base optimizer did. What counts is the accuracy on all 10,000 test images after
the last step, as a difference within a seed.

One row per run is appended to the CSV as it finishes. Started again, the sweep does only the runs that are not there.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gam_fused import GAM
from gam_fused.cli.augmentation import Augmentation
from gam_fused.cli.data import Dataset, Split, balanced_indices, load_dataset
from gam_fused.cli.evaluation import first_order_flatness, loss_and_accuracy
from gam_fused.cli.models import ImageShape, ResidualBlock, SpatialMean, VisionTransformer
from gam_fused.cli.random_state import epoch_order, make_deterministic
from gam_fused.cli.schedules import Schedules

TRAIN_IMAGES = 1000
VALIDATION_IMAGES = 5000
STEPS = 800
BATCH_SIZE = 64
LR_WARMUP_STEPS = 40
FLATNESS_RHO = 0.05
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Network:
    """A network, its base optimizer, the learning rates to choose from, and the (rho, alpha) points to try."""

    build: Callable[[ImageShape], nn.Module]
    base_optimizer: type[torch.optim.Optimizer]
    settings: dict[str, Any]
    lrs: tuple[float, ...]
    points: tuple[tuple[float, float], ...]


def conv_net(shape: ImageShape) -> nn.Module:
    """A residual network with BatchNorm and ReLU, 26 k parameters. Small: a GAM step costs about eight plain ones."""
    return nn.Sequential(
        nn.Conv2d(shape.channels, 16, kernel_size=3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        ResidualBlock(16, 24, stride=2),
        ResidualBlock(24, 32, stride=2),
        SpatialMean(),
        nn.Linear(32, shape.classes),
    )


def vit(shape: ImageShape) -> nn.Module:
    """A vision transformer with GELU, 19 k parameters: two blocks of width 32 on a grid of 4 × 4 patches."""
    return VisionTransformer(shape, patch=7, width=32, depth=2, heads=4, dropout=0.0)


NETWORKS = {
    "batchnorm-conv-net": Network(
        conv_net,
        torch.optim.SGD,
        {"momentum": 0.9, "weight_decay": 5e-4},
        lrs=(0.025, 0.05, 0.1, 0.2, 0.4),
        points=tuple(product((0.05, 0.1, 0.2, 0.4), (0.1, 0.3, 1.0))),
    ),
    "gelu-vit": Network(
        vit,
        torch.optim.AdamW,
        {"weight_decay": 0.05},
        lrs=(2e-3, 4e-3, 8e-3, 1.6e-2),
        points=tuple(product((0.02, 0.05, 0.1, 0.2), (0.1, 0.3, 1.0))),
    ),
}


@dataclass(frozen=True)
class Run:
    """The settings that differ between rows. ``rho`` and ``alpha`` are ``None`` for the base optimizer alone."""

    network: str
    lr: float
    rho: float | None
    alpha: float | None
    seed: int
    steps: int

    @property
    def base(self) -> Run:
        """The run of the base optimizer alone that this one is compared with."""
        return Run(self.network, self.lr, None, None, self.seed, self.steps)


@dataclass(frozen=True)
class Outcome:
    """What a run ended with. Accuracies are fractions, losses mean cross-entropies in evaluation mode."""

    validation_accuracy: float
    test_accuracy: float
    train_loss: float
    test_loss: float
    flatness: float  # first-order flatness of the training images at FLATNESS_RHO
    skipped_steps: int
    seconds: float  # of training, wall clock: whatever else the machine was doing is in it


Results = dict[Run, Outcome]


@dataclass(frozen=True)
class Data:
    """Three disjoint splits, and the augmentation of the first."""

    train: Split
    validation: Split
    test: Split
    shape: ImageShape
    augment: Augmentation


def load_data(folder: Path | None) -> Data:
    """Fashion-MNIST: the first images of each class for training, the next for validation, whatever the seed."""
    dataset = load_dataset("fashion-mnist", folder, TRAIN_IMAGES + VALIDATION_IMAGES, torch.device("cpu"))
    return split_data(dataset, TRAIN_IMAGES)


def split_data(dataset: Dataset, train_images: int) -> Data:
    """Keep ``train_images`` of the training images, in balanced classes; the others become the validation split."""
    chosen = balanced_indices(dataset.train.labels, train_images)
    is_other = torch.ones(len(dataset.train), dtype=torch.bool)
    is_other[chosen] = False
    return Data(
        dataset.train.take(chosen),
        dataset.train.take(is_other),
        dataset.test,
        dataset.shape,
        Augmentation(padding=1, flip=True, background=dataset.background),
    )


def train(run: Run, data: Data) -> Outcome:
    """Do one run: deterministic, on one thread."""
    network = NETWORKS[run.network]
    make_deterministic(run.seed, threads=1)
    model = network.build(data.shape)
    optimizer = network.base_optimizer(model.parameters(), lr=run.lr, **network.settings)
    gam = None
    if run.rho is not None and run.alpha is not None:
        gam = GAM.wrap(optimizer, rho=run.rho, alpha=run.alpha, model=model)
    schedules = Schedules(run.lr, LR_WARMUP_STEPS, run.rho, 0, run.steps)
    clock = time.perf_counter()
    for step, batch in zip(range(run.steps), _batches(data.train, run.seed), strict=False):
        schedules.apply(optimizer.param_groups, step)
        images, labels = data.augment(batch.images), batch.labels

        def closure(images: Tensor = images, labels: Tensor = labels) -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(model(images), labels)
            loss.backward()
            return loss

        (gam or optimizer).step(closure)
    seconds = time.perf_counter() - clock
    test_loss, test_accuracy = loss_and_accuracy(model, data.test)
    return Outcome(
        validation_accuracy=loss_and_accuracy(model, data.validation)[1],
        test_accuracy=test_accuracy,
        train_loss=loss_and_accuracy(model, data.train)[0],
        test_loss=test_loss,
        flatness=first_order_flatness(model, data.train, FLATNESS_RHO),
        skipped_steps=0 if gam is None else int(gam.metrics["skipped_steps"]),
        seconds=round(seconds, 1),
    )


def _batches(split: Split, seed: int) -> Iterator[Split]:
    """Mini-batches without end; each epoch has its own order and leaves out the incomplete batch."""
    epoch = 0
    while True:
        order = epoch_order(len(split), seed, epoch, torch.device("cpu"))
        for indices in order.split(BATCH_SIZE):
            if len(indices) == min(BATCH_SIZE, len(split)):
                yield split.take(indices)
        epoch += 1


def tuning_runs(names: Iterable[str], seeds: Iterable[int], steps: int) -> list[Run]:
    """The base optimizers alone, at every learning rate."""
    return [Run(name, lr, None, None, seed, steps) for seed in seeds for name in names for lr in NETWORKS[name].lrs]


def grid_runs(names: Iterable[str], seeds: Iterable[int], steps: int, results: Results) -> list[Run]:
    """GAM at every point of the grid and the tuned learning rate; all points with one seed before the next seed."""
    lrs = {name: tuned_lr(name, steps, results) for name in names}
    return [
        Run(name, lr, rho, alpha, seed, steps)
        for seed in seeds
        for name, lr in lrs.items()
        for rho, alpha in NETWORKS[name].points
    ]


def tuned_lr(name: str, steps: int, results: Results) -> float:
    """The learning rate with the best mean validation accuracy of the base optimizer alone."""
    accuracies: dict[float, list[float]] = {}
    for run, outcome in results.items():
        if (run.network, run.steps) == (name, steps) and run == run.base:
            accuracies.setdefault(run.lr, []).append(outcome.validation_accuracy)
    return max(accuracies, key=lambda lr: statistics.mean(accuracies[lr]))


def read_results(path: Path) -> Results:
    """The finished runs in the CSV; none if it does not exist."""
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {_parsed(Run, row): _parsed(Outcome, row) for row in rows}


def _parsed(kind: type[Any], row: dict[str, str]) -> Any:
    return kind(**{field.name: _value(row[field.name]) for field in fields(kind)})


def _value(text: str) -> Any:
    if text == "":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def append_result(path: Path, run: Run, outcome: Outcome) -> None:
    """Add one row, and before the first the names of the columns. What a run does not have is left empty."""
    network = NETWORKS[run.network]
    fixed = {
        "base_optimizer": network.base_optimizer.__name__,
        "base_settings": " ".join(f"{name}={value}" for name, value in network.settings.items()),
        "batch_size": BATCH_SIZE,
    }
    row = {**asdict(run), **fixed, **asdict(outcome)}
    is_new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def sweep(
    path: Path,
    work: Callable[[list[Run]], Iterable[tuple[Run, Outcome]]],
    names: Iterable[str],
    seeds: Iterable[int],
    steps: int,
) -> None:
    """Let ``work`` do all runs that are not in the CSV at ``path`` yet: the tuning, then the grid."""
    for runs_after in (lambda _: tuning_runs(names, seeds, steps), lambda done: grid_runs(names, seeds, steps, done)):
        done = read_results(path)
        missing = [run for run in runs_after(done) if run not in done]
        for count, (run, outcome) in enumerate(work(missing), start=1):
            append_result(path, run, outcome)
            print(f"{time.strftime('%X')} {count}/{len(missing)} {run} {outcome}", flush=True)


_data: Data  # of a worker process: loaded once, used by all of its runs


def _start_worker(folder: Path | None) -> None:
    global _data
    os.nice(10)
    _data = load_data(folder)


def _work(run: Run) -> tuple[Run, Outcome]:
    return run, train(run, _data)


def sweep_in_processes(path: Path, workers: int, folder: Path | None, *runs: Any) -> None:
    """:func:`sweep` in ``workers`` processes of one thread each, and its conditions beside the CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    conditions = Conditions(path.with_suffix(".json"), workers)
    with multiprocessing.get_context("spawn").Pool(workers, _start_worker, (folder,)) as pool:

        def work(missing: list[Run]) -> Iterator[tuple[Run, Outcome]]:
            for finished in pool.imap_unordered(_work, missing):
                conditions.save()
                yield finished

        sweep(path, work, *runs)


class Conditions:
    """How the CSV came about, in a JSON file beside it. A sweep that was resumed has several entries."""

    def __init__(self, path: Path, workers: int) -> None:
        self._path = path
        self._started = time.time()
        self._earlier = json.loads(path.read_text()) if path.exists() else []
        self._entry = {
            "command": shlex.join(["python", "-m", "benchmarks.sweep_rho_alpha", *sys.argv[1:]]),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cpu": _cpu_model(),
            "workers": workers,
            "train_images": TRAIN_IMAGES,
            "validation_images": VALIDATION_IMAGES,
            "lr_schedule": f"{LR_WARMUP_STEPS} steps of linear warm-up, then cosine to 0",
            "flatness_rho": FLATNESS_RHO,
        }

    def save(self) -> None:
        """Write everything up to now."""
        minutes = round((time.time() - self._started) / 60, 1)
        entries = [*self._earlier, {**self._entry, "wall_minutes": minutes}]
        self._path.write_text(json.dumps(entries, indent=2) + "\n")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


def summary(results: Results) -> str:
    """Markdown: the tuning of the base optimizers, then what each point of the grid changed."""
    return "\n".join([*_tuning_table(results), "", *_grid_table(results)])


def _tuning_table(results: Results) -> Iterator[str]:
    yield "| network | base optimizer | lr | seeds | validation accuracy | test accuracy | train loss | test loss |"
    yield "|---|---|---|---|---|---|---|---|"
    base = {run: outcome for run, outcome in results.items() if run == run.base}
    for (name, lr), runs in _grouped(base, lambda run: (run.network, run.lr)).items():
        outcomes = [results[run] for run in runs]
        validation = _mean_and_deviation([100 * outcome.validation_accuracy for outcome in outcomes])
        test = _mean_and_deviation([100 * outcome.test_accuracy for outcome in outcomes])
        train_loss = statistics.mean(outcome.train_loss for outcome in outcomes)
        test_loss = statistics.mean(outcome.test_loss for outcome in outcomes)
        optimizer = NETWORKS[name].base_optimizer.__name__
        yield (
            f"| {name} | {optimizer} | {lr:g} | {len(runs)} | {validation} % | {test} % "
            f"| {train_loss:.4f} | {test_loss:.3f} |"
        )


def _grid_table(results: Results) -> Iterator[str]:
    yield "| network | lr | rho | alpha | seeds | accuracy − base, points | flatness / base | train loss | test loss |"
    yield "|---|---|---|---|---|---|---|---|---|"
    gam = {run: outcome for run, outcome in results.items() if run != run.base}
    for (name, lr, rho, alpha), runs in _grouped(gam, lambda run: (run.network, run.lr, run.rho, run.alpha)).items():
        pairs = [(results[run], results[run.base]) for run in runs]
        gain = _mean_and_deviation([100 * (ours.test_accuracy - base.test_accuracy) for ours, base in pairs], "+")
        flatness = statistics.geometric_mean(ours.flatness / base.flatness for ours, base in pairs)
        losses = [
            statistics.mean(losses)
            for losses in zip(*((ours.train_loss, ours.test_loss) for ours, _ in pairs), strict=True)
        ]
        yield (
            f"| {name} | {lr:g} | {rho:g} | {alpha:g} | {len(runs)} | {gain} | {flatness:.2f} "
            f"| {losses[0]:.4f} | {losses[1]:.3f} |"
        )


def _grouped(results: Results, key: Callable[[Run], tuple[Any, ...]]) -> dict[tuple[Any, ...], list[Run]]:
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in sorted(results, key=key):
        groups.setdefault(key(run), []).append(run)
    return groups


def _mean_and_deviation(values: list[float], sign: str = "") -> str:
    """Mean ± sample standard deviation over seeds; one value has no deviation."""
    mean = f"{statistics.mean(values):{sign}.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep_rho_alpha", description=__doc__.splitlines()[0])
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--out", type=Path, metavar="CSV", help="sweep, appending to this file")
    task.add_argument("--summarise", type=Path, metavar="CSV", help="print a Markdown table of what is in this file")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default: %(default)s)")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    parser.add_argument("--data-dir", type=Path, help="folder of Fashion-MNIST's IDX files (default: Debian's)")
    options = parser.parse_args()
    if options.summarise:
        print(summary(read_results(options.summarise)))
    else:
        runs = options.networks, options.seeds, options.steps
        sweep_in_processes(options.out, options.workers, options.data_dir, *runs)


if __name__ == "__main__":
    main()
