"""The chunk map: every chunk in one state and counted once, whatever the cells, and as the layers below say."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from fusemig import chunk_map_info
from fusemig.bitmap import ChunkBitmap
from fusemig.chunk_map import MAX_CELLS, STATES, Cell, chunks_per_cell, count_cell
from fusemig.chunk_map_info import ChunkMaps
from fusemig.disk.allocation import map_size
from fusemig.disk.base import Extent
from fusemig.disk.borrowed import BorrowedDisk, Wants, new_map
from fusemig.disk.memory import MemoryDisk
from fusemig.disk.tracked import TrackedDisk
from fusemig.heat import HALVING_EPOCHS, HOT_LEVEL, Heat
from fusemig.phase import MigrationPhase
from fusemig.qmp import seeing
from fusemig.units import BLOCK_SIZE, BLOCKS_PER_CHUNK, CHUNK_SIZE, n_chunks

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

    from fusemig.disk.tracking import Tracking
    from fusemig.qmp.seeing import ChunkMap


class Sets:
    """A disk's chunks as plain sets, the slow and obvious way."""

    def __init__(self, dirty: set[int], missing: set[int], allocated: set[int], hot: set[int]) -> None:
        self.dirty, self.missing, self.allocated, self.hot = dirty, missing, allocated, hot

    def dirty_bits(self, first: int, stop: int) -> int:
        return _bits(self.dirty, first, stop)

    def missing_bits(self, first: int, stop: int) -> int:
        return _bits(self.missing, first, stop)

    def allocated_bits(self, first: int, stop: int) -> int:
        return _bits(self.allocated, first, stop)

    def count_hot(self, first: int, stop: int) -> int:
        return len(self.hot & set(range(first, stop)))


def _bits(chunks: set[int], first: int, stop: int) -> int:
    return sum(1 << chunk - first for chunk in chunks if first <= chunk < stop)


some = st.sets(st.integers(0, 299), max_size=60)


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 350), some, some, some, some, some, st.booleans())
def test_every_chunk_is_counted_once_in_its_most_important_state(
    n: int,
    max_cells: int,
    in_flight: set[int],
    dirty: set[int],
    missing: set[int],
    allocated: set[int],
    hot: set[int],
    is_sending: bool,
) -> None:
    """Against sets: each cell is what its chunks are one by one, all of them are there, and none is in two."""
    chunks = Sets(dirty, missing, allocated, hot)
    flying = sorted(chunk for chunk in in_flight if chunk < n)
    step = chunks_per_cell(n, max_cells)
    starts = range(0, n, step)
    assert len(starts) <= max_cells
    for first in starts:
        stop = min(first + step, n)
        cell = count_cell(chunks, flying, first, stop, is_sending=is_sending)
        assert sum(cell[:-1]) == stop - first
        expected = dict.fromkeys((*STATES, "hot"), 0)
        for chunk in range(first, stop):
            if chunk in flying:
                state = "in-flight"
            elif chunk in dirty:
                state = "dirty"
            elif chunk in missing:
                state = "missing"
            elif chunk in allocated:
                state = "sent" if is_sending else "allocated"
            else:
                state = "hole"
            expected[state] += 1
            expected["hot"] += chunk in hot
        assert cell == Cell(*expected.values())


def test_limits_are_the_same_in_the_vocabulary() -> None:
    """What QMP lets ask for is what the map can have; its lists are the cells' members, in their order."""
    assert seeing.MAX_CELLS == MAX_CELLS
    assert seeing.ChunkMap.__struct_fields__[2:] == Cell._fields
    assert [name.replace("_", "-") for name in Cell._fields[:-1]] == list(STATES)


@settings(deadline=None)
@given(st.integers(1, 200), st.data())
def test_bits_of_a_map_are_those_that_are_set(n: int, data: st.DataObject) -> None:
    """`ChunkBitmap.bits` for any range, aligned or not."""
    bitmap = ChunkBitmap(n)
    chosen = data.draw(st.sets(st.integers(0, n - 1)))
    for index in chosen:
        bitmap.set(index)
    first = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(first, n))
    assert bitmap.bits(first, stop) == _bits(chosen, first, stop)


