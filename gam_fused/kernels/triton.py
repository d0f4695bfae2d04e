"""The arithmetic in Triton kernels: one launch per operator, compiled when it first runs, for NVIDIA and AMD GPUs.

Needs no CUDA toolkit; Triton itself needs a C compiler and Python's headers when it first launches.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gam_fused.kernels import operators
from gam_fused.kernels.interface import FusingBackend, accumulation_dtype, as_scalar
from gam_fused.kernels.layouts import copy_back, dense_copies
from gam_fused.kernels.pointer_tables import DeviceTables
from gam_fused.kernels.rounding import launch_key
from gam_fused.kernels.rules import AdamWRule, AdamWState, Descent, FourGradients, SGDRule, TensorList
from gam_fused.kernels.triton_launches import chunk_of, geometry, language_dtype, on_device, unavailable_reason

_Lists = Mapping[str, TensorList]

_FEW_NUMBERS: dict[str, Any] = {"BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": False}


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
        return unavailable_reason(device)

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
        partials, chunks = self._sums("sum_chunks_kernel", _dense(lists), DIFFERENCES=True)
        return _results("finish_norms_kernel", partials, (chunks, chunks), 1)[0]

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
        partials, chunks = self._sums("sum_mixed_kernel", _dense(lists), weights, count=3)
        results = _results("finish_projection_kernel", partials, (chunks, partials.shape[1]), 3)
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
        middle = sum(-(-tensor.numel() // chunk_of(tensor.device)) for tensor in tensors[: len(first)])
        partials, chunks = self._sums("sum_chunks_kernel", [tensors], DIFFERENCES=False)
        return _results("finish_norms_kernel", partials, (middle, chunks), len(lists), programs=len(lists))

    def _sums(
        self, kernel: str, rows: list[TensorList], arguments: tuple[int, ...] = (), *, count: int = 1, **flags: bool
    ) -> tuple[Tensor, int]:
        """``count`` rows of sums over chunks, one sum of each chunk in a row, and how many chunks there are."""
        tensors = rows[0]
        device, wide = tensors[0].device, accumulation_dtype(tensors[0].dtype)
        with on_device(device):
            plan = self._tables.plan([tensor.numel() for tensor in tensors], chunk_of(device), device)
            addresses = self._tables.addresses(rows, device)
            partials = torch.empty((count, max(plan.chunks, 1)), dtype=wide, device=device)
            if plan.chunks:
                launch = getattr(_kernels(), kernel)[(plan.chunks,)]
                T, A = language_dtype(tensors[0].dtype), language_dtype(wide)
                launch(addresses, *plan, partials, *arguments, T=T, A=A, **flags, **geometry(tensors[0], len(rows)))
        return partials, plan.chunks

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
            plan = self._tables.plan([param.numel() for param in params], chunk_of(device), device)
            addresses = self._tables.addresses(lists, device, steps)
            count: tuple[Any, ...] = ()
            if steps:
                # The last row of the table. Compiled first: nothing may fail once parameters are written.
                count = addresses[-len(steps) :], len(steps), *decision
                kernels.count_steps_kernel.run(*count, grid=(1,), warmup=True, **_FEW_NUMBERS)
            if plan.chunks:
                launch = getattr(kernels, kernel)[(plan.chunks,)]
                shape = geometry(params[0], len(lists))
                launch(addresses, *plan, *arguments, T=language_dtype(params[0].dtype), **constants, **shape)
            if steps:
                kernels.count_steps_kernel[(-(-len(steps) // _FEW_NUMBERS["BLOCK"]),)](*count, **_FEW_NUMBERS)
        operands.finish()


def _results(kernel: str, partials: Tensor, arguments: tuple[int, ...], count: int, *, programs: int = 1) -> Tensor:
    """``count`` numbers that the programs of a second launch make of all sums over chunks."""
    results = partials.new_empty(count)
    with on_device(partials.device):
        launch = getattr(_kernels(), kernel)[(programs,)]
        launch(partials, results, *arguments, A=language_dtype(partials.dtype), **_FEW_NUMBERS)
    return results


def _dense(lists: _Lists) -> list[TensorList]:
    """Lists that belong together, as a kernel that only reads can take them."""
    return list({**lists, **dense_copies(lists)}.values())


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


def _kernels() -> Any:
    from gam_fused.kernels import triton_kernels

    return triton_kernels


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
