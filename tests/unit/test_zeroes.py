"""Zeros: what counts as a write of nothing else, what becomes of it, and that it is marked like any write."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fusemig.core.units import BLOCK_SIZE, CHUNK_SIZE
from fusemig.disk.fault import Fault, FaultDisk, Operation
from fusemig.disk.memory import MemoryDisk
from fusemig.disk.raw import RawDisk, create_image
from fusemig.disk.tracked import TrackedDisk
from fusemig.disk.zeroes import DetectZeroes, is_zero, is_zero_blocks
from fusemig.errors import DiskError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("length", [1, 511, BLOCK_SIZE, 3 * BLOCK_SIZE, CHUNK_SIZE])
def test_is_zero(length: int) -> None:
    data = bytearray(length)
    assert is_zero(data)
    assert is_zero(memoryview(data))
    for at in {0, length // 2, length - 1}:
        data[at] = 1
        assert not is_zero(data)
        assert not is_zero(memoryview(data))
        data[at] = 0


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        (0, BLOCK_SIZE, True),
        (BLOCK_SIZE, CHUNK_SIZE, True),
        (512, BLOCK_SIZE, False),
        (0, 512, False),
        (0, 0, False),
        (0, 2 * CHUNK_SIZE, False),  # no request is that large
    ],
)
def test_only_whole_blocks_count(offset: int, length: int, expected: bool) -> None:
    assert is_zero_blocks(bytes(length), offset) is expected
    if length:
        assert not is_zero_blocks(bytes(length - 1) + b"x", offset)


@pytest.mark.parametrize("how", list(DetectZeroes))
def test_it_is_marked_like_any_write(how: DetectZeroes) -> None:
    """Also when the store fails, and only a hole may make a chunk patchy."""
    image = MemoryDisk("d", 4 * CHUNK_SIZE)
    image.content[:] = b"x" * image.size
    faulty = FaultDisk(image)
    disk = TrackedDisk(faulty, detect_zeroes=how)
    tracking = disk.start_tracking()
    disk.pwrite(bytes(2 * BLOCK_SIZE), CHUNK_SIZE)
    assert image.content.count(0) == 2 * BLOCK_SIZE
    assert tracking.take_next(0) == (1, 0b11)
    assert disk.was_zeroed(1) is (how is DetectZeroes.UNMAP)
    assert disk.write_may_sleep(bytes(BLOCK_SIZE), 0) is (how is not DetectZeroes.OFF)
    assert not disk.write_may_sleep(b"x" * BLOCK_SIZE, 0)
    faulty.add(Fault(frozenset({Operation.WRITE, Operation.ZERO})))
    with pytest.raises(DiskError):
        disk.pwrite(bytes(BLOCK_SIZE), 2 * CHUNK_SIZE)
    assert tracking.take_next(2) == (2, 1)


def test_zeros_with_and_without_room(tmp_path: Path) -> None:
    """A real file keeps its blocks with the one and loses them with the other; what is a hole is told."""
    create_image(tmp_path / "image", 2 * CHUNK_SIZE)
    with RawDisk("d", tmp_path / "image") as disk:
        disk.pwrite(b"x" * 2 * CHUNK_SIZE, 0)
        disk.zero_allocated(0, CHUNK_SIZE)
        assert disk.stat().st_blocks * 512 >= 2 * CHUNK_SIZE
        disk.write_zeroes(CHUNK_SIZE, CHUNK_SIZE)
        assert disk.stat().st_blocks * 512 < 2 * CHUNK_SIZE
        assert not any(disk.pread(2 * CHUNK_SIZE, 0))
        assert disk.is_hole(CHUNK_SIZE, CHUNK_SIZE)
        disk.pwrite(b"x", 2 * CHUNK_SIZE - 1)
        assert not disk.is_hole(CHUNK_SIZE, CHUNK_SIZE)
        assert disk.is_hole(CHUNK_SIZE, CHUNK_SIZE - BLOCK_SIZE)
