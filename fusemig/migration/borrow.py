"""Borrowing: a destination that owns its disks fetches what is not here yet; the other end is `fusemig.migration.lend`.

    FetchPlan     what to ask for next: what a guest waits for, then what is hot, then the rest of the disks in order
    Borrowing     keeps as much asked for as the link needs, fills what comes, and says WHOLE at the end

What is asked for in advance is bounded by time, not by size: a guest's own request has that much before it.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Final, NamedTuple

import structlog
import trio

from fusemig.core.convergence import Throughput
from fusemig.core.units import BLOCK_SIZE, BLOCKS_PER_CHUNK, n_blocks
from fusemig.errors import PeerRefusedError, RemoteProtocolError
from fusemig.migration.link import SLICE_S, Need
from fusemig.tasks import run_beside
from fusemig.wire import native

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fusemig.disk.borrowed import BorrowedDisk
    from fusemig.migration.link import BufferPool, NativeLink, Offload

PIECE_BLOCKS: Final = 64
"""Most blocks of a FETCH, so that a guest's request never waits behind a long one."""
AHEAD_S: Final = 0.01
"""How long the source is to be busy with what was asked for."""
MIN_AHEAD_BYTES: Final = 512 << 10
MAX_AHEAD_BYTES: Final = 4 << 20
KEEP_INTERVAL_S: Final = 5.0
"""How often what came is made durable, so that a crash of the host does not cost more."""
ALIVE_INTERVAL_S: Final = 5.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Loan:
    """What the daemon lends of a disk that is not all here."""

    disk: BorrowedDisk | None = None
    """None: all of it is here already, or was and has moved on."""
    repay: Callable[[], None] = lambda: None
    """Makes it an ordinary disk, durably, when all of it is here; may sleep."""


class Request(NamedTuple):
    """Blocks ``first`` to ``stop - 1`` of a disk."""

    disk: int
    first: int
    stop: int

    def overlaps(self, other: Request) -> bool:
        """Tell whether the two have a block in common."""
        return self.disk == other.disk and self.first < other.stop and other.first < self.stop


class FetchPlan:
    """Decides what to ask for; no I/O."""

    def __init__(self, disks: Sequence[BorrowedDisk], hot: Sequence[Request] = ()) -> None:
        """Plan for what is missing of ``disks``, known by their index; ``hot`` goes before the rest of them."""
        self._disks = disks
        self._urgent: deque[Request] = deque()
        self._hot = deque(hot)
        self._cursor = (0, 0)
        self.asked: deque[Request] = deque()
        """What was asked for and has not come, in order."""

    def next(self) -> Request | None:
        """Return what to ask for now and count it as asked for; None: nothing that was not asked for is missing."""
        for index, disk in enumerate(self._disks):
            while (wanted := disk.wants.take()) is not None:
                self._urgent.extend(self._pieces(Request(index, *wanted)))
        request = self._next_of(self._urgent) or self._next_of(self._hot) or self._next_in_order()
        if request is not None:
            self.asked.append(request)
        return request

    def _next_of(self, queue: deque[Request]) -> Request | None:
        while queue:
            # Some of it may have come, or be on its way.
            pieces = list(self._pieces(queue.popleft()))
            if pieces:
                queue.extendleft(reversed(pieces[1:]))
                return pieces[0]
        return None

    def _next_in_order(self) -> Request | None:
        """Return the next piece after the last one in order: all that is missing before it was asked for.

        A map is walked once, from one missing block to the next: a disk has many millions of them, and this runs for
        every piece.
        """
        while self._cursor[0] < len(self._disks):
            index, block = self._cursor
            disk = self._disks[index]
            first = disk.next_missing(block)
            if first is None:
                self._cursor = (index + 1, 0)
                continue
            stop = min(n_blocks(disk.size), first + PIECE_BLOCKS)
            for request in self._pieces(Request(index, first, stop)):
                self._cursor = (index, request.stop)
                return request
            self._cursor = (index, stop)  # all of it is under way
        return None

    def _pieces(self, wanted: Request) -> Iterator[Request]:
        """Yield what is missing of a range and not asked for, in pieces."""
        under_way = sorted(asked for asked in self.asked if asked.overlaps(wanted))
        for first, stop in self._disks[wanted.disk].missing(wanted.first, wanted.stop):
            at = first
            while at < stop:
                while under_way and under_way[0].stop <= at:
                    del under_way[0]
                end = min(stop, at + PIECE_BLOCKS, under_way[0].first if under_way else stop)
                if end > at:
                    yield Request(wanted.disk, at, end)
                    at = end
                else:
                    at = under_way[0].stop

    def expect(self, frame: native.DataFrame | native.ZeroFrame, nth: int = 0) -> Request:
        """Return what a frame answers, the ``nth`` since `answered` was called for what was filled in.

        It may be called from another thread than `next`, which only adds to what is asked for.

        Raises:
            RemoteProtocolError: it is not what was asked for first.
        """
        if len(self.asked) <= nth:
            raise RemoteProtocolError("the source sent what nobody asked for")
        request = self.asked[nth]
        size = self._disks[request.disk].size
        (offset, length), *more = frame.extents
        end = offset + length
        is_data = isinstance(frame, native.DataFrame)
        due = request.first * BLOCK_SIZE, min(size, request.stop * BLOCK_SIZE)
        is_right = end == due[1] if is_data else due[1] <= end <= size and (end == size or not end % BLOCK_SIZE)
        if more or frame.disk != request.disk or offset != due[0] or not is_right:
            raise RemoteProtocolError(
                f"the source sent {offset}+{length} of disk {frame.disk} where "
                f"{due[0]}+{due[1] - due[0]} of disk {request.disk} was due"
            )
        return request

    def answered(self) -> Request:
        """Take note that what was asked for first is here, and return it."""
        return self.asked.popleft()

    @property
    def is_done(self) -> bool:
        """Whether nothing is missing and nothing is under way."""
        return not self.asked and not any(disk.missing_bytes for disk in self._disks)


