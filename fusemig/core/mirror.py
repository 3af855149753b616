"""MirrorMap: which chunks are mirrored, and what of them the destination does not hold yet.

A mirrored chunk is one whose writes are sent as they happen: as soon as it is dirty it goes before whatever the pass
still has to send. A write copies no payload and takes no way of its own: the blocks it touched are read for sending
like any others, after it marked them (rules 1 and 2 of `fusemig.core.tracker`), so two writes to one block reach the
destination as the image got them, whatever their order was.

    not mirrored ──acknowledged──> mirrored ──zeroed over whole chunks──> not mirrored

A chunk comes in when the destination holds it, so what is mirrored and not there is only what guests wrote since:
``pending_blocks``, which the admission of writes bounds (`fusemig.core.admission`). A zeroing of many whole chunks
leaves them to the passes, where it costs next to nothing, instead of a walk over each of them in the guest's write.

Attached to a `ChunkTracker`, which tells it what happens and whose owner's lock guards it. Memory: a bit per chunk, and
an entry for each mirrored chunk that is dirty or in flight. Pure.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusemig.core.bitmap import ChunkBitmap


class Reach(Enum):
    """Which chunks are mirrored."""

    NONE = "none"
    HOT = "hot"
    """Those that were sent since this was chosen: what guests keep writing. What they leave alone stays cold."""
    ALL = "all"
    """These, and all that the destination holds already."""


class MirrorMap:
    """The mirrored chunks of one tracker."""

    def __init__(self, members: ChunkBitmap) -> None:
        """Mirror ``members``, none of which is dirty or in flight, and from now on every chunk that is acknowledged."""
        self._members = members
        self._pending: dict[int, int] = {}
        """Blocks of each mirrored chunk that are dirty or in flight; without those of which none is."""
        self._queue: dict[int, None] = {}
        """Mirrored chunks that are dirty and not in flight, the longest waiting first."""
        self.pending_blocks = 0
        """The sum of ``_pending``; a block that was written again while it is in flight counts twice."""

    def __contains__(self, chunk: int) -> bool:
        return self._members[chunk]

    @property
    def n_chunks(self) -> int:
        """How many chunks are mirrored."""
        return self._members.count

    def next_chunk(self) -> int | None:
        """Return the mirrored chunk that waits longest to be taken."""
        return next(iter(self._queue), None)

    # What the tracker tells

    def note_marked(self, chunk: int, n_blocks: int, *, is_in_flight: bool) -> None:
        """``n_blocks`` blocks more of a chunk are dirty."""
        if not self._members[chunk]:
            return
        self._pending[chunk] = self._pending.get(chunk, 0) + n_blocks
        self.pending_blocks += n_blocks
        if not is_in_flight:
            self._queue[chunk] = None

    def note_taken(self, chunk: int) -> None:
        """A chunk's dirty blocks are in flight."""
        self._queue.pop(chunk, None)

    def note_acknowledged(self, chunk: int, n_blocks: int, n_dirty: int) -> None:
        """``n_blocks`` blocks in flight arrived; ``n_dirty`` of the chunk are dirty again."""
        if self._members[chunk]:
            self._forget(chunk, n_blocks)
        else:
            self._members.set(chunk)
            if n_dirty:
                self._pending[chunk] = n_dirty
                self.pending_blocks += n_dirty
        if n_dirty:
            self._queue[chunk] = None

    def note_restored(self, chunk: int, n_blocks: int) -> None:
        """``n_blocks`` blocks in flight did not arrive; those that are not dirty are marked next."""
        if self._members[chunk]:
            self._forget(chunk, n_blocks)
            self._queue[chunk] = None

    def leave(self, first: int, stop: int) -> None:
        """Leave the chunks ``first`` to ``stop - 1`` to the passes."""
        self._members.clear_range(first, stop)
        for chunk in [chunk for chunk in self._pending if first <= chunk < stop]:
            self.pending_blocks -= self._pending.pop(chunk)
            self._queue.pop(chunk, None)

    def _forget(self, chunk: int, n_blocks: int) -> None:
        left = self._pending.get(chunk, 0) - n_blocks
        self.pending_blocks -= n_blocks
        if left:
            self._pending[chunk] = left
        else:
            self._pending.pop(chunk, None)
