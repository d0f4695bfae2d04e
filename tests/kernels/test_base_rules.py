"""The fused base rules: one launch does what restoring, combining and torch.optim's own step do."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gam_fused import kernels
from gam_fused.kernels import Backend
from gam_fused.kernels.interface import accumulation_dtype
from gam_fused.kernels.rules import AdamWRule, SGDRule
from tests.kernels.conftest import BACKENDS
from tests.kernels.tensor_lists import (
    Draw,
    Spec,
    assert_same_bits,
    bits,
    copies,
    have_same_bits,
    other_layouts,
    relaid,
    seeds,
    specs,
    surroundings,
)

RHO, ALPHA, XI, NORM = 0.3, 0.7, 0.01, 2.9
CPU = torch.device("cpu")

sgd_rules = st.builds(
    SGDRule,
    lr=st.just(0.05),
    momentum=st.sampled_from([0.0, 0.9]),
    dampening=st.sampled_from([0.0, 0.3]),
    weight_decay=st.sampled_from([0.0, 0.01]),
    maximize=st.booleans(),
)
adamw_rules = st.builds(
    AdamWRule,
    lr=st.just(0.05),
    eps=st.just(1e-3),
    weight_decay=st.sampled_from([0.0, 0.1]),
    decoupled_weight_decay=st.booleans(),
    amsgrad=st.booleans(),
    maximize=st.booleans(),
)


# Without those that run here and have no fused base rules.
FUSING = [name for name in BACKENDS if kernels.available()[name] is not None or kernels.resolve(name).fuses_base_rules]


@pytest.fixture(scope="session", params=FUSING)
def fusing(request: pytest.FixtureRequest) -> Backend:
    reason = kernels.available()[request.param]
    if reason is not None:
        pytest.skip(reason)
    return kernels.resolve(request.param)


class Step:
    """The operands of one launch, and the same in float64 for torch.optim."""

    def __init__(self, dtype: torch.dtype, specs: list[Spec], layouts: list[str], seed: int) -> None:
        draw = Draw(dtype, CPU, seed)
        self.params, self.backups = draw.normal(specs), draw.normal(relaid(specs, layouts))
        self.grads, self.hvps = draw.normal(relaid(specs, layouts)), draw.normal(specs)
        self.norm = draw.norm(NORM)
        self.dtype = dtype

    def combined(self) -> list[Tensor]:
        scale = ALPHA * RHO / (float(self.norm) + XI)
        return [g.double() + scale * h.double() for g, h in zip(self.grads, self.hvps, strict=True)]

    def zeros(self) -> list[Tensor]:
        return [torch.zeros_like(param) for param in self.params]


def assert_close(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype, roundings: int) -> None:
    """Within ``roundings`` of the accumulation dtype, relative to numbers of size 1, and one of the dtype itself."""
    wide = torch.finfo(accumulation_dtype(dtype)).eps
    for a, e in zip(actual, expected, strict=True):
        bound = roundings * wide * (1 + e.abs()) + (dtype.itemsize == 2) * torch.finfo(dtype).eps * (e.abs() + 1e-3)
        assert bool(((a.double() - e).abs() <= bound).all())


@settings(max_examples=40)
@given(specs, other_layouts, seeds, sgd_rules, st.booleans())
def test_sgd_step_is_combine_and_torch_sgd(
    fusing: Backend,
    dtype: torch.dtype,
    specs: list[Spec],
    layouts: list[str],
    seed: int,
    rule: SGDRule,
    nesterov: bool,
) -> None:
    if nesterov and rule.momentum and not rule.dampening:
        rule = SGDRule(rule.lr, rule.momentum, 0.0, rule.weight_decay, True, rule.maximize)
    step = Step(dtype, specs, layouts, seed)
    buffers = step.zeros() if rule.momentum else []
    twins = [torch.nn.Parameter(backup.double().clone()) for backup in step.backups] or [
        torch.nn.Parameter(torch.ones(1))
    ]
    plain = torch.optim.SGD(twins, foreach=False, **vars(rule))
    for number in range(3):
        combined = step.combined()
        for twin, gradient, backup in zip(twins, combined, step.backups, strict=False):
            twin.data.copy_(backup)
            twin.grad = gradient
            if number and rule.momentum:
                plain.state[twin]["momentum_buffer"].copy_(buffers[_at(twins, twin)])
        plain.step()
        fusing.sgd_step_(
            step.params,
            step.backups,
            step.grads,
            step.hvps,
            buffers,
            step.norm,
            [],
            RHO,
            ALPHA,
            XI,
            rule,
            first_step=number == 0,
        )
        if not specs:
            return
        assert_close(step.params, [twin.data for twin in twins], dtype, 16)
        assert_close(step.grads, combined, dtype, 16)
        if rule.momentum:
            assert_close(buffers, [plain.state[twin]["momentum_buffer"] for twin in twins], dtype, 16)
        step.backups = copies(step.params)


def _at(twins: list[Any], twin: Any) -> int:
    return next(i for i, other in enumerate(twins) if other is twin)


@settings(max_examples=40)
@given(specs, other_layouts, seeds, adamw_rules)
def test_adamw_step_is_combine_and_torch_adam(
    fusing: Backend, dtype: torch.dtype, specs: list[Spec], layouts: list[str], seed: int, rule: AdamWRule
) -> None:
    if not specs:
        return
    step = Step(dtype, specs, layouts, seed)
    means, squares, maxima = step.zeros(), step.zeros(), step.zeros() if rule.amsgrad else []
    steps = [torch.zeros(()) for _ in step.params]
    twins = [torch.nn.Parameter(backup.double().clone()) for backup in step.backups]
    options = {k: v for k, v in vars(rule).items() if k != "decoupled_weight_decay"}
    plain = (torch.optim.AdamW if rule.decoupled_weight_decay else torch.optim.Adam)(twins, foreach=False, **options)
    for _ in range(3):
        combined = step.combined()
        for i, twin in enumerate(twins):
            twin.data.copy_(step.backups[i])
            twin.grad = combined[i]
            if plain.state[twin]:
                plain.state[twin]["exp_avg"].copy_(means[i])
                plain.state[twin]["exp_avg_sq"].copy_(squares[i])
                if rule.amsgrad:
                    plain.state[twin]["max_exp_avg_sq"].copy_(maxima[i])
        plain.step()
        fusing.adamw_step_(
            step.params,
            step.backups,
            step.grads,
            step.hvps,
            means,
            squares,
            maxima,
            steps,
            step.norm,
            [],
            RHO,
            ALPHA,
            XI,
            rule,
        )
        assert_close(step.params, [twin.data for twin in twins], dtype, 64)
        assert_close(means, [plain.state[twin]["exp_avg"] for twin in twins], dtype, 16)
        assert_close(squares, [plain.state[twin]["exp_avg_sq"] for twin in twins], dtype, 64)
        assert [float(count) for count in steps] == [float(plain.state[twin]["step"]) for twin in twins]
        step.backups = copies(step.params)


@pytest.mark.parametrize("rule", [SGDRule(0.1, 0.9), AdamWRule(0.1, amsgrad=True)], ids=["sgd", "adamw"])
@pytest.mark.parametrize("stopper", ["adversarial_norm", "guard", "found_inf"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_restores_and_writes_nothing_else(
    fusing: Backend, dtype: torch.dtype, rule: Any, stopper: str, value: float
) -> None:
    step = Step(dtype, [Spec((5,), "contiguous"), Spec((2, 3), "transposed")], ["contiguous"] * 6, 0)
    state = [step.zeros() for _ in range(3)]
    steps = [torch.zeros(()) for _ in step.params]
    untouched = [step.backups, step.grads, step.hvps, *state, steps]
    before = copy.deepcopy(untouched)
    norm = step.norm * value if stopper == "adversarial_norm" else step.norm
    guards = [step.norm, step.norm * (value if stopper == "guard" else 1)]
    options = {"found_inf": torch.tensor(1.0)} if stopper == "found_inf" else {}
    lists = (step.params, step.backups, step.grads, step.hvps)
    if isinstance(rule, SGDRule):
        fusing.sgd_step_(*lists, state[0], norm, guards, RHO, ALPHA, XI, rule, first_step=False, **options)
    else:
        fusing.adamw_step_(*lists, *state, steps, norm, guards, RHO, ALPHA, XI, rule, **options)
    assert_same_bits(step.params, step.backups)
    for after, then in zip(untouched, before, strict=True):
        assert_same_bits(after, then)


def test_a_gradient_scale_divides_the_combined_gradient_and_grads_may_be_kept(fusing: Backend) -> None:
    for write_grads in (True, False):
        step = Step(torch.float32, [Spec((50,), "contiguous")], ["contiguous"] * 6, 0)
        before, combined = copies(step.grads), step.combined()
        fusing.sgd_step_(
            *(step.params, step.backups, step.grads, step.hvps, [], step.norm, [], RHO, ALPHA, XI, SGDRule(0.5)),
            first_step=True,
            write_grads=write_grads,
            grad_scale=torch.tensor(4.0),
            found_inf=torch.tensor(0.0),
        )
        assert_close(step.params, [step.backups[0].double() - 0.5 * combined[0] / 4], torch.float32, 8)
        if write_grads:
            assert_close(step.grads, [combined[0] / 4], torch.float32, 8)
        else:
            assert_same_bits(step.grads, before)


@pytest.mark.parametrize("name", ["backups", "grads", "hvps", "momentum_buffers"])
def test_a_list_of_another_length_is_refused_by_name(fusing: Backend, name: str) -> None:
    names = ("params", "backups", "grads", "hvps", "momentum_buffers")
    lists = {key: [torch.ones(3), torch.ones(2)] for key in names}
    lists[name] = lists[name][:1]
    with pytest.raises(ValueError, match=rf"^{name}: 1 tensors, expected 2"):
        fusing.sgd_step_(*lists.values(), torch.tensor(1.0), [], RHO, ALPHA, XI, SGDRule(0.1, 0.9), first_step=False)


@pytest.mark.parametrize("device_lr", [0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)], ids=str)
def test_the_learning_rate_may_be_a_tensor(fusing: Backend, device_lr: Any) -> None:
    params = [torch.zeros(2)]
    fusing.sgd_step_(
        *(params, [torch.zeros(2)], [torch.ones(2)], [torch.zeros(2)], [], torch.tensor(1.0), [], RHO, ALPHA, XI),
        SGDRule(device_lr),
        first_step=True,
    )
    assert params[0].tolist() == [-0.5, -0.5]


# ---------------------------------------------------------------- any launch


class Launch:
    """A launch of either rule with every list it can have, to be changed in one place."""

    LISTS = ("params", "backups", "grads", "hvps")
    STATE: ClassVar = {SGDRule: ("momentum_buffers",), AdamWRule: ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")}

    def __init__(
        self, rule: Any, dtype: torch.dtype = torch.float32, specs: list[Spec] | None = None, seed: int = 0
    ) -> None:
        if specs is None:
            specs = [Spec((5,), "contiguous"), Spec((2, 3), "transposed"), Spec((0,), "contiguous")]
        draw = Draw(dtype, CPU, seed)
        self.rule = rule
        self.lists = {name: draw.normal(specs) for name in (*self.LISTS, *self.STATE[type(rule)])}
        for name in ("exp_avg_sqs", "max_exp_avg_sqs"):
            for tensor in self.lists.get(name, []):
                tensor.abs_()
        self.steps = [torch.full((), 3.0) for _ in specs]
        self.norm, self.guards = draw.norm(NORM), [draw.norm(1.0)]
        self.numbers: dict[str, float] = {"rho": RHO, "alpha": ALPHA, "xi": XI}
        self.options: dict[str, Any] = {"first_step": False} if isinstance(rule, SGDRule) else {}

    def run(self, backend: Backend) -> Launch:
        lists = list(self.lists.values())
        rest = (self.norm, self.guards, *self.numbers.values(), self.rule)
        if isinstance(self.rule, SGDRule):
            backend.sgd_step_(*lists, *rest, **self.options)
        else:
            backend.adamw_step_(*lists, self.steps, *rest, **self.options)
        return self

    @property
    def written(self) -> tuple[str, ...]:
        return ("params", "grads", *self.STATE[type(self.rule)])

    def everything(self) -> list[Tensor]:
        return [*(tensor for tensors in self.lists.values() for tensor in tensors), *self.steps]


FULL_RULES = [
    SGDRule(0.1, 0.9, dampening=0.2, weight_decay=0.1),
    AdamWRule(0.1, betas=(0.8, 0.7), eps=0.1, weight_decay=0.1, amsgrad=True),
    AdamWRule(0.1, betas=(0.8, 0.7), eps=0.1, weight_decay=0.1, decoupled_weight_decay=False, amsgrad=True),
]
over_rules = pytest.mark.parametrize("rule", FULL_RULES, ids=["sgd", "adamw", "adam"])


def with_rule(**changes: Any) -> Callable[[Launch], None]:
    return lambda launch: setattr(launch, "rule", dataclasses.replace(launch.rule, **changes))


CHANGES: dict[str, Callable[[Launch], Any]] = {
    "rho": lambda launch: launch.numbers.update(rho=0.9),
    "alpha": lambda launch: launch.numbers.update(alpha=0.9),
    "xi": lambda launch: launch.numbers.update(xi=0.9),
    "adversarial_norm": lambda launch: launch.norm.mul_(2),
    "grad_scale": lambda launch: launch.options.update(grad_scale=torch.tensor(2.0)),
    "lr": with_rule(lr=0.2),
    "weight_decay": with_rule(weight_decay=0.5),
    "maximize": with_rule(maximize=True),
}
CHANGES_OF: dict[type, dict[str, Callable[[Launch], Any]]] = {
    SGDRule: {
        **CHANGES,
        "momentum": with_rule(momentum=0.5),
        "dampening": with_rule(dampening=0.5),
        "nesterov": with_rule(nesterov=True),
        "first_step": lambda launch: launch.options.update(first_step=True),
    },
    AdamWRule: {
        **CHANGES,
        "beta1": with_rule(betas=(0.5, 0.7)),
        "beta2": with_rule(betas=(0.8, 0.5)),
        "eps": with_rule(eps=0.5),
        "amsgrad": with_rule(amsgrad=False),
        "state_steps": lambda launch: launch.steps[0].add_(1),
    },
}


@pytest.mark.parametrize(
    ("rule", "change"),
    [(rule, change) for rule in FULL_RULES for change in CHANGES_OF[type(rule)]],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_every_number_given_to_a_step_reaches_the_result(fusing: Backend, rule: Any, change: str) -> None:
    usual, other = Launch(rule), Launch(rule)
    CHANGES_OF[type(rule)][change](other)
    assert not have_same_bits(usual.run(fusing).lists["params"], other.run(fusing).lists["params"])


@over_rules
@settings(max_examples=10)
@given(specs, seeds, st.booleans())
def test_a_step_writes_what_it_says_and_nothing_else(
    fusing: Backend, dtype: torch.dtype, rule: Any, specs: list[Spec], seed: int, write_grads: bool
) -> None:
    launch = Launch(rule, dtype, specs, seed)
    before = {name: copies(tensors) for name, tensors in launch.lists.items()}
    gaps = surroundings(*(copies(tensors) for tensors in launch.lists.values()))
    launch.options["write_grads"] = write_grads
    launch.run(fusing)
    for name, tensors in launch.lists.items():
        if name not in launch.written or (name == "grads" and not write_grads):
            assert_same_bits(tensors, before[name])
        elif name != "max_exp_avg_sqs":  # of which some, by chance all, stay
            for now, then in zip(tensors, before[name], strict=True):
                assert now.numel() <= 20 or not torch.equal(bits(now), bits(then)), name
    assert [float(step) for step in launch.steps] == [3.0 + isinstance(rule, AdamWRule)] * len(specs)
    assert_same_bits(surroundings(*(copies(tensors) for tensors in launch.lists.values())), gaps)


@over_rules
def test_parameters_and_state_do_not_depend_on_whether_gradients_are_written(
    fusing: Backend, dtype: torch.dtype, rule: Any
) -> None:
    launches = [Launch(rule, dtype), Launch(rule, dtype)]
    for launch, write_grads in zip(launches, (True, False), strict=True):
        launch.options["write_grads"] = write_grads
        launch.run(fusing)
        launch.lists.pop("grads")
    assert_same_bits(launches[0].everything(), launches[1].everything())


@over_rules
def test_the_gradient_left_by_maximizing_is_the_combined_one(fusing: Backend, dtype: torch.dtype, rule: Any) -> None:
    usual = Launch(rule, dtype).run(fusing)
    maximizing = Launch(dataclasses.replace(rule, maximize=True), dtype).run(fusing)
    assert_same_bits(maximizing.lists["grads"], usual.lists["grads"])


@over_rules
@pytest.mark.parametrize("stopper", ["adversarial_norm", "first guard", "last guard", "found_inf"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("write_grads", [True, False])
def test_a_step_that_is_not_taken_only_restores(
    fusing: Backend, rule: Any, stopper: str, value: float, write_grads: bool
) -> None:
    launch = Launch(rule)
    launch.options |= {"write_grads": write_grads, "found_inf": torch.tensor(0.0), "grad_scale": torch.tensor(2.0)}
    launch.guards = [torch.tensor(1.0) for _ in range(3)]
    stops = {
        "adversarial_norm": launch.norm,
        "first guard": launch.guards[0],
        "last guard": launch.guards[-1],
        "found_inf": launch.options["found_inf"],
    }
    stops[stopper].fill_(value)
    others = len(launch.lists["params"])
    before = copies(launch.everything())[others:]
    launch.run(fusing)
    assert_same_bits(launch.lists["params"], launch.lists["backups"])
    assert_same_bits(launch.everything()[others:], before)


def test_what_a_momentum_buffer_holds_before_the_first_step_does_not_matter(
    fusing: Backend, dtype: torch.dtype
) -> None:
    launches = [Launch(FULL_RULES[0], dtype) for _ in range(2)]
    for launch, value in zip(launches, (0.0, math.nan), strict=True):
        for buffer in launch.lists["momentum_buffers"]:
            buffer.fill_(value)
        launch.options["first_step"] = True
        launch.run(fusing)
    assert_same_bits(launches[0].everything(), launches[1].everything())


@over_rules
def test_a_nan_among_the_combined_gradients_stays_where_it_is(fusing: Backend, dtype: torch.dtype, rule: Any) -> None:
    launch = Launch(rule, dtype)
    launch.lists["hvps"][0][2] = math.nan
    launch.run(fusing)
    for name in launch.written:
        assert launch.lists[name][0].isnan().tolist() == [False, False, True, False, False], name
        assert not launch.lists[name][1].isnan().any()


COURSES: dict[str, tuple[Any, type[torch.optim.Optimizer]]] = {
    "sgd": (SGDRule(0.05), torch.optim.SGD),
    "momentum": (SGDRule(0.05, 0.9, dampening=0.3, weight_decay=0.01), torch.optim.SGD),
    "nesterov": (SGDRule(0.05, 0.9, nesterov=True, maximize=True), torch.optim.SGD),
    "adam": (AdamWRule(0.05, eps=1e-3, weight_decay=0.1, decoupled_weight_decay=False), torch.optim.Adam),
    "adamw": (AdamWRule(0.05, eps=1e-3, weight_decay=0.1), torch.optim.AdamW),
    "amsgrad": (AdamWRule(0.05, eps=1e-3, amsgrad=True, maximize=True), torch.optim.AdamW),
}


@pytest.mark.parametrize("course", list(COURSES))
@pytest.mark.parametrize("scale", [None, 4.0])
def test_ten_steps_in_a_row_are_those_of_torch(fusing: Backend, course: str, scale: float | None) -> None:
    """Nothing is carried from one to the other: state that is kept wrongly adds up. In float64, to the last digits."""
    rule, optimizer = COURSES[course]
    launch = Launch(rule, torch.float64)
    for name in launch.STATE[type(rule)]:
        launch.lists[name] = [torch.zeros_like(tensor) for tensor in launch.lists[name]]
    launch.steps = [torch.tensor(0.0) for _ in launch.steps]
    used = {"momentum_buffers": getattr(rule, "momentum", 1), "max_exp_avg_sqs": getattr(rule, "amsgrad", 1)}
    launch.lists |= {name: [] for name in launch.lists if not used.get(name, 1)}
    launch.options |= {} if scale is None else {"grad_scale": torch.tensor(scale)}
    twins = [torch.nn.Parameter(backup.clone()) for backup in launch.lists["backups"]]
    options = {name: value for name, value in vars(rule).items() if name != "decoupled_weight_decay"}
    plain = optimizer(twins, foreach=False, **options)
    draw = Draw(torch.float64, CPU, 5)
    shapes = [Spec(tuple(twin.shape), "contiguous") for twin in twins]
    for number in range(10):
        launch.lists["grads"], launch.lists["hvps"] = draw.normal(shapes), draw.normal(shapes)
        for twin, g, h in zip(twins, launch.lists["grads"], launch.lists["hvps"], strict=True):
            twin.grad = (g + ALPHA * RHO / (NORM + XI) * h) / (scale or 1)
        if isinstance(rule, SGDRule):
            launch.options["first_step"] = number == 0
        launch.run(fusing)
        plain.step()
        launch.lists["backups"] = copies(launch.lists["params"])
        # Ten steps of less than 64 roundings each, of numbers that stay below 10.
        torch.testing.assert_close(launch.lists["params"], [t.detach() for t in twins], rtol=0, atol=10 * 640 * 2**-53)
        torch.testing.assert_close(launch.lists["grads"], [t.grad for t in twins], rtol=0, atol=64 * 2**-53)


@over_rules
def test_empty_lists_take_no_step(fusing: Backend, rule: Any) -> None:
    Launch(rule, specs=[]).run(fusing)


@over_rules
def test_a_graph_built_before_a_step_raises_in_backward(fusing: Backend, rule: Any) -> None:
    launch = Launch(rule)
    for tensors in launch.lists.values():
        for tensor in tensors:
            tensor.requires_grad_()
    graphs = {name: tensors[0].square().sum() for name, tensors in launch.lists.items()}
    launch.run(fusing)
    for name, graph in graphs.items():
        if name in launch.written:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                graph.backward()
        else:
            graph.backward()


# ---------------------------------------------------------------- what is refused

FAULTS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "dtype": (lambda t: t.to(torch.float16), "dtype torch.float16, expected torch.float32 as params"),
    "integers": (lambda t: t.to(torch.int32), "dtype torch.int32, expected torch.float32 as params"),
    "shape": (lambda t: t.flatten()[:5], r"shape \(5,\), expected \(2, 3\) as params\[1\]"),
    "device": (lambda t: t.to("meta"), "device meta, expected cpu as params"),
    "sparse": (lambda t: t.to_sparse(), "layout torch.sparse_coo, expected torch.strided"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
@pytest.mark.parametrize(
    ("rule", "name"),
    [(rule, name) for rule in FULL_RULES[:2] for name in (*Launch.LISTS[1:], *Launch.STATE[type(rule)])],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_malformed_tensor_is_refused_by_list_and_index(fusing: Backend, rule: Any, name: str, fault: str) -> None:
    launch = Launch(rule)
    intact = launch.everything()
    before, versions = copies(intact), [tensor._version for tensor in intact]
    replace, message = FAULTS[fault]
    launch.lists[name] = [replace(t) if i == 1 else t for i, t in enumerate(launch.lists[name])]
    with pytest.raises(ValueError, match=rf"^{name}\[1\]: {message}"):
        launch.run(fusing)
    assert_same_bits(intact, before)
    assert [tensor._version for tensor in intact] == versions


@over_rules
def test_memory_that_is_written_twice_is_refused(fusing: Backend, rule: Any) -> None:
    for written, other in itertools.permutations(Launch(rule).lists, 2):
        launch = Launch(rule)
        if written not in launch.written:
            continue
        launch.lists[other][0] = launch.lists[written][0]
        before = copies(launch.everything())
        with pytest.raises(ValueError, match=r"\[0\]: overlaps \w+\[0\] in memory"):
            launch.run(fusing)
        assert_same_bits(launch.everything(), before)


@over_rules
@pytest.mark.parametrize("length", [0, 2, 4])
def test_a_list_of_state_of_another_length_is_refused(fusing: Backend, rule: Any, length: int) -> None:
    for name in Launch.STATE[type(rule)]:
        launch = Launch(rule)
        launch.lists[name] = [torch.zeros(5) for _ in range(length)]
        before = copies(launch.everything())
        with pytest.raises(ValueError, match=rf"^{name}: {length} tensors, expected 3 as in params"):
            launch.run(fusing)
        assert_same_bits(launch.everything(), before)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda step: [step.double() for _ in range(3)],
        lambda step: [step.long() for _ in range(3)],
        lambda step: [step.repeat(2) for _ in range(3)],
        lambda step: [step] * 3,
    ],
    ids=["float64", "int64", "two numbers", "one for all"],
)
def test_malformed_step_counts_are_refused_by_index(fusing: Backend, wrong: Callable[[Tensor], list[Tensor]]) -> None:
    launch = Launch(FULL_RULES[1])
    launch.steps = wrong(launch.steps[0])
    with pytest.raises(ValueError, match=r"^state_steps\[\d\]: "):
        launch.run(fusing)