def hot_requests(hot: Sequence[bytes], loans: Sequence[Loan]) -> list[Request]:
    """Return what a LEND names first, disk by disk in turn; disks that are all here are left out and do not count.

    Raises:
        RemoteProtocolError: it names what is no chunk of its disk, or more than `native.MAX_HOT`.
    """
    if (hot and len(hot) != len(loans)) or sum(map(len, hot)) > 8 * native.MAX_HOT:
        raise RemoteProtocolError(f"the source named hot chunks of {len(hot)} disks, and lends {len(loans)}")
    wanted: list[list[Request]] = []
    for chunks, loan in zip(hot, loans, strict=False):
        if loan.disk is None:
            continue
        n = n_blocks(loan.disk.size)
        if len(chunks) % 8:
            raise RemoteProtocolError(f"the source named hot chunks of disk '{loan.disk.name}' in part only")
        numbers = struct.unpack(f"<{len(chunks) // 8}Q", chunks)
        if any(chunk * BLOCKS_PER_CHUNK >= n for chunk in numbers):
            raise RemoteProtocolError(f"the source named chunk {max(numbers)} of disk '{loan.disk.name}'")
        firsts = [chunk * BLOCKS_PER_CHUNK for chunk in numbers]
        wanted.append([Request(len(wanted), first, min(n, first + BLOCKS_PER_CHUNK)) for first in firsts])
    return [one for turn in zip_longest(*wanted) for one in turn if one is not None]


