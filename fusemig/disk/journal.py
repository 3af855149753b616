"""ReceiptJournal: which chunks of an incoming image are durable, and with which value of the digest.

    offset    what                                                written
    0         header: disk, image id, epoch, session              when a migration begins anew, durably
    4 KiB     mark: the last frame that the entries cover         by `write`, after the entries are durable
    8 KiB     entries: 62 chunks' values and a check a sector     by `write`, after the image was synced

It lies beside the image as ``PATH.fusemig-journal``. A value is that of `fusemig.core.digest`, 0 where the chunk is not
known to be there; a chunk of zeros has no entry, because to say so again costs less. Rules:

1. An entry is written only after a sync of the image that began when the entry's frames had been written.
2. An entry is of one session: its check is seeded with that, so that no entry of another one is ever believed; and it
   fits one sector, so that a power loss leaves it as it was or as it became. One that is damaged is no entry.
3. The mark says: *all entries are those of the frames up to here, or of later ones*. It is written after they are
   durable. A mark that is damaged says nothing is covered.

What is in an entry was true once, and frames that came after it may have changed the chunk. So who believes one must
know that no later frame of the chunk was ever sent, or that every later one had the same bytes in it:

- a source that lives knows the chunks of all frames that the mark does not cover, and sends those as wholes;
- a source that was restarted knows from its dirty map which chunks hold what they held when the session began;
- and any other one compares contents.

Memory and time: O(chunks changed) for each `write`; the file has 8.3 bytes for each chunk that holds data.
"""

from __future__ import annotations

import struct
from array import array
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import msgspec
from xxhash import xxh3_64_intdigest

from fusemig.core.bitmap import ChunkBitmap
from fusemig.core.units import CHUNK_SIZE, SECTOR_SIZE, n_chunks
from fusemig.disk.page import BLANK_PAGE, PAGE_SIZE, decode_page, encode_page
from fusemig.disk.raw import RawDisk, create_image
from fusemig.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from fusemig.core.digest import DiskDigest
    from fusemig.disk.base import Disk

_VERSION: Final = 1
_HEADER_AT: Final = 0
_MARK_AT: Final = PAGE_SIZE
_ENTRIES_AT: Final = 2 * PAGE_SIZE
CHUNKS_PER_SECTOR: Final = 62
_VALUES: Final = struct.Struct(f"<{CHUNKS_PER_SECTOR}Q")
_CHECK: Final = struct.Struct("<Q")
_WINDOW: Final = 256
"""Sectors that are read at once."""


class JournalOwner(msgspec.Struct, frozen=True, kw_only=True):
    """Which migration of which disk a journal is of."""

    image_id: str
    epoch: int
    """The one in which the destination will own the disk."""
    session: str


class Mark(msgspec.Struct, frozen=True):
    """The last frame that is covered."""

    attempt: int = 0
    """The connection, counted from 1 in each session; 0: nothing is."""
    sequence: int = 0
    """The frame of that connection."""


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    chunk_size: int
    disk_size: int
    owner: JournalOwner


