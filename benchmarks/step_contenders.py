"""Who takes the steps that the benchmark compares: this package in each of its modes, what others offer, the obvious.

Each contender is a function that is given a problem, whose model is its own, and returns a `Run`. All of them descend
by ``torch.optim.SGD`` with the same settings.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import SGD

from benchmarks.packages import NotInstalled, imported
from benchmarks.step_models import Problem
from gam_fused import GAM, AcceleratedGAM
from gam_fused.closures import evaluate
from gam_fused.replay import Replay

RHO, ALPHA, XI = 0.05, 0.1, 1e-12
# What the released code takes for ResNets on CIFAR-100; its quantities are not those of the paper.
RELEASED = {"grad_beta_1": 0.6, "grad_beta_2": 0.5, "grad_beta_3": 0.4, "grad_gamma": 0.03}
RELEASED_GRAD_RHO, RELEASED_GRAD_NORM_RHO = 0.02, 0.2
INTERVAL = 4


@dataclass(frozen=True)
class Settings:
    """Of all contenders. The learning rate is so small that a model stays what it is over thousands of steps."""

    lr: float = 1e-6
    momentum: float = 0.9
    weight_decay: float = 5e-4
    released_code: Path | None = None
    """A checkout of the code that the paper's authors released."""

    @property
    def sgd(self) -> dict[str, Any]:
        """What ``torch.optim.SGD`` is given."""
        return {"lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay}


@dataclass(frozen=True)
class Run:
    """A contender at work: what to call, and how many steps one call takes."""

    call: Callable[[], object]
    steps: int = 1
    is_graph: bool = False
    """Whether it runs what a compiler has made of the operators, so that counting those dispatched says nothing."""


# ---------------------------------------------------------------- derivatives alone


def gradient(problem: Problem, settings: Settings) -> Run:
    """Forward and backward pass, nothing else."""
    params = problem.params
    return Run(lambda: torch.autograd.grad(problem.loss(), params))


def gradient_and_hvp(problem: Problem, settings: Settings) -> Run:
    """H g by double backward, in eager PyTorch."""
    params = problem.params
    return Run(lambda: _gradient_and_hvp(problem, params))


def gradient_and_hvp_of_gam(problem: Problem, settings: Settings) -> Run:
    """H g as :class:`GAM` has it computed, twice a step."""
    params = problem.params

    def call() -> list[Tensor]:
        replay = Replay(problem.model, params)
        found = evaluate(problem.loss, params, replay, create_graph=True)
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(params, found.gradients.total, strict=True)]
        hvps = found.gradients.hvp(range(len(params)), grads)
        replay.finish()
        return hvps

    return Run(call)


