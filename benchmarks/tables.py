"""Rows of numbers on a terminal and in files, with nothing but the standard library."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any


def number(value: float | None) -> str:
    """Three significant digits or more, and never an exponent; nothing for ``None``."""
    if value is None:
        return ""
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{decimals}f}"


def aligned(lines: Sequence[Sequence[str]], remarks: Sequence[str | None], names: int) -> Iterator[str]:
    """Columns of even width: the first ``names`` from the left, numbers from the right.

    Where a line has a remark, it stands in place of the numbers.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for cells, remark in zip(lines, remarks, strict=True):
        padded = [
            cell.ljust(width) if i < names else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        yield "  ".join(padded if remark is None else [*padded[:names], remark]).rstrip()


def grouped(rows: Sequence[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """Rows by key, in the order of each key's first row."""
    groups: dict[Any, list[Any]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def write_csv(path: Path, kind: type[Any], rows: Sequence[Any]) -> None:
    """One line for each row, a dataclass of this kind; what a row does not have is left empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(kind)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, rows))
