"""Borrowing: a destination that owns its disks fetches what is not here yet; the other end is `fusemig.migration.lend`.

    FetchPlan     what to ask for next: what a guest waits for, then what is hot, then the rest of the disks in order
    Borrowing     keeps as much asked for as the link needs, fills what comes, and says WHOLE at the end

Runs of missing blocks that are shorter than a piece are asked for together, where the source takes that (LEND says so).
What is asked for in advance is bounded by time, not by size: what is on its way, and as much more as a guest's own
request may have before it. How long the way is, is seen first, from a few pieces that are asked for one by one.
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
from fusemig.errors import FusemigError, PeerRefusedError, RemoteProtocolError
from fusemig.migration.link import SLICE_S, Need
from fusemig.wire import native

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from fusemig.disk.borrowed import BorrowedDisk
    from fusemig.migration.link import BufferPool, NativeLink, Offload

PIECE_BLOCKS: Final = 64
"""Most blocks of a FETCH, so that a guest's request never waits behind a long one."""
SEARCH_BLOCKS: Final = 4096
"""How much of a map is looked at in one go for the runs of a FETCH."""
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


@dataclass(frozen=True)
class Loan:
    """What the daemon lends of a disk that is not all here."""

    disk: BorrowedDisk | None = None
    """None: all of it is here already, or was and has moved on."""
    repay: Callable[[], None] = lambda: None
    """Makes it an ordinary disk, durably, when all of it is here; may sleep."""


class Request(NamedTuple):
    """Blocks ``first`` to ``stop - 1`` of a disk, and perhaps more runs behind them, in ascending order."""

    disk: int
    first: int
    stop: int
    more: tuple[tuple[int, int], ...] = ()

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """Return all runs of blocks."""
        return (self.first, self.stop), *self.more

    @property
    def end(self) -> int:
        """Return the block after the last."""
        return self.more[-1][1] if self.more else self.stop

    @property
    def n_bytes(self) -> int:
        """Return how much it is, in whole blocks."""
        return sum(stop - first for first, stop in self.runs) * BLOCK_SIZE


