"""The arithmetic in Triton kernels: one launch per operator, compiled when it first runs, for NVIDIA and AMD GPUs.

Needs no CUDA toolkit; Triton itself needs a C compiler and Python's headers when it first launches. With
``TRITON_INTERPRET=1`` the same kernels run on CPU tensors, slowly: for tests.
"""

from __future__ import annotations

import importlib.util
import math
import re
import struct
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gam_fused.kernels import operators
from gam_fused.kernels.interface import FusingBackend, accumulation_dtype, as_scalar
from gam_fused.kernels.layouts import copy_back, dense_copies
from gam_fused.kernels.pointer_tables import ALIGNMENT, DeviceTables
from gam_fused.kernels.rounding import launch_key
from gam_fused.kernels.rules import AdamWRule, AdamWState, Descent, FourGradients, SGDRule, TensorList

_Lists = Mapping[str, TensorList]

OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = 70

# Launch geometry. A program moves one chunk of every list of its operator in blocks that give each of its threads one
# or two loads of 16 bytes per list: enough of them in flight for the memory, few enough for the registers, of which
# narrow numbers need one each. At 8192 elements a program lives long enough to pay for its start, and ResNet-50 still
# makes several programs for each place on the largest GPUs, so that the last ones do not leave most of them idle.
CHUNK = 8192
THREADS = 256
_FEW_LISTS = 3

_FEW_NUMBERS: dict[str, Any] = {"BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": False}

# The interpreter takes as long for a large block as for a small one.
_INTERPRETED_CHUNK = 32768


