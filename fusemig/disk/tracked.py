"""TrackedDisk: the guest's side of a disk, where writes are admitted and marked.

    guest (a FUSE lane) ──pwrite──> TrackedDisk ──> image
                                     │   ├─ notes ──> `written` map, persistent maps (`fusemig.disk.dirty_map`)
                                     │   └─ marks ──> trackers of running migrations
                                     └─ write gate: open · closed (park) · read-only (EROFS)

Admission without a lock. Everything that decides about a write is in one `_Regime`, which is never changed, only
replaced, under the lock. A write, which takes no lock in the usual case, and whoever replaces the regime go opposite
ways:

    write       read the regime · enter (append to ``inside``) · look whether it is still the regime · mark · store ·
                look again, and if it is not, mark once more · leave (pop) · look again, and if it is not, wake waiters
    the others  replace the regime · then look at ``inside``, or at the marks

Each step is one operation that Python makes as a whole (its documentation promises that of a deque's ends), so of two
that meet one sees the other's first step. A write that was not seen inside finds the regime replaced and begins anew.
So once the gate is closed and ``inside`` is empty no write is under way, nor will one be.

Marks without a lock. A write marks its blocks before it stores, and again after it, also if the store failed, unless
the regime is still the same (rule 1 of `fusemig.core.tracker`). Marks are bytes, one a block, in ``fresh`` by chunk. To
move them into the trackers, or to take a chunk, is: take the bytes out of ``fresh``, *replace the regime*, look at
them, and only then read the image. A mark that is set too late to be seen belongs to a write that read the regime
before it was replaced and has not looked again since: it will, and marks once more. A write that had looked again
before that had set its mark earlier, and all of it is in the image.

The lock guards the rest. It is held for microseconds and never during I/O. Reads never take it.

Persistent maps. Before a write is admitted its chunks are *noted* in every persistent map, without the lock as that
writes to a file; ``noted`` are the chunks that all maps have, so it costs one look in the usual case, and none where
``fresh`` has the chunk. `begin_map` empties a map under a running guest: the notes of writes that began before it would
be lost, so it waits for their end.

The write gate. A closed gate refuses a write with `GateClosedError`, and nothing has happened to it: the lane *parks*
it, that is, keeps the data and asks `park` for a call when the gate has changed. A parked write is data held for a
later reply, never a blocked thread. Whoever closes the gate owes every parked write an answer before a deadline.

A migration that guests write faster than it can follow lays a *brake* on the disk (`fusemig.core.admission`): an open
gate then refuses a write until its turn, which the lane parks as it does at a closed one, and `hold_reply` keeps the
answer of a write that was made until the destination has it.

A disk that is *held* (QMP's `stop`) keeps its gate closed where it would be open. That is a second, independent wish:
no migration that thaws, takes over or hands off undoes it, and lifting it never opens a gate that is closed or
read-only for another reason.
"""

from __future__ import annotations

import errno
import threading
from collections import deque
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

import structlog

from fusemig.core.bitmap import ChunkBitmap
from fusemig.core.heat import Heat
from fusemig.core.tracker import ChunkTracker
from fusemig.core.units import BLOCK_SIZE, BLOCKS_PER_CHUNK, CHUNK_SIZE, chunks_of, n_chunks
from fusemig.disk.base import Disk
from fusemig.disk.tracking import Tracking
from fusemig.disk.zeroes import DetectZeroes, is_zero_blocks
from fusemig.errors import DiskError, GateClosedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from fusemig.core.admission import Brake
    from fusemig.disk.base import Buffer, Extent
    from fusemig.disk.dirty_map import DirtyMap, MapBase

log = structlog.get_logger(__name__)

_CHUNK_SHIFT: Final = CHUNK_SIZE.bit_length() - 1
_BLOCK_SHIFT: Final = BLOCK_SIZE.bit_length() - 1
_IN_CHUNK: Final = BLOCKS_PER_CHUNK - 1
_CLEAN: Final = b"0" * BLOCKS_PER_CHUNK
"""The marks of a chunk are written as a number's digits, so that `int` reads them: the last one is block 0's."""
_DIRTY: Final = ord("1")

MAX_FRESH: Final = 1024
"""Chunks whose marks may wait to get into the trackers, half a KiB each; others are marked there, under the lock."""

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
"""Every write looks at it, and a member of an enumeration is found slowly."""


