"""What holds for every operator: what it writes, takes and refuses, and what an interruption leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gam_fused.kernels import Backend, foreach
from gam_fused.kernels.rules import FourGradients
from tests.kernels.operators.common import ALPHA, RHO, XI
from tests.kernels.tensor_lists import Draw, Spec, assert_same_bits, copies, have_same_bits

LISTS = ("params", "directions", "backups", "grads", "hvps", "grads_ahead")


class Operands:
    """Lists for any operator, over three tensors, and the operators that write them."""

    def __init__(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> None:
        draw = Draw(dtype, device or torch.device("cpu"))
        spec = [Spec((5,), "contiguous"), Spec((2, 3), "transposed"), Spec((0,), "contiguous")]
        for name in LISTS:
            setattr(self, name, draw.normal(spec))
        self.norm = draw.norm(1.5)

    params: list[Tensor]
    directions: list[Tensor]
    backups: list[Tensor]
    grads: list[Tensor]
    hvps: list[Tensor]
    grads_ahead: list[Tensor]

    def everything(self) -> list[Tensor]:
        return [tensor for name in LISTS for tensor in getattr(self, name)]

    def gradients(self) -> FourGradients:
        """With lists of other names in the place of those at θ_adv, which are only read."""
        return FourGradients(self.grads, self.grads_ahead, self.backups, self.hvps, (0.5, 0.75, 0.25, -0.5))

    def perturb_(self, backend: Backend) -> list[list[Tensor]]:
        """Run the operator and return the lists it writes."""
        backend.perturb_(self.params, self.directions, self.norm, self.norm, RHO, XI)
        return [self.params, self.directions]

    def restore_(self, backend: Backend) -> list[list[Tensor]]:
        backend.restore_(self.params, self.backups)
        return [self.params]

    def combine_(self, backend: Backend) -> list[list[Tensor]]:
        backend.combine_(self.params, self.backups, self.grads, self.hvps, self.norm, RHO, ALPHA, XI)
        return [self.params, self.grads]

    def shift_(self, backend: Backend) -> list[list[Tensor]]:
        backend.shift_(self.params, self.backups, self.grads, self.hvps, self.norm, RHO, XI)
        return [self.params]

    def decompose_(self, backend: Backend) -> list[list[Tensor]]:
        backend.decompose_(self.gradients(), self.norm, self.norm, XI)
        return [self.grads, self.grads_ahead]

    def l2_norm(self, backend: Backend) -> list[list[Tensor]]:
        backend.l2_norm(self.params)
        return []

    def difference_norm(self, backend: Backend) -> list[list[Tensor]]:
        backend.difference_norm(self.grads, self.backups)
        return []

    def projection(self, backend: Backend) -> list[list[Tensor]]:
        backend.projection(self.gradients())
        return []


Operator = Callable[[Operands, Backend], list[list[Tensor]]]
WRITING = [Operands.perturb_, Operands.shift_, Operands.restore_, Operands.combine_, Operands.decompose_]
writing_operators = pytest.mark.parametrize("operator", WRITING)
all_operators = pytest.mark.parametrize(
    "operator", [Operands.l2_norm, Operands.difference_norm, Operands.projection, *WRITING]
)


@writing_operators
def test_empty_lists_are_fine(backend: Backend, operator: Operator) -> None:
    operands = Operands()
    for name in LISTS:
        setattr(operands, name, [])
    operator(operands, backend)


@all_operators
def test_lists_may_be_any_sequences(backend: Backend, operator: Operator) -> None:
    lists, tuples = Operands(), Operands()
    for name in LISTS:
        setattr(tuples, name, tuple(getattr(tuples, name)))
    operator(lists, backend)
    operator(tuples, backend)
    assert_same_bits(tuples.everything(), lists.everything())


@writing_operators
def test_an_operator_writes_what_it_says_and_nothing_else(
    backend: Backend, dtype: torch.dtype, device: torch.device, operator: Operator
) -> None:
    operands = Operands(dtype, device)
    before = copies(operands.everything())
    written = {id(t) for tensors in operator(operands, backend) for t in tensors}
    for now, then in zip(operands.everything(), before, strict=True):
        assert have_same_bits([now], [then]) == (id(now) not in written or now.numel() == 0)


@writing_operators
def test_a_graph_built_before_the_write_raises_in_backward(backend: Backend, operator: Operator) -> None:
    operands = Operands()
    for tensor in operands.everything():
        tensor.requires_grad_()
    graphs = {id(t): t.square().sum() for t in operands.everything() if t.numel() > 0}
    written = {id(t) for tensors in operator(operands, backend) for t in tensors}
    for key, graph in graphs.items():
        if key in written:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                graph.backward()
        else:
            graph.backward()


@all_operators
def test_leaves_that_require_grad_stay_leaves_without_a_graph(backend: Backend, operator: Operator) -> None:
    operands = Operands()
    for tensor in operands.everything():
        tensor.requires_grad_()
    operator(operands, backend)
    assert all(t.is_leaf and t.requires_grad and t.grad is None for t in operands.everything())


@writing_operators
def test_norms_may_have_another_dtype_than_the_tensors(
    backend: Backend, dtype: torch.dtype, device: torch.device, operator: Operator
) -> None:
    usual, mixed = Operands(dtype, device), Operands(dtype, device)
    mixed.norm = usual.norm.float() if dtype == torch.float64 else usual.norm.double()
    operator(usual, backend)
    operator(mixed, backend)
    assert_same_bits(mixed.everything(), usual.everything())  # 1.5 is exact in both


@writing_operators
def test_parameters_may_be_views_of_one_storage(backend: Backend, dtype: torch.dtype, operator: Operator) -> None:
    apart, together = Operands(dtype), Operands(dtype)
    for name in LISTS:
        tensors = getattr(together, name)
        storage = torch.cat([t.flatten() for t in tensors])
        pieces = storage.split([t.numel() for t in tensors])
        setattr(together, name, [piece.view_as(t) for piece, t in zip(pieces, tensors, strict=True)])
    operator(apart, backend)
    operator(together, backend)
    assert_same_bits(together.everything(), apart.everything())


@pytest.mark.parametrize(
    ("operator", "damaged", "name"),
    [
        (Operands.perturb_, "directions", "directions"),
        (Operands.restore_, "backups", "backups"),
        (Operands.combine_, "backups", "backups"),
        (Operands.combine_, "grads", "grads"),
        (Operands.combine_, "hvps", "hvps"),
        (Operands.shift_, "backups", "origins"),
        (Operands.shift_, "hvps", "starts"),
        (Operands.difference_norm, "backups", "starts"),
        (Operands.decompose_, "grads_ahead", "grads_ahead"),
        (Operands.projection, "grads_ahead", "grads_ahead"),
    ],
)
def test_a_malformed_list_is_refused_by_name_before_anything_is_written(
    backend: Backend, operator: Operator, damaged: str, name: str
) -> None:
    operands = Operands()
    getattr(operands, damaged)[1] = torch.ones(2, 3, dtype=torch.float16)
    before, versions = copies(operands.everything()), [t._version for t in operands.everything()]
    with pytest.raises(
        ValueError, match=rf"^{name}\[1\]: dtype torch.float16, expected torch.float32 as (params|grads|ends)"
    ):
        operator(operands, backend)
    assert_same_bits(operands.everything(), before)
    assert [t._version for t in operands.everything()] == versions


@pytest.mark.parametrize(
    ("operator", "one", "other"),
    [
        (Operands.perturb_, "params", "directions"),
        (Operands.restore_, "params", "backups"),
        (Operands.combine_, "params", "backups"),
        (Operands.combine_, "params", "hvps"),
        (Operands.combine_, "grads", "hvps"),
        (Operands.combine_, "grads", "backups"),
        (Operands.shift_, "params", "backups"),
        (Operands.shift_, "params", "hvps"),
        (Operands.decompose_, "grads", "grads_ahead"),
        (Operands.decompose_, "grads", "backups"),
        (Operands.decompose_, "grads_ahead", "hvps"),
    ],
)
def test_written_memory_that_another_list_holds_is_refused(
    backend: Backend, operator: Operator, one: str, other: str
) -> None:
    operands = Operands()
    getattr(operands, other)[0] = getattr(operands, one)[0]
    with pytest.raises(ValueError, match=r"\[0\]: overlaps \w+\[0\] in memory"):
        operator(operands, backend)


class _Interrupt(Exception):
    """Stands for Ctrl-C."""


class _RaiseAfter(TorchDispatchMode):
    """Lets a number of PyTorch operators through, then raises as Ctrl-C would between any two of them."""

    def __init__(self, operators: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left = operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.left == 0:
            raise _Interrupt
        self.left -= 1
        return func(*args, **(kwargs or {}))


def interrupted_everywhere(operator: Operator, backend: Backend, dtype: torch.dtype) -> Iterator[Operands]:
    """Fresh operands after an interruption before the first operator of PyTorch, before the second, and so on."""
    for operators in range(200):
        operands = Operands(dtype)
        try:
            with _RaiseAfter(operators):
                operator(operands, backend)
        except _Interrupt:
            yield operands
        else:
            assert operators > 0, "nothing was interrupted"
            return
    raise AssertionError("it never ended")


def test_interrupted_anywhere_perturb_leaves_theta_in_the_params_or_all_of_it_in_the_backups(
    backend: Backend, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreach, "_BATCH_BYTES", 1)  # as if the tensors were too large to be processed together
    theta = Operands(dtype).params
    for operands in interrupted_everywhere(Operands.perturb_, backend, dtype):
        assert have_same_bits(operands.params, theta) or have_same_bits(operands.directions, theta)


def test_interrupted_anywhere_combine_leaves_the_backups_to_restore_from(backend: Backend, dtype: torch.dtype) -> None:
    intact = Operands(dtype)
    for operands in interrupted_everywhere(Operands.combine_, backend, dtype):
        assert_same_bits([*operands.backups, *operands.hvps], [*intact.backups, *intact.hvps])
