"""DiskOperations: pyfuse3's requests answered from the exports, and the only place that maps errors to errnos.

Rules:

1. Nothing but `pyfuse3.FUSEError` and `trio.Cancelled` leaves a handler: any other exception would end the mount.
   `_guarded` turns a `DiskError` or OSError into its errno; anything else is a bug: EIO, logged and counted.
2. A handler runs on the event loop. What may sleep goes to a thread, within a limit per export, so that one slow store
   cannot take the threads of the others; what is only a memory copy is done at once.
3. A write that meets a closed gate is parked: its data stays in the handler's coroutine, the disk calls back when the
   gate has changed, and the write is then made as if it were new. No thread waits.
4. `read` answers from a buffer shared by all inline reads: pyfuse3 copies it to the kernel before any other task runs.
5. The namespace is fixed. Inode numbers are those of the exports, a file handle is the inode number, ``forget`` and
   ``release`` have nothing to free.

Caching. ``direct_io`` stays off: with it the kernel would not send the FSYNC that makes an O_DSYNC write durable, and
O_DIRECT opens pass the page cache by anyway. ``keep_cache`` is off too, so that an open drops what an earlier
reader of an incoming image has left behind; except while the disk is frozen, when dropping would make the open wait
for the page of a parked write. Attributes are kept for a second; the kernel forgets them at every write
that it sends us, so a new mtime is seen at once. Nothing is kept about an image that is still incoming.

The write-back cache, where it was asked for: a buffered write is acknowledged by the kernel and comes to us when it is
synced, pushed out or closed, or when the kernel finds time; until then it is neither marked nor durable. O_DIRECT goes
past it. The kernel then takes size and mtime of a file it knows from itself, so an export whose size was not known is
another inode generation once it is: the kernel forgets the first one. A buffered write past the end is not refused:
what lies there is lost, with ENOSPC at the sync if nothing of a request fitted.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from dataclasses import dataclass
from functools import partial, wraps
from typing import TYPE_CHECKING, Final, NoReturn, Protocol, TypeVar, cast, runtime_checkable

import pyfuse3
import structlog
import trio
from pyfuse3 import FUSEError

from fusemig.core.units import BLOCK_SIZE
from fusemig.disk.tracked import Gate
from fusemig.errors import DiskError, GateClosedError
from fusemig.fuse.attributes import attributes_of
from fusemig.fuse.export import ROOT_INODE

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from fusemig.disk.tracked import TrackedDisk
    from fusemig.fuse.export import Export, Exports

ENTRY_TIMEOUT_S: Final = 60.0
"""Names and inode numbers never change."""
MAX_REQUEST_SIZE: Final = 1 << 20
"""The largest read or write of libfuse 3 (its FUSE_DEFAULT_MAX_PAGES_LIMIT of 256 pages)."""
IO_THREADS: Final = 16
"""Threads that may sleep in reads and writes of one export at a time."""
AWAY_THREADS: Final = 32
"""Threads that may wait for another host in reads and writes of one export at a time, apart from the others."""
FLUSH_THREADS: Final = 4
"""Threads that may sleep in fdatasync of one export at a time, apart from the others: a flush may take long."""

_ROOT_MODE: Final = stat.S_IFDIR | 0o755

_Handler = TypeVar("_Handler", bound="Callable[..., Coroutine[Any, Any, object]]")

log = structlog.get_logger()


@runtime_checkable
class _HasStatvfs(Protocol):
    def statvfs(self) -> os.statvfs_result: ...


@dataclass(frozen=True)
class MountStatistics:
    """What a mount has done since it was made."""

    reads: int
    read_bytes: int
    writes: int
    written_bytes: int
    flushes: int
    parked_total: int
    """Writes that had to wait for the gate; those that wait now: `TrackedDisk.parked_writes`."""
    thread_requests: int
    """Reads and writes that were given to a thread because they might have slept."""
    handler_errors: int
    """Requests answered EIO because of a bug of ours; the log has them."""
    open_handles: int


def _guarded(handler: _Handler) -> _Handler:
    """Keep rule 1 for a handler."""

    @wraps(handler)
    async def guarded(self: DiskOperations, *args: object) -> object:
        try:
            return await handler(self, *args)
        except FUSEError:
            raise
        except (DiskError, OSError) as exc:
            raise FUSEError(exc.errno or errno.EIO) from exc
        except Exception as exc:
            self.n_handler_errors += 1
            log.exception("request failed by a bug, answered EIO", request=handler.__name__)
            raise FUSEError(errno.EIO) from exc

    return cast("_Handler", guarded)


class DiskOperations(pyfuse3.Operations):
    """The handlers of one mount."""

    supports_dot_lookup = False
    enable_acl = False

    def __init__(self, exports: Exports, *, write_back: bool = False) -> None:
        """Serve ``exports``; the set is fixed from here on. ``write_back``: see "Caching"."""
        super().__init__()
        self.enable_writeback_cache = write_back
        self._exports = exports
        self._io_limits = {export.inode: trio.CapacityLimiter(IO_THREADS) for export in exports}
        self._away_limits = {export.inode: trio.CapacityLimiter(AWAY_THREADS) for export in exports}
        self._flush_limits = {export.inode: trio.CapacityLimiter(FLUSH_THREADS) for export in exports}
        self._n_handles = {export.inode: 0 for export in exports}
        self._read_buffer = memoryview(bytearray(MAX_REQUEST_SIZE))
        self._made_ns = time.time_ns()
        # Parked writes, by the event that each waits for:
        self._parked: set[trio.Event] = set()
        self._is_stopping = False
        # Counters:
        self.n_handler_errors = 0
        self._n_reads = self._n_read_bytes = 0
        self._n_writes = self._n_written_bytes = 0
        self._n_flushes = self._n_parked = self._n_thread_requests = 0

    # For the mount

    def open_handles(self, export: Export) -> int:
        """Return how many open files of this export the kernel has not released.

        Of a mount that a predecessor made: at least some of those that were opened since.
        """
        return self._n_handles[export.inode]

    def count_requests(self) -> int:
        """Return how many reads and writes guests have made."""
        return self._n_reads + self._n_writes

    def statistics(self) -> MountStatistics:
        """Return the counters as they are now."""
        return MountStatistics(
            reads=self._n_reads,
            read_bytes=self._n_read_bytes,
            writes=self._n_writes,
            written_bytes=self._n_written_bytes,
            flushes=self._n_flushes,
            parked_total=self._n_parked,
            thread_requests=self._n_thread_requests,
            handler_errors=self.n_handler_errors,
            open_handles=sum(self._n_handles.values()),
        )

    def refuse_parked(self) -> None:
        """Answer every parked write, and every write that would have to be parked from now on, with EIO.

        For the end of a mount only: the guest is told that its write was not made, instead of being left to wait for
        an answer that nobody will give.
        """
        self._is_stopping = True
        for event in self._parked:
            event.set()

    # The namespace

    @_guarded
    async def lookup(
        self,
        parent_inode: int,
        name: bytes,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Find an export by its name."""
        export = self._exports.by_name(os.fsdecode(name)) if parent_inode == ROOT_INODE else None
        if export is None:
            raise FUSEError(errno.ENOENT)
        return self._file_attributes(export)

    @_guarded
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Describe the root or an export."""
        return self._attributes(inode)

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        return self._root_attributes() if inode == ROOT_INODE else self._file_attributes(self._export(inode))

    def _root_attributes(self) -> pyfuse3.EntryAttributes:
        entry = self._owned_entry(ROOT_INODE, _ROOT_MODE)
        entry.st_nlink = 2
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = self._made_ns
        entry.attr_timeout = ENTRY_TIMEOUT_S
        return entry

    def _file_attributes(self, export: Export) -> pyfuse3.EntryAttributes:
        one = attributes_of(export)
        entry = self._owned_entry(one.inode, one.mode)
        entry.st_nlink = one.n_links
        entry.st_size = one.size
        entry.st_blksize = one.block_size
        entry.st_blocks = one.n_sectors
        entry.st_atime_ns = one.atime_ns
        entry.st_mtime_ns = one.mtime_ns
        entry.st_ctime_ns = one.ctime_ns
        entry.attr_timeout = one.timeout_s
        if self.enable_writeback_cache:
            entry.generation = 0 if export.disk is None else 1
            if export.disk is None:
                entry.entry_timeout = 0.0
        return entry

    @staticmethod
    def _owned_entry(inode: int, mode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = mode
        entry.st_uid, entry.st_gid = os.geteuid(), os.getegid()
        entry.entry_timeout = ENTRY_TIMEOUT_S
        return entry

    def _export(self, inode: int) -> Export:
        export = self._exports.by_inode(inode)
        if export is None:
            raise FUSEError(errno.ENOENT)
        return export

    @_guarded
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Set times; a truncate to the size that the disk has is no change; everything else is refused."""
        if inode == ROOT_INODE or fields.update_mode or fields.update_uid or fields.update_gid:
            raise FUSEError(errno.EPERM)
        export = self._export(inode)
        if fields.update_size:
            if attr.st_size != export.size:
                raise FUSEError(errno.EPERM)
            return self._file_attributes(export)
        export.set_times(
            attr.st_atime_ns if fields.update_atime else None,
            attr.st_mtime_ns if fields.update_mtime else None,
            time.time_ns(),
        )
        self._exports.on_times_set()
        return self._file_attributes(export)

    @_guarded
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """Open the root."""
        if inode != ROOT_INODE:
            raise FUSEError(errno.ENOTDIR)
        return inode

    @_guarded
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List the exports; an entry's id is its inode number, so the next one follows it."""
        for export in self._exports:
            if export.inode <= start_id:
                continue
            entry = self._file_attributes(export)
            if not pyfuse3.readdir_reply(token, os.fsencode(export.name), entry, export.inode):
                return

    @_guarded
    async def releasedir(self, fh: int) -> None:
        """Free nothing."""

    @_guarded
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Do nothing: the namespace has nothing to lose."""

    async def forget(self, inode_list: list[tuple[int, int]]) -> None:  # type: ignore[override]
        """Free nothing."""

    @_guarded
    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        """Allow: with ``default_permissions`` the kernel has checked the mode bits."""
        return True

    @_guarded
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Describe the file system that holds the first image; of disks without one, only their sizes."""
        result = pyfuse3.StatvfsData()
        image: object = next((export.disk.image for export in self._exports if export.disk is not None), None)
        if isinstance(image, _HasStatvfs):
            store = await trio.to_thread.run_sync(image.statvfs, abandon_on_cancel=True)
            result.f_bsize, result.f_frsize = store.f_bsize, store.f_frsize
            result.f_blocks, result.f_bfree, result.f_bavail = store.f_blocks, store.f_bfree, store.f_bavail
        else:
            result.f_bsize = result.f_frsize = BLOCK_SIZE
            result.f_blocks = sum(-(-export.size // BLOCK_SIZE) for export in self._exports)
        result.f_files = len(self._exports) + 1
        result.f_namemax = 64
        return result

    # What a fixed namespace refuses. getxattr and listxattr keep the base class's ENOSYS: the kernel remembers it,
    # answers EOPNOTSUPP by itself, and no longer asks for security.capability before every write.

    async def create(self, *args: object) -> NoReturn:
        """Refuse."""
        raise FUSEError(errno.EPERM)

    async def mknod(self, *args: object) -> NoReturn:
        """Refuse."""
        raise FUSEError(errno.EPERM)

    async def mkdir(self, *args: object) -> NoReturn:
        """Refuse."""
        raise FUSEError(errno.EPERM)

    async def unlink(self, *args: object) -> NoReturn:
        """Refuse."""
        raise FUSEError(errno.EPERM)

    async def rmdir(self, *args: object) -> NoReturn:
        """Refuse."""
        raise FUSEError(errno.EPERM)

    async def rename(self, *args: object) -> NoReturn:
        """Refuse."""
        raise FUSEError(errno.EPERM)

    async def link(self, *args: object) -> NoReturn:
        """Refuse."""
        raise FUSEError(errno.EPERM)

    async def symlink(self, *args: object) -> NoReturn:
        """Refuse."""
        raise FUSEError(errno.EPERM)

    async def setxattr(self, *args: object) -> NoReturn:
        """Refuse."""
        raise FUSEError(errno.EPERM)

    async def removexattr(self, *args: object) -> NoReturn:
        """Refuse."""
        raise FUSEError(errno.EPERM)

    # The files

    @_guarded
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open an export; for writing too while its gate refuses writes, because VMMs open their disks early."""
        export = self._export(inode)
        if flags & os.O_TRUNC:  # libfuse asks for atomic O_TRUNC, so no setattr follows
            raise FUSEError(errno.EPERM)
        if export.read_only and flags & os.O_ACCMODE != os.O_RDONLY:
            raise FUSEError(errno.EROFS)
        self._n_handles[inode] += 1
        is_frozen = export.disk is not None and export.disk.gate is Gate.CLOSED
        return pyfuse3.FileInfo(fh=inode, direct_io=False, keep_cache=is_frozen)

    @_guarded
    async def release(self, fh: int) -> None:
        """Count the handle out, unless it was a predecessor that counted it in."""
        self._n_handles[fh] = max(0, self._n_handles[fh] - 1)

    @_guarded
    async def flush(self, fh: int) -> None:
        """Do nothing: a close promises no durability."""

    @_guarded
    async def fsync(self, fh: int, datasync: bool) -> None:
        """Answer when the disk's finished writes are durable."""
        disk = self._export(fh).disk
        if disk is None:
            return
        self._n_flushes += 1
        await trio.to_thread.run_sync(disk.flush, limiter=self._flush_limits[fh], abandon_on_cancel=True)

    @_guarded
    async def read(self, fh: int, off: int, size: int) -> bytes | bytearray | memoryview:  # type: ignore[override]
        """Read, ending at the disk's end."""
        disk = self._export(fh).disk
        length = 0 if disk is None else min(size, disk.size - off)
        if disk is None or length <= 0:
            return b""
        self._n_reads += 1
        self._n_read_bytes += length
        if length <= MAX_REQUEST_SIZE:
            buffer = self._read_buffer[:length]
            if disk.pread_nowait(buffer, off):
                return buffer
        self._n_thread_requests += 1
        limit = self._limit(fh, disk, off, length, is_write=False)
        return await trio.to_thread.run_sync(disk.pread, length, off, limiter=limit, abandon_on_cancel=True)

    @_guarded
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write what lies inside the disk, as a block device does: ENOSPC where nothing does."""
        export = self._export(fh)
        disk = export.disk
        if disk is None:
            raise FUSEError(errno.EROFS)
        data: bytes | memoryview = buf
        if off + len(buf) > disk.size:
            if off >= disk.size:
                raise FUSEError(errno.ENOSPC)
            data = memoryview(buf)[: disk.size - off]
        try:
            await self._write_once(fh, disk, data, off)
        except GateClosedError as refused:
            await self._write_parked(fh, disk, data, off, refused)
        if disk.holds_replies:
            await _wait_answerable(disk, off, len(data))
        self._n_writes += 1
        self._n_written_bytes += len(data)
        export.mtime_ns = time.time_ns()
        return len(data)

    async def _write_once(self, fh: int, disk: TrackedDisk, data: bytes | memoryview, off: int) -> None:
        if disk.write_may_sleep(data, off):
            self._n_thread_requests += 1
            # Never abandoned: a write that outlives its mount could meet an image that was closed.
            limit = self._limit(fh, disk, off, len(data), is_write=True)
            await trio.to_thread.run_sync(disk.pwrite, data, off, limiter=limit)
        else:
            disk.pwrite(data, off)

    def _limit(self, fh: int, disk: TrackedDisk, off: int, length: int, *, is_write: bool) -> trio.CapacityLimiter:
        waits = disk.waits_for_peer(off, length, is_write=is_write)
        return self._away_limits[fh] if waits else self._io_limits[fh]

    async def _write_parked(
        self, fh: int, disk: TrackedDisk, data: bytes | memoryview, off: int, refused: GateClosedError
    ) -> None:
        """Make a write that met a closed gate, each time the gate changes, until it is admitted or refused."""
        self._n_parked += 1
        token = trio.lowlevel.current_trio_token()
        while True:
            event = trio.Event()
            if self._is_stopping:
                raise FUSEError(errno.EIO)
            resume = partial(_wake, token, event)
            if disk.park(resume, refused):
                self._parked.add(event)
                try:
                    await event.wait()
                finally:
                    self._parked.discard(event)
                    disk.unpark(resume)  # where it was not the gate that has changed
            try:
                return await self._write_once(fh, disk, data, off)
            except GateClosedError as again:
                refused = again
                await trio.lowlevel.checkpoint()


async def _wait_answerable(disk: TrackedDisk, offset: int, length: int) -> None:
    """Wait until a write that was made may be answered: whoever holds it owes that before a deadline."""
    event = trio.Event()
    if disk.hold_reply(offset, length, partial(_wake, trio.lowlevel.current_trio_token(), event)):
        await event.wait()


def _wake(token: trio.lowlevel.TrioToken, event: trio.Event) -> None:
    """Set ``event`` from whichever thread changed the gate; a loop that has ended has no parked writes."""
    try:
        token.run_sync_soon(event.set)
    except trio.RunFinishedError:
        return
