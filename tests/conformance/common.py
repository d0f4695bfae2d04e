"""What the conformance tests share: base optimizers, a task, its twin stepped by plain PyTorch, bitwise comparison."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.testing._internal.common_optimizers import OptimizerInfo, optim_db

from gam_fused import GAM, kernels, reference

BACKENDS = [name for name, reason in kernels.available().items() if reason is None]

# Large enough that the flatness term is a sizeable part of every step.
RHO, ALPHA, XI = 0.2, 0.7, 1e-12

# Two ways of computing the same step in float64; sums, square roots and divisions of well scaled numbers, amplified by
# at most a few steps of a smooth problem.
CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


@dataclass(frozen=True)
class Base:
    """A base optimizer before it has parameters."""

    cls: type[Optimizer]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def plain(self, params: Any) -> Optimizer:
        # Copied, because a learning rate may be a tensor, which schedulers write into.
        return self.cls(params, **deepcopy(self.kwargs))

    def gam(self, params: Any, **kwargs: Any) -> GAM:
        return GAM(params, self.cls, **{"rho": RHO, "alpha": ALPHA, "xi": XI, **kwargs}, **deepcopy(self.kwargs))

    def replace(self, **kwargs: Any) -> Base:
        return Base(self.cls, {**self.kwargs, **kwargs})

    @property
    def maximize(self) -> bool:
        return bool(self.kwargs.get("maximize", False))


BASES = [
    pytest.param(Base(SGD, {"lr": 0.1}), id="SGD"),
    pytest.param(Base(SGD, {"lr": 0.1, "momentum": 0.9}), id="SGD-momentum"),
    pytest.param(Base(SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}), id="SGD-nesterov"),
    pytest.param(Base(SGD, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}), id="SGD-maximize"),
    pytest.param(Base(Adam, {"lr": 0.02, "amsgrad": True, "weight_decay": 0.1}), id="Adam-amsgrad"),
    pytest.param(Base(AdamW, {"lr": 0.02, "weight_decay": 0.1}), id="AdamW"),
    pytest.param(Base(RMSprop, {"lr": 0.02, "momentum": 0.5}), id="RMSprop-momentum"),
    pytest.param(Base(Adagrad, {"lr": 0.05}), id="Adagrad"),
]

INFOS: list[OptimizerInfo] = [info for info in optim_db if info.optim_cls in (SGD, Adam, AdamW, RMSprop, Adagrad)]

# Every configuration on which PyTorch tests these optimizers.
CONFIGURATIONS = [
    pytest.param(Base(info.optim_cls, config.kwargs), id=f"{info.name}-{config.desc}".replace(" ", "_"))
    for info in INFOS
    for config in info.optim_inputs_func(device="cpu")
]

# PyTorch's own multi-tensor and fused steps. (The fused ones of the CPU take every parameter for a contiguous one.)
IMPLEMENTATIONS = [
    pytest.param(Base(info.optim_cls, {name: True}), id=f"{info.name}-{name}")
    for info in INFOS
    for name in ("foreach", "fused")
    if name == "foreach" or "cpu" in info.supports_fused_on
]


class Network(nn.Module):
    """Three layers, the middle one of which can be left out. Smooth, so that its Hessian exists everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.middle = nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)
        self.use_middle = True

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(inputs))
        if self.use_middle:
            hidden = torch.tanh(self.middle(hidden))
        return self.last(hidden)


