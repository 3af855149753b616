"""TrackedDisk: the guest's side of a disk, where writes are admitted, marked and counted.

    guest (a FUSE lane) ──pwrite──> TrackedDisk ──> image
                                     │   ├─ notes ──> `written` map, persistent maps (`fusemig.disk.notes`)
                                     │   └─ marks ──> trackers of running migrations (`fusemig.disk.marks`)
                                     └─ write gate: open · closed (park) · read-only (EROFS) (`fusemig.disk.gate`)

How a write is admitted and marked without a lock is `fusemig.disk.regime`'s. Reads never take a lock.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, NamedTuple

from fusemig.core.bitmap import ChunkBitmap
from fusemig.core.heat import Heat
from fusemig.core.tracker import ChunkTracker
from fusemig.core.units import chunks_of, n_chunks
from fusemig.disk.base import Disk
from fusemig.disk.gate import WriteGate
from fusemig.disk.regime import Admission
from fusemig.disk.regime import Gate as Gate
from fusemig.disk.tracking import Tracking
from fusemig.disk.zeroes import DetectZeroes, is_zero_blocks
from fusemig.errors import DiskError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fusemig.disk.base import Buffer, Extent
    from fusemig.disk.dirty_map import DirtyMap, MapBase

_OFF: Final = DetectZeroes.OFF
"""Every write looks at it, and a member of an enumeration is found slowly."""


class DiskCounters(NamedTuple):
    """Guests' requests since the disk was opened, failed writes included; bytes."""

    read_bytes: int
    n_reads: int
    written_bytes: int
    n_writes: int
    """Writes and zeroings."""
    n_flushes: int
    highest_written: int
    """Where the write that reached farthest ended."""
    n_failed_reads: int
    """By the store's own error; what the gate or the disk's end refused is not counted."""
    n_failed_writes: int
    n_failed_flushes: int


