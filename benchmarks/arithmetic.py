"""What the kernel benchmark runs: the launches of a step, the bytes they have to move, and who does them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.shapes import Shape
from gam_fused import kernels
from gam_fused.kernels import Backend
from gam_fused.kernels.interface import FusingBackend, accumulation_dtype
from gam_fused.kernels.reference import ReferenceBackend
from gam_fused.kernels.rules import AdamWRule, AdamWState, Descent, SGDRule

# Learning rate and radius are so small that tensors stay what they are over thousands of launches in any order. The
# arithmetic is the same as with any other.
LR, RHO = 1e-9, 1e-6
ALPHA, XI = 0.3, 1e-12
SGD_SETTINGS = {"lr": LR, "momentum": 0.9, "weight_decay": 5e-4}
ADAMW_SETTINGS = {"lr": LR, "weight_decay": 0.01}
STEPS_BEFORE = 100.0  # of AdamW's bias correction


@dataclass(frozen=True)
class Traffic:
    """The lists that have to be read and written at least, each a pass over the bytes of the parameters."""

    reads: tuple[str, ...]
    writes: tuple[str, ...] = ()

    @property
    def passes(self) -> int:
        """Reads and writes together."""
        return len(self.reads) + len(self.writes)


_COMBINED = ("backups", "grads", "hvps")
_MOMENTS = ("exp_avgs", "exp_avg_sqs")

# The same bytes are counted for every back end, however many times it goes over them.
LAUNCHES = {
    "l2_norm": Traffic(reads=("tensors",)),
    "perturb_": Traffic(reads=("params", "directions"), writes=("params", "directions")),
    "restore_": Traffic(reads=("backups",), writes=("params",)),
    "combine_": Traffic(reads=_COMBINED, writes=("params", "grads")),
    "sgd_step_": Traffic(reads=(*_COMBINED, "momentum_buffers"), writes=("params", "momentum_buffers")),
    "adamw_step_": Traffic(reads=(*_COMBINED, *_MOMENTS), writes=("params", *_MOMENTS)),
}

# The launches of a whole step: ‖g‖ and ‖u‖, to the adversarial point, ‖g_adv‖, and back with the update.
STEPS = {
    "whole SGD step": ("l2_norm", "l2_norm", "perturb_", "l2_norm", "sgd_step_"),
    "whole AdamW step": ("l2_norm", "l2_norm", "perturb_", "l2_norm", "adamw_step_"),
}

# PyTorch's own steps without GAM, for scale.
PLAIN_STEPS = {
    "torch SGD": Traffic(reads=("params", "grads", "momentum_buffers"), writes=("params", "momentum_buffers")),
    "torch AdamW": Traffic(reads=("params", "grads", *_MOMENTS), writes=("params", *_MOMENTS)),
}
COPY_NAME = "copy_"
COPY = Traffic(reads=("source",), writes=("target",))

# What is measured, and the plain step that it takes the place of.
PLAIN_STEP_OF = {
    "sgd_step_": "torch SGD",
    "adamw_step_": "torch AdamW",
    "whole SGD step": "torch SGD",
    "whole AdamW step": "torch AdamW",
}


def passes(name: str) -> int:
    """Passes over the parameters' bytes of a launch, a whole step or one of PyTorch's own."""
    if name in PLAIN_STEPS:
        return PLAIN_STEPS[name].passes
    return sum(LAUNCHES[launch].passes for launch in STEPS.get(name, (name,)))


class Tensors:
    """Everything that a step works on, for one list of shapes, dtype and device; shared by all that are measured.

    The values are of ordinary magnitudes and stay so however often any launch is repeated, in any order: a subnormal
    or an infinity would change what an operation costs.
    """

    def __init__(self, shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._generator = torch.Generator(device).manual_seed(0)
        self._shapes = shapes
        self.numel = sum(map(math.prod, shapes))
        self.params = self._normal(0.02)
        self.directions = self._normal(0.02)  # the backups, from the perturbation on
        self.grads = self._normal(1e-3)
        self.adversarial_grads = self._normal(1e-3)
        self.hvps = self._normal(1e-3)
        self.momentum_buffers = self._normal(1e-3)
        self.exp_avgs = self.momentum_buffers  # memory, and no launch uses both
        self.exp_avg_sqs = [grad.square().add_(1e-8) for grad in self.grads]
        self.state_steps = self._state_steps()
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad
        wide = accumulation_dtype(dtype)
        self.grad_norm, self.direction_norm, self.adversarial_norm = (
            torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(tensor, dtype=wide) for tensor in tensors]))
            for tensors in (self.grads, self.directions, self.adversarial_grads)
        )
        self._source, self._target = torch.ones(2, self.numel, dtype=dtype, device=device).unbind()

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters: of one pass."""
        return self.numel * self.dtype.itemsize

    def copy(self) -> None:
        """``copy_`` over as many bytes as the parameters have, in one piece."""
        self._target.copy_(self._source)

    def plain_step(self, name: str, **implementation: bool) -> Callable[[], Any]:
        """The step of a ``torch.optim`` optimizer over these parameters, gradients and state."""
        optimizer: torch.optim.Optimizer
        if name == "torch SGD":
            optimizer = torch.optim.SGD(self.params, **SGD_SETTINGS, **implementation)
            for param, buffer in zip(self.params, self.momentum_buffers, strict=True):
                optimizer.state[param] = {"momentum_buffer": buffer}
        else:
            optimizer = torch.optim.AdamW(self.params, **ADAMW_SETTINGS, **implementation)
            # Where PyTorch itself keeps them: on the host, unless one kernel updates everything.
            steps = self._state_steps(self.device if implementation.get("fused") else torch.device("cpu"))
            for param, *state in zip(self.params, steps, self.exp_avgs, self.exp_avg_sqs, strict=True):
                optimizer.state[param] = dict(zip(("step", "exp_avg", "exp_avg_sq"), state, strict=True))
        return optimizer.step

    def _normal(self, deviation: float) -> list[Tensor]:
        options: dict[str, Any] = {"generator": self._generator, "dtype": self.dtype, "device": self.device}
        return [torch.randn(shape, **options).mul_(deviation) for shape in self._shapes]

    def _state_steps(self, device: torch.device | None = None) -> list[Tensor]:
        return [torch.tensor(STEPS_BEFORE, device=device or self.device) for _ in self._shapes]


