"""QemuSender: reads passes and writes them as QEMU's stream; run in slices on a worker thread.

QEMU sends whole chunks, also for one dirty block of one, and so does this. What a bulk phase finds untouched and not
allocated goes out as a zero record, because the destination's disk may hold anything. A chunk's dirty bits are cleared
before it is read (rule 2 of `fusemig.core.tracker`); it is in flight until its last byte was given to the stream, which
is as much as this wire ever tells.

Chunks are read and sent in one order. So a short last chunk, which is sent as the disk's last MiB (`Tail.OVERLAPPING`)
and repeats bytes of the chunk before it, repeats none that are older than those that the destination has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from fusemig.core.units import CHUNK_SIZE, chunk_length, n_chunks
from fusemig.disk.zeroes import is_zero
from fusemig.errors import DiskError, MigrationError
from fusemig.migration.link import Need, drop_sent
from fusemig.migration.sender import Politeness
from fusemig.wire import qemu_block, savevm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fusemig.disk.base import Buffer
    from fusemig.migration.reader import OutgoingDisk
    from fusemig.net.transport import ByteStream

_SECTION_ID: Final = 1
_MAX_ZERO_RECORDS: Final = 1024
"""In one part of the section: some 20 KiB."""


class QemuSender:
    """Sends a fixed list of disks, and keeps the account of it."""

    def __init__(self, disks: Sequence[OutgoingDisk], machine: str, count_requests: Callable[[], int]) -> None:
        """Prepare to send ``disks`` to a QEMU of type ``machine``; the stream begins with the first slice.

        ``count_requests`` tells how many requests guests have ever made; the bulk phase makes room for them.

        Raises:
            ConfigError: a disk, its name or the machine type cannot be sent.
        """
        self._disks = disks
        self._politeness = Politeness(count_requests)
        devices = [qemu_block.Device(disk.disk.name, disk.disk.size) for disk in disks]
        self._encoder = qemu_block.Encoder(devices, tail=qemu_block.Tail.OVERLAPPING)
        self._buffer = bytearray(CHUNK_SIZE)
        self._is_bulk = True
        self._disk_index = 0
        self._chunk = 0
        self._bulk_bytes = 0
        self._ahead: int | None = None
        """The next dirty chunk, taken already; the number of chunks if there is none."""
        self._taken: tuple[OutgoingDisk, int] | None = None
        """What is being sent."""
        start = savevm.encode_start(_SECTION_ID, qemu_block.SECTION, qemu_block.VERSION)
        end = qemu_block.END_OF_SECTION + savevm.encode_footer(_SECTION_ID)
        self._rest = [memoryview(savevm.encode_header(machine) + start + end)]
        self.wire_bytes = 0
        """Bytes handed to the stream."""
        self.sent_bytes = 0
        """Bytes of the chunks that were read and wholly handed over."""
        self.n_chunks = 0
        self.is_reading = False

    def begin_pass(self, *, is_bulk: bool) -> None:
        """Put the cursor back to the first chunk of the first disk."""
        self._is_bulk = is_bulk
        self._disk_index = self._chunk = 0

    def run_slice(self, stream: ByteStream, limit_bytes: int) -> Need:
        """Read and send about ``limit_bytes``; return SLICE, STREAM when it is full, or NOTHING at the pass's end.

        Raises:
            MigrationError: a chunk could not be read.
            ConnectionLostError: the peer is gone.
        """
        stop_at = self.wire_bytes + limit_bytes
        self._politeness.begin()
        while True:
            if not self._send_rest(stream):
                return Need.STREAM
            if self._is_bulk:
                self._politeness.rest()
            if self.wire_bytes >= stop_at:
                return Need.SLICE
            self.is_reading = True
            try:
                buffers = self._read_next()
            finally:
                self.is_reading = False
            if buffers is None:
                return Need.NOTHING
            self._rest = [memoryview(buffer) for buffer in buffers]

    @property
    def is_sending(self) -> bool:
        """Whether a chunk is read and not wholly sent."""
        return self._taken is not None and not self.is_reading

    def ending(self) -> list[Buffer]:
        """Return what makes the stream whole; a destination that has it may run its guests."""
        footer = savevm.encode_footer(_SECTION_ID)
        return [savevm.encode_end(_SECTION_ID) + self._encoder.end() + footer + savevm.encode_eof()]

    def _send_rest(self, stream: ByteStream) -> bool:
        while self._rest:
            try:
                n = stream.send_shortly(self._rest)
            except trio.WouldBlock:
                return False
            self.wire_bytes += n
            drop_sent(self._rest, n)
        if self._taken is not None:
            disk, chunk = self._taken
            self._taken = None
            disk.tracking.acknowledge([chunk])
            self.sent_bytes += CHUNK_SIZE
            self.n_chunks += 1
        return True

    def _read_next(self) -> list[Buffer] | None:
        """Return the next part of the section, or None at the end of the pass."""
        while self._disk_index < len(self._disks):
            disk = self._disks[self._disk_index]
            end = n_chunks(disk.disk.size)
            if self._ahead is None:
                taken = disk.tracking.take_next(self._chunk)
                self._ahead = end if taken is None else taken[0]
            if self._is_bulk and self._chunk < self._ahead:
                return self._part(self._skip_holes(disk, self._ahead))
            chunk, self._ahead = self._ahead, None
            if chunk < end:
                return self._part(self._read(disk, chunk))
            self._disk_index += 1
            self._chunk = 0
        return None

    def _skip_holes(self, disk: OutgoingDisk, stop: int) -> list[Buffer]:
        """Return records for chunks from the cursor on that held nothing, and that nobody had written, a moment ago.

        One that is written from then on becomes dirty and is sent in a later pass.
        """
        records: list[Buffer] = []
        while self._chunk < stop and len(records) < _MAX_ZERO_RECORDS:
            records += [self._encoder.progress(self._bulk_bytes), self._encoder.zero(disk.index, self._chunk)]
            self._count(disk, self._chunk)
        return records

    def _read(self, disk: OutgoingDisk, chunk: int) -> list[Buffer]:
        offset, length = self._encoder.span(disk.index, chunk)
        view = memoryview(self._buffer)[:length]
        try:
            disk.disk.image.pread_into(view, offset)
        except DiskError as exc:
            disk.tracking.restore(chunk)
            raise MigrationError(f"{exc}; the disk stays here: mend its image, then migrate again") from exc
        self._taken = disk, chunk
        disk.sent_bytes += length
        start = chunk * CHUNK_SIZE - offset
        own = self._buffer if not start and length == CHUNK_SIZE else bytes(view[start:])
        records: list[Buffer]
        if is_zero(own):
            records = [self._encoder.zero(disk.index, chunk)]
        else:
            records = list(self._encoder.data(disk.index, offset, view))
        if self._is_bulk:
            records.insert(0, self._encoder.progress(self._bulk_bytes))
        self._count(disk, chunk)
        return records

    def _count(self, disk: OutgoingDisk, chunk: int) -> None:
        self._chunk = chunk + 1
        if self._is_bulk:
            self._bulk_bytes += chunk_length(chunk, disk.disk.size)

    def _part(self, records: list[Buffer]) -> list[Buffer]:
        head = savevm.encode_part(_SECTION_ID)
        tail = qemu_block.END_OF_SECTION + savevm.encode_footer(_SECTION_ID)
        return [buffer for buffer in (head, *records, tail) if len(buffer)]
