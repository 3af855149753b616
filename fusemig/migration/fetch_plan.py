"""FetchPlan: what a destination that owns its disks asks their source for next; no I/O.

What a guest waits for goes first, then what is hot, then the rest of the disks in order. Runs of missing blocks that
are shorter than a piece are asked for together, where the source takes that (LEND says so), and each answer is held
against what was asked for.
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Final, NamedTuple

from fusemig.core.units import BLOCK_SIZE, BLOCKS_PER_CHUNK, n_blocks
from fusemig.errors import RemoteProtocolError
from fusemig.wire import native

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fusemig.disk.borrowed import BorrowedDisk

PIECE_BLOCKS: Final = 64
"""Most blocks of a FETCH, so that a guest's request never waits behind a long one."""
SEARCH_BLOCKS: Final = 4096
"""How much of a map is looked at in one go for the runs of a FETCH."""


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
