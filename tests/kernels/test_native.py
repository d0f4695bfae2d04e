"""The compiled CPU operators: their numbers, on every instruction set, and what test_native_operators.py leaves open.

There, malformed lists, opcheck, graphs, threads and sizes beyond 2**31; here, malformed numbers and several faults at
once, version counters, the accuracy of every operator, large lists, and fake tensors.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gam_fused import kernels
from gam_fused.kernels import extension
from gam_fused.kernels.rules import AdamWRule, SGDRule
from tests.kernels.tensor_lists import assert_same_bits, bits
from tests.kernels.test_native_operators import LISTS, REPLACEMENTS, WRITTEN, Call, freed, over_mutations

pytestmark = pytest.mark.skipif(extension.unavailable_reason() is not None, reason=str(extension.unavailable_reason()))

ops = torch.ops.gam_fused
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
refusals = (RuntimeError, TypeError, ValueError, NotImplementedError)
EPS = torch.finfo(torch.float32).eps

# ---------------------------------------------------------------- malformed calls

# The numbers that are tensors, and where they stand: a position, a position in a list of guards, or a name.
NUMBERS: list[tuple[str, Any]] = [
    ("perturb_", 2),
    ("perturb_", 3),
    ("combine_", 4),
    ("sgd_step_", 5),
    ("sgd_step_", (6, 0)),
    ("sgd_step_", (6, 1)),
    ("adamw_step_", 8),
    ("adamw_step_", (9, 0)),
    ("adamw_step_", (9, 1)),
    *itertools.product(("sgd_step_", "adamw_step_"), ("lr_tensor", "grad_scale", "found_inf")),
]
BAD_NUMBERS: dict[str, Callable[[Tensor], Any]] = {
    "two": lambda t: torch.ones(2, dtype=t.dtype),
    "none": lambda t: torch.ones(0, dtype=t.dtype),
    "an integer": lambda t: torch.ones((), dtype=torch.int64),
    "complex": lambda t: torch.ones((), dtype=torch.complex64),
    "half": lambda t: torch.ones((), dtype=torch.float16),
    "the other dtype": lambda t: torch.ones((), dtype=torch.float32 if t.dtype == torch.float64 else torch.float64),
    "on meta": lambda t: torch.ones((), dtype=t.dtype, device="meta"),
    "sparse": lambda t: torch.ones(1, dtype=t.dtype).to_sparse(),
    "freed": freed,
    "a list": lambda t: [t],
    "a string": lambda t: "1.0",
}


class FullCall(Call):
    """A call in which every argument is given."""

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        args, options = super().arguments()
        if self.name in ("sgd_step_", "adamw_step_"):
            args[-4] = [torch.ones_like(self.norms[1]) for _ in range(2)]
            options["lr_tensor"] = torch.full_like(self.norms[0], 0.1)
            options["grad_scale"], options["found_inf"] = torch.tensor(2.0), torch.tensor(0.0)
        return args, options


@pytest.mark.parametrize("fault", list(BAD_NUMBERS))
@pytest.mark.parametrize(("name", "place"), NUMBERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_malformed_number_raises_and_nothing_is_written(
    name: str, place: Any, fault: str, dtype: torch.dtype
) -> None:
    call = FullCall(name, [(4,), (2, 3)], dtype)
    args, options = call.arguments()
    holder: Any = options if isinstance(place, str) else args
    if isinstance(place, tuple):
        holder, place = args[place[0]], place[1]
    before = [bits(tensor).clone() for tensor in call.tensors()]
    versions = [tensor._version for tensor in call.tensors()]
    holder[place] = BAD_NUMBERS[fault](holder[place])
    with pytest.raises(refusals):
        getattr(ops, name)(*args, **options)
    assert all(torch.equal(bits(t), old) for t, old in zip(call.tensors(), before, strict=True))
    assert [t._version for t in call.tensors()] == versions
    args, options = call.arguments()  # the same call without the fault is taken
    getattr(ops, name)(*args, **options)


@pytest.mark.parametrize("name", list(LISTS))
@settings(max_examples=300)
@given(data=st.data())
def test_several_faults_at_once_raise_and_write_nothing(name: str, data: st.DataObject) -> None:
    call = FullCall(name, [(4,), (2, 3), (5, 1)], data.draw(st.sampled_from(DTYPES)))
    whole = call.tensors()
    places = st.tuples(st.sampled_from(LISTS[name]), st.integers(0, 2))
    # PyTorch's own message about what is no tensor prints all the others, and crashes where a storage is freed.
    excluded = data.draw(st.sampled_from([("a freed storage",), ("None", "a number", "a string")]))
    replacements = [what for what in REPLACEMENTS if what not in excluded]
    if name == "l2_norm_pair":  # see test_norms_of_two_devices_are_refused
        replacements = [what for what in replacements if "meta" not in what]
    certain = [what for what in replacements if what in ("integers", "a sparse tensor", "a freed storage", "None")]
    # One that is always a fault, and others that may be any replacement at all.
    for number, (key, at) in enumerate(data.draw(st.lists(places, min_size=2, max_size=5, unique=True))):
        kind = data.draw(st.sampled_from(replacements if number else certain))
        call.lists[key][at] = REPLACEMENTS[kind](call.lists[key][at])
    before = [bits(tensor).clone() for tensor in whole]
    with pytest.raises(refusals):
        call()
    assert all(torch.equal(bits(tensor), old) for tensor, old in zip(whole, before, strict=True))


@pytest.mark.parametrize("order", [1, -1])
def test_norms_of_two_devices_are_refused(order: int) -> None:
    lists = [[torch.ones(3)], [torch.ones(3, device="meta")]][::order]
    with pytest.raises(refusals):
        ops.l2_norm_pair(*lists)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: [torch.zeros(()), torch.zeros((), dtype=torch.float64)],
        lambda: [torch.zeros((), dtype=torch.float64) for _ in range(2)],
        lambda: [torch.zeros((), dtype=torch.int64) for _ in range(2)],
        lambda: [torch.zeros(2), torch.zeros(2)],
        lambda: [torch.zeros(())] * 2,
        lambda: [torch.zeros(())],
        lambda: [torch.zeros(()) for _ in range(3)],
        lambda: [torch.zeros((), device="meta") for _ in range(2)],
    ],
    ids=["mixed", "float64", "int64", "two numbers", "one twice", "too few", "too many", "meta"],
)
def test_malformed_step_counts_raise_and_nothing_is_written(wrong: Callable[[], list[Tensor]]) -> None:
    call = Call("adamw_step_", [(4,), (2, 3)])
    call.lists["state_steps"] = wrong()
    on_cpu = [tensor for tensor in call.tensors() if tensor.device.type == "cpu"]
    before = [tensor.clone() for tensor in on_cpu]
    with pytest.raises(refusals):
        call()
    assert all(torch.equal(tensor, old) for tensor, old in zip(on_cpu, before, strict=True))


# ---------------------------------------------------------------- version counters


@over_mutations
@pytest.mark.parametrize("through", ["torch.ops", "back end"])
def test_versions_count_what_is_written_and_nothing_else(name: str, through: str) -> None:
    call = Call(name, [(3,), (2, 2)])
    versions = {key: [t._version for t in tensors] for key, tensors in call.lists.items()}
    if through == "torch.ops":
        call()
    else:
        args, _ = call.arguments()
        rules: dict[str, dict[str, Any]] = {
            "sgd_step_": {"rule": SGDRule(0.1, 0.9), "first_step": False},
            "adamw_step_": {"rule": AdamWRule(0.1, amsgrad=True)},
        }
        getattr(kernels.resolve("native"), name)(*args, **rules.get(name, {}))
    for key, tensors in call.lists.items():
        changed = [t._version > old for t, old in zip(tensors, versions[key], strict=True)]
        assert changed == [key in WRITTEN[name]] * 2, key


# ---------------------------------------------------------------- accuracy

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
def test_combine_is_within_2_ulp(data: str) -> None:
    g, h = DATA[data](SIZE), DATA[data](SIZE)
    grads = [g.clone()]
    ops.combine_([torch.ones(SIZE)], [h], grads, [h], torch.tensor(NORM), RHO, ALPHA, XI)
    term = ALPHA * RHO / (NORM + XI) * h.double()
    assert_within(grads[0], g.double() + term, g.double().abs() + term.abs(), 2)


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


@pytest.mark.parametrize("count", [1, 400])
def test_both_norms_of_a_pair_are_those_of_one_list(count: int) -> None:
    first = [torch.randn(1 + 97 * i) for i in range(count)]
    second = [torch.randn(50_000) * 1e-3]
    assert_same_bits(ops.l2_norm_pair(first, second), [ops.l2_norm(first), ops.l2_norm(second)])


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


# ---------------------------------------------------------------- float16 and bfloat16

narrow = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def all_patterns(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@narrow
def test_every_bit_pattern_passes_through_the_accumulation_type(dtype: torch.dtype) -> None:
    one = torch.tensor(1.0)
    for rest in range(9):  # of what vector registers hold
        values = all_patterns(dtype)[rest:].clone()
        grads, zeros = [values.clone()], [torch.full_like(values, -0.0)]
        ops.combine_([values.clone()], [values], grads, zeros, one, 1.0, 1.0, 0.0)  # g + (−0) is g, of either sign
        is_nan = values.isnan()
        assert torch.equal(grads[0].isnan(), is_nan)
        assert torch.equal(bits(grads[0])[~is_nan], bits(values)[~is_nan])


@narrow
def test_every_bit_pattern_alone_has_its_own_magnitude(dtype: torch.dtype) -> None:
    """The root of a square that is exact in float64: what a pattern widens to, with no narrowing after it."""
    patterns = all_patterns(dtype)
    values = patterns[patterns.isfinite() & (patterns >= 0)]
    norms = torch.stack([ops.l2_norm([value]) for value in values])
    assert torch.equal(norms, values.float())


@narrow
@pytest.mark.parametrize("scale", [1.0, -1.0, 2.0**-8, 2.0**-11, 2.0**-12, 0.3, 1e-3, 700.0])
def test_sums_are_rounded_as_pytorch_does(dtype: torch.dtype, scale: float) -> None:
    """Powers of two make ties by the thousand, large factors overflow, small ones end among the subnormals."""
    patterns = all_patterns(dtype)
    values = patterns[patterns.isfinite()]
    for _ in range(8):
        g, h = values, values[torch.randperm(len(values))]
        grads = [g.clone()]
        ops.combine_([g.clone()], [g], grads, [h], torch.tensor(1.0), 1.0, scale, 0.0)
        expected = (g.float() + torch.tensor(scale) * h.float()).to(dtype)
        is_number = ~expected.isnan()
        assert torch.equal(bits(grads[0])[is_number], bits(expected)[is_number])
        assert torch.equal(grads[0].isnan(), ~is_number)


# ---------------------------------------------------------------- lists larger than the caches


@over_dtypes
@pytest.mark.parametrize("offset", [0, 1, 5])
@pytest.mark.parametrize("name", ["restore_", "combine_", "sgd_step_", "adamw_step_"])
def test_lists_larger_than_the_caches_come_out_as_small_ones_do(name: str, offset: int, dtype: torch.dtype) -> None:
    """From 16 MiB on, parameters are written past the caches, line by line, with what is left at both ends."""
    sizes = [(16 * 2**20 // dtype.itemsize,), (3,), (5_001,)]
    torch.manual_seed(0)
    large = Call(name, sizes, dtype)
    frames = []
    for i, param in enumerate(large.lists["params"]):
        frames.append(torch.full((param.numel() + 64,), 7.0, dtype=dtype))
        large.lists["params"][i] = frames[-1][offset : offset + param.numel()]
    torch.manual_seed(0)
    small = Call(name, sizes, dtype)
    args, options = small.arguments()
    for i, (size,) in enumerate(sizes):
        for begin in range(0, size, 2**20):
            part = slice(begin, begin + 2**20)
            # A step count belongs to the tensor: each of its parts gets a copy.
            lists = [[t[i].clone() if t[i].dim() == 0 else t[i][part]] for t in args[: len(LISTS[name])]]
            getattr(ops, name)(*lists, *args[len(LISTS[name]) :], **options)
    large()
    for key in LISTS[name]:
        if key != "state_steps":
            assert_same_bits(large.lists[key], small.lists[key])
    for frame, (size,) in zip(frames, sizes, strict=True):
        assert bool((frame[:offset] == 7).all() and (frame[offset + size :] == 7).all())


# ---------------------------------------------------------------- instruction sets

SETS = {"baseline": (), "avx2": ("avx2", "f16c"), "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq")}

DIGESTS = """
import hashlib, itertools, torch
torch.set_num_threads(1)
from gam_fused.kernels import extension
ops = torch.ops.gam_fused
assert extension.unavailable_reason() is None
BOTH = (False, True)
RULES = {
    "sgd_step_": [
        dict(momentum=m, dampening=0.0 if n else 0.2, weight_decay=w, nesterov=n, first_step=f, maximize=x)
        for m, n, w, f, x in itertools.product((0.0, 0.9), BOTH, (0.0, 0.1), BOTH, BOTH)
        if m or not (n or f)
    ],
    "adamw_step_": [
        dict(weight_decay=w, decoupled_weight_decay=d, amsgrad=a, maximize=x)
        for w, d, a, x in itertools.product((0.0, 0.1), BOTH, BOTH, BOTH)
    ],
}
def digest(tensors):
    h = hashlib.sha256()
    for t in tensors:
        h.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()[:16]
