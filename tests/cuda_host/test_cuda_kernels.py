"""The CUDA kernels' own sources, run on the CPU and compared with the formulas in float64.

One build has AddressSanitizer and UndefinedBehaviorSanitizer and room for few tensors in a launch, so that short lists
take several launches; the other has ThreadSanitizer and the launches of a device.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.cuda_host.kernels_on_host import (
    ADDRESS,
    COMPILER,
    DTYPES,
    THREAD,
    KernelsFailed,
    KernelsOnHost,
    build,
    mutated,
)

pytestmark = [
    pytest.mark.slow,  # building takes longer than most tests
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"{COMPILER} is not installed"),
]

CHUNK = 8192
# Around nothing, one pack of 4 and 8, one block's packs and one chunk; several chunks.
SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 1023, 1025, 0, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3)
OFFSETS = ([0] * len(SIZES), [i % 3 for i in range(len(SIZES))])
RTOL = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
ATOL = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp64", "fp32", "bf16", "fp16"])


def shared_folder(tmp_path_factory: pytest.TempPathFactory, name: str, worker_id: str) -> Path:
    """The same folder for all workers of one run."""
    base = tmp_path_factory.getbasetemp()
    return (base if worker_id == "master" else base.parent) / name


@pytest.fixture(scope="session")
def worker_id(request: pytest.FixtureRequest) -> str:
    return getattr(request.config, "workerinput", {}).get("workerid", "master")


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> KernelsOnHost:
    """With AddressSanitizer; a launch takes the tensors that fit into 800 bytes: 14 in one list, 3 in eight."""
    small_tables = mutated(
        tmp_path_factory.mktemp("small_tables"),
        "chunk_plan.h",
        "kKernelParameterBytes = 32764",
        "kKernelParameterBytes = 800",
    )
    return build(shared_folder(tmp_path_factory, "address", worker_id), ADDRESS, small_tables)


@pytest.fixture(scope="session")
def threads(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> KernelsOnHost:
    """With ThreadSanitizer."""
    return build(shared_folder(tmp_path_factory, "thread", worker_id), THREAD)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def random_list(dtype: torch.dtype, sizes: tuple[int, ...] = SIZES) -> list[Tensor]:
    return [torch.randn(size, dtype=torch.float64).to(dtype) for size in sizes]


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def double(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.to(torch.float64, copy=True) for tensor in tensors]


def number(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=wide(dtype))


def assert_bitwise(actual: list[Tensor], expected: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), (
            f"tensor {i} of {a.numel()} elements"
        )


def assert_rounded(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Float64 results, rounded to the tensors' dtype once."""
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=RTOL[a.dtype], atol=ATOL[a.dtype])


# ---------------------------------------------------------------- perturb, restore, combine


@dtypes
@pytest.mark.parametrize("offsets", OFFSETS, ids=["aligned", "misaligned"])
def test_perturb_moves_along_the_direction_and_leaves_the_backup(kernels, dtype, offsets):
    theta, direction = random_list(dtype), random_list(dtype)
    params, directions = copies(theta), copies(direction)
    kernels.call(
        "perturb",
        [params, directions],
        numbers=[0.1, 1e-3],
        scalars=[number(2, dtype), number(3, dtype)],
        offsets=[offsets, offsets[::-1]],
    )
    scale = 0.1 / (2 + 1e-3 * (3 + 1e-3))
    assert_bitwise(directions, theta)
    assert_rounded(params, [t + scale * u for t, u in zip(double(theta), double(direction), strict=True)])


@pytest.mark.parametrize("norms", [(math.inf, 1.0), (1.0, math.nan), (0.0, 0.0)], ids=str)
def test_perturb_does_not_move_where_the_quotient_is_not_finite(kernels, norms):
    theta = random_list(torch.float32)
    params, directions = copies(theta), random_list(torch.float32)
    scalars = [number(norm, torch.float32) for norm in norms]
    kernels.call("perturb", [params, directions], numbers=[0.1, 0.0], scalars=scalars)
    assert_bitwise(params, theta)
    assert_bitwise(directions, theta)


