"""Calls past PyTorch's dispatcher: what they do is what the dispatcher's do, and what is for it they leave to it."""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from gam_fused import GAM, kernels
from gam_fused.kernels import extension, native
from tests import problems
from tests.kernels.native.common import (
    LISTS,
    WRITTEN,
    Call,
    FullCall,
    NeedsDispatcher,
    call_directly,
    needs_direct,
    over_dtypes,
    over_mutations,
    over_operators,
    run_through_backend,
)
from tests.kernels.tensor_lists import bits
from tests.test_parity import RULES

pytestmark = needs_direct

SHAPES = [(4,), (2, 3), (0,), (5000,), ()]


def twins(kind: type[Call], name: str, dtype: torch.dtype = torch.float32) -> tuple[Call, Call]:
    """Two calls with equal tensors."""
    calls = []
    for _ in range(2):
        torch.manual_seed(0)
        calls.append(kind(name, SHAPES, dtype))
    return calls[0], calls[1]


def same_bits(one: Any, other: Any) -> bool:
    pairs = zip(*([x] if isinstance(x, Tensor) else list(x or ()) for x in (one, other)), strict=True)
    return all(a.dtype == b.dtype and torch.equal(bits(a), bits(b)) for a, b in pairs)


@over_operators
@over_dtypes
@pytest.mark.parametrize("kind", [Call, FullCall])
def test_bits_and_versions_are_those_of_the_dispatcher(name: str, dtype: torch.dtype, kind: type[Call]) -> None:
    direct, dispatched = twins(kind, name, dtype)
    before = [tensor._version for tensor in direct.tensors()]
    assert same_bits(direct.directly(), dispatched())
    assert same_bits(direct.tensors(), dispatched.tensors())
    counted = [tensor._version - old for tensor, old in zip(direct.tensors(), before, strict=True)]
    expected = [int(key in WRITTEN[name]) for key, tensors in direct.lists.items() for _ in tensors]
    assert counted == expected


@pytest.mark.parametrize("name", ["perturb_", "shift_", "sgd_step_", "adamw_step_"])
@pytest.mark.parametrize("seed", [None, 0, 7, -(2**63), 2**63 - 1])
def test_rounding_seeds_reach_the_kernels(name: str, seed: int | None) -> None:
    direct, dispatched = twins(Call, name, torch.bfloat16)
    for call, run in ((direct, call_directly), (dispatched, through_dispatcher)):
        args, options = call.arguments()
        run(name, args, {**options, "rounding_seed": seed})
    assert same_bits(direct.tensors(), dispatched.tensors())


def through_dispatcher(name: str, args: list[Any], options: dict[str, Any]) -> Any:
    return getattr(torch.ops.gam_fused, name)(*args, **options)


@over_operators
def test_lists_may_be_tuples_and_numbers_integers(name: str) -> None:
    direct, dispatched = twins(Call, name)
    args, options = direct.arguments()
    args = [tuple(x) if isinstance(x, list) else 1 if isinstance(x, float) else x for x in args]
    result = call_directly(name, args, options)
    args, options = dispatched.arguments()
    expected = through_dispatcher(name, [1 if isinstance(x, float) else x for x in args], options)
    assert same_bits(result, expected)
    assert same_bits(direct.tensors(), dispatched.tensors())


@over_operators
def test_parameters_and_tensors_of_a_graph_are_taken(name: str) -> None:
    direct, dispatched = twins(Call, name)
    for call in (direct, dispatched):
        first = next(iter(call.lists))
        call.lists[first] = [torch.nn.Parameter(tensor) for tensor in call.lists[first]]
    assert same_bits(direct.directly(), dispatched())
    assert same_bits(direct.tensors(), dispatched.tensors())
    assert all(isinstance(t, torch.nn.Parameter) for t in direct.lists[first])


@pytest.mark.parametrize("context", [torch.inference_mode, nullcontext])
def test_tensors_of_inference_mode_are_written_and_have_no_version(
    context: Callable[[], AbstractContextManager[Any]],
) -> None:
    with torch.inference_mode():
        call = Call("restore_", SHAPES)
    with context():
        call.directly()
        assert same_bits(call.lists["params"], call.lists["backups"])


# ---------------------------------------------------------------- what is left to the dispatcher


class Subclass(torch.Tensor):
    pass


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "a subclass": lambda t: t.as_subclass(Subclass),
    "a negated view": lambda t: torch._neg_view(t),
    "a conjugated view": lambda t: torch.zeros(t.shape, dtype=torch.complex64).conj(),
    "a sparse tensor": lambda t: t.to_sparse(),
    "a tensor of oneDNN's": lambda t: t.reshape(-1).to_mkldnn(),
    "a meta tensor": lambda t: t.to("meta"),
    "None": lambda t: None,
    "an array": lambda t: t.numpy(),
}


