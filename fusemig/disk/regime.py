"""Admission: how a guest's write is let in and marked without a lock.

Everything that decides about a write is in one `Regime`, which is never changed, only replaced, under the lock. A
write, which takes no lock in the usual case, and whoever replaces the regime go opposite ways:

    write       read the regime · enter (append to ``inside``) · look whether it is still the regime · mark · store ·
                look again, and if it is not, mark once more · leave (pop) · look again, and if it is not, wake waiters
    the others  replace the regime · then look at ``inside``, or at the marks

Each step is one operation that Python makes as a whole (its documentation promises that of a deque's ends), so of two
that meet one sees the other's first step. A write that was not seen inside finds the regime replaced and begins anew.
So once the gate is closed and ``inside`` is empty no write is under way, nor will one be.

Marks. A write marks its blocks before it stores, and again after it, also if the store failed, unless the regime is
still the same (rule 1 of `fusemig.core.tracker`). Marks are bytes, one a block, in ``fresh`` by chunk. To move them
into the trackers, or to take a chunk, is: take the bytes out of ``fresh``, *replace the regime*, look at them, and only
then read the image. A mark that is set too late to be seen belongs to a write that read the regime before it was
replaced and has not looked again since: it will, and marks once more. A write that had looked again before that had set
its mark earlier, and all of it is in the image.

Notes. `begin_map` empties a persistent map under a running guest: the notes of writes that began before it would be
lost, so it waits for their end.

The lock guards the rest. It is held for microseconds and never during I/O.
"""

from __future__ import annotations

import errno
import threading
from collections import deque
from enum import Enum
from typing import TYPE_CHECKING, Final

from fusemig.core.units import BLOCK_SIZE, BLOCKS_PER_CHUNK, CHUNK_SIZE, n_chunks
from fusemig.disk.marks import DIRTY, Marks, mark_run
from fusemig.disk.notes import Notes, has_noted
from fusemig.errors import DiskError, GateClosedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fusemig.core.admission import Brake
    from fusemig.core.tracker import ChunkTracker
    from fusemig.disk.dirty_map import DirtyMap, MapBase

_CHUNK_SHIFT: Final = CHUNK_SIZE.bit_length() - 1
_BLOCK_SHIFT: Final = BLOCK_SIZE.bit_length() - 1
_IN_CHUNK: Final = BLOCKS_PER_CHUNK - 1


class Gate(Enum):
    """What happens to a guest's write."""

    OPEN = "open"
    """It is admitted."""
    CLOSED = "closed"
    """It is parked until the gate changes: the disk is frozen for a switchover, or held."""
    READ_ONLY = "read-only"
    """It is answered EROFS: the disk is not (yet, or no longer) ours to write."""


class Regime:
    """What goes for the writes that are admitted under it; never changed, only replaced by whoever holds the lock."""

    __slots__ = ("fresh", "gate", "inside", "is_open", "noted")

    def __init__(self, gate: Gate, inside: deque[None], noted: bytearray, fresh: dict[int, bytearray] | None) -> None:
        self.gate = gate
        self.is_open = gate is Gate.OPEN
        self.inside = inside
        """An item for each write that was admitted and has not ended."""
        self.noted = noted
        """`Notes.noted`; its bits are set under the lock."""
        self.fresh = fresh
        """`Marks.fresh`; its items, for noted chunks only, come and go under the lock."""


