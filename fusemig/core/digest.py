"""DiskDigest: one number for the content of a whole disk, kept up to date as frames go by.

Both sides of a migration feed it the same frames, the source in the order of sending and the destination in the order
of writing, and compare the results before the hand-off. Each chunk has a value:

    0                                    all zeros, or all the shared base
    xxh3_64(content)                     sent as a whole
    xxh3_64(old value, extent, hash)     a part of it was sent after that

and the digest is the XOR over all chunks of xxh3_64(chunk index, value). Equal digests mean that each chunk was built
from the same content and changed by the same parts in the same order; `missing` tells which blocks never came, which is
what QEMU 7.2's block migration could not notice. Sending a chunk as a whole again gives it a fresh value whatever
happened before, so a broken connection needs no history.

Cost: O(extents) per frame; memory about 9 bytes per chunk that holds data (9 MiB per TiB of data) and 1 bit per chunk.
xxh3 finds accidents, not attackers.
"""

from __future__ import annotations

import struct
from array import array
from typing import TYPE_CHECKING, Final

from xxhash import xxh3_64_intdigest

from fusemig.core.tracker import ChunkTracker
from fusemig.core.units import BLOCK_SIZE, CHUNK_SIZE, chunk_length, mask_extents, n_blocks, n_chunks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_SLOT: Final = struct.Struct("<QQ")
_STEP: Final = struct.Struct("<QQQQ")
_BASE_MARK: Final = 0x42415345
"""Stands for the payload's hash where a part of a chunk is the shared base's; that of zeros is 0."""
_GROUP: Final = 64
"""Chunks whose values lie side by side: 8 bytes a chunk where the disk is full, 600 where one chunk is alone."""


class DiskDigest:
    """The digest of a disk of which nothing is known yet."""

    def __init__(self, size: int) -> None:
        """Start for a disk of ``size`` bytes."""
        self.size = size
        self._values: dict[int, array[int]] = {}
        self._came = ChunkTracker(size)
        """Blocks that came at least once as wholes; the tracker calls them dirty."""
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
                self._note(offset, length)
                return
        for offset, length in extents:
            self._chain(offset, length, payload_hash)
            self._note(offset, length)

    def apply_zero(self, extents: Sequence[tuple[int, int]]) -> None:
        """Note one frame of zero extents, given as offset and length in bytes."""
        self._apply_bare(extents, 0)

    def _apply_bare(self, extents: Sequence[tuple[int, int]], mark: int) -> None:
        for offset, length in extents:
            end = offset + length
            self._note(offset, length)
            first = -(-offset // CHUNK_SIZE)
            stop = n_chunks(end) if end == self.size else end // CHUNK_SIZE
            if first >= stop:
                self._chain_parts(offset, end, mark)
                continue
            self._chain_parts(offset, first * CHUNK_SIZE, mark)
            self._clear(first, stop)
            self._chain_parts(min(stop * CHUNK_SIZE, end), end, mark)

    def apply_base(self, extents: Sequence[tuple[int, int]]) -> None:
        """Note one frame of extents that read as the shared base.

        Of a chunk that is the base's as a whole, all that is known is that it came: see docs/overlay.md.
        """
        self._apply_bare(extents, _BASE_MARK)

    def restore(self, chunk: int, value: int) -> None:
        """Take over what is known of a chunk from before: all of it came, and ``value`` is its value."""
        self._store(chunk, value)
        self._came.mark_chunks(chunk, chunk + 1)

    def forget(self, first: int, stop: int) -> None:
        """Take back the values of the chunks ``first`` to ``stop - 1``: they will be sent as wholes."""
        self._clear(first, stop)

    def restore_blocks(self, chunk: int, value: int, mask: int) -> None:
        """Take over that a chunk has ``value``, and that of its blocks those of ``mask`` came."""
        self._store(chunk, value)
        for offset, length in mask_extents(mask, chunk, self.size):
            self._came.mark(offset, length)

    def value_of(self, chunk: int) -> int:
        """Return a chunk's value."""
        group = self._values.get(chunk // _GROUP)
        return 0 if group is None else group[chunk % _GROUP]

    def has_values(self, first: int, stop: int) -> bool:
        """Tell whether any of the chunks ``first`` to ``stop - 1`` may have a value other than 0."""
        return any(group in self._values for group in range(first // _GROUP, (stop - 1) // _GROUP + 1))

    def pages(self, n: int) -> list[int]:
        """Return, in ascending order, the first chunks of those runs of ``n`` chunks that may have values."""
        assert n % _GROUP == 0
        return sorted({group * _GROUP // n * n for group in self._values})

    def values(self, first: int, stop: int) -> list[int]:
        """Return the values of the chunks ``first`` to ``stop - 1``; 0 also for those that did not come as wholes."""
        if not self.has_values(first, stop):
            return [0] * (stop - first)
        return [
            value if value and self._came.is_whole(chunk) else 0
            for chunk, value in ((chunk, self.value_of(chunk)) for chunk in range(first, stop))
        ]

    def missing(self) -> Iterator[tuple[int, int]]:
        """Yield offset and length in bytes of the blocks that never came as wholes; neighbours may touch."""
        return self._came.clean_extents()

    def _note(self, offset: int, length: int) -> None:
        first = n_blocks(offset) * BLOCK_SIZE
        end = offset + length
        stop = end if end == self.size else end - end % BLOCK_SIZE
        self._came.mark(first, stop - first)

    def _clear(self, first: int, stop: int) -> None:
        """Set the values of whole chunks to 0, at the cost of those that are not."""
        groups = range(first // _GROUP, (stop - 1) // _GROUP + 1)
        fewer, more = (groups, self._values) if len(groups) < len(self._values) else (list(self._values), groups)
        for group in [group for group in fewer if group in more]:
            for chunk in range(max(first, group * _GROUP), min(stop, (group + 1) * _GROUP)):
                self._store(chunk, 0)

    def _chain_parts(self, offset: int, end: int, mark: int) -> None:
        """Note zeros, or what else has no payload, in parts of chunks."""
        while offset < end:
            stop = min(end, (offset // CHUNK_SIZE + 1) * CHUNK_SIZE)
            self._chain(offset, stop - offset, mark)
            offset = stop

    def _chain(self, offset: int, length: int, payload_hash: int) -> None:
        while length:
            chunk = offset // CHUNK_SIZE
            part = min(length, (chunk + 1) * CHUNK_SIZE - offset)
            step = _STEP.pack(self.value_of(chunk), offset, part, payload_hash)
            self._store(chunk, xxh3_64_intdigest(step) or 1)
            offset += part
            length -= part

    def _store(self, chunk: int, value: int) -> None:
        old = self.value_of(chunk)
        if old:
            self.value ^= xxh3_64_intdigest(_SLOT.pack(chunk, old))
        if value:
            self.value ^= xxh3_64_intdigest(_SLOT.pack(chunk, value))
        if value or old:
            group = self._values.get(chunk // _GROUP)
            if group is None:
                group = self._values[chunk // _GROUP] = array("Q", bytes(8 * _GROUP))
            group[chunk % _GROUP] = value