class FetchPlan:
    """Decides what to ask for; no I/O."""

    def __init__(self, disks: Sequence[BorrowedDisk], hot: Sequence[Request] = (), max_runs: int = 1) -> None:
        """Plan for what is missing of ``disks``, known by their index; ``hot`` goes before the rest of them.

        At most ``max_runs`` runs are asked for at once.
        """
        self._disks = disks
        self._max_runs = max(1, min(max_runs, native.MAX_FETCH_RUNS))
        self._urgent: deque[Request] = deque()
        self._hot = deque(hot)
        self._cursor = (0, 0)
        self.asked: deque[Request] = deque()
        """What was asked for and has not come, in order."""
        self._due: list[tuple[int, int]] = []
        """What of the request that is being answered is still to come, as offset and length; empty between two."""

    def next(self, *, only_wanted: bool = False) -> Request | None:
        """Return what to ask for now and count it as asked for; None: nothing that was not asked for is missing.

        With ``only_wanted``: nothing but what a guest waits for.
        """
        for index, disk in enumerate(self._disks):
            while (wanted := disk.wants.take()) is not None:
                self._urgent.append(Request(index, *wanted))
        request = self._next_of(self._urgent)
        if request is None and not only_wanted:
            request = self._next_of(self._hot) or self._next_in_order()
        if request is not None:
            self.asked.append(request)
        return request

    def _next_of(self, queue: deque[Request]) -> Request | None:
        while queue:
            wanted = queue.popleft()
            # Some of it may have come, or be on its way.
            runs: list[tuple[int, int]] = []
            if self._gather(runs, self._pieces(*wanted[:3])):
                queue.appendleft(wanted._replace(first=runs[-1][1]))
            if runs:
                return _request(wanted.disk, runs)
        return None

    def _next_in_order(self) -> Request | None:
        """Return the next runs after the last ones in order: all that is missing before them was asked for.

        A map is walked once, from one missing block to the next: a disk has many millions of them, and this runs for
        every piece.
        """
        span = PIECE_BLOCKS if self._max_runs == 1 else SEARCH_BLOCKS
        runs: list[tuple[int, int]] = []
        index, block = self._cursor
        while index < len(self._disks):
            first = self._disks[index].next_missing(block)
            if first is not None:
                stop = min(n_blocks(self._disks[index].size), first + span)
                is_full = self._gather(runs, self._pieces(index, first, stop))
                block = runs[-1][1] if is_full else stop
                if is_full:
                    break
            elif runs:
                break
            else:
                index, block = index + 1, 0
        self._cursor = index, block
        return _request(index, runs) if runs else None

    def _gather(self, runs: list[tuple[int, int]], pieces: Iterator[tuple[int, int]]) -> bool:
        """Add pieces to the runs of a FETCH while it takes them; return whether it takes no more."""
        n = sum(stop - first for first, stop in runs)
        for first, stop in pieces:
            n += stop - first
            if n > PIECE_BLOCKS:
                return True
            runs.append((first, stop))
            if n == PIECE_BLOCKS or len(runs) == self._max_runs:
                return True
        return False

    def _pieces(self, disk: int, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield what is missing of a range and not asked for, in pieces."""
        asked = (one for one in self.asked if one.disk == disk and one.first < stop and first < one.end)
        under_way = deque(sorted(run for one in asked for run in one.runs if run[0] < stop and first < run[1]))
        for low, high in self._disks[disk].missing(first, stop):
            at = low
            while at < high:
                while under_way and under_way[0][1] <= at:
                    under_way.popleft()
                end = min(high, at + PIECE_BLOCKS, under_way[0][0] if under_way else high)
                if end > at:
                    yield at, end
                    at = end
                else:
                    at = under_way[0][1]

    def expect(self, frame: native.DataFrame | native.ZeroFrame, nth: int = 0) -> Request | None:
        """Return what a frame answers, the ``nth`` since `answered` was called for what was filled in.

        It may be called from another thread than `next`, which only adds to what is asked for.

        Returns:
            None: more of the answer is to come.

        Raises:
            RemoteProtocolError: it is not what was asked for first.
        """
        if len(self.asked) <= nth:
            raise RemoteProtocolError("the source sent what nobody asked for")
        request = self.asked[nth]
        size = self._disks[request.disk].size
        due = self._due or [
            (first * BLOCK_SIZE, min(size, stop * BLOCK_SIZE) - first * BLOCK_SIZE) for first, stop in request.runs
        ]
        sent, rest = list(frame.extents), list[tuple[int, int]]()
        is_data = isinstance(frame, native.DataFrame)
        is_right = sent == due
        if not is_right and not is_data and request.more:
            rest = sorted({*due}.difference(sent))
            is_right = len(rest) + len(sent) == len(due)
        elif not is_right and not is_data and len(sent) == 1:
            (offset, length), end = sent[0], sum(sent[0])
            is_right = (
                offset == due[0][0] and length >= due[0][1] and end <= size and (end == size or not end % BLOCK_SIZE)
            )
        if frame.disk != request.disk or not is_right:
            raise RemoteProtocolError(
                f"the source sent {sent[0][0]}+{sent[0][1]} of disk {frame.disk} where "
                f"{due[0][0]}+{due[0][1]} of disk {request.disk} was due"
            )
        self._due = rest
        return None if rest else request

    def answered(self) -> Request:
        """Take note that what was asked for first is here, and return it."""
        return self.asked.popleft()

    @property
    def is_done(self) -> bool:
        """Whether nothing is missing and nothing is under way."""
        return not self.asked and not any(disk.missing_bytes for disk in self._disks)


def _request(disk: int, runs: Sequence[tuple[int, int]]) -> Request:
    return Request(disk, *runs[0], tuple(runs[1:]))


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
            await _run_beside(self._fetch_and_repay, self._stay_alive)
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
            await _run_beside(self._ask, self._receive, self._keep)
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


async def _run_beside(main: Callable[[], Awaitable[None]], *others: Callable[[], Awaitable[None]]) -> None:
    """Run ``main``, and ``others`` until it ends; the first failure ends them all, and is raised, not a group."""
    failures: list[FusemigError] = []
    async with trio.open_nursery() as nursery:

        async def guard(task: Callable[[], Awaitable[None]]) -> None:
            try:
                await task()
            except FusemigError as exc:
                failures.append(exc)
                nursery.cancel_scope.cancel()

        for other in others:
            nursery.start_soon(guard, other)
        await guard(main)
        nursery.cancel_scope.cancel()
    if failures:
        raise failures[0]
