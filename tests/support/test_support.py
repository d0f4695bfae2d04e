"""Each cell of docs/support.md: the layer takes a step as the table says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gam_fused import GAM, reference
from gam_fused.closures import evaluate
from gam_fused.derivatives import NoSecondDerivative
from gam_fused.replay import Replay
from tests import literal
from tests.literal import assert_equal_to_rounding
from tests.second_order.layers_common import every_size_worthwhile
from tests.support import table
from tests.support.case import Applied, Case
from tests.support.rows import CASES

RHO, ALPHA, LR, EPSILON = 0.1, 0.4, 0.3, 1e-5
STEP: dict[str, Any] = {"rho": RHO, "alpha": ALPHA, "lr": LR}

# torch.compile looks at the .grad of its inputs, and hides the warning from all but those who turn it into an error.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

EXACT = [case for case in CASES if not case.missing and not case.refused]
MISSING = [case for case in CASES if case.missing]
REFUSED = [case for case in CASES if case.refused]


PAGE = Path(__file__).parents[2] / "docs" / "support.md"


def over(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


@pytest.fixture(autouse=True, scope="module")
def _every_size() -> Iterator[None]:
    with every_size_worthwhile():
        yield


def as_function(model: Applied) -> literal.LossFunction:
    """The loss, with attention in the form that PyTorch can differentiate twice."""
    function = literal.as_function(model, lambda net: net())

    def loss(params: list[Tensor]) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return function(params)

    return loss


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Of all tensors as one vector."""
    difference = literal.flat(found) - literal.flat(expected)
    return float(difference.norm() / literal.flat(expected).norm())


@over(EXACT)
@pytest.mark.parametrize("second_order", ["auto", "off"])
def test_exact_product_is_pytorchs_and_the_step_the_literal_one(case: Case, second_order: str) -> None:
    model = case.model()
    params = list(model.parameters())
    loss = as_function(case.twice_differentiable())
    vectors = reference.gradient(loss, params)
    expected = reference.hessian_vector_product(loss, params, vectors)
    stepped = literal.step(loss, params, rho=RHO, alpha=ALPHA, lr=LR)

    with torch.no_grad():
        at_theta = evaluate(model, params, Replay(model, params), create_graph=True, second_order=second_order)
        products = at_theta.gradients.hvp(range(len(params)), vectors)
    assert literal.flat(expected).norm() > 0
    assert relative_error(products, expected) < 1e-12

    model = case.model()
    optimizer = GAM(model.parameters(), model=model, second_order=second_order, **STEP)
    optimizer.step(model)
    assert int(optimizer.metrics["skipped_steps"]) == 0
    assert_equal_to_rounding(model.parameters(), stepped)


@over(MISSING)
def test_exact_step_names_the_operator_without_second_derivative_and_moves_nothing(case: Case) -> None:
    model = case.model()
    before = literal.copies(model.parameters())
    with pytest.raises(NoSecondDerivative, match=f"and {case.missing} has none: .*hvp='finite_difference'"):
        GAM(model.parameters(), model=model, **STEP).step(model)
    literal.assert_equal_bits(model.parameters(), before)


@over(MISSING)
def test_auto_warns_and_takes_the_step_by_finite_differences(case: Case) -> None:
    stepped = []
    for hvp in ("auto", "finite_difference"):
        model = case.model()
        optimizer = GAM(model.parameters(), model=model, hvp=hvp, **STEP)
        with pytest.warns(UserWarning, match=f"^{case.missing} has no") if hvp == "auto" else nullcontext():
            optimizer.step(model)
        stepped.append(list(model.parameters()))
    literal.assert_equal_bits(*stepped)


@over(EXACT + MISSING)
def test_finite_difference_step_is_near_the_exact_one(case: Case) -> None:
    """Also on layers with kinks: none lies within so short a difference."""
    model, twin = case.model(), case.twice_differentiable()
    before = literal.copies(twin.parameters())
    literal.assert_equal_bits(model.parameters(), before)
    expected = literal.step(as_function(twin), before, rho=RHO, alpha=ALPHA, lr=LR)
    optimizer = GAM(model.parameters(), model=model, hvp="finite_difference", fd_epsilon=EPSILON, **STEP)
    optimizer.step(model)
    assert int(optimizer.metrics["skipped_steps"]) == 0
    moved = [now - then for now, then in zip(model.parameters(), before, strict=True)]
    wanted = [now - then for now, then in zip(expected, before, strict=True)]
    assert relative_error(moved, wanted) < case.near


@over(REFUSED)
@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
def test_what_neither_can_names_the_way_out_and_moves_nothing(case: Case, hvp: str) -> None:
    model = case.model()
    before = literal.copies(model.parameters())
    with pytest.raises(RuntimeError, match=case.refused):
        GAM(model.parameters(), model=model, hvp=hvp, **STEP).step(model)
    literal.assert_equal_bits(model.parameters(), before)


@over(EXACT + MISSING)
def test_the_gradient_jumps_where_there_are_kinks_and_nowhere_else(case: Case) -> None:
    model = case.twice_differentiable()
    loss, start = as_function(model), literal.copies(model.parameters())
    segments = 30 if case.kinks else 1  # some miss all kinks
    ends = ([3 * torch.randn_like(param) for param in start] for _ in range(segments))
    assert any(largest_jump(loss, start, end) > 1e-3 for end in ends) == case.kinks


def largest_jump(loss: literal.LossFunction, start: list[Tensor], end: list[Tensor]) -> float:
    """Halve a segment, always keeping the half over which the gradient changes more: a jump stays, a slope vanishes."""

    def gradient(at: float) -> Tensor:
        return literal.flat(reference.gradient(loss, [p + at * (q - p) for p, q in zip(start, end, strict=True)]))

    low, high, below, above = 0.0, 1.0, gradient(0.0), gradient(1.0)
    for _ in range(25):
        between = (low + high) / 2
        here = gradient(between)
        if (here - below).norm() > (above - here).norm():
            high, above = between, here
        else:
            low, below = between, here
    return float((above - below).norm() / above.norm())


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == table.page(), "run `make support-table`"


def test_no_two_rows_have_one_name() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
