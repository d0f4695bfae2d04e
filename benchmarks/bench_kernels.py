"""How long each launch of a GAM step takes, and the launches of a whole step, in each back end.

    python -m benchmarks.bench_kernels
    python -m benchmarks.bench_kernels --device cuda --dtype fp32,bf16 --json kernels.json --csv kernels.csv
    python -m benchmarks.bench_kernels --quick --shapes resnet50 --threads 2

Only the arithmetic around the derivatives is run, on tensors in the shapes of real networks' parameters. Everything
that is compared is measured in turns within one run: the back ends, a Python loop over tensors, both dtypes, PyTorch's
own fused step without GAM, and ``copy_`` of as many bytes as the parameters have.

GB/s are the bytes that have to be read and written at least (arithmetic.py), the same for every back end, over the
median time; `of copy_` divides that by the GB/s of ``copy_``. `foreach` and `loop` are how many times as fast as those
a row is; `plain` is how many times as long it takes as PyTorch's own step. What is in cache can be faster than
``copy_`` from memory; timings of a CUDA device begin with its second-level cache full of other data.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.arithmetic import (
    ADAMW_SETTINGS,
    ALPHA,
    COPY,
    COPY_NAME,
    LAUNCHES,
    LOOP,
    PLAIN_STEP_OF,
    PLAIN_STEPS,
    RHO,
    SGD_SETTINGS,
    STEPS,
    Tensors,
    arithmetic,
    passes,
)
from benchmarks.shapes import SHAPES
from benchmarks.tables import aligned, grouped, number, write_csv
from benchmarks.timing import Timing, measure, timer_for

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BACKENDS = {"cpu": ("native", "foreach", LOOP), "cuda": ("native", "triton", "foreach", LOOP)}
DEFAULT_SHAPES = tuple(name for name in SHAPES if name != "tiny")
QUICK_SHAPES = ("resnet18", "many-small")


@dataclass(frozen=True)
class Row:
    """What one back end took for one launch or whole step. ``None`` where there is nothing to say."""

    shapes: str
    tensors: int
    elements: int
    dtype: str
    launch: str
    backend: str
    passes: int
    counted_bytes: int
    fastest_ms: float | None = None
    median_ms: float | None = None
    first_quartile_ms: float | None = None
    third_quartile_ms: float | None = None
    host_ms: float | None = None  # until the call came back, on devices that do the work by themselves
    gb_per_s: float | None = None
    fraction_of_copy: float | None = None
    times_as_fast_as_foreach: float | None = None
    times_as_fast_as_loop: float | None = None
    times_as_long_as_plain: float | None = None
    not_run: str | None = None  # why


@dataclass(frozen=True)
class DtypeRow:
    """What a narrower dtype saves in one back end."""

    shapes: str
    launch: str
    backend: str
    fp32_ns_per_element: float
    bf16_ns_per_element: float
    times_as_fast: float


Key = tuple[str, str]  # dtype and back end


def bench(
    shapes: str, dtypes: Sequence[str], backends: Sequence[str], device: torch.device, repeats: int
) -> Iterator[Row]:
    """Measure all launches and whole steps in the shapes of that name, each in all back ends and dtypes in turns."""
    sets = {dtype: Tensors(SHAPES[shapes](), DTYPES[dtype], device) for dtype in dtypes}
    calls: dict[str, dict[Key, Callable[[], object]]] = {launch: {} for launch in (*LAUNCHES, *STEPS)}
    reasons: dict[Key, str] = {}
    for dtype, tensors in sets.items():
        for backend in backends:
            try:
                of_backend = arithmetic(backend, tensors).calls()
            except (RuntimeError, ValueError) as error:
                reasons[dtype, backend] = str(error)
                continue
            for launch, call in of_backend.items():
                calls[launch][dtype, backend] = call
        for launch in calls:
            calls[launch][dtype, COPY_NAME] = tensors.copy
            if launch in PLAIN_STEP_OF:
                plain = PLAIN_STEP_OF[launch]
                calls[launch][dtype, plain] = tensors.plain_step(plain, fused=True)

    timer = timer_for(device)
    for launch, in_turns in calls.items():
        gc.collect()
        timings = {**reasons, **measure(in_turns, timer, repeats)}
        beside = [PLAIN_STEP_OF[launch], COPY_NAME] if launch in PLAIN_STEP_OF else [COPY_NAME]
        for dtype, tensors in sets.items():
            for backend in (*backends, *beside):
                yield _row(shapes, tensors, launch, (dtype, backend), timings)


def _row(shapes: str, tensors: Tensors, launch: str, key: Key, timings: Mapping[Key, Timing | str]) -> Row:
    dtype, backend = key
    timing = timings[key]
    of_row = COPY.passes if backend == COPY_NAME else passes(backend if backend in PLAIN_STEPS else launch)
    counted = of_row * tensors.nbytes
    row = Row(shapes, len(tensors.params), tensors.numel, dtype, launch, backend, of_row, counted)
    if isinstance(timing, str):
        return Row(**{**asdict(row), "not_run": timing})

    def times(other: str) -> float | None:
        """How many times as long the other takes."""
        beside = timings.get((dtype, other))
        return beside.median / timing.median if isinstance(beside, Timing) else None

    first, median, third = timing.quartiles
    copy, plain = times(COPY_NAME), times(PLAIN_STEP_OF.get(launch, ""))
    measured = {
        "fastest_ms": timing.fastest * 1e3,
        "median_ms": median * 1e3,
        "first_quartile_ms": first * 1e3,
        "third_quartile_ms": third * 1e3,
        "host_ms": None if timing.host_median is None else timing.host_median * 1e3,
        "gb_per_s": counted / median / 1e9,
        "fraction_of_copy": None if copy is None else copy * of_row / COPY.passes,
    }
    if backend not in (COPY_NAME, *PLAIN_STEPS):
        measured["times_as_fast_as_foreach"] = times("foreach")
        measured["times_as_fast_as_loop"] = times(LOOP)
        measured["times_as_long_as_plain"] = None if plain is None else 1 / plain
    return Row(**{**asdict(row), **measured})


def compare_dtypes(rows: Sequence[Row]) -> list[DtypeRow]:
    """Time per element in fp32 and bf16, where a launch was measured in both."""
    by_key = {(row.shapes, row.launch, row.backend, row.dtype): row for row in rows}
    compared = []
    for (shapes, launch, backend, dtype), row in by_key.items():
        narrow = by_key.get((shapes, launch, backend, "bf16"))
        if dtype != "fp32" or narrow is None or row.median_ms is None or narrow.median_ms is None:
            continue
        wide_ns, narrow_ns = (ms * 1e6 / row.elements for ms in (row.median_ms, narrow.median_ms))
        compared.append(DtypeRow(shapes, launch, backend, wide_ns, narrow_ns, wide_ns / narrow_ns))
    return compared


# ---------------------------------------------------------------- what is shown and kept


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Aligned lines, with a heading for every list of shapes and dtype."""
    columns = "launch", "back end", "passes", "ms", "IQR", "host ms", "GB/s", "of copy_", "foreach", "loop", "plain"
    for (shapes, dtype), group in grouped(rows, lambda row: (row.shapes, row.dtype)).items():
        yield f"{shapes}, {dtype}: {group[0].elements:,} elements in {group[0].tensors} tensors"
        remarks = [row.not_run and f"not run: {row.not_run}" for row in group]
        yield from aligned([columns, *map(_cells, group)], [None, *remarks], names=2)
        yield ""


