"""A run that was stopped, killed or cut off in mid-write continues as if nothing had happened, to the last bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gam_fused.cli.checkpoints import save_checkpoint
from gam_fused.cli.errors import CommandError
from gam_fused.cli.run_folder import RunFolder
from gam_fused.cli.training import new_run, resumed_run, run
from tests.cli.conftest import Cli, global_state_put_back
from tests.cli.runs import SMALL, arguments, assert_bitwise_equal, outcome
from tests.cli.test_data import write_fashion_mnist

ROOT = Path(__file__).parents[2]
STEPS_PER_EPOCH = SMALL["train_size"] // SMALL["batch_size"]
MID_EPOCH = STEPS_PER_EPOCH + 3

OPTIMIZERS = {
    "sgd": {"optimizer": "sgd"},
    "gam": {"optimizer": "gam", "rho_warmup": 2.0, "interval": 2},
}


@pytest.fixture(scope="module", params=OPTIMIZERS)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {**SMALL, **OPTIMIZERS[request.param]}


@pytest.fixture(scope="module")
def uninterrupted(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = RunFolder(tmp_path_factory.mktemp("uninterrupted") / "run")
    with global_state_put_back():
        run(new_run(options, folder), folder, quiet=True)
    return outcome(folder.path)


def _interrupt(point: str, count: int, folder: Path, options: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).with_name("interrupted_cli.py")
    command = [sys.executable, script, point, str(count), "train", "--out", folder, *arguments(options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, text=True, capture_output=True, check=False)


def test_killed_in_an_epoch(options: dict[str, Any], uninterrupted: dict[str, Any], cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert _interrupt("SIGKILL", MID_EPOCH, folder, options).returncode == -signal.SIGKILL
    assert cli("train", "--resume", "--quiet", "--out", folder).code == 0
    assert_bitwise_equal(outcome(folder), uninterrupted)


def test_killed_while_writing_a_checkpoint(
    options: dict[str, Any], uninterrupted: dict[str, Any], cli: Cli, tmp_path: Path
) -> None:
    """The half-written file is there, and beside it the previous checkpoint, whole."""
    folder = tmp_path / "run"
    assert _interrupt("write", 2, folder, options).returncode == -signal.SIGKILL
    half, whole = folder / ".checkpoint.pt.partial", folder / "checkpoint.pt"
    assert 0 < half.stat().st_size < whole.stat().st_size
    assert len(torch.load(whole, weights_only=True)["state"]["history"]) == 1
    assert cli("train", "--resume", "--quiet", "--out", folder).code == 0
    assert_bitwise_equal(outcome(folder), uninterrupted)
    assert not half.exists()


def test_ctrl_c_in_an_epoch(options: dict[str, Any], uninterrupted: dict[str, Any], cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    stopped = _interrupt("SIGINT", MID_EPOCH, folder, options)
    assert stopped.returncode == 130
    assert stopped.stderr.splitlines() == [
        f"gam-fused: stopped at epoch 2 of 3, after 3 of {STEPS_PER_EPOCH} steps; "
        f"continue with: gam-fused train --resume --out {folder}"
    ]
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["state"]["progress"]["batches"] == 3
    resumed = cli("train", "--resume", "--out", folder)
    assert f"Resuming at epoch 2 of 3, after 3 of {STEPS_PER_EPOCH} steps" in resumed.out
    assert_bitwise_equal(outcome(folder), uninterrupted)


def test_killed_before_the_first_checkpoint(cli: Cli, tmp_path: Path) -> None:
    """There is a config and nothing else: the run begins again, as the same run."""
    folder, options = tmp_path / "run", {**SMALL, "optimizer": "sgd", "epochs": 1}
    assert cli("train", "--quiet", "--out", folder, *arguments(options)).code == 0
    complete = outcome(folder)
    for path in folder.iterdir():
        if path.is_file() and path.name != "config.json":
            path.unlink()
    assert cli("train", "--resume", "--quiet", "--out", folder).code == 0
    assert_bitwise_equal(outcome(folder), complete)


def test_finished_run_says_so_and_reports(cli: Cli, tmp_path: Path) -> None:
    folder, options = tmp_path / "run", {**SMALL, "optimizer": "sgd", "epochs": 1}
    assert cli("train", "--quiet", "--out", folder, *arguments(options)).code == 0
    checkpoint, log = (folder / "checkpoint.pt").read_bytes(), (folder / "metrics.csv").read_bytes()
    (folder / "metrics.csv").unlink()
    again = cli("train", "--resume", "--out", folder)
    assert again.code == 0
    assert "This run is finished; nothing left to train." in again.out
    assert "test accuracy" in again.out
    assert (folder / "checkpoint.pt").read_bytes() == checkpoint
    assert (folder / "metrics.csv").read_bytes() == log


def test_data_may_have_moved(tmp_path: Path) -> None:
    """The place of the data is not part of the run, so naming another one neither contradicts it nor sticks to it."""
    (tmp_path / "old").mkdir()
    write_fashion_mnist(tmp_path / "old")
    options = {"data": "fashion-mnist", "data_dir": str(tmp_path / "old"), "model": "mlp", "batch_size": 10}
    folder = RunFolder(tmp_path / "run")
    trainer = new_run(options, folder)
    save_checkpoint(folder.checkpoint, trainer.config, trainer.state_dict())
    for place in ("new", "newer"):
        moved = (tmp_path / "old").rename(tmp_path / place)
        trainer = resumed_run({"data_dir": str(moved)}, folder)
        save_checkpoint(folder.checkpoint, trainer.config, trainer.state_dict())
        moved.rename(tmp_path / "old")
    with pytest.raises(CommandError, match="not found"):
        resumed_run({"data_dir": str(tmp_path / "nowhere")}, folder)


def test_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    trainer = new_run({**SMALL, "optimizer": "sgd"}, folder)
    for part in ("model", "optimizer", "progress"):
        state = trainer.state_dict()
        state[part] = {"unknown": torch.zeros(1)}
        save_checkpoint(folder.checkpoint, trainer.config, state)
        with pytest.raises(CommandError, match="was written by another version of gam-fused"):
            resumed_run({}, folder)
