"""``torch.ops.gam_fused``: what the extension cannot say of its operators itself.

* Fake implementations, for meta and fake tensors: the checks that need no memory, and the shape of the result.
* Version counters. A C++ operator of the stable ABI does not count its mutations, and a backward pass through a graph
  that has saved an older value would go unnoticed. Callers below ``ADInplaceOrView`` count for themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gam_fused.kernels import extension
from gam_fused.kernels.validation import check_alike, check_lengths, validate_lists, validate_steps

_FOUR_GRADIENTS = ("grads", "grads_ahead", "adversarial_grads", "adversarial_grads_ahead")

LISTS: dict[str, tuple[str, ...]] = {
    "l2_norm": ("tensors",),
    "l2_norm_pair": ("first", "second"),
    "difference_norm": ("ends", "starts"),
    "perturb_": ("params", "directions"),
    "shift_": ("params", "origins", "ends", "starts"),
    "restore_": ("params", "backups"),
    "combine_": ("params", "backups", "grads", "hvps"),
    "projection": _FOUR_GRADIENTS,
    "decompose_": _FOUR_GRADIENTS,
    "sgd_step_": ("params", "backups", "grads", "hvps", "momentum_buffers"),
    "adamw_step_": ("params", "backups", "grads", "hvps", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps"),
}
"""The lists that an operator takes, in order."""

WRITTEN: dict[str, tuple[str, ...]] = {
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
"""Those that it writes."""

UNRELATED = ("l2_norm", "l2_norm_pair")
"""Operators whose lists have nothing to do with each other; those of all others belong together, index by index."""


def validate(name: str, lists: Mapping[str, Sequence[Tensor]], steps: Sequence[Tensor] = ()) -> None:
    """Check the lists of an operator, and Adam's step counts, as its interface says.

    Raises:
        ValueError: names the list and the index, what was found and what was expected.
    """
    if name in UNRELATED:
        for key, tensors in lists.items():
            validate_lists(reads={key: tensors}, same_shape=False)
        return
    validate_lists(
        writes={key: tensors for key, tensors in lists.items() if key in WRITTEN[name]},
        reads={key: tensors for key, tensors in lists.items() if key not in WRITTEN[name]},
    )
    if "state_steps" in WRITTEN[name]:
        validate_steps(steps, lists["params"])


# Lists that an operator may do without.
_MAY_BE_EMPTY = ("origins", "starts", "momentum_buffers", "max_exp_avg_sqs")


def count_mutations(name: str, lists: Mapping[str, Sequence[Tensor]]) -> None:
    """Let autograd know that an operator has written its lists."""
    for key in WRITTEN[name]:
        torch.autograd.graph.increment_version(lists[key])


def _norm_like(tensors: Sequence[Tensor]) -> Tensor:
    if not tensors:
        return torch.empty((), dtype=torch.float32, device="cpu")
    wide = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return torch.empty((), dtype=wide, device=tensors[0].device)


def _fake_l2_norm(tensors: Sequence[Tensor]) -> Tensor:
    check_alike({"tensors": tensors}, same_shape=False)
    return _norm_like(tensors)


def _fake_l2_norm_pair(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    check_alike({"first": first}, same_shape=False)
    check_alike({"second": second}, same_shape=False)
    if first and second and (first[0].dtype, first[0].device) != (second[0].dtype, second[0].device):
        found, expected = (f"{tensor.dtype} on {tensor.device}" for tensor in (second[0], first[0]))
        raise ValueError(f"second[0]: {found}, expected {expected} as first[0]")
    return _norm_like(first or second), _norm_like(first or second)


def _fake_difference_norm(ends: Sequence[Tensor], starts: Sequence[Tensor]) -> Tensor:
    check_lengths({"ends": ends, "starts": starts})
    check_alike({"ends": ends, "starts": starts}, same_shape=True)
    return _norm_like(ends)


def _fake_projection(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    lists = dict(zip(_FOUR_GRADIENTS, args, strict=False))
    check_lengths(lists)
    check_alike(lists, same_shape=True)
    return _norm_like(args[0]), _norm_like(args[0]), _norm_like(args[0])


def _register() -> None:
    library = torch.library.Library("gam_fused", "FRAGMENT")
    _KEPT.append(library)
    torch.library.register_fake("gam_fused::l2_norm", _fake_l2_norm, lib=library)
    torch.library.register_fake("gam_fused::l2_norm_pair", _fake_l2_norm_pair, lib=library)
    torch.library.register_fake("gam_fused::difference_norm", _fake_difference_norm, lib=library)
    torch.library.register_fake("gam_fused::projection", _fake_projection, lib=library)
    for name in filter(WRITTEN.get, LISTS):
        torch.library.register_fake(f"gam_fused::{name}", _fake_mutation(name), lib=library)
        library.impl(name, _counting(name), "ADInplaceOrView", with_keyset=True)


def _fake_mutation(name: str) -> Any:
    names = LISTS[name]

    def fake(*args: Any, **options: Any) -> None:
        lists = {key: value for key, value in zip(names, args, strict=False) if value or key not in _MAY_BE_EMPTY}
        check_lengths(lists)
        steps = lists.pop("state_steps", [])
        check_alike(lists, same_shape=True)
        for i, step in enumerate(steps):
            if step.dtype != torch.float32 or step.numel() != 1:
                raise ValueError(f"state_steps[{i}]: expected a float32 tensor of one element")
        first = lists[names[0]]
        if not first:
            return
        # A meta tensor among others brings a call here too, which must not pass for one that has run.
        device = first[0].device
        for value in (steps, *args[len(names) :], *options.values()):
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(tensor, Tensor) and tensor.device != device:
                    raise ValueError(f"{name}: a tensor on {tensor.device}, expected {device} as the lists")

    return fake


def _counting(name: str) -> Any:
    operator = getattr(torch.ops.gam_fused, name).default

    def count_and_go_on(keyset: Any, *args: Any, **kwargs: Any) -> None:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            operator.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args, **kwargs)
        count_mutations(name, dict(zip(LISTS[name], args, strict=False)))

    return count_and_go_on


_KEPT: list[torch.library.Library] = []  # a library's registrations end with it
if extension.unavailable_reason() is None:
    _register()
