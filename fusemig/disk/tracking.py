"""Tracking: the migration's side of a tracked disk, beside the guest's side in `fusemig.disk.tracked`.

The newest marks are not in the tracker yet. Whoever asks what is dirty has them moved there first; whoever takes a
chunk has its marks moved and every write under way mark once more, before the chunk is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusemig.disk.pacing import Pacing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fusemig.core.bitmap import ChunkBitmap
    from fusemig.core.tracker import ChunkTracker
    from fusemig.disk.gate import WriteGate
    from fusemig.disk.regime import Admission


class Tracking:
    """The migration's side of a tracked disk: every call is one short step under the disk's lock."""

    def __init__(self, admission: Admission, gate: WriteGate, tracker: ChunkTracker) -> None:
        """Made by `TrackedDisk.start_tracking`."""
        self._admission = admission
        self._lock = admission.lock
        self._tracker = tracker
        self.pacing = Pacing(gate, admission.lock, tracker)

    def _complete(self) -> ChunkTracker:
        """Return the tracker with every mark in it; under the lock, and for whoever asks what is dirty."""
        self._admission.absorb_all()
        return self._tracker

    def mark_chunks(self, first: int, stop: int) -> None:
        """Mark chunks as wholes (the start of a migration)."""
        with self._lock:
            self._tracker.mark_chunks(first, stop)

    def mark(self, offset: int, length: int) -> None:
        """Mark a range that has to be sent again."""
        with self._lock:
            self._tracker.mark(offset, length)

    def take_next(self, start: int) -> tuple[int, int] | None:
        """Take the first dirty chunk at or after ``start`` that is not in flight; return it with its block mask.

        A chunk that became dirty after a take at 0 may be left out, unless it is the last one.
        """
        with self._lock:
            if not start:
                self._admission.absorb_all()
            chunk = self._next_dirty(start)
            if chunk is None:
                self._admission.absorb_all()
                chunk = self._next_dirty(start)
                if chunk is None:
                    return None
            return chunk, self._take(chunk)

    def take_mirrored(self) -> tuple[int, int] | None:
        """Take the mirrored chunk that has been dirty for longest; return it with its block mask."""
        with self._lock:
            mirror = self._tracker.mirror
            chunk = None if mirror is None else mirror.next_chunk()
            return None if chunk is None else (chunk, self._take(chunk))

    def _take(self, chunk: int) -> int:
        self._admission.absorb([chunk])
        mask = self._tracker.take(chunk)
        self._admission.note_taken(chunk)
        return mask

    def _next_dirty(self, start: int) -> int | None:
        tracker = self._tracker
        chunk = tracker.next_dirty(start)
        while chunk is not None and tracker.is_in_flight(chunk):
            chunk = tracker.next_dirty(chunk + 1)
        return chunk

    def acknowledge(self, chunks: Sequence[int]) -> None:
        """Forget chunks in flight: the destination holds what was taken."""
        with self._lock:
            for chunk in chunks:
                self._tracker.acknowledge(chunk)
        self.pacing.note_acknowledged(chunks)

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
            self._admission.absorb([chunk])
            if unless[chunk] or self._tracker.is_in_flight(chunk):
                return False
            if self._tracker.take(chunk):
                self._tracker.acknowledge(chunk)
            return True

    def next_dirty(self, start: int) -> int | None:
        """Return the first dirty chunk at or after ``start``; None where there is none."""
        with self._lock:
            return self._complete().next_dirty(start)

    def next_clean(self, start: int) -> int:
        """Return the first chunk at or after ``start`` that is not dirty; beyond the disk where there is none."""
        with self._lock:
            return self._complete().next_clean(start)

    def chunks_in_flight(self) -> list[int]:
        """Return the chunks taken and not acknowledged, in ascending order; the tracker has every mark then."""
        with self._lock:
            return self._complete().chunks_in_flight()

    def dirty_bits(self, first: int, stop: int) -> int:
        """Return which of the chunks ``first`` to ``stop - 1`` are dirty, as bits from ``first`` on.

        The newest marks may be missing: to look at a whole disk piece by piece, `chunks_in_flight` comes first.
        """
        with self._lock:
            return self._tracker.dirty_bits(first, stop)

    def dirty_runs(self) -> list[tuple[int, int]]:
        """Return ``(first, stop)`` of each run of dirty 4 KiB blocks; for a closed gate, as it may take long."""
        with self._lock:
            return list(self._complete().dirty_runs())

    @property
    def is_on(self) -> bool:
        """Whether the disk's writes are still marked here."""
        return self._admission.has_tracker(self._tracker)

    def stop(self) -> None:
        """Detach from the disk; idempotent."""
        self.pacing.release()
        self._admission.detach_tracker(self._tracker)

    @property
    def dirty_bytes(self) -> int:
        """Bytes to be sent."""
        with self._lock:
            return self._complete().dirty_bytes

    @property
    def dirty_chunks(self) -> int:
        """Chunks to be sent, wholly or in part."""
        with self._lock:
            return self._complete().dirty_chunks

    @property
    def in_flight_chunks(self) -> int:
        """Chunks taken and not acknowledged."""
        return self._tracker.in_flight_chunks

    @property
    def pending_bytes(self) -> int:
        """Bytes to be sent or acknowledged."""
        with self._lock:
            return self._complete().pending_bytes

    @property
    def is_clean(self) -> bool:
        """Whether the destination holds every byte that was ever marked."""
        with self._lock:
            return self._complete().is_clean