def lists(dtype, count, sizes, kind):
    g = torch.Generator().manual_seed(0)
    out = []
    for _ in range(count):
        tensors = []
        for size in sizes:
            t = torch.randn(size, generator=g)
            if kind == "tiny":  # float16 subnormals before and after rounding, and zeros
                t = t * 2.0 ** torch.randint(-30, -8, (size,), generator=g).float()
            elif kind == "wide":
                t = t * 2.0 ** torch.randint(-14, 14, (size,), generator=g).float()
            tensors.append(t.to(dtype))
        out.append(tensors)
    return out
def any_bits(dtype, sizes):
    g = torch.Generator().manual_seed(1)
    raw = [torch.randint(0, 256, (size, dtype.itemsize), generator=g, dtype=torch.uint8) for size in sizes]
    return [t.view(dtype).squeeze(-1) for t in raw]
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    n = lambda v: torch.tensor(v, dtype=wide)
    for kind in ("normal", "tiny", "wide"):
        sizes = [1, 3, 7, 8, 9, 15, 31, 33, 1023, 1025, 20_003, 0]
        def show(what, tensors):
            print(dtype, kind, what, digest(tensors))
        for scale in (0.3, 1e-3):
            a, b = lists(dtype, 2, sizes, kind)
            alone = [ops.l2_norm([t]) for t in (*a, *b)]  # before a long list's other sums hide the last bits
            show("l2_norm", [*alone, ops.l2_norm(a), *ops.l2_norm_pair(a, b)])
            ops.perturb_(a, b, n(1.7), n(2.5), scale, 0.01)
            show("perturb_", [*a, *b])
            a, b, c, d = lists(dtype, 4, sizes, kind)
            ops.combine_(a, b, c, d, n(1.7), 1.0, scale, 0.01)
            show("combine_", [*a, *c])
        for rule in RULES["sgd_step_"]:
            for scaled in ({}, {"grad_scale": torch.tensor(3.0), "write_grads": False}):
                p, b, g, h, m = lists(dtype, 5, sizes, kind)
                rest = (m if rule["momentum"] else [], n(1.7), [n(1.0)], 0.3, 0.7, 0.01)
                ops.sgd_step_(p, b, g, h, *rest, lr=0.05, **rule, **scaled)
                show(f"sgd_step_ {rule} {bool(scaled)}", [*p, *g, *m])
        for rule in RULES["adamw_step_"]:
            p, b, g, h, m, v, x = lists(dtype, 7, sizes, kind)
            v, x = [t.abs() for t in v], [t.abs() for t in x]
            steps = [torch.tensor(4.0) for _ in sizes]
            rest = (x if rule["amsgrad"] else [], steps, n(1.7), [], 0.3, 0.7, 0.01)
            ops.adamw_step_(p, b, g, h, m, v, *rest, lr=0.05, **rule)
            show(f"adamw_step_ {rule}", [*p, *g, *m, *v, *x, *steps])
    sizes = [5, 17 * 2**20 // dtype.itemsize, 1001]  # the second is written past the caches
    nans = any_bits(dtype, sizes)
    params = [torch.zeros_like(t) for t in nans]
    ops.restore_(params, nans)
    print(dtype, "restore_", digest(params))
    ops.perturb_(nans, [torch.zeros_like(t) for t in nans], n(float("nan")), n(1.0), 0.1, 0.0)
    print(dtype, "perturb_ in place", digest(nans))
"""


def digests(capability: str | None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "GAM_FUSED_CPU_CAPABILITY"}
    if capability is not None:
        environment["GAM_FUSED_CPU_CAPABILITY"] = capability
    return subprocess.run(
        [sys.executable, "-c", DIGESTS],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def baseline_digests() -> list[str]:
    done = digests("baseline")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) > 500
    return lines


@pytest.mark.parametrize("capability", [None, "avx2", "avx512"], ids=str)
def test_every_instruction_set_gives_the_same_bits(capability: str | None, baseline_digests: list[str]) -> None:
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text(encoding="utf-8", errors="replace").split() if cpu.exists() else []
    missing = [flag for flag in SETS.get(capability or "", ()) if flag not in flags]
    if missing:
        pytest.skip(f"this processor has no {', '.join(missing)}")
    done = digests(capability)
    assert done.returncode == 0, done.stderr
    pairs = zip(done.stdout.splitlines(), baseline_digests, strict=True)
    assert [line for line, other in pairs if line != other] == []


def test_an_unknown_instruction_set_raises_a_clear_error() -> None:
    done = digests("sse9")
    assert done.returncode != 0
    assert "GAM_FUSED_CPU_CAPABILITY must be one of avx512, avx2, baseline, got sse9" in done.stderr


# ---------------------------------------------------------------- fake tensors


def fake_call(name: str, dtype: torch.dtype = torch.float32) -> Call:
    call = Call(name, [(3,), (2, 5)], dtype)
    call.norms = [torch.empty((), dtype=norm.dtype) for norm in call.norms]
    return call


@pytest.mark.parametrize("name", list(LISTS))
@over_dtypes
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fake_tensors_give_the_shapes_of_real_ones(name: str, dtype: torch.dtype, device: str) -> None:
    real = Call(name, [(3,), (2, 5)], dtype)()
    with FakeTensorMode(), torch.device(device):
        fake = fake_call(name, dtype)()
    if real is None:
        assert fake is None
        return
    one, other = ([result] if isinstance(result, Tensor) else list(result) for result in (real, fake))
    assert [(t.shape, t.dtype, t.device.type) for t in other] == [(t.shape, t.dtype, device) for t in one]


MISMATCHES: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "dtype": lambda tensors: [t.to(torch.float64) for t in tensors],
    "shape": lambda tensors: [t[..., None] for t in tensors],
    "length": lambda tensors: tensors[:1],
}


def mismatches() -> list[Any]:
    cases = []
    for name, keys in LISTS.items():
        for key, what in itertools.product(keys[1:], MISMATCHES):
            if name == "l2_norm_pair" and what != "dtype":
                continue
            if key == "state_steps" and what == "shape":
                continue  # one number of any shape
            cases.append(pytest.param(name, key, what))
    return cases


@pytest.mark.parametrize(("name", "key", "what"), mismatches())
def test_real_tensors_that_do_not_match_are_refused(name: str, key: str, what: str) -> None:
    call = Call(name, [(3,), (2, 5)])
    call.lists[key] = MISMATCHES[what](call.lists[key])
    with pytest.raises(RuntimeError, match=rf"^{key}"):
        call()


@pytest.mark.parametrize(("name", "key", "what"), mismatches())
def test_fake_tensors_are_refused_where_real_ones_are(name: str, key: str, what: str) -> None:
    with FakeTensorMode():
        call = fake_call(name)
        call.lists[key] = MISMATCHES[what](call.lists[key])
        with pytest.raises((ValueError, RuntimeError), match=rf"^{key}"):
            call()


# With two empty lists and no number, restore_ has nothing to tell the device by.
@pytest.mark.parametrize("name", ["perturb_", "combine_", "sgd_step_", "adamw_step_"])
def test_empty_lists_on_the_meta_device_are_fine(name: str) -> None:
    with torch.device("meta"):
        call = fake_call(name)
        call.lists = {key: [] for key in call.lists}
        call()
