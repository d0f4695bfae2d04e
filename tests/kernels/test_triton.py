"""What is Triton's own: when it can run, and that it computes the very bits of the other back ends.

Kernels run interpreted here; what a compiler makes of them is in tests/test_triton_compile.py.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gam_fused import kernels
from gam_fused.kernels import Backend
from gam_fused.kernels import triton_launches as launches
from gam_fused.kernels.rules import AdamWRule, AdamWState, Descent, FourGradients, SGDRule
from gam_fused.kernels.triton import TritonBackend
from tests.kernels.operators.common import few_examples
from tests.kernels.tensor_lists import Draw, Spec, assert_same_bits, copies, relaid, seeds, specs

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NORM, RHO, ALPHA, XI = 1.7, 0.3, 0.7, 0.01


@pytest.fixture(scope="module")
def triton() -> Backend:
    reason = TritonBackend.unavailable_reason(CPU)
    if reason is not None:
        pytest.skip(reason)
    return kernels.resolve("triton", [CPU])


# ---------------------------------------------------------------- availability


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "is_interpreted", lambda: False)
    monkeypatch.setattr(launches, "_compiler_reason", lambda: None)


@pytest.fixture
def has_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_without_triton_the_reason_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert TritonBackend.unavailable_reason(GPU) == "Triton is not installed; pip install 'triton>=3.6'."


@pytest.mark.usefixtures("compiles")
def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "TRITON_INTERPRET=1" in str(TritonBackend.unavailable_reason(CPU))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "TRITON_INTERPRET=1" in str(TritonBackend.unavailable_reason())
    monkeypatch.setattr(launches, "is_interpreted", lambda: True)
    assert TritonBackend.unavailable_reason(CPU) is None
    assert TritonBackend.unavailable_reason() is None


@pytest.mark.usefixtures("compiles", "has_gpu")
def test_a_gpu_is_enough_unless_kernels_are_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TritonBackend.unavailable_reason() is None
    assert TritonBackend.unavailable_reason(GPU) is None
    assert TritonBackend.unavailable_reason(torch.device("xpu")) == "there are no Triton kernels for xpu devices."
    monkeypatch.setattr(launches, "is_interpreted", lambda: True)
    assert "unset it" in str(TritonBackend.unavailable_reason(GPU))


@pytest.mark.usefixtures("compiles", "has_gpu")
@pytest.mark.parametrize(
    ("version", "fits"), [("3.5.1", False), ("3.6.0", True), ("3.9.0+git1", True), ("3.10.0", True), ("4.0", True)]
)
def test_a_triton_too_old_is_refused(monkeypatch: pytest.MonkeyPatch, version: str, fits: bool) -> None:
    monkeypatch.setattr(pytest.importorskip("triton"), "__version__", version)
    reason = TritonBackend.unavailable_reason(GPU)
    assert reason == (None if fits else f"Triton {version} is too old; pip install 'triton>=3.6'.")


@pytest.mark.usefixtures("has_gpu")
def test_a_triton_from_before_its_knobs_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    old = ModuleType("triton")
    old.__version__ = "3.2.0"  # type: ignore[attr-defined]
    old.__spec__ = importlib.util.find_spec("math")
    monkeypatch.setitem(sys.modules, "triton", old)
    assert "3.2.0 is too old" in str(TritonBackend.unavailable_reason(GPU))


@pytest.mark.usefixtures("has_gpu")
def test_a_triton_that_cannot_compile_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        @property
        def active(self) -> None:
            raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setattr(launches, "is_interpreted", lambda: False)
    monkeypatch.setattr("triton.runtime.driver", Broken())
    launches._compiler_reason.cache_clear()
    reason = str(TritonBackend.unavailable_reason(GPU))
    launches._compiler_reason.cache_clear()
    assert reason.startswith("Triton cannot compile here (Failed to find C compiler.); it needs a C compiler")


@pytest.mark.usefixtures("has_gpu")
@pytest.mark.parametrize(("arch", "fits"), [(61, False), (70, True), (90, True)])
def test_a_gpu_too_old_for_triton_is_refused(monkeypatch: pytest.MonkeyPatch, arch: int, fits: bool) -> None:
    target = SimpleNamespace(backend="cuda", arch=arch)
    active = SimpleNamespace(get_current_target=lambda: target, utils=None)
    monkeypatch.setattr(launches, "is_interpreted", lambda: False)
    monkeypatch.setattr("triton.runtime.driver", SimpleNamespace(active=active))
    launches._compiler_reason.cache_clear()
    reason = TritonBackend.unavailable_reason(GPU)
    launches._compiler_reason.cache_clear()
    assert (reason is None) == fits
    assert fits or "6.1" in str(reason)


# ---------------------------------------------------------------- the bits of the other back ends

Operator = Callable[[Backend, "Operands"], Any]


class Operands:
    """Lists of tensors in one dtype, and what an operator leaves in them."""

    NAMES = ("params", "backups", "grads", "hvps", "first", "second", "third")

    def __init__(self, dtype: torch.dtype, specs: list[Spec], seed: int) -> None:
        draw = Draw(dtype, CPU, seed)
        self.lists = {name: draw.normal(specs) for name in self.NAMES}
        for name in ("second", "third"):
            for tensor in self.lists[name]:
                tensor.abs_()
        self.steps = [torch.full((), 2.0) for _ in specs]
        self.norm = draw.norm(NORM)

    def after(self, operator: Operator, backend: Backend) -> list[torch.Tensor]:
        lists, steps = self.lists, self.steps
        self.lists = {name: copies(tensors) for name, tensors in lists.items()}
        self.steps = [step.clone() for step in steps]
        operator(backend, self)
        written = [*(tensor for tensors in self.lists.values() for tensor in tensors), *self.steps]
        self.lists, self.steps = lists, steps
        return written

    def descent(self, seed: int | None) -> Descent:
        lists = [self.lists[name] for name in self.NAMES[:4]]
        return Descent(*lists, self.norm, RHO, ALPHA, XI, guards=[self.norm], rounding_seed=seed)


def perturb(seed: int | None) -> Operator:
    return lambda backend, on: backend.perturb_(
        on.lists["params"], on.lists["backups"], on.norm, on.norm, RHO, XI, rounding_seed=seed
    )


def shift(with_origins: bool, with_starts: bool, seed: int | None) -> Operator:
    def operate(backend: Any, on: Operands) -> None:
        params, origins, ends, starts = (on.lists[name] for name in on.NAMES[:4])
        lists = params, origins if with_origins else [], ends, starts if with_starts else []
        backend.shift_(*lists, on.norm, RHO, XI, rounding_seed=seed)

    return operate


def combine(backend: Any, on: Operands) -> None:
    backend.combine_(*(on.lists[name] for name in on.NAMES[:4]), on.norm, RHO, ALPHA, XI)


def decompose(backend: Any, on: Operands) -> None:
    gradients = FourGradients(*(on.lists[name] for name in on.NAMES[:4]), weights=(0.3, 0.7, -0.2, 0.6))  # type: ignore[misc]
    backend.decompose_(gradients, on.norm, on.norm, XI)


def sgd(rule: SGDRule, seed: int | None, first_step: bool = False) -> Operator:
    def step(backend: Any, on: Operands) -> None:
        backend.sgd_step_(on.descent(seed), on.lists["first"] if rule.momentum else [], rule, first_step=first_step)

    return step


def adamw(rule: AdamWRule, seed: int | None) -> Operator:
    def step(backend: Any, on: Operands) -> None:
        maxima = on.lists["third"] if rule.amsgrad else []
        backend.adamw_step_(on.descent(seed), AdamWState(on.lists["first"], on.lists["second"], maxima, on.steps), rule)

    return step


def elementwise(seed: int | None) -> dict[str, Operator]:
    return {
        "perturb": perturb(seed),
        "shift along": shift(False, False, seed),
        "shift from": shift(True, True, seed),
        "combine": combine,
        "decompose": decompose,
        "sgd": sgd(SGDRule(0.1), seed),
        "momentum": sgd(SGDRule(0.1, 0.9, dampening=0.2, weight_decay=0.1), seed),
        "nesterov": sgd(SGDRule(0.1, 0.9, nesterov=True, maximize=True), seed, first_step=True),
    }


@few_examples
@given(specs, seeds, st.sampled_from(list(elementwise(None))))
def test_triton_leaves_the_bits_of_the_native_kernels(
    triton: Backend, dtype: torch.dtype, specs: list[Spec], seed: int, name: str
) -> None:
    native = kernels.resolve("native")
    on = Operands(dtype, specs, seed)
    operator = elementwise(None)[name]
    assert_same_bits(on.after(operator, triton), on.after(operator, native))


@few_examples
@given(specs, seeds, st.sampled_from([*elementwise(0), "adamw"]), st.sampled_from([0, 1, 2**40 + 7, -1]))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_stochastic_rounding_has_the_bits_of_the_native_kernels(
    triton: Backend, dtype: torch.dtype, specs: list[Spec], seed: int, name: str, rounding_seed: int
) -> None:
    native = kernels.resolve("native")
    on = Operands(dtype, specs, seed)
    if name == "adamw":
        # Its bias corrections may be off by a unit in the last place, and what is rounded with them. The bits that are
        # drawn are the same, so that hardly any number falls on the other side.
        operator = adamw(AdamWRule(0.1, eps=1e-3, weight_decay=0.1, amsgrad=True), rounding_seed)
        actual, expected = on.after(operator, triton), on.after(operator, native)
        elements = sum(tensor.numel() for tensor in actual)
        differ = sum(int((a != e).sum()) for a, e in zip(actual, expected, strict=True))
        assert dtype == torch.float32 or differ <= 2 + elements / 1000
        return
    operator = elementwise(rounding_seed)[name]
    assert_same_bits(on.after(operator, triton), on.after(operator, native))


def test_a_seed_changes_what_is_rounded_and_nothing_wider(triton: Backend) -> None:
    for dtype, changes in ((torch.bfloat16, True), (torch.float16, True), (torch.float32, False)):
        on = Operands(dtype, [Spec((1024,), "contiguous")], 0)
        nearest, one, other = (on.after(perturb(seed), triton)[0] for seed in (None, 1, 2))
        assert torch.equal(one, other) != changes
        assert torch.equal(one, nearest) != changes


def test_every_chunk_of_a_tensor_draws_other_bits(triton: Backend) -> None:
    on = Operands(torch.bfloat16, [Spec((70001,), "contiguous")], 0)
    on.lists["params"] = [torch.full((70001,), 1.0, dtype=torch.bfloat16)]
    on.lists["backups"] = [torch.full((70001,), 0.02, dtype=torch.bfloat16)]
    moved = on.after(perturb(3), triton)[0]
    halves = moved[:32768], moved[32768:65536]
    assert not torch.equal(*halves)
    assert 0 < (moved != 1).float().mean() < 1


@few_examples
@given(specs, seeds)
def test_adamw_is_that_of_the_native_kernels(triton: Backend, dtype: torch.dtype, specs: list[Spec], seed: int) -> None:
    """State bit for bit; parameters but for the bias corrections, of which each computes its own."""
    native = kernels.resolve("native")
    on = Operands(dtype, relaid(specs, ["contiguous"] * len(specs)), seed)
    operator = adamw(AdamWRule(0.1, betas=(0.8, 0.95), eps=0.1, weight_decay=0.1, amsgrad=True), None)
    actual, expected = on.after(operator, triton), on.after(operator, native)
    count = len(specs)
    assert_same_bits(actual[count:], expected[count:])
    eps = torch.finfo(dtype).eps
    for a, e in zip(actual[:count], expected[:count], strict=True):
        torch.testing.assert_close(a.double(), e.double(), rtol=4 * eps, atol=4 * eps)


def test_a_count_that_cannot_be_launched_is_found_out_before_anything_is_written(
    triton: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gam_fused.kernels import triton_kernels

    on = Operands(torch.float32, [Spec((5,), "contiguous")], 0)
    before = [tensor.clone() for tensors in on.lists.values() for tensor in tensors]

    class Broken:
        def run(self, *args: Any, **options: Any) -> None:
            raise RuntimeError("ptxas failed")

        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError("ptxas failed")

    monkeypatch.setattr(triton_kernels, "count_steps_kernel", Broken())
    with pytest.raises(RuntimeError, match="ptxas failed"):
        adamw(AdamWRule(0.1), None)(triton, on)
    assert_same_bits([tensor for tensors in on.lists.values() for tensor in tensors], before)