@over_operators
@pytest.mark.parametrize("what", list(TENSORS))
def test_other_tensors_are_left_to_the_dispatcher(name: str, what: str) -> None:
    for key, last in itertools.product(LISTS[name], (0, 1)):
        call = Call(name, [(4,), (2, 3)])
        whole = call.tensors()
        before, versions = [t.clone() for t in whole], [t._version for t in whole]
        call.lists[key][last] = TENSORS[what](call.lists[key][last])
        with pytest.raises(NeedsDispatcher):
            call.directly()
        assert same_bits(whole, before)
        assert [t._version for t in whole] == versions


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "a torch function mode": FunctionMode,
    "a dispatch mode": DispatchMode,
    "a profiler": lambda: profile(activities=[torch.profiler.ProfilerActivity.CPU]),
}


@over_operators
@pytest.mark.parametrize("mode", list(MODES))
def test_what_watches_operators_sees_the_call(name: str, mode: str) -> None:
    call = Call(name, SHAPES)
    before = [tensor.clone() for tensor in call.tensors()]
    with MODES[mode](), pytest.raises(NeedsDispatcher):
        call.directly()
    assert same_bits(call.tensors(), before)
    call.directly()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu"), nullcontext])
def test_what_does_not_watch_operators_is_no_reason(context: Callable[[], AbstractContextManager[Any]]) -> None:
    call = Call("l2_norm", SHAPES)
    with context():
        assert same_bits(call.directly(), Call.__call__(call))


def test_profilers_see_what_the_back_end_calls() -> None:
    call = Call("restore_", SHAPES)
    with profile(activities=[torch.profiler.ProfilerActivity.CPU]) as watched:
        kernels.resolve("native").restore_(*call.lists.values())
    assert "gam_fused::restore_" in {event.key for event in watched.key_averages()}


def test_tensors_in_a_transform_are_left_to_the_dispatcher() -> None:
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(extension.direct_calls()["l2_norm"]([x]))
        return x.sum()

    torch.func.vmap(function)(torch.ones(2, 3))
    torch.func.grad(function)(torch.ones(3))
    assert seen == [NotImplemented, NotImplemented]


WRONG: dict[str, Callable[[list[Any], dict[str, Any]], None]] = {
    "an unknown name": lambda args, options: options.update(bias=1.0),
    "an argument twice": lambda args, options: options.update(params=args[0]),
    "too many": lambda args, options: args.extend([None] * 40),
    "a seed without its name": lambda args, options: args.append(None),
    "too few": lambda args, options: args.pop(),
    "an iterator": lambda args, options: args.__setitem__(0, iter(args[0])),
    "a number in words": lambda args, options: args.__setitem__(4, "0.1"),
    "a huge number": lambda args, options: args.__setitem__(4, 10**400),
    "a truth for a number": lambda args, options: args.__setitem__(4, True),
    "no norm": lambda args, options: args.__setitem__(2, None),
    "a seed of too many bits": lambda args, options: options.update(rounding_seed=2**63),
    "a fraction for a seed": lambda args, options: options.update(rounding_seed=1.0),
}


@pytest.mark.parametrize("wrong", list(WRONG))
def test_calls_that_no_schema_takes_are_left_to_the_dispatcher(wrong: str) -> None:
    call = Call("perturb_", SHAPES)
    before = [tensor.clone() for tensor in call.tensors()]
    args, options = call.arguments()
    WRONG[wrong](args, options)
    assert extension.direct_calls()["perturb_"](*args, **options) is NotImplemented
    assert same_bits(call.tensors(), before)


# ---------------------------------------------------------------- references


def references(call: Call, args: list[Any]) -> list[int]:
    return [sys.getrefcount(x) for x in (*call.tensors(), *call.norms, *call.lists.values(), *args)]


@over_operators
def test_no_reference_is_left_or_lost(name: str) -> None:
    """Whether the call is made, refused or left to the dispatcher."""
    call = FullCall(name, [(4,), (2, 3)])
    args, options = call.arguments()
    refused = [[*args[0][:-1], torch.zeros(3, dtype=torch.int32)], *args[1:]]
    left = [[*args[0][:-1], None], *args[1:]]
    before = references(call, args)
    for _ in range(10):
        call_directly(name, args, options)
        with pytest.raises(RuntimeError):
            call_directly(name, refused, options)
        with pytest.raises(NeedsDispatcher):
            call_directly(name, left, options)
    gc.collect()  # of tracebacks
    assert references(call, args) == before


def test_results_are_tensors_of_their_own() -> None:
    call = Call("l2_norm_pair", SHAPES)
    first, second = call.directly()
    new = torch.zeros(())
    assert sys.getrefcount(first) == sys.getrefcount(second) == sys.getrefcount(new)
    assert type(first) is Tensor
    assert not first.requires_grad
    assert first._version == 0


# ---------------------------------------------------------------- how long other threads wait


MOST_ELEMENTS = 2**22


@over_operators
def test_more_elements_than_other_threads_should_wait_for_are_left_to_the_dispatcher(name: str) -> None:
    """It lets go of the interpreter's lock. The lists are refused for other reasons, so that they need no memory."""
    guards = 1 if name in ("sgd_step_", "adamw_step_") else 0
    for above in (0, 1):
        call = Call(name, [()])
        others = [torch.zeros(()).expand(7) for _ in LISTS[name]]
        first = MOST_ELEMENTS + above - guards - sum(t.numel() for t in others[1:])
        others[0] = torch.zeros(()).expand(first)
        call.lists = dict(zip(LISTS[name], ([other] for other in others), strict=True))
        with pytest.raises(NeedsDispatcher if above else RuntimeError):
            call.directly()


