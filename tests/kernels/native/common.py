"""``torch.ops.gam_fused`` by itself: its operators, their lists, and a call of each that works."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from gam_fused import kernels
from gam_fused.kernels import extension
from gam_fused.kernels.rules import AdamWRule, AdamWState, Descent, FourGradients, SGDRule

needs_native = pytest.mark.skipif(
    extension.unavailable_reason() is not None, reason=str(extension.unavailable_reason())
)
needs_direct = pytest.mark.skipif(
    extension.direct_unavailable_reason() is not None, reason=str(extension.direct_unavailable_reason())
)
ops = torch.ops.gam_fused

FOUR_GRADIENTS = ("grads", "grads_ahead", "adversarial_grads", "adversarial_grads_ahead")

# Written down once more: gam_fused.kernels.operators is held to this.
LISTS = {
    "l2_norm": ("tensors",),
    "l2_norm_pair": ("first", "second"),
    "difference_norm": ("ends", "starts"),
    "perturb_": ("params", "directions"),
    "shift_": ("params", "origins", "ends", "starts"),
    "restore_": ("params", "backups"),
    "combine_": ("params", "backups", "grads", "hvps"),
    "projection": FOUR_GRADIENTS,
    "decompose_": FOUR_GRADIENTS,
    "sgd_step_": ("params", "backups", "grads", "hvps", "momentum_buffers"),
    "adamw_step_": ("params", "backups", "grads", "hvps", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps"),
}
WRITTEN = {
    "l2_norm": (),
    "l2_norm_pair": (),
    "difference_norm": (),
    "perturb_": ("params", "directions"),
    "shift_": ("params",),
    "restore_": ("params",),
    "combine_": ("params", "grads"),
    "projection": (),
    "decompose_": ("grads", "grads_ahead"),
    "sgd_step_": ("params", "grads", "momentum_buffers"),
    "adamw_step_": ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps"),
}
over_operators = pytest.mark.parametrize("name", list(LISTS))
over_mutations = pytest.mark.parametrize("name", [name for name, written in WRITTEN.items() if written])

WEIGHTS = (0.25, 0.75, -0.5, 0.3)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
narrow = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


class NeedsDispatcher(Exception):
    """A direct call has returned ``NotImplemented``."""


def call_directly(name: str, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """A call past PyTorch's dispatcher, with the schema's defaults for what is left out; as the backend makes them."""
    defaults = {
        argument.name: argument.default_value
        for argument in getattr(ops, name).default._schema.arguments[len(args) :]
        if argument.has_default_value()
    }
    result = extension.direct_calls()[name](*args, **{**defaults, **options})
    if result is NotImplemented:
        raise NeedsDispatcher(name)
    return result


class Call:
    """A call that works, to be broken in one place."""

    def __init__(self, name: str, shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> None:
        self.name = name
        self.dtype = dtype
        self.lists = {key: [torch.rand(shape).to(dtype) for shape in shapes] for key in LISTS[name]}
        if name == "adamw_step_":
            self.lists["state_steps"] = [torch.zeros(()) for _ in shapes]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.norms = [torch.tensor(1.5, dtype=wide), torch.tensor(2.5, dtype=wide)]

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        lists = list(self.lists.values())
        if self.name in ("l2_norm", "l2_norm_pair", "difference_norm", "restore_"):
            return lists, {}
        if self.name == "perturb_":
            return [*lists, *self.norms, 0.1, 1e-12], {}
        if self.name == "shift_":
            return [*lists, self.norms[0], 0.1, 1e-12], {}
        if self.name == "combine_":
            return [*lists, self.norms[0], 0.1, 0.3, 1e-12], {}
        if self.name == "projection":
            return [*lists, *WEIGHTS], {}
        if self.name == "decompose_":
            return [*lists, *self.norms, *WEIGHTS, 1e-12], {}
        if self.name == "sgd_step_":
            options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}
        else:
            options = {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True}
        return [*lists, self.norms[0], [self.norms[1]], 0.1, 0.3, 1e-12], options

    def __call__(self) -> Any:
        args, options = self.arguments()
        with torch.no_grad():
            return getattr(ops, self.name)(*args, **options)

    def directly(self) -> Any:
        """The same past PyTorch's dispatcher, with ``NotImplemented`` as an error."""
        args, options = self.arguments()
        return call_directly(self.name, args, options)

    def tensors(self) -> list[Tensor]:
        return [tensor for tensors in self.lists.values() for tensor in tensors]


class FullCall(Call):
    """A call in which every argument is given."""

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        args, options = super().arguments()
        if self.name in ("sgd_step_", "adamw_step_"):
            args[-4] = [torch.ones_like(self.norms[1]) for _ in range(2)]
            options["lr_tensor"] = torch.full_like(self.norms[0], 0.1)
            options["grad_scale"], options["found_inf"] = torch.tensor(2.0), torch.tensor(0.0)
        return args, options


def run_through_backend(call: Call) -> None:
    native = kernels.resolve("native")
    args, _ = call.arguments()
    if call.name in ("projection", "decompose_"):
        gradients = FourGradients(*call.lists.values(), weights=WEIGHTS)  # type: ignore[misc]
        numbers = () if call.name == "projection" else (*call.norms, 1e-12)
        getattr(native, call.name)(gradients, *numbers)
        return
    if call.name not in ("sgd_step_", "adamw_step_"):
        getattr(native, call.name)(*args)
        return
    lists = dict(call.lists)
    from_theta = [lists.pop(key) for key in ("params", "backups", "grads", "hvps")]
    descent = Descent(*from_theta, call.norms[0], 0.1, 0.3, 1e-12)
    if call.name == "sgd_step_":
        native.sgd_step_(descent, lists["momentum_buffers"], SGDRule(lr=0.1, momentum=0.9))
    else:
        native.adamw_step_(descent, AdamWState(**lists), AdamWRule(lr=0.1, amsgrad=True))
