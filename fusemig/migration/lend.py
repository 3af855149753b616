"""Lending: a source whose disks were taken over before all of them was sent (post-copy) serves what is missing.

    source (`lending`)                    destination (`borrowing`)
    LEND          ──────────────>
                  <──────────────         WELCOME; or WHOLE, if it has everything
                  <──────────────         FETCH: what a guest waits for first, then the rest in order
    DATA, ZERO    ──────────────>
                  <──────────────         WHOLE: all is here, durably, and `owner` is
    `released`

The image is read and never written from the hand-off on, so the same question has the same answer however often it is
asked, and a connection that is lost costs nothing but time: another one is made, again and again, by this daemon or the
next. Nothing but WHOLE ends it: until then both hosts are needed.
"""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec
import structlog
import trio
from xxhash import xxh3_64_intdigest

from fusemig.core.backoff import Backoff
from fusemig.core.units import BLOCK_SIZE, n_blocks
from fusemig.disk.zeroes import is_zero
from fusemig.errors import DiskError, FusemigError, MigrationError, PeerRefusedError, RemoteProtocolError
from fusemig.migration.link import HANDSHAKE_DEADLINE_S, SLICE_S, BufferPool, NativeLink, Need, drop_sent
from fusemig.records.epoch import Ownership
from fusemig.wire import native

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from fusemig.disk.base import Disk
    from fusemig.migration.link import Offload
    from fusemig.net.transport import ByteStream
    from fusemig.records.epoch import EpochFile