class Admission:
    """Who writes to a disk now, under which regime."""

    def __init__(self, name: str, size: int, gate: Gate) -> None:
        """Admit writes to the disk ``name`` of ``size`` bytes, as ``gate`` says."""
        self._name = name
        self.lock = threading.Lock()
        """The disk's."""
        self._left = threading.Condition(self.lock)
        """Notified when a write leaves a regime that was replaced."""
        self.notes = Notes(name, n_chunks(size), self.lock)
        # Guarded by `lock`:
        self.marks = Marks()
        self.brake: Brake | None = None
        self.on_waiting: Callable[[], None] = lambda: None
        """Called, without the lock, when a write or a reply begins to wait for the brake."""
        self._gate = gate
        self._why_closed = "frozen"
        self._inside: deque[None] = deque()
        self._old: list[deque[None]] = []
        """What ``_inside`` was before the notes were forgotten: writes that the newest map may not know."""
        # Written under `lock`:
        self._regime = Regime(gate, self._inside, self.notes.noted, self.marks.fresh)

    # A guest's write

    def admit(self, offset: int, length: int) -> Regime:
        """Admit a write within the disk and mark it; whoever calls this owes an `end` with what it returned.

        The two are plain calls because every guest write makes them: a context manager would cost as much as the write.

        Raises:
            GateClosedError: nothing happened; the write is to be parked.
            DiskError: EROFS where the disk is not ours to write, or a map's error.
        """
        end = offset + length
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
                        marks[~first & _IN_CHUNK] = DIRTY
                    else:
                        mark_run(marks, first & _IN_CHUNK, ((end - 1 >> _BLOCK_SHIFT) & _IN_CHUNK) + 1)
                    return regime
            is_noted = (
                regime.noted[chunk >> 3] >> (chunk & 7) & 1 if is_in_chunk else has_noted(regime.noted, offset, length)
            )
            if is_noted and self._mark(regime, offset, length, chunk if is_in_chunk else None):
                return regime
            self._leave(regime)
            if not is_noted:
                self.notes.note(offset, length)

    def _mark(self, regime: Regime, offset: int, length: int, chunk: int | None) -> bool:
        """Mark a noted write that is inside, in the trackers; return False if the regime was replaced meanwhile.

        The next write to ``chunk``, if that is the only one that it touches, may find bytes there to mark.
        """
        with self.lock:
            if self._regime is not regime:
                return False
            if self.brake is not None and not self.brake.admit(offset, length):
                regime.inside.pop()
                self._left.notify_all()
                raise self._not_now("paced", offset, length)
            self.marks.mark(offset, length)
            if chunk is not None and self.brake is None:
                self.marks.expect(chunk)
            return True

    def end(self, offset: int, length: int, regime: Regime) -> None:
        """Mark a write again, unless nobody can have missed the marks of `admit`, and let it leave."""
        if self._regime is not regime:
            with self.lock:
                self.marks.mark(offset, length)
        regime.inside.pop()  # `_leave`, spelled out
        if self._regime is not regime:
            with self.lock:
                self._left.notify_all()

    def _leave(self, regime: Regime) -> None:
        regime.inside.pop()
        if self._regime is not regime:
            with self.lock:
                self._left.notify_all()

    def _not_now(self, why: str, offset: int, length: int) -> GateClosedError:
        return GateClosedError(errno.EAGAIN, f"disk '{self._name}' is {why}", offset, length)

    def _refuse(self, gate: Gate, offset: int, length: int) -> None:
        if gate is Gate.CLOSED:
            raise self._not_now(self._why_closed, offset, length)
        raise DiskError(errno.EROFS, f"write to disk '{self._name}'", offset, length)

    # Those who replace the regime

    def _replace(self) -> None:
        """Have what is so now go for every write, so that those under way notice; under the lock."""
        self._regime = Regime(self._gate, self._inside, self.notes.noted, self.marks.fresh)

    @property
    def gate(self) -> Gate:
        """What happens to a guest's write at this moment."""
        return self._regime.gate

    def set_gate(self, gate: Gate, why_closed: str) -> None:
        """Change the gate; writes that are refused by a closed one are told why; under the lock."""
        self._gate, self._why_closed = gate, why_closed
        self._replace()

    def lay_brake(self, brake: Brake | None, on_waiting: Callable[[], None]) -> None:
        """Have a brake decide which writes are admitted, or none; under the lock.

        While one lies here every write is admitted, and marked in the trackers, under the lock: what the brake counts
        is never behind.
        """
        self.brake, self.on_waiting = brake, on_waiting
        self.absorb_all()
        self._replace()

    def wait_drained(self, timeout_s: float) -> bool:
        """Wait until no admitted write is running; False if one still is after ``timeout_s`` seconds.

        The gate is not open.
        """
        with self.lock:
            return self._left.wait_for(lambda: not self._inside and not any(self._old), timeout_s)

    def attach_map(self, one: DirtyMap) -> None:
        """Note every write from now on in a map that knows all earlier ones; before guests may write."""
        with self.lock:
            self.notes.add_map(one)
            self._forget_notes()

    def begin_map(self, one: DirtyMap, base: MapBase, timeout_s: float) -> bool:
        """Empty a map and have it tell what is written from now on; may sleep.

        Returns:
            False: a write that began before has not ended after ``timeout_s`` seconds, and the map has no base.

        Raises:
            DiskError: the map cannot be written; it has no base.
        """
        one.begin()
        with self.lock:
            self.notes.add_map(one)
            self._forget_notes()
            if not self._left.wait_for(lambda: not any(self._old), timeout_s):
                return False
        one.seal(base)
        return True

    def _forget_notes(self) -> None:
        self.absorb_all()
        self._old = [inside for inside in (*self._old, self._inside) if inside]
        self._inside = deque()
        self.notes.forget()
        self._replace()

    # The trackers of migrations

    def attach_tracker(self, tracker: ChunkTracker) -> None:
        """Mark every write from now on in a tracker too."""
        with self.lock:
            self._change_trackers((*self.marks.trackers, tracker))

    def detach_tracker(self, tracker: ChunkTracker) -> None:
        """Mark none in it any more; the others are untouched."""
        with self.lock:
            self._change_trackers(tuple(other for other in self.marks.trackers if other is not tracker))

    def has_tracker(self, tracker: ChunkTracker) -> bool:
        """Tell whether a tracker is attached."""
        return any(one is tracker for one in self.marks.trackers)

    def _change_trackers(self, trackers: tuple[ChunkTracker, ...]) -> None:
        self.absorb_all()
        self.marks.change(trackers)
        self._replace()

    def absorb(self, chunks: Iterable[int]) -> None:
        """Have the trackers know every mark of ``chunks``, and every write under way mark once more; under the lock."""
        taken = self.marks.take(chunks)
        self._replace()
        self.marks.move(taken)

    def absorb_all(self) -> None:
        """Have the trackers know every mark; under the lock."""
        if self.marks.fresh:
            self.absorb(self.marks.fresh)

    def note_taken(self, chunk: int) -> None:
        """Have the brake know that a chunk was taken, before it is read; under the lock."""
        if self.brake is not None:
            self.brake.note_taken(chunk)
