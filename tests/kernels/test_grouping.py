"""Lists of one device and dtype, and the norm over all of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gam_fused.kernels import Backend
from gam_fused.kernels.grouping import buckets, global_norm, take

CPU = torch.device("cpu")
META = torch.device("meta")


@given(
    st.lists(
        st.tuples(st.sampled_from([CPU, META]), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 2))
    )
)
def test_buckets_partition_the_indices_in_first_seen_order(kinds: list[tuple[torch.device, torch.dtype, int]]) -> None:
    tensors = [torch.empty(1, device=device, dtype=dtype) for device, dtype, _ in kinds]
    grouped = buckets(tensors, [(key,) for _, _, key in kinds])
    assert list(grouped) == list(dict.fromkeys(kinds))
    assert sorted(i for indices in grouped.values() for i in indices) == list(range(len(kinds)))
    for kind, indices in grouped.items():
        assert indices == sorted(indices)
        assert all(kinds[i] == kind for i in indices)


def test_buckets_without_keys_go_by_device_and_dtype() -> None:
    tensors = [torch.ones(1), torch.ones(1).double(), torch.ones(2)]
    assert buckets(tensors) == {(CPU, torch.float32): [0, 2], (CPU, torch.float64): [1]}


def test_buckets_refuse_keys_of_another_number() -> None:
    with pytest.raises(ValueError, match="keys: 1 given, expected 2"):
        buckets([torch.ones(1), torch.ones(1)], [(0.1,)])


def test_take_keeps_the_order_of_the_indices() -> None:
    assert take("abcd", [2, 0]) == ["c", "a"]


@pytest.mark.parametrize(
    ("dtypes", "widest"),
    [
        ([torch.float32], torch.float32),
        ([torch.bfloat16, torch.float16], torch.float32),
        ([torch.bfloat16, torch.float64, torch.float32], torch.float64),
    ],
    ids=["fp32", "bf16,fp16", "bf16,fp64,fp32"],
)
def test_global_norm_is_over_all_dtypes_in_the_widest_accumulation_dtype(
    backend: Backend, device: torch.device, dtypes: list[torch.dtype], widest: torch.dtype
) -> None:
    tensors = [torch.randn(7, device=device).to(dtype) for dtype in dtypes for _ in range(3)]
    norm = global_norm(backend, tensors)
    assert norm.shape == ()
    assert norm.dtype == widest
    assert norm.device == tensors[0].device
    expected = torch.cat([t.double() for t in tensors]).norm()
    # Some 20 roundings to the narrowest accumulation dtype at most, halved by the square root.
    torch.testing.assert_close(norm.double(), expected, rtol=10 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("make", [list, lambda: [torch.zeros(0)]], ids=["no tensors", "no elements"])
def test_global_norm_of_nothing_is_zero(backend: Backend, make: Callable[[], list[Tensor]]) -> None:
    norm = global_norm(backend, make())
    assert norm.dtype == torch.float32
    assert norm.item() == 0


def test_global_norm_of_one_bucket_is_the_back_ends_own_to_the_bit(backend: Backend) -> None:
    tensors = [torch.randn(100) for _ in range(5)]
    assert torch.equal(global_norm(backend, tensors), backend.l2_norm(tensors))


def test_global_norm_leaves_no_graph(backend: Backend) -> None:
    tensors = [torch.ones(2, requires_grad=True), torch.ones(2, dtype=torch.float64, requires_grad=True)]
    assert not global_norm(backend, tensors).requires_grad
