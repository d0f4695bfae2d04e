"""The command behind the README's table of what survives rounding."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bench_rounding


def test_what_survives_is_measured_along_the_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of float32 precision lose nothing; those of bfloat16 most of it to nearest, and nothing on average."""
    monkeypatch.setattr(bench_rounding, "WEIGHTS", 2**16)
    assert bench_rounding.surviving(1.0, None) < 0.5
    # A draw has a deviation of at most half the distance of neighbours, 2^-7 below 4: six of them.
    assert bench_rounding.surviving(1.0, 1) == pytest.approx(1, abs=3 * 2**-7 / bench_rounding.RHO)
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor)
    assert bench_rounding.surviving(1.0, None) == pytest.approx(1, rel=1e-4)


def test_the_table_has_a_line_for_each_deviation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_rounding, "WEIGHTS", 64)
    bench_rounding.main()
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["deviation", "to", "nearest", "stochastically"]
    assert [line.split()[0] for line in lines] == list(map(str, bench_rounding.DEVIATIONS))
