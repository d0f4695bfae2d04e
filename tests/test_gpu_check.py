"""The GPU check, where there is no GPU: what it would run, and what it says of stages that cannot run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"
STAGES = ("build", "test", "sanitize", "bench")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the script is for Linux")


def gpu_check(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    hidden = {"CUDA_VISIBLE_DEVICES": ""}  # also where there is a GPU
    return subprocess.run(
        [SCRIPT, *arguments],
        env={**os.environ, "PYTHON": sys.executable, **hidden, **environment},
        capture_output=True,
        text=True,
    )


def commands(output: str) -> list[list[str]]:
    """The words of each command that was printed; one may take several lines."""
    joined = re.sub(r"\$'((?:[^'\\]|\\.)*)'", lambda quoted: shlex.quote(quoted.group(1)), output)
    return [shlex.split(line)[1:] for line in joined.splitlines() if line.startswith("+ ")]


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("out") / "results"
    done = gpu_check("--dry-run", OUT=str(out))
    assert done.returncode == 0, done.stderr
    assert not out.exists()
    return done.stdout


def test_script_is_executable_and_parses() -> None:
    assert os.access(SCRIPT, os.X_OK)
    done = subprocess.run(["bash", "-n", SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_dry_run_prints_the_commands_of_every_stage(dry_run: str) -> None:
    printed = [" ".join(command) for command in commands(dry_run)]
    for part in (
        "env GAM_FUSED_CUDA=1",
        "setup.py build_ext --inplace",
        "-m pytest -p no:cacheprovider -o minversion=7 -W default --confcutdir=tests/gpu tests/gpu -m cuda",
        "tests/kernels tests/test_bench_second_order.py -m cuda",
        "compute-sanitizer --tool memcheck",
        "compute-sanitizer --tool racecheck",
        "-m benchmarks.bench_kernels --device cuda --dtype fp32,bf16",
        "-m benchmarks.bench_second_order --device cuda --dtype fp32,bf16",
    ):
        assert any(part in command for command in printed), part
    assert [line for line in dry_run.splitlines() if line in {f"gpu_check: {stage}" for stage in STAGES}] == [
        f"gpu_check: {stage}" for stage in STAGES
    ]


def test_commands_refer_to_files_that_exist(dry_run: str) -> None:
    referred = set()
    for command in commands(dry_run):
        for before, word in pairwise(command):
            if before == "-m" and word.startswith("benchmarks."):
                referred.add(word.replace(".", "/") + ".py")
            elif word.startswith(("tests/", "setup.py")):
                referred.add(word)
    assert {"setup.py", "tests/gpu", "benchmarks/bench_kernels.py"} <= referred
    assert not [path for path in referred if not (ROOT / path).exists()]


def test_benchmark_understands_its_options(dry_run: str) -> None:
    from benchmarks import bench_kernels

    (command,) = [command for command in commands(dry_run) if "benchmarks.bench_kernels" in command]
    options = command[command.index("benchmarks.bench_kernels") + 1 :]
    # Whether there is a device is not the question here.
    parsed = bench_kernels.parse(["cpu" if option == "cuda" else option for option in options])
    assert parsed.dtype == ["fp32", "bf16"]
    assert parsed.csv.name == "bench_kernels.csv"


@pytest.mark.slow
def test_selections_of_tests_match_some(dry_run: str) -> None:
    with_pytest = [command[command.index("pytest") + 1 :] for command in commands(dry_run) if "pytest" in command]
    assert len(with_pytest) == 4
    for arguments in {tuple(arguments) for arguments in with_pytest}:
        command = [sys.executable, "-m", "pytest", *arguments, "--collect-only", "-q"]
        collected = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert collected.returncode == 0, collected.stdout + collected.stderr


def test_tests_for_a_gpu_need_no_package_but_pytest_and_torch() -> None:
    script = """
import sys
for name in ("hypothesis", "expecttest", "xdist", "numpy"):
    sys.modules[name] = None
import pytest
sys.exit(pytest.main("-p no:cacheprovider -W default --confcutdir=tests/gpu tests/gpu --collect-only".split()))
"""
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_the_stages_named_are_run() -> None:
    done = gpu_check("--dry-run", "sanitize", "build")
    assert done.returncode == 0
    assert re.findall(r"^gpu_check: (\w+)$", done.stdout, re.MULTILINE) == ["sanitize", "build"]
    assert "bench_kernels" not in done.stdout


@pytest.mark.parametrize("argument", ["tset", "--dryrun"])
def test_unknown_stage_or_option_is_an_error(argument: str) -> None:
    done = gpu_check("build", argument)
    assert done.returncode == 2
    assert f"no stage or option '{argument}'" in done.stderr
    assert "usage: scripts/gpu_check.sh" in done.stderr
    assert done.stdout == ""


def test_a_failed_stage_is_reported_and_the_next_one_still_run(tmp_path: Path) -> None:
    """There is no GPU to test on, and no sanitizer to run: the first is a failure, the second is not."""
    done = gpu_check("test", "sanitize", OUT=str(tmp_path / "results"), PATH="/usr/bin:/bin")
    assert done.returncode == 1, done.stdout + done.stderr
    summary = (tmp_path / "results" / "summary.txt").read_text()
    assert re.search(r"^  test +FAILED with status \d+$", summary, re.MULTILINE)
    assert re.search(r"^  sanitize +not run: something is missing$", summary, re.MULTILINE)
    assert summary in done.stdout
    assert "compute-sanitizer is not on PATH" in (tmp_path / "results" / "sanitize.log").read_text()
    assert "passed" not in summary


def test_nothing_is_started_once_the_time_is_up(tmp_path: Path) -> None:
    done = gpu_check("bench", OUT=str(tmp_path), LIMIT="0")
    assert done.returncode == 1
    assert "no time left: LIMIT=0" in done.stdout
    assert "FAILED with status 124" in (tmp_path / "summary.txt").read_text()


def test_stages_that_pass_are_reported_as_passed(tmp_path: Path) -> None:
    """With a stand-in for Python that does nothing, and does it well."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    done = gpu_check("build", "bench", OUT=str(tmp_path / "results"), PYTHON=str(python))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^  (\w+) +passed$", done.stdout, re.MULTILINE) == ["build", "bench"]
