"""ChunkTracker: what a migration still has to send of one disk.

Theory of operation. A chunk has two independent states:

    dirty       bytes of it changed since they were last read for sending. The bitmap holds one bit a chunk; for a
                chunk of which only some 4 KiB blocks are dirty, ``_masks`` holds which. A dirty chunk without a mask
                is dirty as a whole.
    in flight   bytes of it were taken for sending and are not acknowledged yet; ``_in_flight`` holds which blocks.

    mark ──> dirty ──take──> in flight ──acknowledge──> (gone)
               ^                 └──────restore──────┐
               └──────────────────────────────────────┘

The rules of tracking (each has a test that fails without it):

1. A write is marked when it is admitted *and again* when it has ended, also badly: a read for sending may have fallen
   between the two and seen half of it. (Kept by `fusemig.disk.regime`.)
2. `take` clears the dirty bits, and is called *before* the chunk is read.
3. A migration starts with every allocated block dirty, so the bulk phase is only the first pass and "done" has one
   definition: nothing dirty, nothing in flight. QEMU 7.2's early finish cannot be expressed.
4. A chunk in flight is not taken again: its blocks would overtake or follow themselves.

Memory: the bitmap, and about 150 bytes for each partly dirty chunk. Marking costs O(chunks touched). Not thread safe:
its owner holds a lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fusemig.core.bitmap import ChunkBitmap
from fusemig.core.mirror import MirrorMap, Reach
from fusemig.core.units import (
    BLOCK_SIZE,
    BLOCKS_PER_CHUNK,
    CHUNK_SIZE,
    FULL_MASK,
    chunk_mask,
    mask_extents,
    mask_runs,
    n_blocks,
    n_chunks,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


# Every guest write is marked, so what marks it is spelled in shifts and looked up where it can be.
_BLOCK_SHIFT: Final = BLOCK_SIZE.bit_length() - 1
_CHUNK_SHIFT: Final = BLOCKS_PER_CHUNK.bit_length() - 1
_IN_CHUNK: Final = BLOCKS_PER_CHUNK - 1
_RUN: Final = tuple((1 << n) - 1 for n in range(BLOCKS_PER_CHUNK + 1))
"""Masks of the first n blocks of a chunk."""


class ChunkTracker:
    """The dirty map and the in-flight map of one disk."""

    def __init__(self, size: int) -> None:
        """Track a disk of ``size`` bytes, with nothing dirty."""
        self.size = size
        self._dirty = ChunkBitmap(n_chunks(size))
        self._masks: dict[int, int] = {}
        self._in_flight: dict[int, int] = {}
        self._n_dirty_blocks = 0
        self._n_in_flight_blocks = 0
        self.mirror: MirrorMap | None = None
        """The chunks that are sent as soon as they are dirty; None: no chunk is."""
        self._last_chunk = n_chunks(size) - 1
        self._last_chunk_mask = chunk_mask(self._last_chunk, size) if size else 0
        """The only one that may be short."""
        self._last_block = n_blocks(size) - 1
        self._last_block_missing = n_blocks(size) * BLOCK_SIZE - size

    def mark(self, offset: int, length: int) -> None:
        """Mark every block that the bytes ``offset`` to ``offset + length - 1`` touch."""
        if length <= 0:
            return
        first = offset >> _BLOCK_SHIFT
        stop = (offset + length - 1 >> _BLOCK_SHIFT) + 1
        chunk = first >> _CHUNK_SHIFT
        last_chunk = stop - 1 >> _CHUNK_SHIFT
        if chunk == last_chunk:
            self.mark_blocks(chunk, _RUN[stop - first] << (first & _IN_CHUNK))
            return
        base = chunk * BLOCKS_PER_CHUNK
        self.mark_blocks(chunk, _RUN[base + BLOCKS_PER_CHUNK - first] << (first - base))
        self.mark_chunks(chunk + 1, last_chunk)
        self.mark_blocks(last_chunk, _RUN[stop - last_chunk * BLOCKS_PER_CHUNK])

    def mark_blocks(self, chunk: int, blocks: int) -> None:
        """Mark the blocks of a chunk that a mask tells."""
        if not blocks:
            return
        old = self._masks.get(chunk)
        if old is None:
            if not self._dirty.set(chunk):
                return  # dirty as a whole
            old = 0
        new = old | blocks
        if new == old:
            return
        n_new = (new ^ old).bit_count()
        self._n_dirty_blocks += n_new
        if new == self._whole_mask(chunk):
            self._masks.pop(chunk, None)
        else:
            self._masks[chunk] = new
        if self.mirror is not None:
            self.mirror.note_marked(chunk, n_new, is_in_flight=chunk in self._in_flight)

    def _whole_mask(self, chunk: int) -> int:
        return self._last_chunk_mask if chunk == self._last_chunk else FULL_MASK

    def mark_chunks(self, first: int, stop: int) -> None:
        """Mark the chunks ``first`` to ``stop - 1`` as wholes, at the cost of a bitmap fill."""
        if first >= stop:
            return
        if self.mirror is not None:
            self.mirror.leave(first, stop)
        if stop - first < len(self._masks):
            partial = [chunk for chunk in range(first, stop) if chunk in self._masks]
        else:
            partial = [chunk for chunk in self._masks if first <= chunk < stop]
        for chunk in partial:
            self._n_dirty_blocks -= self._masks.pop(chunk).bit_count()
            self._dirty.clear(chunk)
        if stop > self._last_chunk and not self._dirty[self._last_chunk]:
            self._n_dirty_blocks -= BLOCKS_PER_CHUNK - self._last_chunk_mask.bit_count()
        before = self._dirty.count
        self._dirty.set_range(first, stop)
        self._n_dirty_blocks += (self._dirty.count - before) * BLOCKS_PER_CHUNK

    def next_dirty(self, start: int) -> int | None:
        """Return the first dirty chunk at or after ``start``, in flight or not; None where there is none."""
        return self._dirty.next_set(start)

    def next_clean(self, start: int) -> int:
        """Return the first chunk at or after ``start`` that is not dirty; one beyond the last where there is none."""
        found = self._dirty.next_clear(start)
        return self._last_chunk + 1 if found is None else found

    def dirty_bits(self, first: int, stop: int) -> int:
        """Return which of the chunks ``first`` to ``stop - 1`` are dirty, as bits from ``first`` on."""
        return self._dirty.bits(first, stop)

    def chunks_in_flight(self) -> list[int]:
        """Return the chunks whose bytes are on their way, in ascending order."""
        return sorted(self._in_flight)

    def is_in_flight(self, chunk: int) -> bool:
        """Tell whether bytes of the chunk are on their way."""
        return chunk in self._in_flight

    def take(self, chunk: int) -> int:
        """Clear a chunk's dirty bits, put its blocks in flight and return their mask (0: it was not dirty).

        The caller reads the blocks *after* this call.
        """
        assert chunk not in self._in_flight, f"chunk {chunk} is in flight"
        if not self._dirty.clear(chunk):
            return 0
        mask = self._masks.pop(chunk, None)
        if mask is None:
            mask = self._whole_mask(chunk)
        n = mask.bit_count()
        self._n_dirty_blocks -= n
        self._n_in_flight_blocks += n
        self._in_flight[chunk] = mask
        if self.mirror is not None:
            self.mirror.note_taken(chunk)
        return mask

    def acknowledge(self, chunk: int) -> None:
        """Forget a chunk in flight: the destination holds what was taken."""
        n = self._in_flight.pop(chunk).bit_count()
        self._n_in_flight_blocks -= n
        if self.mirror is not None:
            self.mirror.note_acknowledged(chunk, n, self.dirty_mask(chunk).bit_count())

    def restore(self, chunk: int) -> None:
        """Make a chunk in flight dirty again: what was taken did not arrive."""
        mask = self._in_flight.pop(chunk)
        self._n_in_flight_blocks -= mask.bit_count()
        if self.mirror is not None:
            self.mirror.note_restored(chunk, mask.bit_count())
        self.mark_blocks(chunk, mask)

    def restore_all(self) -> None:
        """Make everything in flight dirty again: the connection is gone."""
        for chunk in list(self._in_flight):
            self.restore(chunk)

    def begin_mirror(self, reach: Reach) -> MirrorMap:
        """Mirror from now on; what is dirty or in flight comes in when it is acknowledged."""
        if reach is Reach.ALL:
            members = self._dirty.complement()
            for chunk in self._in_flight:
                members.clear(chunk)
        else:
            members = ChunkBitmap(self._dirty.n_bits)
        self.mirror = MirrorMap(members)
        return self.mirror

    def in_flight_mask(self, chunk: int) -> int:
        """Return the mask of a chunk's blocks that are in flight."""
        return self._in_flight.get(chunk, 0)

    @property
    def dirty_chunks(self) -> int:
        """How many chunks are dirty, wholly or in part."""
        return self._dirty.count

    @property
    def in_flight_chunks(self) -> int:
        """How many chunks are in flight."""
        return len(self._in_flight)

    @property
    def dirty_bytes(self) -> int:
        """How many bytes are dirty."""
        return self._n_dirty_blocks * BLOCK_SIZE - (self._last_block_missing if self._is_last_block_dirty() else 0)

    @property
    def in_flight_bytes(self) -> int:
        """How many bytes are in flight, counting whole blocks."""
        return self._n_in_flight_blocks * BLOCK_SIZE

    @property
    def pending_bytes(self) -> int:
        """How many bytes are still to be sent or to be acknowledged; 0 only when the tracker `is_clean`."""
        return self.dirty_bytes + self.in_flight_bytes

    @property
    def is_clean(self) -> bool:
        """Whether the destination holds all that was ever marked."""
        return not self._dirty.count and not self._in_flight

    def clean_extents(self) -> Iterator[tuple[int, int]]:
        """Yield offset and length in bytes of what is not dirty, in ascending order; neighbours may touch."""
        partial = sorted(self._masks)
        first = self._dirty.next_clear(0)
        for chunk in [*partial, self._dirty.n_bits]:
            while first is not None and first < chunk:
                stop = self._dirty.next_set(first)
                stop = self._dirty.n_bits if stop is None else stop
                yield first * CHUNK_SIZE, min(stop * CHUNK_SIZE, self.size) - first * CHUNK_SIZE
                first = self._dirty.next_clear(stop)
            if chunk < self._dirty.n_bits:
                yield from mask_extents(self._whole_mask(chunk) & ~self._masks[chunk], chunk, self.size)

    def dirty_runs(self) -> Iterator[tuple[int, int]]:
        """Yield ``(first, stop)`` of each run of dirty 4 KiB blocks, in ascending order; neighbours never touch."""
        start = end = 0
        chunk = self._dirty.next_set(0)
        while chunk is not None:
            for offset, count in mask_runs(self.dirty_mask(chunk)):
                first = chunk * BLOCKS_PER_CHUNK + offset
                if first != end:
                    if end > start:
                        yield start, end
                    start = first
                end = first + count
            chunk = self._dirty.next_set(chunk + 1)
        if end > start:
            yield start, end

    def dirty_mask(self, chunk: int) -> int:
        """Return the mask of a chunk's dirty blocks."""
        if not self._dirty[chunk]:
            return 0
        return self._masks.get(chunk, self._whole_mask(chunk))

    def is_whole(self, chunk: int) -> bool:
        """Tell whether a chunk is dirty as a whole."""
        return self._dirty[chunk] and chunk not in self._masks

    def _is_last_block_dirty(self) -> bool:
        if not self._last_block_missing:
            return False
        chunk = self._dirty.n_bits - 1
        return bool(self.dirty_mask(chunk) >> (self._last_block % BLOCKS_PER_CHUNK) & 1)
