"""QemuReceiver: receives QEMU's stream and writes the disks in it; run in slices on a worker thread.

Records are applied in the order in which they come. Of everything else only what the task must see comes back: the
events of the container, the progress, and the end of a `block` section.
"""

from __future__ import annotations

import time
from enum import Enum
from typing import TYPE_CHECKING, Final

import trio

from fusemig.core.units import CHUNK_SIZE
from fusemig.migration.link import POLL_S, SLICE_BYTES, SLICE_S, Need
from fusemig.wire import qemu_block, savevm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fusemig.migration.incoming import AwaitedDisk
    from fusemig.migration.writer import IncomingDisk
    from fusemig.net.transport import ByteStream

_ZEROS: Final = bytes(CHUNK_SIZE)


class Turn(Enum):
    """What is neither an event of the stream nor a need of the loop's."""

    DISKS = "disks"
    """Data has come, and `QemuReceiver.disks` is not set yet; it is kept until the next slice."""
    CLOSED = "closed"
    """The source has closed a stream that is whole."""


Event = qemu_block.BlockProgress | qemu_block.BlockEos | savevm.Event | Turn | Need


class QemuReceiver:
    """Applies a QEMU's stream to disks, and knows what of them has come."""

    def __init__(self, stream: ByteStream, awaited: Sequence[AwaitedDisk], head: bytes) -> None:
        """Receive from ``stream``, of which ``head`` was read already, what is for the ``awaited`` disks."""
        devices = [qemu_block.Device(disk.name, disk.size, disk.has_base) for disk in awaited]
        self.completeness = qemu_block.BlockCompleteness(devices)
        self.disks: list[IncomingDisk] = []
        """Where data goes, in the order of ``awaited``."""
        self.received: set[int] = set()
        """The disks, by index, of which anything came."""
        self._stream = stream
        self._decoder: savevm.Decoder[qemu_block.Event] = savevm.Decoder(
            {qemu_block.SECTION: qemu_block.Decoder(devices)}
        )
        self._decoder.feed(head)
        self._buffer = bytearray(CHUNK_SIZE)
        self._is_payload = False
        self.n_events = self.n_bytes = 0
        """What has come, of which `Pace` is kept."""
        self._kept: qemu_block.BlockData | qemu_block.BlockZero | None = None

    @property
    def may_end(self) -> bool:
        """Whether the stream may be whole."""
        return self._decoder.may_end

    def run_slice(self) -> Event:
        """Receive and apply; return an event, STREAM when nothing more is there, or SLICE.

        STREAM is also said when it took long: the pace is to be judged.

        Raises:
            RemoteProtocolError: the source's bytes are wrong, or end too early.
            ConnectionLostError: it is gone.
            DiskError: the store failed.
        """
        if self._kept is not None:
            self._apply(self._kept)
            self._kept = None
        done = 0
        until = time.monotonic() + SLICE_S
        while done < SLICE_BYTES:
            try:
                n = self._receive()
            except trio.WouldBlock:
                if time.monotonic() < until and self._stream.poll_readable(POLL_S):
                    continue
                return Need.STREAM
            if not n:
                self._decoder.close()
                return Turn.CLOSED
            done += n
            self.n_bytes += n
            event = self._decoder.advance(n)
            if event is None:
                if time.monotonic() >= until:
                    return Need.STREAM
                continue
            self.n_events += 1
            self.completeness.observe(event)
            if not isinstance(event, qemu_block.BlockData | qemu_block.BlockZero):
                return event
            if not self.disks:
                self._kept = event
                return Turn.DISKS
            self._apply(event)
            if time.monotonic() >= until:
                break
        return Need.SLICE

    def _receive(self) -> int:
        decoder = self._decoder
        if decoder.needs_buffer:
            # Every payload is written before the next one begins, so one buffer does.
            decoder.give_buffer(self._buffer)
            self._is_payload = True
        receive = self._stream.receive_shortly if self._is_payload else self._stream.receive_nowait
        return receive(decoder.wanted)

    def _apply(self, event: qemu_block.BlockData | qemu_block.BlockZero) -> None:
        disk = self.disks[event.device]
        self.received.add(event.device)
        image = disk.disk.image
        if isinstance(event, qemu_block.BlockZero):
            image.write_zeroes(event.offset, event.length)
            return
        self._is_payload = False
        # Without its capability `zero-blocks`, QEMU sends holes as data. This compares without a copy.
        if _ZEROS.startswith(event.payload):
            image.write_zeroes(event.offset, len(event.payload))
        else:
            image.pwrite(event.payload, event.offset)
        disk.received_bytes += len(event.payload)
