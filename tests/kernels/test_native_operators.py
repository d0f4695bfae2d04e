"""``torch.ops.gam_fused`` by itself: what is refused, what PyTorch is told, the same bits on any number of threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gam_fused import kernels
from tests.kernels.tensor_lists import assert_same_bits, bits

REASON = kernels.available()["native"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

ops = torch.ops.gam_fused
LISTS = {
    "l2_norm": ("tensors",),
    "l2_norm_pair": ("first", "second"),
    "perturb_": ("params", "directions"),
    "restore_": ("params", "backups"),
    "combine_": ("params", "backups", "grads", "hvps"),
    "sgd_step_": ("params", "backups", "grads", "hvps", "momentum_buffers"),
    "adamw_step_": ("params", "backups", "grads", "hvps", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps"),
}
WRITTEN = {
    "l2_norm": (),
    "l2_norm_pair": (),
    "perturb_": ("params", "directions"),
    "restore_": ("params",),
    "combine_": ("params", "grads"),
    "sgd_step_": ("params", "grads", "momentum_buffers"),
    "adamw_step_": ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps"),
}
over_operators = pytest.mark.parametrize("name", list(LISTS))
over_mutations = pytest.mark.parametrize("name", [name for name, written in WRITTEN.items() if written])


class Call:
    """A call that works, to be broken in one place."""

    def __init__(self, name: str, shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> None:
        self.name = name
        self.dtype = dtype
        self.lists = {key: [torch.rand(shape).to(dtype) for shape in shapes] for key in LISTS[name]}
        if name == "adamw_step_":
            self.lists["state_steps"] = [torch.zeros(()) for _ in shapes]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.norms = [torch.tensor(1.5, dtype=wide), torch.tensor(2.5, dtype=wide)]

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        lists = list(self.lists.values())
        if self.name in ("l2_norm", "l2_norm_pair", "restore_"):
            return lists, {}
        if self.name == "perturb_":
            return [*lists, *self.norms, 0.1, 1e-12], {}
        if self.name == "combine_":
            return [*lists, self.norms[0], 0.1, 0.3, 1e-12], {}
        if self.name == "sgd_step_":
            options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}
        else:
            options = {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True}
        return [*lists, self.norms[0], [self.norms[1]], 0.1, 0.3, 1e-12], options

    def __call__(self) -> Any:
        args, options = self.arguments()
        with torch.no_grad():
            return getattr(ops, self.name)(*args, **options)

    def tensors(self) -> list[Tensor]:
        return [tensor for tensors in self.lists.values() for tensor in tensors]


def freed(tensor: Tensor) -> Tensor:
    """A tensor whose storage is gone: behind an offset, its address is no null pointer."""
    view = torch.zeros(tensor.numel() + 8, dtype=tensor.dtype)[8:].view(tensor.shape)
    view.untyped_storage().resize_(0)
    return view


REPLACEMENTS: dict[str, Callable[[Tensor], Any]] = {
    "a longer shape": lambda t: torch.zeros((*t.shape, 2), dtype=t.dtype),
    "a larger shape": lambda t: torch.zeros((t.numel() + 1,), dtype=t.dtype),
    "integers": lambda t: torch.zeros(t.shape, dtype=torch.int32),
    "complex numbers": lambda t: torch.zeros(t.shape, dtype=torch.complex64),
    "booleans": lambda t: torch.zeros(t.shape, dtype=torch.bool),
    "another dtype": lambda t: t.to(torch.float64 if t.dtype != torch.float64 else torch.float32),
    "float8": lambda t: torch.zeros(t.shape, dtype=torch.float8_e4m3fn),
    "the meta device": lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"),
    "a huge tensor on meta": lambda t: torch.empty(2**59, dtype=t.dtype, device="meta"),
    "gaps": lambda t: torch.zeros(2 * t.numel() + 2, dtype=t.dtype)[::2][: t.numel()].view(t.shape),
    "an expanded tensor": lambda t: torch.zeros(1, dtype=t.dtype).expand(t.numel()).view(t.shape),
    "a sparse tensor": lambda t: torch.zeros(t.shape, dtype=t.dtype).to_sparse(),
    "a freed storage": freed,
    "None": lambda t: None,
    "a number": lambda t: 1.0,
    "a string": lambda t: "tensor",
}


@over_operators
@settings(max_examples=1500)
@given(data=st.data())
def test_malformed_calls_raise_and_write_nothing(name: str, data: st.DataObject) -> None:
    """1,500 for each of the seven operators."""
    count = data.draw(st.integers(1, 4))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    shapes = [data.draw(st.sampled_from([(4,), (2, 3), (3, 1, 2), (17,)])) for _ in range(count)]
    call = Call(name, shapes, dtype)
    key = data.draw(st.sampled_from(list(LISTS[name])))
    at = data.draw(st.integers(0, count - 1))
    whole = call.tensors()
    kinds = ["replace"] + (["shorter", "longer", "alias", "overlap", "scalar"] if WRITTEN[name] else [])
    kind = data.draw(st.sampled_from(kinds))
    if kind == "replace":
        # A single number can neither have gaps nor repeat an element.
        fine_for_one = ("gaps", "an expanded tensor") if key == "state_steps" else ()
        replacements = [what for what in REPLACEMENTS if what not in fine_for_one]
        replacement = REPLACEMENTS[data.draw(st.sampled_from(replacements))](call.lists[key][at])
        is_alone = count == 1 and name == "l2_norm"
        if isinstance(replacement, Tensor) and (is_alone or name.startswith("l2_norm")):
            # Of a list that is only read, sizes are free, and one dtype or device is as good as another.
            fine = replacement.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
            is_dense = replacement.layout == torch.strided and replacement.is_contiguous()
            if (
                fine
                and is_dense
                and (is_alone or replacement.dtype == dtype)
                and replacement.untyped_storage().nbytes()
            ):
                replacement = replacement.to(torch.int32)
        call.lists[key][at] = replacement
    elif kind == "shorter":
        call.lists[key].pop()
        if key in ("momentum_buffers", "max_exp_avg_sqs") and not call.lists[key]:
            call.lists[key] = [torch.zeros(1, dtype=dtype)] * (count + 1)
    elif kind == "longer":
        call.lists[key].append(torch.zeros(3, dtype=dtype))
    elif kind in ("alias", "overlap"):
        written = data.draw(st.sampled_from(WRITTEN[name]))
        others = [
            other
            for other in LISTS[name]
            if other != written and (other == "state_steps") == (written == "state_steps")
        ]
        if not others:
            call.lists[written] = [call.lists[written][0]] * (count + 1)
        else:
            victim, other = call.lists[written][at], data.draw(st.sampled_from(others))
            if kind == "overlap":
                buffer = torch.zeros(victim.numel() + 1, dtype=victim.dtype)
                call.lists[written][at] = buffer[:-1].view(victim.shape)
                victim = buffer[1:].view(victim.shape)
            call.lists[other][at] = victim
    elif name == "restore_":
        call.lists["params"] = []
        call.lists["backups"] = [torch.zeros(1)]
    else:
        wrong = [torch.tensor([1.0, 2.0]), torch.tensor(1), torch.tensor(1.0, device="meta"), torch.tensor(1.0).half()]
        call.norms[0] = data.draw(st.sampled_from(wrong))
    before = [bits(tensor).clone() for tensor in whole]
    with pytest.raises((RuntimeError, TypeError, ValueError, NotImplementedError)):
        call()
    assert all(torch.equal(bits(tensor), old) for tensor, old in zip(whole, before, strict=True))


@over_operators
def test_opcheck(name: str) -> None:
    pytest.importorskip("expecttest", reason="torch.library.opcheck needs expecttest")
    args, options = Call(name, [(3,), (2, 5), ()]).arguments()
    torch.library.opcheck(getattr(ops, name).default, tuple(args), options)


@over_mutations
@pytest.mark.parametrize("through", ["torch.ops", "back end"])
def test_a_graph_built_before_a_mutation_does_not_differentiate_after_it(name: str, through: str) -> None:
    call = Call(name, [(3,), (2, 2)])
    for key in WRITTEN[name]:
        call = Call(name, [(3,), (2, 2)])
        if key == "state_steps":
            continue
        watched = call.lists[key][1].requires_grad_()
        loss = watched.square().sum()
        if through == "torch.ops":
            call()
        else:
            run_through_backend(call)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def run_through_backend(call: Call) -> None:
    from gam_fused.kernels.rules import AdamWRule, SGDRule

    native = kernels.resolve("native")
    args, _ = call.arguments()
    if call.name == "sgd_step_":
        native.sgd_step_(*args, SGDRule(lr=0.1, momentum=0.9), first_step=False)
    elif call.name == "adamw_step_":
        native.adamw_step_(*args, AdamWRule(lr=0.1, amsgrad=True))
    else:
        getattr(native, call.name)(*args)


@pytest.fixture
def threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@over_operators
@pytest.mark.usefixtures("threads_restored")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_bits_on_any_number_of_threads_and_in_each_run(name: str, dtype: torch.dtype) -> None:
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        call = Call(name, [(300_007,), (5,), (700, 333), (0,), (16_384,)], dtype)
        outputs = call()
        results.append([*call.tensors(), *([] if outputs is None else [outputs] if name == "l2_norm" else outputs)])
    for result in results[1:]:
        assert_same_bits(result, results[0])


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_bit_pattern_widens_and_rounds_as_pytorch_does(dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = patterns[patterns.isfinite()]
    for scale in (1.0, 0.3, 7.7e-4, 1.1e3):
        grads, hvps = [torch.zeros_like(values)], [values.clone()]
        ops.combine_([values.clone()], [values.clone()], grads, hvps, torch.tensor(1.0), 1.0, scale, 0.0)
        expected = (values.float() * torch.tensor(scale)).to(dtype)
        assert torch.equal(grads[0].float(), expected.float())


def available_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


@pytest.mark.slow
@pytest.mark.skipif(available_memory() < 11 * 2**30, reason="needs 11 GiB of free memory")
def test_a_tensor_of_more_than_2_to_the_31_elements() -> None:
    size = 2**31 + 70_001
    marks = [0, 1, 2**31 - 1, 2**31, 2**31 + 1, size - 1]
    param, direction = torch.zeros(size, dtype=torch.bfloat16), torch.zeros(size, dtype=torch.bfloat16)
    param[marks] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.bfloat16)
    direction[marks] = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 16.0], dtype=torch.bfloat16)
    assert float(ops.l2_norm([param])) == pytest.approx(math.sqrt(91), rel=2e-7)
    ops.perturb_([param], [direction], torch.tensor(1.0), torch.tensor(1.0), 0.5, 0.0)
    assert param[marks].tolist() == [5.0, 4.0, 4.0, 4.5, 5.25, 14.0]
    assert direction[marks].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert float(ops.l2_norm([direction])) == pytest.approx(math.sqrt(91), rel=2e-7)
