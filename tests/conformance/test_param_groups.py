"""Param groups: every form they may be given in, every hyper-parameter they may set, and one list of them for both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Adadelta, Adam, AdamW, Optimizer, RMSprop

from gam_fused import GAM, reference
from tests.conformance.common import (
    ALPHA,
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
    reference_step,
    snapshot,
)

FORMS: dict[str, Callable[[nn.Module], Any]] = {
    "list": lambda model: list(model.parameters()),
    "tuple": lambda model: tuple(model.parameters()),
    "generator": lambda model: model.parameters(),
    "named": lambda model: model.named_parameters(),
    "groups": lambda model: [{"params": list(layer.parameters())} for layer in model.children()],
    "groups-of-generators": lambda model: [{"params": layer.parameters()} for layer in model.children()],
    "groups-of-one-tensor": lambda model: [{"params": param} for param in model.parameters()],
    "generator-of-groups": lambda model: ({"params": [param]} for param in model.parameters()),
    "named-groups": lambda model: [{"params": [pair]} for pair in model.named_parameters()],
    "groups-with-an-empty-one": lambda model: [{"params": []}, {"params": model.parameters()}],
}


@pytest.mark.parametrize("form", FORMS)
@bases
def test_parameters_may_be_given_in_every_form_that_torch_takes(base: Base, form: str) -> None:
    task, twin = Task(), Task()
    optimizer, other = base.gam(FORMS[form](task.model)), base.gam(twin.params)
    assert course(optimizer, task, 2)[0] == course(other, twin, 2)[0]


@backends
@bases
def test_lr_and_weight_decay_by_group_follow_the_reference(base: Base, backend: str) -> None:
    def groups(model: nn.Module) -> Iterator[dict[str, Any]]:
        yield {"params": model.first.parameters(), "lr": 0.05}
        yield {"params": model.middle.parameters(), "weight_decay": 0.3}
        yield {"params": model.last.parameters(), "lr": 0.2, "weight_decay": 0.0}

    task, twin = Task(), Task()
    optimizer, plain = base.gam(groups(task.model), backend=backend), base.plain(groups(twin.model))
    for _ in range(5):
        optimizer.step(task.loss)
        reference_step(twin, plain)
        assert_same_course(optimizer, task.params, plain, twin.params)


def grouped_gradient(task: Task, groups: list[dict[str, Any]], sign: int) -> list[Tensor]:
    """g + α h where ρ, α and ξ belong to a group, and every norm to all groups together."""
    params = [param.detach() for group in groups for param in group["params"]]
    rho, alpha, xi = ([group[name] for group in groups for _ in group["params"]] for name in ("rho", "alpha", "xi"))

    def loss_of(values: list[Tensor]) -> Tensor:
        return task.loss_of([param for group in groups for param in group["params"]], values)

    g = reference.gradient(loss_of, params)
    u = reference.hessian_vector_product(loss_of, params, g)
    g_norm, u_norm = reference.global_norm(g), reference.global_norm(u)
    # f/(‖f‖ + ξ) = u/(‖u‖ + ξ (‖g‖ + ξ)): with one ξ per group, ‖f‖ itself would depend on the group.
    at_adv = [p + r * d / (u_norm + x * (g_norm + x)) for p, r, d, x in zip(params, rho, u, xi, strict=True)]
    g_adv = reference.gradient(loss_of, at_adv)
    hvp = reference.hessian_vector_product(loss_of, at_adv, g_adv)
    adv_norm = reference.global_norm(g_adv)
    terms = zip(g, hvp, rho, alpha, xi, strict=True)
    return [gi + sign * a * r * hi / (adv_norm + x) for gi, hi, r, a, x in terms]


@backends
@bases
def test_rho_alpha_and_xi_by_group_follow_the_formulas(base: Base, backend: str) -> None:
    task, twin = Task(), Task()
    alpha = "gam_alpha" if base.cls is RMSprop else "alpha"
    own = {
        "first": {"rho": 0.3},
        "middle": {"alpha": 0.1, "xi": 1e-2},
        "last": {"rho": 0.05, "alpha": 1.5},
    }
    groups = [
        {
            "params": getattr(task.model, layer).parameters(),
            **{alpha if name == "alpha" else name: value for name, value in values.items()},
        }
        for layer, values in own.items()
    ]
    optimizer = base.gam(groups, backend=backend)
    plain = base.plain([{"params": getattr(twin.model, layer).parameters()} for layer in own])
    mine = [
        {"rho": RHO, "alpha": ALPHA, "xi": XI, **values, "params": list(getattr(twin.model, layer).parameters())}
        for layer, values in own.items()
    ]
    for _ in range(4):
        optimizer.step(task.loss)
        gradient = grouped_gradient(twin, mine, -1 if base.maximize else 1)
        for param, combined in zip(twin.params, gradient, strict=True):
            param.grad = combined
        plain.step()
        assert_same_course(optimizer, task.params, plain, twin.params)


@pytest.mark.parametrize("cls", [RMSprop, ASGD, Adadelta])
@backends
def test_hyperparameters_of_the_base_optimizer_keep_their_names(cls: type[Optimizer], backend: str) -> None:
    """RMSprop and ASGD have an ``alpha`` of their own, and Adadelta a ``rho``: neither is GAM's."""
    task, twin = Task(), Task()
    base = Base(cls)
    (name,) = {"rho", "alpha"} & base.plain(twin.params).defaults.keys()
    plain = base.plain([{"params": twin.params, name: 0.6}])
    optimizer = base.gam([{"params": task.params, name: 0.6}], backend=backend)
    assert optimizer.param_groups[0][name] == 0.6
    for gam_value in (None, 0.0):
        if gam_value is not None:  # as a schedule would
            optimizer.param_groups[0][f"gam_{name}"] = gam_value
        optimizer.step(task.loss)
        reference_step(twin, plain, **({} if gam_value is None else {name: gam_value}))
        assert_same_course(optimizer, task.params, plain, twin.params)


