"""The kernel benchmark: what it counts, what it runs, what it leaves. Never how fast anything is."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_kernels
from benchmarks.arithmetic import LAUNCHES, STEPS, Tensors, arithmetic, passes
from benchmarks.shapes import SHAPES
from benchmarks.tables import aligned, number
from benchmarks.timing import Sample, Timing, measure
from gam_fused import kernels

CPU = torch.device("cpu")
RUNNABLE = [name for name in bench_kernels.BACKENDS["cpu"] if kernels.available().get(name) is None]


@pytest.fixture(autouse=True)
def _own_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------- what is counted


@pytest.mark.parametrize(
    ("name", "elements", "tensors"),
    [
        ("resnet18", 11_689_512, 62),
        ("resnet50", 25_557_032, 161),
        ("vit-b", 86_567_656, 152),
        ("gpt2", 124_439_808, 148),
        ("many-small", 140_160, 180),
    ],
)
def test_shapes_are_those_of_the_networks(name: str, elements: int, tensors: int) -> None:
    shapes = SHAPES[name]()
    assert sum(map(math.prod, shapes)) == elements
    assert len(shapes) == tensors


def test_resnet18_lists_its_shapes_in_the_order_of_the_network() -> None:
    shapes = SHAPES["resnet18"]()
    assert shapes[:4] == [(64, 3, 7, 7), (64,), (64,), (64, 64, 3, 3)]
    assert shapes[-2:] == [(1000, 512), (1000,)]
    assert [shape for shape in shapes if shape[2:] == (1, 1)] == [
        (128, 64, 1, 1),
        (256, 128, 1, 1),
        (512, 256, 1, 1),
    ]


def test_passes_of_a_whole_step_are_those_of_its_launches() -> None:
    assert {name: passes(name) for name in LAUNCHES} == {
        "l2_norm": 1,
        "perturb_": 4,
        "restore_": 2,
        "combine_": 5,
        "sgd_step_": 6,
        "adamw_step_": 8,
    }
    assert passes("whole SGD step") == 13
    assert passes("whole AdamW step") == 15
    assert passes("torch SGD") == 5
    assert passes("torch AdamW") == 7


# ---------------------------------------------------------------- what is run


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_numbers_stay_ordinary_however_often_launches_are_repeated(backend: str, dtype: torch.dtype) -> None:
    tensors = Tensors(SHAPES["tiny"](), dtype, CPU)
    for call in arithmetic(backend, tensors).calls().values():
        for _ in range(50):
            call()
    state = [*tensors.params, *tensors.directions, *tensors.grads, *tensors.momentum_buffers, *tensors.exp_avg_sqs]
    magnitudes = torch.cat([tensor.flatten() for tensor in state]).float().abs()
    assert magnitudes.isfinite().all()
    assert magnitudes.max() < 10
    assert magnitudes[magnitudes > 0].min() > 1e-20
    assert torch.cat([tensor.flatten() for tensor in tensors.params]).float().std() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("rule", ["SGD", "AdamW"])
def test_every_back_end_does_the_same_whole_step(rule: str) -> None:
    """What is compared for speed has to be the same work; the momentum shows it, as the parameters hardly move."""
    results = []
    for backend in RUNNABLE:
        tensors = Tensors(SHAPES["tiny"](), torch.float32, CPU)
        before = torch.cat([moment.flatten() for moment in tensors.exp_avgs]).clone()
        arithmetic(backend, tensors).calls()[f"whole {rule} step"]()
        results.append(torch.cat([moment.flatten() for moment in tensors.exp_avgs]))
        assert not torch.allclose(results[-1], before, rtol=1e-3)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-9)


def test_whole_steps_run_the_launches_that_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm of two lists in one launch counts as two."""
    backend = kernels.resolve("reference")
    ran: list[str] = []
    recorders: dict[str, Any] = {
        name: lambda *args, name=name, **kwargs: ran.append(name) or torch.ones(()) for name in LAUNCHES
    }
    recorders["l2_norm_pair"] = lambda *args: (backend.l2_norm(args[0]), backend.l2_norm(args[1]))
    for name, recorder in recorders.items():
        monkeypatch.setattr(type(backend), name, staticmethod(recorder))
    tensors = Tensors(SHAPES["tiny"](), torch.float32, CPU)
    for name, launches in STEPS.items():
        ran.clear()
        bench_kernels.arithmetic("reference", tensors).calls()[name]()
        assert tuple(ran) == launches


# ---------------------------------------------------------------- how it is timed


class CountingTimer:
    """Takes as many seconds as the call has been sampled times, divided by ten."""

    def __init__(self) -> None:
        self.prepared: list[object] = []
        self.sampled: list[object] = []

    def prepare(self, call: Any) -> int:
        call()
        self.prepared.append(call)
        return 7

    def sample(self, call: Any, times: int) -> Sample:
        assert times == 7
        self.sampled.append(call)
        return Sample(self.sampled.count(call) / 10, host_seconds=0.5)


def test_calls_are_timed_in_turns_and_one_that_fails_is_left_out() -> None:
    def fails() -> None:
        raise RuntimeError("no such kernel\nand more")

    timer = CountingTimer()
    calls = {"a": lambda: None, "broken": fails, "b": lambda: None}
    results = measure(calls, timer, repeats=4)
    assert results["broken"] == "no such kernel"
    assert timer.prepared == [calls["a"], calls["b"]]
    rounds = [timer.sampled[i : i + 2] for i in range(0, 8, 2)]
    assert all(set(each) == {calls["a"], calls["b"]} for each in rounds)
    assert len({tuple(each) for each in rounds}) == 2, "the order never changed"
    assert isinstance(results["a"], Timing)
    assert results["a"].quartiles == pytest.approx((0.175, 0.25, 0.325))
    assert results["a"].fastest == pytest.approx(0.1)
    assert results["a"].host_median == 0.5


