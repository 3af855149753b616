"""AllocationMap: which 4 KiB blocks of a disk an overlay holds, kept so that neither a kill nor a power loss can lie.

    offset       what                                                  written
    0            header: sizes, which base the overlay lies over       once, before the map gets its name
    4 KiB        session: boot of the host, what the base was like     when the overlay is opened
    8 KiB        durable map: a bit a block, lowest first              by `persist`, after the data was synced; the
                                                                       first of a disk that is borrowed at once
    8 KiB + B    recent map: the same bits and those set since         by `add`, before the write is acknowledged

B is a bit for each block, rounded up to 4 KiB. The file is sparse. Rules:

1. A bit is set in memory, and in the recent map, only when all of its block's 4 KiB lie in the overlay's image.
2. A bit gets into the durable map only after a sync of the image that began when the block's data was written. So
   whatever a power loss leaves of the durable map, no bit in it is without its data.
3. `persist` returns when every bit that was set when it was called is durable: data first, then the map.
4. The recent map counts only while the host that wrote it is still up (the boot in the session is the present one).
   Then the page cache has every write, synced or not, and a daemon that was killed lost nothing that it acknowledged.
   After a power loss it is not looked at: it may have reached the store before the data did.
5. A new session begins with everything that was read of both maps made durable, then the recent map emptied, then the
   session written. Where a sync fails for good, the session of this boot goes on instead, recent map and all, and no
   later `persist` succeeds.
6. Bits are never cleared, except all of them by `forget`: first the map, durably, then (by the caller) the data.
7. What is read of the durable map is taken for durable after another boot, since it can only come from the store, and
   where the open file was inherited, which would tell of a sync that failed. Else it is written again: a page that the
   kernel could not write stays in memory as if it were clean, and a sync through a new open file knows nothing of it.

A block whose bit a power loss took away reads as the base again. Only a write that nobody had synced can be lost so,
and it is lost as a whole: what it had copied from the base is in the base still.
"""

from __future__ import annotations

import mmap
import threading
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from fusemig.core.bitmap import ChunkBitmap, fill
from fusemig.core.units import BLOCK_SIZE, mask_runs, n_blocks
from fusemig.disk.page import PAGE_SIZE, decode_page, encode_page
from fusemig.errors import ConfigError, DiskError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from fusemig.disk.base import Disk

_PAGE: Final = PAGE_SIZE
_BITS_PER_PAGE: Final = 8 * _PAGE
_FULL_PAGE: Final = b"\xff" * _PAGE
_STEP: Final = 64 * _PAGE
"""Bytes of a map that are written at once."""
_WINDOW: Final = 4096
"""Blocks that a search looks at at once; divides `_BITS_PER_PAGE`."""
_HEADER_AT: Final = 0
_SESSION_AT: Final = _PAGE
_DURABLE_AT: Final = 2 * _PAGE
_VERSION: Final = 1
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class BaseIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """Which base an overlay was made over."""

    size: int
    """Bytes."""
    digest: str
    """As `fusemig.disk.overlay_file.content_digest` makes it."""
    path: str = ""
    """Where it was, for people."""


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    block_size: int
    disk_size: int
    base: BaseIdentity


class _Session(msgspec.Struct, frozen=True, kw_only=True):
    boot: str
    stamp: str = ""
    served: str = ""


def boot_id() -> str:
    """Return what names the host's present boot.

    Raises:
        ConfigError: the host does not say.
    """
    try:
        return _BOOT_ID.read_text().strip()
    except OSError as exc:
        raise ConfigError(f"cannot read {_BOOT_ID}: {exc.strerror}; an overlay needs it, so mount /proc") from exc


def map_size(disk_size: int) -> int:
    """Return the size in bytes of the map of a disk of ``disk_size`` bytes."""
    return _DURABLE_AT + 2 * _region_size(disk_size)