class Task:
    """A network and one mini-batch; equal seeds give bitwise equal tasks."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.model = Network().to(dtype)
        with torch.no_grad():
            for param in self.model.parameters():
                param.copy_(torch.randn(param.shape, generator=generator) / 2)
        self.inputs = torch.randn(8, 3, generator=generator).to(dtype)
        self.targets = torch.randn(8, 2, generator=generator).to(dtype)

    def loss(self) -> Tensor:
        return F.mse_loss(self.model(self.inputs), self.targets)

    def loss_of(self, params: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
        """The loss where the parameters ``params`` of the model have ``values``."""
        names = {param: name for name, param in self.model.named_parameters()}
        state = {names[param]: value for param, value in zip(params, values, strict=True)}
        return F.mse_loss(torch.func.functional_call(self.model, state, (self.inputs,)), self.targets)

    def ordinary_closure(self, optimizer: Optimizer, *, set_to_none: bool = True) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            optimizer.zero_grad(set_to_none)
            loss = self.loss()
            loss.backward()
            return loss

        return closure

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())


def reference_step(task: Task, optimizer: Optimizer, rho: float = RHO, alpha: float = ALPHA, xi: float = XI) -> Tensor:
    """Step a plain optimizer in float64 along g + α h of ``reference.py``; returns the loss at θ.

    A parameter that is frozen, or that the loss does not depend on, has no gradient.
    """
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    gradients = torch.autograd.grad(task.loss(), params, allow_unused=True) if params else ()
    params = [param for param, gradient in zip(params, gradients, strict=True) if gradient is not None]
    # An optimizer that maximizes negates what it is given: the loss is to rise, and its flatness penalty to fall.
    sign = -1 if optimizer.param_groups[0].get("maximize", False) else 1
    terms = reference.gam_terms(partial(task.loss_of, params), params, rho, sign * alpha, xi)
    optimizer.zero_grad()
    for param, gradient in zip(params, terms.combined, strict=True):
        param.grad = gradient
    optimizer.step()
    return terms.loss


def plain_step(task: Task, optimizer: Optimizer) -> Tensor:
    """Step a plain optimizer as PyTorch's users do."""
    return optimizer.step(task.ordinary_closure(optimizer))


def assert_same_course(optimizer: Optimizer, params: list[Any], twin: Optimizer, twin_params: list[Any]) -> None:
    """Parameters and optimizer state of both agree to float64 accuracy."""
    torch.testing.assert_close(params, twin_params, **CLOSE)
    for param, twin_param in zip(params, twin_params, strict=True):
        torch.testing.assert_close(dict(optimizer.state[param]), dict(twin.state[twin_param]), **CLOSE)


def bits(value: Any) -> Any:
    """``value`` with each tensor and number spelled out, so that ``==`` compares bit for bit, NaN and −0 included."""
    if isinstance(value, Tensor):
        data = bytes(value.detach().cpu().reshape(-1).view(torch.uint8).tolist())
        return type(value).__name__, str(value.dtype), tuple(value.shape), data.hex(" ")
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [bits(item) for item in value]
    return value.hex() if isinstance(value, float) else value


def snapshot(optimizer: Optimizer, model: nn.Module | None = None) -> dict[str, Any]:
    """Everything that a call which fails must leave as it was, bit for bit."""
    groups = optimizer.param_groups
    params = [param for group in groups for param in group["params"]]
    return bits(
        {
            "parameters": params,
            "gradients": [param.grad for param in params],
            "trainable": [param.requires_grad for param in params],
            "groups": [
                {**group, "params": [id(param) for param in group["params"]]} for group in optimizer.param_groups
            ],
            "state": {id(key): state for key, state in optimizer.state.items()},
            "buffers": {} if model is None else dict(model.named_buffers()),
            "random states": [torch.get_rng_state(), random.getstate()],
            "steps": getattr(optimizer, "steps", None),
            "metrics": getattr(optimizer, "metrics", None),
        }
    )


def course(optimizer: Optimizer, task: Task, steps: int) -> Any:
    """Parameters after each of so many steps, and the state dict after the last, to be compared bit for bit."""
    visited = []
    for _ in range(steps):
        optimizer.step(task.loss if isinstance(optimizer, GAM) else task.ordinary_closure(optimizer))
        visited.append(bits(task.params))
    return visited, bits(optimizer.state_dict())


backends = pytest.mark.parametrize("backend", BACKENDS)
bases = pytest.mark.parametrize("base", BASES)
MOMENTUM = Base(SGD, {"lr": 0.1, "momentum": 0.9})
