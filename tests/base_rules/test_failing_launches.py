"""A launch that raises, the first or a later one, leaves everything as it was."""

from __future__ import annotations

from typing import Any

import pytest
from torch.optim import SGD

from gam_fused import kernels
from tests.base_rules.common import BASES, Task, bases, fusing
from tests.states import assert_same, snapshot


@fusing
@bases
def test_a_launch_that_raises_leaves_everything_as_it_was(
    base: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Task()
    gam = task.gam(base, backend)
    before = snapshot(task.model, gam)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    for name in ("sgd_step_", "adamw_step_"):
        monkeypatch.setattr(type(kernels.resolve(backend)), name, fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        gam.step(task.loss)
    assert_same(before, snapshot(task.model, gam))


def second_launches() -> list[Any]:
    return [pytest.param(base, before) for base in BASES for before in (0, 2)]


@fusing
@pytest.mark.parametrize(("base", "steps_before"), second_launches())
def test_a_second_launch_that_raises_leaves_everything_as_it_was(
    base: str, steps_before: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups: one has stepped when the other fails."""
    task = Task()
    gam = task.gam(base, backend)
    for _ in range(steps_before):
        gam.step(task.loss)
    before = snapshot(task.model, gam)
    launched = []
    cls = type(kernels.resolve(backend))
    name = "sgd_step_" if BASES[base][0] is SGD else "adamw_step_"
    original = getattr(cls, name)

    def fail_later(*args: Any, **options: Any) -> None:
        launched.append(name)
        if len(launched) == 2:
            raise RuntimeError("out of memory")
        original(*args, **options)

    monkeypatch.setattr(cls, name, fail_later)
    with pytest.raises(RuntimeError, match="out of memory"):
        gam.step(task.loss)
    assert_same(before, snapshot(task.model, gam))