def _region_size(disk_size: int) -> int:
    return -(-n_blocks(disk_size) // _BITS_PER_PAGE) * _PAGE


def write_header(store: Disk, disk_size: int, base: BaseIdentity) -> None:
    """Make a blank ``store`` of `map_size` bytes the map of an overlay that holds nothing, durably."""
    header = _Header(version=_VERSION, block_size=BLOCK_SIZE, disk_size=disk_size, base=base)
    store.pwrite(encode_page(header), _HEADER_AT)
    store.flush()


class AllocationMap:
    """The bits in memory and in their store; thread safe.

    `mask` and `runs` take no lock: bits only appear, and appear when their blocks are whole.
    """

    def __init__(self, store: Disk, disk_size: int, boot: str, *, is_inherited: bool = False) -> None:
        """Read the map of a disk of ``disk_size`` bytes, as the host with this boot id may see it; writes nothing.

        ``is_inherited`` says of ``store`` what `RawDisk.is_inherited` does: that its flush fails if one ever did.

        Raises:
            ConfigError: it is damaged, of a later version or of a disk of another size.
            DiskError: the store failed.
        """
        self._store = store
        self._boot = boot
        self._region = _region_size(disk_size)
        self.base = self._read_header(disk_size)
        self.n_blocks = n_blocks(disk_size)
        self.n_allocated = 0
        """How many blocks the overlay holds."""
        self._lock = threading.Lock()
        # Written under _lock. A private mapping: what nobody writes costs no memory.
        self.bits = mmap.mmap(-1, self._region, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        """The map: bit ``block & 7`` of byte ``block >> 3``."""
        self._used = ChunkBitmap(self._region // _PAGE)
        """A bit for each page of the map that has bits."""
        self._pages: set[int] = set()
        """Pages of the map with bits that are not durable."""
        # Taken before _lock, and held while the map is written:
        self._persisting = threading.Lock()
        session = decode_page(store.pread(_PAGE, _SESSION_AT), _Session)
        self.stamp = session.stamp if session is not None else ""
        """What `begin` was told when the overlay was last opened."""
        self._is_of_this_boot = session is not None and session.boot == boot
        self.served = session.served if session is not None and self._is_of_this_boot else ""
        """What `begin` was told of the base that is served from then on, if that was in this boot."""
        self._is_proved = is_inherited or not self._is_of_this_boot
        """Whether what the durable map says is in its store, and not only in memory."""
        self._load(_DURABLE_AT, is_durable=True)
        if self._is_of_this_boot:
            self._load(_DURABLE_AT + self._region, is_durable=False)

    def _read_header(self, disk_size: int) -> BaseIdentity:
        header = decode_page(self._store.pread(_PAGE, _HEADER_AT), _Header) if self._store.size >= _DURABLE_AT else None
        what = f"the allocation map of disk '{self._store.name}'"
        if header is None:
            raise ConfigError(
                f"{what} is damaged, so what the overlay holds is not known; restore both from a backup, or delete both"
            )
        if header.version != _VERSION or header.block_size != BLOCK_SIZE:
            raise ConfigError(f"{what} was written by another version of fusemig; use that one")
        if header.disk_size != disk_size or self._store.size != map_size(disk_size):
            raise ConfigError(
                f"{what} is for an image of {header.disk_size} bytes and the image has {disk_size}: they do not belong "
                "together; restore both from a backup"
            )
        return header.base

    def _load(self, at: int, *, is_durable: bool) -> None:
        for extent in self._store.extents(at, self._region):
            if not extent.is_data:
                continue
            first = (extent.offset - at) // _PAGE
            for page in range(first, -(-(extent.offset - at + extent.length) // _PAGE)):
                self._merge(page, bytes(self._store.pread(_PAGE, at + page * _PAGE)), is_durable=is_durable)

    def _merge(self, page: int, found: bytes, *, is_durable: bool) -> None:
        part = slice(page * _PAGE, (page + 1) * _PAGE)
        known = int.from_bytes(self.bits[part], "little")
        # What is beyond the disk's end is no block.
        n_bits = min(_BITS_PER_PAGE, self.n_blocks - page * _BITS_PER_PAGE)
        both = known | int.from_bytes(found, "little") & ((1 << n_bits) - 1)
        if both == known:
            return
        self._used.set(page)
        self.bits[part] = both.to_bytes(_PAGE, "little")
        self.n_allocated += both.bit_count() - known.bit_count()
        if not is_durable:
            self._pages.add(page)

    def begin(self, sync_data: Callable[[], None], stamp: str, served: str = "") -> None:
        """Begin a session: what a killed daemon left becomes durable; ``stamp`` and ``served`` are kept for the next.

        Raises:
            DiskError: the store failed; the map is as it was.
        """
        if not self._is_proved:
            sync_data()
            self._write_used()
            self._store.flush()
            self._pages.clear()
        elif self._pages:
            self.persist(sync_data)
        else:
            self._store.flush()  # a daemon that was killed may have written the durable map and not synced it yet
        self._store.write_zeroes(_DURABLE_AT + self._region, self._region)
        self._store.pwrite(encode_page(_Session(boot=self._boot, stamp=stamp, served=served)), _SESSION_AT)
        self.stamp, self.served = stamp, served

    def resume(self, image: Disk, stamp: str, served: str = "") -> None:
        """Begin a session, or go on with the one of this boot where a sync of the image or of the map failed for good.

        Such a store keeps its error, and guests that have it open are to hear of that rather than to wait for a daemon
        that never starts.

        Raises:
            DiskError: the store failed otherwise, or there is no session to go on with.
        """
        try:
            self.begin(image.flush, stamp, served)
        except DiskError:
            if not self._is_of_this_boot or (image.io_error or self.io_error) is None:
                raise

    @property
    def io_error(self) -> DiskError | None:
        """The failed sync that made the store of the map untrustworthy, if one did."""
        return self._store.io_error

    def mask(self, first: int, stop: int) -> int:
        """Return the bits of the blocks ``first`` to ``stop - 1``, the first one lowest."""
        bits = int.from_bytes(self.bits[first >> 3 : stop + 7 >> 3], "little")
        return bits >> (first & 7) & ((1 << (stop - first)) - 1)

    def next_clear(self, first: int) -> int:
        """Return the first block from ``first`` on that the overlay does not hold; `n_blocks` if there is none.

        It costs what lies between the two, a page at a time, and nothing for what is beyond.
        """
        at = first
        while at < self.n_blocks:
            page_at = at - at % _BITS_PER_PAGE
            if at == page_at and self.bits[at >> 3 : (at >> 3) + _PAGE] == _FULL_PAGE:
                at += _BITS_PER_PAGE
                continue
            stop = min(self.n_blocks, page_at + _BITS_PER_PAGE)
            clear = ~self.mask(at, stop) & ((1 << (stop - at)) - 1)
            if clear:
                return at + (clear & -clear).bit_length() - 1
            at = stop
        return self.n_blocks

    def runs(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield ``(first, stop)`` of each run of allocated blocks in a range, in ascending order."""
        start = end = first
        for base, limit in self._windows(first, stop):
            for offset, count in mask_runs(self.mask(base, limit)):
                if base + offset != end:
                    if end > start:
                        yield start, end
                    start = base + offset
                end = base + offset + count
        if end > start:
            yield start, end

    def _windows(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of a range of blocks that may have bits, a window at a time."""
        page = self._used.next_set(first // _BITS_PER_PAGE)
        while page is not None and page * _BITS_PER_PAGE < stop:
            for at in range(page * _BITS_PER_PAGE, (page + 1) * _BITS_PER_PAGE, _WINDOW):
                if first < at + _WINDOW and at < stop:
                    yield max(first, at), min(stop, at + _WINDOW)
            page = self._used.next_set(page + 1)

    def add(self, first: int, stop: int) -> None:
        """Take note that the blocks ``first`` to ``stop - 1`` lie in the image, before their writes are acknowledged.

        Raises:
            DiskError: the store failed; the bits are not set.
        """
        low, high = first >> 3, stop + 7 >> 3
        fresh = ((1 << (stop - first)) - 1) << (first & 7)
        with self._lock:
            known = int.from_bytes(self.bits[low:high], "little")
            content = (known | fresh).to_bytes(high - low, "little")
            self._store.pwrite(content, _DURABLE_AT + self._region + low)
            first_page, stop_page = low // _PAGE, -(-high // _PAGE)
            self._used.set_range(first_page, stop_page)
            self.bits[low:high] = content
            self.n_allocated += (known | fresh).bit_count() - known.bit_count()
            self._pages.update(range(first_page, stop_page))

    def hold_all_but(self, missing: Iterable[tuple[int, int]], sync_data: Callable[[], None]) -> None:
        """Have a blank map that nobody uses yet say that the image holds all but some runs; `begin` makes it durable.

        It takes no memory but the map's own, and writes each page of the durable map once: guests wait for it.

        Args:
            missing: ``(first, stop)`` of runs of blocks, in ascending order.
            sync_data: makes what the image holds durable.

        Raises:
            DiskError: the store failed; any of the bits may be there.
        """
        used_from = used_to = at = 0
        for first, stop in chain(missing, ((self.n_blocks, self.n_blocks),)):
            if first > at:
                fill(self.bits, at, first, ones=True)
                self.n_allocated += first - at
                page = at // _BITS_PER_PAGE
                if page > used_to:
                    self._used.set_range(used_from, used_to)
                    used_from = page
                used_to = -(-first // _BITS_PER_PAGE)
            at = stop
        self._used.set_range(used_from, used_to)
        sync_data()
        self._write_used()

    def _write_used(self) -> None:
        """Write the durable map as it is in memory, but for what has no bits; nobody uses the map meanwhile."""
        with memoryview(self.bits) as bits:
            for page, stop in self._used.runs():
                for low in range(page * _PAGE, stop * _PAGE, _STEP):
                    with bits[low : min(low + _STEP, stop * _PAGE)] as part:
                        self._store.pwrite(part, _DURABLE_AT + low)

    def persist(self, sync_data: Callable[[], None]) -> None:
        """Make the data, by ``sync_data``, and then every bit that is set by now durable.

        One at a time, so that no older page of the map overwrites a newer one, and so that nobody is told "durable"
        while another still writes the bits.

        Raises:
            DiskError: the store failed; the bits wait for the next call.
        """
        with self._persisting:
            with self._lock:
                pages, self._pages = self._pages, set()
                contents = {page: self.bits[page * _PAGE : (page + 1) * _PAGE] for page in pages}
            if contents:
                try:
                    sync_data()
                    for page, content in sorted(contents.items()):
                        self._store.pwrite(content, _DURABLE_AT + page * _PAGE)
                    self._store.flush()
                except DiskError:
                    with self._lock:
                        self._pages |= pages
                    raise
                return
        sync_data()
        if (error := self._store.io_error) is not None:
            raise error

    def forget(self) -> None:
        """Have the overlay hold nothing, durably; the caller then frees the data. Nobody may write meanwhile.

        Raises:
            DiskError: the store failed; any of the bits may be gone.
        """
        with self._persisting, self._lock:
            for page, stop in self._used.runs():
                self.bits[page * _PAGE : stop * _PAGE] = bytes((stop - page) * _PAGE)
            self._used.clear_range(0, self._used.n_bits)
            self.n_allocated = 0
            self._pages.clear()
            self._store.write_zeroes(_DURABLE_AT, 2 * self._region)
            self._store.flush()

    def close(self) -> None:
        """Close the store, when `persist` has ended in whatever thread; idempotent."""
        with self._persisting:
            self._store.close()