@pytest.mark.parametrize("cls", [RMSprop, ASGD, Adadelta])
def test_a_group_added_later_gets_the_base_optimizers_default_and_gams(cls: type[Optimizer]) -> None:
    task = Task()
    plain = cls(task.model.first.parameters())
    optimizer = GAM.wrap(plain, rho=0.31, alpha=0.32)
    optimizer.add_param_group({"params": task.model.last.parameters()})
    (name,) = {"rho", "alpha"} & plain.defaults.keys()
    for group in optimizer.param_groups:
        assert group[name] == plain.defaults[name]
        assert group[f"gam_{name}"] == {"rho": 0.31, "alpha": 0.32}[name]


@backends
def test_a_group_of_lr_zero_stays_where_it_is_bitwise(backend: str) -> None:
    task = Task()
    still, moving = [*task.model.first.parameters()], [*task.model.middle.parameters(), *task.model.last.parameters()]
    optimizer = MOMENTUM.gam([{"params": still, "lr": 0.0}, {"params": moving}], backend=backend)
    before, moving_before = bits(still), bits(moving)
    for _ in range(3):
        optimizer.step(task.loss)
    assert bits(still) == before
    assert bits(moving) != moving_before


@backends
@bases
def test_adding_a_group_in_the_middle_of_training_follows_the_reference(base: Base, backend: str) -> None:
    task, twin = Task(), Task()
    optimizer = base.gam([{"params": task.model.first.parameters()}], backend=backend)
    plain = base.plain([{"params": twin.model.first.parameters()}])
    for step in range(6):
        if step == 2:
            for opt, model in ((optimizer, task.model), (plain, twin.model)):
                opt.add_param_group({"params": model.last.parameters(), "lr": 0.03})
        if step == 4:
            for opt, model in ((optimizer, task.model), (plain, twin.model)):
                opt.add_param_group({"params": [model.middle.weight]})
        optimizer.step(task.loss)
        reference_step(twin, plain)
        trained = [[p for group in opt.param_groups for p in group["params"]] for opt in (optimizer, plain)]
        assert_same_course(optimizer, trained[0], plain, trained[1])
    assert bits(task.model.middle.bias) == bits(Task().model.middle.bias)


