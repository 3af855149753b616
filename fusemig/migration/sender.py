"""PassSender: reads a pass and sends it; the bulk half of the source, run in slices on a worker thread.

    chunk ── taken, read, hashed ──> frames ── registered as unacknowledged ──> stream

A frame is registered before its first byte is sent, so an acknowledgement always finds it. The receiver, in the loop,
takes frames off the other end of `unacknowledged`; each counter here has one writer, so no lock is needed.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Final

import trio

from fusemig.core.convergence import Courtesy
from fusemig.core.shaping import MIRROR_SHARE
from fusemig.core.units import CHUNK_SIZE
from fusemig.migration.link import Need, drop_sent, first_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusemig.migration.link import BufferPool
    from fusemig.migration.reader import Batch, PassReader, SentFrame
    from fusemig.net.transport import ByteStream

PIECE_BYTES: Final = 256 << 10
"""What is sent at a time while guests are busy: a whole chunk would hold up some of them for as long as it takes."""
WINDOW_BYTES: Final = 64 << 20
"""Disk bytes sent and not acknowledged, at most."""

MAX_UNDURABLE: Final = 1 << 17
"""Frames that may be acknowledged and not durable before the source stops to keep account of them."""


class Politeness:
    """Rests a worker thread between chunks, so that guests go first in the bulk phase (`Courtesy` says how long)."""

    def __init__(self, count_requests: Callable[[], int]) -> None:
        """``count_requests`` tells how many requests guests have ever made."""
        self._count_requests = count_requests
        self._courtesy = Courtesy()
        self._worked_since = 0.0
        self.is_needed = False
        """Whether guests needed a rest when they were last looked at."""

    def begin(self) -> None:
        """Work begins, after a wait of any length."""
        self._worked_since = time.monotonic()

    def rest(self) -> None:
        """Sleep for as long as the guests need."""
        rest_s = self._courtesy.rest_s(self._count_requests(), time.monotonic() - self._worked_since)
        self.is_needed = rest_s > 0
        if rest_s:
            time.sleep(rest_s)
        self._worked_since = time.monotonic()


class PassSender:
    """Sends what a `PassReader` reads, and keeps the account of it."""

    def __init__(self, pool: BufferPool, count_requests: Callable[[], int]) -> None:
        """Give sent buffers back to ``pool``; ``count_requests`` tells how many requests guests have ever made."""
        self._pool = pool
        self._politeness = Politeness(count_requests)
        self._batch: Batch | None = None
        self._rest: list[memoryview] = []
        self._owed_bytes = 0.0
        """What the pass was kept waiting for, in bytes of its own."""
        self._unprompted_bytes = 0
        # Set between slices:
        self.window_bytes = WINDOW_BYTES
        """Disk bytes sent and not acknowledged, at most."""
        self.prompt = b""
        """A message that has the destination acknowledge at once; not empty: mirrored chunks go first."""
        self.unacknowledged: deque[SentFrame] = deque()
        self.last_sequence = 0
        self.is_reading = False
        # Written by run_slice only:
        self.sent_bytes = 0
        """Disk bytes of all registered frames."""
        self.wire_bytes = 0
        """Bytes handed to the stream, headers included."""
        # Written by acknowledge and journaled only:
        self.undurable: deque[SentFrame] = deque()
        """Acknowledged frames that the destination may not have any more after a crash; kept if `is_journaled`."""
        self.is_journaled = False
        """Whether the destination says what is durable."""
        # Written by acknowledge only:
        self.acknowledged_bytes = 0
        self.n_transferred = 0

    def run_slice(self, reader: PassReader, stream: ByteStream, limit_bytes: int, *, is_courteous: bool) -> Need:
        """Read and send about ``limit_bytes`` bytes of the wire; ends between frames unless it returns STREAM.

        The caller holds the link's lock from the first slice of a frame to the last. If it is courteous, the thread
        rests between chunks as `Courtesy` says.

        Raises:
            MigrationError: a chunk could not be read.
            ConnectionLostError: the peer is gone.
        """
        stop_at, idle_bytes = self.wire_bytes + limit_bytes, 0
        self._politeness.begin()
        while True:
            if self._batch is not None and not self._send_rest(self._batch, stream, is_courteous=is_courteous):
                return Need.STREAM
            if is_courteous:
                self._politeness.rest()
            if self.wire_bytes + idle_bytes >= stop_at:
                return Need.SLICE
            if not self.has_room:
                return Need.ACKNOWLEDGEMENT
            self.is_reading = True
            try:
                batch = self._read(reader)
            finally:
                self.is_reading = False
            if batch is None:
                return Need.NOTHING
            if not batch.frames:  # what was read had been sent before
                idle_bytes += batch.cost_bytes
                continue
            self.unacknowledged.extend(batch.frames)
            self.last_sequence = batch.frames[-1].sequence
            self.sent_bytes += batch.disk_bytes
            self._batch = batch
            self._rest = [memoryview(buffer) for buffer in batch.buffers]

    @property
    def has_room(self) -> bool:
        """Whether more may be under way."""
        return self.sent_bytes - self.acknowledged_bytes < self.window_bytes

    def _read(self, reader: PassReader) -> Batch | None:
        """Read what goes next: mirrored chunks, but of each five parts one is the pass's; None at its end."""
        batch = None
        if self.prompt and self._owed_bytes < CHUNK_SIZE:
            batch = reader.read_mirrored(CHUNK_SIZE)
        if batch is not None:
            self._owed_bytes += batch.disk_bytes * (1 - MIRROR_SHARE) / MIRROR_SHARE
            is_urgent = True
        else:
            batch = reader.read_batch(CHUNK_SIZE)
            if batch is None:
                return None
            self._owed_bytes = max(0.0, self._owed_bytes - batch.disk_bytes)
            is_urgent = False
        self._unprompted_bytes += batch.disk_bytes
        if self.prompt and (is_urgent or self._unprompted_bytes >= self.window_bytes // 4):
            self._unprompted_bytes = 0
            batch.buffers.append(self.prompt)
        return batch

    def _send_rest(self, batch: Batch, stream: ByteStream, *, is_courteous: bool) -> bool:
        """Send what is left of a batch; return whether all of it is sent."""
        while self._rest:
            in_pieces = is_courteous and self._politeness.is_needed
            try:
                n = stream.send_shortly(first_bytes(self._rest, PIECE_BYTES) if in_pieces else self._rest)
            except trio.WouldBlock:
                return False
            self.wire_bytes += n
            drop_sent(self._rest, n)
            if in_pieces and self._rest:
                self._politeness.rest()
        self._batch = None
        batch.buffers.clear()
        for payload in batch.payloads:
            self._pool.give_back(payload)
        return True

    def take_rest(self) -> list[memoryview]:
        """Return what is left of the batch that was being sent, for somebody else to send; no slice may follow."""
        rest, self._rest = self._rest, []
        return rest

    @property
    def n_read_done(self) -> int:
        """How many frames are read and not wholly sent."""
        batch = self._batch
        return 0 if batch is None else len(batch.frames)

    def acknowledge(self, sequence: int) -> int:
        """Take note that every frame up to ``sequence`` arrived; return how many disk bytes that adds."""
        n_bytes = 0
        while self.unacknowledged and self.unacknowledged[0].sequence <= sequence:
            frame = self.unacknowledged.popleft()
            frame.disk.tracking.acknowledge(frame.chunks)
            self.n_transferred = frame.sequence
            n_bytes += frame.n_bytes
            if self.is_journaled:
                self.undurable.append(frame)
                if len(self.undurable) > MAX_UNDURABLE:
                    self.forget_undurable()
        self.acknowledged_bytes += n_bytes
        return n_bytes

    def journaled(self, sequence: int) -> None:
        """Take note that every frame up to ``sequence`` is durable."""
        while self.undurable and self.undurable[0].sequence <= sequence:
            self.undurable.popleft()

    def forget_undurable(self) -> None:
        """Give up keeping account: the destination does not come to write its journal."""
        self.is_journaled = False
        self.undurable.clear()
