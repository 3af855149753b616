"""Notes: which chunks guests have written, for persistent maps and for whoever asks.

Before a write is admitted its chunks are *noted* in every persistent map (`fusemig.disk.dirty_map`), without the lock
as that writes to a file. ``noted`` are the chunks that all maps have, so it costs one look in the usual case. To empty
a map under a running guest the notes are forgotten, and what began before that is waited for (`Admission.begin_map`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from fusemig.core.bitmap import ChunkBitmap
from fusemig.core.units import chunks_of
from fusemig.errors import DiskError

if TYPE_CHECKING:
    import threading

    from fusemig.disk.dirty_map import DirtyMap

log = structlog.get_logger(__name__)


class Notes:
    """The written chunks of a disk and the maps that know of them."""

    def __init__(self, name: str, n_chunks: int, lock: threading.Lock) -> None:
        """Note the writes to the disk ``name``, whose lock this is, in no map yet."""
        self._name = name
        self._lock = lock
        # Guarded by _lock:
        self.noted = bytearray((n_chunks >> 3) + 1)
        """Chunks that the written map and every persistent map have, as bits; read without the lock."""
        self._written = ChunkBitmap(n_chunks)
        self._maps: tuple[DirtyMap, ...] = ()

    def add_map(self, one: DirtyMap) -> None:
        """Note in this map too, if it is not among them; under the lock, and `forget` is to follow."""
        if one not in self._maps:
            self._maps = (*self._maps, one)

    def forget(self) -> None:
        """Note every chunk anew; under the lock."""
        self.noted = bytearray(len(self.noted))

    def note(self, offset: int, length: int) -> None:
        """Note a write that has not been admitted in every map; it may be noted and then be refused or parked.

        Raises:
            DiskError: a map can neither be written nor dropped.
        """
        touched = chunks_of(offset, length)
        with self._lock:
            noted, maps = self.noted, self._maps
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
            disk=self._name,
            reason=str(reason),
        )
        try:
            dropped.drop()
        except DiskError as exc:
            raise exc from reason
        with self._lock:
            self._maps = tuple(one for one in self._maps if one is not dropped)

    @property
    def n_written(self) -> int:
        """How many chunks guests have written since the disk was opened."""
        return self._written.count

    def written_bits(self, first: int, stop: int) -> int:
        """Return which of the chunks ``first`` to ``stop - 1`` guests have written since, as bits from ``first`` on."""
        with self._lock:
            return self._written.bits(first, stop)


def has_noted(noted: bytearray, offset: int, length: int) -> bool:
    """Tell whether all chunks of a range are noted."""
    return all(noted[chunk >> 3] >> (chunk & 7) & 1 for chunk in chunks_of(offset, length))