class _Regime:
    """What goes for the writes that are admitted under it; never changed, only replaced by whoever holds the lock."""

    __slots__ = ("fresh", "gate", "inside", "is_open", "noted")

    def __init__(self, gate: Gate, inside: deque[None], noted: bytearray, fresh: dict[int, bytearray] | None) -> None:
        self.gate = gate
        self.is_open = gate is Gate.OPEN
        self.inside = inside
        """An item for each write that was admitted and has not ended."""
        self.noted = noted
        """Chunks that the written map and every persistent map have, as bits; set under the lock."""
        self.fresh = fresh
        """The marks of noted chunks that no tracker has yet, a digit for each block; items come and go under the lock.
        None while nothing is tracked."""


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
        self.name = image.name
        self.heat = Heat(image.size)
        """What guests write, for migrations to come; noted without the lock."""
        self._lock = threading.Lock()
        self._left = threading.Condition(self._lock)
        """Notified when a write leaves a regime that was replaced."""
        # Written under _lock:
        self._regime = _Regime(gate, deque(), bytearray((n_chunks(image.size) >> 3) + 1), None)
        # Guarded by _lock:
        self._gate_unheld = gate
        self._is_held = False
        self._parked: list[Callable[[], None]] = []
        self._brake: Brake | None = None
        self._on_waiting: Callable[[], None] = lambda: None
        """Called, without the lock, when a write or a reply begins to wait for the brake."""
        self.holds_replies = False
        """Whether `hold_reply` is to be asked before a write is answered; read without the lock."""
        self._trackers: tuple[ChunkTracker, ...] = ()
        self._written = ChunkBitmap(n_chunks(image.size))
        self._zeroed = ChunkBitmap(n_chunks(image.size))
        self._maps: tuple[DirtyMap, ...] = ()
        self._old: list[deque[None]] = []
        """What `_Regime.inside` was before the notes were forgotten: writes that the newest map may not know."""
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

    @property
    def size(self) -> int:  # type: ignore[override]
        """Size in bytes; 0 for a destination's image whose source has not come yet."""
        return self.image.size

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
        regime = self._admit(offset, length)
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
            self._end(offset, length, regime)

    def waits_for_peer(self, offset: int, length: int, *, is_write: bool) -> bool:
        """Ask the image."""
        return self.image.waits_for_peer(offset, length, is_write=is_write)

    def write_zeroes(self, offset: int, length: int) -> None:
        """Admit, mark, zero, mark again; raises as `pwrite` does."""
        regime = self._admit(offset, length)
        try:
            self._note_zeroed(offset, length)
            self.image.write_zeroes(offset, length)
        except DiskError:
            self._n_failed_writes += 1
            raise
        finally:
            self._end(offset, length, regime)

    def _note_zeroed(self, offset: int, length: int) -> None:
        touched = chunks_of(offset, length)
        with self._lock:
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

    def _admit(self, offset: int, length: int) -> _Regime:
        """Admit a write and mark it; whoever calls this owes an `_end` with what it returned.

        The two are plain calls because every guest write makes them: a context manager would cost as much as the write.
        """
        end = offset + length
        if offset < 0 or end > self.image.size:
            self.check_range(offset, length)
        chunk = offset >> _CHUNK_SHIFT
        is_in_chunk = offset < end <= chunk + 1 << _CHUNK_SHIFT
        while True:
            regime = self._regime
            if not regime.is_open:
                self._refuse(regime.gate, offset, length)
            regime.inside.append(None)
            if self._regime is regime:
                if regime.fresh is None:
                    if is_in_chunk and regime.noted[chunk >> 3] >> (chunk & 7) & 1:
                        return regime
                elif is_in_chunk and (marks := regime.fresh.get(chunk)) is not None:
                    first = offset >> _BLOCK_SHIFT
                    if end <= first + 1 << _BLOCK_SHIFT:
                        marks[~first & _IN_CHUNK] = _DIRTY
                    else:
                        _mark_run(marks, first & _IN_CHUNK, ((end - 1 >> _BLOCK_SHIFT) & _IN_CHUNK) + 1)
                    return regime
            is_noted = (
                regime.noted[chunk >> 3] >> (chunk & 7) & 1 if is_in_chunk else _has_noted(regime.noted, offset, length)
            )
            if is_noted and self._mark(regime, offset, length, chunk if is_in_chunk else None):
                return regime
            self._leave(regime)
            if not is_noted:
                self._note(offset, length)

    def _mark(self, regime: _Regime, offset: int, length: int, chunk: int | None) -> bool:
        """Mark a noted write that is inside, in the trackers; return False if the regime was replaced meanwhile.

        The next write to ``chunk``, if that is the only one that it touches, may find bytes there to mark.
        """
        with self._lock:
            if self._regime is not regime:
                return False
            if self._brake is not None and not self._brake.admit(offset, length):
                regime.inside.pop()
                self._left.notify_all()
                raise self._not_now("paced", offset, length)
            self._mark_in_trackers(offset, length)
            fresh = regime.fresh
            if fresh is not None and chunk is not None and len(fresh) < MAX_FRESH and self._brake is None:
                fresh.setdefault(chunk, bytearray(_CLEAN))
            return True

    def _mark_in_trackers(self, offset: int, length: int) -> None:
        for tracker in self._trackers:
            tracker.mark(offset, length)

    def _end(self, offset: int, length: int, regime: _Regime) -> None:
        """Mark a write again, unless nobody can have missed the marks of `_admit`, and let it leave."""
        if self._regime is not regime:
            with self._lock:
                self._mark_in_trackers(offset, length)
        self._bytes_written += length
        self._n_writes += 1
        if offset + length > self._highest_written:
            self._highest_written = offset + length
        regime.inside.pop()  # `_leave`, spelled out
        if self._regime is not regime:
            with self._lock:
                self._left.notify_all()

    def _leave(self, regime: _Regime) -> None:
        regime.inside.pop()
        if self._regime is not regime:
            with self._lock:
                self._left.notify_all()

    def _note(self, offset: int, length: int) -> None:
        """Note a write that has not been admitted in every map; it may be noted and then be refused or parked."""
        touched = chunks_of(offset, length)
        with self._lock:
            noted, maps = self._regime.noted, self._maps
        for one in maps:
            try:
                one.note(touched.start, touched.stop)
            except DiskError as exc:
                self._drop_map(one, exc)
        with self._lock:
            self._written.set_range(touched.start, touched.stop)
            for chunk in touched:  # of the present notes, or of those that were forgotten meanwhile: then once more
                noted[chunk >> 3] |= 1 << (chunk & 7)

    def _drop_map(self, dropped: DirtyMap, reason: DiskError) -> None:
        """Go on without a map that cannot be written.

        Raises:
            DiskError: it might be believed after a restart, so nothing that it does not know of may be written.
        """
        log.warning(
            "the map of written chunks is lost; after a restart contents are compared",
            disk=self.name,
            reason=str(reason),
        )
        try:
            dropped.drop()
        except DiskError as exc:
            raise exc from reason
        with self._lock:
            self._maps = tuple(one for one in self._maps if one is not dropped)

    def _not_now(self, why: str, offset: int, length: int) -> GateClosedError:
        return GateClosedError(errno.EAGAIN, f"disk '{self.name}' is {why}", offset, length)

    def _refuse(self, gate: Gate, offset: int, length: int) -> None:
        if gate is Gate.CLOSED:
            why = "frozen" if self._gate_unheld is Gate.CLOSED else "stopped"
            raise self._not_now(why, offset, length)
        raise DiskError(errno.EROFS, f"write to disk '{self.name}'", offset, length)

    def park(self, resume: Callable[[], None], refused: GateClosedError) -> bool:
        """Have ``resume`` called once when the gate changes, or at the write's turn; False if it can be made already.

        ``resume`` is called on the thread that changes the gate or gives the turn, must be quick and must not raise.
        The caller then makes its write again, as if it were new. A write that is answered before that gives its place
        back: `unpark`.

        Args:
            resume: is called.
            refused: what the write was refused with, which says where it goes.

        Raises:
            DiskError: EAGAIN, too many writes are parked already.
        """
        with self._lock:
            if len(self._parked) + self.paced_writes >= MAX_PARKED_WRITES:
                raise DiskError(errno.EAGAIN, f"disk '{self.name}' has {MAX_PARKED_WRITES} parked writes")
            gate = self._regime.gate
            if gate is Gate.CLOSED:
                self._parked.append(resume)
                return True
            if gate is not Gate.OPEN or self._brake is None:
                return False
            if not self._brake.wait(resume, refused.offset, refused.length):
                return False
        self._on_waiting()
        return True

    def unpark(self, resume: Callable[[], None]) -> None:
        """Give the place of a parked write back: it was answered, ``resume`` need not be called any more.

        The gate may have changed meanwhile; then ``resume`` has been called, or is about to be.
        """
        with self._lock:
            if resume in self._parked:
                self._parked.remove(resume)
            elif self._brake is not None:
                self._brake.forget(resume)

    def hold_reply(self, offset: int, length: int, answer: Callable[[], None]) -> bool:
        """Have ``answer`` called when a write that has ended may be answered; False if it may be now.

        ``answer`` is called as `park`'s ``resume`` is, and must neither wait nor raise.
        """
        with self._lock:
            if self._brake is None or not self._brake.hold(offset, length, answer):
                return False
        self._on_waiting()
        return True

    @property
    def paced_writes(self) -> int:
        """How many writes wait for their turn."""
        return 0 if self._brake is None else self._brake.n_waiting

    # The gate, for the migration and the daemon

    @property
    def gate(self) -> Gate:
        """What happens to a guest's write at this moment."""
        return self._regime.gate

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
        gate = Gate.CLOSED if is_stopped else self._gate_unheld
        self._replace(gate=gate)
        if gate is Gate.CLOSED:
            return []
        parked, self._parked = self._parked, []
        if gate is Gate.READ_ONLY and self._brake is not None:
            parked += self._brake.release_waiting()
        return parked

    def _replace(self, *, gate: Gate | None = None) -> None:
        """Put another regime in the place of the present one, so that every write under way notices."""
        old = self._regime
        self._regime = _Regime(gate or old.gate, old.inside, old.noted, old.fresh)

    def wait_drained(self, timeout_s: float) -> bool:
        """Wait until no admitted write is running; False if one still is after ``timeout_s`` seconds.

        The gate is not open.
        """
        with self._lock:
            return self._left.wait_for(lambda: not self._regime.inside and not any(self._old), timeout_s)

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
            if not self._left.wait_for(lambda: not any(self._old), timeout_s):
                return False
        one.seal(base)
        return True

    def _forget_notes(self) -> None:
        self.absorb_all()
        old = self._regime
        self._old = [inside for inside in (*self._old, old.inside) if inside]
        self._regime = _Regime(old.gate, deque(), bytearray(len(old.noted)), old.fresh)

    # Tracking, for the migration

    def start_tracking(self) -> Tracking:
        """Attach a tracker, with nothing dirty yet; from now on every write is marked in it."""
        tracker = ChunkTracker(self.size)
        with self._lock:
            self._change_trackers((*self._trackers, tracker))
        return Tracking(self, self._lock, tracker)

    def stop_tracking(self, tracker: ChunkTracker) -> None:
        """Detach a tracker; the others are untouched."""
        with self._lock:
            self._change_trackers(tuple(other for other in self._trackers if other is not tracker))

    def is_marked_in(self, tracker: ChunkTracker) -> bool:
        """Tell whether a tracker is attached."""
        return any(one is tracker for one in self._trackers)

    def _change_trackers(self, trackers: tuple[ChunkTracker, ...]) -> None:
        self.absorb_all()
        self._trackers = trackers
        old = self._regime
        self._regime = _Regime(old.gate, old.inside, old.noted, {} if trackers else None)

    def absorb(self, chunks: Iterable[int]) -> None:
        """Have the trackers know every mark of ``chunks``, and every write under way mark once more; under the lock."""
        fresh = self._regime.fresh or {}
        taken = [(chunk, fresh.pop(chunk, None)) for chunk in list(chunks)]
        self._replace()
        for chunk, marks in taken:
            if marks is not None:
                mask = int(marks, 2)
                for tracker in self._trackers:
                    tracker.mark_blocks(chunk, mask)

    def absorb_all(self) -> None:
        """Have the trackers know every mark; under the lock."""
        if self._regime.fresh:
            self.absorb(self._regime.fresh)

    def lay_brake(self, brake: Brake | None, on_waiting: Callable[[], None] = lambda: None) -> None:
        """Have a brake decide from now on which writes are admitted, or none; the one before is to be released.

        While one lies here every write is admitted, and marked in the trackers, under the lock: what the brake counts
        is never behind.
        """
        with self._lock:
            self._brake, self._on_waiting = brake, on_waiting
            self.absorb_all()
            self._replace()
            self.holds_replies = brake is not None and brake.is_blocking

    def note_taken(self, chunk: int) -> None:
        """Have the brake know that a chunk was taken, before it is read; under the lock."""
        if self._brake is not None:
            self._brake.note_taken(chunk)

    @property
    def written_chunks(self) -> int:
        """How many chunks guests have written since the disk was opened."""
        return self._written.count

    def written_bits(self, first: int, stop: int) -> int:
        """Return which of the chunks ``first`` to ``stop - 1`` guests have written since, as bits from ``first`` on."""
        with self._lock:
            return self._written.bits(first, stop)

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
                n_failed_reads=self._n_failed_reads,
                n_failed_writes=self._n_failed_writes,
                n_failed_flushes=self._n_failed_flushes,
            )


def _has_noted(noted: bytearray, offset: int, length: int) -> bool:
    return all(noted[chunk >> 3] >> (chunk & 7) & 1 for chunk in chunks_of(offset, length))


def _mark_run(marks: bytearray, first: int, stop: int) -> None:
    """Mark blocks ``first`` to ``stop - 1`` of a chunk."""
    marks[BLOCKS_PER_CHUNK - stop : BLOCKS_PER_CHUNK - first] = b"1" * (stop - first)