class Arithmetic:
    """The launches in one back end; its base rules are the back end's own."""

    def __init__(self, backend: Backend, tensors: Tensors) -> None:
        self.backend = backend
        self.tensors = tensors

    def calls(self) -> Mapping[str, Callable[[], object]]:
        """Each launch and whole step by name."""
        of, backend = self.tensors, self.backend
        norms = of.adversarial_norm, (of.grad_norm, of.direction_norm)
        return {
            "l2_norm": lambda: backend.l2_norm(of.grads),
            "perturb_": lambda: self._perturb(of.direction_norm, of.grad_norm),
            "restore_": lambda: backend.restore_(of.params, of.directions),
            "combine_": lambda: self._combine(of.adversarial_norm),
            "sgd_step_": lambda: self._sgd_step(*norms),
            "adamw_step_": lambda: self._adamw_step(*norms),
            "whole SGD step": lambda: self._whole_step(self._sgd_step),
            "whole AdamW step": lambda: self._whole_step(self._adamw_step),
        }

    def _whole_step(self, update: Callable[[Tensor, Sequence[Tensor]], object]) -> None:
        of, backend = self.tensors, self.backend
        grad_norm, direction_norm = backend.l2_norm_pair(of.grads, of.directions)
        self._perturb(direction_norm, grad_norm)
        update(backend.l2_norm(of.adversarial_grads), (grad_norm, direction_norm))

    def _perturb(self, direction_norm: Tensor, grad_norm: Tensor) -> None:
        of = self.tensors
        self.backend.perturb_(of.params, of.directions, direction_norm, grad_norm, RHO, XI)

    def _combine(self, adversarial_norm: Tensor) -> None:
        of = self.tensors
        self.backend.combine_(of.params, of.directions, of.grads, of.hvps, adversarial_norm, RHO, ALPHA, XI)

    def _descent(self, adversarial_norm: Tensor, guards: Sequence[Tensor]) -> Descent:
        of = self.tensors
        lists = of.params, of.directions, of.grads, of.hvps
        return Descent(*lists, adversarial_norm, RHO, ALPHA, XI, guards, write_grads=False)

    def _sgd_step(self, adversarial_norm: Tensor, guards: Sequence[Tensor]) -> None:
        descent = self._descent(adversarial_norm, guards)
        self.backend.sgd_step_(descent, self.tensors.momentum_buffers, SGDRule(**SGD_SETTINGS))

    def _adamw_step(self, adversarial_norm: Tensor, guards: Sequence[Tensor]) -> None:
        of = self.tensors
        state = AdamWState(of.exp_avgs, of.exp_avg_sqs, [], of.state_steps)
        self.backend.adamw_step_(self._descent(adversarial_norm, guards), state, AdamWRule(**ADAMW_SETTINGS))


class UnfusedArithmetic(Arithmetic):
    """A back end that restores and combines, and then ``torch.optim`` in an implementation of the same kind."""

    def __init__(self, backend: Backend, tensors: Tensors, **implementation: bool) -> None:
        super().__init__(backend, tensors)
        self._plain_sgd = tensors.plain_step("torch SGD", **implementation)
        self._plain_adamw = tensors.plain_step("torch AdamW", **implementation)

    def _sgd_step(self, adversarial_norm: Tensor, guards: Sequence[Tensor]) -> None:
        self._combine(adversarial_norm)
        self._plain_sgd()

    def _adamw_step(self, adversarial_norm: Tensor, guards: Sequence[Tensor]) -> None:
        self._combine(adversarial_norm)
        self._plain_adamw()


LOOP = "loop"


class LoopBackend(ReferenceBackend):
    """One PyTorch operator after another for one tensor after another, as one writes it first."""

    @torch.no_grad()
    def _l2_norm(self, tensors: Sequence[Tensor]) -> Tensor:
        wide = accumulation_dtype(tensors[0].dtype)
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(each, dtype=wide) for each in tensors]))


def arithmetic(name: str, tensors: Tensors) -> Arithmetic:
    """The launches in the back end of that name, or in a ``"loop"`` over tensors.

    Raises:
        ValueError: there is no back end of that name.
        RuntimeError: the back end cannot run here, or not on the tensors' device; the message says why.
    """
    if name == LOOP:
        return UnfusedArithmetic(LoopBackend(), tensors, foreach=False, fused=False)
    backend = kernels.resolve(name, [tensors.device])
    if isinstance(backend, FusingBackend):
        return Arithmetic(backend, tensors)
    return UnfusedArithmetic(backend, tensors, foreach=True)
