"""Native and Triton kernels on a device: against the CPU bit for bit, in a graph, without waiting, on any stream.

Whatever can be asked of the CPU as well is asked of it too, so that a test is known to work before there is a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gam_fused import GAM, kernels
from gam_fused.kernels import Backend
from gam_fused.kernels.interface import accumulation_dtype
from tests.gpu.workload import (
    ELEMENTWISE,
    LISTS,
    OPERATORS,
    Operator,
    adamw_step,
    after,
    arithmetic_of_a_step,
    assert_same_bits,
    exact_norm,
    no_synchronisation,
    norms,
    perturb,
    restore,
    sgd_step,
    ulps_apart,
    workload,
)

CPU = torch.device("cpu")
UPDATES = {"sgd": sgd_step, "adamw": adamw_step}

elementwise = pytest.mark.parametrize("operator", ELEMENTWISE.values(), ids=ELEMENTWISE)
every_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
every_update = pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)


# ---------------------------------------------------------------- results


@elementwise
def test_result_is_that_of_the_formula_in_float64(
    compiled: Backend, operator: Operator, dtype: torch.dtype, device: torch.device
) -> None:
    """Up to a few roundings in the accumulation dtype of numbers of magnitude 10, and one to the tensors' dtype."""
    given = workload(dtype)
    actual = after(operator, compiled, given.to(device))
    expected = after(operator, kernels.resolve("reference"), given.to(CPU, torch.float64))
    wide = torch.finfo(accumulation_dtype(dtype)).eps
    last_place = torch.finfo(dtype).eps
    changed = 0
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e.double(), rtol=last_place / 2 + 16 * wide, atol=64 * wide)
    for a, before in zip(actual, given.tensors(), strict=True):
        changed += not torch.equal(a, before)
    assert changed, "the operator did nothing"


@pytest.mark.cuda
@elementwise
def test_result_is_bitwise_that_of_the_cpu(compiled: Backend, operator: Operator, dtype: torch.dtype) -> None:
    """Both are compiled from the same rules without fused multiply-adds.

    But for the parameters after AdamW: its bias corrections are powers, which each computes with its own functions.
    """
    given = workload(dtype)
    on_gpu = after(operator, compiled, given.to(torch.device("cuda")))
    on_cpu = after(operator, kernels.resolve("native"), given.to(CPU))
    if operator not in (ELEMENTWISE["adamw_step_"], ELEMENTWISE["adamw_step_ as Adam"]):
        assert_same_bits(on_gpu, on_cpu)
        return
    count = len(given.params)
    assert_same_bits(on_gpu[count:], on_cpu[count:], "state")
    wide = torch.finfo(accumulation_dtype(dtype)).eps
    for a, e in zip(on_gpu[:count], on_cpu[:count], strict=True):
        rtol = wide if dtype == accumulation_dtype(dtype) else torch.finfo(dtype).eps
        torch.testing.assert_close(a.double(), e.double(), rtol=2 * rtol, atol=8 * wide)


def test_norm_is_within_two_units_of_the_exact_one(compiled: Backend, dtype: torch.dtype, device: torch.device) -> None:
    """Triton's sums are not compensated: each of the additions on an element's way into the sum rounds."""
    given = workload(dtype)
    on = given.to(device)
    for actual, of in zip(norms(compiled, on), (given.params, given.grads, given.directions), strict=True):
        assert actual.dtype == accumulation_dtype(dtype)
        assert actual.device.type == device.type
        assert actual.shape == ()
        assert ulps_apart(actual, exact_norm(of)) <= (2 if compiled.name == "native" else 16)


@every_operator
def test_same_input_gives_the_same_bits(
    compiled: Backend, operator: Operator, dtype: torch.dtype, device: torch.device
) -> None:
    given = workload(dtype)
    first = after(operator, compiled, given.to(device))
    for _ in range(3):
        assert_same_bits(after(operator, compiled, given.to(device)), first)