class TritonBackend(FusingBackend):
    """Triton kernels over tables of addresses, on CUDA and ROCm devices; never synchronises with the device.

    Tables are found again while no address changes; see :mod:`gam_fused.kernels.pointer_tables`, also for what a CUDA
    graph asks for.
    """

    name = "triton"
    is_for_tests_on_cpu = True

    def __init__(self) -> None:
        self._tables = DeviceTables()

    @staticmethod
    def unavailable_reason(device: torch.device | None = None) -> str | None:
        """``None`` where Triton is installed and can compile for the device; any GPU if none is given."""
        if (reason := _version_reason()) is not None:
            return reason
        if device is not None and device.type not in ("cpu", "cuda"):
            return f"there are no Triton kernels for {device.type} devices."
        if (device is not None and device.type == "cpu") or not torch.cuda.is_available():
            if not is_interpreted():
                return "Triton compiles for GPUs only; on CPU tensors it runs interpreted, with TRITON_INTERPRET=1 set."
        elif device is not None and is_interpreted():
            return "TRITON_INTERPRET=1 is set, and interpreted kernels run on CPU tensors; unset it."
        return None if is_interpreted() else _compiler_reason()

    @torch.no_grad()
    def l2_norm(self, tensors: TensorList) -> Tensor:
        """See :meth:`Backend.l2_norm`. Adds up in float32 (float64 for float64), in a fixed order, without atomics."""
        if not tensors:
            return torch.zeros((), dtype=torch.float32, device="cpu")
        return self._norms({"tensors": tensors})[0]

    @torch.no_grad()
    def l2_norm_pair(self, first: TensorList, second: TensorList) -> tuple[Tensor, Tensor]:
        """See :meth:`Backend.l2_norm_pair`; in one launch."""
        if not first or not second:
            return self.l2_norm(first), self.l2_norm(second)
        norms = self._norms({"first": first, "second": second})
        return norms[0], norms[1]

    @torch.no_grad()
    def difference_norm(self, ends: TensorList, starts: TensorList) -> Tensor:
        """See :meth:`Backend.difference_norm`. Adds up as :meth:`l2_norm` does."""
        lists = {"ends": ends, "starts": starts}
        if not any(lists.values()):
            return self.l2_norm([])
        operators.validate("difference_norm", lists)
        return self._reduced("sum_differences_kernel", "finish_norms_kernel", lists, (), 1)[0]

    @torch.no_grad()
    def perturb_(
        self,
        params: TensorList,
        directions: TensorList,
        direction_norm: Tensor,
        grad_norm: Tensor,
        rho: float,
        xi: float,
        *,
        rounding_seed: int | None = None,
    ) -> None:
        """See :meth:`Backend.perturb_`."""
        if not params and not directions:
            return
        operands = _Operands("perturb_", {"params": params, "directions": directions})
        norms = [_scalar("direction_norm", direction_norm, params), _scalar("grad_norm", grad_norm, params)]
        self._launch(
            "perturb_kernel",
            operands,
            (*norms, _bits(rho, params), _bits(xi, params), _key(rounding_seed)),
            {"A": _accumulation(params), "STOCHASTIC": _is_stochastic(rounding_seed, params)},
        )

    @torch.no_grad()
    def shift_(
        self,
        params: TensorList,
        origins: TensorList,
        ends: TensorList,
        starts: TensorList,
        norm: Tensor,
        rho: float,
        xi: float,
        *,
        rounding_seed: int | None = None,
    ) -> None:
        """See :meth:`Backend.shift_`."""
        optional = {"origins": origins, "starts": starts}
        given = {"params": params, "origins": origins, "ends": ends, "starts": starts}
        lists = {key: tensors for key, tensors in given.items() if tensors or key not in optional}
        if not any(lists.values()):
            return
        operands = _Operands("shift_", lists)
        numbers = _scalar("norm", norm, params), _bits(rho, params), _bits(xi, params), _key(rounding_seed)
        flags = {"ORIGINS": int(bool(origins)), "STARTS": int(bool(starts))}
        rounding = {"A": _accumulation(params), "STOCHASTIC": _is_stochastic(rounding_seed, params)}
        self._launch("shift_kernel", operands, numbers, {**rounding, **flags})

    @torch.no_grad()
    def restore_(self, params: TensorList, backups: TensorList) -> None:
        """See :meth:`Backend.restore_`."""
        if params or backups:
            self._launch("restore_kernel", _Operands("restore_", {"params": params, "backups": backups}), (), {})

    @torch.no_grad()
    def combine_(
        self,
        params: TensorList,
        backups: TensorList,
        grads: TensorList,
        hvps: TensorList,
        adversarial_norm: Tensor,
        rho: float,
        alpha: float,
        xi: float,
    ) -> None:
        """See :meth:`Backend.combine_`."""
        lists = {"params": params, "backups": backups, "grads": grads, "hvps": hvps}
        if not any(lists.values()):
            return
        operands = _Operands("combine_", lists)
        norm = _scalar("adversarial_norm", adversarial_norm, params)
        numbers = [_bits(number, params) for number in (rho, alpha, xi)]
        self._launch("combine_kernel", operands, (norm, *numbers), {"A": _accumulation(params)})

    @torch.no_grad()
    def projection(self, gradients: FourGradients) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`Backend.projection`. Adds up as :meth:`l2_norm` does."""
        lists = gradients.lists
        if not any(lists.values()):
            return (self.l2_norm([]),) * 3
        operators.validate("projection", lists)
        weights = tuple(_bits(weight, gradients.grads) for weight in gradients.weights)
        results = self._reduced("sum_mixed_kernel", "finish_projection_kernel", lists, weights, 3)
        return results[0], results[1], results[2]

    @torch.no_grad()
    def decompose_(self, gradients: FourGradients, projection: Tensor, plus_norm: Tensor, xi: float) -> None:
        """See :meth:`Backend.decompose_`."""
        lists, grads = gradients.lists, gradients.grads
        if not any(lists.values()):
            return
        operands = _Operands("decompose_", lists)
        norms = _scalar("projection", projection, grads), _scalar("plus_norm", plus_norm, grads)
        numbers = [_bits(number, grads) for number in (*gradients.weights, xi)]
        self._launch("decompose_kernel", operands, (*norms, *numbers), {"A": _accumulation(grads)})

    @torch.no_grad()
    def sgd_step_(
        self, descent: Descent, momentum_buffers: TensorList, rule: SGDRule, *, first_step: bool = False
    ) -> None:
        """See :meth:`FusingBackend.sgd_step_`."""
        params = descent.params
        lists = descent.lists
        if rule.momentum or momentum_buffers:
            lists["momentum_buffers"] = momentum_buffers
        if not any(lists.values()):
            return
        operands = _Operands("sgd_step_", lists)
        common = _Common(descent, rule.lr)
        numbers = (rule.weight_decay, rule.momentum, 1 - rule.dampening)
        constants = {
            "WEIGHT_DECAY": rule.weight_decay != 0,
            "MOMENTUM": rule.momentum != 0,
            "NESTEROV": rule.nesterov,
            "FIRST_STEP": first_step,
            "MAXIMIZE": rule.maximize,
        }
        self._launch(
            "sgd_kernel",
            operands,
            (*common.arguments, *(_bits(number, params) for number in numbers)),
            {**common.constants, **constants},
            rows=5 if rule.momentum else 4,
        )

    @torch.no_grad()
    def adamw_step_(self, descent: Descent, state: AdamWState, rule: AdamWRule) -> None:
        """See :meth:`FusingBackend.adamw_step_`. A second, small launch counts the steps."""
        params = descent.params
        lists = {**descent.lists, "exp_avgs": state.exp_avgs, "exp_avg_sqs": state.exp_avg_sqs}
        if rule.amsgrad or state.max_exp_avg_sqs:
            lists["max_exp_avg_sqs"] = state.max_exp_avg_sqs
        if not any(lists.values()) and not state.state_steps:
            return
        operands = _Operands("adamw_step_", lists, state.state_steps)
        common = _Common(descent, rule.lr)
        beta1, beta2 = rule.betas
        numbers = (rule.weight_decay, beta2, 1 - beta1, 1 - beta2, _log(beta1), _log(beta2), rule.eps)
        constants = {
            "WEIGHT_DECAY": rule.weight_decay != 0,
            "DECOUPLED": rule.decoupled_weight_decay,
            "AMSGRAD": rule.amsgrad,
            "MAXIMIZE": rule.maximize,
        }
        self._launch(
            "adamw_kernel",
            operands,
            (*common.arguments, *(_bits(number, params) for number in numbers)),
            {**common.constants, **constants},
            rows=7 if rule.amsgrad else 6,
            decision=common.decision,
        )

    def _norms(self, lists: _Lists) -> Tensor:
        first = next(iter(lists.values()))
        operators.validate("l2_norm_pair", lists)
        for key, tensors in lists.items():
            if (tensors[0].dtype, tensors[0].device) != (first[0].dtype, first[0].device):
                found, expected = (f"{tensor.dtype} on {tensor.device}" for tensor in (tensors[0], first[0]))
                raise ValueError(f"{key}[0]: {found}, expected {expected} as {next(iter(lists))}[0]")
        dense = {**lists, **dense_copies(lists, element_by_element=False)}
        tensors = [tensor for tensors in dense.values() for tensor in tensors]
        device, wide = first[0].device, accumulation_dtype(first[0].dtype)
        numels, chunk = [tensor.numel() for tensor in tensors], _chunk(device)
        middle = sum(-(-numel // chunk) for numel in numels[: len(first)])
        kernels, A = _kernels(), language_dtype(wide)
        with on_device(device):
            plan = self._tables.plan(numels, chunk, device)
            addresses = self._tables.addresses([tensors], device)
            partials = torch.empty(max(plan.chunks, 1), dtype=wide, device=device)
            results = torch.empty(len(lists), dtype=wide, device=device)
            if plan.chunks:
                geometry = _geometry(first[0], 1)
                kernels.sum_chunks_kernel[(plan.chunks,)](
                    addresses, *plan, partials, T=language_dtype(first[0].dtype), A=A, **geometry
                )
            kernels.finish_norms_kernel[(len(lists),)](partials, results, middle, plan.chunks, A=A, **_FEW_NUMBERS)
        return results

    def _reduced(self, first: str, last: str, lists: _Lists, arguments: tuple[int, ...], count: int) -> Tensor:
        """``count`` numbers out of lists that belong together: kernel ``first`` over chunks, ``last`` over its sums."""
        dense = list({**lists, **dense_copies(lists)}.values())
        tensors = dense[0]
        device, wide = tensors[0].device, accumulation_dtype(tensors[0].dtype)
        kernels, A = _kernels(), language_dtype(wide)
        with on_device(device):
            plan = self._tables.plan([tensor.numel() for tensor in tensors], _chunk(device), device)
            addresses = self._tables.addresses(dense, device)
            partials = torch.empty((count, max(plan.chunks, 1)), dtype=wide, device=device)
            results = torch.empty(count, dtype=wide, device=device)
            if plan.chunks:
                launch = getattr(kernels, first)[(plan.chunks,)]
                T, geometry = language_dtype(tensors[0].dtype), _geometry(tensors[0], len(dense))
                launch(addresses, *plan, partials, *arguments, T=T, A=A, **geometry)
            getattr(kernels, last)[(1,)](partials, results, plan.chunks, plan.chunks, A=A, **_FEW_NUMBERS)
        return results

    def _launch(
        self,
        kernel: str,
        operands: _Operands,
        arguments: tuple[Any, ...],
        constants: Mapping[str, Any],
        *,
        rows: int | None = None,
        decision: tuple[Any, ...] = (),
    ) -> None:
        """Over the first ``rows`` lists; with step counts, a second launch counts. Then autograd is told."""
        lists = operands.dense[:rows]
        params, steps = lists[0], operands.steps
        device = params[0].device
        kernels = _kernels()
        with on_device(device):
            plan = self._tables.plan([param.numel() for param in params], _chunk(device), device)
            addresses = self._tables.addresses(lists, device, steps)
            count: tuple[Any, ...] = ()
            if steps:
                # The last row of the table. Compiled first: nothing may fail once parameters are written.
                count = addresses[-len(steps) :], len(steps), *decision
                kernels.count_steps_kernel.run(*count, grid=(1,), warmup=True, **_FEW_NUMBERS)
            if plan.chunks:
                launch = getattr(kernels, kernel)[(plan.chunks,)]
                geometry = _geometry(params[0], len(lists))
                launch(addresses, *plan, *arguments, T=language_dtype(params[0].dtype), **constants, **geometry)
            if steps:
                kernels.count_steps_kernel[(-(-len(steps) // _FEW_NUMBERS["BLOCK"]),)](*count, **_FEW_NUMBERS)
        operands.finish()


class _Operands:
    """The lists of an operator, checked, and as a kernel can take them."""

    def __init__(self, name: str, lists: _Lists, steps: TensorList = ()) -> None:
        self._name, self._lists = name, lists
        operators.validate(name, lists, steps)
        self._copies = dense_copies(lists)
        self.dense = list({**lists, **self._copies}.values())
        self.steps = steps

    def finish(self) -> None:
        copy_back(self._lists, self._copies, [key for key in operators.WRITTEN[self._name] if key in self._lists])
        # Last: until every byte is written, versions say that none is.
        nothing: dict[str, TensorList] = dict.fromkeys(operators.WRITTEN[self._name], ())
        operators.count_mutations(self._name, {**nothing, **self._lists, "state_steps": self.steps})


class _Common:
    """What both fused rules take: whether to step at all, the penalty, rounding and the learning rate."""

    def __init__(self, descent: Descent, lr: float | Tensor) -> None:
        params = descent.params
        norm = _scalar("adversarial_norm", descent.adversarial_norm, params)
        guards = [_scalar(f"guards[{i}]", guard, params) for i, guard in enumerate(descent.guards)]
        # The kernels read them one after another. One, as GAM hands over, is read where it is.
        in_a_row = guards[0] if len(guards) == 1 else torch.stack(guards) if guards else norm
        found_inf = _float32("found_inf", descent.found_inf, params)
        grad_scale = _float32("grad_scale", descent.grad_scale, params)
        on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"
        rate = _scalar("lr", lr, params) if isinstance(lr, Tensor) and on_device else None
        penalty = [_bits(number, params) for number in (descent.rho, descent.alpha, descent.xi)]
        self.decision = (norm, in_a_row, len(guards), found_inf)
        key = _key(descent.rounding_seed)
        self.arguments = (
            *self.decision, grad_scale, *penalty, key, _bits(0.0 if on_device else float(lr), params), rate,
        )  # fmt: skip
        self.constants = {
            "A": _accumulation(params),
            "WRITE_GRADS": descent.write_grads,
            "STOCHASTIC": _is_stochastic(descent.rounding_seed, params),
        }


def is_interpreted() -> bool:
    """Whether kernels are interpreted: as they were defined, or will be by what ``TRITON_INTERPRET`` says now."""
    rules = sys.modules.get("gam_fused.kernels.triton_rules")
    if rules is not None:
        return bool(rules.IS_INTERPRETED)
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _version_reason() -> str | None:
    oldest = ".".join(map(str, OLDEST_TRITON))
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed; pip install 'triton>={oldest}'."
    try:
        import triton
    except Exception as error:  # a broken installation
        return f"Triton cannot be imported: {error}; pip install 'triton>={oldest}'."
    found = re.match(r"(\d+)\.(\d+)", triton.__version__)
    if found is None or tuple(map(int, found.groups())) < OLDEST_TRITON:
        return f"Triton {triton.__version__} is too old; pip install 'triton>={oldest}'."
    return None


@cache
def _compiler_reason() -> str | None:
    """Tried once: Triton builds a small library with a C compiler to talk to the device's driver."""
    from triton.runtime import driver

    try:
        target = driver.active.get_current_target()
        _ = driver.active.utils
    except Exception as error:  # no compiler, no headers, a folder that cannot be written, no driver, ...
        said = str(error).strip().partition("\n")[0]
        return f"Triton cannot compile here ({said}); it needs a C compiler, Python's headers and the device's driver."
    if target.backend == "cuda" and target.arch < OLDEST_CAPABILITY:
        return f"Triton does not compile for GPUs of compute capability {target.arch / 10}; 7.0 is the oldest."
    return None