def another_thread_runs_during(call: Callable[[], object]) -> bool:
    """Whether the call lets go of the interpreter's lock for long enough that a waiting thread gets it."""
    gate = threading.Lock()
    has_run: list[bool] = []

    def run() -> None:
        gate.acquire()
        has_run.append(True)

    thread = threading.Thread(target=run)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(100)  # threads run until they let go of the lock themselves
    try:
        with gate:
            thread.start()  # returns when the other thread has come to the gate
        call()
        return bool(has_run)
    finally:
        sys.setswitchinterval(interval)
        thread.join()


def test_no_other_thread_runs_between_borrowing_tensors_and_their_last_use() -> None:
    call = Call("restore_", [(MOST_ELEMENTS // 2,)], torch.float64)
    assert not any(another_thread_runs_during(call.directly) for _ in range(10))


def test_other_threads_run_while_the_dispatcher_has_large_tensors() -> None:
    call = Call("restore_", [(4 * MOST_ELEMENTS,)], torch.float64)
    with torch.no_grad():
        call()  # memory is there, and the operator has been looked up
    native_backend = kernels.resolve("native")
    assert any(another_thread_runs_during(lambda: native_backend.restore_(*call.lists.values())) for _ in range(10))


REPLACED_EMPTY = """
import warnings

import torch

from gam_fused.kernels import extension

warnings.simplefilter("ignore")  # of the kernel that is replaced
first, second = [torch.ones(4)], [torch.ones(1 << 16)]
others, has_run = [], []

def empty(size, **_):
    if not has_run:
        has_run.append(True)
        second.clear()
        others.extend(torch.empty_strided((1 << 16,), (1,)).fill_(1000.0) for _ in range(4))
    return torch.empty_strided(size, [1] * len(size))

library = torch.library.Library("aten", "IMPL")
library.impl("empty.memory_format", empty, "CPU", allow_override=True)
norms = extension.direct_calls()["l2_norm_pair"](first, second)
assert has_run and list(map(float, norms)) == [2, 256], norms
"""


def test_results_are_made_when_all_tensors_have_been_read() -> None:
    """PyTorch may run any code where it is asked for memory, such as this, which frees the second list."""
    done = subprocess.run([sys.executable, "-c", REPLACED_EMPTY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


LITTLE_MEMORY = """
import resource

import torch

from gam_fused.kernels import extension

tensors = [torch.empty(0)] * 8_000_000
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**24,) * 2)
try:
    extension.direct_calls()["l2_norm"](tensors)
except MemoryError:
    raise SystemExit(0)
raise SystemExit("no MemoryError")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits its memory as Linux does")
def test_memory_that_runs_out_is_a_memory_error() -> None:
    done = subprocess.run([sys.executable, "-c", LITTLE_MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- where the back end makes them


@over_operators
def test_back_end_calls_directly_where_it_can(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def dispatch(*_: Any) -> None:
        raise AssertionError("through the dispatcher")

    monkeypatch.setattr(native, "_dispatch", dispatch)
    run_through_backend(Call(name, SHAPES))
    call = Call(name, SHAPES)
    for key in LISTS[name]:
        call.lists[key][0] = call.lists[key][0].as_subclass(Subclass)
    with pytest.raises(AssertionError, match="through the dispatcher"):
        run_through_backend(call)


@over_mutations
def test_back_end_counts_a_mutation_once_on_either_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    for calls in (extension.direct_calls(), {}):
        monkeypatch.setattr(native, "_DIRECT_CALLS", calls)
        call = Call(name, [(3,), (2, 2)])
        before = [tensor._version for tensor in call.tensors()]
        run_through_backend(call)
        counted.append([tensor._version - old for tensor, old in zip(call.tensors(), before, strict=True)])
    assert counted[0] == counted[1]


@pytest.mark.parametrize("rule", RULES)
def test_steps_are_to_the_bit_those_through_the_dispatcher(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, _, kwargs = RULES[rule]
    results = []
    for calls in (extension.direct_calls(), {}):
        monkeypatch.setattr(native, "_DIRECT_CALLS", calls)
        problem = problems.PROBLEMS["logistic"]()
        params = problem.leaves()
        optimizer = GAM(params, base, rho=0.05, alpha=0.4, backend="native", **kwargs)
        for _ in range(5):
            optimizer.step(lambda problem=problem, params=params: problem.loss(params))
        results.append([param.detach() for param in params])
    assert same_bits(*results)


def test_the_dispatcher_has_nothing_to_say_of_gradients_in_a_transform() -> None:
    """Warnings are errors; PyTorch warns of operators without a gradient where one might be wanted."""
    norm = kernels.resolve("native").l2_norm
    assert bool((torch.func.grad(lambda x: x.sum() + norm([x.detach()]))(torch.ones(3)) == 1).all())
    assert bool((torch.func.grad(lambda x: x.sum() + norm([x]))(torch.ones(3)) == 1).all())
