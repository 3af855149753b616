"""BorrowedDisk: a disk that is ours and not all here; what is missing is fetched from the host that it came from.

    read    blocks that are here ──> image           others: wanted, awaited, then read from the image
    write   whole blocks need nothing fetched; the rest of a partly written block is fetched first
    fill    what was fetched goes where nothing newer is

It is an overlay (`fusemig.disk.overlay`) whose base is a host away, and keeps that module's rules: a block is read from
the image only if its bit is set, a bit is set only when the block is whole there, and it is never taken away; whoever
makes a block whole holds a claim on it, so a fetched block never overwrites a guest's. The map is an `AllocationMap`,
so neither a kill nor a power loss can make a missing block count as here, or undo a write that was synced.

The image may itself be an overlay over a base that is here (`fusemig.disk.overlay_file`), with a map of its own. "Here"
then means: in the overlay or, where that holds nothing, in the base. The two maps never contradict each other, because
of one order at every step, which comes of the image being asked as a whole:

    a write, a fill   the block into the overlay, its bit into the overlay's map, then its bit into this one
    a flush           the overlay's data and then its map durable, then this map
    opening           the overlay's map is resumed, then this one

So a block that counts as here is whole in the overlay, or was the base's when the disk came; were it the other way
round, a crash in between could leave a block that counts as here and reads as the base. This way round it costs a
fetch: what is in the overlay and not noted here is never read, and is fetched again.

A request that has to wait blocks the thread that makes it; `waits_for_peer` tells beforehand, so that lanes give such
requests threads of their own.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import deque
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Final

from fusemig.core.units import BLOCK_SIZE, n_blocks
from fusemig.disk.allocation import AllocationMap, BaseIdentity, boot_id, map_size, write_header
from fusemig.disk.base import Disk, Extent
from fusemig.disk.overlay import ZERO_STEP, OverlayDisk
from fusemig.disk.raw import RawDisk, create_image
from fusemig.errors import ConfigError, DiskError
from fusemig.records.epoch import sync_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from fusemig.disk.base import Buffer
    from fusemig.disk.overlay_file import OverlayFile
    from fusemig.succession.fdstore import FdStore

PATIENCE_S: Final = 60.0
"""How long a request waits without anything coming from the source before it fails, in seconds."""
MAX_SPAN_BLOCKS: Final = 16
"""How much is fetched at least around a read, in blocks: a guest that reads 4 KiB soon reads what follows."""

_SHIFT: Final = BLOCK_SIZE.bit_length() - 1


class Wants:
    """What requests wait for; thread safe.

    The waiting threads and whoever fetches share this; `arrived` and `close` wake all who wait.
    """

    def __init__(self, name: str, patience_s: float = PATIENCE_S) -> None:
        """Nothing is wanted; ``name`` is the disk's, for messages."""
        self.name = name
        self._patience_s = patience_s
        self._changed = threading.Condition()
        # Guarded by _changed:
        self._wanted: deque[tuple[int, int]] = deque()
        self._alarm: Callable[[], None] | None = None
        self._heard_at = time.monotonic()
        self._is_closed = False
        self._waiting: dict[object, tuple[int, int]] = {}

    def wait(self, first: int, stop: int, is_here: Callable[[], bool]) -> None:
        """Want the blocks ``first`` to ``stop - 1`` and wait until ``is_here``.

        Raises:
            DiskError: EIO, the source was silent for too long or this daemon ends; the request may be made again.
        """
        began_at, me = time.monotonic(), object()
        with self._changed:
            self._waiting[me] = first, stop
            self._wanted.append((first, stop))
            if self._alarm is not None:
                self._alarm()
            try:
                while not is_here():
                    left = max(began_at, self._heard_at) + self._patience_s - time.monotonic()
                    if self._is_closed or left <= 0:
                        why = "the daemon ends" if self._is_closed else "its source is out of reach"
                        message = f"disk '{self.name}' is not all here yet, and {why}"
                        raise DiskError(errno.EIO, message, first << _SHIFT, stop - first << _SHIFT)
                    self._changed.wait(left)
            finally:
                del self._waiting[me]

    def take(self) -> tuple[int, int] | None:
        """Return what was wanted first and not taken yet."""
        with self._changed:
            return self._wanted.popleft() if self._wanted else None

    def listen(self, alarm: Callable[[], None]) -> None:
        """Have ``alarm``, and no other, called from any thread whenever something is wanted.

        What waits already is wanted again: whoever fetched before may have asked for it and be gone.
        """
        with self._changed:
            self._alarm = alarm
            self._wanted = deque(self._waiting.values())

    def ignore(self, alarm: Callable[[], None]) -> None:
        """Have ``alarm`` called no more; that of a later `listen` stays."""
        with self._changed:
            if self._alarm is alarm:
                self._alarm = None

    def arrived(self) -> None:
        """Have every waiting request look again."""
        with self._changed:
            self._heard_at = time.monotonic()
            self._changed.notify_all()

    @property
    def n_waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    def close(self) -> None:
        """Fail what waits and what will have to: the daemon ends."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


class BorrowedDisk(OverlayDisk):
    """An image and the knowledge of what of it is here."""

    def __init__(self, image: Disk, allocation: AllocationMap, wants: Wants) -> None:
        """Serve ``image``, of which ``allocation`` says what is here; `close` closes both."""
        super().__init__(image, _Away(image.name, image.size), allocation)
        self.wants = wants

    # A guest's requests

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer``, waiting for what is missing.

        Raises:
            DiskError: EIO, it does not come.
        """
        self._await(offset >> _SHIFT, offset + len(buffer) + BLOCK_SIZE - 1 >> _SHIFT)
        self.image.pread_into(buffer, offset)

    def pread_nowait(self, buffer: memoryview, offset: int) -> bool:
        """Fill ``buffer`` if it is here, and in memory."""
        first, stop = offset >> _SHIFT, offset + len(buffer) + BLOCK_SIZE - 1 >> _SHIFT
        return self._is_here(first, stop) and self.image.pread_nowait(buffer, offset)

    def pwrite(self, data: Buffer, offset: int) -> None:
        """Write ``data``, waiting for the rest of its first and last block if they are missing."""
        self._await_edges(offset, len(data))
        super().pwrite(data, offset)

    def _zero(self, offset: int, length: int) -> None:
        self._await_edges(offset, length)
        super()._zero(offset, length)

    def waits_for_peer(self, offset: int, length: int, *, is_write: bool) -> bool:
        """Tell whether a read touches, or a write cuts, a block that is missing."""
        if not is_write:
            return not self._is_here(offset >> _SHIFT, offset + length + BLOCK_SIZE - 1 >> _SHIFT)
        return not all(self._is_here(block, block + 1) for block in self._edges(offset, length))

    def _await_edges(self, offset: int, length: int) -> None:
        for block in self._edges(offset, length):
            self._await(block, block + 1)

    def _edges(self, offset: int, length: int) -> Iterator[int]:
        """Yield the blocks of which a write leaves something as it is."""
        end = offset + length
        if length and offset % BLOCK_SIZE:
            yield offset >> _SHIFT
        if length and end % BLOCK_SIZE and end != self.size:
            yield end >> _SHIFT

    def _await(self, first: int, stop: int) -> None:
        if not self._is_here(first, stop):
            low = first - first % MAX_SPAN_BLOCKS
            high = min(n_blocks(self.size), stop + -stop % MAX_SPAN_BLOCKS)
            self.wants.wait(low, high, lambda: self._is_here(first, stop))

    def _is_here(self, first: int, stop: int) -> bool:
        return self._allocation.mask(first, stop) == (1 << (stop - first)) - 1

    # Whoever fetches

    def fill(self, data: memoryview | None, offset: int, length: int) -> None:
        """Put in ``length`` bytes that were fetched (None: zeros) where nothing newer is; whole blocks.

        Raises:
            DiskError: the store failed; nothing counts as here that was not.
        """
        for at in range(offset, offset + length, ZERO_STEP):  # zeros may be told of all that is left of a disk
            n = min(ZERO_STEP, offset + length - at)
            self._fill(None if data is None else data[at - offset : at - offset + n], at, n)
            self.wants.arrived()

    def _fill(self, data: memoryview | None, offset: int, length: int) -> None:
        first, stop = offset >> _SHIFT, offset + length + BLOCK_SIZE - 1 >> _SHIFT
        with self._claimed(first, stop):
            for low, high in list(self.missing(first, stop)):
                start, end = low << _SHIFT, min(self.size, high << _SHIFT)
                if data is None:
                    self.image.write_zeroes(start, end - start)
                else:
                    self.image.pwrite(data[start - offset : end - offset], start)
                self._allocation.add(low, high)

    def missing(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield ``(first, stop)`` of each run of missing blocks in a range of blocks, in ascending order."""
        at = first
        for low, high in self._allocation.runs(first, stop):
            if low > at:
                yield at, low
            at = high
        if at < stop:
            yield at, stop

    def next_missing(self, first: int) -> int | None:
        """Return the first block from ``first`` on that is missing; None: all the rest is here."""
        block = self._allocation.next_clear(first)
        return block if block < self._allocation.n_blocks else None

    @property
    def missing_bytes(self) -> int:
        """How much is missing, in whole blocks."""
        return n_blocks(self.size) - self._allocation.n_allocated << _SHIFT

    def close(self) -> None:
        """Fail what waits, close the map and the image."""
        self.wants.close()
        super().close()


class _Away(Disk):
    """What lies at the other host, for an overlay that never reads it."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        raise DiskError(errno.EIO, f"disk '{self.name}': a missing block was read", offset, len(buffer))

    def pwrite(self, data: Buffer, offset: int) -> None:
        raise DiskError(errno.EROFS, f"disk '{self.name}': a missing block was written", offset, len(data))

    def write_zeroes(self, offset: int, length: int) -> None:
        raise DiskError(errno.EROFS, f"disk '{self.name}': a missing block was zeroed", offset, length)

    def flush(self) -> None:
        """Nothing is written here."""

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        yield Extent(offset, length, is_data=True)


# In files


def borrow(
    image: RawDisk | OverlayFile, path: Path, missing: Sequence[tuple[int, int]], kept: FdStore | None = None
) -> BorrowedDisk:
    """Make the map of an image of which the runs ``missing`` of blocks are elsewhere, durably; may sleep.

    ``kept`` keeps the map's lock, and that a sync of it failed (`RawDisk`).

    Raises:
        ConfigError: the map cannot be made.
        DiskError: a store failed.
    """
    new = path.with_name(f"{path.name}.new")
    with ExitStack() as opened:
        try:
            new.unlink(missing_ok=True)
            create_image(new, map_size(image.size))
            store = opened.enter_context(RawDisk(image.name, new, store=kept))
            allocation = new_map(store, image, missing, boot_id())
            new.rename(path)
            sync_directory(path.parent)
        except OSError as exc:
            raise ConfigError(f"cannot make the map {path}: {exc.strerror}") from exc
        opened.pop_all()
    return BorrowedDisk(image, allocation, Wants(image.name))


def new_map(store: Disk, image: Disk, missing: Sequence[tuple[int, int]], boot: str) -> AllocationMap:
    """Make a blank store the map of an image of which the runs ``missing`` of blocks are elsewhere, durably."""
    write_header(store, image.size, BaseIdentity(size=image.size, digest="at the source"))
    allocation = AllocationMap(store, image.size, boot)
    allocation.hold_all_but(missing, image.flush)
    allocation.begin(image.flush, "")
    return allocation


def reopen(image: RawDisk | OverlayFile, path: Path, kept: FdStore | None = None) -> BorrowedDisk:
    """Open the map of an image that `borrow` was called for before; may sleep.

    Raises:
        ConfigError: it is missing or damaged, or not of this image.
    """
    if not path.exists():
        raise ConfigError(
            f"image {image.path} of disk '{image.name}' is not all here, and the map of what is missing, {path}, is "
            "gone: restore it; without it nobody can tell which bytes are the disk's"
        )
    with ExitStack() as opened:
        store = opened.enter_context(RawDisk(image.name, path, store=kept))
        allocation = AllocationMap(store, image.size, boot_id(), is_inherited=store.is_inherited)
        allocation.resume(image, "")
        opened.pop_all()
    return BorrowedDisk(image, allocation, Wants(image.name))


def forget(path: Path) -> None:
    """Remove a map that does not count any more; one that stays is removed the next time."""
    with suppress(OSError):
        path.unlink(missing_ok=True)
