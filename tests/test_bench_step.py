"""The step benchmark: what it compares, what it counts, what it leaves. Never how fast anything is."""

from __future__ import annotations

import csv
import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import bench_step
from benchmarks.packages import NotInstalled, imported
from benchmarks.step_contenders import (
    ALPHA,
    COMPILED,
    CONTENDERS,
    INTERVAL,
    NAIVE,
    RHO,
    STEPS,
    Build,
    Run,
    Settings,
    WrongStep,
    difference_from_naive,
    gam,
    gam_compiled,
    sgd_compiled,
    start,
)
from benchmarks.step_costs import count_operators, step_memory
from benchmarks.step_models import MODELS, Problem, problem
from benchmarks.timing import Sample, Timing
from gam_fused import GAM
from tests import literal

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
EAGER = (
    "gradient,gradient-hvp,gradient-hvp-of-gam,sgd,naive-gam,gam-exact,accelerated-gam,gam-finite-difference,"
    "gam-exact-interval-4"
)
OF_OTHERS = {"pytorch_optimizer-sam": "pytorch_optimizer", "infty-gam": "infty"}


@pytest.fixture(autouse=True)
def _own_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny() -> Problem:
    return problem("tiny", CPU)


def double(of: Problem) -> Problem:
    return of.copy().to(CPU, torch.float64)


# ---------------------------------------------------------------- what is run


def test_models_are_those_that_are_named() -> None:
    sizes = {}
    for name in ("resnet-8", "resnet-64", "mlp", "transformer"):
        of = problem(name, CPU)
        sizes[name] = sum(param.numel() for param in of.params), len(of.inputs)
    assert sizes == {
        "resnet-8": (175_258, 8),
        "resnet-64": (175_258, 64),
        "mlp": (784 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10, 128),
        "transformer": (867_328, 16),
    }