class TrackedDisk(Disk):
    """The layer that guests write through.

    The migration reads and writes `image`, the layer below, directly: its own traffic is neither gated nor marked.
    """

    def __init__(self, image: Disk, *, gate: Gate = Gate.OPEN, detect_zeroes: DetectZeroes = DetectZeroes.OFF) -> None:
        """Lay the guest's side over ``image``; `close` closes the image too."""
        self.image = image
        self._detect_zeroes = detect_zeroes
        self.name, self.size = image.name, image.size
        self.heat = Heat(self.size)
        """What guests write, for migrations to come; noted without the lock."""
        self._admission = Admission(self.name, self.size, gate)
        self.write_gate = WriteGate(self.name, self._admission)
        """For the lanes, which park at it."""
        self._zeroed = ChunkBitmap(n_chunks(self.size))
        self._zeroed_lock = threading.Lock()
        """Guards ``_zeroed``."""
        # Not guarded: two threads that meet may count once, and only people look at these.
        self._bytes_written = 0
        self._n_writes = 0
        self._highest_written = 0
        self._bytes_read = 0
        self._n_reads = 0
        self._n_flushes = 0
        self._n_failed_reads = 0
        self._n_failed_writes = 0
        self._n_failed_flushes = 0

    # The guest's requests

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from the image; never gated."""
        try:
            self.image.pread_into(buffer, offset)
        except DiskError:
            self._n_failed_reads += 1
            raise
        self._bytes_read += len(buffer)
        self._n_reads += 1

    def pread_nowait(self, buffer: memoryview, offset: int) -> bool:
        """Fill ``buffer`` if that does not sleep; never gated."""
        try:
            if not self.image.pread_nowait(buffer, offset):
                return False
        except DiskError:
            self._n_failed_reads += 1
            raise
        self._bytes_read += len(buffer)
        self._n_reads += 1
        return True

    def pwrite_may_sleep(self, offset: int, length: int) -> bool:
        """Ask the image."""
        return self.image.pwrite_may_sleep(offset, length)

    def write_may_sleep(self, data: Buffer, offset: int) -> bool:
        """Tell whether writing ``data`` may wait: as the image says, and always where it becomes a zeroing."""
        if self._detect_zeroes is not _OFF and is_zero_blocks(data, offset):
            return True
        return self.image.pwrite_may_sleep(offset, len(data))

    def pwrite(self, data: Buffer, offset: int) -> None:
        """Admit, mark, write, mark again.

        Raises:
            GateClosedError: nothing happened; park the write.
            DiskError: EROFS where the disk is not ours to write, EINVAL outside the disk, or the store's own error.
        """
        length = len(data)
        end = offset + length
        if offset < 0 or end > self.size:
            self.check_range(offset, length)
        regime = self._admission.admit(offset, length)
        try:
            if length:
                self.heat.note(offset, length)
            if self._detect_zeroes is _OFF or not is_zero_blocks(data, offset):
                self.image.pwrite(data, offset)
            elif self._detect_zeroes is DetectZeroes.UNMAP:
                self._note_zeroed(offset, length)
                self.image.write_zeroes(offset, length)
            else:
                self.image.zero_allocated(offset, length)
        except DiskError:
            self._n_failed_writes += 1
            raise
        finally:
            self._bytes_written += length
            self._n_writes += 1
            if end > self._highest_written:
                self._highest_written = end
            self._admission.end(offset, length, regime)

    def waits_for_peer(self, offset: int, length: int, *, is_write: bool) -> bool:
        """Ask the image."""
        return self.image.waits_for_peer(offset, length, is_write=is_write)

    def write_zeroes(self, offset: int, length: int) -> None:
        """Admit, mark, zero, mark again; raises as `pwrite` does."""
        self.check_range(offset, length)
        regime = self._admission.admit(offset, length)
        try:
            self._note_zeroed(offset, length)
            self.image.write_zeroes(offset, length)
        except DiskError:
            self._n_failed_writes += 1
            raise
        finally:
            self._bytes_written += length
            self._n_writes += 1
            if offset + length > self._highest_written:
                self._highest_written = offset + length
            self._admission.end(offset, length, regime)

    def _note_zeroed(self, offset: int, length: int) -> None:
        touched = chunks_of(offset, length)
        with self._zeroed_lock:
            self._zeroed.set_range(touched.start, touched.stop)

    def was_zeroed(self, chunk: int) -> bool:
        """Tell whether guests made holes in a chunk since the disk was opened; it may be full again."""
        return self._zeroed[chunk]

    def flush(self) -> None:
        """Make finished writes durable; never gated, so that a frozen guest's fsync is answered."""
        try:
            self.image.flush()
        except DiskError:
            self._n_failed_flushes += 1
            raise
        self._n_flushes += 1

    def drop_cache(self) -> None:
        """Have the image do it."""
        self.image.drop_cache()

    def check_in_place(self) -> None:
        """Ask the image."""
        self.image.check_in_place()

    @property
    def io_error(self) -> DiskError | None:
        """Ask the image."""
        return self.image.io_error

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield the image's allocation."""
        return self.image.extents(offset, length)

    def close(self) -> None:
        """Close the image."""
        self.image.close()

    # The gate, for the migration and the daemon

    @property
    def gate(self) -> Gate:
        """What happens to a guest's write at this moment."""
        return self._admission.gate

    @property
    def is_frozen(self) -> bool:
        """Whether the gate is closed for a switchover, held or not."""
        return self.write_gate.is_frozen

    def set_gate(self, gate: Gate) -> None:
        """Change the gate (`WriteGate.set`)."""
        self.write_gate.set(gate)

    def set_held(self, is_held: bool) -> None:
        """Keep the gate from being open, or lift that."""
        self.write_gate.set_held(is_held)

    def wait_drained(self, timeout_s: float) -> bool:
        """Wait until no admitted write is running (`Admission.wait_drained`)."""
        return self._admission.wait_drained(timeout_s)

    @property
    def parked_writes(self) -> int:
        """How many writes wait for the gate."""
        return self.write_gate.parked_writes

    @property
    def paced_writes(self) -> int:
        """How many writes wait for their turn."""
        return self.write_gate.paced_writes

    # For the migration and the daemon

    def replace_image(self, image: Disk) -> None:
        """Put another layer of the same bytes below; requests that are under way end in the former one."""
        self.image = image

    def attach_map(self, one: DirtyMap) -> None:
        """Note every write in a persistent map too (`Admission.attach_map`)."""
        self._admission.attach_map(one)

    def begin_map(self, one: DirtyMap, base: MapBase, timeout_s: float) -> bool:
        """Have a persistent map tell what is written from now on (`Admission.begin_map`); may sleep."""
        return self._admission.begin_map(one, base, timeout_s)

    def start_tracking(self) -> Tracking:
        """Attach a tracker, with nothing dirty yet; from now on every write is marked in it."""
        tracker = ChunkTracker(self.size)
        self._admission.attach_tracker(tracker)
        return Tracking(self._admission, self.write_gate, tracker)

    @property
    def written_chunks(self) -> int:
        """How many chunks guests have written since the disk was opened."""
        return self._admission.notes.n_written

    def written_bits(self, first: int, stop: int) -> int:
        """Return which of the chunks ``first`` to ``stop - 1`` guests have written since, as bits from ``first`` on."""
        return self._admission.notes.written_bits(first, stop)

    @property
    def bytes_written(self) -> int:
        """How many bytes guests have written since the disk was opened."""
        return self._bytes_written

    def statistics(self) -> DiskCounters:
        """Return what guests have done since the disk was opened."""
        return DiskCounters(
            read_bytes=self._bytes_read,
            n_reads=self._n_reads,
            written_bytes=self._bytes_written,
            n_writes=self._n_writes,
            n_flushes=self._n_flushes,
            highest_written=self._highest_written,
            n_failed_reads=self._n_failed_reads,
            n_failed_writes=self._n_failed_writes,
            n_failed_flushes=self._n_failed_flushes,
        )
