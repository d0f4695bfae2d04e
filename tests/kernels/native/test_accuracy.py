"""The numbers that come out are within the roundings of their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.native.common import WEIGHTS, FullCall, needs_native, ops, over_dtypes
from tests.kernels.tensor_lists import assert_same_bits

pytestmark = needs_native

EPS = torch.finfo(torch.float32).eps

# Exact in float32, so that what follows counts all the roundings there are.
RHO, ALPHA, XI, NORM, LR = 0.5, 0.25, 2.0**-10, 1.5, 2.0**-4

DATA: dict[str, Callable[[int], Tensor]] = {
    "normal": lambda n: torch.randn(n),
    "constant": lambda n: torch.full((n,), 0.1),
    "magnitudes mixed": lambda n: torch.randn(n) * torch.tensor([1e15, 1e-15, 1.0])[torch.randint(3, (n,))],
    "huge and tiny": lambda n: torch.where(torch.arange(n) % 7 == 0, 1e12, 1e-12) * torch.rand(n),
}
over_data = pytest.mark.parametrize("data", list(DATA))
SIZE = 20_003  # more than a chunk, and an odd rest


def assert_within(actual: Tensor, expected: Tensor, magnitude: Tensor, ulps: float) -> None:
    """Off by so many units in the last place of the terms that were added up, at most."""
    error = (actual.double() - expected).abs()
    bound = ulps * EPS * magnitude + torch.finfo(torch.float32).smallest_normal * EPS
    assert bool((error <= bound).all()), f"{(error / (EPS * magnitude)).max().item()} ulp"


@pytest.mark.parametrize(
    "values",
    [
        lambda: torch.full((1_000_003,), 0.1),
        lambda: torch.randn(1_000_003) * 1e30,
        lambda: torch.randn(100_003) * 1e-30,
        lambda: torch.cat([torch.full((7,), 1e20), torch.full((300_000,), 1e-3)]),
    ],
    ids=["constant", "huge", "tiny", "mixed"],
)
def test_l2_norm_is_within_2_ulp_for_any_data(values: Callable[[], Tensor]) -> None:
    tensor = values()
    expected = math.sqrt(sum(float(chunk.double().square().sum()) for chunk in tensor.split(1000)))
    ulp = float(torch.finfo(torch.float32).eps) * expected
    assert abs(float(ops.l2_norm([tensor])) - expected) <= 2 * ulp


@pytest.mark.parametrize("count", [1, 400])
def test_both_norms_of_a_pair_are_those_of_one_list(count: int) -> None:
    first = [torch.randn(1 + 97 * i) for i in range(count)]
    second = [torch.randn(50_000) * 1e-3]
    assert_same_bits(ops.l2_norm_pair(first, second), [ops.l2_norm(first), ops.l2_norm(second)])


@over_data
def test_perturb_is_within_2_ulp(data: str) -> None:
    theta, u = DATA[data](SIZE), DATA[data](SIZE)
    params, directions = [theta.clone()], [u.clone()]
    ops.perturb_(params, directions, torch.tensor(NORM), torch.tensor(2.5), RHO, XI)
    term = RHO / (NORM + XI * (2.5 + XI)) * u.double()
    # ‖u‖ + …, the quotient and the product round once each: 1.5 ulp; of the two before, ξ is left. The sum adds 0.5.
    assert_within(params[0], theta.double() + term, theta.double().abs() + term.abs(), 2)
    assert_same_bits(directions, [theta])


@over_data
def test_shift_is_within_2_ulp(data: str) -> None:
    theta, end, start = DATA[data](SIZE), DATA[data](SIZE), DATA[data](SIZE)
    params = [torch.ones(SIZE)]
    ops.shift_(params, [theta], [end], [start], torch.tensor(NORM), RHO, XI)
    term = RHO / (NORM + XI) * (end - start).double()
    # ‖d‖ + ξ, the quotient and the product round once each: 1.5 ulp. The sum adds 0.5.
    assert_within(params[0], theta.double() + term, theta.double().abs() + term.abs(), 2)


@over_data
def test_difference_norm_is_that_of_float64_for_any_data(data: str) -> None:
    """Of differences as they are in float32: all that is rounded after them is the result."""
    end, start = DATA[data](SIZE), DATA[data](SIZE)
    expected = float((end - start).double().norm())
    assert abs(float(ops.difference_norm([end], [start])) - expected) <= EPS / 2 * expected * (1 + 1e-7)


@over_data
def test_combine_is_within_2_ulp(data: str) -> None:
    g, h = DATA[data](SIZE), DATA[data](SIZE)
    grads = [g.clone()]
    ops.combine_([torch.ones(SIZE)], [h], grads, [h], torch.tensor(NORM), RHO, ALPHA, XI)
    term = ALPHA * RHO / (NORM + XI) * h.double()
    assert_within(grads[0], g.double() + term, g.double().abs() + term.abs(), 2)


@over_data
def test_projection_is_that_of_float64_for_any_data(data: str) -> None:
    """Of h⁺ and h⁻ as they are in float32: all that is rounded after them are the results."""
    g0, g1, g2, g3 = gradients = [DATA[data](SIZE) for _ in range(4)]
    found = ops.projection(*([g] for g in gradients), *WEIGHTS)
    w0, w1, w2, w3 = WEIGHTS
    plus, minus = (w1 * g1 + w3 * g3).double(), (w0 * g0 + w2 * g2).double()
    expected = [minus @ plus / plus.norm(), plus.norm(), minus.norm()]
    for number, exact in zip(found, expected, strict=True):
        # Half a unit in the last place, and what 20,003 sums in float64 have lost where they cancel.
        assert abs(float(number) - float(exact)) <= EPS / 2 * abs(float(exact)) + 1e-13 * float(minus.norm())


@over_data
def test_decompose_is_within_the_roundings_of_its_formula(data: str) -> None:
    g0, g1, g2, g3 = gradients = [DATA[data](SIZE) for _ in range(4)]
    lists = [[g.clone()] for g in gradients]
    ops.decompose_(*lists, torch.tensor(-1.25), torch.tensor(NORM), *WEIGHTS, XI)
    w0, w1, w2, w3 = WEIGHTS
    plus = w1 * g1.double() + w3 * g3.double()
    plus_size = abs(w1) * g1.double().abs() + abs(w3) * g3.double().abs()
    minus = w0 * g0.double() + w2 * g2.double()
    minus_size = abs(w0) * g0.double().abs() + abs(w2) * g2.double().abs()
    scale = -1.25 * NORM / (NORM + XI) ** 2
    # Weight (0.3 is not exact), product, sum.
    assert_within(lists[0][0], plus, plus_size, 1.5)
    # That of h⁺, and ‖h⁺‖ + ξ twice, two quotients, their product, its product with h⁺, the difference: half each.
    assert_within(lists[1][0], minus - scale * plus, minus_size + abs(scale) * plus_size, 5)


@over_data
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_sgd_step_is_within_the_roundings_of_its_formula(data: str, nesterov: bool, maximize: bool) -> None:
    theta, g, h, buffer = (DATA[data](SIZE) for _ in range(4))
    params, grads, buffers = [torch.ones(SIZE)], [g.clone()], [buffer.clone()]
    options = {"lr": LR, "momentum": 0.875, "weight_decay": 0.125, "dampening": 0.0 if nesterov else 0.25}
    ops.sgd_step_(
        *(params, [theta], grads, [h], buffers, torch.tensor(NORM), [], RHO, ALPHA, XI),
        **options,
        nesterov=nesterov,
        maximize=maximize,
    )
    term = ALPHA * RHO / (NORM + XI) * h.double()
    combined, size = g.double() + term, g.double().abs() + term.abs()
    assert_within(grads[0], combined, size, 2)
    d = (-combined if maximize else combined) + 0.125 * theta.double()
    size = size + 0.125 * theta.double().abs()
    mean = 0.875 * buffer.double() + (1 - options["dampening"]) * d
    mean_size = 0.875 * buffer.double().abs() + size
    # After the 2 ulp of the combined gradient: decay (product, sum), momentum (product, sum).
    assert_within(buffers[0], mean, mean_size, 4)
    d, size = (d + 0.875 * mean, size + mean_size) if nesterov else (mean, mean_size)
    # Nesterov's product and sum, that of lr, and the last sum.
    assert_within(params[0], theta.double() - LR * d, theta.double().abs() + LR * size, 6)


@over_data
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_adamw_step_is_within_the_roundings_of_its_formula(data: str, decoupled: bool, amsgrad: bool) -> None:
    # Terms of one sign: where nothing cancels, every rounding is relative to the result.
    theta, g, h, mean, square, maximum = (DATA[data](SIZE).abs() for _ in range(6))
    params, grads = [torch.ones(SIZE)], [g.clone()]
    means, squares, maxima, steps = [mean.clone()], [square.clone()], [maximum.clone()], [torch.tensor(4.0)]
    ops.adamw_step_(
        *(params, [theta], grads, [h], means, squares, maxima if amsgrad else [], steps),
        *(torch.tensor(NORM), [], RHO, ALPHA, XI),
        lr=LR,
        beta1=0.875,
        beta2=0.75,
        eps=2.0**-10,
        weight_decay=0.125,
        decoupled_weight_decay=decoupled,
        amsgrad=amsgrad,
    )
    theta64 = theta.double()
    d = g.double() + ALPHA * RHO / (NORM + XI) * h.double()
    decayed = theta64 * (1 - LR * 0.125) if decoupled else theta64
    d = d if decoupled else d + 0.125 * theta64
    mean64 = mean.double() + 0.125 * (d - mean.double())
    square64 = 0.75 * square.double() + 0.25 * d * d
    assert steps[0].item() == 5
    assert_within(means[0], mean64, mean64, 6)
    assert_within(squares[0], square64, square64, 10)  # twice the error of d, and its own roundings
    if amsgrad:
        square64 = torch.maximum(maximum.double(), square64)
        assert_within(maxima[0], square64, square64, 10)
    update = LR / (1 - 0.875**5) * mean64 / (square64.sqrt() / (1 - 0.75**5) ** 0.5 + 2.0**-10)
    # 6 of the mean, 5 of the root, and 5 more operations.
    assert_within(params[0], decayed - update, theta64 + update, 16)


@pytest.mark.parametrize("name", ["sgd_step_", "adamw_step_"])
@over_dtypes
def test_a_learning_rate_on_the_device_takes_the_place_of_that_of_the_host(name: str, dtype: torch.dtype) -> None:
    results = []
    for given_as in ("number", "tensor"):
        torch.manual_seed(0)
        call = FullCall(name, [(1001,)], dtype)
        args, options = call.arguments()
        lr = options.pop("lr_tensor").fill_(0.25)
        options["lr"] = 0.25 if given_as == "number" else 99.0
        getattr(ops, name)(*args, **options, **({"lr_tensor": lr} if given_as == "tensor" else {}))
        results.append(call.tensors())
    assert_same_bits(*results)
