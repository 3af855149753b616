"""Zeros: how to tell them cheaply, and what becomes of a guest's writes of nothing else (``--detect-zeroes``)."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final

from fusemig.core.units import BLOCK_SIZE, CHUNK_SIZE

if TYPE_CHECKING:
    from fusemig.disk.base import Buffer

ZEROS: Final = bytes(CHUNK_SIZE)


class DetectZeroes(Enum):
    """QEMU's ``detect-zeroes`` (BlockdevDetectZeroesOptions): what a write of zeros to whole 4 KiB blocks becomes."""

    OFF = "off"
    """A write."""
    ON = "on"
    """A zeroing that keeps the blocks allocated, where the store can; it is cheaper than a write."""
    UNMAP = "unmap"
    """A hole: the image gets smaller."""


def is_zero(data: Buffer) -> bool:
    """Tell whether all of at most a chunk of bytes is zero.

    The first and the last byte tell most of the time. A bytearray is compared where it lies; a memoryview would compare
    at 0.4 GB/s, so it is copied first.
    """
    if data[0] or data[-1]:
        return False
    comparable = bytes(data) if isinstance(data, memoryview) else data
    return comparable == (ZEROS if len(data) == CHUNK_SIZE else ZEROS[: len(data)])


def is_zero_blocks(data: Buffer, offset: int) -> bool:
    """Tell whether a write at ``offset`` makes whole blocks zero and does nothing else."""
    length = len(data)
    if not length or length % BLOCK_SIZE or offset % BLOCK_SIZE or length > CHUNK_SIZE:
        return False
    return is_zero(data)
