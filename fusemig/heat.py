"""Heat: what guests write, remembered before any migration asks, at the price of a byte or two per write.

Two things are kept of a disk, both hints: no promise rests on them, so writes note themselves without a lock, and what
two threads that meet get wrong stays wrong.

    heat of a chunk    a count that halves every `HALVING_EPOCHS`: how many of its blocks are written a second, about.
                       Two bytes a chunk, of which the upper one says when the lower one was last halved, so nothing has
                       to walk over a disk. Anonymous memory: what was never written is never resident.
    the working set    how many different blocks are written within a time (`fusemig.working_set`). A slot for each
                       block, found by a hash, holds the epoch of its last write; the first write of an epoch to a slot
                       counts the interval since the one before. 64 KiB for each disk that is written.

An epoch is a second; `tick` ends it. A write to a slot that was written in the same epoch costs one comparison.

Theory of operation. With m(i) the writes per epoch whose block was not written in the i epochs before, the mean number
of different blocks in T epochs is m(0) + ... + m(T-1) (Denning and Schwartz, "Properties of the working-set model",
CACM 15(3), 1972). A block that is written for the first time since watching began may have been written i epochs before
or not where fewer have been watched; such writes, and their epochs, are left out of m(i). Several blocks may share a
slot: s different slots of N are about -N ln(1 - s/N) blocks.

Zeroing is not noted: zeros cost nothing on the wire.
"""

from __future__ import annotations

import math
import sys
from array import array
from hashlib import shake_128
from heapq import nlargest
from mmap import mmap
from typing import TYPE_CHECKING, Final

from fusemig.units import BLOCK_SIZE, CHUNK_SIZE, n_chunks
from fusemig.working_set import WorkingSet

if TYPE_CHECKING:
    from collections.abc import Iterator

EPOCH_S: Final = 1.0
"""How often `tick` is to be called, in seconds."""
HORIZON: Final = 128
"""The longest interval between two writes of a block that is told from never, in epochs."""
MEMORY_EPOCHS: Final = 64
"""After so many epochs what was seen counts half."""
HALVING_EPOCHS: Final = 8
"""After so many epochs a chunk's heat is half."""
N_LEVELS: Final = 9
"""Levels of heat: 0 is cold, and each further one is twice as hot."""

HOT_LEVEL: Final = 6
"""From here on a chunk is called hot: about 4 of its blocks are written a second, or it was written whole just now."""

_BLOCK_SHIFT: Final = BLOCK_SIZE.bit_length() - 1
_IN_BLOCK: Final = BLOCK_SIZE - 1
_CHUNK_SHIFT: Final = CHUNK_SIZE.bit_length() - 1
_GROUP: Final = 16
"""Blocks that lie together keep together, so that a large write is a slice store for each group."""
_GROUP_SHIFT: Final = _BLOCK_SHIFT + 4
_N_SLOTS: Final = 1 << 16
_SPREAD: Final = array("H", shake_128(b"fusemig.heat").digest(2 * _N_SLOTS))
"""A random slot for the lower half of a group's number."""
_MOST_SLOTS: Final = 0.98 * _N_SLOTS
"""Beyond this the number of blocks cannot be told any more."""
_PART: Final = 1 << 12
"""Chunks that are looked at together for whether any of them was ever written."""
_EPOCHS: Final = 255
"""Slots hold epochs 1 to 255, in turn; 0 is never."""

# For `count_hot`, which looks at thousands of chunks at once: tables for `bytes.translate`.
_HIGH: Final = int(sys.byteorder == "little")
"""Where in a chunk's two bytes the epoch is."""
_TOO_OLD: Final = 9 - HOT_LEVEL
"""At this age no heat, of 8 bits, is left that would be hot."""
_BACK: Final = bytes(min(255 - at, _TOO_OLD) for at in range(256)) * 2
"""Ages, backwards: 256 of them from 255 - now on are the ages of the epochs 0 to 255."""
_IS: Final = [bytes(value == age for value in range(256)) for age in range(_TOO_OLD)]
_IS_HOT: Final = [bytes((heat >> age).bit_length() >= HOT_LEVEL for heat in range(256)) for age in range(_TOO_OLD)]
"""By age: whether a heat of then is hot now."""