@settings(max_examples=15)
@given(
    dtype=st.sampled_from(DTYPES),
    tensors=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=60),
    seed=st.integers(0, 2**32 - 1),
)
def test_restoring_after_perturbing_gives_back_every_bit(kernels, dtype, tensors, seed):
    """Whatever the bits: NaN with payloads, infinities, subnormal numbers."""
    random = torch.Generator().manual_seed(seed)
    theta = [
        torch.randint(0, 256, (size * dtype.itemsize,), dtype=torch.uint8, generator=random).view(dtype)
        for size, _, _ in tensors
    ]
    params, directions = copies(theta), [torch.ones_like(t) for t in theta]
    offsets = [[t[1] for t in tensors], [t[2] for t in tensors]]
    shuffled = dataclasses.replace(kernels, seed=seed)
    scalars = [number(1, dtype), number(1, dtype)]
    shuffled.call("perturb", [params, directions], numbers=[0.1, 0.0], scalars=scalars, offsets=offsets)
    shuffled.call("restore", [params, directions], numbers=[], offsets=offsets)
    assert_bitwise(params, theta)


@dtypes
@pytest.mark.parametrize("offsets", OFFSETS, ids=["aligned", "misaligned"])
def test_combine_restores_and_adds_the_penalty(kernels, dtype, offsets):
    params, backups, grads, hvps = (random_list(dtype) for _ in range(4))
    grads_before = double(grads)
    kernels.call(
        "combine",
        [params, backups, grads, hvps],
        numbers=[0.1, -0.3, 1e-3],
        scalars=[number(2, dtype)],
        offsets=[offsets] * 4,
    )
    scale = -0.3 * 0.1 / (2 + 1e-3)
    assert_bitwise(params, backups)
    assert_rounded(grads, [g + scale * h for g, h in zip(grads_before, double(hvps), strict=True)])


# ---------------------------------------------------------------- fused steps


@dataclasses.dataclass
class Common:
    """What sgd_step and adamw_step have in common."""

    norm: float = 2.0
    rho: float = 0.1
    alpha: float = 0.3
    xi: float = 1e-3
    grad_scale: float | None = None
    found_inf: float | None = None
    lr: float = 0.05
    lr_tensor: float | None = None
    guards: tuple[float, ...] = ()
    maximize: bool = False
    write_grads: bool = True

    def numbers(self) -> list[float]:
        return [self.rho, self.alpha, self.xi, len(self.guards), self.lr, self.maximize, self.write_grads]

    def scalars(self, dtype: torch.dtype) -> list[Tensor | None]:
        float32 = [None if value is None else torch.tensor(value) for value in (self.grad_scale, self.found_inf)]
        lr = None if self.lr_tensor is None else number(self.lr_tensor, dtype)
        return [number(self.norm, dtype), *float32, lr, *(number(guard, dtype) for guard in self.guards)]

    def combined(self, grads: list[Tensor], hvps: list[Tensor]) -> list[Tensor]:
        """The gradient of the whole objective in float64."""
        scale = self.alpha * self.rho / (self.norm + self.xi)
        pairs = zip(double(grads), double(hvps), strict=True)
        return [(g + scale * h) / (self.grad_scale or 1) for g, h in pairs]

    def learning_rate(self) -> float:
        return self.lr if self.lr_tensor is None else self.lr_tensor


def steps_with(
    optimizer_class: type[torch.optim.Optimizer],
    theta: list[Tensor],
    grads: list[Tensor],
    state: dict[str, list[Tensor]],
    **settings: float,
) -> list[Tensor]:
    """One step of PyTorch's own optimizer, which updates ``state``; everything in float64."""
    params = [torch.nn.Parameter(t.clone()) for t in theta]
    optimizer = optimizer_class(params, foreach=False, **settings)
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        param.grad = grad.clone()
        optimizer.state[param].update({key: tensors[i] for key, tensors in state.items()})
    optimizer.step()
    for key in state:
        state[key] = [optimizer.state[param][key] for param in params]
    return [param.detach() for param in params]


