"""What only the foreach back end has: batches and chunks. The operators themselves are in operators/."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gam_fused.kernels import foreach
from gam_fused.kernels.foreach import ForeachBackend
from gam_fused.kernels.interface import accumulation_dtype
from tests.kernels.tensor_lists import Draw, Spec, assert_same_bits, copies

CPU = torch.device("cpu")


class Reductions(TorchDispatchMode):
    """Records how many elements are added up at one go."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lengths: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.linalg_vector_norm.default:
            self.lengths.append(args[0].shape[-1])
        if func is torch.ops.aten._foreach_norm.Scalar:
            self.lengths += [tensor.numel() for tensor in args[0]]
        return func(*args, **(kwargs or {}))


def vectors(*lengths: int) -> list[Spec]:
    return [Spec((n,), "contiguous") for n in lengths]


def test_results_do_not_depend_on_the_batches(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = ForeachBackend()
    draw = Draw(dtype, CPU)
    together = [draw.normal(vectors(5, 0, 9, 2)) for _ in range(5)]
    apart = [copies(tensors) for tensors in together]
    for lists, batch_bytes in ((together, foreach._BATCH_BYTES), (apart, 1)):
        monkeypatch.setattr(foreach, "_BATCH_BYTES", batch_bytes)
        params, directions, backups, grads, hvps = lists
        backend.perturb_(params, directions, draw.norm(1.5), draw.norm(2.5), 0.1, 0.01)
        backend.combine_(params, backups, grads, hvps, draw.norm(1.5), 0.1, 0.3, 0.01)
    for tensors, expected in zip(apart, together, strict=True):
        assert_same_bits(tensors, expected)


def test_a_batch_is_bounded_in_bytes_of_the_accumulation_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [1, 2, 3, 10, 1, 1, 1, 1]
    monkeypatch.setattr(foreach, "_BATCH_BYTES", 16)
    batches = [sizes[batch] for batch in foreach._batches([torch.empty(n, dtype=torch.bfloat16) for n in sizes])]
    assert batches == [[1, 2], [3], [10], [1, 1, 1, 1]]


def test_norm_of_more_partial_norms_than_one_chunk_holds(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreach, "_CHUNK", 4)
    monkeypatch.setattr(foreach, "_BLOCK", 8)
    tensors = Draw(dtype, CPU).normal(vectors(0, 3, 4, 5, 8, 9, 1001))
    expected = torch.cat([tensor.double() for tensor in tensors]).norm().item()
    # Five levels of chunks of 4, each of one square, three sums and one root: 25 roundings at most.
    roundoff = torch.finfo(accumulation_dtype(dtype)).eps / 2
    with Reductions() as reductions:
        norm = ForeachBackend().l2_norm(tensors)
    assert norm.item() == pytest.approx(expected, rel=25 * roundoff)
    assert max(reductions.lengths) == 4


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels_last", "misaligned"])
def test_dense_tensors_are_not_copied_for_the_norm(layout: str) -> None:
    (tensor,) = Draw(torch.float32, CPU).normal([Spec((2, 3, 4, 5), layout)])
    flat = foreach._flat(tensor)
    assert (flat.shape, flat.data_ptr()) == ((120,), tensor.data_ptr())