def _kernels() -> Any:
    from gam_fused.kernels import triton_kernels

    return triton_kernels


def language_dtype(dtype: torch.dtype) -> Any:
    """Triton's name for it."""
    import triton.language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))


def _chunk(device: torch.device) -> int:
    return CHUNK if device.type == "cuda" else _INTERPRETED_CHUNK


def block_size(itemsize: int, lists: int) -> int:
    """Elements of each list that a program moves at one go, by their size in bytes and how many lists there are."""
    loads = 2 if lists <= _FEW_LISTS and itemsize >= 4 else 1
    return THREADS * (ALIGNMENT // itemsize) * loads


def _geometry(tensor: Tensor, lists: int) -> dict[str, Any]:
    chunk = _chunk(tensor.device)
    return {
        "CHUNK": chunk,
        "BLOCK": block_size(tensor.element_size(), lists) if tensor.device.type == "cuda" else chunk // 2,
        "num_warps": warps_of(THREADS, tensor.device),
        "enable_fp_fusion": False,  # so that results are those of the other back ends
    }


def warps_of(threads: int, device: torch.device) -> int:
    """In how many warps the device runs them."""
    return threads // (torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Where launches go to it."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    import numpy  # the interpreter computes with it

    return numpy.errstate(all="ignore")  # as devices do: infinities and NaN are values like others


def _accumulation(params: TensorList) -> Any:
    return language_dtype(accumulation_dtype(params[0].dtype)) if params else None


def _bits(number: float, params: TensorList) -> int:
    """The number in the accumulation dtype, as the integer of the same bits."""
    if params and params[0].dtype == torch.float64:
        return int(struct.unpack("<q", struct.pack("<d", number))[0])
    try:
        return int(struct.unpack("<i", struct.pack("<f", number))[0])
    except OverflowError:
        return _bits(math.copysign(math.inf, number), params)


def _key(rounding_seed: int | None) -> int:
    key = 0 if rounding_seed is None else launch_key(rounding_seed)
    return key - ((key >> 63) << 64)  # as a signed integer


def _is_stochastic(rounding_seed: int | None, params: TensorList) -> bool:
    return rounding_seed is not None and bool(params) and params[0].element_size() == 2


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf


def _scalar(name: str, scalar: Tensor, tensors: TensorList) -> Tensor:
    """:func:`as_scalar`, or an error that names the argument."""
    if not isinstance(scalar, Tensor) or scalar.numel() != 1:
        found = tuple(scalar.shape) if isinstance(scalar, Tensor) else type(scalar).__name__
        raise ValueError(f"{name}: {found}, expected a tensor of one element")
    return as_scalar(scalar, tensors)


def _float32(name: str, scalar: Tensor | None, params: TensorList) -> Tensor | None:
    if scalar is None:
        return None
    if (
        not isinstance(scalar, Tensor)
        or scalar.dtype != torch.float32
        or scalar.numel() != 1
        or (params and scalar.device != params[0].device)
    ):
        raise ValueError(f"{name}: {scalar!r}, expected a float32 tensor of one element on the parameters' device")
    return scalar
