"""MemoryDisk: a disk in RAM, the reference model of the tests and of the simulation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fusemig.core.units import BLOCK_SIZE
from fusemig.disk.base import Disk, Extent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fusemig.disk.base import Buffer

_ZEROS: Final = bytes(BLOCK_SIZE)


class MemoryDisk(Disk):
    """A disk whose bytes are a bytearray; blocks of zeros are holes."""

    def __init__(self, name: str, size: int) -> None:
        """Make a disk of ``size`` zero bytes."""
        self.name = name
        self.size = size
        self.content = bytearray(size)
        self.n_flushes = 0

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Copy out."""
        buffer[:] = self.content[offset : offset + len(buffer)]

    def pread_nowait(self, buffer: memoryview, offset: int) -> bool:
        """Copy out; memory never sleeps."""
        self.pread_into(buffer, offset)
        return True

    def pwrite_may_sleep(self, offset: int, length: int) -> bool:
        """Memory never sleeps."""
        return False

    def pwrite(self, data: Buffer, offset: int) -> None:
        """Copy in."""
        self.check_range(offset, len(data))
        self.content[offset : offset + len(data)] = data

    def write_zeroes(self, offset: int, length: int) -> None:
        """Zero the range."""
        self.content[offset : offset + length] = bytes(length)

    def is_hole(self, offset: int, length: int) -> bool:
        """Tell whether all of it is zero."""
        return not self.content[offset : offset + length].strip(b"\0")

    def flush(self) -> None:
        """Count the call."""
        self.n_flushes += 1

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield runs of blocks that are, or are not, all zeros."""
        start, end = offset, offset + length
        at, is_data = start, False
        while at < end:
            step = min(BLOCK_SIZE - at % BLOCK_SIZE, end - at)
            kind = self.content[at : at + step] != _ZEROS[:step]
            if at > start and kind != is_data:
                yield Extent(start, at - start, is_data)
                start = at
            is_data = kind
            at += step
        if at > start:
            yield Extent(start, at - start, is_data)