def test_a_problem_is_the_same_each_time_and_its_copies_share_no_weights(tiny: Problem) -> None:
    again, copied = problem("tiny", CPU), tiny.copy()
    for a, b, c in zip(tiny.params, again.params, copied.params, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert c.data_ptr() != a.data_ptr()
    assert torch.equal(tiny.loss(), again.loss())
    assert torch.equal(tiny.inputs, again.inputs)


def test_making_a_problem_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    problem("tiny", CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_naive_step_is_the_literal_one(tiny: Problem) -> None:
    own = double(tiny)
    loss = literal.as_function(own.model, lambda model: own.loss_of(model(own.inputs), own.targets))
    expected = literal.step(loss, own.params, rho=RHO, alpha=ALPHA, lr=0.1)
    CONTENDERS[NAIVE](own, Settings(lr=0.1, momentum=0.0, weight_decay=0.0)).call()
    literal.assert_equal_to_rounding(own.params, expected)


@pytest.mark.parametrize("name", ["gradient-hvp", "gradient-hvp-of-gam"])
def test_hvp_is_that_of_the_gradient(name: str, tiny: Problem) -> None:
    own = double(tiny)
    grads = torch.autograd.grad(own.loss(), own.params, create_graph=True)
    half_square = torch.cat([grad.flatten() for grad in grads]).square().sum() / 2  # whose gradient is H g
    expected = torch.autograd.grad(half_square, own.params)
    result: Any = CONTENDERS[name](own, Settings()).call()
    literal.assert_equal_to_rounding(result if name.endswith("gam") else result[1], expected)


def test_derivatives_alone_move_nothing(tiny: Problem) -> None:
    for name in CONTENDERS.keys() - STEPS.keys():
        own = tiny.copy()
        CONTENDERS[name](own, Settings()).call()
        literal.assert_equal_bits(own.params, tiny.params)


def test_interval_takes_one_step_with_the_flatness_term_for_several(tiny: Problem) -> None:
    calls = 0

    class Counting(Problem):
        def loss(self) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return super().loss()

    run = CONTENDERS[f"gam-exact-interval-{INTERVAL}"](Counting(tiny.model, tiny.inputs, tiny.targets), Settings())
    run.call()
    assert run.steps == INTERVAL
    assert calls == INTERVAL + 1


def test_numbers_stay_ordinary_however_often_steps_are_repeated(tiny: Problem) -> None:
    for name in EAGER.split(","):
        own = tiny.copy()
        run = CONTENDERS[name](own, Settings())
        for _ in range(20):
            run.call()
        torch.testing.assert_close(own.params, tiny.params, rtol=0, atol=1e-2)


# ---------------------------------------------------------------- what others offer

STAND_IN = """
import torch

class GAM(torch.optim.Optimizer):
    def __init__(self, params, base_optimizer, model, grad_rho_scheduler, grad_norm_rho_scheduler, args):
        super().__init__(params, {})
        self.base_optimizer, self.model = base_optimizer, model
        self.settings = grad_rho_scheduler.step(), grad_norm_rho_scheduler.step(), args.grad_beta_2, args.grad_gamma

    def set_closure(self, loss_fn, inputs, targets):
        self.closure = lambda: loss_fn(self.model(inputs), targets)

    def step(self):
        self.base_optimizer.zero_grad()
        self.closure().backward()
        self.base_optimizer.step()
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Settings]]:
    """Makes a folder laid out like the released code."""

    def make(text: str) -> Settings:
        (tmp_path / "gam").mkdir()
        (tmp_path / "gam" / "gam.py").write_text(text)
        return Settings(released_code=tmp_path)

    before = set(sys.modules)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield make
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "gam":
            del sys.modules[name]


def test_released_code_is_run_from_its_checkout(
    checkout: Callable[[str], Settings], tmp_path: Path, tiny: Problem
) -> None:
    settings = checkout(STAND_IN)
    path = list(sys.path)
    run = start("released-gam", tiny, settings)
    optimizer = run.call.__self__  # type: ignore[attr-defined]
    assert inspect.getfile(type(optimizer)) == str(tmp_path / "gam" / "gam.py")
    assert sys.path == path


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("import no_such_module", "the released code cannot be imported: .*no_such_module"),
        ("1 / 0", "the released code cannot be imported: ZeroDivisionError"),
    ],
)
def test_released_code_that_cannot_be_imported_says_why(
    text: str, why: str, checkout: Callable[[str], Settings], tiny: Problem
) -> None:
    settings = checkout(text)
    with pytest.raises(NotInstalled, match=why):
        start("released-gam", tiny, settings)


def test_released_code_has_to_be_where_it_is_said_to_be(tmp_path: Path, tiny: Problem) -> None:
    with pytest.raises(NotInstalled, match=r"has no gam/gam\.py"):
        start("released-gam", tiny, Settings(released_code=tmp_path))
    with pytest.raises(NotInstalled, match="--released-code"):
        start("released-gam", tiny, Settings())


@pytest.mark.parametrize(("name", "package"), OF_OTHERS.items())
def test_missing_package_is_named(name: str, package: str, tiny: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(NotInstalled, match=f"^{package} is not installed; pip install {package}$"):
        start(name, tiny, Settings())


def test_package_whose_import_fails_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_peer.py").write_text("raise RuntimeError('operator does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(NotInstalled, match=r"^peer cannot be imported: RuntimeError: operator does not exist$"):
        imported("broken_peer", "peer")


def test_argument_that_gam_does_not_have_is_named(tiny: Problem) -> None:
    with pytest.raises(NotInstalled, match="no argument colour"):
        gam(tiny.copy(), Settings(), colour="red")


def test_second_order_is_measured_where_gam_has_it(tiny: Problem) -> None:
    if "second_order" in inspect.signature(GAM).parameters:
        start("gam-exact-second-order-off", tiny, Settings())
    else:
        with pytest.raises(NotInstalled, match="no argument second_order"):
            start("gam-exact-second-order-off", tiny, Settings())


# ---------------------------------------------------------------- checks


def test_exact_gam_agrees_with_the_naive_step(tiny: Problem) -> None:
    assert 0 <= difference_from_naive("gam-exact", tiny, Settings()) < 1e-14


def _not_finite(own: Problem, settings: Settings) -> Run:
    return Run(lambda: own.params[-1].data.fill_(torch.nan))


def _idle(own: Problem, settings: Settings) -> Run:
    return Run(lambda: None)


def _other_radius(own: Problem, settings: Settings) -> Run:
    optimizer = GAM(own.params, torch.optim.SGD, rho=RHO * 1.001, alpha=ALPHA, **settings.sgd)
    return Run(lambda: optimizer.step(own.loss))


@pytest.mark.parametrize(
    "wrong", [_not_finite, _idle, _other_radius, partial(gam, hvp="finite_difference"), CONTENDERS["sgd"]]
)
def test_check_fails_when_a_contender_is_wrong(
    wrong: Build, tmp_path: Path, tiny: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONTENDERS, "gam-exact", wrong)
    with pytest.raises(WrongStep, match="gam-exact"):
        difference_from_naive("gam-exact", tiny, Settings())
    with pytest.raises(WrongStep, match=r"^tiny: .*gam-exact"):
        run(tmp_path, "--contenders", "sgd,gam-exact")


@pytest.mark.parametrize(("wrong", "how"), [(_not_finite, "not finite"), (_idle, "moved no parameter")])
def test_first_step_has_to_be_one(wrong: Build, how: str, tiny: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONTENDERS, "sgd", wrong)
    with pytest.raises(WrongStep, match=how):
        start("sgd", tiny, Settings())


def test_wrong_contender_ends_the_command_with_its_name() -> None:
    script = f"""
import runpy, sys
from benchmarks import step_contenders
step_contenders.CONTENDERS["gam-exact"] = step_contenders.CONTENDERS["sgd"]
sys.argv = ["bench_step", "--models", "tiny", "--contenders", "gam-exact", "--repeats", "1", "--threads", "1"]
runpy.run_path({str(ROOT / "benchmarks" / "bench_step.py")!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("bench_step: tiny: after one step in float64 the parameters of gam-exact are")


# ---------------------------------------------------------------- what is counted


def test_operators_of_a_known_function_are_counted() -> None:
    x = torch.ones(3, requires_grad=True)
    assert count_operators(lambda: torch.ones(3).add_(1).view(3, 1)) == 3
    assert count_operators(lambda: None) == 0
    forward = count_operators(lambda: (x * x).sum())
    assert forward == 2
    assert count_operators(lambda: torch.autograd.grad((x * x).sum(), x)) > forward + 3


def test_memory_of_known_allocations_is_found() -> None:
    def build() -> Callable[[], object]:
        weights = torch.zeros(1000)
        state: list[torch.Tensor] = []

        def step() -> None:
            state[:] = [torch.zeros(500)]  # the old one is freed once the new one is there
            temporary = torch.empty(100_000)
            del temporary
            weights.add_(torch.ones(1000))

        return step

    memory = step_memory(build, CPU)
    assert memory.kept == 4 * (1000 + 500)
    assert memory.peak == 4 * (1000 + 500 + 100_000)


def test_memory_within_an_operator_counts() -> None:
    """The median is found in a copy, which never reaches Python."""
    tensor = torch.rand(20_000)
    assert step_memory(lambda: tensor.median, CPU).peak >= 4 * 20_000


def test_plain_step_keeps_weights_gradients_and_momentum() -> None:
    of = problem("mlp", CPU)
    numel = sum(param.numel() for param in of.params)
    memory = step_memory(lambda: CONTENDERS["sgd"](of.copy(), Settings()).call, CPU)
    assert 3 * 4 * numel <= memory.kept < 3.01 * 4 * numel
    assert memory.peak > memory.kept


def test_ratios_are_those_of_the_medians_per_step(tiny: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"gradient": 1.0, "gradient-hvp": 3.0, "sgd": 2.0, "gam-exact-interval-4": 12.0}

    def measured(calls: Any, timer: Any, repeats: int) -> dict[str, Timing | str]:
        assert set(calls) == set(seconds)
        return {name: Timing([Sample(seconds[name] * f) for f in (0.5, 1.0, 4.0)]) for name in calls}

    monkeypatch.setattr(bench_step, "measure", measured)
    rows = {row.contender: row for row in bench_step.bench("tiny", tiny, list(seconds), CPU, Settings(), 3)}
    assert {name: row.median_ms for name, row in rows.items()} == {
        "gradient": 1000,
        "gradient-hvp": 3000,
        "sgd": 2000,
        "gam-exact-interval-4": 3000,
    }
    assert [row.times_sgd for row in rows.values()] == [0.5, 1.5, 1, 1.5]
    assert [row.times_gradient for row in rows.values()] == [1, 3, None, None]
    interval = rows["gam-exact-interval-4"]
    assert (interval.fastest_ms, interval.first_quartile_ms, interval.third_quartile_ms) == (1500, 2250, 7500)


# ---------------------------------------------------------------- what it leaves


def run(tmp_path: Path, *arguments: str) -> tuple[dict[str, Any], list[dict[str, str]]]:
    files = ["--json", str(tmp_path / "new" / "step.json"), "--csv", str(tmp_path / "step.csv")]
    bench_step.main(["--quick", "--models", "tiny", "--repeats", "2", "--threads", "1", *arguments, *files])
    with open(tmp_path / "step.csv", newline="") as file:
        return json.loads((tmp_path / "new" / "step.json").read_text()), list(csv.DictReader(file))


def test_run_leaves_a_table_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, csv_rows = run(tmp_path, "--contenders", EAGER)
    machine, rows = content["machine"], content["rows"]
    assert machine["torch"] == torch.__version__
    assert machine["threads"] == 1
    assert "benchmarks.bench_step --quick" in machine["command"]
    assert content["settings"]["sgd"]["momentum"] == 0.9
    (check,) = content["checks"]
    assert (check["model"], check["contender"]) == ("tiny", "gam-exact")
    assert check["difference"] < 1e-14

    assert [row["contender"] for row in rows] == EAGER.split(",")
    by_name = {row["contender"]: row for row in rows}
    for name, row in by_name.items():
        assert row["not_run"] is None
        assert (row["model"], row["parameters"], row["tensors"]) == ("tiny", 112, 6)
        assert row["first_quartile_ms"] <= row["median_ms"] <= row["third_quartile_ms"]
        assert row["times_sgd"] == pytest.approx(row["median_ms"] / by_name["sgd"]["median_ms"])
        assert row["peak_bytes"] > row["kept_bytes"] >= 4 * 112
        assert row["operators"] > 10
        assert (row["times_gradient"] is None) == (name in STEPS)
        assert row["host_ms"] is None
    assert by_name["gradient"]["operators"] < by_name["sgd"]["operators"] < by_name[NAIVE]["operators"]
    assert by_name["gradient-hvp"]["times_gradient"] == pytest.approx(
        by_name["gradient-hvp"]["median_ms"] / by_name["gradient"]["median_ms"]
    )

    assert [row["contender"] for row in csv_rows] == [row["contender"] for row in rows]
    assert float(csv_rows[0]["median_ms"]) == rows[0]["median_ms"]

    printed = capsys.readouterr().out
    assert "tiny: gam-exact from the naive step, in float64: " in printed
    assert "tiny: 112 parameters in 6 tensors" in printed
    assert "gam-finite-difference" in printed


def test_compiled_contenders_are_compared_and_timed_but_their_operators_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, build in zip(COMPILED, (sgd_compiled, gam_compiled), strict=True):
        monkeypatch.setitem(CONTENDERS, name, partial(build, backend="eager"))
    content, _ = run(tmp_path, "--models", "tiny", "--contenders", ",".join(COMPILED))
    (check,) = content["checks"]
    assert (check["contender"], check["not_run"]) == ("gam-exact-compiled", None)
    assert [row["contender"] for row in content["rows"]] == list(COMPILED)
    for row in content["rows"]:
        assert row["not_run"] is row["operators"] is None
        assert row["median_ms"] > 0
        assert row["peak_bytes"] > 0


def test_what_cannot_be_had_has_rows_that_say_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in (*OF_OTHERS.values(), "timm"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(MODELS, "mlp", lambda: 1 / 0)
    monkeypatch.setitem(CONTENDERS, "gam-finite-difference", lambda own, settings: SimpleNamespace().nothing)
    content, _ = run(
        tmp_path,
        "--models",
        "mlp,tiny,vit",
        "--contenders",
        ",".join(["sgd", *OF_OTHERS, "gam-exact", "released-gam", "gam-finite-difference"]),
    )
    rows = {(row["model"], row["contender"]): row for row in content["rows"]}
    printed = capsys.readouterr().out
    for (model, contender), row in rows.items():
        if model == "vit":
            assert row["not_run"] == "timm is not installed; pip install timm"
            assert row["parameters"] is None
        elif model == "mlp":
            assert row["not_run"] == "ZeroDivisionError: division by zero"
        elif contender in OF_OTHERS:
            package = OF_OTHERS[contender]
            assert row["not_run"] == f"{package} is not installed; pip install {package}"
        if row["not_run"]:
            assert row["median_ms"] is row["operators"] is row["peak_bytes"] is None
            assert f"not run: {row['not_run']}" in printed
    assert "--released-code" in rows["tiny", "released-gam"]["not_run"]
    assert rows["tiny", "gam-finite-difference"]["not_run"].startswith("AttributeError: ")
    assert rows["tiny", "sgd"]["median_ms"] > 0


def test_ratio_to_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    content, _ = run(tmp_path, "--contenders", "gradient-hvp")
    (row,) = content["rows"]
    assert row["median_ms"] > 0
    assert row["times_sgd"] is row["times_gradient"] is None


def test_quick_means_few_repeats_of_small_models_unless_told_otherwise() -> None:
    quick, told, plain = (bench_step.parse(text.split()) for text in ("--quick", "--quick --models gpt2", ""))
    assert (quick.models, quick.repeats) == (["resnet-8", "mlp"], 3)
    assert (told.models, told.repeats) == (["gpt2"], 3)
    assert "tiny" not in plain.models
    assert set(quick.models) < set(plain.models)
    assert plain.contenders == [name for name in CONTENDERS if name not in COMPILED]
    assert plain.repeats > quick.repeats


def test_options_of_the_check_on_a_gpu_are_understood() -> None:
    assert "benchmarks.bench_step --device cuda --csv" in (ROOT / "scripts" / "gpu_check.sh").read_text()
    options = bench_step.parse(["--device", "cpu", "--csv", "step.csv"])
    assert options.device == CPU
    assert options.csv == Path("step.csv")


@pytest.mark.parametrize("arguments", [["--models", "resnet-7"], ["--contenders", "adam"]])
def test_unknown_names_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_step.parse(arguments)
    assert repr(arguments[1]) in capsys.readouterr().err
