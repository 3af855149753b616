"""PassReader: turns what is dirty into frames; the synchronous half of the source, run in worker threads.

A pass walks the disks in order and each disk's dirty chunks in ascending order from a cursor that a new pass resets. A
chunk's dirty bits are cleared, and it is put in flight, before it is read (rule 2 of `fusemig.core.tracker`); a chunk
that is still in flight is left for the next pass. A whole chunk becomes one frame; the dirty blocks of several chunks
share frames of at most one chunk of payload. What reads as zeros becomes an extent of a ZERO frame; where guests
discarded or zeroed, holes are not even read and every block is looked at by itself, so a destination gets no block that
the source has not. A whole chunk that was sent before with the same bytes, as the disk's digest knows, is not sent
again. With a `HeatOrder` a pass is several such walks, each over what that lets through.

One call runs at a time, so frames are numbered, hashed into the disk's digest and sent in one order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from xxhash import xxh3_64_intdigest

from fusemig.core.bitmap import ChunkBitmap
from fusemig.core.digest import DiskDigest
from fusemig.core.units import BLOCK_SIZE, CHUNK_SIZE, chunk_length, chunk_mask, mask_extents, n_blocks, n_chunks
from fusemig.disk.overlay import OverlayDisk
from fusemig.disk.zeroes import is_zero
from fusemig.errors import DiskError, MigrationError
from fusemig.wire import native

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fusemig.core.compression import Packer
    from fusemig.disk.base import Buffer, Disk
    from fusemig.disk.tracked import TrackedDisk
    from fusemig.disk.tracking import Tracking
    from fusemig.migration.link import BufferPool
    from fusemig.migration.order import HeatOrder

ZERO_SHARE: Final = 16
"""A chunk of zeros is read and not sent: this many of them are a batch."""

READ_AHEAD: Final = 8
"""Chunks that the store is asked for before they are read."""


class OutgoingDisk:
    """A disk on its way out: its guest's side, its tracking and its digest."""

    def __init__(self, index: int, disk: TrackedDisk, tracking: Tracking) -> None:
        """Made by `find_allocated`'s caller; ``index`` is the disk's place in the offer."""
        self.index = index
        self.disk = disk
        self.tracking = tracking
        self.digest = DiskDigest(disk.size)
        self.is_thin = False
        """Whether the destination has the base that this disk lies over, so that only the overlay's blocks go."""
        self.holes: list[tuple[int, int]] = []
        """What reads as zeros and is to be said so."""
        self.bases: list[tuple[int, int]] = []
        """What reads as the shared base and is to be said so."""
        self._patchy = ChunkBitmap(n_chunks(disk.size))
        self.allocated_bytes = 0
        self.sent_bytes = 0
        """Payload bytes taken for sending, zeros included."""

    def find_allocated(self) -> None:
        """Mark every block that holds data and remember the rest as holes; may sleep.

        Tracking must have begun before, so that a write into a hole is not missed: it is marked, and sent after the
        hole.
        """
        self._scan(0, self.disk.size)
        self.allocated_bytes = self.tracking.dirty_bytes

    def mark_whole(self, first: int, stop: int) -> None:
        """Have chunks sent as wholes, parts of which may be holes."""
        self.tracking.mark_chunks(first, stop)
        self._patchy.set_range(first, stop)

    def is_patchy(self, chunk: int) -> bool:
        """Tell whether a dirty chunk may have holes among the blocks that are to be sent."""
        return self._patchy[chunk] or self.disk.was_zeroed(chunk)

    def say_again(self, offset: int, length: int) -> None:
        """Have whole chunks said once more of which nothing was ever sent but that they are zeros, or the base's.

        One that is both in parts goes as a whole: what the destination has of it may have another value there.
        """
        if not self.is_thin:
            _extend(self.holes, offset, length)
            return
        image, end = self.disk.image, offset + length
        assert isinstance(image, OverlayDisk)
        while offset < end:
            n = min(CHUNK_SIZE, end - offset)
            held = sum(length for _, length in image.allocated(offset, n))
            if not held:
                _extend(self.bases, offset, n)
            elif held == n and image.is_hole(offset, n):
                _extend(self.holes, offset, n)
            else:
                self.mark_whole(offset // CHUNK_SIZE, offset // CHUNK_SIZE + 1)
            offset += n

    def _scan(self, offset: int, length: int) -> None:
        """Mark what a range holds, and note the rest as holes or as the base's."""
        image, end = self.disk.image, offset + length
        if not self.is_thin:
            self._scan_extents(image, offset, length)
            return
        assert isinstance(image, OverlayDisk)
        at = offset
        for start, n in image.allocated(offset, length):
            _extend(self.bases, at, start - at)
            self._scan_extents(image.image, start, n)
            at = start + n
        _extend(self.bases, at, end - at)

    def _scan_extents(self, image: Disk, offset: int, length: int) -> None:
        at, limit = offset, offset + length
        for extent in image.extents(offset, length):
            if not extent.is_data:
                continue
            first = extent.offset - extent.offset % BLOCK_SIZE
            stop = min(n_blocks(extent.offset + extent.length) * BLOCK_SIZE, limit)
            self.tracking.mark(first, stop - first)
            _extend(self.holes, at, first - at)
            at = max(at, stop)
        _extend(self.holes, at, limit - at)


def _extend(extents: list[tuple[int, int]], offset: int, length: int) -> None:
    """Add a range at the end of a list of them, if there is anything to add."""
    if length <= 0:
        return
    if extents and sum(extents[-1]) == offset:
        extents[-1] = (extents[-1][0], extents[-1][1] + length)
    else:
        extents.append((offset, length))


@dataclass(frozen=True)
class SentFrame:
    """What an acknowledgement of a frame means."""

    sequence: int
    disk: OutgoingDisk
    chunks: Sequence[int]
    n_bytes: int
    """Bytes of the disk that it covers, zeros included."""


@dataclass
class Batch:
    """Frames ready to be sent in one go."""

    buffers: list[Buffer] = field(default_factory=list)
    frames: list[SentFrame] = field(default_factory=list)
    payloads: list[bytearray] = field(default_factory=list)
    """Buffers to give back to the pool once they are sent."""
    wire_bytes: int = 0
    disk_bytes: int = 0
    cost_bytes: int = 0
    """What is held against the batch's limit."""


class _OpenFrame:
    """Dirty blocks that wait to fill a frame."""

    def __init__(self, disk: OutgoingDisk, buffer: bytearray) -> None:
        self.disk = disk
        self.buffer = buffer
        self.view = memoryview(buffer)
        self.length = 0
        self.extents: list[tuple[int, int]] = []
        self.chunks: list[int] = []


class PassReader:
    """Reads passes over a fixed list of disks."""

    def __init__(self, disks: Sequence[OutgoingDisk], pool: BufferPool, packer: Packer | None = None) -> None:
        """Read for ``disks``, in this order; compress with ``packer``, if there is one."""
        self._disks = disks
        self._pool = pool
        self._packer = packer
        self.unchanged_bytes = 0
        """Bytes that were dirty and turned out to be what was sent last."""
        self._sequence = 0
        self._disk_index = 0
        self._chunk = 0
        self._ahead = 0
        """The store was asked for every dirty chunk before this one."""
        self._only_holes = False
        self._order: HeatOrder | None = None
        self._zeros: dict[int, tuple[list[tuple[int, int]], list[int]]] = {}
        self._open: _OpenFrame | None = None

    def begin_pass(self, order: HeatOrder | None = None, *, only_holes: bool = False) -> None:
        """Put the cursor back to the first chunk of the first disk.

        Args:
            order: says which chunks wait; None: none does.
            only_holes: leave all that is dirty.
        """
        self._disk_index = 0
        self._chunk = self._ahead = 0
        self._order = order
        self._only_holes = only_holes

    def read_batch(self, limit_bytes: int) -> Batch | None:
        """Return frames of about ``limit_bytes``, perhaps none of them, or None at the end of the pass.

        Chunks that read as zeros share a frame and count for a `ZERO_SHARE` of their length.

        Raises:
            MigrationError: a chunk could not be read; it is dirty again.
        """
        batch = Batch()
        while batch.cost_bytes < limit_bytes and self._disk_index < len(self._disks):
            disk = self._disks[self._disk_index]
            if disk.bases or disk.holes:
                self._send_holes(disk, batch)
            taken = None if self._only_holes else self._take_next(disk)
            if taken is None:
                self._close_frames(batch)
                self._go_on()
                continue
            self._chunk = taken[0] + 1
            self._read_taken(disk, *taken, batch, is_in_order=True)
        self._close_frames(batch)
        return batch if batch.frames or batch.cost_bytes else None

    def _take_next(self, disk: OutgoingDisk) -> tuple[int, int] | None:
        """Take the next chunk of the disk that is due; return it with its block mask."""
        if self._order is None:
            return disk.tracking.take_next(self._chunk)
        chunk = disk.tracking.next_dirty(self._chunk)
        while chunk is not None and not self._order.is_due(disk.index, chunk):
            chunk = disk.tracking.next_dirty(chunk + 1)
        # What is due was not taken in this pass, so it is not in flight.
        return None if chunk is None else disk.tracking.take_next(chunk)

    def _go_on(self) -> None:
        """Put the cursor to the next disk; after the last, to the first if chunks were left out."""
        self._chunk = self._ahead = 0
        self._disk_index += 1
        if self._disk_index == len(self._disks) and self._order is not None and self._order.begin_next_sweep():
            self._disk_index = 0

    def read_mirrored(self, limit_bytes: int) -> Batch | None:
        """Return frames of about ``limit_bytes`` of mirrored chunks, wherever the pass is; None if none is dirty.

        Raises:
            MigrationError: as `read_batch`.
        """
        batch = Batch()
        for disk in self._disks:
            taken, n_bytes = [], batch.cost_bytes
            while n_bytes < limit_bytes and (one := disk.tracking.take_mirrored()) is not None:
                taken.append(one)
                n_bytes += one[1].bit_count() * BLOCK_SIZE
            if taken and disk.holes:  # which must not come after what was written into them
                self._send_holes(disk, batch)
            taken.sort(reverse=True)  # a frame's extents ascend
            while taken:
                try:
                    self._read_taken(disk, *taken.pop(), batch, is_in_order=False)
                except MigrationError:
                    for chunk, _ in taken:
                        disk.tracking.restore(chunk)
                    raise
            self._close_frames(batch)
        return batch if batch.frames else None

    def _read_taken(self, disk: OutgoingDisk, chunk: int, mask: int, batch: Batch, *, is_in_order: bool) -> None:
        try:
            if mask == chunk_mask(chunk, disk.disk.size):
                self._read_chunk(disk, chunk, batch, is_in_order=is_in_order)
            else:
                self._read_blocks(disk, chunk, mask, batch)
        except DiskError as exc:
            disk.tracking.restore(chunk)
            raise MigrationError(f"{exc}; the disk stays here: mend its image, then migrate again") from exc

    def _send_holes(self, disk: OutgoingDisk, batch: Batch) -> None:
        bases, disk.bases = disk.bases, []
        for at in range(0, len(bases), native.MAX_EXTENTS):
            self._add_bare(disk, bases[at : at + native.MAX_EXTENTS], [], batch, is_base=True)
        holes, disk.holes = disk.holes, []
        for at in range(0, len(holes), native.MAX_EXTENTS):
            self._add_bare(disk, holes[at : at + native.MAX_EXTENTS], [], batch)

    def _read_chunk(self, disk: OutgoingDisk, chunk: int, batch: Batch, *, is_in_order: bool) -> None:
        offset, length = chunk * CHUNK_SIZE, chunk_length(chunk, disk.disk.size)
        if disk.is_patchy(chunk):
            # Asked anew for each chunk, after its bits were taken: an older answer might be from before a write.
            if disk.disk.image.is_hole(offset, length):
                self._note_zero_chunk(disk, chunk, offset, length, batch)
                return
            # As zeros first: a whole chunk has to get a fresh value at both ends, whatever the destination had there.
            self._add_bare(disk, [(offset, length)], [], batch)
            self._read_extents(disk, chunk, _blocks(offset, length), batch)
            return
        if is_in_order:  # what comes after a mirrored chunk is not what is read next
            self._read_ahead(disk, chunk)
        buffer = self._pool.take()
        view = memoryview(buffer)[:length]
        disk.disk.image.pread_into(view, offset)
        if is_zero(buffer if length == CHUNK_SIZE else view):  # the buffer need not be copied for that
            self._pool.give_back(buffer)
            self._note_zero_chunk(disk, chunk, offset, length, batch)
            return
        batch.cost_bytes += length
        content_hash = xxh3_64_intdigest(view)
        if content_hash == disk.digest.value_of(chunk):
            # Sent as it is, and acknowledged: a chunk in flight is not taken. Memory for this is the digest's own.
            self._pool.give_back(buffer)
            disk.tracking.acknowledge([chunk])
            self.unchanged_bytes += length
            return
        disk.sent_bytes += length
        batch.disk_bytes += length
        self._add_data(disk, [(offset, length)], [chunk], view, content_hash, batch)
        batch.payloads.append(buffer)

    def _read_ahead(self, disk: OutgoingDisk, chunk: int) -> None:
        """Have the dirty chunks after this one fetched while it is hashed and sent, so that a slow store keeps busy."""
        if self._ahead - chunk > READ_AHEAD // 2:
            return
        first, stop = max(self._ahead, chunk + 1), min(chunk + 1 + READ_AHEAD, n_chunks(disk.disk.size))
        self._ahead = chunk + 1 + READ_AHEAD
        if first >= stop:
            return
        bits = disk.tracking.dirty_bits(first, stop)
        for ahead in range(first, stop):
            if bits >> (ahead - first) & 1:
                disk.disk.image.read_ahead(ahead * CHUNK_SIZE, chunk_length(ahead, disk.disk.size))

    def _note_zero_chunk(self, disk: OutgoingDisk, chunk: int, offset: int, length: int, batch: Batch) -> None:
        disk.sent_bytes += length
        batch.disk_bytes += length
        batch.cost_bytes += length // ZERO_SHARE
        self._note_zeros(disk, chunk, [(offset, length)], batch)

    def _read_blocks(self, disk: OutgoingDisk, chunk: int, mask: int, batch: Batch) -> None:
        extents = list(mask_extents(mask, chunk, disk.disk.size))
        if disk.is_patchy(chunk):
            extents = [block for extent in extents for block in _blocks(*extent)]
        self._read_extents(disk, chunk, extents, batch)

    def _read_extents(self, disk: OutgoingDisk, chunk: int, extents: list[tuple[int, int]], batch: Batch) -> None:
        total = sum(length for _, length in extents)
        frame = self._open
        if frame is None or frame.length + total > CHUNK_SIZE or len(frame.extents) + len(extents) > native.MAX_EXTENTS:
            self._close_data(batch)
            frame = self._open = _OpenFrame(disk, self._pool.take())
        undo = frame.length, list(frame.extents)
        zeros: list[tuple[int, int]] = []
        image, view = disk.disk.image, frame.view
        try:
            for offset, length in extents:
                part = view[frame.length : frame.length + length]
                image.pread_into(part, offset)
                if is_zero(part):
                    zeros.append((offset, length))
                else:
                    _extend(frame.extents, offset, length)
                    frame.length += length
        except DiskError:
            frame.length, frame.extents = undo
            raise
        disk.sent_bytes += total
        batch.disk_bytes += total
        batch.cost_bytes += total
        if not zeros:
            frame.chunks.append(chunk)
            return
        # The chunk is acknowledged with the later of its two frames: data goes out first, zeros after it.
        self._close_data(batch)
        self._note_zeros(disk, chunk, zeros, batch)

    def _note_zeros(self, disk: OutgoingDisk, chunk: int, zeros: list[tuple[int, int]], batch: Batch) -> None:
        if disk.index in self._zeros and len(self._zeros[disk.index][0]) + len(zeros) > native.MAX_EXTENTS:
            self._close_zeros(disk, batch)
        extents, chunks = self._zeros.setdefault(disk.index, ([], []))
        for offset, length in zeros:
            if extents and sum(extents[-1]) == offset:
                extents[-1] = (extents[-1][0], extents[-1][1] + length)
            else:
                extents.append((offset, length))
        chunks.append(chunk)

    def _close_frames(self, batch: Batch) -> None:
        self._close_data(batch)
        for index in list(self._zeros):
            self._close_zeros(self._disks[index], batch)

    def _close_data(self, batch: Batch) -> None:
        frame, self._open = self._open, None
        if frame is None:
            return
        if not frame.length:
            self._pool.give_back(frame.buffer)
            return
        view = frame.view[: frame.length]
        self._add_data(frame.disk, frame.extents, frame.chunks, view, xxh3_64_intdigest(view), batch)
        batch.payloads.append(frame.buffer)

    def _close_zeros(self, disk: OutgoingDisk, batch: Batch) -> None:
        extents, chunks = self._zeros.pop(disk.index, ([], []))
        if extents:
            self._add_bare(disk, extents, chunks, batch)

    def _add_data(
        self,
        disk: OutgoingDisk,
        extents: list[tuple[int, int]],
        chunks: list[int],
        payload: memoryview,
        payload_hash: int,
        batch: Batch,
    ) -> None:
        self._sequence += 1
        packed = None if self._packer is None else self._packer.pack(payload)
        content: Buffer = payload if packed is None else packed
        encode = native.encode_data if packed is None else native.encode_packed
        head = encode(disk.index, self._sequence, extents, payload_hash, len(content))
        disk.digest.apply_data(extents, payload_hash)
        batch.buffers += [head, content]
        batch.frames.append(SentFrame(self._sequence, disk, chunks, len(payload)))
        batch.wire_bytes += len(head) + len(content)

    def _add_bare(
        self,
        disk: OutgoingDisk,
        extents: list[tuple[int, int]],
        chunks: list[int],
        batch: Batch,
        *,
        is_base: bool = False,
    ) -> None:
        """Add a frame without bytes: of zeros, or of the shared base."""
        self._sequence += 1
        head = (native.encode_base if is_base else native.encode_zero)(disk.index, self._sequence, extents)
        (disk.digest.apply_base if is_base else disk.digest.apply_zero)(extents)
        batch.buffers.append(head)
        covered = sum(length for _, length in extents) if chunks else 0
        batch.frames.append(SentFrame(self._sequence, disk, chunks, covered))
        batch.wire_bytes += len(head)


def _blocks(offset: int, length: int) -> list[tuple[int, int]]:
    """Return the blocks of a range of whole ones, as offset and length."""
    end = offset + length
    return [(at, min(BLOCK_SIZE, end - at)) for at in range(offset, end, BLOCK_SIZE)]
