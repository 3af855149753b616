"""DiskDigest: one number for the content of a whole disk, kept up to date as frames go by.

Both sides of a migration feed it the same frames, the source in the order of sending and the destination in the order
of writing, and compare the results before the hand-off. Each chunk has a value:

    0                                    all zeros
    xxh3_64(content)                     sent as a whole
    xxh3_64(old value, extent, hash)     a part of it was sent after that

and the digest is the XOR over all chunks of xxh3_64(chunk index, value). Equal digests mean that each chunk was built
from the same content and changed by the same parts in the same order; `missing` tells which chunks never came, which
is what QEMU 7.2's block migration could not notice. Sending a chunk as a whole again gives it a fresh value whatever
happened before, so a broken connection needs no history.

Cost: O(extents) per frame; memory 8 bytes per chunk that holds data and 1 bit per chunk, both touched only where used
(8 MiB per TiB of data). xxh3 finds accidents, not attackers.
"""

from __future__ import annotations

import mmap
import struct
from typing import TYPE_CHECKING, Final

from xxhash import xxh3_64_intdigest

from fusemig.bitmap import ChunkBitmap
from fusemig.units import CHUNK_SIZE, chunk_length, n_chunks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_SLOT: Final = struct.Struct("<QQ")
_STEP: Final = struct.Struct("<QQQQ")


class DiskDigest:
    """The digest of a disk of which nothing is known yet."""

    def __init__(self, size: int) -> None:
        """Start for a disk of ``size`` bytes."""
        self.size = size
        count = n_chunks(size)
        # An anonymous mapping: pages exist only once a value is stored in them.
        self._values = memoryview(mmap.mmap(-1, count * 8)).cast("Q")
        self._known = ChunkBitmap(count)
        self._nonzero = ChunkBitmap(count)
        self.value = 0
        """The digest, a 64-bit number."""

    def apply_data(self, extents: Sequence[tuple[int, int]], payload_hash: int) -> None:
        """Note the payload of one data frame.

        Args:
            extents: offset and length in bytes of each part, as in the frame.
            payload_hash: xxh3_64 of the frame's whole payload.
        """
        if len(extents) == 1:
            offset, length = extents[0]
            chunk, inner = divmod(offset, CHUNK_SIZE)
            if not inner and length == chunk_length(chunk, self.size):
                self._store(chunk, payload_hash or 1)
                self._known.set(chunk)
                return
        for offset, length in extents:
            self._chain(offset, length, payload_hash)

    def apply_zero(self, extents: Sequence[tuple[int, int]]) -> None:
        """Note one frame of zero extents, given as offset and length in bytes."""
        for offset, length in extents:
            end = offset + length
            first = -(-offset // CHUNK_SIZE)
            stop = n_chunks(end) if end == self.size else end // CHUNK_SIZE
            if first >= stop:
                self._chain_parts(offset, end)
                continue
            self._chain_parts(offset, first * CHUNK_SIZE)
            self._clear(first, stop)
            self._chain_parts(min(stop * CHUNK_SIZE, end), end)

    def missing(self) -> Iterator[tuple[int, int]]:
        """Yield offset and length in bytes of each run of chunks that never came as wholes."""
        first = self._known.next_clear(0)
        while first is not None:
            stop = self._known.next_set(first)
            if stop is None:
                stop = self._known.n_bits
            yield first * CHUNK_SIZE, min(stop * CHUNK_SIZE, self.size) - first * CHUNK_SIZE
            first = self._known.next_clear(stop)

    def _clear(self, first: int, stop: int) -> None:
        self._known.set_range(first, stop)
        chunk = self._nonzero.next_set(first)
        while chunk is not None and chunk < stop:
            self._store(chunk, 0)
            chunk = self._nonzero.next_set(chunk + 1)

    def _chain_parts(self, offset: int, end: int) -> None:
        """Note zeros in parts of chunks."""
        while offset < end:
            stop = min(end, (offset // CHUNK_SIZE + 1) * CHUNK_SIZE)
            self._chain(offset, stop - offset, 0)
            offset = stop

    def _chain(self, offset: int, length: int, payload_hash: int) -> None:
        while length:
            chunk = offset // CHUNK_SIZE
            part = min(length, (chunk + 1) * CHUNK_SIZE - offset)
            step = _STEP.pack(self._value_of(chunk), offset, part, payload_hash)
            self._store(chunk, xxh3_64_intdigest(step) or 1)
            offset += part
            length -= part

    def _value_of(self, chunk: int) -> int:
        return self._values[chunk] if self._nonzero[chunk] else 0

    def _store(self, chunk: int, value: int) -> None:
        if self._nonzero[chunk]:
            self.value ^= xxh3_64_intdigest(_SLOT.pack(chunk, self._values[chunk]))
        if value:
            self.value ^= xxh3_64_intdigest(_SLOT.pack(chunk, value))
            self._values[chunk] = value
            self._nonzero.set(chunk)
        else:
            self._nonzero.clear(chunk)
