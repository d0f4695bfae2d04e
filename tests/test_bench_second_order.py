"""The command that measures second-order layers, on small ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import bench_second_order
from benchmarks.bench_second_order import LAYERS, double_backward, main


@pytest.fixture(autouse=True)
def small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, layer in LAYERS.items():
        shape = (2, *bench_second_order.IMAGES[1:2], 3, 3) if len(layer.shape) == 4 else (2, 3, *layer.shape[2:])
        monkeypatch.setitem(LAYERS, name, dataclasses.replace(layer, shape=shape))


@pytest.mark.parametrize("name", LAYERS)
def test_both_sides_do_the_same(name: str) -> None:
    layer = LAYERS[name]
    calls = [double_backward(layer, function, "fp64") for function in (layer.theirs, layer.ours)]
    for one, other in zip(*(call() for call in calls), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_prints_a_line_for_each_layer_and_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results" / "layers.json"
    main(["--repeats", "2", "--dtype", "fp32,bf16", "--layers", "batch_norm,rms_norm", "--json", str(file)])
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("batch_norm ", "rms_norm ")) for line in printed) == 4
    content = json.loads(file.read_text())
    assert content["machine"]["command"].startswith("python -m benchmarks.bench_second_order")
    assert [(row["layer"], row["dtype"]) for row in content["rows"]] == [
        ("batch_norm", "fp32"),
        ("batch_norm", "bf16"),
        ("rms_norm", "fp32"),
        ("rms_norm", "bf16"),
    ]
    for row in content["rows"]:
        assert row["times_as_fast"] == pytest.approx(row["pytorch_ms"] / row["fused_ms"])


def test_unknown_layers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--layers", "sync_batch_norm"])
    assert "'sync_batch_norm' is none of batch_norm" in capsys.readouterr().err