# ---------------------------------------------------------------- what it leaves


def run(tmp_path: Path, *arguments: str) -> tuple[dict[str, Any], list[dict[str, str]]]:
    files = ["--json", str(tmp_path / "new" / "kernels.json"), "--csv", str(tmp_path / "kernels.csv")]
    bench_kernels.main(["--quick", "--shapes", "tiny", "--repeats", "2", "--threads", "1", *arguments, *files])
    with open(tmp_path / "kernels.csv", newline="") as file:
        return json.loads((tmp_path / "new" / "kernels.json").read_text()), list(csv.DictReader(file))


def test_quick_run_leaves_a_table_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, csv_rows = run(tmp_path, "--dtype", "fp32,bf16", "--backends", "foreach,loop")
    machine, rows = content["machine"], content["rows"]
    assert machine["torch"] == torch.__version__
    assert machine["threads"] == 1
    assert machine["cpu"]
    assert machine["device"]
    assert machine["date"].endswith("Z")
    assert {"git_commit", "build"} <= set(machine)
    assert "--dtype fp32,bf16" in machine["command"]

    launches = [*LAUNCHES, *STEPS]
    for dtype, itemsize in (("fp32", 4), ("bf16", 2)):
        measured = {(row["launch"], row["backend"]): row for row in rows if row["dtype"] == dtype}
        assert set(measured) >= {(launch, name) for launch in launches for name in ("foreach", "loop", "copy_")}
        for (launch, backend), row in measured.items():
            counted = {"copy_": 2, "torch SGD": 5, "torch AdamW": 7}.get(backend, passes(launch))
            assert row["not_run"] is None
            assert (row["passes"], row["counted_bytes"]) == (counted, counted * 1173 * itemsize)
            assert row["gb_per_s"] == pytest.approx(row["counted_bytes"] / row["median_ms"] / 1e6)
            assert row["first_quartile_ms"] <= row["median_ms"] <= row["third_quartile_ms"]
            copy = measured[launch, "copy_"]
            assert row["fraction_of_copy"] == pytest.approx(row["gb_per_s"] / copy["gb_per_s"])
            assert row["host_ms"] is None
        step = measured["sgd_step_", "loop"]
        assert step["times_as_fast_as_loop"] == 1
        foreach_ms, plain_ms = (measured["sgd_step_", name]["median_ms"] for name in ("foreach", "torch SGD"))
        assert step["times_as_fast_as_foreach"] == pytest.approx(foreach_ms / step["median_ms"])
        assert step["times_as_long_as_plain"] == pytest.approx(step["median_ms"] / plain_ms)

    by_key = {(row["dtype"], row["launch"], row["backend"]): row["median_ms"] for row in rows}
    for row in content["dtypes"]:
        wide, narrow = (by_key[dtype, row["launch"], row["backend"]] for dtype in ("fp32", "bf16"))
        assert row["fp32_ns_per_element"] == pytest.approx(wide * 1e6 / 1173)
        assert row["times_as_fast"] == pytest.approx(wide / narrow)

    assert len(csv_rows) == len(rows)
    assert [row["backend"] for row in csv_rows] == [row["backend"] for row in rows]
    assert float(csv_rows[0]["median_ms"]) == rows[0]["median_ms"]

    printed = capsys.readouterr().out
    assert "tiny, bf16: 1,173 elements in 4 tensors" in printed
    assert "whole AdamW step" in printed
    assert "tiny: time per element in each dtype" in printed


def test_back_end_that_cannot_run_has_rows_that_say_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "its kernels were left at home."
    reference = type(kernels.resolve("reference"))
    monkeypatch.setattr(reference, "unavailable_reason", staticmethod(lambda device=None: reason))
    content, _ = run(tmp_path, "--backends", "reference,foreach,abacus")
    rows = [row for row in content["rows"] if row["backend"] in ("reference", "abacus")]
    assert len(rows) == 2 * len([*LAUNCHES, *STEPS])
    assert all(row["median_ms"] is None and row["gb_per_s"] is None for row in rows)
    assert all(reason in row["not_run"] for row in rows if row["backend"] == "reference")
    assert all("abacus" in row["not_run"] for row in rows if row["backend"] == "abacus")
    assert reason in capsys.readouterr().out


def test_quick_means_few_repeats_of_small_shapes_unless_told_otherwise() -> None:
    quick, told, plain = (bench_kernels.parse(text.split()) for text in ("--quick", "--quick --shapes gpt2", ""))
    assert (quick.shapes, quick.repeats) == (["resnet18", "many-small"], 3)
    assert (told.shapes, told.repeats) == (["gpt2"], 3)
    assert plain.shapes == ["resnet18", "resnet50", "vit-b", "gpt2", "many-small"]
    assert plain.repeats > quick.repeats


@pytest.mark.parametrize("arguments", [["--shapes", "resnet51"], ["--dtype", "fp8"]])
def test_unknown_names_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_kernels.parse(arguments)
    assert repr(arguments[1]) in capsys.readouterr().err


def test_columns_are_aligned_and_numbers_have_three_digits() -> None:
    assert list(map(number, (123.4, 12.34, 1.234, 0.1234, None))) == ["123", "12.3", "1.23", "0.123", ""]
    lines = [("name", "ms"), ("a", "1.25"), ("long name", "")]
    assert list(aligned(lines, [None, None, "not run"], names=1)) == [
        "name         ms",
        "a          1.25",
        "long name  not run",
    ]
