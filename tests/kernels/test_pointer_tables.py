"""The tables that Triton's kernels walk: what is in them, and when they are made."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gam_fused.kernels.pointer_tables import DeviceTables

CPU = torch.device("cpu")


def zeros(*numels: int) -> list[Tensor]:
    return [torch.zeros(numel) for numel in numels]


@given(st.lists(st.integers(0, 50), max_size=8), st.sampled_from([1, 2, 8, 64]))
def test_the_chunks_of_a_plan_are_all_elements_once(numels: list[int], chunk: int) -> None:
    table, tensors, chunks = DeviceTables().plan(numels, chunk, CPU)
    values = table.tolist()
    assert len(values) == tensors + 2 * chunks
    sizes, of_tensor, number = values[:tensors], values[tensors : tensors + chunks], values[tensors + chunks :]
    assert sizes == numels
    elements = [
        (tensor, element)
        for tensor, begin in zip(of_tensor, number, strict=True)
        for element in range(begin * chunk, min((begin + 1) * chunk, sizes[tensor]))
    ]
    assert elements == [(tensor, element) for tensor, numel in enumerate(numels) for element in range(numel)]


def test_a_plan_counts_elements_beyond_32_bits() -> None:
    table, _, chunks = DeviceTables().plan([2**33 + 1], 2**30, CPU)
    assert (table[0].item(), chunks, table[-1].item()) == (2**33 + 1, 9, 8)


def test_addresses_are_those_of_the_tensors_and_tell_which_are_aligned() -> None:
    odd = torch.zeros(8)[1:]
    first, second, more = [*zeros(3, 4), odd], zeros(3, 4, 7), zeros(1, 1, 1)
    table = DeviceTables().addresses([first, second], CPU, more).view(4, 3)
    assert table[0].tolist() == [tensor.data_ptr() for tensor in first]
    assert table[1].tolist() == [tensor.data_ptr() for tensor in second]
    assert table[2].tolist() == [1, 1, 0]
    assert table[3].tolist() == [tensor.data_ptr() for tensor in more]


def test_tables_are_made_once_while_nothing_moves() -> None:
    tables, lists = DeviceTables(), [zeros(3, 4), zeros(3, 4)]
    first = tables.addresses(lists, CPU)
    assert tables.addresses([list(tensors) for tensors in lists], CPU) is first
    lists[1][0] = torch.zeros(3)
    moved = tables.addresses(lists, CPU)
    assert moved is not first
    assert moved.view(3, 2)[1, 0] == lists[1][0].data_ptr()
    assert tables.plan([3, 4], 8, CPU).table is tables.plan([3, 4], 8, CPU).table
    assert tables.plan([3, 4], 8, CPU).table is not tables.plan([3, 4], 2, CPU).table


def test_the_tables_used_least_recently_make_room() -> None:
    tables = DeviceTables(capacity=2)
    first = tables.plan([1], 8, CPU).table
    tables.plan([2], 8, CPU)
    assert tables.plan([1], 8, CPU).table is first
    tables.plan([3], 8, CPU)
    assert tables.plan([1], 8, CPU).table is first
    assert len(tables._entries) == 2


class FakeGpu:
    """``torch.cuda`` as the tables use it, over tensors that stay on the CPU."""

    type = "cuda"

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capturing = False
        self.stream = "first"
        self.waits: list[tuple[str, str]] = []
        self.recorded: list[str] = []
        gpu = self

        class Stream:
            def __init__(self, name: str) -> None:
                self.name = name

            def __eq__(self, other: object) -> bool:
                return isinstance(other, Stream) and self.name == other.name

            def record_event(self) -> str:
                return f"upload on {self.name}"

            def wait_event(self, event: str) -> None:
                gpu.waits.append((self.name, event))

        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(self.stream))
        monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
        monkeypatch.setattr(Tensor, "to", lambda tensor, device, non_blocking: tensor)
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: self.recorded.append(stream.name))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return FakeGpu(monkeypatch)


def test_a_table_is_waited_for_on_other_streams_and_not_freed_under_them(gpu: FakeGpu) -> None:
    tables = DeviceTables()
    tables.plan([3], 8, gpu)  # type: ignore[arg-type]
    assert (gpu.waits, gpu.recorded) == ([], [])
    gpu.stream = "second"
    tables.plan([3], 8, gpu)  # type: ignore[arg-type]
    assert gpu.waits == [("second", "upload on first")]
    assert gpu.recorded == ["second"]


def test_a_graph_captures_tables_that_are_there_and_keeps_them(gpu: FakeGpu) -> None:
    tables = DeviceTables(capacity=1)
    table = tables.plan([3], 8, gpu).table  # type: ignore[arg-type]
    gpu.capturing = True
    gpu.stream = "capture"
    assert tables.plan([3], 8, gpu).table is table  # type: ignore[arg-type]
    assert gpu.waits == []  # on an event from outside, which a capture cannot
    gpu.capturing = False
    tables.plan([4], 8, gpu)  # type: ignore[arg-type]
    assert tables.plan([3], 8, gpu).table is table  # type: ignore[arg-type]


def test_a_graph_that_needs_a_new_table_is_told_what_to_do(gpu: FakeGpu) -> None:
    gpu.capturing = True
    with pytest.raises(RuntimeError, match=r"Make the same launch once before the capture.*needs backend=.native."):
        DeviceTables().plan([3], 8, gpu)  # type: ignore[arg-type]
