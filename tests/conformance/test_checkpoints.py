"""State dicts: complete, deterministic, safe to load, and interchangeable with the plain base optimizer's."""

from __future__ import annotations

import gc
import io
import weakref
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adadelta, Adam, Optimizer, RMSprop

from gam_fused import GAM
from tests.conformance.common import (
    ALPHA,
    CONFIGURATIONS,
    IMPLEMENTATIONS,
    INFOS,
    MOMENTUM,
    RHO,
    XI,
    Base,
    Task,
    assert_same_course,
    backends,
    bases,
    bits,
    course,
    plain_step,
    reference_step,
    snapshot,
)


def saved_and_loaded(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def copy_of(task: Task) -> Task:
    twin = Task()
    twin.model.load_state_dict(task.model.state_dict())
    return twin


def params_of(task: Task, named: bool) -> Any:
    return list(task.model.named_parameters()) if named else task.params


def without_names(state_dict: dict[str, Any]) -> dict[str, Any]:
    groups = [{k: v for k, v in group.items() if k != "param_names"} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


@pytest.mark.parametrize("named_after", [False, True], ids=["to-unnamed", "to-named"])
@pytest.mark.parametrize("named_before", [False, True], ids=["from-unnamed", "from-named"])
@pytest.mark.parametrize("base", CONFIGURATIONS + IMPLEMENTATIONS)
def test_a_fresh_optimizer_continues_bitwise_from_a_state_dict(
    base: Base, named_before: bool, named_after: bool
) -> None:
    task = Task()
    optimizer = base.gam(params_of(task, named_before), interval=3)
    course(optimizer, task, 2)  # the next step without a flatness term, the one after it with one

    twin = copy_of(task)
    # Built with other hyper-parameters: the state dict's count.
    other = base.gam(params_of(twin, named_after), interval=3, rho=0.01, alpha=0.01, xi=1e-3)
    state_dict = deepcopy(optimizer.state_dict())  # PyTorch's optimizers keep the tensors that they load
    before = bits(state_dict)
    other.load_state_dict(state_dict)
    assert bits(state_dict) == before, "loading changed what was loaded"
    assert bits(without_names(other.state_dict())) == bits(without_names(state_dict))

    visited, _ = course(optimizer, task, 2)
    visited_by_other, _ = course(other, twin, 2)
    assert visited_by_other == visited
    assert bits(without_names(other.state_dict())) == bits(without_names(optimizer.state_dict()))


@bases
def test_a_state_dict_says_the_same_of_a_group_listed_twice(base: Base) -> None:
    task = Task()
    optimizer = base.gam(task.params)
    optimizer.step(task.loss)
    once = bits(optimizer.state_dict()["param_groups"][-1])
    optimizer.param_groups.extend(optimizer.param_groups)
    assert bits(optimizer.state_dict()["param_groups"][-1]) == once


@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
@pytest.mark.parametrize("base", CONFIGURATIONS)
def test_a_file_loaded_with_weights_only_holds_the_same_bits(base: Base, named: bool) -> None:
    task = Task()
    optimizer = base.gam(params_of(task, named))
    course(optimizer, task, 2)
    assert bits(saved_and_loaded(optimizer.state_dict())) == bits(optimizer.state_dict())


@backends
@bases
def test_a_checkpoint_of_gam_goes_on_with_the_plain_base_optimizer(base: Base, backend: str) -> None:
    task = Task()
    optimizer = base.gam(task.params, backend=backend)
    course(optimizer, task, 3)

    twin = copy_of(task)
    plain = base.replace(lr=123.0).plain(twin.params)
    plain.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert bits(plain.state_dict()["state"]) == bits(optimizer.state_dict()["state"])
    # Both along the plain gradient from here.
    for _ in range(3):
        plain_step(task, optimizer.base_optimizer)
        plain_step(twin, plain)
        assert bits(task.params) == bits(twin.params)


@backends
@bases
def test_a_checkpoint_of_the_plain_base_optimizer_goes_on_with_gam(base: Base, backend: str) -> None:
    task = Task()
    plain = base.plain(task.params)
    for _ in range(3):
        plain_step(task, plain)

    twin = copy_of(task)
    optimizer = base.replace(lr=123.0).gam(twin.params, backend=backend)
    optimizer.load_state_dict(saved_and_loaded(plain.state_dict()))
    for _ in range(3):
        optimizer.step(twin.loss)
        reference_step(task, plain)
        assert_same_course(optimizer, twin.params, plain, task.params)


@pytest.mark.parametrize("how", ["through GAM", "through the base optimizer", "through the base optimizer of a copy"])
@bases
def test_a_plain_checkpoint_leaves_gams_hyperparameters_of_each_group_alone(base: Base, how: str) -> None:
    task, twin = Task(), Task()

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        return [{"params": layer.parameters()} for layer in model.children()]

    optimizer, plain = base.gam([{**group, "rho": 0.3} for group in groups(task.model)]), base.plain(groups(twin.model))
    optimizer.param_groups[1]["rho"] = 0.4  # as a schedule would
    if how.endswith("copy"):
        optimizer, task = deepcopy((optimizer, task))
    before = [{name: group[name] for name in optimizer.keys.values()} for group in optimizer.param_groups]
    (optimizer if how == "through GAM" else optimizer.base_optimizer).load_state_dict(plain.state_dict())
    after = [{name: group[name] for name in optimizer.keys.values()} for group in optimizer.param_groups]
    assert after == before
    assert {group["rho"] for group in optimizer.param_groups} == {0.3, 0.4}
    optimizer.step(task.loss)


@pytest.mark.parametrize("cls", [RMSprop, Adadelta])
def test_a_checkpoint_keeps_apart_what_both_optimizers_call_by_one_name(cls: type[Optimizer]) -> None:
    task = Task()
    plain = cls(task.params)
    optimizer = Base(cls).gam(task.params, rho=0.31, alpha=0.32)
    (name,) = {"rho", "alpha"} & plain.defaults.keys()
    plain.load_state_dict(deepcopy(optimizer.state_dict()))
    assert plain.param_groups[0][name] == plain.defaults[name]
    plain.param_groups[0][name] = 0.6
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0][name] == 0.6
    assert optimizer.param_groups[0][f"gam_{name}"] == {"rho": 0.31, "alpha": 0.32}[name]


def test_hyperparameters_set_by_a_schedule_are_part_of_a_checkpoint() -> None:
    optimizer = MOMENTUM.gam([{"params": layer.parameters()} for layer in Task().model.children()])
    for number, group in enumerate(optimizer.param_groups):
        group.update(rho=0.1 * number, alpha=0.2 * number, xi=1e-6 * number)
    other = MOMENTUM.gam([{"params": layer.parameters()} for layer in Task().model.children()])
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    for number, group in enumerate(other.param_groups):
        assert (group["rho"], group["alpha"], group["xi"]) == (0.1 * number, 0.2 * number, 1e-6 * number)


def test_step_and_skip_counts_are_part_of_a_checkpoint() -> None:
    task = Task()
    optimizer = MOMENTUM.gam(task.params)
    optimizer.step(task.loss)
    for _ in range(2):
        optimizer.step(lambda: task.loss() * float("nan"))
    other = MOMENTUM.gam(copy_of(task).params)
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert (other.steps, other.metrics["skipped_steps"].item()) == (3, 2)
    kept = optimizer.state_dict()
    optimizer.step(lambda: task.loss() * float("nan"))
    assert kept["gam_fused"]["skipped_steps"] == 2, "a state dict goes on counting"


def test_a_plain_checkpoint_starts_gams_counts_at_zero() -> None:
    task = Task()
    optimizer = MOMENTUM.gam(task.params, interval=2)
    optimizer.step(lambda: task.loss() * float("nan"))
    optimizer.load_state_dict(MOMENTUM.plain(Task().params).state_dict())
    assert (optimizer.steps, optimizer.metrics["skipped_steps"].item()) == (0, 0)


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_state_dicts_from_before_an_option_existed_still_load(info: Any) -> None:
    """PyTorch fills in options that older versions of an optimizer did not have."""
    task = Task()
    optimizer = Base(info.optim_cls).gam(task.params)
    course(optimizer, task, 2)
    state_dict = deepcopy(optimizer.state_dict())
    for group in state_dict["param_groups"]:
        for option in info.not_og_supported_flags:
            group.pop(option, None)
    twin = copy_of(task)
    other = Base(info.optim_cls).gam(twin.params)
    other.load_state_dict(state_dict)
    assert course(other, twin, 2)[0] == course(optimizer, task, 2)[0]


@pytest.mark.parametrize("cls", [Adam, RMSprop])
def test_a_state_dict_whose_step_is_a_number_still_loads(cls: type[Optimizer]) -> None:
    task = Task()
    optimizer = Base(cls).gam(task.params)
    course(optimizer, task, 2)
    state_dict = deepcopy(optimizer.state_dict())
    for state in state_dict["state"].values():
        state["step"] = state["step"].item()
    twin = copy_of(task)
    other = Base(cls).gam(twin.params)
    other.load_state_dict(state_dict)
    assert course(other, twin, 2)[0] == course(optimizer, task, 2)[0]


@pytest.mark.parametrize("named_after", [False, True])
@pytest.mark.parametrize("named_before", [False, True])
def test_names_survive_if_either_optimizer_has_them(named_before: bool, named_after: bool) -> None:
    task, twin = Task(), Task()
    names = [name for name, _ in task.model.named_parameters()]
    optimizer = MOMENTUM.gam(params_of(task, named_before))
    other = MOMENTUM.gam(params_of(twin, named_after))
    optimizer.step(task.loss)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0].get("param_names") == (names if named_before or named_after else None)
    other.step(twin.loss)


