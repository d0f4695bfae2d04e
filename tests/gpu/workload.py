"""The same numbers on any device, every operator over them, and bitwise comparison. Needs nothing but torch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from gam_fused.kernels import Backend
from gam_fused.kernels.interface import accumulation_dtype
from gam_fused.kernels.rules import AdamWRule, AdamWState, Descent, SGDRule

RHO, ALPHA, XI = 0.3, 0.7, 0.01
SGD = SGDRule(lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.01, nesterov=False)
ADAMW = AdamWRule(lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, amsgrad=True)
STEPS_BEFORE = 3.0

# Around a pack of 16 bytes, what a block takes at once, a chunk of the CUDA and one of the CPU kernels; none, one, odd.
NUMELS = (0, 1, 3, 8, 257, 1024, 8191, 8192, 8193, 16384, 70001, 5)

Tensors = list[Tensor]


@dataclass
class Workload:
    """All that the operators read and write. Tensors of equal index in all lists belong to one parameter."""

    params: Tensors
    directions: Tensors  # or backups
    grads: Tensors
    hvps: Tensors
    momentum_buffers: Tensors
    exp_avgs: Tensors
    exp_avg_sqs: Tensors
    max_exp_avg_sqs: Tensors
    state_steps: Tensors
    grad_norm: Tensor
    direction_norm: Tensor
    adversarial_norm: Tensor
    guards: Tensors

    def to(self, device: torch.device, dtype: torch.dtype | None = None, misaligned: bool = False) -> Workload:
        """A copy in memory of its own; norms in the accumulation dtype of ``dtype``, step counts in float32."""
        dtype = dtype or self.params[0].dtype
        values = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "state_steps":
                values[field.name] = [step.clone().to(device) for step in value]
            elif field.name == "guards":
                values[field.name] = [guard.clone().to(device, accumulation_dtype(dtype)) for guard in value]
            elif isinstance(value, Tensor):
                values[field.name] = value.clone().to(device, accumulation_dtype(dtype))
            else:
                values[field.name] = [_placed(tensor, device, dtype, misaligned) for tensor in value]
        return Workload(**values)

    def part(self, begin: int, end: int) -> Workload:
        """Some of the parameters only; shares memory."""
        return replace(self, **{name: getattr(self, name)[begin:end] for name in LISTS})

    def copy_(self, other: Workload) -> None:
        """Take over the other's numbers, in place."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)

    def tensors(self) -> Tensors:
        """Everything, in a fixed order."""
        values = (getattr(self, field.name) for field in fields(self))
        return [tensor for value in values for tensor in ([value] if isinstance(value, Tensor) else value)]


