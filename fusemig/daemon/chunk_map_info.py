"""The disks' chunk maps in QMP's words, counted when somebody asks.

Nothing is kept up to date for it. What holds data is asked of the image's store, in a thread, and remembered for a
while; what guests wrote since then is known anyway. The counting gives way to everybody again and again, and a
guest's write waits for the lock no longer than it takes to copy the bits of one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from fusemig.core.bitmap import ChunkBitmap
from fusemig.core.chunk_map import Cell, chunks_per_cell, count_cell
from fusemig.core.phase import MigrationPhase
from fusemig.core.units import BLOCKS_PER_CHUNK, chunks_of, n_blocks, n_chunks
from fusemig.disk.borrowed import BorrowedDisk
from fusemig.errors import DiskError
from fusemig.qmp.seeing import ChunkMap

if TYPE_CHECKING:
    from fusemig.disk.base import Disk
    from fusemig.disk.tracked import TrackedDisk
    from fusemig.disk.tracking import Tracking
    from fusemig.migration.outgoing import OutgoingMigration

MAX_RUNS: Final = 1 << 16
"""Of a store that is in more pieces the rest counts as allocated, so that asking takes a fraction of a second."""
SCAN_S: Final = 10.0
"""How long what the store said is believed, in seconds..."""
SCAN_FILLING_S: Final = 1.0
"""...and of an image that is being filled..."""
_SCAN_SHARE: Final = 20
"""...but asking takes no more than so little of the time."""
_AT_ONCE: Final = 1 << 16
"""So many chunks are counted between two checkpoints, where a cell costs as much as `_CELL_COST` of them."""
_CELL_COST: Final = 1024


class _Scan(NamedTuple):
    """What a store said."""

    of: Disk
    """The layer that was asked."""
    began: float
    ended: float
    allocated: ChunkBitmap
    missing: ChunkBitmap | None
    """None: nothing is."""

    def is_good(self, image: Disk, now: float, *, is_filling: bool) -> bool:
        lasts_s = max(SCAN_FILLING_S if is_filling else SCAN_S, _SCAN_SHARE * (self.ended - self.began))
        return self.of is image and self.allocated.n_bits == n_chunks(image.size) and now < self.ended + lasts_s


class ChunkMaps:
    """Counts the chunks of one disk for whoever looks."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._scan: _Scan | None = None
        self._scanning = trio.Lock()

    async def count(
        self, disk: TrackedDisk, migration: OutgoingMigration | None, max_cells: int, *, is_filling: bool
    ) -> ChunkMap:
        """Return the map of a disk.

        Args:
            disk: that is looked at.
            migration: the last outgoing one.
            max_cells: from 1 on.
            is_filling: somebody other than guests fills the image.
        """
        scan = await self._scanned(disk.image, is_filling=is_filling)
        tracking, is_sending = _tracking(disk, migration)
        chunks = _Chunks(disk, tracking, scan)
        in_flight = [] if tracking is None else tracking.chunks_in_flight()
        n = scan.allocated.n_bits
        step = chunks_per_cell(n, max_cells)
        cells: list[Cell] = []
        cost = 0
        for first in range(0, n, step):
            cells.append(count_cell(chunks, in_flight, first, min(first + step, n), is_sending=is_sending))
            cost += step + _CELL_COST
            if cost >= _AT_ONCE:
                cost = 0
                await trio.lowlevel.checkpoint()
        counts = [list(count) if any(count) else [] for count in zip(*cells, strict=True)] or [[]] * len(Cell._fields)
        return ChunkMap(chunks=n, chunks_per_cell=step, **dict(zip(Cell._fields, counts, strict=True)))

    async def _scanned(self, image: Disk, *, is_filling: bool) -> _Scan:
        async with self._scanning:
            began = trio.current_time()
            if self._scan is None or not self._scan.is_good(image, began, is_filling=is_filling):
                # A store that hangs must not keep the daemon from ending, or from being upgraded.
                allocated, missing = await trio.to_thread.run_sync(_ask_store, image, abandon_on_cancel=True)
                self._scan = _Scan(image, began, trio.current_time(), allocated, missing)
            return self._scan


def _tracking(disk: TrackedDisk, migration: OutgoingMigration | None) -> tuple[Tracking | None, bool]:
    """Return what tells what is dirty, and whether what is not is at the destination."""
    tracking = None if migration is None else migration.tracking_of(disk)
    if migration is None or tracking is None:
        return None, False
    if not tracking.is_on or migration.phase is MigrationPhase.COMPLETED:
        return None, migration.phase is MigrationPhase.COMPLETED
    return tracking, migration.phase is not MigrationPhase.SETUP


class _Chunks:
    """A disk's chunks (`fusemig.core.chunk_map.Chunks`)."""

    def __init__(self, disk: TrackedDisk, tracking: Tracking | None, scan: _Scan) -> None:
        self._disk = disk
        self._tracking = tracking
        self._scan = scan

    def dirty_bits(self, first: int, stop: int) -> int:
        return 0 if self._tracking is None else self._tracking.dirty_bits(first, stop)

    def allocated_bits(self, first: int, stop: int) -> int:
        return self._scan.allocated.bits(first, stop) | self._disk.written_bits(first, stop)

    def missing_bits(self, first: int, stop: int) -> int:
        return 0 if self._scan.missing is None else self._scan.missing.bits(first, stop)

    def count_hot(self, first: int, stop: int) -> int:
        # Only where something was written, so that the heat of the rest never becomes resident.
        return self._disk.heat.count_hot(first, stop) if self._disk.written_bits(first, stop) else 0


def _ask_store(image: Disk) -> tuple[ChunkBitmap, ChunkBitmap | None]:
    """Return which chunks hold data and of which something is missing; may sleep."""
    n = n_chunks(image.size)
    allocated = ChunkBitmap(n)
    try:
        for n_runs, extent in enumerate(image.extents(0, image.size)):
            touched = chunks_of(extent.offset, extent.length)
            if n_runs == MAX_RUNS:
                allocated.set_range(touched.start, n)
                break
            if extent.is_data:
                allocated.set_range(touched.start, touched.stop)
    except DiskError:
        allocated.set_range(0, n)  # guests' requests and the migration will meet it, and say so
    if not isinstance(image, BorrowedDisk):
        return allocated, None
    missing = ChunkBitmap(n)
    for n_runs, (first, stop) in enumerate(image.missing(0, n_blocks(image.size))):
        is_last = n_runs == MAX_RUNS
        missing.set_range(first // BLOCKS_PER_CHUNK, n if is_last else -(-stop // BLOCKS_PER_CHUNK))
        if is_last:
            break
    return allocated, missing
