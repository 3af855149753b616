"""Marks: which blocks guests wrote, in the trackers of migrations; the newest ones wait beside them, as bytes.

A write sets the bytes of its chunk without a lock (`fusemig.disk.regime` says why none is missed). All else is done
under the disk's lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fusemig.core.units import BLOCKS_PER_CHUNK

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fusemig.core.tracker import ChunkTracker

_CLEAN: Final = b"0" * BLOCKS_PER_CHUNK
"""The marks of a chunk are written as a number's digits, so that `int` reads them: the last one is block 0's."""
DIRTY: Final = ord("1")

MAX_FRESH: Final = 1024
"""Chunks whose marks may wait to get into the trackers, half a KiB each; others are marked there, under the lock."""


class Marks:
    """The trackers of a disk, and the marks that they do not have yet."""

    def __init__(self) -> None:
        """Track nothing."""
        self.trackers: tuple[ChunkTracker, ...] = ()
        self.fresh: dict[int, bytearray] | None = None
        """The marks that no tracker has yet, a digit for each block, by chunk; None while nothing is tracked."""

    def change(self, trackers: tuple[ChunkTracker, ...]) -> None:
        """Have other trackers; ``fresh`` was taken before, and is another one from here on."""
        self.trackers = trackers
        self.fresh = {} if trackers else None

    def mark(self, offset: int, length: int) -> None:
        """Mark a range in the trackers."""
        for tracker in self.trackers:
            tracker.mark(offset, length)

    def expect(self, chunk: int) -> None:
        """Have the next write to a chunk find bytes there to mark, if there is room."""
        if self.fresh is not None and len(self.fresh) < MAX_FRESH:
            self.fresh.setdefault(chunk, bytearray(_CLEAN))

    def take(self, chunks: Iterable[int]) -> list[tuple[int, bytearray]]:
        """Take the bytes of ``chunks`` out of ``fresh``, for `move` once the regime was replaced."""
        fresh = self.fresh or {}
        return [(chunk, fresh.pop(chunk)) for chunk in list(chunks) if chunk in fresh]

    def move(self, taken: list[tuple[int, bytearray]]) -> None:
        """Have the trackers know what was taken."""
        for chunk, marks in taken:
            mask = int(marks, 2)
            for tracker in self.trackers:
                tracker.mark_blocks(chunk, mask)


def mark_run(marks: bytearray, first: int, stop: int) -> None:
    """Mark blocks ``first`` to ``stop - 1`` of a chunk in its bytes."""
    marks[BLOCKS_PER_CHUNK - stop : BLOCKS_PER_CHUNK - first] = b"1" * (stop - first)