def _cells(row: Row) -> tuple[str, ...]:
    iqr = None
    if row.first_quartile_ms is not None and row.third_quartile_ms is not None:
        iqr = row.third_quartile_ms - row.first_quartile_ms
    times = row.times_as_fast_as_foreach, row.times_as_fast_as_loop, row.times_as_long_as_plain
    numbers = row.median_ms, iqr, row.host_ms, row.gb_per_s, row.fraction_of_copy, *times
    return row.launch, row.backend, str(row.passes), *map(number, numbers)


def dtype_table(rows: Sequence[DtypeRow]) -> Iterator[str]:
    """Aligned lines, with a heading for every list of shapes."""
    columns = "launch", "back end", "fp32 ns", "bf16 ns", "times as fast"
    for shapes, group in grouped(rows, lambda row: row.shapes).items():
        yield f"{shapes}: time per element in each dtype"
        cells = [
            (
                row.launch,
                row.backend,
                *map(number, (row.fp32_ns_per_element, row.bf16_ns_per_element, row.times_as_fast)),
            )
            for row in group
        ]
        yield from aligned([columns, *cells], [None] * (len(group) + 1), names=2)
        yield ""


def write_json(path: Path, header: dict[str, Any], rows: Sequence[Row]) -> None:
    """Everything: where and how it was measured, the rows, and the comparison of dtypes."""
    content = {**header, "rows": list(map(asdict, rows)), "dtypes": list(map(asdict, compare_dtypes(rows)))}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


# ---------------------------------------------------------------- the command


def names_out_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """A parser of comma-separated names."""
    known = list(known)

    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(text.split(",")))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return parse


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command."""
    prog = "python -m benchmarks.bench_kernels"
    parser = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--backends",
        type=lambda text: list(dict.fromkeys(text.split(","))),
        help=f"names separated by commas; {LOOP} is plain PyTorch, a tensor at a time (default: all that there are)",
    )
    parser.add_argument(
        "--shapes", type=names_out_of(SHAPES), help=f"out of {','.join(SHAPES)} (default: all but tiny)"
    )
    parser.add_argument(
        "--dtype", type=names_out_of(DTYPES), default=["fp32"], help="fp32, bf16 or both (default: fp32)"
    )
    parser.add_argument("--threads", type=int, help="of the CPU (default: PyTorch's)")
    parser.add_argument("--repeats", type=int, help="timings of each (default: 15)")
    parser.add_argument(
        "--quick", action="store_true", help=f"unless given: 3 repeats, shapes {','.join(QUICK_SHAPES)}"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to this file")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows to this file")
    options = parser.parse_args(arguments)
    options.backends = options.backends or list(BACKENDS.get(options.device.type, BACKENDS["cpu"]))
    options.shapes = options.shapes or list(QUICK_SHAPES if options.quick else DEFAULT_SHAPES)
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
    header = {
        "machine": machine.description(options.device, "benchmarks.bench_kernels", arguments),
        "settings": {
            "repeats": options.repeats,
            "rho": RHO,
            "alpha": ALPHA,
            "sgd": SGD_SETTINGS,
            "adamw": ADAMW_SETTINGS,
        },
    }
    print(machine.as_lines(header["machine"]), end="\n\n")
    rows: list[Row] = []
    for shapes in options.shapes:
        of_shapes = list(bench(shapes, options.dtype, options.backends, options.device, options.repeats))
        print("\n".join([*table(of_shapes), *dtype_table(compare_dtypes(of_shapes))]), flush=True)
        rows += of_shapes
        # Saved after each list of shapes, so that a run that is cut short leaves what it has.
        if options.json:
            write_json(options.json, header, rows)
        if options.csv:
            write_csv(options.csv, Row, rows)


if __name__ == "__main__":
    main()
