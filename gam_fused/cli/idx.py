"""Reading IDX files of bytes, the format of MNIST and its relatives, plain or gzip-compressed.

A file is: two zero bytes, one byte for the element type (8 = unsigned byte), one byte for the number of dimensions,
each dimension as a big-endian 32-bit integer, then the elements in row-major order.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

UNSIGNED_BYTE = 8
GZIP_MAGIC = b"\x1f\x8b"


class IdxError(Exception):
    """The file is not a complete IDX file of bytes; the message says what is wrong with it."""


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The array in ``path`` as a uint8 tensor with ``dimensions`` dimensions.

    Raises ``OSError`` if the file cannot be read and :class:`IdxError` if its content is not what it should be.
    """
    return parse_idx(_decompress(path.read_bytes()), dimensions)


def parse_idx(content: bytes, dimensions: int) -> Tensor:
    """The array in the bytes of an uncompressed IDX file; see :func:`read_idx`."""
    magic = bytes([0, 0, UNSIGNED_BYTE, dimensions])
    if content[:4] != magic:
        raise IdxError(f"starts with bytes {content[:4].hex()!r} instead of {magic.hex()!r}")
    header_size = 4 + 4 * dimensions
    if len(content) < header_size:
        raise IdxError(f"ends within its header, after {len(content)} of {header_size} bytes")
    shape = struct.unpack(f">{dimensions}I", content[4:header_size])
    expected = header_size + math.prod(shape)
    if len(content) != expected:
        raise IdxError(f"is {len(content)} bytes long; its header promises {expected}")
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header_size).reshape(shape)


def _decompress(content: bytes) -> bytes:
    """Decide by content, not by name: browsers and archivers drop and add ``.gz`` at will."""
    if not content.startswith(GZIP_MAGIC):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise IdxError(f"cannot be decompressed ({error})") from error
