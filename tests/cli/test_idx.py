"""IDX files: whatever was written is read back, and nothing else is accepted."""

from __future__ import annotations

import gzip
import struct
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gam_fused.cli.idx import IdxError, parse_idx, read_idx

shapes = st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple)


def idx_bytes(array: torch.Tensor) -> bytes:
    """The format as its authors describe it: 0, 0, type, dimensions, sizes, data."""
    sizes = b"".join(struct.pack(">I", size) for size in array.shape)
    return bytes([0, 0, 8, array.dim()]) + sizes + bytes(array.flatten().tolist())


def counting(shape: tuple[int, ...]) -> torch.Tensor:
    return (torch.arange(prod(shape)) % 251).to(torch.uint8).reshape(shape)


@given(shapes)
def test_round_trip(shape: tuple[int, ...]) -> None:
    array = counting(shape)
    parsed = parse_idx(idx_bytes(array), len(shape))
    assert parsed.shape == shape
    assert torch.equal(parsed, array)


@given(shapes, st.data())
def test_any_other_length_is_rejected(shape: tuple[int, ...], data: st.DataObject) -> None:
    content = idx_bytes(counting(shape))
    shorter = content[: data.draw(st.integers(0, len(content) - 1))]
    longer = content + data.draw(st.binary(min_size=1, max_size=4))
    for damaged in (shorter, longer):
        with pytest.raises(IdxError):
            parse_idx(damaged, len(shape))


@given(st.binary(min_size=4, max_size=4).filter(lambda magic: magic != bytes([0, 0, 8, 3])))
def test_any_other_magic_number_is_rejected(magic: bytes) -> None:
    content = magic + idx_bytes(counting((2, 3, 4)))[4:]
    with pytest.raises(IdxError, match=f"starts with bytes '{magic.hex()}' instead of '00000803'"):
        parse_idx(content, 3)


@pytest.mark.parametrize("name", ["images", "images.gz"])
@pytest.mark.parametrize("compressed", [True, False])
def test_compression_is_found_by_content(name: str, compressed: bool, tmp_path: Path) -> None:
    array = counting((3, 2, 2))
    content = idx_bytes(array)
    (tmp_path / name).write_bytes(gzip.compress(content) if compressed else content)
    assert torch.equal(read_idx(tmp_path / name, 3), array)


@pytest.mark.parametrize("keep", [5, 30, -1])
def test_truncated_or_damaged_compression_is_rejected(keep: int, tmp_path: Path) -> None:
    content = gzip.compress(idx_bytes(counting((40, 7, 7))))
    (tmp_path / "cut").write_bytes(content[:keep])
    damaged = bytearray(content)
    damaged[len(damaged) // 2] ^= 0xFF
    (tmp_path / "damaged").write_bytes(damaged)
    for name in ("cut", "damaged"):
        with pytest.raises(IdxError, match="cannot be decompressed"):
            read_idx(tmp_path / name, 3)