SGD_CASES = {
    "plain": (Common(), {}),
    "weight decay": (Common(lr_tensor=0.2), {"weight_decay": 0.1}),
    "momentum": (Common(guards=(1.0, 0.0)), {"momentum": 0.9, "dampening": 0.4}),
    "first step": (Common(maximize=True), {"momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1}),
    "nesterov": (Common(grad_scale=4.0, found_inf=0.0), {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "no grads": (Common(write_grads=False), {"momentum": 0.5}),
}


def run_sgd(kernels, common, settings, lists, momentum_buffers, *, first_step=False, offsets=None):
    momentum, dampening, decay, nesterov = (
        settings.get(key, 0) for key in ("momentum", "dampening", "weight_decay", "nesterov")
    )
    penalty, rest = common.numbers()[:3], common.numbers()[3:]
    kernels.call(
        "sgd_step",
        [*lists, momentum_buffers] if momentum else lists,
        numbers=[momentum, dampening, decay, nesterov, first_step, *penalty, *rest],
        scalars=common.scalars(lists[0][0].dtype),
        offsets=None if offsets is None else [offsets] * (5 if momentum else 4),
    )


@dtypes
@pytest.mark.parametrize("name", SGD_CASES)
def test_sgd_step_is_a_step_of_torch_optim_sgd(kernels, dtype, name):
    common, settings = SGD_CASES[name]
    params, backups, grads, hvps, buffers = (random_list(dtype) for _ in range(5))
    grads_before = copies(grads)
    combined = common.combined(grads, hvps)
    has_momentum, first_step = "momentum" in settings, name == "first step"
    state = {"momentum_buffer": double(buffers)} if has_momentum and not first_step else {}
    if first_step:
        buffers = [torch.full_like(buffer, math.nan) for buffer in buffers]
    run_sgd(
        kernels, common, settings, [params, backups, grads, hvps], buffers, first_step=first_step, offsets=OFFSETS[1]
    )

    expected = steps_with(
        torch.optim.SGD,
        double(backups),
        combined,
        state,
        lr=common.learning_rate(),
        maximize=common.maximize,
        **settings,
    )
    assert_rounded(params, expected)
    if state:
        assert_rounded(buffers, state["momentum_buffer"])
    if first_step:
        decayed = [0.1 * b - g for b, g in zip(double(backups), combined, strict=True)]
        assert_rounded(buffers, decayed)
    if common.write_grads:
        assert_rounded(grads, combined)  # of the objective itself, also where it is maximized
    else:
        assert_bitwise(grads, grads_before)


ADAMW_CASES = {
    "AdamW": (torch.optim.AdamW, Common(guards=(1.0,)), {"weight_decay": 0.1}),
    "Adam": (torch.optim.Adam, Common(grad_scale=4.0, found_inf=0.0), {"weight_decay": 0.1, "betas": (0.5, 0.75)}),
    "amsgrad": (torch.optim.AdamW, Common(maximize=True), {"amsgrad": True, "weight_decay": 0.0}),
    "no grads": (torch.optim.Adam, Common(write_grads=False, lr_tensor=0.2), {"amsgrad": True, "eps": 1e-4}),
}


def run_adamw(kernels, optimizer_class, common, settings, lists, state, *, offsets=None):
    beta1, beta2 = settings.get("betas", (0.9, 0.999))
    decay, amsgrad = settings.get("weight_decay", 0.0), settings.get("amsgrad", False)
    decoupled = optimizer_class is torch.optim.AdamW
    penalty, rest = common.numbers()[:3], common.numbers()[3:]
    moments = [state[key] for key in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else []), "step")]
    kernels.call(
        "adamw_step",
        [*lists, *moments],
        numbers=[beta1, beta2, settings.get("eps", 1e-8), decay, decoupled, amsgrad, *penalty, *rest],
        scalars=common.scalars(lists[0][0].dtype),
        offsets=None if offsets is None else [*[offsets] * (len(lists) + len(moments) - 1), [0] * len(offsets)],
    )


def adamw_state(dtype: torch.dtype, amsgrad: bool) -> dict[str, list[Tensor]]:
    squares = {"exp_avg_sq": 1, "max_exp_avg_sq": 1} if amsgrad else {"exp_avg_sq": 1}
    state = {"exp_avg": random_list(dtype), **{key: [t.square() for t in random_list(dtype)] for key in squares}}
    return {**state, "step": [torch.tensor(float(i % 5)) for i in range(len(SIZES))]}


@dtypes
@pytest.mark.parametrize("name", ADAMW_CASES)
def test_adamw_step_is_a_step_of_torch_optim_adam(kernels, dtype, name):
    optimizer_class, common, settings = ADAMW_CASES[name]
    params, backups, grads, hvps = (random_list(dtype) for _ in range(4))
    grads_before = copies(grads)
    combined = common.combined(grads, hvps)
    state = adamw_state(dtype, settings.get("amsgrad", False))
    settings = {"weight_decay": 0.0, **settings}
    expected_state = {key: copies(state[key]) if key == "step" else double(state[key]) for key in state}
    run_adamw(kernels, optimizer_class, common, settings, [params, backups, grads, hvps], state, offsets=OFFSETS[1])

    expected = steps_with(
        optimizer_class,
        double(backups),
        combined,
        expected_state,
        lr=common.learning_rate(),
        maximize=common.maximize,
        **settings,
    )
    assert_rounded(params, expected)
    for key, tensors in state.items():
        assert_rounded(tensors, double(expected_state[key]))
    if common.write_grads:
        assert_rounded(grads, combined)  # of the objective itself, also where it is maximized
    else:
        assert_bitwise(grads, grads_before)


@pytest.mark.parametrize(
    "stopped",
    [Common(norm=math.inf), Common(norm=math.nan), Common(guards=(1.0, -math.inf)), Common(found_inf=1.0)],
    ids=["norm inf", "norm nan", "guard", "found_inf"],
)
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_a_step_that_is_stopped_restores_and_writes_nothing_else(kernels, rule, stopped):
    params, backups, *rest = (random_list(torch.bfloat16) for _ in range(5))
    state = adamw_state(torch.bfloat16, amsgrad=True)
    rest_before, state_before = [copies(tensors) for tensors in rest], {key: copies(state[key]) for key in state}
    lists = [params, backups, rest[0], rest[1]]
    if rule == "sgd":
        run_sgd(kernels, stopped, {"momentum": 0.9}, lists, rest[2])
    else:
        run_adamw(kernels, torch.optim.AdamW, stopped, {"amsgrad": True}, lists, state)
    assert_bitwise(params, backups)
    for after, before in zip(rest, rest_before, strict=True):
        assert_bitwise(after, before)
    for key in state:
        assert_bitwise(state[key], state_before[key])


def test_too_many_guards_are_refused(kernels):
    lists = [[torch.ones(1)] for _ in range(4)]
    with pytest.raises(KernelsFailed, match="guards: 17 tensors, expected at most 16"):
        run_sgd(kernels, Common(guards=(1.0,) * 17), {}, lists, [])


# ---------------------------------------------------------------- norms


def norm_of(kernels: KernelsOnHost, tensors: list[Tensor], offsets: list[int] | None = None) -> Tensor:
    result = torch.full((), -1.0, dtype=wide(tensors[0].dtype) if tensors else torch.float32)
    kernels.call(
        "l2_norms",
        [tensors],
        numbers=[len(tensors), 1],
        scalars=[result],
        offsets=None if offsets is None else [offsets],
    )
    return result


def exact_norm(tensors: list[Tensor]) -> float:
    """To the last bit or next to it, without overflow or underflow."""
    return math.hypot(*torch.cat(tensors).double().tolist()) if tensors else 0.0


def ulps_from(actual: Tensor, expected: float) -> float:
    """How many units in the last place lie between a result and a number in float64."""
    rounded = torch.tensor(expected, dtype=torch.float64).to(actual.dtype)
    if actual == rounded:
        return 0.0
    spacing = torch.nextafter(rounded, torch.full_like(rounded, math.inf)) - rounded
    return abs(actual.item() - expected) / spacing.item()


@dtypes
def test_norm_is_that_of_float64(kernels, dtype):
    tensors = random_list(dtype)
    assert ulps_from(norm_of(kernels, tensors), exact_norm(tensors)) <= 2


def test_norm_of_an_empty_list_and_of_empty_tensors_is_zero(kernels):
    assert norm_of(kernels, []).item() == 0.0
    assert norm_of(kernels, [torch.ones(0), torch.ones(0)]).item() == 0.0


def test_norm_has_the_same_bits_for_any_grid_order_and_alignment(kernels):
    tensors = random_list(torch.float32)
    expected = norm_of(kernels, tensors)
    for seed in (1, 2):
        other = dataclasses.replace(kernels, seed=seed, multiprocessors=1 + 3 * seed)
        assert torch.equal(norm_of(other, tensors, OFFSETS[1]), expected)


@settings(max_examples=10)
@given(
    dtype=st.sampled_from(DTYPES),
    values=st.lists(st.floats(allow_nan=False, width=32), min_size=1, max_size=80),
)
def test_norm_of_any_numbers(kernels, dtype, values):
    """Squares of float32 numbers overflow and underflow; their norm does not."""
    tensor = torch.tensor(values, dtype=torch.float64).to(dtype)
    expected = exact_norm([tensor])
    actual = norm_of(kernels, [tensor])
    if torch.tensor(expected, dtype=actual.dtype).isinf():
        assert actual.item() == math.inf
    else:
        assert ulps_from(actual, expected) <= 2


@dtypes
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
def test_norm_with_a_value_that_is_not_finite(kernels, dtype, value):
    tensors = [torch.ones(5, dtype=dtype), torch.ones(2 * CHUNK, dtype=dtype)]
    tensors[1][CHUNK + 17] = value
    expected = math.nan if math.isnan(value) else math.inf
    assert norm_of(kernels, tensors).item() == pytest.approx(expected, nan_ok=True)


def test_norm_does_not_lose_small_numbers_beside_large_ones(kernels):
    tensors = [torch.tensor([4096.0]), torch.full((3 * CHUNK,), 2.0**-8)]
    assert ulps_from(norm_of(kernels, tensors), exact_norm(tensors)) <= 2


def test_norms_of_two_lists_over_several_launches(kernels):
    """17 tensors with elements, 14 of which fit into one launch."""
    first, second = random_list(torch.float32, (3,) * 9), random_list(torch.float32, (0, 5, 1) * 4)
    both = [torch.full((), -1.0) for _ in range(2)]
    kernels.call("l2_norms", [[*first, *second]], numbers=[len(first), 2], scalars=both)
    assert torch.equal(both[0], norm_of(kernels, first))
    assert torch.equal(both[1], norm_of(kernels, second))
    assert ulps_from(both[0], exact_norm(first)) <= 2


# ---------------------------------------------------------------- races, and what would be one


def perturbs(kernels: KernelsOnHost) -> None:
    sizes = (1, 6, 3000, CHUNK + 1, 2, 3, 4)  # more chunks than the six blocks
    theta, direction = random_list(torch.float32, sizes), random_list(torch.float32, sizes)
    params, directions = copies(theta), copies(direction)
    scalars = [torch.tensor(1.0), torch.tensor(1.0)]
    kernels.call(
        "perturb", [params, directions], numbers=[0.5, 0.0], scalars=scalars, offsets=[[0, 0, 1, 0, 0, 0, 0]] * 2
    )
    assert_bitwise(directions, theta)
    assert_rounded(params, [t + 0.5 * u for t, u in zip(double(theta), double(direction), strict=True)])


def takes_norms(kernels: KernelsOnHost) -> None:
    # Several chunks for each of the four blocks, so that shared memory is used again.
    tensors = [torch.ones(size) for size in (CHUNK,) * 8 + (100,)]
    assert norm_of(kernels, tensors).item() == pytest.approx(math.sqrt(8 * CHUNK + 100), rel=1e-7)


def test_no_data_race(threads):
    perturbs(threads)
    takes_norms(threads)
    lists = [random_list(torch.bfloat16, (9, 4000)) for _ in range(5)]
    run_sgd(threads, Common(), {"momentum": 0.9}, lists[:4], lists[4])
    state = {"exp_avg": lists[4], "exp_avg_sq": [t.square() for t in lists[4]], "step": [torch.zeros(())] * 2}
    run_adamw(threads, torch.optim.AdamW, Common(), {}, lists[:4], state)


@pytest.mark.parametrize(("operator", "lists", "count"), [("restore", 2, 1200), ("combine", 4, 800)])
def test_more_tensors_than_a_launch_takes_on_a_device(threads, operator, lists, count):
    tensors = [random_list(torch.float32, tuple(1 + i % 7 for i in range(count))) for _ in range(lists)]
    arguments = {"restore": ([], []), "combine": ([0.1, 0.3, 0.0], [torch.tensor(1.0)])}
    numbers, scalars = arguments[operator]
    threads.call(operator, tensors, numbers=numbers, scalars=scalars)
    assert_bitwise(tensors[0], tensors[1])


BREAKS = {
    "no barrier before the sums of warps are read": (
        "l2_norm", "cuda/l2_norm.cu", "    __syncthreads();\n    if (warp == 0)", "    if (warp == 0)",
        THREAD, takes_norms, "data race",
    ),
    "no barrier before the sums of warps are written again": (
        "l2_norm", "cuda/l2_norm.cu", "__syncthreads();  // before", "// before", THREAD, takes_norms, "data race",
    ),
    "a shuffle that leaves half a warp out": (
        "l2_norm", "cuda/l2_norm.cu",
        "unsigned distance = kWarp / 2; distance > 0; distance /= 2) {\n        const A sum",
        "unsigned distance = kWarp / 4; distance > 0; distance /= 2) {\n        const A sum",
        ADDRESS, takes_norms, "assert",
    ),
    "a tail that is one element too long": (
        "perturb", "cuda/multi_tensor.cuh", "first + lane < count", "first + lane <= count", ADDRESS, perturbs,
        "heap-buffer-overflow",
    ),
    "packs of tensors that are not aligned": (
        "perturb", "cuda/multi_tensor.cuh", "% sizeof(Pack<T>) == 0", "% sizeof(Pack<T>) < 16", ADDRESS, perturbs,
        "misaligned address",
    ),
    "a search that finds the tensor before": (
        "perturb", "cuda/multi_tensor.cuh", "first_chunk[middle] <= number", "first_chunk[middle] < number", ADDRESS,
        perturbs, "assert",
    ),
    "a block that skips every second of its chunks": (
        "perturb", "cuda/multi_tensor.cuh", "number += gridDim.x", "number += 2 * gridDim.x", ADDRESS, perturbs,
        "assert",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_the_harness_notices(tmp_path, name):
    """Each break is made in a copy of the sources; the same call passes without it (test_no_data_race)."""
    source, file, old, new, sanitizer, call, message = BREAKS[name]
    broken = build(tmp_path / "build", sanitizer, mutated(tmp_path, file, old, new), (source,))
    check: Callable[[KernelsOnHost], None] = call
    with pytest.raises(AssertionError) as failure:
        check(broken)
    if message == "assert":
        assert not isinstance(failure.value, KernelsFailed)
    else:
        assert message in str(failure.value)
