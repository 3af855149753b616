"""ChunkTracker against two sets of blocks; each rule of tracking as far as the tracker keeps it."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fusemig.core.tracker import ChunkTracker
from fusemig.core.units import BLOCK_SIZE, BLOCKS_PER_CHUNK, CHUNK_SIZE, chunk_mask, n_blocks, n_chunks

ODD = 5 * CHUNK_SIZE + 1536
SIZES = [512, BLOCK_SIZE, CHUNK_SIZE - 512, CHUNK_SIZE, ODD, 5 * CHUNK_SIZE + BLOCK_SIZE + 512]


class TrackerMachine(RuleBasedStateMachine):
    """What is dirty and what is in flight, block by block."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 512
        self.tracker = ChunkTracker(512)
        self.dirty: set[int] = set()
        self.in_flight: dict[int, set[int]] = {}

    @initialize(size=st.sampled_from(SIZES))
    def make(self, size: int) -> None:
        self.size = size
        self.tracker = ChunkTracker(size)

    def blocks_of(self, chunk: int) -> set[int]:
        return set(range(chunk * BLOCKS_PER_CHUNK, min((chunk + 1) * BLOCKS_PER_CHUNK, n_blocks(self.size))))

    @rule(data=st.data())
    def mark(self, data: st.DataObject) -> None:
        offset = data.draw(st.integers(0, self.size))
        length = data.draw(st.integers(0, self.size - offset) | st.integers(0, min(8192, self.size - offset)))
        self.tracker.mark(offset, length)
        if length:
            self.dirty |= set(range(offset // BLOCK_SIZE, (offset + length - 1) // BLOCK_SIZE + 1))

    @rule(data=st.data())
    def mark_chunks(self, data: st.DataObject) -> None:
        first = data.draw(st.integers(0, n_chunks(self.size)))
        stop = data.draw(st.integers(0, n_chunks(self.size)))
        self.tracker.mark_chunks(first, stop)
        for chunk in range(first, stop):
            self.dirty |= self.blocks_of(chunk)

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        chunk = data.draw(st.integers(0, n_chunks(self.size) - 1))
        if chunk in self.in_flight:
            with pytest.raises(AssertionError):
                self.tracker.take(chunk)
            return
        taken = self.dirty & self.blocks_of(chunk)
        assert self.tracker.take(chunk) == sum(1 << block % BLOCKS_PER_CHUNK for block in taken)
        self.dirty -= taken
        if taken:
            self.in_flight[chunk] = taken

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        chunk = data.draw(st.sampled_from(sorted(self.in_flight)))
        self.tracker.acknowledge(chunk)
        del self.in_flight[chunk]

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        chunk = data.draw(st.sampled_from(sorted(self.in_flight)))
        self.tracker.restore(chunk)
        self.dirty |= self.in_flight.pop(chunk)

    @rule()
    def restore_all(self) -> None:
        self.tracker.restore_all()
        self.dirty.update(*self.in_flight.values())
        self.in_flight.clear()

    @rule(start=st.integers(0, 7))
    def search(self, start: int) -> None:
        chunks = {block // BLOCKS_PER_CHUNK for block in self.dirty}
        assert self.tracker.next_dirty(start) == min((chunk for chunk in chunks if chunk >= start), default=None)

    @invariant()
    def agrees(self) -> None:
        tracker, last = self.tracker, n_blocks(self.size) - 1
        short = n_blocks(self.size) * BLOCK_SIZE - self.size
        assert tracker.dirty_chunks == len({block // BLOCKS_PER_CHUNK for block in self.dirty})
        assert tracker.in_flight_chunks == len(self.in_flight)
        assert tracker.dirty_bytes == len(self.dirty) * BLOCK_SIZE - (short if last in self.dirty else 0)
        assert tracker.in_flight_bytes == sum(map(len, self.in_flight.values())) * BLOCK_SIZE
        assert tracker.is_clean == (not self.dirty and not self.in_flight)
        assert tracker.is_clean == (tracker.pending_bytes == 0)
        for chunk in range(n_chunks(self.size)):
            assert tracker.is_in_flight(chunk) == (chunk in self.in_flight)
            mask = sum(1 << block % BLOCKS_PER_CHUNK for block in self.dirty & self.blocks_of(chunk))
            assert tracker.dirty_mask(chunk) == mask


TestTracker = TrackerMachine.TestCase
TestTracker.settings = settings(max_examples=60, stateful_step_count=40, derandomize=True)


def test_a_write_after_the_taking_stays(  # rule 2
) -> None:
    """What was marked after `take` survives the acknowledgement of what was taken before."""
    tracker = ChunkTracker(ODD)
    tracker.mark(0, CHUNK_SIZE)
    assert tracker.take(0) == chunk_mask(0, ODD)
    tracker.mark(BLOCK_SIZE, 1)
    tracker.acknowledge(0)
    assert tracker.dirty_mask(0) == 0b10
    assert not tracker.is_clean


def test_a_chunk_in_flight_is_not_taken_again() -> None:  # rule 4
    """Taking a chunk twice is a bug of the caller and noticed as one."""
    tracker = ChunkTracker(ODD)
    tracker.mark(0, 1)
    tracker.take(0)
    tracker.mark(0, 1)
    with pytest.raises(AssertionError, match="chunk 0 is in flight"):
        tracker.take(0)


def test_what_did_not_arrive_joins_what_was_written_since() -> None:
    """Restoring neither loses old blocks nor new ones."""
    tracker = ChunkTracker(ODD)
    tracker.mark(0, 1)
    tracker.take(0)
    tracker.mark(7 * BLOCK_SIZE, 1)
    tracker.restore(0)
    assert tracker.dirty_mask(0) == 0b10000001


def test_a_large_disk_costs_what_is_dirty() -> None:
    """16 TiB: one dirty block is 4 KiB to send, found from the start."""
    tracker = ChunkTracker(16 << 40)
    tracker.mark((16 << 40) - 1, 1)
    assert tracker.next_dirty(0) == (16 << 20) - 1
    assert tracker.pending_bytes == BLOCK_SIZE
