"""What a whole training step costs: this package, other implementations, and plain PyTorch, beside each other.

    python -m benchmarks.bench_step
    python -m benchmarks.bench_step --device cuda --models resnet-64,transformer,gpt2 --json step.json --csv step.csv
    python -m benchmarks.bench_step --quick --models mlp --contenders sgd,naive-gam,gam-exact --threads 2
    python -m benchmarks.bench_step --models mlp,transformer --contenders sgd,sgd-compiled,gam-exact,gam-exact-compiled
    python -m benchmarks.bench_step --released-code ../GAM

A step is everything from the mini-batch to the new weights: forward passes, derivatives and the update, by SGD with
momentum in each case. For every model, all contenders (step_contenders.py) start from equal weights and equal data and
are timed in turns within one run. `of SGD` is how many times as long as the plain step a row takes, `of gradient` how
many times as long as one gradient. On a CPU every sample lasts a tenth of a second at least and follows a step of its
own kind, as steps do in training, and the C library keeps freed memory (gam_fused.keep_freed_memory) unless it is told
not to, for all contenders alike. A contender that applies the flatness term in every k-th step only is timed over k
steps, and its numbers are per step. Operators and memory are what step_costs.py counts: `peak MiB` is the most that is
allocated in a step, weights and optimizer state included; `kept MiB` is what of it stays between steps.

Before anything is timed, exact GAM is compared with the naive transcription of the paper, in float64: if their
parameters differ after one step, the benchmark fails. So it does when a contender's first step leaves a parameter that
is not finite, or moves none. Contenders and models that cannot be had have rows that say why; for all that there are,

    pip install -e ".[bench]"

Contenders whose names end in `compiled` are compiled by Inductor, which takes minutes for each model and is not
measured; they have to be asked for.

Attention runs on whichever of PyTorch's kernels it chooses, except where it is differentiated twice.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.bench_kernels import names_out_of
from benchmarks.packages import NotInstalled, first_line
from benchmarks.step_contenders import (
    ALPHA,
    COMPILED,
    CONTENDERS,
    DERIVATIVES,
    EXACT,
    GRADIENT,
    RHO,
    SGD_NAME,
    TOLERANCE,
    Run,
    Settings,
    WrongStep,
    difference_from_naive,
    start,
)
from benchmarks.step_costs import count_operators, step_memory
from benchmarks.step_models import MODELS, Problem, problem
from benchmarks.tables import aligned, grouped, number, write_csv
from benchmarks.timing import HostTimer, Timer, Timing, measure, timer_for
from gam_fused import keep_freed_memory

# On request only: GPT-2 as it is published takes a minute for each repeat on a CPU, and tiny is for tests.
DEFAULT_MODELS = tuple(name for name in MODELS if name not in ("gpt2", "tiny"))
QUICK_MODELS = ("resnet-8", "mlp")


@dataclass(frozen=True)
class Row:
    """What a contender took for one step of a model. ``None`` where there is nothing to say."""

    model: str
    parameters: int | None
    tensors: int | None
    contender: str
    fastest_ms: float | None = None
    median_ms: float | None = None
    first_quartile_ms: float | None = None
    third_quartile_ms: float | None = None
    host_ms: float | None = None  # until the call came back, on devices that do the work by themselves
    times_sgd: float | None = None
    times_gradient: float | None = None
    operators: float | None = None  # a fraction where steps differ; of a compiled graph, none
    peak_bytes: int | None = None
    kept_bytes: int | None = None
    not_run: str | None = None  # why


@dataclass(frozen=True)
class Check:
    """How far exact GAM is from the naive step. ``None`` where it could not be compared."""

    model: str
    contender: str
    difference: float | None = None
    not_run: str | None = None  # why


# ---------------------------------------------------------------- measuring


def reason(error: Exception) -> str:
    """What a row says in place of numbers."""
    text = first_line(error)
    return text if isinstance(error, NotInstalled) else f"{type(error).__name__}: {text}"


def check(model: str, of: Problem, contenders: Sequence[str], settings: Settings) -> Iterator[Check]:
    """Compare those of the contenders that are exact with the naive step.

    Raises:
        WrongStep: one of them is not what it says.
    """
    for contender in (name for name in EXACT if name in contenders):
        try:
            yield Check(model, contender, difference_from_naive(contender, of, settings))
        except WrongStep as error:
            raise WrongStep(f"{model}: {error}") from None
        except Exception as error:  # its row will say so too
            yield Check(model, contender, not_run=reason(error))


def bench(
    model: str, of: Problem, contenders: Sequence[str], device: torch.device, settings: Settings, repeats: int
) -> Iterator[Row]:
    """Measure the steps of all contenders, in turns.

    Raises:
        WrongStep: one of them does not do what it is measured for.
    """
    runs: dict[str, Run] = {}
    reasons: dict[str, Timing | str] = {}
    for contender in contenders:
        try:
            runs[contender] = start(contender, of, settings)
        except WrongStep as error:
            raise WrongStep(f"{model}: {error}") from None
        except Exception as error:  # whatever the code of others raises
            reasons[contender] = reason(error)

    costs = {contender: _costs(contender, run, of, device, settings) for contender, run in runs.items()}
    gc.collect()
    calls = {contender: run.call for contender, run in runs.items()}
    timings = {**reasons, **measure(calls, _timer(device), repeats)}
    for contender in contenders:
        row = Row(model, *_size(of), contender)
        timing = timings[contender]
        if isinstance(timing, str):
            yield replace(row, not_run=timing)
        else:
            yield replace(row, **costs[contender], **_times(contender, runs, timings))


def _timer(device: torch.device) -> Timer:
    return timer_for(device) if device.type == "cuda" else HostTimer(sample_seconds=0.1, after_its_own=True)


def _size(of: Problem) -> tuple[int, int]:
    return sum(param.numel() for param in of.params), len(of.params)


def _costs(contender: str, run: Run, of: Problem, device: torch.device, settings: Settings) -> dict[str, Any]:
    memory = step_memory(lambda: CONTENDERS[contender](of.copy(), settings).call, device)
    return {
        "operators": None if run.is_graph else count_operators(run.call) / run.steps,
        "peak_bytes": memory.peak,
        "kept_bytes": memory.kept,
    }


def _times(contender: str, runs: Mapping[str, Run], timings: Mapping[str, Timing | str]) -> dict[str, Any]:
    def ms_per_step(name: str, seconds: float) -> float:
        return seconds * 1e3 / runs[name].steps

    def times(unit: str) -> float | None:
        """How many times as long as the other's this one's step takes."""
        beside = timings.get(unit)
        return ms_per_step(contender, median) / ms_per_step(unit, beside.median) if isinstance(beside, Timing) else None

    timing = timings[contender]
    assert isinstance(timing, Timing)
    first, median, third = timing.quartiles
    return {
        "fastest_ms": ms_per_step(contender, timing.fastest),
        "median_ms": ms_per_step(contender, median),
        "first_quartile_ms": ms_per_step(contender, first),
        "third_quartile_ms": ms_per_step(contender, third),
        "host_ms": None if timing.host_median is None else ms_per_step(contender, timing.host_median),
        "times_sgd": times(SGD_NAME),
        "times_gradient": times(GRADIENT) if contender in DERIVATIVES else None,
    }


# ---------------------------------------------------------------- what is shown and kept


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Aligned lines, with a heading for every model."""
    columns = "contender", "ms", "IQR", "host ms", "of SGD", "of gradient", "operators", "peak MiB", "kept MiB"
    for model, group in grouped(rows, lambda row: row.model).items():
        of, in_tensors = group[0].parameters, group[0].tensors
        yield model if of is None else f"{model}: {of:,} parameters in {in_tensors} tensors"
        remarks = [row.not_run and f"not run: {row.not_run}" for row in group]
        yield from aligned([columns, *map(_cells, group)], [None, *remarks], names=1)
        yield ""


