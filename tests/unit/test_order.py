"""The bulk phase in order of heat: everything once, hot chunks last, and what heat changes meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from fusemig.core.units import CHUNK_SIZE
from fusemig.disk.memory import MemoryDisk
from fusemig.disk.tracked import TrackedDisk
from fusemig.migration.link import BufferPool
from fusemig.migration.order import HeatOrder
from fusemig.migration.reader import OutgoingDisk, PassReader

if TYPE_CHECKING:
    from collections.abc import Callable


class FixedLevels:
    """Heat that stays."""

    def __init__(self, levels: list[int]) -> None:
        self.levels = levels

    def level(self, chunk: int) -> int:
        return self.levels[chunk]


def send(
    levels: list[list[int]], between: Callable[[int, int], None] = lambda _disk, _chunk: None
) -> list[tuple[int, int]]:
    """Send whole disks with these levels; return disks and chunks as they were taken."""
    disks = []
    for index, each in enumerate(levels):
        memory = MemoryDisk(str(index), len(each) * CHUNK_SIZE)
        memory.content[:] = b"x" * len(memory.content)
        disk = TrackedDisk(memory)
        disks.append(OutgoingDisk(index, disk, disk.start_tracking()))
        disks[-1].find_allocated()
    reader, taken = PassReader(disks, BufferPool()), []
    reader.begin_pass(HeatOrder([(FixedLevels(each), len(each) * CHUNK_SIZE) for each in levels]))
    while (batch := reader.read_batch(1)) is not None:
        for frame in batch.frames:
            for chunk in frame.chunks:
                taken.append((frame.disk.index, chunk))
                between(frame.disk.index, chunk)
            frame.disk.tracking.acknowledge(frame.chunks)
    return taken


LEVELS = st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=6), min_size=1, max_size=3)


@given(LEVELS)
def test_everything_once_and_coldest_first(levels: list[list[int]]) -> None:
    """Sorted by level, then by place."""
    everything = [(disk, chunk) for disk, each in enumerate(levels) for chunk in range(len(each))]
    assert send(levels) == sorted(everything, key=lambda place: (levels[place[0]][place[1]], place))


@given(LEVELS, st.data())
def test_heat_that_changes_loses_nothing(levels: list[list[int]], data: st.DataObject) -> None:
    """Whatever chunks become hot or cold while the pass runs, each is sent once in it."""

    def change(_disk: int, _chunk: int) -> None:
        one = data.draw(st.sampled_from(levels))
        one[data.draw(st.integers(0, len(one) - 1))] = data.draw(st.integers(0, 8))

    taken = send(levels, change)
    assert sorted(taken) == [(disk, chunk) for disk, each in enumerate(levels) for chunk in range(len(each))]


def test_what_is_written_behind_the_cursor_waits_for_the_next_pass() -> None:
    """A chunk that was sent and is dirty again is not sent a second time by a later sweep."""
    levels = [[0, 3, 5]]
    memory = MemoryDisk("a", 3 * CHUNK_SIZE)
    memory.content[:] = b"x" * len(memory.content)
    disk = TrackedDisk(memory)
    outgoing = OutgoingDisk(0, disk, disk.start_tracking())
    outgoing.find_allocated()
    reader = PassReader([outgoing], BufferPool())
    reader.begin_pass(HeatOrder([(FixedLevels(levels[0]), disk.size)]))
    taken: list[int] = []
    while (batch := reader.read_batch(1)) is not None:
        for frame in batch.frames:
            taken += frame.chunks
            outgoing.tracking.acknowledge(frame.chunks)
            disk.pwrite(b"y" * 512, frame.chunks[0] * CHUNK_SIZE)
    assert taken == [0, 1, 2]
    assert outgoing.tracking.dirty_chunks == 3
