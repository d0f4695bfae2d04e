"""The sweep behind the defaults: it resumes, its runs are comparable, its summary adds up."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch

from benchmarks import sweep_rho_alpha
from benchmarks.sweep_rho_alpha import NETWORKS, Data, Outcome, Run, read_results, split_data, summary, sweep, train
from gam_fused.cli.data import Dataset, Split
from gam_fused.cli.models import ImageShape

CONV_NET = "batchnorm-conv-net"
OUTCOME = Outcome(0.8, 0.7, 0.1, 0.5, 0.2, 0, 1.0)


@pytest.fixture
def _own_torch_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A run sets process-wide switches, which other tests should not see."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def noise(count: int) -> Split:
    return Split(torch.randn(count, 1, 14, 14), torch.arange(count) % 10)


@pytest.fixture
def data() -> Data:
    return split_data(Dataset(noise(50), noise(20), ImageShape(1, 14, 10), background=-1.0), train_images=30)


def test_training_and_validation_images_are_disjoint_and_balanced(data: Data) -> None:
    assert len(data.train) == 30
    assert len(data.validation) == 20
    assert data.train.labels.bincount().tolist() == [3] * 10
    images = torch.cat([data.train.images, data.validation.images])
    assert len(images.unique(dim=0)) == 50


@pytest.mark.usefixtures("_own_torch_settings")
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("rho", "alpha"), [(None, None), (0.1, 0.3)])
def test_three_steps_end_with_finite_numbers(network: str, rho: float | None, alpha: float | None, data: Data) -> None:
    outcome = train(Run(network, 0.01, rho, alpha, seed=0, steps=3), data)
    assert all(math.isfinite(value) for value in astuple(outcome))
    assert outcome.flatness > 0
    assert outcome.skipped_steps == 0


@pytest.mark.usefixtures("_own_torch_settings")
@pytest.mark.parametrize("network", NETWORKS)
def test_gam_without_a_penalty_repeats_the_base_optimizer(network: str, data: Data) -> None:
    """So what a point of the grid changes is due to GAM: initial weights, batches and augmentation are the same."""
    gam = Run(network, 0.01, rho=0.1, alpha=0.0, seed=1, steps=4)
    ours, base, other_seed = train(gam, data), train(gam.base, data), train(replace(gam.base, seed=2), data)
    assert ours.train_loss == pytest.approx(base.train_loss, rel=1e-5)
    assert other_seed.train_loss != pytest.approx(base.train_loss, rel=1e-3)


def test_resumed_sweep_does_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = replace(NETWORKS[CONV_NET], lrs=(0.1, 0.2), points=((0.1, 0.3), (0.2, 1.0)))
    monkeypatch.setitem(sweep_rho_alpha.NETWORKS, CONV_NET, network)
    done: list[Run] = []

    def work(runs: list[Run], limit: float = math.inf) -> Iterator[tuple[Run, Outcome]]:
        for run in runs:
            if len(done) >= limit:
                raise KeyboardInterrupt
            done.append(run)
            yield run, replace(OUTCOME, validation_accuracy=0.5 + run.lr, seconds=float(len(done)))

    path = tmp_path / "results.csv"
    for limit in (3, 6):  # in the middle of the tuning, and of the grid
        with pytest.raises(KeyboardInterrupt):
            sweep(path, lambda runs, limit=limit: work(runs, limit), [CONV_NET], [0, 1], steps=5)
        assert len(done) == limit
    for _ in range(2):
        sweep(path, work, [CONV_NET], [0, 1], steps=5)

    tuning = [Run(CONV_NET, lr, None, None, seed, 5) for seed in (0, 1) for lr in (0.1, 0.2)]
    grid = [Run(CONV_NET, 0.2, rho, alpha, seed, 5) for seed in (0, 1) for rho, alpha in network.points]
    assert done == tuning + grid
    results = read_results(path)
    assert list(results) == done
    assert [outcome.seconds for outcome in results.values()] == list(range(1, 9))


def test_summary_pairs_runs_by_seed() -> None:
    base = Run(CONV_NET, 0.1, None, None, 0, 800)
    gam = replace(base, rho=0.1, alpha=0.3)
    results = {
        base: Outcome(0.81, 0.80, 0.10, 0.50, 0.4, 0, 1.0),
        replace(base, seed=1): Outcome(0.83, 0.82, 0.20, 0.70, 0.4, 0, 1.0),
        replace(base, lr=0.2): Outcome(0.70, 0.60, 0.30, 0.50, 0.4, 0, 1.0),
        gam: Outcome(0.80, 0.81, 0.20, 0.40, 0.2, 0, 8.0),  # +1 point, flatness × 1/2
        replace(gam, seed=1): Outcome(0.80, 0.85, 0.40, 0.60, 0.05, 0, 8.0),  # +3 points, flatness × 1/8
        replace(gam, alpha=1.0): Outcome(0.80, 0.78, 0.50, 0.45, 0.4, 0, 8.0),  # -2 points
    }
    lines = summary(results).splitlines()
    assert lines[2:4] == [
        f"| {CONV_NET} | SGD | 0.1 | 2 | 82.00 ± 1.41 % | 81.00 ± 1.41 % | 0.1500 | 0.600 |",
        f"| {CONV_NET} | SGD | 0.2 | 1 | 70.00 % | 60.00 % | 0.3000 | 0.500 |",
    ]
    assert lines[-2:] == [
        f"| {CONV_NET} | 0.1 | 0.1 | 0.3 | 2 | +2.00 ± 1.41 | 0.25 | 0.3000 | 0.500 |",
        f"| {CONV_NET} | 0.1 | 0.1 | 1 | 1 | -2.00 | 1.00 | 0.5000 | 0.450 |",
    ]