class Heat:
    """What guests write to one disk; `note` from any thread, the rest from one task."""

    def __init__(self, size: int) -> None:
        """Know nothing of a disk of ``size`` bytes."""
        self._size = size
        # Written by `note`:
        self._chunks = memoryview(mmap(-1, max(2 * n_chunks(size), 1) + 1 & ~1)).cast("H")
        self._slots = mmap(-1, _N_SLOTS)
        self._intervals = [0] * _EPOCHS
        # Written by `tick`:
        self._epoch = 1
        self._chunk_epoch = 0
        self._n_epochs = -1
        self._counters = 0, 0
        self._ticked_at = 0.0
        self.observed_s = 0.0
        """How long the disk has been watched, in seconds."""
        self._again = [0.0] * (HORIZON + 1)
        """Writes by the interval since the one before; the last holds all that are longer."""
        self._first = [0.0] * (HORIZON + 1)
        """Writes of blocks of which none was seen, by how many epochs had been watched."""
        self._weights = [0.0] * (HORIZON + 1)
        """Epochs, by how many had been watched before them."""
        self._blocks = 0.0
        self._seconds = 0.0

    def note(self, offset: int, length: int) -> None:
        """Take note of a guest's write of ``length`` bytes, at least one, that lies inside the disk."""
        if (offset & _IN_BLOCK) + length > BLOCK_SIZE:
            self._note_long(offset, length)
            return
        group = offset >> _GROUP_SHIFT
        slot = _SPREAD[group & 0xFFFF] ^ group >> 16 ^ offset >> _BLOCK_SHIFT & 15
        last = self._slots[slot]
        epoch = self._epoch
        if last != epoch:
            self._slots[slot] = epoch
            self._intervals[(epoch - last) % _EPOCHS if last else 0] += 1
            self._warm(offset >> _CHUNK_SHIFT, 1)

    def _note_long(self, offset: int, length: int) -> None:
        block, stop = offset >> _BLOCK_SHIFT, (offset + length - 1 >> _BLOCK_SHIFT) + 1
        slots, intervals, epoch = self._slots, self._intervals, self._epoch
        written = bytes((epoch,)) * _GROUP
        while block < stop:
            group = block // _GROUP
            slot = _SPREAD[group & 0xFFFF] ^ group >> 16
            first, end = block, min(stop, (group + 1) * _GROUP)
            n_new = 0
            if end - first == _GROUP:
                slot &= ~15
                before = slots[slot : slot + _GROUP]
                if before != written:
                    slots[slot : slot + _GROUP] = written
                    n_new = _GROUP - before.count(epoch)
                    last = min(before, key=epoch.__eq__)  # one speaks for all that were not written in this epoch
                    intervals[(epoch - last) % _EPOCHS if last else 0] += n_new
            else:
                for each in range(first, end):
                    last = slots[slot ^ each & 15]
                    if last != epoch:
                        slots[slot ^ each & 15] = epoch
                        intervals[(epoch - last) % _EPOCHS if last else 0] += 1
                        n_new += 1
            if n_new:
                self._warm(first * BLOCK_SIZE >> _CHUNK_SHIFT, n_new)
            block = end

    def _warm(self, chunk: int, n_blocks: int) -> None:
        word, now = self._chunks[chunk], self._chunk_epoch
        heat = ((word & 0xFF) >> (now - (word >> 8) & 0xFF)) + n_blocks
        self._chunks[chunk] = now << 8 | (heat if heat < 0xFF else 0xFF)

    def level(self, chunk: int) -> int:
        """Return how hot a chunk is, from 0 to `N_LEVELS` - 1."""
        word = self._chunks[chunk]
        return ((word & 0xFF) >> (self._chunk_epoch - (word >> 8) & 0xFF)).bit_length()

    def count_hot(self, first: int, stop: int) -> int:
        """Return how many of the chunks ``first`` to ``stop - 1`` are at `HOT_LEVEL` or hotter.

        Costs memory for chunks that were never written: ask only where some were.
        """
        heats, now = self._chunks[first:stop].tobytes(), self._chunk_epoch
        ages = heats[_HIGH::2].translate(_BACK[255 - now : 511 - now])
        n = 0
        heats = heats[1 - _HIGH :: 2]
        for age in range(_TOO_OLD):
            if age in ages:
                of_age = int.from_bytes(ages.translate(_IS[age]))
                hot = int.from_bytes(heats.translate(_IS_HOT[age]))
                n += (of_age & hot).bit_count()
        return n

    def hottest(self, most: int) -> list[int]:
        """Return at most ``most`` chunks that are not cold, the hottest first, else in ascending order.

        Takes a second for each three million chunks that were written lately, and next to nothing for others.
        """
        return [chunk for _, chunk in nlargest(most, self._warm_chunks(), key=lambda one: one[0])]

    def _warm_chunks(self) -> Iterator[tuple[int, int]]:
        n = n_chunks(self._size)
        for first in range(0, n, _PART):
            stop = min(n, first + _PART)
            words = self._chunks[first:stop].tobytes()
            if words.count(0) < len(words):
                for chunk in range(first, stop):
                    if level := self.level(chunk):
                        yield level, chunk

    def tick(self, now: float, written_bytes: int, n_writes: int) -> None:
        """End an epoch.

        Args:
            now: in seconds of a monotonic clock.
            written_bytes: that guests have ever written.
            n_writes: in how many requests.
        """
        before, self._counters = self._counters, (written_bytes, n_writes)
        seen: list[int] | None = None
        if self._counters != before:
            seen, self._intervals = self._intervals, [0] * _EPOCHS  # a write that is just being noted may be lost
        took_s, self._ticked_at = now - self._ticked_at, now
        self._n_epochs += 1
        if self._n_epochs:  # what came before the first tick took an unknown time
            self.observed_s += took_s
            watched = min(self._n_epochs - 1, HORIZON)
            self._weights[watched] += 1
            self._seconds += took_s
            if seen is not None:
                self._count(seen, watched)
                self._blocks += max((written_bytes - before[0]) / BLOCK_SIZE, n_writes - before[1])
        self._epoch = self._epoch % _EPOCHS + 1
        if self._n_epochs % MEMORY_EPOCHS == 0:
            self._fade()
        self._chunk_epoch = self._n_epochs // HALVING_EPOCHS & 0xFF

    def _count(self, seen: list[int], watched: int) -> None:
        self._first[watched] += seen[0]
        for interval, n in enumerate(seen):
            if n and interval:
                self._again[min(interval, HORIZON)] += n

    def _fade(self) -> None:
        """Have what was seen count half, and forget writes so old that their epoch would come round again."""
        for counts in (self._again, self._first, self._weights):
            counts[:] = [n / 2 for n in counts]
        self._blocks /= 2
        self._seconds /= 2
        if self._blocks < 1 / _N_SLOTS:
            return  # nobody writes: what no write has touched is not to become resident
        forget = bytearray(range(256))
        for age in range(1, _EPOCHS - HORIZON):
            forget[(self._epoch + age - 1) % _EPOCHS + 1] = 0
        self._slots[:] = self._slots[:].translate(forget)

    def working_set(self) -> WorkingSet:
        """Return what guests write within a time, as far as it was seen."""
        weights = sum(self._weights)
        if not weights:
            return WorkingSet(0.0, EPOCH_S, (), self._size)
        again, first = sum(self._again), sum(self._first)
        distinct: list[float] = []
        n_slots, rate = 0.0, math.inf
        left = weights
        for interval in range(HORIZON):
            again -= self._again[interval]
            if left < 0.01:
                break
            rate = min(rate, max(0.0, again + first) / left)
            first -= self._first[interval]
            left -= self._weights[interval]
            n_slots += rate
            if n_slots > _MOST_SLOTS:
                break
            distinct.append(min(self._size, -_N_SLOTS * math.log1p(-n_slots / _N_SLOTS) * BLOCK_SIZE))
        return WorkingSet(self._blocks * BLOCK_SIZE / self._seconds, self._seconds / weights, distinct, self._size)