class Borrowing:
    """Fetches over one connection."""

    def __init__(
        self,
        link: NativeLink,
        loans: Sequence[Loan],
        pool: BufferPool,
        offload: Offload,
        hot: Sequence[bytes] = (),
    ) -> None:
        """Prepare to fetch what is missing of ``loans``, in the order in which the source named them.

        Args:
            link: whose first message was LEND.
            loans: the disks; those that are here already are not fetched.
            pool: gave the link its buffers.
            offload: runs calls that may sleep.
            hot: as LEND has it.

        Raises:
            RemoteProtocolError: ``hot`` does not fit the disks.
        """
        self._link = link
        self._loans = loans
        self._pool = pool
        self._offload = offload
        self._disks = [loan.disk for loan in loans if loan.disk is not None]
        self._plan = FetchPlan(self._disks, hot_requests(hot, loans))
        # The source counts all the disks that it named.
        self._wire_index = [index for index, loan in enumerate(loans) if loan.disk is not None]
        self._ahead_bytes = MIN_AHEAD_BYTES
        self._asked_bytes = 0
        self._throughput = Throughput()
        self._busy_since = 0.0
        self._wake = trio.Event()
        self._n_filled = 0
        """Answers that are filled in and not yet taken off what is asked for."""
        self.received_bytes = 0

    @property
    def missing_bytes(self) -> int:
        """How much is still to come."""
        return sum(disk.missing_bytes for disk in self._disks)

    @property
    def total_bytes(self) -> int:
        """Size of the disks that were not all here."""
        return sum(disk.size for disk in self._disks)

    async def run(self) -> None:
        """Fetch until everything is here and durable, then make the disks ordinary ones and tell the source.

        Raises:
            DiskError: a store failed here; what is missing can still be fetched.
            FusemigError: the source is gone, or what it sends is wrong.

        Cancellation: at any moment; what has come is here.
        """
        if self._disks:
            await self._link.send_message(native.Welcome(native.VERSION, [native.POSTCOPY]))
            # A store may take longer to flush than the source waits for a word.
            await run_beside(self._fetch_and_repay, self._stay_alive)
        await self._link.send_message(native.Whole())

    async def _fetch_and_repay(self) -> None:
        await self._fetch_all()
        for loan in self._loans:
            await self._offload(loan.repay)

    async def _fetch_all(self) -> None:
        token = trio.lowlevel.current_trio_token()

        def alarm() -> None:
            token.run_sync_soon(self._ring)

        self._busy_since = trio.current_time()
        for disk in self._disks:
            disk.wants.listen(alarm)
        try:
            await run_beside(self._ask, self._receive, self._keep)
        finally:
            for disk in self._disks:
                disk.wants.ignore(alarm)

    def _ring(self) -> None:
        self._wake.set()

    async def _ask(self) -> None:
        while not self._plan.is_done:
            self._wake = trio.Event()
            while self._asked_bytes < self._ahead_bytes:
                request = self._plan.next()
                if request is None:
                    break
                self._asked_bytes += (request.stop - request.first) * BLOCK_SIZE
                await self._link.send_message(native.Fetch(self._wire_index[request.disk], request.first, request.stop))
            if not self._plan.is_done:
                await self._wake.wait()

    async def _receive(self) -> None:
        while True:
            self._n_filled = 0
            event = await self._offload(self._take_in)
            n_bytes = 0
            for _ in range(self._n_filled):
                request = self._plan.answered()
                n_bytes += (request.stop - request.first) * BLOCK_SIZE
            if n_bytes:
                self._count(n_bytes)
                self._wake.set()
            if isinstance(event, native.Abort):
                raise PeerRefusedError(f"{self._link.peer} cannot lend: {event.reason}")
            if event is Need.STREAM:
                await self._link.wait_readable()
            elif event is not Need.SLICE:
                raise RemoteProtocolError(f"{self._link.peer} sent {type(event).__name__} where it lends")

    def _take_in(self) -> native.Event | Need:
        """Receive, check and fill what is there, in a worker thread; `_n_filled` counts the answers.

        It comes back after half of what is asked for in advance, so that more is asked for meanwhile.
        """
        done = 0
        until = time.monotonic() + SLICE_S
        while done < self._ahead_bytes // 2:
            try:
                event = self._link.receive_shortly()
            except trio.WouldBlock:
                return Need.STREAM
            if not isinstance(event, native.DataFrame | native.ZeroFrame):
                return event
            if event.disk not in self._wire_index:
                raise RemoteProtocolError(f"{self._link.peer} sent disk {event.disk}, which is not fetched")
            event = event._replace(disk=self._wire_index.index(event.disk))
            request = self._plan.expect(event, self._n_filled)
            self._fill(event)
            self._n_filled += 1
            done += (request.stop - request.first) * BLOCK_SIZE
            if time.monotonic() >= until:
                break
        return Need.SLICE

    def _count(self, n_bytes: int) -> None:
        now = trio.current_time()
        self._asked_bytes -= n_bytes
        self._throughput.add(n_bytes, now - self._busy_since)
        self._busy_since = now
        ahead = int(self._throughput.per_second * AHEAD_S)
        self._ahead_bytes = max(MIN_AHEAD_BYTES, min(MAX_AHEAD_BYTES, ahead))

    def _fill(self, frame: native.DataFrame | native.ZeroFrame) -> None:
        disk = self._disks[frame.disk]
        offset, length = frame.extents[0]
        if isinstance(frame, native.ZeroFrame):
            disk.fill(None, offset, length)
            return
        frame.verify()
        disk.fill(frame.payload, offset, length)
        self.received_bytes += length
        buffer = frame.payload.obj
        assert isinstance(buffer, bytearray)
        self._pool.give_back(buffer)

    async def _keep(self) -> None:
        while True:
            await trio.sleep(KEEP_INTERVAL_S)
            for disk in self._disks:
                await self._offload(disk.flush)

    async def _stay_alive(self) -> None:
        while True:
            await trio.sleep(ALIVE_INTERVAL_S)
            await self._link.send([native.encode_ack(0)])