FIRST_RETRY_S: Final = 0.25
MAX_RETRY_S: Final = 5.0
"""How long the next connection is put off."""
SLICE_BYTES: Final = 1 << 20
"""Disk bytes that a worker thread reads and sends before it comes back."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class LentDisk:
    """A disk whose epoch file says `lending`."""

    name: str
    image: Disk
    epoch_file: EpochFile
    hot: Sequence[int] = ()
    """Chunks that are to be fetched before others, in this order; at most `native.MAX_HOT` of all disks together."""


class Lending:
    """Serves the disks of one migration until their destination has all of them."""

    def __init__(self, disks: Sequence[LentDisk], dial: Callable[[], Awaitable[ByteStream]], offload: Offload) -> None:
        """Prepare to lend ``disks``, which were handed over in the same migration.

        Args:
            disks: at least one.
            dial: connects to the destination, in time.
            offload: runs calls that may sleep.
        """
        self._disks = disks
        self._dial = dial
        self._offload = offload
        self._pool = BufferPool()
        self._sequence = 0
        self._unsent: list[memoryview] = []
        """The rest of the frame that is being sent."""
        records = [disk.epoch_file.record for disk in disks]
        self._records = [record for record in records if record is not None]
        self._log = log.bind(migration=self._records[0].session[:8])
        self.wire_bytes = 0
        """Bytes handed to the stream, headers included."""
        self.sent_bytes = 0
        """Bytes of the disks that were asked for, zeros included."""
        self.n_connections = 0
        self.waiting = ""
        """Why there is no connection at this moment; empty if there is one."""

    async def run(self) -> None:
        """Lend until the destination has everything and `released` is durable.

        Cancellation: at any moment; what is to be lent is written in the epoch files.
        """
        backoff = Backoff(FIRST_RETRY_S, MAX_RETRY_S)
        while True:
            n_connections = self.n_connections
            try:
                await self._lend()
                await self._release()
            except FusemigError as exc:
                if str(exc) != self.waiting:
                    self._log.warning("the destination cannot fetch what it lacks, trying again", reason=str(exc))
                self.waiting = str(exc)
            else:
                return
            if self.n_connections > n_connections:
                backoff.reset()
            await trio.sleep(backoff.next_s())

    async def _lend(self) -> None:
        """Make one connection and serve over it until WHOLE."""
        stream = await self._dial()
        try:
            link = NativeLink(stream, native.Decoder(native.FROM_DESTINATION, preface=False), self._pool)
            asked = [native.AskedDisk(record.image_id, record.epoch) for record in self._records]
            hot = [struct.pack(f"<{len(disk.hot)}Q", *disk.hot) for disk in self._disks]
            lend = native.Lend(native.VERSION, self._records[0].session, asked, hot, native.MAX_FETCH_RUNS)
            await link.send([native.PREFACE, native.encode_message(lend)])
            answer = await link.receive(HANDSHAKE_DEADLINE_S)
            if isinstance(answer, native.Refuse):
                raise PeerRefusedError(f"{link.peer} does not fetch: {answer.reason}")
            if isinstance(answer, native.Whole):
                return
            if not isinstance(answer, native.Welcome):
                raise RemoteProtocolError(f"{link.peer} sent {type(answer).__name__} where an answer to LEND was due")
            self.waiting = ""
            self.n_connections += 1
            await self._serve(link)
        finally:
            self._pool.clear()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await stream.aclose()

    async def _serve(self, link: NativeLink) -> None:
        self._sequence, self._unsent = 0, []
        while True:
            async with link.frame():
                event = await self._offload(self._answer, link)
                while self._unsent:
                    await link.wait_writable()
                    event = await self._offload(self._answer, link)
            match event:
                case Need.SLICE:
                    pass
                case Need.STREAM:
                    await link.wait_readable()
                case native.Whole():
                    return
                case native.Ack():
                    pass  # proof of life
                case native.Abort():
                    raise MigrationError(f"{link.peer} cannot go on: {event.reason}")
                case _:
                    raise RemoteProtocolError(f"{link.peer} sent {type(event).__name__} while it fetches")

    def _answer(self, link: NativeLink) -> native.Event | Need:
        """Answer every FETCH that is there, in a worker thread: read, hash and send while it is warm in the cache.

        Returns STREAM with something in `_unsent`: the stream is full; with nothing: it is empty.
        """
        done = 0
        until = time.monotonic() + SLICE_S
        while True:
            payload = self._unsent[-1].obj if self._unsent else None  # of a DATA frame, which comes last
            while self._unsent:
                try:
                    n = link.stream.send_shortly(self._unsent)
                except trio.WouldBlock:
                    return Need.STREAM
                self.wire_bytes += n
                drop_sent(self._unsent, n)
            if isinstance(payload, bytearray):
                self._pool.give_back(payload)
            if done >= SLICE_BYTES or time.monotonic() >= until:
                return Need.SLICE
            try:
                event = link.receive_shortly()
            except trio.WouldBlock:
                return Need.STREAM
            if not isinstance(event, native.Fetch):
                return event
            n_bytes = self._check(event) * BLOCK_SIZE
            self._unsent = self._read(event)
            self.sent_bytes += n_bytes
            done += n_bytes

    def _check(self, fetch: native.Fetch) -> int:
        """Return how many blocks are asked for."""
        if not 0 <= fetch.disk < len(self._disks):
            raise RemoteProtocolError(f"disk {fetch.disk} was asked for; there are {len(self._disks)}")
        at = n = 0
        for first, stop in fetch.runs:
            if not at <= first < stop <= n_blocks(self._disks[fetch.disk].image.size):
                raise RemoteProtocolError(f"blocks {first} to {stop} were asked for")
            at, n = stop, n + stop - first
        if n > native.MAX_FETCH_BLOCKS:
            raise RemoteProtocolError(f"{n} blocks were asked for at once; at most {native.MAX_FETCH_BLOCKS}")
        return n

    def _read(self, fetch: native.Fetch) -> list[memoryview]:
        """Return the frames that answer a FETCH, that with bytes last."""
        image = self._disks[fetch.disk].image
        buffer = self._pool.take()
        zeros, extents, filled = list[tuple[int, int]](), list[tuple[int, int]](), 0
        try:
            for first, stop in fetch.runs:
                offset, end = first * BLOCK_SIZE, min(image.size, stop * BLOCK_SIZE)
                hole = _hole_at(image, offset)
                if hole >= end:
                    zeros.append((offset, (end if fetch.more else hole) - offset))
                    continue
                view = memoryview(buffer)[filled : filled + end - offset]
                image.pread_into(view, offset)
                if is_zero(view):
                    zeros.append((offset, len(view)))
                else:
                    extents.append((offset, len(view)))
                    filled += len(view)
        except DiskError as exc:
            raise MigrationError(f"{exc}; the destination needs it: mend the image, serving it goes on then") from exc
        frames = []
        if zeros:
            self._sequence += 1
            frames.append(memoryview(native.encode_zero(fetch.disk, self._sequence, zeros)))
        if not extents:
            self._pool.give_back(buffer)
            return frames
        self._sequence += 1
        view = memoryview(buffer)[:filled]
        head = native.encode_data(fetch.disk, self._sequence, extents, xxh3_64_intdigest(view), filled)
        return [*frames, memoryview(head), view]

    async def _release(self) -> None:
        for disk, record in zip(self._disks, self._records, strict=True):
            await self._offload(
                disk.epoch_file.write, msgspec.structs.replace(record, state=Ownership.RELEASED, is_loan=False)
            )
        self._log.info("the destination has everything", sent_bytes=self.sent_bytes)


def _hole_at(image: Disk, offset: int) -> int:
    """Return where the hole at ``offset`` ends, in whole blocks; ``offset`` if there is none."""
    found = next(image.extents(offset, image.size - offset), None)
    if found is None or found.is_data:
        return offset
    end = found.offset + found.length
    return end if end == image.size else max(offset, end - end % BLOCK_SIZE)
