"""Borrowing: a destination that owns its disks fetches what is not here yet; the other end is `fusemig.migration.lend`.

`fusemig.migration.fetch_plan` decides what to ask for next. A `Borrowing` keeps as much asked for as the link needs,
fills what comes, and says WHOLE at the end.

What is asked for in advance is bounded by time, not by size: what is on its way, and as much more as a guest's own
request may have before it. How long the way is, is seen first, from a few pieces that are asked for one by one.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import structlog
import trio

from fusemig.core.convergence import Throughput
from fusemig.core.units import BLOCK_SIZE
from fusemig.errors import PeerRefusedError, RemoteProtocolError
from fusemig.migration.fetch_plan import PIECE_BLOCKS, FetchPlan, hot_requests
from fusemig.migration.link import SLICE_S, Need
from fusemig.tasks import run_beside
from fusemig.wire import native

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fusemig.migration.fetch_plan import Loan
    from fusemig.migration.link import BufferPool, NativeLink, Offload

AHEAD_S: Final = 0.01
"""How long the source is to be busy with what was asked for; a guest's own request waits for that."""
AHEAD_SHARE: Final = 0.25
"""Or this share of the way there and back, if that is more: a guest does not notice it beside that."""
N_DELAYS: Final = 3
"""How many pieces are asked for one by one, to see how long the way is: the least of them counts."""
MIN_AHEAD_BYTES: Final = 512 << 10
MAX_AHEAD_BYTES: Final = 16 << 20
"""What 1 Gbit/s has under way where a round trip takes 100 ms."""
KEEP_INTERVAL_S: Final = 5.0
"""How often what came is made durable, so that a crash of the host does not cost more."""
ALIVE_INTERVAL_S: Final = 5.0

log = structlog.get_logger(__name__)


class Borrowing:
    """Fetches over one connection."""

    def __init__(
        self,
        link: NativeLink,
        loans: Sequence[Loan],
        pool: BufferPool,
        offload: Offload,
        hot: Sequence[bytes] = (),
        max_runs: int = 1,
    ) -> None:
        """Prepare to fetch what is missing of ``loans``, in the order in which the source named them.

        Args:
            link: whose first message was LEND.
            loans: the disks; those that are here already are not fetched.
            pool: gave the link its buffers.
            offload: runs calls that may sleep.
            hot: as LEND has it.
            max_runs: as LEND has it.

        Raises:
            RemoteProtocolError: ``hot`` does not fit the disks.
        """
        self._link = link
        self._loans = loans
        self._pool = pool
        self._offload = offload
        self._disks = [loan.disk for loan in loans if loan.disk is not None]
        self._plan = FetchPlan(self._disks, hot_requests(hot, loans), max_runs)
        # The source counts all the disks that it named.
        self._wire_index = [index for index, loan in enumerate(loans) if loan.disk is not None]
        self._ahead_bytes = PIECE_BLOCKS * BLOCK_SIZE
        self._slice_bytes = MIN_AHEAD_BYTES // 2
        self._delays_s: list[float] = []
        self._asked_at = 0.0
        """When something was asked for with nothing under way."""
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
            # What a guest waits for goes at once, however much is asked for.
            while request := self._plan.next(only_wanted=self._asked_bytes >= self._ahead_bytes):
                if not self._asked_bytes:
                    self._asked_at = trio.current_time()
                self._asked_bytes += request.n_bytes
                disk, first, stop, more = request
                await self._link.send_message(native.Fetch(self._wire_index[disk], first, stop, list(more)))
            if not self._plan.is_done:
                await self._wake.wait()

    async def _receive(self) -> None:
        while True:
            self._n_filled = 0
            event = await self._offload(self._take_in)
            n_bytes = 0
            for _ in range(self._n_filled):
                n_bytes += self._plan.answered().n_bytes
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

        It comes back after half of what is not on its way, so that more is asked for meanwhile.
        """
        done = 0
        until = time.monotonic() + SLICE_S
        while done < self._slice_bytes:
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
            if request is not None:
                self._n_filled += 1
                done += request.n_bytes
            if time.monotonic() >= until:
                break
        return Need.SLICE

    def _count(self, n_bytes: int) -> None:
        now = trio.current_time()
        self._asked_bytes -= n_bytes
        self._throughput.add(n_bytes, now - self._busy_since)
        self._busy_since = now
        if len(self._delays_s) < N_DELAYS:
            self._delays_s.append(now - self._asked_at)
            if len(self._delays_s) < N_DELAYS:
                return
            # What came one by one says nothing of the rate; and where that grows, an old average holds it back.
            self._throughput = Throughput(max(0.2, min(1.0, 4 * min(self._delays_s))))
            self._ahead_bytes = MIN_AHEAD_BYTES
            return
        delay_s, rate = min(self._delays_s), self._throughput.per_second
        spare_s = max(AHEAD_S, delay_s * AHEAD_SHARE)
        self._ahead_bytes = max(MIN_AHEAD_BYTES, min(MAX_AHEAD_BYTES, int(rate * (delay_s + spare_s))))
        self._slice_bytes = max(MIN_AHEAD_BYTES, min(self._ahead_bytes, int(rate * spare_s))) // 2

    def _fill(self, frame: native.DataFrame | native.ZeroFrame) -> None:
        disk = self._disks[frame.disk]
        if isinstance(frame, native.ZeroFrame):
            for offset, length in frame.extents:
                disk.fill(None, offset, length)
            return
        frame.verify()
        at = 0
        for offset, length in frame.extents:
            disk.fill(frame.payload[at : at + length], offset, length)
            at += length
        self.received_bytes += at
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