def test_a_hook_may_match_a_checkpoint_by_name() -> None:
    task, twin = Task(), Task()
    optimizer = MOMENTUM.gam(task.model.named_parameters())
    course(optimizer, task, 2)
    other = MOMENTUM.gam(reversed(list(twin.model.named_parameters())))

    def by_name(opt: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        (group,) = state_dict["param_groups"]
        wanted = opt.param_groups[0]["param_names"]
        indices = [group["param_names"].index(name) for name in wanted]
        state = {i: state_dict["state"][group["params"][index]] for i, index in enumerate(indices)}
        return {"state": state, "param_groups": [{**group, "param_names": wanted, "params": list(range(len(wanted)))}]}

    other.register_load_state_dict_pre_hook(by_name)
    other.load_state_dict(optimizer.state_dict())
    names = dict(twin.model.named_parameters())
    for name, param in task.model.named_parameters():
        assert bits(dict(other.state[names[name]])) == bits(dict(optimizer.state[param]))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state_dict: state_dict["param_groups"].append(state_dict["param_groups"][0]),
        lambda state_dict: state_dict["param_groups"].clear(),
        lambda state_dict: state_dict["param_groups"][0]["params"].append(99),
        lambda state_dict: state_dict["param_groups"][0].update(rho=-1.0),
        lambda state_dict: state_dict["param_groups"][0].update(alpha=float("nan")),
        lambda state_dict: state_dict["param_groups"][0].update(xi="small"),
    ],
    ids=["one-group-more", "no-groups", "one-parameter-more", "rho", "alpha", "xi"],
)
def test_a_state_dict_that_does_not_fit_is_refused_and_changes_nothing(spoil: Any) -> None:
    task = Task()
    optimizer = MOMENTUM.gam(task.params)
    optimizer.step(task.loss)
    state_dict = deepcopy(optimizer.state_dict())
    spoil(state_dict)
    optimizer.step(task.loss)
    before = snapshot(optimizer, task.model)
    with pytest.raises((TypeError, ValueError)):
        optimizer.load_state_dict(state_dict)
    assert snapshot(optimizer, task.model) == before


