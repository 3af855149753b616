"""What the store is asked for before it is read: what is dirty, once, in time, and nothing else."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusemig.core.mirror import Reach
from fusemig.core.units import BLOCK_SIZE, CHUNK_SIZE
from fusemig.disk.allocation import AllocationMap, BaseIdentity, map_size, write_header
from fusemig.disk.memory import MemoryDisk
from fusemig.disk.overlay import OverlayDisk
from fusemig.disk.raw import RawDisk
from fusemig.disk.tracked import TrackedDisk
from fusemig.migration.link import BufferPool
from fusemig.migration.reader import READ_AHEAD, OutgoingDisk, PassReader

if TYPE_CHECKING:
    from pathlib import Path

ODD_TAIL = 1536


class Store(MemoryDisk):
    """A disk that notes what it is asked for."""

    def __init__(self, name: str, size: int) -> None:
        super().__init__(name, size)
        self.asked: list[tuple[int, int]] = []
        self.read: list[int] = []

    def read_ahead(self, offset: int, length: int) -> None:
        self.check_range(offset, length)
        self.asked.append((offset, length))

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        self.read.append(len(self.asked))
        super().pread_into(buffer, offset)


@given(st.lists(st.integers(1, 2 * READ_AHEAD), min_size=1, max_size=6))
def test_a_pass_asks_for_what_it_will_read(steps: list[int]) -> None:
    """Nothing but dirty chunks, each once and not long before; and what follows a chunk before that is read."""
    wanted = [sum(steps[: nth + 1]) for nth in range(len(steps))]
    store = Store("a", wanted[-1] * CHUNK_SIZE + ODD_TAIL)
    for chunk in wanted:
        store.content[chunk * CHUNK_SIZE] = 1
    disk = TrackedDisk(store)
    outgoing = OutgoingDisk(0, disk, disk.start_tracking())
    for chunk in wanted:
        outgoing.tracking.mark_chunks(chunk, chunk + 1)
    reader = PassReader([outgoing], BufferPool())
    for _ in range(2):  # the second time to see that a pass begins anew
        store.asked.clear()
        store.read.clear()
        reader.begin_pass()
        while (batch := reader.read_batch(1)) is not None:
            for frame in batch.frames:
                outgoing.tracking.acknowledge(frame.chunks)
        chunks = [offset // CHUNK_SIZE for offset, _ in store.asked]
        assert len(set(chunks)) == len(chunks)
        assert set(chunks) <= set(wanted)
        assert all(n == min(CHUNK_SIZE, store.size - offset) for offset, n in store.asked)
        assert len(store.read) == len(wanted)
        for chunk, n_asked in zip(wanted, store.read, strict=True):
            assert chunk - 1 not in wanted or chunk in chunks[:n_asked]
            assert all(ahead <= chunk + READ_AHEAD for ahead in chunks[:n_asked])
        for chunk in wanted:
            outgoing.tracking.mark_chunks(chunk, chunk + 1)
            store.content[chunk * CHUNK_SIZE] += 1


def test_mirrored_chunks_leave_a_pass_its_read_ahead() -> None:
    """They lie where guests write, not where the pass is: nothing is asked for, and neither disk's place is lost."""
    stores = [Store(name, 40 * CHUNK_SIZE) for name in "ab"]
    disks = [TrackedDisk(store) for store in stores]
    outgoing = [OutgoingDisk(nth, disk, disk.start_tracking()) for nth, disk in enumerate(disks)]
    for store, one in zip(stores, outgoing, strict=True):
        store.content[::CHUNK_SIZE] = b"\1" * 40
        one.tracking.mark_chunks(0, 20)
        one.tracking.pacing.mirror(Reach.ALL, 0.0, lambda: None)  # those that are clean
        one.tracking.mark(30 * CHUNK_SIZE, CHUNK_SIZE)
        one.tracking.mark(39 * CHUNK_SIZE, CHUNK_SIZE)
    reader = PassReader(outgoing, BufferPool())
    reader.begin_pass()
    mirrored = reader.read_mirrored(2 * CHUNK_SIZE)
    assert mirrored is not None
    assert [frame.chunks for frame in mirrored.frames] == [[30], [39]]
    assert not stores[0].asked
    assert reader.read_batch(1) is not None
    assert stores[0].asked
    mirrored = reader.read_mirrored(2 * CHUNK_SIZE)  # of the other disk, amid the pass over the first
    assert mirrored is not None
    assert [frame.chunks for frame in mirrored.frames] == [[30], [39]]
    while reader.read_batch(1) is not None:
        pass
    for store in stores:
        assert [offset // CHUNK_SIZE for offset, _ in store.asked] == list(range(1, 20))


def test_an_overlay_asks_where_it_lies() -> None:
    """What the image holds of it, what the base holds, and nothing beyond a base that is smaller."""
    image, base = Store("a", 64 * BLOCK_SIZE), Store("base", 40 * BLOCK_SIZE)
    store = MemoryDisk("map", map_size(image.size))
    write_header(store, image.size, BaseIdentity(size=base.size, digest="", path="base"))
    allocation = AllocationMap(store, image.size, "boot")
    allocation.begin(image.flush, "")
    overlay = OverlayDisk(image, base, allocation)
    overlay.pwrite(b"x" * 2 * BLOCK_SIZE, 8 * BLOCK_SIZE)
    image.asked.clear()
    overlay.read_ahead(0, 64 * BLOCK_SIZE)
    assert image.asked == [(8 * BLOCK_SIZE, 2 * BLOCK_SIZE)]
    assert base.asked == [(0, 8 * BLOCK_SIZE), (10 * BLOCK_SIZE, 30 * BLOCK_SIZE)]


def test_the_kernel_fetches_it(tmp_path: Path) -> None:
    """A cold range of an image is in memory a moment after it was asked for."""
    path = tmp_path / "image"
    path.write_bytes(os.urandom(CHUNK_SIZE))
    with RawDisk("a", path) as disk:
        disk.drop_cache()
        buffer = memoryview(bytearray(CHUNK_SIZE))
        if disk.pread_nowait(buffer, 0):
            pytest.skip("this file system keeps everything in memory")
        disk.read_ahead(0, CHUNK_SIZE)
        until = time.monotonic() + 30
        while not disk.pread_nowait(buffer, 0):
            assert time.monotonic() < until
            time.sleep(0.01)
        assert bytes(buffer) == path.read_bytes()