@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)
@pytest.mark.parametrize("signal", ["guard", "adversarial norm", "found_inf"])
def test_update_that_must_not_happen_restores_and_writes_nothing_else(
    compiled: Backend, update: Callable[..., None], signal: str, device: torch.device
) -> None:
    given = workload(torch.float32).to(device)
    found_inf = None
    if signal == "guard":
        given.guards[1].fill_(torch.inf)
    elif signal == "adversarial norm":
        given.adversarial_norm.fill_(torch.nan)
    else:
        found_inf = torch.ones((), device=device)
    on = given.to(device)
    update(compiled, on, found_inf=found_inf)
    assert_same_bits(on.params, given.directions)
    count = len(given.params)
    assert_same_bits(on.tensors()[count:], given.tensors()[count:])


# ---------------------------------------------------------------- where the tensors are, and how many


@every_operator
def test_misaligned_tensors_give_the_same_bits_and_keep_their_surroundings(
    compiled: Backend, operator: Operator, dtype: torch.dtype, device: torch.device
) -> None:
    given = workload(dtype)
    on = given.to(device, misaligned=True)
    assert_same_bits(after(operator, compiled, on), after(operator, compiled, given.to(device)))
    for tensor in [*on.params, *on.directions, *on.grads, *on.hvps, *on.momentum_buffers, *on.exp_avg_sqs]:
        assert tensor._base is not None
        assert tensor._base[[0, -1]].isnan().all()


@every_operator
def test_a_misaligned_list_among_aligned_ones_changes_nothing(
    compiled: Backend, operator: Operator, device: torch.device
) -> None:
    given = workload(torch.bfloat16)
    on, odd = given.to(device), given.to(device, misaligned=True)
    on.directions = odd.directions
    assert_same_bits(after(operator, compiled, on), after(operator, compiled, given.to(device)))


@every_operator
def test_more_tensors_than_a_launch_takes_give_the_same_bits_as_few_at_a_time(
    compiled: Backend, operator: Operator, device: torch.device
) -> None:
    numels = [i % 7 for i in range(4000)]  # kernel parameters hold some 1,600 at most
    given = workload(torch.float32, numels)
    on = given.to(device)
    if operator is norms:
        for actual, of in zip(norms(compiled, on), (given.params, given.grads, given.directions), strict=True):
            assert ulps_apart(actual, exact_norm(of)) <= (2 if compiled.name == "native" else 16)
        return
    operator(compiled, on)
    for begin in range(0, len(numels), 1000):
        part = given.part(begin, begin + 1000).to(device)
        operator(compiled, part)
        for name in LISTS:
            assert_same_bits(getattr(on, name)[begin : begin + 1000], getattr(part, name), name)


@pytest.mark.cuda
def test_more_than_two_to_the_31_elements(compiled: Backend) -> None:
    numel, dtype, device = 2**31 + 7, torch.bfloat16, torch.device("cuda")
    lists = 5
    free, _ = torch.cuda.mem_get_info(device)
    if free < (lists + 1.5) * numel * dtype.itemsize:  # and a list of booleans to compare with
        pytest.skip(f"needs {(lists + 1.5) * numel * dtype.itemsize / 2**30:.0f} GiB of free device memory")
    names = ("params", "directions", "grads", "hvps", "momentum_buffers")
    few = workload(dtype, [1]).to(device)
    on = few.to(device)
    for name in names:
        setattr(on, name, [getattr(few, name)[0].expand(numel).contiguous()])

    exact = abs(few.params[0].item()) * numel**0.5
    assert ulps_apart(compiled.l2_norm(on.params), exact) <= (2 if compiled.name == "native" else 16)
    for operator in (perturb, sgd_step, restore):
        operator(compiled, on)
        operator(compiled, few)
        for name in names:
            assert (getattr(on, name)[0] == getattr(few, name)[0]).all(), f"{name} after {operator.__name__}"


# ---------------------------------------------------------------- streams, graphs, devices


@every_operator
def test_operators_do_not_synchronise(
    compiled: Backend, operator: Operator, dtype: torch.dtype, device: torch.device
) -> None:
    on = workload(dtype).to(device)
    operator(compiled, on)  # what is set up once may
    with no_synchronisation(device):
        operator(compiled, on)


