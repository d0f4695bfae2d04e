"""The commands as a user meets them: help, errors, run folders, the final tables."""

from __future__ import annotations

import builtins
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gam_fused
from gam_fused import kernels
from gam_fused.cli.config import RunConfig, option
from gam_fused.cli.history import read_csv
from gam_fused.cli.recipes import IN_WORDS
from gam_fused.kernels import extension
from tests.cli.conftest import Cli
from tests.cli.runs import SMALL, arguments

QUICK = {**SMALL, "optimizer": "sgd", "epochs": 1, "train_size": 40}


def _plain(text: str) -> str:
    """Rich's output on one line, without its boxes."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def test_help_states_every_option_and_its_default(cli: Cli) -> None:
    text = _plain(cli("train", "--help").out)
    described = {name: f"Default: {default}." for name, default in IN_WORDS.items()}
    described.update(out="Default: runs/DATA-MODEL-OPTIMIZER-SEED.", resume="Default: off.", quiet="Default: off.")
    assert set(described) == {*RunConfig.__dataclass_fields__, "out", "resume", "quiet"}
    for name, default in described.items():
        start = text.index(f" {option(name)} ") + 1
        assert default in re.split(r" --(?!no-)[a-z-]+ [<]", text[start:])[0], name


@pytest.mark.parametrize("command", ["train", "compare", "info"])
def test_commands_are_listed(command: str, cli: Cli) -> None:
    assert f" {command} " in _plain(cli("--help").out)


def test_run_writes_what_it_promises_and_prints_its_results(cli: Cli, tmp_path: Path) -> None:
    result = cli("train", *arguments(QUICK))
    assert result.code == 0
    assert result.err == ""
    folder = tmp_path / "runs" / "digits-mlp-sgd-0"
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint.pt",
        "config.json",
        "curves.png",
        "metrics.csv",
        "tensorboard",
    ]
    assert json.loads((folder / "config.json").read_text())["lr"] == 0.1  # resolved, not None
    assert "Settings: data digits, train-size 40," in result.out
    [record] = read_csv(folder / "metrics.csv")
    table = _plain(result.out.replace("┃", " "))
    assert f"test accuracy {record.test_accuracy:.2%}" in table
    assert f"first-order flatness {record.first_order_flatness:.4f}" in table
    assert (
        f"epoch 1/1: train loss {record.train_loss:.3f}, accuracy {record.train_accuracy:.1%}; "
        f"test loss {record.test_loss:.3f}, accuracy {record.test_accuracy:.1%}; "
        f"flatness {record.first_order_flatness:.4f}; "
    ) in result.out
    assert "\x1b" not in result.out  # not a terminal: no colours, no bar


def test_a_folder_of_a_run_that_died_before_its_settings_were_written_may_be_used(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.partial").write_bytes(b"{")
    assert cli("train", "--out", tmp_path / "run", *arguments(QUICK)).code == 0


def test_resuming_without_the_device_of_the_run_fails_in_one_line(cli: Cli, tmp_path: Path) -> None:
    cli("train", "--out", tmp_path / "run", *arguments(QUICK))
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace('"device": "cpu"', '"device": "nowhere"'))
    failed = cli("train", "--resume", "--out", tmp_path / "run")
    assert failed.code == 2
    assert failed.err.startswith("gam-fused: --device nowhere cannot be used: ")
    assert failed.err.count("\n") == 1


def test_a_full_disk_under_tensorboard_ends_the_run_in_one_line(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.flush", full)
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.close", full)
    result = cli("train", "--out", tmp_path / "run", *arguments(QUICK))
    assert result.code == 2
    assert result.err == f"gam-fused: {tmp_path}/run/tensorboard cannot be written: No space left on device\n"


def test_quiet_prints_the_table_and_nothing_else(cli: Cli) -> None:
    lines = cli("train", "--quiet", *arguments(QUICK)).out.splitlines()
    assert lines[0].startswith("┏")
    assert "lower is flatter" in lines[-1]
    assert not any(line.startswith(("epoch", "Run folder", "Settings")) for line in lines)


def test_existing_folder_is_not_overwritten(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "precious").write_text("data")
    result = cli("train", "--out", folder, *arguments(QUICK))
    assert result == (
        2,
        "",
        f"gam-fused: {folder} already exists; continue that run with --resume, or choose another --out\n",
    )
    assert [path.name for path in folder.iterdir()] == ["precious"]


def test_empty_folder_may_be_used(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert cli("train", "--out", tmp_path / "run", *arguments(QUICK)).code == 0


def test_contradicting_option_on_resume_is_named_and_changes_nothing(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert cli("train", "--out", folder, *arguments(QUICK)).code == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    result = cli("train", "--resume", "--out", folder, "--epochs", 5)
    assert result.code == 2
    assert result.err == (
        "gam-fused: --epochs 5 contradicts the run to resume, which has 1; "
        "leave the option out, or start a new run with another --out\n"
    )
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert cli("train", "--resume", "--out", folder, *arguments(QUICK)).code == 0  # agreeing options are welcome


@pytest.mark.parametrize(
    ("arguments_", "message"),
    [
        (["--resume", "--out", "nowhere"], "there is no run in nowhere (no config.json)"),
        (["--epochs", 0], "--epochs 0: must be 1 or more"),
        (["--batch-size", 5000], "--batch-size 5000: there are only 1442 training images"),
        (["--optimizer", "sgd", "--rho", 0.1], "--rho has no effect with --optimizer sgd; leave it out"),
        (["--backend", "nonsense"], "GAM: backend must be one of"),
        (["--device", "nonsense"], "--device nonsense cannot be used"),
        (["--out", "/dev/null/run"], "/dev/null/run cannot be created: Not a directory"),
    ],
)
def test_bad_request_gets_one_line_and_no_folder(arguments_: list[Any], message: str, cli: Cli, tmp_path: Path) -> None:
    result = cli("train", *arguments_)
    assert result.code == 2
    assert result.err.startswith(f"gam-fused: {message}")
    assert len(result.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments_", [["--model", "vgg"], ["--epochs", "many"], ["--learning-rate", "1"]])
def test_option_that_cannot_be_parsed_is_named(arguments_: list[str], cli: Cli) -> None:
    result = cli("train", *arguments_)
    assert result.code == 2
    assert arguments_[0] in result.err
    assert "Traceback" not in result.err


def test_diverged_training_stops_and_keeps_the_last_checkpoint(cli: Cli, tmp_path: Path) -> None:
    options = {**QUICK, "lr": 1e20, "momentum": 0.0}
    result = cli("train", "--out", tmp_path / "run", *arguments(options))
    assert result.code == 1
    assert result.err == ("gam-fused: training diverged: the test loss is nan after epoch 1; try a smaller --lr\n")
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_skipped_steps_are_counted_and_reported(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GAM skips a step whose loss is not finite; the run goes on and its records say so."""
    original = torch.nn.functional.cross_entropy
    calls = iter(range(10**6))

    def poisoned(*inputs: Any, **settings: Any) -> torch.Tensor:
        loss = original(*inputs, **settings)
        return loss * float("inf") if loss.requires_grad and next(calls) == 2 else loss

    monkeypatch.setattr("torch.nn.functional.cross_entropy", poisoned)
    result = cli("train", "--out", tmp_path / "run", *arguments({**QUICK, "optimizer": "gam"}))
    assert result.code == 0
    assert read_csv(tmp_path / "run" / "metrics.csv")[0].skipped_steps == 1
    assert "skipped steps 1" in _plain(result.out)


