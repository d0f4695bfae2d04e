"""What every back end must do, on every dtype and device: one file for all of them.

Tensors come in the sizes, memory formats and alignments that Hypothesis draws. Results are compared with the formula in
float64, within bounds derived from the number of roundings, or bit for bit where the contract is a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gam_fused.kernels import Backend, foreach
from gam_fused.kernels.interface import accumulation_dtype
from tests.kernels.tensor_lists import (
    Draw,
    Spec,
    assert_same_bits,
    copies,
    have_same_bits,
    other_layouts,
    relaid,
    seeds,
    specs,
    surroundings,
)

RHO, ALPHA, XI = 0.3, 0.7, 0.01

few_examples = settings(max_examples=15)


def assert_sum_rounded_once(actual: Tensor, a: Tensor, b: Tensor) -> None:
    """``actual`` is a + b for an exact ``a`` and a ``b`` that is the product of a tensor and a computed factor.

    In the accumulation dtype b takes at most 7 roundings (ρ, ξ, ‖g‖ + ξ, its product with ξ, the sum with ‖u‖, the
    quotient, the product with the tensor) and a + b one more; so do the float64 numbers it is compared with.
    Rounding to a narrower dtype adds half a unit in the last place, or half a subnormal.
    """
    wide = accumulation_dtype(actual.dtype)
    roundings = 16 if wide == torch.float64 else 8
    bound = roundings * torch.finfo(wide).eps / 2 * (a.abs() + b.abs())
    if actual.dtype in (torch.bfloat16, torch.float16):
        info = torch.finfo(actual.dtype)
        bound += info.eps / 2 * (a + b).abs() + info.smallest_normal * info.eps / 2
    error = (actual.double() - (a + b)).abs()
    assert bool((error <= bound).all()), f"off by up to {(error / bound).max().item()} times the bound"


# ---------------------------------------------------------------- l2_norm


@few_examples
@given(specs, seeds)
def test_l2_norm_is_that_of_all_elements(
    backend: Backend, dtype: torch.dtype, device: torch.device, specs: list[Spec], seed: int
) -> None:
    tensors = Draw(dtype, device, seed).normal(specs)
    norm = backend.l2_norm(tensors)
    expected = math.sqrt(sum(t.double().square().sum().item() for t in tensors))
    # n roundings of partial sums, independent of each other, give √n units of roundoff in the sum of squares, which the
    # root halves. Twice that, for bad luck, and up to two levels of squares and roots above.
    n = sum(t.numel() for t in tensors)
    roundoff = torch.finfo(accumulation_dtype(dtype)).eps / 2
    assert norm.item() == pytest.approx(expected, rel=(math.sqrt(n) + 4) * roundoff, abs=0)


def test_l2_norm_is_a_0d_tensor_of_the_accumulation_dtype(
    backend: Backend, dtype: torch.dtype, device: torch.device
) -> None:
    norm = backend.l2_norm([torch.ones(4, dtype=dtype, device=device, requires_grad=True)])
    assert (norm.shape, norm.dtype, norm.device.type) == ((), accumulation_dtype(dtype), device.type)
    assert not norm.requires_grad
    assert norm.item() == 2


def test_l2_norm_of_no_tensors_is_a_float32_zero_on_the_cpu(backend: Backend) -> None:
    norm = backend.l2_norm([])
    assert (norm.shape, norm.dtype, norm.device) == ((), torch.float32, torch.device("cpu"))
    assert norm.item() == 0


def test_l2_norm_of_no_elements_is_zero(backend: Backend, dtype: torch.dtype, device: torch.device) -> None:
    assert backend.l2_norm([torch.empty(0, 3, dtype=dtype, device=device)] * 2).item() == 0


def test_l2_norm_of_many_small_tensors(backend: Backend, dtype: torch.dtype, device: torch.device) -> None:
    tensors = [torch.ones(i % 4, dtype=dtype, device=device) for i in range(2000)]
    # Sums of ones are exact; the roots and the squares of those are not, and there may be one of each per tensor.
    tolerance = math.sqrt(2000) * torch.finfo(accumulation_dtype(dtype)).eps
    assert backend.l2_norm(tensors).item() == pytest.approx(math.sqrt(3000), rel=tolerance)


def test_l2_norm_reads_expanded_and_repeated_tensors(backend: Backend, dtype: torch.dtype) -> None:
    four = torch.full((1,), 2.0, dtype=dtype).expand(4, 4)
    assert backend.l2_norm([four, four, four, four]).item() == 16


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 17, 40_000, -1])
def test_l2_norm_of_non_finite_input_is_not_finite(
    backend: Backend, dtype: torch.dtype, device: torch.device, value: float, place: int
) -> None:
    tensors = [torch.ones(5, dtype=dtype, device=device), torch.ones(70_001, dtype=dtype, device=device)]
    tensors[1][place] = value
    norm = backend.l2_norm(tensors)
    assert not math.isfinite(norm.item())
    assert math.isnan(norm.item()) == math.isnan(value)


@pytest.fixture
def threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads_restored")
def test_l2_norm_does_not_depend_on_the_number_of_threads(backend: Backend, dtype: torch.dtype) -> None:
    draw = Draw(dtype, torch.device("cpu"))
    single = [
        [Spec((n,), layout)]
        for n in (32_768, 70_001, 400_003)
        for layout in ("contiguous", "misaligned", "every other element")
    ]
    images = [[Spec((16, 8, 33, 35), layout)] for layout in ("contiguous", "channels_last")]
    matrices = [[Spec((300, 1001), "transposed")], [Spec((2, 70_001), "contiguous"), Spec((5,), "contiguous")]]
    many_small = draw.normal([Spec((3,), "contiguous")] * 500) * 70
    for tensors in [*map(draw.normal, [*single, *images, *matrices]), many_small]:
        norms = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            norms.append(backend.l2_norm(tensors))
        assert_same_bits(norms[1:], norms[:1] * 2)


# ---------------------------------------------------------------- perturb_


@few_examples
@given(specs, other_layouts, seeds)
def test_perturb_moves_to_the_adversarial_point_and_leaves_theta_in_the_directions(
    backend: Backend, dtype: torch.dtype, device: torch.device, specs: list[Spec], layouts: list[str], seed: int
) -> None:
    draw = Draw(dtype, device, seed)
    theta, u = draw.normal(specs), draw.normal(relaid(specs, layouts))
    params, directions = copies(theta), copies(u)
    gaps = surroundings(params, directions)
    u_norm, g_norm = draw.norm(1.7), draw.norm(4.3)

    backend.perturb_(params, directions, u_norm, g_norm, RHO, XI)

    scale = RHO / (u_norm.double() + XI * (g_norm.double() + XI))
    for param, theta_i, u_i in zip(params, theta, u, strict=True):
        assert_sum_rounded_once(param, theta_i.double(), scale * u_i.double())
    assert_same_bits(directions, theta)
    assert_same_bits(surroundings(params, directions), gaps)
    assert (u_norm.item(), g_norm.item()) == (draw.norm(1.7).item(), draw.norm(4.3).item())


@few_examples
@given(specs, other_layouts, seeds, st.sampled_from([0.0, 1.0, math.nan, math.inf]))
def test_restoring_after_a_perturbation_is_exact_to_the_bit_whatever_was_added(
    backend: Backend,
    dtype: torch.dtype,
    device: torch.device,
    specs: list[Spec],
    layouts: list[str],
    seed: int,
    norm: float,
) -> None:
    draw = Draw(dtype, device, seed)
    params, directions = draw.any_bits(specs), draw.any_bits(relaid(specs, layouts))
    theta = [p.clone() for p in params]
    backend.perturb_(params, directions, draw.norm(norm), draw.norm(norm), RHO, 0.0)
    assert_same_bits(directions, theta)
    backend.restore_(params, directions)
    assert_same_bits(params, theta)
    assert_same_bits(directions, theta)


def test_perturb_with_a_zero_direction_moves_nothing(
    backend: Backend, dtype: torch.dtype, device: torch.device
) -> None:
    draw = Draw(dtype, device)
    params = draw.normal([Spec((9,), "contiguous")])
    theta = [p.clone() for p in params]
    backend.perturb_(params, [torch.zeros_like(p) for p in params], draw.norm(0.0), draw.norm(0.0), RHO, 1e-12)
    assert_same_bits(params, theta)


@pytest.mark.parametrize(
    ("u_norm", "g_norm", "xi"),
    [(math.nan, 1.0, 0.1), (1.0, math.nan, 0.1), (math.inf, 1.0, 0.1), (1.0, math.inf, 0.0), (0.0, 0.0, 0.0)],
)
def test_perturb_moves_nothing_where_the_direction_is_not_finite(
    backend: Backend, dtype: torch.dtype, device: torch.device, u_norm: float, g_norm: float, xi: float
) -> None:
    draw = Draw(dtype, device)
    params = draw.normal([Spec((9,), "contiguous"), Spec((3, 5), "transposed")])
    theta = [p.clone() for p in params]
    directions = [torch.full_like(p, math.nan) for p in params]
    backend.perturb_(params, directions, draw.norm(u_norm), draw.norm(g_norm), RHO, xi)
    assert_same_bits(params, theta)
    assert_same_bits(directions, theta)


@pytest.mark.parametrize(
    ("name", "value"), [("direction_norm", 2.0), ("grad_norm", 2.0), ("rho", 0.5), ("xi", 0.5)], ids=str
)
def test_every_number_given_to_perturb_reaches_the_result(backend: Backend, name: str, value: float) -> None:
    numbers: dict[str, Any] = {"direction_norm": 1.0, "grad_norm": 1.0, "rho": 0.1, "xi": 0.1}
    moved = []
    for case in (numbers, {**numbers, name: value}):
        tensors = {n: torch.tensor(case[n]) for n in ("direction_norm", "grad_norm")}
        params = [torch.zeros(1)]
        backend.perturb_(params, [torch.ones(1)], **{**case, **tensors})
        moved.append(params[0].item())
    assert moved[0] != moved[1]


# ---------------------------------------------------------------- restore_ and combine_


@few_examples
@given(specs, other_layouts, seeds)
def test_restore_copies_every_bit(
    backend: Backend, dtype: torch.dtype, device: torch.device, specs: list[Spec], layouts: list[str], seed: int
) -> None:
    draw = Draw(dtype, device, seed)
    params, backups = draw.any_bits(specs), draw.any_bits(relaid(specs, layouts))
    expected = [b.clone() for b in backups]
    gaps = surroundings(params)
    backend.restore_(params, backups)
    assert_same_bits(params, expected)
    assert_same_bits(backups, expected)
    assert_same_bits(surroundings(params), gaps)


@few_examples
@given(specs, other_layouts, seeds, st.sampled_from([ALPHA, -ALPHA, 0.0]))
def test_combine_restores_and_adds_the_flatness_penalty_to_the_gradients(
    backend: Backend,
    dtype: torch.dtype,
    device: torch.device,
    specs: list[Spec],
    layouts: list[str],
    seed: int,
    alpha: float,
) -> None:
    draw = Draw(dtype, device, seed)
    params, backups = draw.normal(specs), draw.any_bits(relaid(specs, layouts))
    g, hvps = draw.normal(relaid(specs, layouts)), draw.normal(specs)
    grads, unwritten = copies(g), copies([*backups, *hvps])
    gaps = surroundings(params, grads)
    adversarial_norm = draw.norm(2.9)

    backend.combine_(params, backups, grads, hvps, adversarial_norm, RHO, alpha, XI)

    scale = alpha * RHO / (adversarial_norm.double() + XI)
    for grad, g_i, hvp in zip(grads, g, hvps, strict=True):
        assert_sum_rounded_once(grad, g_i.double(), scale * hvp.double())
    assert_same_bits(params, backups)
    assert_same_bits([*backups, *hvps], unwritten)
    assert_same_bits(surroundings(params, grads), gaps)


@pytest.mark.parametrize(
    ("name", "value"), [("adversarial_norm", 2.0), ("rho", 0.5), ("alpha", -0.5), ("xi", 0.5)], ids=str
)
def test_every_number_given_to_combine_reaches_the_result(backend: Backend, name: str, value: float) -> None:
    numbers: dict[str, Any] = {"adversarial_norm": 1.0, "rho": 0.1, "alpha": 0.1, "xi": 0.1}
    combined = []
    for case in (numbers, {**numbers, name: value}):
        grads = [torch.zeros(1)]
        norm = torch.tensor(case["adversarial_norm"])
        backend.combine_([torch.ones(1)], [torch.ones(1)], grads, [torch.ones(1)], **{**case, "adversarial_norm": norm})
        combined.append(grads[0].item())
    assert combined[0] != combined[1]


def test_a_non_finite_hvp_shows_in_the_combined_gradient(
    backend: Backend, dtype: torch.dtype, device: torch.device
) -> None:
    draw = Draw(dtype, device)
    one, grads = [torch.ones(3, dtype=dtype, device=device)], [torch.ones(3, dtype=dtype, device=device)]
    hvps = [torch.tensor([math.nan, math.inf, 0.0], dtype=dtype, device=device)]
    backend.combine_(copies(one), one, grads, hvps, draw.norm(1.0), RHO, ALPHA, XI)
    assert grads[0].isfinite().tolist() == [False, False, True]


# ---------------------------------------------------------------- all operators


class Operands:
    """Lists for any operator, over three tensors, and the operators that write them."""

    def __init__(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> None:
        draw = Draw(dtype, device or torch.device("cpu"))
        spec = [Spec((5,), "contiguous"), Spec((2, 3), "transposed"), Spec((0,), "contiguous")]
        self.params, self.directions, self.backups, self.grads, self.hvps = (draw.normal(spec) for _ in range(5))
        self.norm = draw.norm(1.5)

    def everything(self) -> list[Tensor]:
        return [*self.params, *self.directions, *self.backups, *self.grads, *self.hvps]

    def perturb_(self, backend: Backend) -> list[list[Tensor]]:
        """Run the operator and return the lists it writes."""
        backend.perturb_(self.params, self.directions, self.norm, self.norm, RHO, XI)
        return [self.params, self.directions]

    def restore_(self, backend: Backend) -> list[list[Tensor]]:
        backend.restore_(self.params, self.backups)
        return [self.params]

    def combine_(self, backend: Backend) -> list[list[Tensor]]:
        backend.combine_(self.params, self.backups, self.grads, self.hvps, self.norm, RHO, ALPHA, XI)
        return [self.params, self.grads]

    def l2_norm(self, backend: Backend) -> list[list[Tensor]]:
        backend.l2_norm(self.params)
        return []


Operator = Callable[[Operands, Backend], list[list[Tensor]]]

writing_operators = pytest.mark.parametrize("operator", [Operands.perturb_, Operands.restore_, Operands.combine_])
all_operators = pytest.mark.parametrize(
    "operator", [Operands.l2_norm, Operands.perturb_, Operands.restore_, Operands.combine_]
)


@writing_operators
def test_empty_lists_are_fine(backend: Backend, operator: Operator) -> None:
    operands = Operands()
    for name in ("params", "directions", "backups", "grads", "hvps"):
        setattr(operands, name, [])
    operator(operands, backend)


@all_operators
def test_lists_may_be_any_sequences(backend: Backend, operator: Operator) -> None:
    lists, tuples = Operands(), Operands()
    for name in ("params", "directions", "backups", "grads", "hvps"):
        setattr(tuples, name, tuple(getattr(tuples, name)))
    operator(lists, backend)
    operator(tuples, backend)
    assert_same_bits(tuples.everything(), lists.everything())


@writing_operators
def test_an_operator_writes_what_it_says_and_nothing_else(
    backend: Backend, dtype: torch.dtype, device: torch.device, operator: Operator
) -> None:
    operands = Operands(dtype, device)
    before = copies(operands.everything())
    written = {id(t) for tensors in operator(operands, backend) for t in tensors}
    for now, then in zip(operands.everything(), before, strict=True):
        assert have_same_bits([now], [then]) == (id(now) not in written or now.numel() == 0)


@writing_operators
def test_a_graph_built_before_the_write_raises_in_backward(backend: Backend, operator: Operator) -> None:
    operands = Operands()
    for tensor in operands.everything():
        tensor.requires_grad_()
    graphs = {id(t): t.square().sum() for t in operands.everything() if t.numel() > 0}
    written = {id(t) for tensors in operator(operands, backend) for t in tensors}
    for key, graph in graphs.items():
        if key in written:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                graph.backward()
        else:
            graph.backward()


@all_operators
def test_leaves_that_require_grad_stay_leaves_without_a_graph(backend: Backend, operator: Operator) -> None:
    operands = Operands()
    for tensor in operands.everything():
        tensor.requires_grad_()
    operator(operands, backend)
    assert all(t.is_leaf and t.requires_grad and t.grad is None for t in operands.everything())


@writing_operators
def test_norms_may_have_another_dtype_than_the_tensors(
    backend: Backend, dtype: torch.dtype, device: torch.device, operator: Operator
) -> None:
    usual, mixed = Operands(dtype, device), Operands(dtype, device)
    mixed.norm = usual.norm.float() if dtype == torch.float64 else usual.norm.double()
    operator(usual, backend)
    operator(mixed, backend)
    assert_same_bits(mixed.everything(), usual.everything())  # 1.5 is exact in both


@writing_operators
def test_parameters_may_be_views_of_one_storage(backend: Backend, dtype: torch.dtype, operator: Operator) -> None:
    apart, together = Operands(dtype), Operands(dtype)
    for name in ("params", "directions", "backups", "grads", "hvps"):
        tensors = getattr(together, name)
        storage = torch.cat([t.flatten() for t in tensors])
        pieces = storage.split([t.numel() for t in tensors])
        setattr(together, name, [piece.view_as(t) for piece, t in zip(pieces, tensors, strict=True)])
    operator(apart, backend)
    operator(together, backend)
    assert_same_bits(together.everything(), apart.everything())


@pytest.mark.parametrize(
    ("operator", "damaged"),
    [
        (Operands.perturb_, "directions"),
        (Operands.restore_, "backups"),
        (Operands.combine_, "backups"),
        (Operands.combine_, "grads"),
        (Operands.combine_, "hvps"),
    ],
)
def test_a_malformed_list_is_refused_by_name_before_anything_is_written(
    backend: Backend, operator: Operator, damaged: str
) -> None:
    operands = Operands()
    getattr(operands, damaged)[1] = torch.ones(2, 3, dtype=torch.float16)
    before, versions = copies(operands.everything()), [t._version for t in operands.everything()]
    with pytest.raises(ValueError, match=rf"^{damaged}\[1\]: dtype torch.float16, expected torch.float32 as params"):
        operator(operands, backend)
    assert_same_bits(operands.everything(), before)
    assert [t._version for t in operands.everything()] == versions


@pytest.mark.parametrize(
    ("operator", "one", "other"),
    [
        (Operands.perturb_, "params", "directions"),
        (Operands.restore_, "params", "backups"),
        (Operands.combine_, "params", "backups"),
        (Operands.combine_, "params", "hvps"),
        (Operands.combine_, "grads", "hvps"),
        (Operands.combine_, "grads", "backups"),
    ],
)
def test_written_memory_that_another_list_holds_is_refused(
    backend: Backend, operator: Operator, one: str, other: str
) -> None:
    operands = Operands()
    getattr(operands, other)[0] = getattr(operands, one)[0]
    with pytest.raises(ValueError, match=r"\[0\]: overlaps \w+\[0\] in memory"):
        operator(operands, backend)


class _Interrupt(Exception):
    """Stands for Ctrl-C."""


class _RaiseAfter(TorchDispatchMode):
    """Lets a number of PyTorch operators through, then raises as Ctrl-C would between any two of them."""

    def __init__(self, operators: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left = operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.left == 0:
            raise _Interrupt
        self.left -= 1
        return func(*args, **(kwargs or {}))


def interrupted_everywhere(operator: Operator, backend: Backend, dtype: torch.dtype) -> Iterator[Operands]:
    """Fresh operands after an interruption before the first operator of PyTorch, before the second, and so on."""
    for operators in range(200):
        operands = Operands(dtype)
        try:
            with _RaiseAfter(operators):
                operator(operands, backend)
        except _Interrupt:
            yield operands
        else:
            assert operators > 0, "nothing was interrupted"
            return
    raise AssertionError("it never ended")


def test_interrupted_anywhere_perturb_leaves_theta_in_the_params_or_all_of_it_in_the_backups(
    backend: Backend, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreach, "_BATCH_BYTES", 1)  # as if the tensors were too large to be processed together
    theta = Operands(dtype).params
    for operands in interrupted_everywhere(Operands.perturb_, backend, dtype):
        assert have_same_bits(operands.params, theta) or have_same_bits(operands.directions, theta)


def test_interrupted_anywhere_combine_leaves_the_backups_to_restore_from(backend: Backend, dtype: torch.dtype) -> None:
    intact = Operands(dtype)
    for operands in interrupted_everywhere(Operands.combine_, backend, dtype):
        assert_same_bits([*operands.backups, *operands.hvps], [*intact.backups, *intact.hvps])