LISTS = (
    *("params", "directions", "grads", "hvps", "momentum_buffers", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"),
    "state_steps",
)
"""The lists with an item for each parameter, by name."""


def workload(dtype: torch.dtype, numels: Sequence[int] = NUMELS, seed: int = 0) -> Workload:
    """Random numbers of ``dtype`` on the CPU; second moments away from zero, where AdamW is ill-conditioned."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float = 1.0) -> Tensors:
        return [torch.randn(numel, generator=generator, dtype=torch.float64).mul(scale).to(dtype) for numel in numels]

    def moments() -> Tensors:
        return [(torch.rand(n, generator=generator, dtype=torch.float64) + 0.5).to(dtype) for n in numels]

    wide = accumulation_dtype(dtype)
    return Workload(
        params=normal(),
        directions=normal(),
        grads=normal(),
        hvps=normal(),
        momentum_buffers=normal(),
        exp_avgs=normal(),
        exp_avg_sqs=moments(),
        max_exp_avg_sqs=moments(),
        state_steps=[torch.tensor(STEPS_BEFORE) for _ in numels],
        grad_norm=torch.tensor(2.5, dtype=wide),
        direction_norm=torch.tensor(1.5, dtype=wide),
        adversarial_norm=torch.tensor(0.8, dtype=wide),
        guards=[torch.tensor(1.0, dtype=wide), torch.tensor(2.0, dtype=wide)],
    )


def _placed(tensor: Tensor, device: torch.device, dtype: torch.dtype, misaligned: bool) -> Tensor:
    if not misaligned:
        return tensor.clone().to(device, dtype)
    buffer = torch.full((tensor.numel() + 2,), math.nan, dtype=dtype, device=device)
    return buffer[1:-1].copy_(tensor)


# ---------------------------------------------------------------- operators

Operator = Callable[[Backend, Workload], "Tensors | None"]


def perturb(backend: Backend, on: Workload) -> None:
    backend.perturb_(on.params, on.directions, on.direction_norm, on.grad_norm, RHO, XI)


def restore(backend: Backend, on: Workload) -> None:
    backend.restore_(on.params, on.directions)


def combine(backend: Backend, on: Workload) -> None:
    backend.combine_(on.params, on.directions, on.grads, on.hvps, on.adversarial_norm, RHO, ALPHA, XI)


def sgd_step(
    backend: Backend, on: Workload, rule: SGDRule = SGD, first_step: bool = False, found_inf: Tensor | None = None
) -> None:
    backend.sgd_step_(
        _descent(on, found_inf), on.momentum_buffers if rule.momentum else [], rule, first_step=first_step
    )


def adamw_step(backend: Backend, on: Workload, rule: AdamWRule = ADAMW, found_inf: Tensor | None = None) -> None:
    maxima = on.max_exp_avg_sqs if rule.amsgrad else []
    backend.adamw_step_(_descent(on, found_inf), AdamWState(on.exp_avgs, on.exp_avg_sqs, maxima, on.state_steps), rule)


def _descent(on: Workload, found_inf: Tensor | None) -> Descent:
    lists = on.params, on.directions, on.grads, on.hvps
    return Descent(*lists, on.adversarial_norm, RHO, ALPHA, XI, on.guards, found_inf=found_inf)


def norms(backend: Backend, on: Workload) -> Tensors:
    return [backend.l2_norm(on.params), *backend.l2_norm_pair(on.grads, on.directions)]


# A fused step takes over where a launch reads fewer lists or writes more of them: one of each.
def sgd_first_step(backend: Backend, on: Workload) -> None:
    sgd_step(backend, on, SGDRule(lr=0.1, momentum=0.9, nesterov=True, maximize=True), first_step=True)


def sgd_without_momentum(backend: Backend, on: Workload) -> None:
    sgd_step(backend, on, SGDRule(lr=0.1))


def adam_step(backend: Backend, on: Workload) -> None:
    adamw_step(backend, on, AdamWRule(lr=0.01, weight_decay=0.1, decoupled_weight_decay=False))


ELEMENTWISE: dict[str, Operator] = {
    "perturb_": perturb,
    "restore_": restore,
    "combine_": combine,
    "sgd_step_": sgd_step,
    "sgd_step_ first, nesterov": sgd_first_step,
    "sgd_step_ without momentum": sgd_without_momentum,
    "adamw_step_": adamw_step,
    "adamw_step_ as Adam": adam_step,
}
OPERATORS: dict[str, Operator] = {"norms": norms, **ELEMENTWISE}


def after(operator: Operator, backend: Backend, on: Workload) -> Tensors:
    """What the operator returns and everything it may have written, on the CPU."""
    results = operator(backend, on) or []
    return [tensor.cpu() for tensor in [*results, *on.tensors()]]


def arithmetic_of_a_step(backend: Backend, on: Workload, update: Operator) -> Tensors:
    """The launches of one step, the first norms decided by the data: what a graph has to capture."""
    on.grad_norm, on.direction_norm = backend.l2_norm_pair(on.grads, on.directions)
    perturb(backend, on)
    on.adversarial_norm = backend.l2_norm(on.hvps)
    on.guards = [on.grad_norm, on.direction_norm]
    update(backend, on)
    return [on.grad_norm, on.direction_norm, on.adversarial_norm]


# ---------------------------------------------------------------- comparisons


def assert_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor], what: str = "") -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        width = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
        assert a.dtype == e.dtype
        differ = a.view(width) != e.view(width)
        assert not differ.any(), f"{what} tensor {i}: {a[differ][:4]} is not bitwise {e[differ][:4]}"


def ulps_apart(actual: Tensor, exact: float) -> float:
    """Distance of a 0-d tensor from a number, in units in the last place of the tensor's dtype at that number."""
    _, exponent = math.frexp(exact)
    unit = math.ldexp(torch.finfo(actual.dtype).eps, exponent - 1)
    return abs(actual.item() - exact) / unit


def exact_norm(tensors: Sequence[Tensor]) -> float:
    """Of the numbers as they are, summed without rounding."""
    return math.sqrt(math.fsum(x * x for tensor in tensors for x in tensor.double().cpu().tolist()))


@contextlib.contextmanager
def no_synchronisation(device: torch.device) -> Iterator[None]:
    """An error where the host waits for the device; nothing on the CPU, where it cannot."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