def test_compare_puts_runs_side_by_side(cli: Cli, tmp_path: Path) -> None:
    for optimizer in ("sgd", "gam"):
        cli("train", "--quiet", "--out", tmp_path / optimizer, *arguments({**QUICK, "optimizer": optimizer}))
    result = cli("compare", tmp_path / "sgd", tmp_path / "gam", "--out", tmp_path / "both.png")
    assert result.code == 0
    sgd, gam = (read_csv(tmp_path / name / "metrics.csv")[-1] for name in ("sgd", "gam"))
    assert f"test loss {sgd.test_loss:.4f} {gam.test_loss:.4f}" in _plain(result.out)
    assert "optimizer sgd gam on sgd" in _plain(result.out)
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert cli("compare", tmp_path / "sgd", "--out", tmp_path / "nowhere" / "a.png") == (
        2,
        "",
        f"gam-fused: {tmp_path}/nowhere/a.png cannot be written: No such file or directory\n",
    )


@pytest.mark.parametrize("out", [".", "picture.svg"])
def test_compare_refuses_to_write_anything_but_a_png(out: str, cli: Cli, tmp_path: Path) -> None:
    result = cli("compare", tmp_path, "--out", out)
    assert (result.code, result.err) == (2, f"gam-fused: --out {out}: must be a file whose name ends in .png\n")