@pytest.mark.cuda
@every_operator
def test_operators_run_on_the_current_stream(compiled: Backend, operator: Operator) -> None:
    """The numbers arrive on a stream that is busy for a while: launched on any other, an operator would miss them."""
    device = torch.device("cuda")
    given = workload(torch.float32)
    expected = after(operator, compiled, given.to(device))
    source, on = given.to(device), workload(torch.float32, seed=1).to(device)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        on.copy_(source)
        results = operator(compiled, on) or []
    stream.synchronize()
    assert_same_bits([tensor.cpu() for tensor in [*results, *on.tensors()]], expected)


@every_update
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.cuda
def test_step_in_a_graph_gives_the_bits_of_the_eager_one(
    compiled: Backend, update: Operator, dtype: torch.dtype
) -> None:
    device = torch.device("cuda")
    problems = [workload(dtype, seed=seed).to(device) for seed in range(3)]
    static = problems[0].to(device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        arithmetic_of_a_step(compiled, static, update)
    torch.cuda.current_stream().wait_stream(side)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        in_graph = arithmetic_of_a_step(compiled, static, update)
    for problem in [*problems, problems[0]]:
        for name in LISTS:
            torch._foreach_copy_(getattr(static, name), getattr(problem, name))
        graph.replay()
        eager = problem.to(device)
        expected = arithmetic_of_a_step(compiled, eager, update)
        assert_same_bits([norm.cpu() for norm in in_graph], [norm.cpu() for norm in expected], "norm")
        for name in LISTS:
            actual, wanted = ([tensor.cpu() for tensor in getattr(of, name)] for of in (static, eager))
            assert_same_bits(actual, wanted, name)


@every_update
def test_launches_of_a_step_are_those_of_the_reference(
    compiled: Backend, update: Operator, device: torch.device
) -> None:
    """The same sequence that is captured above, where there is nothing to capture it in."""
    given = workload(torch.float64)
    on, expected = given.to(device), given.to(CPU)
    arithmetic_of_a_step(compiled, on, update)
    arithmetic_of_a_step(kernels.resolve("reference"), expected, update)
    for a, e in zip(on.tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(a.cpu(), e, rtol=1e-12, atol=1e-12)


@pytest.mark.cuda
@every_operator
def test_operators_run_on_the_device_of_their_tensors(compiled: Backend, operator: Operator) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    given = workload(torch.float32)
    with torch.cuda.device(0):
        second = after(operator, compiled, given.to(torch.device("cuda", 1)))
        assert torch.cuda.current_device() == 0
        assert_same_bits(second, after(operator, compiled, given.to(torch.device("cuda", 0))))


# ---------------------------------------------------------------- whole steps


@pytest.mark.parametrize(
    ("base", "settings"),
    [(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}), (torch.optim.AdamW, {"lr": 0.01})],
    ids=["sgd", "adamw"],
)
def test_whole_step_does_not_synchronise_and_follows_the_reference(
    compiled: Backend, base: type[torch.optim.Optimizer], settings: dict[str, float], device: torch.device
) -> None:
    def train(backend: str, on: torch.device) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).double()
        for param in model.parameters():
            param.data = torch.randn(param.shape, generator=generator, dtype=torch.float64).mul(0.3)
        inputs = torch.randn(32, 8, generator=generator, dtype=torch.float64).to(on)
        targets = torch.randn(32, 4, generator=generator, dtype=torch.float64).to(on)
        model.to(on)
        optimizer = GAM(model.parameters(), base, rho=0.1, alpha=0.3, backend=backend, **settings)

        def closure() -> Tensor:
            return nn.functional.mse_loss(model(inputs), targets)

        optimizer.step(closure)  # what is set up once may synchronise
        with no_synchronisation(on):
            for _ in range(3):
                optimizer.step(closure)
        assert int(optimizer.metrics["skipped_steps"]) == 0
        return [param.detach().cpu() for param in model.parameters()]

    expected = train("reference", CPU)
    for actual, wanted in zip(train(compiled.name, device), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-11)
