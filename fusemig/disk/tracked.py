"""TrackedDisk: the guest's side of a disk, where writes are admitted and marked.

    guest (a FUSE lane) ──pwrite──> TrackedDisk ──> image
                                     │   ├─ notes ──> `written` map, persistent maps (`fusemig.disk.dirty_map`)
                                     │   └─ marks ──> trackers of running migrations
                                     └─ write gate: open · closed (park) · read-only (EROFS)

One lock guards the gate's state, the admission count and every map, so a write is marked *in the step that admits it*;
it is marked again in the step that ends it, also if the store failed, unless nothing was taken for sending in between
(rule 1 of `fusemig.tracker`). The lock is held for microseconds and never during I/O. Reads never take it.

Persistent maps. Before a write is admitted its chunks are *noted* in every persistent map, without the lock as that
writes to a file; ``_noted_bits`` are the chunks that all maps have, so it costs one look in the usual case. `begin_map`
empties a map under a running guest: the notes of writes that began before it would be lost, so it waits for their end.

The write gate. A closed gate refuses a write with `GateClosedError`, and nothing has happened to it: the lane *parks*
it, that is, keeps the data and asks `park` for a call when the gate has changed. A parked write is data held for a
later reply, never a blocked thread. Whoever closes the gate owes every parked write an answer before a deadline.

A disk that is *held* (QMP's `stop`) keeps its gate closed where it would be open. That is a second, independent wish:
no migration that thaws, takes over or hands off undoes it, and lifting it never opens a gate that is closed or
read-only for another reason.
"""

from __future__ import annotations

import errno
import threading
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

import structlog

from fusemig.bitmap import ChunkBitmap
from fusemig.disk.base import Disk
from fusemig.disk.zeroes import DetectZeroes, is_zero_blocks
from fusemig.errors import DiskError, GateClosedError
from fusemig.tracker import ChunkTracker
from fusemig.units import CHUNK_SIZE, chunks_of, n_chunks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fusemig.disk.base import Buffer, Extent
    from fusemig.disk.dirty_map import DirtyMap, MapBase

log = structlog.get_logger(__name__)

_CHUNK_SHIFT: Final = CHUNK_SIZE.bit_length() - 1

MAX_PARKED_WRITES: Final = 1024
"""Parked writes per disk; further ones are answered EAGAIN so that one frozen disk cannot starve the others."""


class Gate(Enum):
    """What happens to a guest's write."""

    OPEN = "open"
    """It is admitted."""
    CLOSED = "closed"
    """It is parked until the gate changes: the disk is frozen for a switchover, or held."""
    READ_ONLY = "read-only"
    """It is answered EROFS: the disk is not (yet, or no longer) ours to write."""


_OFF: Final = DetectZeroes.OFF
_OPEN: Final = Gate.OPEN
"""Every write looks at it twice, and a member of an enumeration is found slowly."""


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