def _n_sectors(disk_size: int) -> int:
    return -(-n_chunks(disk_size) // CHUNKS_PER_SECTOR)


def journal_size(disk_size: int) -> int:
    """Return the size in bytes of the journal of a disk of ``disk_size`` bytes."""
    return _ENTRIES_AT + _n_sectors(disk_size) * SECTOR_SIZE


class ReceiptJournal:
    """The journal of one incoming disk; one call at a time, but `snapshot` may run beside `write`."""

    def __init__(self, store: Disk, disk_size: int) -> None:
        """Read a journal for a disk of ``disk_size`` bytes from a store of `journal_size` bytes.

        Raises:
            DiskError: the store failed.
        """
        self._store = store
        self._disk_size = disk_size
        self._seed = 0
        self._has_entries = ChunkBitmap(_n_sectors(disk_size))
        """Sectors that have, or are about to have, values."""
        self.owner: JournalOwner | None = None
        """None: nothing of it is to be believed."""
        self.mark = Mark()
        header = decode_page(store.pread(PAGE_SIZE, _HEADER_AT), _Header)
        if header is not None and (header.version, header.chunk_size, header.disk_size) == (
            _VERSION,
            CHUNK_SIZE,
            disk_size,
        ):
            self._belong_to(header.owner)
            self.mark = decode_page(store.pread(PAGE_SIZE, _MARK_AT), Mark) or Mark()

    def _belong_to(self, owner: JournalOwner) -> None:
        self.owner = owner
        self._seed = xxh3_64_intdigest(msgspec.json.encode(owner))

    def begin(self, owner: JournalOwner) -> None:
        """Forget everything and belong to a new session, durably; before the first byte of it is written.

        Raises:
            DiskError: the store failed; the journal belongs to nobody.
        """
        self.owner, self.mark = None, Mark()
        self._has_entries.clear_range(0, self._has_entries.n_bits)
        self._store.pwrite(BLANK_PAGE * 2, _HEADER_AT)
        self._store.write_zeroes(_ENTRIES_AT, journal_size(self._disk_size) - _ENTRIES_AT)
        self._store.flush()
        header = _Header(version=_VERSION, chunk_size=CHUNK_SIZE, disk_size=self._disk_size, owner=owner)
        self._store.pwrite(encode_page(header), _HEADER_AT)
        self._store.flush()
        self._belong_to(owner)

    def load(self, digest: DiskDigest) -> None:
        """Tell a digest of nothing what is durable.

        Raises:
            DiskError: the store failed.
        """
        for sector, content in self._read():
            values = content[: _VALUES.size]
            if self._check(sector, values) != content[_VALUES.size : _VALUES.size + _CHECK.size]:
                continue
            self._has_entries.set(sector)
            first = sector * CHUNKS_PER_SECTOR
            for chunk, value in enumerate(_VALUES.unpack(values), first):
                if value and chunk < n_chunks(self._disk_size):
                    digest.restore(chunk, value)

    def _read(self) -> Iterator[tuple[int, bytes]]:
        """Yield every sector that may have values, with its content."""
        end = journal_size(self._disk_size)
        for extent in self._store.extents(_ENTRIES_AT, end - _ENTRIES_AT):
            if not extent.is_data:
                continue
            first = extent.offset - extent.offset % SECTOR_SIZE
            stop = min(-(-(extent.offset + extent.length) // SECTOR_SIZE) * SECTOR_SIZE, end)
            for at in range(first, stop, _WINDOW * SECTOR_SIZE):
                part = bytes(self._store.pread(min(_WINDOW * SECTOR_SIZE, stop - at), at))
                for inner in range(0, len(part), SECTOR_SIZE):
                    sector = (at + inner - _ENTRIES_AT) // SECTOR_SIZE
                    yield sector, part[inner : inner + SECTOR_SIZE]

    def _check(self, sector: int, values: bytes) -> bytes:
        return _CHECK.pack(xxh3_64_intdigest(values, seed=self._seed ^ sector))

    def snapshot(self, digest: DiskDigest, changed: ChunkBitmap) -> Mapping[int, bytes]:
        """Return the sectors to be written for the chunks that ``changed``, which is emptied.

        Nothing may be applied to the digest meanwhile.
        """
        sectors: dict[int, bytes] = {}
        for first, stop in changed.runs():
            for sector in range(first // CHUNKS_PER_SECTOR, (stop - 1) // CHUNKS_PER_SECTOR + 1):
                if sector in sectors:
                    continue
                start = sector * CHUNKS_PER_SECTOR
                values = array("Q", digest.values(start, min(start + CHUNKS_PER_SECTOR, n_chunks(self._disk_size))))
                if not any(values) and not self._has_entries[sector]:
                    continue  # zeros from the beginning
                self._has_entries.set(sector)
                packed = _VALUES.pack(*values, *bytes(CHUNKS_PER_SECTOR - len(values)))
                sectors[sector] = (packed + self._check(sector, packed)).ljust(SECTOR_SIZE, b"\0")
        changed.clear_range(0, changed.n_bits)
        return sectors

    def write(self, sectors: Mapping[int, bytes], mark: Mark) -> None:
        """Make entries of a `snapshot` durable, whose image was synced since, and then say so; may sleep.

        Raises:
            DiskError: the store failed; any of the entries may be there.
        """
        if sectors:
            run: list[int] = []
            for sector in sorted(sectors):
                if run and sector != run[-1] + 1:
                    self._write_run(sectors, run)
                    run = []
                run.append(sector)
            self._write_run(sectors, run)
            self._store.flush()
        self._store.pwrite(encode_page(mark), _MARK_AT)
        self.mark = mark

    def _write_run(self, sectors: Mapping[int, bytes], run: list[int]) -> None:
        self._store.pwrite(b"".join(sectors[sector] for sector in run), _ENTRIES_AT + run[0] * SECTOR_SIZE)

    def close(self) -> None:
        """Close the store; idempotent."""
        self._store.close()


def open_journal(name: str, path: Path, disk_size: int) -> ReceiptJournal:
    """Open the journal at ``path`` for disk ``name``; one that is missing or of another size is made anew.

    Raises:
        ConfigError: it cannot be made.
        DiskError: its store failed.
    """
    size = journal_size(disk_size)
    store = None
    if path.exists() or path.is_symlink():
        with suppress(ConfigError):
            store = RawDisk(name, path)
        if store is not None and store.size != size:
            store.close()
            store = None
        if store is None:
            try:
                path.unlink()
            except OSError as exc:
                raise ConfigError(f"cannot replace the journal {path}: {exc.strerror}") from exc
    if store is None:
        create_image(path, size)
        store = RawDisk(name, path)
    try:
        return ReceiptJournal(store, disk_size)
    except BaseException:
        store.close()
        raise
