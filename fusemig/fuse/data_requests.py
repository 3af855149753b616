"""DataRequests: the reads, writes and flushes of the pyfuse3 lane.

What is only a memory copy is done at once, on the event loop. What may sleep goes to a thread, within a limit per
export, so that one slow store cannot take the threads of the others. A write that meets a closed gate is parked: its
data stays in the handler's coroutine, the disk calls back when the gate has changed, and the write is then made as if
it were new. No thread waits.
"""

from __future__ import annotations

import errno
import time
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from fusemig.errors import DiskError, GateClosedError

if TYPE_CHECKING:
    from fusemig.disk.tracked import TrackedDisk
    from fusemig.fuse.export import Export, Exports

MAX_REQUEST_SIZE: Final = 1 << 20
"""The largest read or write of libfuse 3 (its FUSE_DEFAULT_MAX_PAGES_LIMIT of 256 pages)."""
IO_THREADS: Final = 16
"""Threads that may sleep in reads and writes of one export at a time."""
AWAY_THREADS: Final = 32
"""Threads that may wait for another host in reads and writes of one export at a time, apart from the others."""
FLUSH_THREADS: Final = 4
"""Threads that may sleep in fdatasync of one export at a time, apart from the others: a flush may take long."""


class DataRequests:
    """What one mount's handlers do with the disks of ``exports``; every method raises `DiskError` for the guest."""

    def __init__(self, exports: Exports) -> None:
        """Make room for the requests of each export."""
        self._io_limits = {export.inode: trio.CapacityLimiter(IO_THREADS) for export in exports}
        self._away_limits = {export.inode: trio.CapacityLimiter(AWAY_THREADS) for export in exports}
        self._flush_limits = {export.inode: trio.CapacityLimiter(FLUSH_THREADS) for export in exports}
        self._read_buffer = memoryview(bytearray(MAX_REQUEST_SIZE))
        # Parked writes, by the event that each waits for:
        self._parked: set[trio.Event] = set()
        self._is_stopping = False
        # Counters:
        self.n_reads = self.n_read_bytes = 0
        self.n_writes = self.n_written_bytes = 0
        self.n_flushes = self.n_parked = self.n_thread_requests = 0

    async def flush(self, export: Export) -> None:
        """Return when the disk's finished writes are durable."""
        if export.disk is None:
            return
        self.n_flushes += 1
        limit = self._flush_limits[export.inode]
        await trio.to_thread.run_sync(export.disk.flush, limiter=limit, abandon_on_cancel=True)

    async def read(self, export: Export, off: int, size: int) -> bytes | bytearray | memoryview:
        """Read, ending at the disk's end; what it returns is good until the next read."""
        disk = export.disk
        length = 0 if disk is None else min(size, disk.size - off)
        if disk is None or length <= 0:
            return b""
        self.n_reads += 1
        self.n_read_bytes += length
        if length <= MAX_REQUEST_SIZE:
            buffer = self._read_buffer[:length]
            if disk.pread_nowait(buffer, off):
                return buffer
        self.n_thread_requests += 1
        limit = self._limit(export.inode, disk, off, length, is_write=False)
        return await trio.to_thread.run_sync(disk.pread, length, off, limiter=limit, abandon_on_cancel=True)

    async def write(self, export: Export, off: int, buf: bytes) -> int:
        """Write what lies inside the disk, as a block device does: ENOSPC where nothing does."""
        disk = export.disk
        if disk is None:
            raise DiskError(errno.EROFS, f"write to disk '{export.name}'")
        data: bytes | memoryview = buf
        if off + len(buf) > disk.size:
            if off >= disk.size:
                raise DiskError(errno.ENOSPC, f"write to disk '{export.name}'", off, len(buf))
            data = memoryview(buf)[: disk.size - off]
        try:
            await self._write_once(export.inode, disk, data, off)
        except GateClosedError as refused:
            await self._write_parked(export.inode, disk, data, off, refused)
        if disk.write_gate.holds_replies:
            await _wait_answerable(disk, off, len(data))
        self.n_writes += 1
        self.n_written_bytes += len(data)
        export.mtime_ns = time.time_ns()
        return len(data)

    async def _write_once(self, inode: int, disk: TrackedDisk, data: bytes | memoryview, off: int) -> None:
        if disk.write_may_sleep(data, off):
            self.n_thread_requests += 1
            # Never abandoned: a write that outlives its mount could meet an image that was closed.
            limit = self._limit(inode, disk, off, len(data), is_write=True)
            await trio.to_thread.run_sync(disk.pwrite, data, off, limiter=limit)
        else:
            disk.pwrite(data, off)

    def _limit(self, inode: int, disk: TrackedDisk, off: int, length: int, *, is_write: bool) -> trio.CapacityLimiter:
        waits = disk.waits_for_peer(off, length, is_write=is_write)
        return self._away_limits[inode] if waits else self._io_limits[inode]

    async def _write_parked(
        self, inode: int, disk: TrackedDisk, data: bytes | memoryview, off: int, refused: GateClosedError
    ) -> None:
        """Make a write that met a closed gate, each time the gate changes, until it is admitted or refused."""
        self.n_parked += 1
        token = trio.lowlevel.current_trio_token()
        while True:
            event = trio.Event()
            if self._is_stopping:
                raise DiskError(errno.EIO, f"write to disk '{disk.name}' at unmount")
            resume = partial(_wake, token, event)
            if disk.write_gate.park(resume, refused):
                self._parked.add(event)
                try:
                    await event.wait()
                finally:
                    self._parked.discard(event)
                    disk.write_gate.unpark(resume)  # where it was not the gate that has changed
            try:
                return await self._write_once(inode, disk, data, off)
            except GateClosedError as again:
                refused = again
                await trio.lowlevel.checkpoint()

    def refuse_parked(self) -> None:
        """Answer every parked write, and every write that would have to be parked from now on, with EIO.

        For the end of a mount only: the guest is told that its write was not made, instead of being left to wait for
        an answer that nobody will give.
        """
        self._is_stopping = True
        for event in self._parked:
            event.set()


async def _wait_answerable(disk: TrackedDisk, offset: int, length: int) -> None:
    """Wait until a write that was made may be answered: whoever holds it owes that before a deadline."""
    event = trio.Event()
    if disk.write_gate.hold_reply(offset, length, partial(_wake, trio.lowlevel.current_trio_token(), event)):
        await event.wait()


def _wake(token: trio.lowlevel.TrioToken, event: trio.Event) -> None:
    """Set ``event`` from whichever thread changed the gate; a loop that has ended has no parked writes."""
    try:
        token.run_sync_soon(event.set)
    except trio.RunFinishedError:
        return
