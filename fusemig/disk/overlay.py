"""OverlayDisk: copy-on-write at 4 KiB blocks over a read-only base.

    read   blocks that the overlay holds ──> image
           the others ─────────────────────> base; zeros beyond its end
    write  the rest of a partly written block is read from the base; the whole block goes into the image;
           then the block is noted in the map (`fusemig.disk.allocation`); then the write is acknowledged

1. A block is read from the image if and only if its bit is set, and its bit is set only when the block is whole there.
   What a failed or killed write left in the image without its bit is never read.
2. A write that touches a block without a bit claims its range of blocks for as long as it runs. Two such writes to one
   block are made one after the other, so neither puts old bytes from the base over the other's new ones. Writes to
   blocks with bits claim nothing, and bits are never taken away.
3. Zeroing is a write of zeros: the block becomes the overlay's, a hole there. The base never shows through again.
4. A flush makes the data durable, then the map; a block without a durable bit reads as the base after a power loss.

`fusemig.disk.overlay_file` opens all of it as files, and sees that the base is the right one.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from fusemig.core.units import BLOCK_SIZE, mask_runs
from fusemig.disk.base import Disk, Extent
from fusemig.errors import ConfigError, DiskError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fusemig.disk.allocation import AllocationMap, BaseIdentity
    from fusemig.disk.base import Buffer

_SHIFT: Final = BLOCK_SIZE.bit_length() - 1
_COPY_STEP: Final = 1 << 20
"""Bytes of the base that are copied at a time."""
ZERO_STEP: Final = 1 << 30
"""Bytes that are zeroed under one claim."""


class OverlayDisk(Disk):
    """A disk whose image holds only what differs from a base."""

    is_base_proved: bool = True
    """Whether nobody has written the base, as far as can be told, since it was found to be `shared_base`."""

    def __init__(self, image: Disk, base: Disk, allocation: AllocationMap) -> None:
        """Lay ``image`` over ``base``; ``allocation`` says what it holds. `close` closes all three.

        Raises:
            ConfigError: the base is larger than the image.
        """
        check_sizes(image, base)
        self.name = image.name
        self.size = image.size
        self.image = image
        self.base = base
        self._allocation = allocation
        self._bits = allocation.bits  # looked at here for single blocks, which most requests are
        self._claims_changed = threading.Condition()
        self._claims: list[tuple[int, int]] = []  # guarded by _claims_changed
        self._flush_error: DiskError | None = None
        self._distrust: DiskError | None = None

    @property
    def shared_base(self) -> BaseIdentity:
        """Which base this lies over, as it was seen when it was opened."""
        return self._allocation.base

    # Reading

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from the image and, where that holds nothing, from the base."""
        first, stop = offset >> _SHIFT, offset + len(buffer) + BLOCK_SIZE - 1 >> _SHIFT
        mask = self._bits[first >> 3] >> (first & 7) & 1 if stop - first == 1 else self._allocation.mask(first, stop)
        if not mask:
            self._read_base(buffer, offset)
        elif mask == (1 << (stop - first)) - 1:
            self.image.pread_into(buffer, offset)
        else:
            for start, end, is_ours in self._parts(mask, offset, len(buffer)):
                part = buffer[start - offset : end - offset]
                if is_ours:
                    self.image.pread_into(part, start)
                else:
                    self._read_base(part, start)

    def _read_base(self, buffer: memoryview, offset: int) -> None:
        if offset + len(buffer) <= self.base.size:
            self.base.pread_into(buffer, offset)
            return
        n = max(0, self.base.size - offset)
        if n:
            self.base.pread_into(buffer[:n], offset)
        buffer[n:] = bytes(len(buffer) - n)

    def read_ahead(self, offset: int, length: int) -> None:
        """Have each range fetched from where it lies."""
        mask = self._allocation.mask(offset >> _SHIFT, offset + length + BLOCK_SIZE - 1 >> _SHIFT)
        for start, end, is_ours in self._parts(mask, offset, length):
            if is_ours:
                self.image.read_ahead(start, end - start)
            elif start < self.base.size:
                self.base.read_ahead(start, min(end, self.base.size) - start)

    def pread_nowait(self, buffer: memoryview, offset: int) -> bool:
        """Fill ``buffer`` if everything is in memory, wherever it lies."""
        first, stop = offset >> _SHIFT, offset + len(buffer) + BLOCK_SIZE - 1 >> _SHIFT
        mask = self._bits[first >> 3] >> (first & 7) & 1 if stop - first == 1 else self._allocation.mask(first, stop)
        if mask == (1 << (stop - first)) - 1:
            return self.image.pread_nowait(buffer, offset)
        if not mask and offset + len(buffer) <= self.base.size:
            return self.base.pread_nowait(buffer, offset)
        for start, end, is_ours in self._parts(mask, offset, len(buffer)):
            part = buffer[start - offset : end - offset]
            if is_ours:
                is_done = self.image.pread_nowait(part, start)
            else:
                n = min(len(part), max(0, self.base.size - start))
                part[n:] = bytes(len(part) - n)
                is_done = not n or self.base.pread_nowait(part[:n], start)
            if not is_done:
                return False
        return True

    @staticmethod
    def _parts(mask: int, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Yield ``(start, end, whether the image holds it)`` in bytes of the runs of a range; bit 0 is at its start."""
        at, end, origin = offset, offset + length, offset >> _SHIFT
        for first, run in mask_runs(mask):
            start = max(offset, origin + first << _SHIFT)
            if start > at:
                yield at, start, False
            at = min(end, origin + first + run << _SHIFT)
            yield start, at, True
        if at < end:
            yield at, end, False

    # Writing

    def pwrite_may_sleep(self, offset: int, length: int) -> bool:
        """Ask the image where it holds every block; elsewhere the base may have to be read and the map written."""
        first, stop = offset >> _SHIFT, offset + length + BLOCK_SIZE - 1 >> _SHIFT
        if self._allocation.mask(first, stop) == (1 << (stop - first)) - 1:
            return self.image.pwrite_may_sleep(offset, length)
        return True

    def pwrite(self, data: Buffer, offset: int) -> None:
        """Write ``data``, and with it the rest of the blocks that the image does not hold yet."""
        length = len(data)
        first, stop = offset >> _SHIFT, offset + length + BLOCK_SIZE - 1 >> _SHIFT
        full = (1 << (stop - first)) - 1
        if self._allocation.mask(first, stop) == full:
            self.image.pwrite(data, offset)
            return
        with self._claimed(first, stop):
            before, after = self._rest_of_edges(offset, length)
            whole = b"".join((before, data, after)) if before or after else data
            self.image.pwrite(whole, offset - len(before))
            if self._allocation.mask(first, stop) != full:
                self._allocation.add(first, stop)

    def write_zeroes(self, offset: int, length: int) -> None:
        """Make the range the overlay's, and read as zeros."""
        end = offset + length
        while offset < end:
            step = min(ZERO_STEP - offset % ZERO_STEP, end - offset)
            self._zero(offset, step)
            offset += step

    def _zero(self, offset: int, length: int) -> None:
        first, stop = offset >> _SHIFT, offset + length + BLOCK_SIZE - 1 >> _SHIFT
        full = (1 << (stop - first)) - 1
        if self._allocation.mask(first, stop) == full:
            self.image.write_zeroes(offset, length)
            return
        with self._claimed(first, stop):
            before, after = self._rest_of_edges(offset, length)
            self.image.write_zeroes(offset, length)
            if before:
                self.image.pwrite(before, offset - len(before))
            if after:
                self.image.pwrite(after, offset + length)
            if self._allocation.mask(first, stop) != full:
                self._allocation.add(first, stop)

    def _rest_of_edges(self, offset: int, length: int) -> tuple[bytearray, bytearray]:
        """Return the bytes that the base has before and after a range, in blocks that the image does not hold yet."""
        end = offset + length
        start = offset - offset % BLOCK_SIZE
        stop = min(self.size, end + -end % BLOCK_SIZE)
        before = bytearray(offset - start if self._is_base(offset) else 0)
        after = bytearray(stop - end if self._is_base(end - 1) else 0)
        if before:
            self._read_base(memoryview(before), start)
        if after:
            self._read_base(memoryview(after), end)
        return before, after

    def _is_base(self, offset: int) -> bool:
        block = offset >> _SHIFT
        return not self._bits[block >> 3] >> (block & 7) & 1

    @contextmanager
    def _claimed(self, first: int, stop: int) -> Iterator[None]:
        """Have blocks for oneself: whoever makes a block the overlay's holds a claim on it."""
        claim = first, stop
        with self._claims_changed:
            while any(first < other_stop and other < stop for other, other_stop in self._claims):
                self._claims_changed.wait()
            self._claims.append(claim)
        try:
            yield
        finally:
            with self._claims_changed:
                self._claims.remove(claim)
                self._claims_changed.notify_all()

    # Durability

    def flush(self) -> None:
        """Return when every finished write is durable: its data, then the map."""
        try:
            self._allocation.persist(self.image.flush)
        except DiskError as exc:
            self._flush_error = exc
            raise
        self._flush_error = None
        if self._distrust is not None:
            raise self._distrust

    def distrust(self, error: DiskError) -> None:
        """Have every flush fail from now on: what guests read of the base is not what they wrote over."""
        self._distrust = error

    def drop_cache(self) -> None:
        """Flush, and have later reads of what the overlay holds come from the store."""
        self.flush()
        self.image.drop_cache()

    def check_in_place(self) -> None:
        """Ask the image."""
        self.image.check_in_place()

    @property
    def io_error(self) -> DiskError | None:
        """Why the last flush failed, or the sync of a store that stays failed, perhaps under an earlier daemon."""
        return self._distrust or self._flush_error or self.image.io_error or self._allocation.io_error

    def forget(self) -> None:
        """Make the disk equal to its base again, durably; nobody may write meanwhile.

        Raises:
            DiskError: the store failed; any part may be the base's again.
        """
        self._allocation.forget()
        self.image.write_zeroes(0, self.size)

    def copy_base(self, offset: int, length: int) -> None:
        """Make a range of whole blocks read as its base; blocks that the overlay holds stay its own, as copies.

        Raises:
            DiskError: a store failed.
        """
        buffer = memoryview(bytearray(min(length, _COPY_STEP)))
        for start, n in list(self.allocated(offset, length)):
            for at in range(start, start + n, _COPY_STEP):
                part = buffer[: min(_COPY_STEP, start + n - at)]
                self._read_base(part, at)
                self.image.pwrite(part, at)

    # Allocation

    def allocated(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield offset and length in bytes of what the overlay holds of a range, in ascending order."""
        end = offset + length
        for first, stop in self._allocation.runs(offset >> _SHIFT, end + BLOCK_SIZE - 1 >> _SHIFT):
            start = max(offset, first << _SHIFT)
            yield start, min(end, stop << _SHIFT) - start

    @property
    def allocated_bytes(self) -> int:
        """How much of the disk the overlay holds, in whole blocks."""
        return self._allocation.n_allocated << _SHIFT

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield the allocation that a guest sees: the image's where that holds a block, else the base's."""
        at, end = offset, offset + length
        for start, n in self.allocated(offset, length):
            yield from self._base_extents(at, start - at)
            yield from self.image.extents(start, n)
            at = start + n
        yield from self._base_extents(at, end - at)

    def is_hole(self, offset: int, length: int) -> bool:
        """Ask the image where it holds the whole range; of others a guest's zeroing has made it hold them."""
        first, stop = offset >> _SHIFT, offset + length + BLOCK_SIZE - 1 >> _SHIFT
        return self._allocation.mask(first, stop) == (1 << (stop - first)) - 1 and self.image.is_hole(offset, length)

    def _base_extents(self, offset: int, length: int) -> Iterator[Extent]:
        n = min(length, max(0, self.base.size - offset))
        if n:
            yield from self.base.extents(offset, n)
        if length > n:
            yield Extent(offset + n, length - n, is_data=False)

    def close(self) -> None:
        """Close the map, the image and the base."""
        self._allocation.close()
        self.image.close()
        self.base.close()


def check_sizes(image: Disk, base: Disk) -> None:
    """Raise `ConfigError` if a base is larger than the image that is to lie over it."""
    if base.size > image.size:
        raise ConfigError(
            f"the base of disk '{image.name}' has {base.size} bytes and its overlay only {image.size}: "
            "an overlay is at least as large as its base"
        )
