"""Checkpoints that cannot be used are refused, and nothing is lost on the way."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from gam_fused.cli import checkpoints
from gam_fused.cli.atomic import write_atomically
from gam_fused.cli.checkpoints import load_checkpoint, save_checkpoint
from gam_fused.cli.config import RunConfig
from gam_fused.cli.errors import CommandError
from gam_fused.cli.recipes import resolve
from tests.cli.conftest import Cli
from tests.cli.runs import SMALL, arguments, assert_bitwise_equal

DAMAGED = "is damaged, or no checkpoint of gam-fused train: put a good copy in its place, or delete it"
STATE: dict[str, Any] = {"tensor": torch.arange(100.0), "plain": [1, 0.1, None, "text", (1, 2)]}


@pytest.fixture
def config() -> RunConfig:
    return resolve({})


@pytest.fixture
def path(config: RunConfig, tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, config, STATE)
    return path


def test_round_trip(path: Path, config: RunConfig) -> None:
    assert_bitwise_equal(load_checkpoint(path, config), STATE)


def test_plain_pytorch_can_read_it(path: Path) -> None:
    assert_bitwise_equal(torch.load(path, weights_only=True)["state"], STATE)


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9])
def test_truncated_checkpoint_is_refused(keep: float, path: Path, config: RunConfig) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(CommandError, match=DAMAGED):
        load_checkpoint(path, config)


def test_a_wrong_bit_is_noticed_wherever_it_is(path: Path, config: RunConfig) -> None:
    content = bytearray(path.read_bytes())
    for position in range(0, len(content), 7):
        content[position] ^= 1 << position % 8
        path.write_bytes(content)
        with pytest.raises(CommandError, match=DAMAGED):
            load_checkpoint(path, config)
        content[position] ^= 1 << position % 8


def test_foreign_file_is_refused(path: Path, config: RunConfig) -> None:
    torch.save({"model": {}}, path)
    with pytest.raises(CommandError, match=DAMAGED):
        load_checkpoint(path, config)


def test_checkpoint_that_would_run_code_is_refused(path: Path, config: RunConfig) -> None:
    """The digest keeps accidents out, not attackers; ``weights_only`` keeps those out."""
    buffer = io.BytesIO()
    torch.save({"format": print}, buffer)
    content = buffer.getvalue()
    path.write_bytes(content + hashlib.sha256(content).digest())
    with pytest.raises(CommandError, match="cannot be loaded by this version of PyTorch"):
        load_checkpoint(path, config)


def test_checkpoint_of_another_format_is_refused(
    path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_FORMAT", "version 2")
    with pytest.raises(CommandError, match="was written by another version of gam-fused"):
        load_checkpoint(path, config)


def test_checkpoint_of_another_run_is_refused(path: Path) -> None:
    with pytest.raises(CommandError, match=r"belongs to a run with another config.json"):
        load_checkpoint(path, resolve({"seed": 1}))


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CommandError, match="file cannot be written: No space left on device"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]  # half a file would keep a full disk full


def test_content_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sync the file, then rename, then sync the folder: any other order can lose both versions in a power cut."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        calls.append("sync folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "sync file")
        fsync(descriptor)

    def recorded_replace(source: Path, target: Path) -> None:
        calls.append("rename")
        assert source.parent == target.parent
        replace(source, target)

    monkeypatch.setattr("os.fsync", recorded_fsync)
    monkeypatch.setattr("os.replace", recorded_replace)
    write_atomically(tmp_path / "file", b"content")
    assert calls == ["sync file", "rename", "sync folder"]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_resuming_from_a_damaged_checkpoint_fails_in_one_line(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert cli("train", "--out", folder, *arguments({**SMALL, "optimizer": "sgd", "epochs": 1})).code == 0
    checkpoint = folder / "checkpoint.pt"
    checkpoint.write_bytes(b"not a checkpoint")
    result = cli("train", "--resume", "--out", folder)
    assert result.code == 2
    assert result.err.splitlines() == [f"gam-fused: {checkpoint} {DAMAGED} to train from the beginning"]
    assert checkpoint.read_bytes() == b"not a checkpoint"
