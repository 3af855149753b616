"""MirrorMap, as its tracker uses it: which chunks are in, what they owe, and in which order they go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusemig.core.mirror import Reach
from fusemig.core.tracker import ChunkTracker
from fusemig.core.units import BLOCK_SIZE, CHUNK_SIZE
from fusemig.disk.memory import MemoryDisk
from fusemig.disk.tracked import TrackedDisk
from fusemig.migration.link import BufferPool
from fusemig.migration.reader import OutgoingDisk, PassReader
from fusemig.wire import native

if TYPE_CHECKING:
    from fusemig.core.mirror import MirrorMap

SIZE = 4 * CHUNK_SIZE + 1536


def mirrored(reach: Reach) -> tuple[ChunkTracker, MirrorMap]:
    """Return a tracker with chunk 1 dirty and chunk 2 in flight, and its map."""
    tracker = ChunkTracker(SIZE)
    tracker.mark(CHUNK_SIZE, 2 * CHUNK_SIZE)
    tracker.take(2)
    return tracker, tracker.begin_mirror(reach)


def test_what_the_destination_has_is_in_at_once_only_if_all_is_mirrored() -> None:
    """What is dirty or in flight comes in with its acknowledgement, in either case."""
    for reach, expected in ((Reach.ALL, [0, 3, 4]), (Reach.HOT, [])):
        tracker, mirror = mirrored(reach)
        assert [chunk for chunk in range(5) if chunk in mirror] == expected
        tracker.acknowledge(2)
        tracker.take(1)
        assert 1 not in mirror
        tracker.acknowledge(1)
        assert 1 in mirror
        assert 2 in mirror
        assert mirror.pending_blocks == 0
        assert mirror.next_chunk() is None


def test_a_chunk_waits_where_it_was_first_dirtied_and_not_while_it_is_in_flight() -> None:
    """It is not taken again before it was acknowledged (rule 4)."""
    tracker, mirror = mirrored(Reach.ALL)
    tracker.mark(3 * CHUNK_SIZE, BLOCK_SIZE)
    tracker.mark(0, BLOCK_SIZE)
    tracker.mark(3 * CHUNK_SIZE, 2 * BLOCK_SIZE)
    assert mirror.pending_blocks == 3
    assert mirror.next_chunk() == 3
    tracker.take(3)
    assert mirror.next_chunk() == 0
    tracker.take(0)
    tracker.mark(3 * CHUNK_SIZE, BLOCK_SIZE)
    assert mirror.next_chunk() is None
    assert mirror.pending_blocks == 4
    tracker.acknowledge(3)
    assert mirror.next_chunk() == 3
    assert mirror.pending_blocks == 2
    tracker.restore_all()
    assert mirror.pending_blocks == 2
    tracker.take(3)
    assert mirror.next_chunk() == 0


def test_what_was_in_flight_and_did_not_arrive_waits_again_also_if_it_is_dirty_already() -> None:
    """Nobody would send it."""
    tracker, mirror = mirrored(Reach.ALL)
    tracker.mark(0, BLOCK_SIZE)
    tracker.take(0)
    tracker.mark(0, BLOCK_SIZE)
    tracker.restore(0)
    assert mirror.next_chunk() == 0
    assert mirror.pending_blocks == 1


def test_whole_chunks_are_left_to_the_passes() -> None:
    """A zeroing over many chunks; they come in again when they were sent."""
    tracker, mirror = mirrored(Reach.ALL)
    tracker.mark(3 * CHUNK_SIZE, BLOCK_SIZE)
    tracker.mark(CHUNK_SIZE // 2, 3 * CHUNK_SIZE)
    assert 0 in mirror  # it is written in part
    assert [chunk for chunk in range(5) if chunk in mirror] == [0, 3, 4]
    tracker.mark(0, SIZE)
    assert [chunk for chunk in range(5) if chunk in mirror] == [0, 4]
    assert mirror.pending_blocks == 256 + 1
    tracker.take(3)
    tracker.acknowledge(3)
    assert 3 in mirror


def test_holes_go_before_what_was_written_into_them_and_extents_ascend() -> None:
    """The destination applies frames as they come, and refuses extents that do not ascend."""
    disk = TrackedDisk(MemoryDisk("a", SIZE))
    outgoing = OutgoingDisk(0, disk, disk.start_tracking())
    outgoing.find_allocated()
    assert outgoing.holes
    outgoing.tracking.pacing.mirror(Reach.ALL, 0.0, lambda: None)
    for chunk in (3, 0, 2):
        disk.pwrite(b"x" * BLOCK_SIZE, chunk * CHUNK_SIZE)
    batch = PassReader([outgoing], BufferPool()).read_mirrored(CHUNK_SIZE)
    assert batch is not None
    decoder = native.Decoder(native.FROM_SOURCE, preface=False)
    frames = decoder.feed(b"".join(bytes(buffer) for buffer in batch.buffers))
    assert isinstance(frames[0], native.ZeroFrame)
    assert isinstance(frames[1], native.DataFrame)
    assert [offset // CHUNK_SIZE for offset, _ in frames[1].extents] == [0, 2, 3]
    assert len(frames) == 2
