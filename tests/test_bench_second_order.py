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
    assert content["settings"]["fused"] in ("native", "formulas")
    assert f"fused: {content['settings']['fused']}" in printed
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


@pytest.mark.cuda
def test_measures_on_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--repeats", "2", "--device", "cuda"])
    assert len([line for line in capsys.readouterr().out.splitlines() if " fp32 " in line]) == len(LAYERS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--device", "cuda"])
    assert "--device cuda: PyTorch sees no CUDA device here" in capsys.readouterr().err
