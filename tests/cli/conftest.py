"""Fixtures of the command-line tests: the CLI run in this process, and PyTorch's global switches put back after it."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pytest
import torch

from gam_fused.cli.main import main


class Result(NamedTuple):
    code: int
    out: str
    err: str


class Cli(Protocol):
    def __call__(self, *arguments: object) -> Result: ...


@contextmanager
def global_state_put_back() -> Iterator[None]:
    """A run seeds generators and makes PyTorch deterministic for the whole process, which here is that of all tests."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    with global_state_put_back():
        yield


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """Run ``gam-fused`` with some arguments in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["gam-fused", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code: object = 0
        except SystemExit as exit_:
            code = exit_.code or 0
        assert isinstance(code, int)
        return Result(code, *capsys.readouterr())

    return run