def test_a_group_added_to_the_base_optimizer_is_gams_too() -> None:
    task, twin = Task(), Task()
    optimizer, other = (MOMENTUM.gam(t.model.first.parameters(), rho=0.3) for t in (task, twin))
    optimizer.base_optimizer.add_param_group({"params": task.model.last.parameters()})
    other.add_param_group({"params": twin.model.last.parameters()})
    assert course(optimizer, task, 2) == course(other, twin, 2)


def test_an_added_group_gets_the_constructors_hyperparameters_unless_it_sets_its_own() -> None:
    task = Task()
    optimizer = MOMENTUM.gam(task.model.first.parameters(), rho=0.3, alpha=0.4, xi=1e-6)
    group = {"params": task.model.last.parameters(), "alpha": 0.9}
    optimizer.add_param_group(group)
    assert [optimizer.param_groups[1][name] for name in ("rho", "alpha", "xi", "lr")] == [0.3, 0.9, 1e-6, 0.1]
    assert set(group) == {"params", "alpha"}, "the caller's own dictionary"


@pytest.mark.parametrize(
    "group",
    [
        lambda task: {"params": task.model.first.weight},
        lambda task: {"params": [task.model.last.weight] * 2},
        lambda task: {"params": task.model.last.parameters(), "rho": -1.0},
        lambda task: {"params": task.model.last.parameters(), "alpha": float("nan")},
        lambda task: {"params": [("last", task.model.last.weight)]},
        lambda task: {"params": [torch.zeros(2, dtype=torch.complex64, requires_grad=True)]},
        lambda task: {"params": {task.model.last.weight}},
        lambda task: {"lr": 0.1},
        lambda task: task.model.last.weight,
    ],
    ids=["held", "twice", "rho", "alpha", "named-among-unnamed", "complex", "set", "no-params", "no-dictionary"],
)
def test_a_bad_group_is_refused_and_changes_nothing(group: Callable[[Task], Any]) -> None:
    task = Task()
    optimizer = MOMENTUM.gam(task.model.first.parameters())
    optimizer.step(task.loss)
    before = snapshot(optimizer, task.model)
    with pytest.raises((TypeError, ValueError)):
        optimizer.add_param_group(group(task))
    assert snapshot(optimizer, task.model) == before


def is_one(optimizer: GAM) -> bool:
    base = optimizer.base_optimizer
    return optimizer.param_groups is base.param_groups and optimizer.state is base.state


@bases
def test_groups_and_state_are_the_base_optimizers_own_whatever_replaces_them(base: Base) -> None:
    task = Task()
    optimizer = base.gam(task.params)
    assert is_one(optimizer)
    optimizer.step(task.loss)
    assert is_one(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert is_one(optimizer)
    optimizer.base_optimizer.load_state_dict(optimizer.base_optimizer.state_dict())
    assert is_one(optimizer)
    optimizer.param_groups = groups = [dict(group) for group in optimizer.param_groups]
    optimizer.state = state = optimizer.state.copy()
    assert optimizer.param_groups is groups
    assert optimizer.state is state
    assert is_one(optimizer)
    optimizer.step(task.loss)
    assert is_one(optimizer)


@pytest.mark.parametrize("cls", [SGD, Adam, AdamW, RMSprop])
def test_constructor_arguments_reach_the_base_optimizer(cls: type[Optimizer]) -> None:
    task, twin = Task(), Task()
    kwargs = {"lr": 0.123, "weight_decay": 0.045}
    optimizer, plain = GAM(task.params, cls, rho=0.1, alpha=0.2, **kwargs), cls(twin.params, **kwargs)
    assert type(optimizer.base_optimizer) is cls
    assert optimizer.base_optimizer.defaults == plain.defaults
    (group,), (plain_group,) = optimizer.param_groups, plain.param_groups
    assert {name: group[name] for name in plain_group if name != "params"} == {
        name: value for name, value in plain_group.items() if name != "params"
    }
    assert optimizer.defaults.items() >= plain.defaults.items()


def test_names_of_parameters_are_kept() -> None:
    model = Task().model
    names = [name for name, _ in model.named_parameters()]
    optimizer = MOMENTUM.gam(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == names
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
    assert all(type(param) is nn.Parameter for param in optimizer.param_groups[0]["params"])
