"""ChunkBitmap: one bit for each 1 MiB chunk of a disk, over memory that the caller may supply.

    byte  i >> 3 of the buffer, bit i & 7 (lowest first)  =  chunk i

A 16 TiB disk needs 2 MiB. The buffer may be a mapped file, which then is the persistent form of the map. Not thread
safe: its owner holds a lock. Searching skips clean stretches at memory speed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from mmap import mmap

_WINDOW: Final = 4096
"""Bytes that are searched, or counted, at once."""
_LOWEST: Final = bytes([8, *((value & -value).bit_length() - 1 for value in range(1, 256))])

_INVERTED: Final = bytes(255 - value for value in range(256))
_STEP: Final = 64 * 1024
"""Bytes that are filled at once."""
_FULL_STEP: Final = b"\xff" * _STEP


def fill(bits: bytearray | mmap, first: int, stop: int, *, ones: bool) -> None:
    """Set or clear the bits ``first`` to ``stop - 1`` of a map as laid out above; ``first`` is below ``stop``."""
    low, high = first >> 3, stop >> 3
    head, tail = 0xFF << (first & 7) & 0xFF, (1 << (stop & 7)) - 1
    if low == high:
        head, tail = head & tail, 0
    if head != 0xFF:
        bits[low] = bits[low] | head if ones else bits[low] & ~head
        low += 1
    if tail:
        bits[high] = bits[high] | tail if ones else bits[high] & ~tail
    for at in range(low, high, _STEP):
        n = min(_STEP, high - at)
        bits[at : at + n] = _FULL_STEP[:n] if ones else bytes(n)


class ChunkBitmap:
    """A fixed number of bits with a running count of those that are set."""

    def __init__(self, n_bits: int, buffer: bytearray | mmap | None = None) -> None:
        """Lay the map over ``buffer`` (at least ``n_bits / 8`` bytes, whose bits are taken as they are) or new memory.

        Raises:
            ValueError: the buffer is too short.
        """
        n_bytes = -(-n_bits // 8)
        self._bits: bytearray | mmap = bytearray(n_bytes) if buffer is None else buffer
        if len(self._bits) < n_bytes:
            raise ValueError(f"{n_bits} bits need {n_bytes} bytes, not {len(self._bits)}")
        if n_bits & 7 and self._bits[n_bytes - 1] >> (n_bits & 7):
            self._bits[n_bytes - 1] &= (1 << (n_bits & 7)) - 1  # the padding of a damaged file is no chunk
        self.n_bits = n_bits
        self.count = 0 if buffer is None else self._count(0, n_bits)

    def _count(self, first: int, stop: int) -> int:
        step = 8 * _WINDOW
        return sum(self.bits(at, min(at + step, stop)).bit_count() for at in range(first, stop, step))

    def __getitem__(self, index: int) -> bool:
        return bool(self._bits[index >> 3] >> (index & 7) & 1)

    def bits(self, first: int, stop: int) -> int:
        """Return the bits ``first`` to ``stop - 1`` as a number whose lowest is ``first``."""
        word = int.from_bytes(self._bits[first >> 3 : stop + 7 >> 3], "little")
        return word >> (first & 7) & (1 << stop - first) - 1

    def set(self, index: int) -> bool:
        """Set a bit; return whether it was clear."""
        at, bit = index >> 3, 1 << (index & 7)
        if self._bits[at] & bit:
            return False
        self._bits[at] |= bit
        self.count += 1
        return True

    def clear(self, index: int) -> bool:
        """Clear a bit; return whether it was set."""
        at, bit = index >> 3, 1 << (index & 7)
        if not self._bits[at] & bit:
            return False
        self._bits[at] ^= bit
        self.count -= 1
        return True

    def set_range(self, first: int, stop: int) -> None:
        """Set the bits ``first`` to ``stop - 1``."""
        self._fill(first, stop, ones=True)

    def clear_range(self, first: int, stop: int) -> None:
        """Clear the bits ``first`` to ``stop - 1``."""
        self._fill(first, stop, ones=False)

    def _fill(self, first: int, stop: int, *, ones: bool) -> None:
        if stop - first == 1:  # what most callers set
            change = self.set if ones else self.clear
            change(first)
        elif first < stop:
            n_set = self._count(first, stop)
            fill(self._bits, first, stop, ones=ones)
            self.count += stop - first - n_set if ones else -n_set

    def complement(self) -> ChunkBitmap:
        """Return a map with the bits set that are clear here, in memory of its own."""
        return ChunkBitmap(self.n_bits, bytearray(self._bits[: -(-self.n_bits // 8)].translate(_INVERTED)))

    def next_set(self, start: int = 0) -> int | None:
        """Return the first set bit at or after ``start``, or None."""
        if start >= self.n_bits or not self.count:
            return None
        at = start >> 3
        first = self._bits[at] >> (start & 7) << (start & 7)
        if first:
            return (at << 3) + _LOWEST[first]
        at += 1
        n_bytes = -(-self.n_bits // 8)
        while at < n_bytes:
            window = bytes(self._bits[at : min(at + _WINDOW, n_bytes)])
            clean = len(window) - len(window.lstrip(b"\0"))
            at += clean
            if clean < len(window):
                return (at << 3) + _LOWEST[window[clean]]
        return None

    def next_clear(self, start: int = 0) -> int | None:
        """Return the first clear bit at or after ``start``, or None."""
        n_bytes = -(-self.n_bits // 8)
        while start < self.n_bits and self[start]:
            if start & 7:
                start += 1
                continue
            at = start >> 3
            window = bytes(self._bits[at : min(at + _WINDOW, n_bytes)])
            full = len(window) - len(window.lstrip(b"\xff"))
            start += 8 * full if full else 1
        return start if start < self.n_bits else None

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yield ``(first, stop)`` of each run of set bits, in ascending order."""
        first = self.next_set()
        while first is not None:
            stop = self.next_clear(first)
            if stop is None:
                stop = self.n_bits
            yield first, stop
            first = self.next_set(stop)