def _gradient_and_hvp(problem: Problem, params: Sequence[Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no second derivative
        loss = problem.loss()
    grads = torch.autograd.grad(loss, params, create_graph=True)
    vectors = [grad.detach() for grad in grads]
    return vectors, torch.autograd.grad(grads, params, vectors, materialize_grads=True)


# ---------------------------------------------------------------- steps


def sgd(problem: Problem, settings: Settings) -> Run:
    """The base optimizer alone: the unit."""
    optimizer = SGD(problem.params, **settings.sgd)
    return Run(lambda: optimizer.step(partial(_backward, optimizer, problem)))


def _backward(optimizer: Any, problem: Problem) -> Tensor:
    optimizer.zero_grad()
    loss = problem.loss()
    loss.backward()
    return loss


def sgd_compiled(problem: Problem, settings: Settings, backend: str = "inductor") -> Run:
    """The base optimizer alone on a loss under ``torch.compile``: the fair rival of compiled steps."""
    optimizer = SGD(problem.params, **settings.sgd)
    own = replace(problem, model=torch.compile(problem.model, fullgraph=True, backend=backend))
    return Run(lambda: optimizer.step(partial(_backward, optimizer, own)), is_graph=True)


def naive_gam(problem: Problem, settings: Settings) -> Run:
    """GAM as it stands in the paper, in plain PyTorch, a tensor at a time: the honest baseline."""
    params = problem.params
    optimizer = SGD(params, **settings.sgd)

    def norm(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([tensor.norm() for tensor in tensors]).norm()

    def call() -> None:
        g, hvp = _gradient_and_hvp(problem, params)
        norm_of_g = norm(g)
        f = [each / (norm_of_g + XI) for each in hvp]
        norm_of_f = norm(f)
        backups = [param.detach().clone() for param in params]
        with torch.no_grad():
            for param, each in zip(params, f, strict=True):
                param.add_(RHO * each / (norm_of_f + XI))
        g_adv, hvp = _gradient_and_hvp(problem, params)
        norm_of_g_adv = norm(g_adv)
        h = [RHO * each / (norm_of_g_adv + XI) for each in hvp]
        with torch.no_grad():
            for param, backup in zip(params, backups, strict=True):
                param.copy_(backup)
        for param, grad, penalty in zip(params, g, h, strict=True):
            param.grad = grad + ALPHA * penalty
        optimizer.step()

    return Run(call)


def gam(problem: Problem, settings: Settings, **options: Any) -> Run:
    """This package's. A call takes as many steps as lie between two flatness terms."""
    missing = options.keys() - inspect.signature(GAM).parameters.keys()
    if missing:
        raise NotInstalled(f"this version of GAM has no argument {', '.join(sorted(missing))}")
    optimizer = GAM(problem.params, SGD, rho=RHO, alpha=ALPHA, xi=XI, model=problem.model, **options, **settings.sgd)
    steps = options.get("interval", 1)

    def call() -> None:
        for _ in range(steps):
            optimizer.step(problem.loss)

    return Run(call, steps)


def accelerated_gam(problem: Problem, settings: Settings) -> Run:
    """This package's Algorithm 2: four gradients, no second derivative."""
    optimizer = AcceleratedGAM(problem.params, SGD, model=problem.model, **settings.sgd)
    return Run(partial(optimizer.step, problem.loss))


def gam_compiled(problem: Problem, settings: Settings, backend: str = "inductor") -> Run:
    """This package's, with loss, gradient and Hessian-vector product in one graph."""
    optimizer = GAM(problem.params, SGD, rho=RHO, alpha=ALPHA, xi=XI, **settings.sgd)
    step = optimizer.compile(lambda inputs, targets: problem.loss_of(problem.model(inputs), targets), backend=backend)
    return Run(lambda: step(problem.inputs, problem.targets), is_graph=True)


def sam_of_pytorch_optimizer(problem: Problem, settings: Settings) -> Run:
    """SAM (two gradients) with multi-tensor perturbations."""
    library = imported("pytorch_optimizer", "pytorch_optimizer")
    optimizer = library.SAM(problem.params, SGD, rho=RHO, foreach=True, **settings.sgd)
    backward = partial(_backward, optimizer, problem)

    def call() -> None:
        backward()
        optimizer.step(backward)

    return Run(call)


def gam_of_infty(problem: Problem, settings: Settings) -> Run:
    """GAM by finite differences: four gradients."""
    library = imported("infty.optim", "infty")
    options = {**RELEASED, "rho": RELEASED_GRAD_RHO, "norm_rho": RELEASED_GRAD_NORM_RHO}
    optimizer = library.GAM(problem.params, SGD(problem.params, **settings.sgd), problem.model, options)

    def outputs_and_losses() -> tuple[Tensor, list[Tensor]]:
        outputs = problem.model(problem.inputs)
        return outputs, [problem.loss_of(outputs, problem.targets)]

    optimizer.set_closure(outputs_and_losses)
    return Run(optimizer.step)


def released_gam(problem: Problem, settings: Settings) -> Run:
    """The authors' own, out of a checkout of theirs: finite differences, four gradients."""
    optimizer = _module_of_released_code(settings.released_code).GAM(
        problem.params,
        SGD(problem.params, **settings.sgd),
        problem.model,
        # In place of schedulers, of which it wants the values.
        grad_rho_scheduler=SimpleNamespace(step=lambda: RELEASED_GRAD_RHO),
        grad_norm_rho_scheduler=SimpleNamespace(step=lambda: RELEASED_GRAD_NORM_RHO),
        args=SimpleNamespace(**RELEASED),
    )
    optimizer.set_closure(problem.loss_of, problem.inputs, problem.targets)
    return Run(optimizer.step)


def _module_of_released_code(folder: Path | None) -> ModuleType:
    """Module ``gam.gam`` of that folder.

    Raises:
        NotInstalled: there is no folder, it has no such module, or the module cannot be imported.
    """
    if folder is None:
        raise NotInstalled("give the folder of a checkout (github.com/xxgege/GAM) as --released-code")
    folder = folder.resolve()
    if not (folder / "gam" / "gam.py").is_file():
        raise NotInstalled(f"{folder} has no gam/gam.py; --released-code takes the root of the checkout")
    sys.path.insert(0, str(folder))
    try:
        importlib.invalidate_caches()
        module = imported("gam.gam", "the released code")
    finally:
        sys.path.remove(str(folder))
    if not Path(module.__file__ or "").resolve().is_relative_to(folder):
        raise NotInstalled(f"another package named gam is in the way of {folder}: {module.__file__}")
    return module


Build = Callable[[Problem, Settings], Run]

GRADIENT, SGD_NAME, NAIVE = "gradient", "sgd", "naive-gam"
SGD_COMPILED, GAM_COMPILED = "sgd-compiled", "gam-exact-compiled"
DERIVATIVES: dict[str, Build] = {
    GRADIENT: gradient,
    "gradient-hvp": gradient_and_hvp,
    "gradient-hvp-of-gam": gradient_and_hvp_of_gam,
}
STEPS: dict[str, Build] = {
    SGD_NAME: sgd,
    "pytorch_optimizer-sam": sam_of_pytorch_optimizer,
    "infty-gam": gam_of_infty,
    "released-gam": released_gam,
    NAIVE: naive_gam,
    "gam-exact": gam,
    "gam-exact-second-order-off": partial(gam, second_order="off"),
    "accelerated-gam": accelerated_gam,
    "gam-finite-difference": partial(gam, hvp="finite_difference"),
    f"gam-exact-interval-{INTERVAL}": partial(gam, interval=INTERVAL),
    SGD_COMPILED: sgd_compiled,
    GAM_COMPILED: gam_compiled,
}
CONTENDERS = {**DERIVATIVES, **STEPS}
# On request only: Inductor takes minutes for each model, before anything is measured.
COMPILED = (SGD_COMPILED, GAM_COMPILED)
# Those that compute what the naive one does, step by step.
EXACT = ("gam-exact", "gam-exact-second-order-off", GAM_COMPILED)


# ---------------------------------------------------------------- checks before anything is measured

TOLERANCE = 1e-10  # some ten thousand roundings in float64, of parameters that are about one at most
_CHECK_LR = 0.1  # so large that a wrong step shows


class WrongStep(Exception):
    """A contender does not do what it is measured for."""


def start(name: str, problem: Problem, settings: Settings) -> Run:
    """Build the contender with a model of its own, and take a first step.

    Raises:
        NotInstalled: it cannot be had here.
        WrongStep: it left a parameter that is not finite or, where it is a whole step, moved none.
    """
    own = problem.copy()
    run = CONTENDERS[name](own, settings)
    run.call()
    if not all(bool(param.isfinite().all()) for param in own.params):
        raise WrongStep(f"{name} left parameters that are not finite after its first step")
    if name in STEPS and all(torch.equal(*pair) for pair in zip(own.params, problem.params, strict=True)):
        raise WrongStep(f"{name} moved no parameter in its first step")
    return run


def difference_from_naive(name: str, problem: Problem, settings: Settings) -> float:
    """The largest difference of any parameter from the naive step's, after one step of each in float64.

    Raises:
        NotInstalled: the contender cannot be had here.
        WrongStep: the difference is larger than `TOLERANCE`, or not a number.
    """
    settings = replace(settings, lr=_CHECK_LR)
    device = problem.inputs.device
    ends = []
    for each in (NAIVE, name):
        own = problem.copy().to(device, torch.float64)
        CONTENDERS[each](own, settings).call()
        ends.append(own.params)
    difference = max(float((a - b).detach().abs().max()) for a, b in zip(*ends, strict=True) if a.numel())
    if not difference <= TOLERANCE:
        raise WrongStep(
            f"after one step in float64 the parameters of {name} are {difference:.1e} from those of {NAIVE}; at most "
            f"{TOLERANCE:.0e} is rounding"
        )
    return difference