def test_hot_is_what_the_level_of_a_chunk_says() -> None:
    """`Heat.count_hot` over thousands agrees with `Heat.level` for each, at every age, also when epochs wrap."""
    heat = Heat(600 * CHUNK_SIZE)
    rng = random.Random(1)
    for epoch in range(3000):
        if rng.random() < 0.2:
            chunk = rng.randrange(600)
            heat.note(chunk * CHUNK_SIZE, rng.choice((1, 16, 40, 256)) * BLOCK_SIZE)
        heat.tick(float(epoch), epoch * BLOCK_SIZE, epoch)
        if epoch % (HALVING_EPOCHS // 2) == 0:
            first = rng.randrange(300)
            expected = sum(heat.level(chunk) >= HOT_LEVEL for chunk in range(first, 600))
            assert heat.count_hot(first, 600) == expected
    assert heat.count_hot(0, 0) == 0


class _Migration:
    """What the map looks at of a migration."""

    def __init__(self, tracking: Tracking | None, phase: MigrationPhase) -> None:
        self.tracking = tracking
        self.phase = phase

    def tracking_of(self, _disk: TrackedDisk) -> Tracking | None:
        return self.tracking


class _Sparse(MemoryDisk):
    """A disk whose store says what it was told."""

    def __init__(self, runs: list[tuple[int, int]], size: int) -> None:
        super().__init__("vda", size)
        self.runs = runs
        self.n_asked = 0

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        self.n_asked += 1
        at = 0
        for first, stop in self.runs:
            yield Extent(at, first - at, is_data=False)
            yield Extent(first, stop - first, is_data=True)
            at = stop


async def _count(disk: TrackedDisk, migration: _Migration | None = None, cells: int = 100) -> ChunkMap:
    return await ChunkMaps().count(disk, migration, cells, is_filling=False)  # type: ignore[arg-type]


async def test_a_disk_at_rest_shows_what_its_image_holds_and_what_was_written() -> None:
    """Data, holes, and a hole that a guest wrote into after the store was asked."""
    disk = TrackedDisk(_Sparse([(CHUNK_SIZE, 3 * CHUNK_SIZE)], 8 * CHUNK_SIZE))
    maps = ChunkMaps()
    before = await maps.count(disk, None, 100, is_filling=False)
    assert (before.allocated, before.hole) == ([0, 1, 1, 0, 0, 0, 0, 0], [1, 0, 0, 1, 1, 1, 1, 1])
    assert before.dirty == before.in_flight == before.sent == before.missing == []
    disk.pwrite(b"x", 5 * CHUNK_SIZE)
    after = await maps.count(disk, None, 4, is_filling=False)
    assert (after.chunks, after.chunks_per_cell, after.allocated) == (8, 2, [1, 1, 1, 0])


async def test_a_migration_shows_what_is_to_be_sent_on_its_way_and_there() -> None:
    """Taken, acknowledged, written again; while it is set up nothing counts as sent, and when it is over all does."""
    disk = TrackedDisk(_Sparse([(0, 4 * CHUNK_SIZE)], 6 * CHUNK_SIZE))
    tracking = disk.start_tracking()
    tracking.mark_chunks(0, 4)
    moving = _Migration(tracking, MigrationPhase.BULK)
    for chunk in range(3):
        assert tracking.take_next(chunk) is not None
    tracking.acknowledge([0, 1])
    disk.pwrite(b"x", 1 * CHUNK_SIZE)
    counted = await _count(disk, moving)
    assert counted.sent == [1, 0, 0, 0, 0, 0]
    assert counted.dirty == [0, 1, 0, 1, 0, 0]
    assert counted.in_flight == [0, 0, 1, 0, 0, 0]
    moving.phase = MigrationPhase.SETUP
    assert (await _count(disk, moving)).allocated == [1, 0, 0, 0, 0, 0]
    moving.phase = MigrationPhase.COMPLETED
    assert sum((await _count(disk, moving)).sent) == 4
    moving.phase = MigrationPhase.FAILED  # it may be resumed
    assert (await _count(disk, moving)).sent == [1, 0, 0, 0, 0, 0]
    tracking.stop()
    assert sum((await _count(disk, moving)).allocated) == 4


async def test_what_is_still_at_the_source_is_missing() -> None:
    """A chunk of which one block is missing counts; when it has come it does not, also if nobody wrote."""
    size = 4 * CHUNK_SIZE
    image, store = MemoryDisk("vda", size), MemoryDisk("vda", map_size(size))
    image.content[:] = b"x" * size
    runs = [(BLOCKS_PER_CHUNK, BLOCKS_PER_CHUNK + 1), (3 * BLOCKS_PER_CHUNK - 1, 3 * BLOCKS_PER_CHUNK + 5)]
    borrowed = BorrowedDisk(image, new_map(store, image, runs, "boot"), Wants("vda", 1.0))
    disk = TrackedDisk(borrowed)
    counted = await _count(disk)
    assert (counted.missing, counted.allocated) == ([0, 1, 1, 1], [1, 0, 0, 0])
    borrowed.fill(None, BLOCKS_PER_CHUNK * BLOCK_SIZE, BLOCK_SIZE)
    assert (await _count(disk)).missing == [0, 0, 1, 1]


async def test_the_store_is_asked_seldom_and_never_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking again asks nothing; of a store in too many pieces the rest counts as data."""
    monkeypatch.setattr(chunk_map_info, "MAX_RUNS", 3)
    image = _Sparse([(4 * n * CHUNK_SIZE, (4 * n + 1) * CHUNK_SIZE) for n in range(5)], 20 * CHUNK_SIZE)
    disk = TrackedDisk(image)
    maps = ChunkMaps()
    for _ in range(3):
        counted = await maps.count(disk, None, 20, is_filling=False)
    assert image.n_asked == 1
    assert counted.allocated == [1, 0, 0, 0] + [1] * 16


async def test_a_disk_of_16_tib_is_counted_in_steps() -> None:
    """Others run meanwhile, more than once for each cell that costs much; a disk without a size has an empty map."""
    size = 16 << 40
    disk = TrackedDisk(_Vast(size))
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count_turns)
        counted = await _count(disk, None, 512)
        nursery.cancel_scope.cancel()
    assert turns > 256
    assert (counted.chunks, sum(counted.allocated)) == (n_chunks(size), n_chunks(size))
    empty = await _count(TrackedDisk(MemoryDisk("vda", 0)))
    assert (empty.chunks, empty.hole) == (0, [])


class _Vast(MemoryDisk):
    """A disk that holds nothing and says that it is full."""

    def __init__(self, size: int) -> None:
        super().__init__("vda", 0)
        self.size = size

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        yield Extent(offset, length, is_data=True)