class TrackedDisk(Disk):
    """The layer that guests write through.

    The migration reads and writes `image`, the layer below, directly: its own traffic is neither gated nor marked.
    """

    def __init__(self, image: Disk, *, gate: Gate = Gate.OPEN, detect_zeroes: DetectZeroes = DetectZeroes.OFF) -> None:
        """Lay the guest's side over ``image``; `close` closes the image too."""
        self.image = image
        self._detect_zeroes = detect_zeroes
        self.name = image.name
        self._lock = threading.Lock()
        self._drained = threading.Condition(self._lock)
        # Guarded by _lock:
        self._gate = gate
        self._gate_unheld = gate
        self._is_held = False
        self._n_writing = 0
        self._parked: list[Callable[[], None]] = []
        self._trackers: tuple[ChunkTracker, ...] = ()
        self._n_taken = 0
        """Counts what makes marks disappear from a tracker, or a tracker appear without them."""
        self._written = ChunkBitmap(n_chunks(image.size))
        self._zeroed = ChunkBitmap(n_chunks(image.size))
        self._maps: tuple[DirtyMap, ...] = ()
        self._noted_bits = bytearray((n_chunks(image.size) >> 3) + 1)
        """Chunks that `_written` and every one of `_maps` have, as bits; so that the usual case costs one look."""
        self._begun_at = 0
        """What `_n_taken` was when `_noted_bits` was last emptied."""
        self._n_old = 0
        """Writes that were admitted before that and have not ended."""
        self._bytes_written = 0
        self._n_writes = 0
        self._highest_written = 0
        # Not guarded, because reads take no lock; two threads that meet may count once, and only people look at these:
        self._bytes_read = 0
        self._n_reads = 0
        self._n_flushes = 0

    @property
    def size(self) -> int:  # type: ignore[override]
        """Size in bytes; 0 for a destination's image whose source has not come yet."""
        return self.image.size

    # The guest's requests

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from the image; never gated."""
        self.image.pread_into(buffer, offset)
        self._bytes_read += len(buffer)
        self._n_reads += 1

    def pread_nowait(self, buffer: memoryview, offset: int) -> bool:
        """Fill ``buffer`` if that does not sleep; never gated."""
        if not self.image.pread_nowait(buffer, offset):
            return False
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
        n_taken = self._admit(offset, length)
        try:
            if self._detect_zeroes is _OFF or not is_zero_blocks(data, offset):
                self.image.pwrite(data, offset)
            elif self._detect_zeroes is DetectZeroes.UNMAP:
                self._note_zeroed(offset, length)
                self.image.write_zeroes(offset, length)
            else:
                self.image.zero_allocated(offset, length)
        finally:
            self._end(offset, length, n_taken)

    def waits_for_peer(self, offset: int, length: int, *, is_write: bool) -> bool:
        """Ask the image."""
        return self.image.waits_for_peer(offset, length, is_write=is_write)

    def write_zeroes(self, offset: int, length: int) -> None:
        """Admit, mark, zero, mark again; raises as `pwrite` does."""
        n_taken = self._admit(offset, length)
        try:
            self._note_zeroed(offset, length)
            self.image.write_zeroes(offset, length)
        finally:
            self._end(offset, length, n_taken)

    def _note_zeroed(self, offset: int, length: int) -> None:
        touched = chunks_of(offset, length)
        with self._lock:
            self._zeroed.set_range(touched.start, touched.stop)

    def was_zeroed(self, chunk: int) -> bool:
        """Tell whether guests made holes in a chunk since the disk was opened; it may be full again."""
        return self._zeroed[chunk]

    def flush(self) -> None:
        """Make finished writes durable; never gated, so that a frozen guest's fsync is answered."""
        self.image.flush()
        self._n_flushes += 1

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

    def _admit(self, offset: int, length: int) -> int:
        """Admit a write and mark it; whoever calls this owes an `_end` and what this returned.

        The two are plain calls because every guest write makes them: a context manager would cost as much as the write.
        """
        end = offset + length
        if offset < 0 or end > self.image.size:
            self.check_range(offset, length)
        first = offset >> _CHUNK_SHIFT
        while True:
            with self._lock:
                if self._gate is not _OPEN:
                    self._refuse(offset, length)
                if (
                    self._noted_bits[first >> 3] >> (first & 7) & 1 and end <= first + 1 << _CHUNK_SHIFT
                ) or self._is_noted(offset, length):
                    self._n_writing += 1
                    if self._trackers:
                        for tracker in self._trackers:
                            tracker.mark(offset, length)
                    return self._n_taken
            self._note(offset, length)

    def _end(self, offset: int, length: int, n_taken: int) -> None:
        """Mark a write again and count it out.

        The marks of `_admit` are all there if nothing was taken and no tracker was attached since, so in the usual case
        there is nothing to mark.
        """
        with self._lock:
            if self._n_taken != n_taken:
                for tracker in self._trackers:
                    tracker.mark(offset, length)
                if n_taken < self._begun_at:
                    self._n_old -= 1
                    self._drained.notify_all()
            self._bytes_written += length
            self._n_writes += 1
            if offset + length > self._highest_written:
                self._highest_written = offset + length
            self._n_writing -= 1
            if not self._n_writing and self._gate is not _OPEN:
                self._drained.notify_all()

    def _is_noted(self, offset: int, length: int) -> bool:
        noted = self._noted_bits
        return all(noted[chunk >> 3] >> (chunk & 7) & 1 for chunk in chunks_of(offset, length))

    def _note(self, offset: int, length: int) -> None:
        """Note a write that has not been admitted in every map; it may be noted and then be refused or parked."""
        touched = chunks_of(offset, length)
        with self._lock:
            begun_at, maps = self._begun_at, self._maps
        for one in maps:
            try:
                one.note(touched.start, touched.stop)
            except DiskError as exc:
                self._drop_map(one, exc)
        with self._lock:
            if self._begun_at != begun_at:
                return  # a map was emptied meanwhile: once more
            self._written.set_range(touched.start, touched.stop)
            noted = self._noted_bits
            for chunk in touched:
                noted[chunk >> 3] |= 1 << (chunk & 7)

    def _drop_map(self, dropped: DirtyMap, reason: DiskError) -> None:
        """Go on without a map that cannot be written.

        Raises:
            DiskError: it might be believed after a restart, so nothing that it does not know of may be written.
        """
        log.warning("the map of written chunks is lost; after a restart contents are compared", reason=str(reason))
        try:
            dropped.drop()
        except DiskError as exc:
            raise exc from reason
        with self._lock:
            self._maps = tuple(one for one in self._maps if one is not dropped)

    def _refuse(self, offset: int, length: int) -> None:
        if self._gate is Gate.CLOSED:
            why = "frozen" if self._gate_unheld is Gate.CLOSED else "stopped"
            raise GateClosedError(errno.EAGAIN, f"disk '{self.name}' is {why}", offset, length)
        raise DiskError(errno.EROFS, f"write to disk '{self.name}'", offset, length)

    def park(self, resume: Callable[[], None]) -> bool:
        """Have ``resume`` called once when the gate changes; return False if it has changed already.

        ``resume`` is called on the thread that changes the gate, must be quick and must not raise. The caller then
        makes its write again, as if it were new. A write that is answered before that gives its place back: `unpark`.

        Raises:
            DiskError: EAGAIN, too many writes are parked already.
        """
        with self._lock:
            if self._gate is not Gate.CLOSED:
                return False
            if len(self._parked) >= MAX_PARKED_WRITES:
                raise DiskError(errno.EAGAIN, f"disk '{self.name}' has {MAX_PARKED_WRITES} parked writes")
            self._parked.append(resume)
            return True

    def unpark(self, resume: Callable[[], None]) -> None:
        """Give the place of a parked write back: it was answered, ``resume`` need not be called any more.

        The gate may have changed meanwhile; then ``resume`` has been called, or is about to be.
        """
        with self._lock:
            if resume in self._parked:
                self._parked.remove(resume)

    # The gate, for the migration and the daemon

    @property
    def gate(self) -> Gate:
        """What happens to a guest's write at this moment."""
        return self._gate

    @property
    def is_frozen(self) -> bool:
        """Whether the gate is closed for a switchover, held or not."""
        return self._gate_unheld is Gate.CLOSED

    @property
    def is_held(self) -> bool:
        """Whether the gate is kept from being open."""
        return self._is_held

    def set_gate(self, gate: Gate) -> None:
        """Change the gate and have every parked write tried again.

        Once the gate is closed no write is admitted; those admitted before may still be running: `wait_drained`. Of a
        disk that is held, an open gate is closed until that is lifted.
        """
        with self._lock:
            self._gate_unheld = gate
            parked = self._change_gate()
        for resume in parked:
            resume()

    def set_held(self, is_held: bool) -> None:
        """Keep the gate from being open, or lift that."""
        with self._lock:
            self._is_held = is_held
            parked = self._change_gate()
        for resume in parked:
            resume()

    def _change_gate(self) -> list[Callable[[], None]]:
        """Bring the gate in line with both wishes; return the parked writes that are to be tried again."""
        is_stopped = self._is_held and self._gate_unheld is Gate.OPEN
        self._gate = Gate.CLOSED if is_stopped else self._gate_unheld
        if self._gate is Gate.CLOSED:
            return []
        parked, self._parked = self._parked, []
        return parked

    def wait_drained(self, timeout_s: float) -> bool:
        """Wait until no admitted write is running; False if one still is after ``timeout_s`` seconds."""
        with self._lock:
            return self._drained.wait_for(lambda: self._n_writing == 0, timeout_s)

    @property
    def parked_writes(self) -> int:
        """How many writes wait for the gate."""
        return len(self._parked)

    def replace_image(self, image: Disk) -> None:
        """Put another layer of the same bytes below; requests that are under way end in the former one."""
        self.image = image

    # Persistent maps, for the migration and the daemon

    def attach_map(self, one: DirtyMap) -> None:
        """Note every write from now on in a map that knows all earlier ones; before guests may write."""
        with self._lock:
            self._maps = (*self._maps, one)
            self._forget_notes()

    def begin_map(self, one: DirtyMap, base: MapBase, timeout_s: float) -> bool:
        """Empty a map and have it tell what is written from now on; may sleep.

        Returns:
            False: a write that began before has not ended after ``timeout_s`` seconds, and the map has no base.

        Raises:
            DiskError: the map cannot be written; it has no base.
        """
        one.begin()
        with self._lock:
            if one not in self._maps:
                self._maps = (*self._maps, one)
            self._forget_notes()
            if not self._drained.wait_for(lambda: self._n_old == 0, timeout_s):
                return False
        one.seal(base)
        return True

    def _forget_notes(self) -> None:
        self._noted_bits = bytearray(len(self._noted_bits))
        self._n_taken += 1
        self._begun_at = self._n_taken
        self._n_old = self._n_writing

    # Tracking, for the migration

    def start_tracking(self) -> Tracking:
        """Attach a tracker, with nothing dirty yet; from now on every write is marked in it."""
        tracker = ChunkTracker(self.size)
        with self._lock:
            self._trackers = (*self._trackers, tracker)
            self._n_taken += 1
        return Tracking(self, self._lock, tracker)

    def take_next(self, tracker: ChunkTracker, start: int) -> tuple[int, int] | None:
        """Take a tracker's first dirty chunk at or after ``start`` that is not in flight; return it with its mask."""
        with self._lock:
            chunk = tracker.next_dirty(start)
            while chunk is not None and tracker.is_in_flight(chunk):
                chunk = tracker.next_dirty(chunk + 1)
            if chunk is None:
                return None
            self._n_taken += 1
            return chunk, tracker.take(chunk)

    def stop_tracking(self, tracker: ChunkTracker) -> None:
        """Detach a tracker; the others are untouched."""
        with self._lock:
            self._trackers = tuple(other for other in self._trackers if other is not tracker)

    @property
    def written_chunks(self) -> int:
        """How many chunks guests have written since the disk was opened."""
        return self._written.count

    @property
    def bytes_written(self) -> int:
        """How many bytes guests have written since the disk was opened."""
        return self._bytes_written

    def statistics(self) -> DiskCounters:
        """Return what guests have done since the disk was opened."""
        with self._lock:
            return DiskCounters(
                read_bytes=self._bytes_read,
                n_reads=self._n_reads,
                written_bytes=self._bytes_written,
                n_writes=self._n_writes,
                n_flushes=self._n_flushes,
                highest_written=self._highest_written,
            )