def _cells(row: Row) -> tuple[str, ...]:
    iqr = None
    if row.first_quartile_ms is not None and row.third_quartile_ms is not None:
        iqr = row.third_quartile_ms - row.first_quartile_ms
    times = row.median_ms, iqr, row.host_ms, row.times_sgd, row.times_gradient
    operators = "" if row.operators is None else f"{row.operators:.0f}"
    mib = (None if size is None else size / 2**20 for size in (row.peak_bytes, row.kept_bytes))
    return row.contender, *map(number, times), operators, *map(number, mib)


def check_lines(checks: Sequence[Check]) -> Iterator[str]:
    """A line for each comparison with the naive step."""
    for each in checks:
        found = f"not checked: {each.not_run}" if each.difference is None else f"{each.difference:.1e}"
        yield f"{each.model}: {each.contender} from the naive step, in float64: {found}"


def write_json(path: Path, header: dict[str, Any], checks: Sequence[Check], rows: Sequence[Row]) -> None:
    """Everything: where and how it was measured, the comparisons, and the rows."""
    content = {**header, "checks": list(map(asdict, checks)), "rows": list(map(asdict, rows))}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


# ---------------------------------------------------------------- the command


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command."""
    prog = "python -m benchmarks.bench_step"
    parser = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--models", type=names_out_of(MODELS), help=f"out of {','.join(MODELS)} (default: all but gpt2, tiny)"
    )
    parser.add_argument(
        "--contenders",
        type=names_out_of(CONTENDERS),
        help=f"out of {','.join(CONTENDERS)} (default: all but {','.join(COMPILED)})",
    )
    parser.add_argument("--released-code", type=Path, metavar="DIR", help="a checkout of the authors' code, to be run")
    parser.add_argument("--threads", type=int, help="of the CPU (default: PyTorch's)")
    parser.add_argument(
        "--return-freed-memory",
        action="store_true",
        help="to the operating system, as glibc does unless told to keep it",
    )
    parser.add_argument("--repeats", type=int, help="timings of each (default: 15)")
    parser.add_argument(
        "--quick", action="store_true", help=f"unless given: 3 repeats, models {','.join(QUICK_MODELS)}"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to this file")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows to this file")
    options = parser.parse_args(arguments)
    options.models = options.models or list(QUICK_MODELS if options.quick else DEFAULT_MODELS)
    options.contenders = options.contenders or [name for name in CONTENDERS if name not in COMPILED]
    options.repeats = options.repeats or (3 if options.quick else 15)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device here")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    keeps_freed_memory = not options.return_freed_memory and keep_freed_memory()
    settings = Settings(released_code=options.released_code)
    header = {
        "machine": machine.description(options.device, "benchmarks.bench_step", arguments),
        "settings": {
            "repeats": options.repeats,
            "keeps_freed_memory": keeps_freed_memory,
            "rho": RHO,
            "alpha": ALPHA,
            "sgd": settings.sgd,
            "check_tolerance": TOLERANCE,
        },
    }
    print(machine.as_lines(header["machine"]), end="\n\n")
    checks: list[Check] = []
    rows: list[Row] = []
    for model in options.models:
        try:
            of = problem(model, options.device)
        except Exception as error:  # whatever the code of others raises
            of_model = [Row(model, None, None, each, not_run=reason(error)) for each in options.contenders]
        else:
            of_check = list(check(model, of, options.contenders, settings))
            print("\n".join(check_lines(of_check)), flush=True)
            checks += of_check
            of_model = list(bench(model, of, options.contenders, options.device, settings, options.repeats))
        print("\n".join(table(of_model)), flush=True)
        rows += of_model
        # Saved after each model, so that a run that is cut short leaves what it has.
        if options.json:
            write_json(options.json, header, checks, rows)
        if options.csv:
            write_csv(options.csv, Row, rows)


if __name__ == "__main__":
    try:
        main()
    except WrongStep as error:
        sys.exit(f"bench_step: {error}")
