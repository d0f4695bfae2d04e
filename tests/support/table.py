"""docs/support.md, out of the cases that test_support.py steps: ``python -m tests.support.table``."""

from __future__ import annotations

from tests.support.case import Case
from tests.support.rows import SECTIONS

INTRODUCTION = """\
# What can be stepped

Each row is a layer, each cell a test that takes steps with it in float64, on the CPU (`pytest tests/support`). The page
is made of the rows of those tests by `make support-table`; a test fails while it is not up to date.

- `hvp="exact"`, **yes**: the Hessian-vector product is that of PyTorch's double backward within 1e-12 (of the same
  function by other operators, where PyTorch's is wrong), and the step is the one of the formulas, on PyTorch's layers
  and on those of `gam_fused.second_order`. **no**: the error names what the cell names, and nothing has changed.
- `hvp="finite_difference"`, **yes**: with short differences (`fd_epsilon=1e-5`) the step is close to the exact one. The
  default, 1e-2, is longer, for float32.
- **kinks**: the gradient jumps somewhere. A difference that spans the jump sees it and double backward does not, so the
  two modes are different algorithms there.

`hvp="auto"` begins as `"exact"` and turns to finite differences at the first **no** of the first column that the second
one has a **yes** for.

The steps are those of closures. A [compiled step](../README.md#compiled-steps) takes the same ones, of what
`torch.compile` can capture in one graph, and of modules that are under `torch.compile` already.
"""


def page() -> str:
    """All of it."""
    return "\n".join([INTRODUCTION, *(section(title, cases) for title, cases in SECTIONS.items())])


def section(title: str, cases: list[Case]) -> str:
    """A heading and a table."""
    head = ["", '| | `hvp="exact"` | `hvp="finite_difference"` | |', "|---|---|---|---|"]
    return "\n".join([f"## {title}", *head, *map(row, cases), ""])


def row(case: Case) -> str:
    """One layer."""
    code, comma, note = case.name.partition(", ")
    exact = finite_difference = f"no: {case.refused}"
    if not case.refused:
        exact = f"no: {case.missing}" if case.missing else "yes"
        finite_difference = "yes"
    return f"| `{code}`{comma}{note} | {exact} | {finite_difference} | {'kinks' if case.kinks else ''} |"


if __name__ == "__main__":
    print(page(), end="")