@pytest.mark.parametrize("setup", [lambda path: None, lambda path: path.mkdir()], ids=["missing", "empty"])
def test_compare_refuses_what_is_not_a_run(setup: Callable[[Path], None], cli: Cli, tmp_path: Path) -> None:
    setup(tmp_path / "run")
    result = cli("compare", tmp_path / "run")
    assert result.code == 2
    assert result.err.startswith(f"gam-fused: there is no run in {tmp_path}/run")


def test_compare_refuses_a_run_without_results(cli: Cli, tmp_path: Path) -> None:
    cli("train", "--out", tmp_path / "run", *arguments(QUICK))
    (tmp_path / "run" / "metrics.csv").unlink()
    result = cli("compare", tmp_path / "run")
    assert result == (2, "", f"gam-fused: {tmp_path}/run has no finished epoch yet\n")


def test_info_names_versions_and_every_back_end(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available", lambda: {"good": None, "bad": "no such machine"})
    text = _plain(cli("info").out)
    assert f"gam_fused {gam_fused.__version__}" in text
    assert f"torch {torch.__version__}" in text
    assert "back end good available" in text
    assert "back end bad not available: no such machine" in text


def test_info_says_how_the_kernels_were_built_or_why_they_are_missing(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"compiler": "g++ 1", "torch": "9.9", "abi": "2.10", "flags": "-O9", "cuda": "13.0", "architectures": "9.0"}
    monkeypatch.setattr(extension, "build_info", lambda: facts)
    monkeypatch.setattr(extension, "cuda_unavailable_reason", lambda: None)
    text = _plain(cli("info").out)
    assert "native build by g++ 1 against torch 9.9, for torch 2.10 and newer" in text
    assert "native flags -O9" in text
    assert "native CUDA toolkit 13.0, for 9.0" in text
    monkeypatch.setattr(extension, "cuda_unavailable_reason", lambda: "no nvcc.")
    assert "native CUDA none: no nvcc." in _plain(cli("info").out)
    monkeypatch.setattr(extension, "direct_unavailable_reason", lambda: None)
    assert "past the dispatcher small, plain CPU tensors" in _plain(cli("info").out)
    monkeypatch.setattr(extension, "direct_unavailable_reason", lambda: "built for another.")
    assert "past the dispatcher built for another." in _plain(cli("info").out)
    monkeypatch.setattr(extension, "build_info", lambda: None)
    monkeypatch.setattr(extension, "unavailable_reason", lambda: "no compiler.")
    assert "native build none: no compiler." in _plain(cli("info").out)


def test_info_reports_an_impossible_environment_variable(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAM_FUSED_BACKEND", "nonsense")
    result = cli("info")
    assert result.code == 0
    assert "fails: GAM_FUSED_BACKEND must be one of" in _plain(result.out)


@pytest.mark.parametrize("module", ["typer", "rich", "matplotlib", "sklearn", "tensorboard"])
def test_missing_extra_is_explained(module: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def import_(name: str, *rest: Any, **settings: Any) -> Any:
        if name.split(".")[0] == module:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(name, *rest, **settings)

    for name in list(sys.modules):
        if name.startswith(("gam_fused.cli", "torch.utils.tensorboard")) or name.split(".")[0] == module:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", import_)
    result = cli("train", *arguments(QUICK))
    assert result.code == 2
    assert re.fullmatch(
        rf'gam-fused: the command line needs {module}[.\w]*; pip install "gam-fused\[cli\]"\n', result.err
    )


def test_library_does_not_import_the_command_line() -> None:
    code = "import gam_fused, sys; assert not {'typer', 'rich', 'matplotlib', 'gam_fused.cli'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(gam_fused.__file__).parents[1])
