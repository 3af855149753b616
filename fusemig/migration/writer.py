"""FrameWriter: puts received frames into images; the synchronous half of the destination, run in worker threads.

A frame is checked against its hash and against the disk before a byte of it is written. One call runs at a time, so
frames reach the images and the digests in the order in which they were sent.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING

from fusemig.core.bitmap import ChunkBitmap
from fusemig.core.compression import unpack
from fusemig.core.digest import DiskDigest
from fusemig.core.units import BLOCK_SIZE, chunks_of, format_size, n_blocks, n_chunks
from fusemig.disk.overlay import OverlayDisk
from fusemig.errors import RemoteProtocolError
from fusemig.wire import native

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from fusemig.disk.base import Buffer
    from fusemig.disk.journal import ReceiptJournal
    from fusemig.disk.tracked import TrackedDisk
    from fusemig.migration.link import BufferPool
    from fusemig.records.epoch import EpochFile


@dataclass
class IncomingDisk:
    """What the daemon lends for one disk, and what is known of it."""

    disk: TrackedDisk
    epoch_file: EpochFile
    drop_pages: Callable[[], Awaitable[None]]
    """Has the kernel forget the pages that early readers cached."""
    open_journal: Callable[[], ReceiptJournal] | None = None
    """Opens where what is durable is kept; None: an interrupted migration begins anew. May sleep."""
    borrow: Callable[[Sequence[tuple[int, int]]], None] = lambda _missing: None
    """Takes note, durably, of the runs of 4 KiB blocks that have to be fetched once the disk is ours; may sleep."""
    end_loan: Callable[[], None] = lambda: None
    """Takes back what `borrow` did: the source keeps the disk. May sleep."""
    on_taken: Callable[[str], None] = lambda _session: None
    """Called when the disk is ours and before guests may write it, with the session; may sleep."""
    is_thin: bool = field(init=False, default=False)
    """Whether only what its overlay holds comes; the rest is the base's on both sides."""
    is_as_released: bool = False
    """Whether the image is, provably, what this side released in the migration that the offer names."""
    received_bytes: int = 0
    digest: DiskDigest = field(init=False)
    journal: ReceiptJournal | None = field(init=False, default=None)
    changed: ChunkBitmap = field(init=False)
    """Chunks that frames came for since the journal was last written."""

    def __post_init__(self) -> None:
        """Start with nothing received."""
        self.digest = DiskDigest(self.disk.size)
        self.changed = ChunkBitmap(n_chunks(self.disk.size))

    def note_found(self, chunk: int, value: int) -> None:
        """Note a chunk that is in the image already, with its value for the digest."""
        self.digest.restore(chunk, value)
        self.changed.set(chunk)

    def note_blocks_found(self, chunk: int, value: int, mask: int) -> None:
        """Note a chunk of which some blocks are in the image already, and its value for the digest as it is there."""
        self.digest.restore_blocks(chunk, value, mask)
        self.changed.set(chunk)

    def missing(self, to_fetch: Sequence[tuple[int, int]] = ()) -> str:
        """Describe the ranges that never came, for people; empty if none is missing.

        ``to_fetch`` are runs of blocks that need not have come, in ascending order.
        """
        ranges = [
            (offset, length)
            for offset, length in self.digest.missing()
            if not _is_within(offset // BLOCK_SIZE, n_blocks(offset + length), to_fetch)
        ]
        if not ranges:
            return ""
        shown = ", ".join(f"{offset}+{length}" for offset, length in ranges[:4])
        more = f" and {len(ranges) - 4} more" if len(ranges) > 4 else ""
        return (
            f"{format_size(sum(length for _, length in ranges))} of disk '{self.disk.name}' never came: {shown}{more}"
        )


def _is_within(first: int, stop: int, runs: Sequence[tuple[int, int]]) -> bool:
    """Tell whether the blocks ``first`` to ``stop - 1`` are all in ``runs``, of which neighbours may touch."""
    at = bisect_right(runs, first, key=itemgetter(0)) - 1
    while 0 <= at < len(runs) and runs[at][0] <= first < stop:
        first = max(first, runs[at][1])
        at += 1
    return first >= stop


class FrameWriter:
    """Applies frames to a fixed list of disks."""

    def __init__(self, disks: Sequence[IncomingDisk], pool: BufferPool) -> None:
        """Write to ``disks``, known by their index; give payload buffers back to ``pool``."""
        self._disks = disks
        self._pool = pool

    def apply(self, frame: native.Frame) -> int:
        """Write a frame; return how many bytes it carried.

        Raises:
            RemoteProtocolError: it is damaged or does not fit its disk; it was not written.
            DiskError: the store failed.
        """
        disk = self._disk_of(frame)
        if disk.journal is not None:
            for extent in frame.extents:
                touched = chunks_of(*extent)
                disk.changed.set_range(touched.start, touched.stop)
        if isinstance(frame, native.DataFrame | native.PackedFrame):
            return self._write(disk, frame)
        if isinstance(frame, native.BaseFrame):
            self._uncover(disk, frame)
            return 0
        for offset, length in frame.extents:
            disk.disk.image.write_zeroes(offset, length)
        disk.digest.apply_zero(frame.extents)
        return 0

    def _uncover(self, disk: IncomingDisk, frame: native.BaseFrame) -> None:
        """Have ranges read as the base: they do, unless the overlay holds blocks of an older copy there."""
        image = disk.disk.image
        if not disk.is_thin or not isinstance(image, OverlayDisk):
            raise RemoteProtocolError(f"frame {frame.sequence} is of a base that disk '{disk.disk.name}' has not")
        for offset, length in frame.extents:
            image.copy_base(offset, length)
        disk.digest.apply_base(frame.extents)

    def _disk_of(self, frame: native.Frame) -> IncomingDisk:
        if frame.disk >= len(self._disks):
            raise RemoteProtocolError(f"frame {frame.sequence} is for disk {frame.disk} of {len(self._disks)}")
        disk = self._disks[frame.disk]
        offset, length = frame.extents[-1]  # the extents ascend
        if offset + length > disk.disk.size:
            raise RemoteProtocolError(
                f"frame {frame.sequence} ends at {offset + length}, "
                f"beyond the {disk.disk.size} bytes of disk '{disk.disk.name}'"
            )
        return disk

    def _write(self, disk: IncomingDisk, frame: native.DataFrame | native.PackedFrame) -> int:
        payload: Buffer = frame.payload
        if isinstance(frame, native.PackedFrame):
            payload = unpack(frame.payload, frame.length)
            payload_hash = frame.verify(payload)
        else:
            payload_hash = frame.verify()
        image, at = disk.disk.image, 0
        for offset, length in frame.extents:
            image.pwrite(payload[at : at + length], offset)
            at += length
        disk.digest.apply_data(frame.extents, payload_hash)
        disk.received_bytes += at
        buffer = frame.payload.obj
        assert isinstance(buffer, bytearray)
        self._pool.give_back(buffer)
        return at
