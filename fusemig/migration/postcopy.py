"""SourcePostcopy: a migration whose destination takes over before everything was sent, seen from the source.

    tell_missing     MISSING ─>     before FINAL: what the destination has to fetch
    run              `fusemig.migration.lend`, from TAKEN until the destination has everything

From TAKEN on both hosts hold a part of the disks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from fusemig.core.units import BLOCK_SIZE, BLOCKS_PER_CHUNK, n_blocks
from fusemig.migration.lend import Lending, LentDisk
from fusemig.migration.order import Order
from fusemig.wire import native

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from fusemig.disk.tracked import TrackedDisk
    from fusemig.migration.disk_group import DiskGroup
    from fusemig.migration.link import NativeLink, Offload
    from fusemig.migration.stats import MigrationParameters
    from fusemig.net.transport import ByteStream


class SourcePostcopy:
    """Of one migration; it may never come to it."""

    def __init__(self, disks: DiskGroup, parameters: MigrationParameters, offload: Offload) -> None:
        """Nothing is missing yet; ``offload`` runs calls that may sleep."""
        self._disks = disks
        self._parameters = parameters
        self._offload = offload
        self._missing_bytes = 0
        """What the destination was told to fetch."""
        self._lending: Lending | None = None
        self._scope = trio.CancelScope()

    async def tell_missing(self, link: NativeLink) -> bool:
        """Tell the destination what it has to fetch; return whether there is anything. Writes have ended."""
        is_any, self._missing_bytes = False, 0
        for disk in self._disks.tracked:
            runs = await self._offload(disk.tracking.dirty_runs)
            if len(runs) > native.MAX_DISK_RUNS:
                runs = _in_chunks(runs, disk.disk.size)
            is_any |= bool(runs)
            self._missing_bytes += sum(stop - first for first, stop in runs) * BLOCK_SIZE
            for at in range(0, len(runs), native.MAX_RUNS):
                await link.send_message(native.Missing(disk.index, runs[at : at + native.MAX_RUNS]))
        return is_any

    async def run(self, connect: Callable[[], Awaitable[ByteStream]]) -> None:
        """Have the destination fetch the rest, until it has everything or `leave` is called.

        What guests write is not tracked any more: they write at the destination.
        """
        disks = [
            LentDisk(lent.disk.name, lent.disk.image, lent.epoch_file, await self._offload(self._hot_chunks, lent.disk))
            for lent in self._disks.lent
        ]
        self._lending = Lending(disks, connect, self._offload)
        self._disks.stop_tracking()
        with self._scope:
            await self._lending.run()

    def _hot_chunks(self, disk: TrackedDisk) -> list[int]:
        """Return what is to be fetched first; writes have ended, so this is asked once, before the heat fades."""
        if self._parameters.order is not Order.HEAT:
            return []
        return disk.heat.hottest(native.MAX_HOT // len(self._disks.lent))

    def leave(self) -> None:
        """Have `run` end before its time; the next daemon goes on with it."""
        self._scope.cancel()

    @property
    def was_left(self) -> bool:
        """Whether that ended it."""
        return self._scope.cancelled_caught

    @property
    def pending_bytes(self) -> int | None:
        """What is still to be fetched; None: nothing is fetched yet."""
        return None if self._lending is None else max(0, self._missing_bytes - self._lending.sent_bytes)

    @property
    def wire_bytes(self) -> int:
        """Bytes handed to streams while it was fetched, headers included."""
        return 0 if self._lending is None else self._lending.wire_bytes


def _in_chunks(runs: Sequence[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Return runs of blocks widened to whole chunks, which are fewer."""
    widened: list[tuple[int, int]] = []
    for first, stop in runs:
        low = first - first % BLOCKS_PER_CHUNK
        high = min(n_blocks(size), stop + -stop % BLOCKS_PER_CHUNK)
        if widened and low <= widened[-1][1]:
            widened[-1] = widened[-1][0], high
        else:
            widened.append((low, high))
    return widened
