"""Disk images to measure with, and the comparison of two of them."""

from __future__ import annotations

import errno
import os
import random
from typing import TYPE_CHECKING, Final

from benchlib.measure import BenchError
from benchlib.settings import MIB
from benchlib.stage import file_system_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_POOL_SIZE: Final = 16 * MIB


class RandomBytes:
    """Random data fast: windows of one random pool, each stamped with its place so that no two are equal."""

    def __init__(self) -> None:
        """Draw the pool."""
        self._pool = os.urandom(_POOL_SIZE + 2 * MIB)

    def at(self, offset: int, length: int) -> bytearray:
        """Return data for ``offset``; ``length`` is at most 2 MiB."""
        start = offset * 2654435761 % _POOL_SIZE
        data = bytearray(self._pool[start : start + length])
        data[:8] = offset.to_bytes(8, "little")
        return data


def random_image(path: Path, size: int) -> Path:
    """Write an image full of random data."""
    source = RandomBytes()
    with path.open("wb", buffering=0) as file:
        for offset in range(0, size, MIB):
            file.write(source.at(offset, min(MIB, size - offset)))
    return path


def zero_image(path: Path, size: int) -> Path:
    """Write an image of zeros that are allocated."""
    zeros = bytes(MIB)
    with path.open("wb", buffering=0) as file:
        for offset in range(0, size, MIB):
            file.write(zeros[: size - offset])
    return path


def sparse_image(path: Path, size: int, pieces: int, piece_size: int) -> Path:
    """Write a sparse image with ``pieces`` runs of random data at 4 KiB boundaries, one in each equal part of it."""
    source = RandomBytes()
    chance = random.Random(1)
    step = size // pieces // 4096 * 4096
    with path.open("wb", buffering=0) as file:
        file.truncate(size)
        for index in range(pieces):
            offset = index * step + chance.randrange((step - piece_size) // 4096) * 4096
            os.pwrite(file.fileno(), source.at(offset, piece_size), offset)
    return path


def fill(path: Path) -> None:
    """Overwrite a whole image with bytes that no source has, so that every page of it exists."""
    size = path.stat().st_size
    piece = b"\xa5" * MIB
    with path.open("r+b") as file:
        for at in range(0, size, MIB):
            file.write(piece[: size - at])


def warm(*paths: Path) -> None:
    """Read images that are in memory, so that no side pays for what its servers' start has let grow cold.

    A machine may take memory back that was not used for seconds (DAMON, a balloon): the next touch of it then costs ten
    times as much. What lies on a disk is left as it is.
    """
    for path in paths:
        if file_system_of(path) in ("tmpfs", "ramfs"):
            buffer = bytearray(MIB)
            with path.open("rb", buffering=0) as file:
                for start, stop in _data_runs(file.fileno(), path.stat().st_size):
                    for offset in range(start, stop, MIB):
                        os.preadv(file.fileno(), [buffer], offset)


def empty_image(path: Path, size: int) -> Path:
    """Make an image that is one hole; what was there before is gone."""
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(size)
    return path


def _data_runs(fd: int, size: int) -> Iterator[tuple[int, int]]:
    offset = 0
    while offset < size:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        offset = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, min(offset, size)


def first_difference(a: Path, b: Path, *, start: int = 0) -> int | None:
    """Return the offset (of a MiB) at which two images differ from ``start`` on, or None if they are equal.

    Every byte is compared; what is a hole in both is known to be zeros in both.
    """
    size = a.stat().st_size
    if b.stat().st_size != size:
        return min(size, b.stat().st_size)
    left, right = bytearray(MIB), bytearray(MIB)
    with a.open("rb", buffering=0) as file_a, b.open("rb", buffering=0) as file_b:
        for one, _other in ((file_a, file_b), (file_b, file_a)):
            for run_start, run_stop in _data_runs(one.fileno(), size):
                for offset in range(max(start, run_start), run_stop, MIB):
                    length = min(MIB, run_stop - offset)
                    if length < MIB:
                        left, right = bytearray(length), bytearray(length)
                    elif len(left) != MIB:
                        left, right = bytearray(MIB), bytearray(MIB)
                    os.preadv(file_a.fileno(), [left], offset)
                    os.preadv(file_b.fileno(), [right], offset)
                    if left != right:
                        return offset
    return None


def check_equal(source: Path, destination: Path, *, start: int = 0) -> None:
    """Raise `BenchError` unless the images are equal byte for byte from ``start`` on."""
    offset = first_difference(source, destination, start=start)
    if offset is not None:
        raise BenchError(f"the destination differs from the source near byte {offset}: the copy does not count")


def allocated(path: Path) -> int:
    """Return how many bytes the file system spends on a file."""
    return path.stat().st_blocks * 512


def drop_cache(path: Path) -> None:
    """Write a file out and drop its pages from the page cache (nothing happens on tmpfs)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