class Tracking:
    """The migration's side of a tracked disk: every call is one short step under the disk's lock."""

    def __init__(self, disk: TrackedDisk, lock: threading.Lock, tracker: ChunkTracker) -> None:
        """Made by `TrackedDisk.start_tracking`."""
        self.disk = disk
        self._lock = lock
        self._tracker = tracker

    def mark_chunks(self, first: int, stop: int) -> None:
        """Mark chunks as wholes (the start of a migration)."""
        with self._lock:
            self._tracker.mark_chunks(first, stop)

    def mark(self, offset: int, length: int) -> None:
        """Mark a range that has to be sent again."""
        with self._lock:
            self._tracker.mark(offset, length)

    def take_next(self, start: int) -> tuple[int, int] | None:
        """Take the first dirty chunk at or after ``start`` that is not in flight; return it with its block mask."""
        return self.disk.take_next(self._tracker, start)

    def acknowledge(self, chunks: Sequence[int]) -> None:
        """Forget chunks in flight: the destination holds what was taken."""
        with self._lock:
            for chunk in chunks:
                self._tracker.acknowledge(chunk)

    def restore(self, chunk: int) -> None:
        """Make a chunk in flight dirty again: it could not be read or sent."""
        with self._lock:
            self._tracker.restore(chunk)

    def restore_all(self) -> None:
        """Make everything in flight dirty again: the connection is gone."""
        with self._lock:
            self._tracker.restore_all()

    def settle(self, chunk: int, unless: ChunkBitmap) -> bool:
        """Have a chunk count as sent unless guests wrote it, as a persistent map tells; return whether it does.

        In one step with the admission of writes, which are noted in the map before that: a write that the map does not
        tell of yet is marked after this.
        """
        with self._lock:
            if unless[chunk] or self._tracker.is_in_flight(chunk):
                return False
            if self._tracker.take(chunk):
                self._tracker.acknowledge(chunk)
            return True

    def next_dirty(self, start: int) -> int | None:
        """Return the first dirty chunk at or after ``start``; None where there is none."""
        with self._lock:
            return self._tracker.next_dirty(start)

    def next_clean(self, start: int) -> int:
        """Return the first chunk at or after ``start`` that is not dirty; beyond the disk where there is none."""
        with self._lock:
            return self._tracker.next_clean(start)

    def dirty_runs(self) -> list[tuple[int, int]]:
        """Return ``(first, stop)`` of each run of dirty 4 KiB blocks; for a closed gate, as it may take long."""
        with self._lock:
            return list(self._tracker.dirty_runs())

    def stop(self) -> None:
        """Detach from the disk; idempotent."""
        self.disk.stop_tracking(self._tracker)

    @property
    def dirty_bytes(self) -> int:
        """Bytes to be sent."""
        with self._lock:
            return self._tracker.dirty_bytes

    @property
    def dirty_chunks(self) -> int:
        """Chunks to be sent, wholly or in part."""
        return self._tracker.dirty_chunks

    @property
    def in_flight_chunks(self) -> int:
        """Chunks taken and not acknowledged."""
        return self._tracker.in_flight_chunks

    @property
    def pending_bytes(self) -> int:
        """Bytes to be sent or acknowledged."""
        with self._lock:
            return self._tracker.pending_bytes

    @property
    def is_clean(self) -> bool:
        """Whether the destination holds every byte that was ever marked."""
        with self._lock:
            return self._tracker.is_clean
