"""DiskOperations: pyfuse3's requests answered from the exports, and the only place that maps errors to errnos.

Rules:

1. Nothing but `pyfuse3.FUSEError` and `trio.Cancelled` leaves a handler: any other exception would end the mount.
   `_guarded` turns a `DiskError` or OSError into its errno; anything else is a bug: EIO, logged and counted.
2. A handler runs on the event loop. What may sleep goes to a thread, and a write that meets a closed gate waits without
   one (`fusemig.fuse.data_requests`).
3. `read` answers from a buffer shared by all inline reads: pyfuse3 copies it to the kernel before any other task runs.
4. The namespace is fixed. Inode numbers are those of the exports, a file handle is the inode number, ``forget`` and
   ``release`` have nothing to free.

Caching. ``direct_io`` stays off: with it the kernel would not send the FSYNC that makes an O_DSYNC write durable, and
O_DIRECT opens pass the page cache by anyway. ``keep_cache`` is off too, so that an open drops what an earlier
reader of an incoming image has left behind; except while the disk is frozen, when dropping would make the open wait
for the page of a parked write. How long names and attributes are kept says `fusemig.fuse.entries`.

The write-back cache, where it was asked for: a buffered write is acknowledged by the kernel and comes to us when it is
synced, pushed out or closed, or when the kernel finds time; until then it is neither marked nor durable. O_DIRECT goes
past it. A buffered write past the end is not refused: what lies there is lost, with ENOSPC at the sync if nothing of a
request fitted.
"""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, NoReturn, Protocol, TypeVar, cast, runtime_checkable

import pyfuse3
import structlog
import trio
from pyfuse3 import FUSEError

from fusemig.core.units import BLOCK_SIZE
from fusemig.disk.tracked import Gate
from fusemig.errors import DiskError
from fusemig.fuse.data_requests import DataRequests
from fusemig.fuse.entries import Entries
from fusemig.fuse.export import ROOT_INODE

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from fusemig.fuse.export import Export, Exports

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
        self._data = DataRequests(exports)
        self._entries = Entries(has_write_back=write_back)
        self._n_handles = {export.inode: 0 for export in exports}
        self.n_handler_errors = 0

    # For the mount

    def open_handles(self, export: Export) -> int:
        """Return how many open files of this export the kernel has not released.

        Of a mount that a predecessor made: at least some of those that were opened since.
        """
        return self._n_handles[export.inode]

    def count_requests(self) -> int:
        """Return how many reads and writes guests have made."""
        return self._data.n_reads + self._data.n_writes

    def statistics(self) -> MountStatistics:
        """Return the counters as they are now."""
        return MountStatistics(
            reads=self._data.n_reads,
            read_bytes=self._data.n_read_bytes,
            writes=self._data.n_writes,
            written_bytes=self._data.n_written_bytes,
            flushes=self._data.n_flushes,
            parked_total=self._data.n_parked,
            thread_requests=self._data.n_thread_requests,
            handler_errors=self.n_handler_errors,
            open_handles=sum(self._n_handles.values()),
        )

    def refuse_parked(self) -> None:
        """Answer every parked write, and every write that would have to be parked from now on, with EIO."""
        self._data.refuse_parked()

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
        return self._entries.of_file(export)

    @_guarded
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Describe the root or an export."""
        return self._attributes(inode)

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        return self._entries.of_root() if inode == ROOT_INODE else self._entries.of_file(self._export(inode))

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
            return self._entries.of_file(export)
        export.set_times(
            attr.st_atime_ns if fields.update_atime else None,
            attr.st_mtime_ns if fields.update_mtime else None,
            time.time_ns(),
        )
        self._exports.on_times_set()
        return self._entries.of_file(export)

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
            entry = self._entries.of_file(export)
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
        await self._data.flush(self._export(fh))

    @_guarded
    async def read(self, fh: int, off: int, size: int) -> bytes | bytearray | memoryview:  # type: ignore[override]
        """Read, ending at the disk's end."""
        return await self._data.read(self._export(fh), off, size)

    @_guarded
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write what lies inside the disk."""
        return await self._data.write(self._export(fh), off, buf)