@bases
def test_wrap_keeps_the_groups_and_the_state_of_an_optimizer_in_use(base: Base) -> None:
    task, twin = Task(), Task()
    plain, other = base.plain(task.params), base.plain(twin.params)
    for _ in range(2):
        plain_step(task, plain)
        plain_step(twin, other)
    before = snapshot(plain, task.model)
    groups, state = plain.param_groups, plain.state
    optimizer = GAM.wrap(plain, rho=RHO, alpha=ALPHA, xi=XI)
    assert optimizer.base_optimizer is plain
    assert optimizer.param_groups is groups
    assert optimizer.state is state
    after = snapshot(plain, task.model)
    assert {k: v for k, v in after.items() if k != "groups"} == {k: v for k, v in before.items() if k != "groups"}
    (group,), (group_before,) = after["groups"], before["groups"]
    assert group == {**group_before, **bits(dict(zip(optimizer.keys.values(), (RHO, ALPHA, XI), strict=True)))}
    for _ in range(3):
        optimizer.step(task.loss)
        reference_step(twin, other)
        assert_same_course(optimizer, task.params, other, twin.params)


def test_gam_and_its_base_optimizer_are_freed_with_their_last_reference() -> None:
    """No reference cycle: the state of a large model must not have to wait for the garbage collector."""
    task = Task()
    optimizer = MOMENTUM.gam(task.params)
    optimizer.step(task.loss)
    optimizer.load_state_dict(optimizer.state_dict())
    freed = [weakref.ref(optimizer), weakref.ref(optimizer.base_optimizer)]
    gc.disable()
    try:
        del optimizer
        assert [reference() for reference in freed] == [None, None]
    finally:
        gc.enable()


def test_wrap_takes_gams_hyperparameters_from_groups_that_have_them() -> None:
    task = Task()
    plain = SGD([{"params": task.model.first.parameters(), "rho": 0.5}, {"params": task.model.last.parameters()}])
    optimizer = GAM.wrap(plain, rho=0.1)
    assert [group["rho"] for group in optimizer.param_groups] == [0.5, 0.1]


def test_wrap_refused_leaves_the_optimizer_alone() -> None:
    task = Task()
    plain = MOMENTUM.plain(task.params)
    plain_step(task, plain)
    before = snapshot(plain, task.model)
    for kwargs in ({"rho": -1.0}, {"hvp": "approximate"}, {"backend": "abacus"}, {"interval": 0}, {"model": "resnet"}):
        with pytest.raises((TypeError, ValueError)):
            GAM.wrap(plain, **kwargs)
        assert snapshot(plain, task.model) == before
