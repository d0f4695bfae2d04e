"""What is refused, that the message says where, and that what is fine is let through."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from itertools import chain

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gam_fused.kernels.validation import validate_lists

SHAPES = [(3,), (2, 4), (), (0,), (2, 3, 4, 5)]


def tensors() -> list[Tensor]:
    return [torch.randn(shape) for shape in SHAPES]


# ---------------------------------------------------------------- malformed lists

# A fault: what takes the place of a tensor, and the message that follows "list[index]: ".
FAULTS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "None": (lambda t: None, "NoneType, expected a tensor"),
    "a number": (lambda t: 1.0, "float, expected a tensor"),
    "float64": (lambda t: t.double(), "dtype torch.float64, expected torch.float32"),
    "integer": (lambda t: t.int(), "dtype torch.int32, expected"),
    "complex": (lambda t: t.to(torch.complex64), "dtype torch.complex64, expected"),
    "float8": (lambda t: t.to(torch.float8_e5m2), "dtype torch.float8_e5m2, expected"),
    "another device": (lambda t: t.to("meta"), "device meta, expected cpu"),
    "sparse": (lambda t: t.to_sparse(), "layout torch.sparse_coo, expected torch.strided"),
}
# The first list says which shapes are right, so these show in the others only.
SHAPE_FAULTS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "one element more": (lambda t: torch.cat([t.flatten(), torch.ones(1)]), r"shape \(\d+,\), expected \("),
    "one dimension more": (lambda t: t[None], r"shape \(1,.*\), expected \("),
}


# Not the very first tensor, which says which dtype and device are right.
@given(
    st.one_of(
        st.tuples(st.sampled_from(list(FAULTS.values())), st.sampled_from(["params", "grads", "hvps"])),
        st.tuples(st.sampled_from(list(SHAPE_FAULTS.values())), st.sampled_from(["grads", "hvps"])),
    ),
    st.integers(1, len(SHAPES) - 1),
)
def test_a_malformed_tensor_is_refused_by_list_and_index(
    fault_and_list: tuple[tuple[Callable[[Tensor], object], str], str], i: int
) -> None:
    (replace, message), name = fault_and_list
    lists = {"params": tensors(), "grads": tensors(), "hvps": tensors()}
    lists[name][i] = replace(lists[name][i])  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=rf"^{name}\[{i}\]: {message}"):
        validate_lists(writes={"params": lists["params"], "grads": lists["grads"]}, reads={"hvps": lists["hvps"]})


@pytest.mark.parametrize("convert", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("kind", ["writes", "reads"])
def test_every_layout_but_strided_is_refused(convert: str, kind: str) -> None:
    matrix = getattr(torch.randn(2, 2), convert)()
    with pytest.raises(ValueError, match=r"^tensors\[1\]: layout torch\.\w+, expected torch.strided"):
        validate_lists(**{kind: {"tensors": [torch.randn(2, 2), matrix]}}, same_shape=False)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex128, torch.float8_e4m3fn])
def test_a_first_tensor_that_is_not_real_floating_is_refused(dtype: torch.dtype) -> None:
    message = re.escape(f"params[0]: dtype {dtype}, expected a real floating dtype")
    with pytest.raises(ValueError, match=message):
        validate_lists(writes={"params": [torch.ones(2).to(dtype)]})


def test_the_message_names_the_counterpart() -> None:
    params, directions = [torch.ones(2, dtype=torch.bfloat16) for _ in range(4)], [torch.ones(2)] * 4
    directions[:3] = [torch.ones(2, dtype=torch.bfloat16) for _ in range(3)]
    with pytest.raises(ValueError, match=r"^directions\[3\]: dtype torch.float32, expected torch.bfloat16 as params"):
        validate_lists(writes={"params": params, "directions": directions})
    with pytest.raises(ValueError, match=r"^grads\[1\]: shape \(2,\), expected \(3,\) as params\[1\]$"):
        validate_lists(reads={"params": [torch.ones(1), torch.ones(3)], "grads": [torch.ones(1), torch.ones(2)]})


@given(st.integers(0, 4), st.integers(0, 4))
def test_lists_of_different_lengths_are_refused_with_the_first_index_that_has_no_counterpart(n: int, m: int) -> None:
    lists = {"params": tensors()[:n], "grads": tensors()[:m]}
    if n == m:
        validate_lists(writes=lists)
        return
    spare, missing = ("params", "grads") if n > m else ("grads", "params")
    expected = f"grads: {m} tensors, expected {n} as in params; {spare}[{min(n, m)}] has no counterpart in {missing}"
    with pytest.raises(ValueError, match=re.escape(expected)):
        validate_lists(writes=lists)


# ---------------------------------------------------------------- well-formed lists


def test_shapes_may_differ_where_they_need_not_agree() -> None:
    validate_lists(reads={"tensors": tensors()}, same_shape=False)
    validate_lists(writes={"a": [torch.ones(2)]}, reads={"b": [torch.ones(3)]}, same_shape=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_well_formed_lists_pass(dtype: torch.dtype) -> None:
    params = [nn.Parameter(t.to(dtype)) for t in tensors()]
    grads = [t.to(dtype) for t in tensors()]
    grads[4] = grads[4].contiguous(memory_format=torch.channels_last)
    validate_lists(writes={"params": params, "grads": grads}, reads={"hvps": [g.clone() for g in grads]})
    validate_lists(writes={"params": [], "grads": []}, reads={"hvps": []})


# ---------------------------------------------------------------- overlapping memory

View = tuple[tuple[tuple[int, int], ...], int]  # ((size, stride), …), offset


# Views of twelve numbers: dense, interleaved, without elements, and such as overlap themselves.
sizes = st.sampled_from([2, 3, 4, 2, 1, 0])
views = st.tuples(
    st.lists(st.tuples(sizes, st.integers(0, 5)), max_size=3).map(tuple),
    st.integers(0, 11),
).filter(lambda view: view[1] + sum((size - 1) * stride for size, stride in view[0] if size > 0) < 12)


def view_of(numbers: Tensor, view: View) -> Tensor:
    dimensions, offset = view
    return numbers.as_strided([size for size, _ in dimensions], [stride for _, stride in dimensions], offset)


@settings(max_examples=300)
@example(written=[(((2, 1), (2, 1)), 0)], read=[])  # overlaps itself, with no stride 0
@example(written=[(((2, 3), (3, 2)), 0)], read=[])  # strides that do not nest, yet no overlap
@example(written=[(((3, 2),), 0)], read=[(((2, 0), (3, 2)), 1)])  # an expanded tensor in the gaps of another
@example(written=[(((3, 4),), 0)], read=[(((2, 1), (2, 1)), 1)])  # one that overlaps itself, likewise
@given(written=st.lists(views, min_size=1, max_size=3), read=st.lists(views, max_size=2))
def test_exactly_the_lists_that_write_an_element_of_another_use_are_refused(
    written: list[View], read: list[View]
) -> None:
    used = [view_of(torch.arange(12), view).flatten().tolist() for view in [*written, *read]]
    times = Counter(chain.from_iterable(used))  # how often each of the twelve is used
    overlap = any(times[element] > 1 for element in chain.from_iterable(used[: len(written)]))
    storage, nothing = torch.zeros(12), torch.zeros(0)
    length = max(len(written), len(read))
    writes, reads = (
        [view_of(storage, view) for view in drawn] + [nothing] * (length - len(drawn)) for drawn in (written, read)
    )
    if overlap:
        with pytest.raises(ValueError, match=r"^(params|hvps)\[\d\]: (overlaps|stride)"):
            validate_lists(writes={"params": writes}, reads={"hvps": reads}, same_shape=False)
    else:
        validate_lists(writes={"params": writes}, reads={"hvps": reads}, same_shape=False)


def test_an_overlap_is_reported_with_both_places() -> None:
    storage = torch.zeros(10)
    params, directions = [torch.ones(3), storage[:4]], [torch.ones(3), storage[3:7]]
    with pytest.raises(ValueError, match=r"^directions\[1\]: overlaps params\[1\] in memory"):
        validate_lists(writes={"params": params, "directions": directions})
    with pytest.raises(ValueError, match=r"^directions\[1\]: overlaps params\[1\] in memory"):
        validate_lists(writes={"params": params}, reads={"directions": directions})


def test_a_written_tensor_that_overlaps_itself_is_refused() -> None:
    expanded = [torch.ones(4, 1), torch.ones(1).expand(3, 4)]
    with pytest.raises(ValueError, match=r"^grads\[1\]: stride \(0, 0\) for shape \(3, 4\) addresses an element more"):
        validate_lists(writes={"grads": expanded})
    validate_lists(reads={"grads": expanded}, same_shape=False)


def test_one_tensor_may_be_read_twice_but_not_written_twice() -> None:
    one, other = torch.ones(3), torch.ones(3)
    validate_lists(writes={"params": [torch.ones(3)]}, reads={"grads": [one], "hvps": [one]})
    with pytest.raises(ValueError, match=r"^params\[1\]: overlaps params\[0\]"):
        validate_lists(writes={"params": [one, one]}, reads={"grads": [other, other]})


@pytest.mark.parametrize(
    "split",
    [
        lambda matrix: [matrix[:, 0], matrix[:, 1]],
        lambda matrix: [matrix[:, :30], matrix[:, 30:]],
        lambda matrix: [matrix[:20], matrix[20:]],
        lambda matrix: [matrix[::2].T, matrix[1::2].T],
    ],
    ids=["columns", "blocks of columns", "blocks of rows", "every other row"],
)
def test_views_of_one_storage_that_share_no_element_pass(split: Callable[[Tensor], list[Tensor]]) -> None:
    validate_lists(
        writes={"params": split(torch.ones(50, 60))}, reads={"hvps": split(torch.ones(50, 60))}, same_shape=False
    )


def test_tensors_without_elements_never_overlap() -> None:
    storage = torch.ones(4)
    inside, empty = storage[1:1], torch.ones(0)
    validate_lists(writes={"params": [storage, inside, inside, empty, empty]}, same_shape=False)
    validate_lists(writes={"params": [torch.ones(1, 0).expand(5, 0)]})


def test_metadata_is_read_on_the_cpu_whatever_the_default_device() -> None:
    columns = torch.ones(4, 2)
    with torch.device("meta"):
        validate_lists(writes={"params": [columns[:, 0], columns[:, 1]]})
