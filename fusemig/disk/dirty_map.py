"""DirtyMap: which chunks guests wrote since a known moment, kept so that a kill of the daemon takes nothing from it.

    offset        what                                          written
    0             header of the first map (`Since.SESSION`)     when it is begun, dropped, reopened or closed
    4 KiB         its bits: a bit a chunk, lowest first         by `note`, before the write that they are for begins
    4 KiB + B     header and bits of the second (`Since.OWNED`)

B is a bit for each chunk, rounded up to 4 KiB. A map whose header says ``base`` means: *every chunk whose bit is clear
holds what it held when the base was begun*. There are two bases, so that neither has to give way to the other:

    SESSION   when migration ``session`` began to read: what its destination got of a clear chunk, at any time, is right
    OWNED     when this side took over in ``epoch``: a clear chunk equals that of the image which was released then

Rules:

1. A bit is in the file (in the page cache: a kill takes nothing, and no sync is paid) before the write begins.
2. `begin` makes the header blank before it clears bits, and `seal` writes it only when every write that may have missed
   the new map has ended. So whenever a daemon is killed, a map that has a base is complete.
3. A map counts only if the host that wrote it is still up (the boot in the header is the present one), or if it was
   closed in order: then the header, synced, has the stamp of the image, which must be unchanged. Opened again, the
   stamp is taken off, durably, before anything is noted. So after a power loss no map counts.
4. A map that cannot be written any more is dropped: its header is made blank. Only if that fails too the guest's write
   fails.

Granularity. A chunk, 1 MiB: a file of 4 MiB for both maps of a disk of 16 TiB, and one system call for each chunk that
is written for the first time since the base, instead of one for each block. What it costs is that a chunk of which one
block was written goes as a whole, after a restart only: while the daemon lives the tracker knows the blocks.

The file is written by calls and not mapped: the page cache, and so what survives a kill, is the same, but a full or
failing store is an error that can be handled and no SIGBUS, and a store that makes a writer wait does not hold up every
thread of the interpreter.
"""

from __future__ import annotations

import threading
from enum import IntEnum
from typing import TYPE_CHECKING, Final

import msgspec

from fusemig.core.bitmap import ChunkBitmap
from fusemig.core.units import CHUNK_SIZE, n_chunks
from fusemig.disk.page import BLANK_PAGE, PAGE_SIZE, decode_page, encode_page

if TYPE_CHECKING:
    from fusemig.disk.base import Disk

_VERSION: Final = 1


class Since(IntEnum):
    """Which of a file's two maps."""

    SESSION = 0
    OWNED = 1


class MapBase(msgspec.Struct, frozen=True, kw_only=True):
    """The moment since which a map counts."""

    image_id: str
    epoch: int
    """In which it began."""
    session: str
    """The migration that began then, or ended then."""


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    chunk_size: int
    disk_size: int
    boot: str
    base: MapBase
    stamp: str = ""
    """Of the image, when the map was closed in order; empty while it is open."""


def _region_size(disk_size: int) -> int:
    return -(-n_chunks(disk_size) // (8 * PAGE_SIZE)) * PAGE_SIZE


def dirty_file_size(disk_size: int) -> int:
    """Return the size in bytes of the file with both maps of a disk of ``disk_size`` bytes."""
    return len(Since) * (PAGE_SIZE + _region_size(disk_size))


class DirtyMap:
    """One of the maps of a file; thread safe."""

    def __init__(self, store: Disk, disk_size: int, since: Since, boot: str, stamp: str) -> None:
        """Read a map of a disk of ``disk_size`` bytes and go on with it, if it can be trusted.

        Args:
            store: the file; the caller closes it.
            disk_size: bytes.
            since: which of its maps.
            boot: names the host's present boot.
            stamp: of the image as it is now; empty if it has none.

        Raises:
            DiskError: the store failed.
        """
        self._store = store
        self._disk_size = disk_size
        self._boot = boot
        self._at = since * (PAGE_SIZE + _region_size(disk_size))
        self._lock = threading.Lock()
        # Written under _lock:
        self.base: MapBase | None = None
        """Since when the map counts; None: it proves nothing."""
        header = decode_page(store.pread(PAGE_SIZE, self._at), _Header)
        is_known = header is not None and (header.version, header.chunk_size) == (_VERSION, CHUNK_SIZE)
        if header is not None and is_known and header.disk_size == disk_size and self._is_trusted(header, stamp):
            self._bits = store.pread(_region_size(disk_size), self._at + PAGE_SIZE)
            self.written = ChunkBitmap(n_chunks(disk_size), self._bits)
            if header.stamp:
                self._write_header(header.base)
                store.flush()
            self.base = header.base
        else:
            self._bits = bytearray(_region_size(disk_size))
            self.written = ChunkBitmap(n_chunks(disk_size), self._bits)
            """The chunks that guests wrote or are about to write; the map goes on to change."""
            if header is not None:
                self.drop()
                store.flush()

    def _is_trusted(self, header: _Header, stamp: str) -> bool:
        return header.stamp == stamp if header.stamp else header.boot == self._boot

    def _write_header(self, base: MapBase, stamp: str = "") -> None:
        header = _Header(
            version=_VERSION,
            chunk_size=CHUNK_SIZE,
            disk_size=self._disk_size,
            boot=self._boot,
            base=base,
            stamp=stamp,
        )
        self._store.pwrite(encode_page(header), self._at)

    def begin(self) -> None:
        """Empty the map; it has no base until `seal`.

        Raises:
            DiskError: the store failed, and the map has no base.
        """
        with self._lock:
            self._blank()
            # Written, not punched out: no bit that is noted may find the store full.
            self._store.pwrite(bytes(len(self._bits)), self._at + PAGE_SIZE)
            self.written.clear_range(0, self.written.n_bits)

    def seal(self, base: MapBase) -> None:
        """Give the map its base: from the moment of `begin` on every write has been noted.

        Raises:
            DiskError: the store failed, and the map has no base.
        """
        with self._lock:
            self._write_header(base)
            self.base = base

    def note(self, first: int, stop: int) -> None:
        """Note that the chunks ``first`` to ``stop - 1`` are about to be written.

        Raises:
            DiskError: the store failed; the bits may be missing.
        """
        if first >= stop:
            return
        low, high = first >> 3, stop + 7 >> 3
        with self._lock:
            self.written.set_range(first, stop)
            self._store.pwrite(self._bits[low:high], self._at + PAGE_SIZE + low)

    def drop(self) -> None:
        """Take the map's base away.

        Raises:
            DiskError: the store failed; the map may be believed after a restart.
        """
        with self._lock:
            self._blank()

    def _blank(self) -> None:
        self.base = None
        self._store.pwrite(BLANK_PAGE, self._at)

    def close(self, stamp: str) -> None:
        """End in order: nothing will be written to the image, which is synced, until the map is opened again.

        Raises:
            DiskError: the store failed; the map counts until the host goes down.
        """
        with self._lock:
            if self.base is not None:
                # The bits before the stamp that vouches for them, in case the host goes down between the two.
                self._store.flush()
                self._write_header(self.base, stamp)
                self._store.flush()
