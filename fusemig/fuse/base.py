"""BaseMount: what a mounted file system is to the daemon, whichever lane serves it.

The lanes differ in who answers a request and in how they end; they share the deadlines, pushing out what the kernel
holds, and the limit of pyfuse3, which keeps its session in module globals: one mount per process.
"""

from __future__ import annotations

import errno
import os
import threading
from abc import ABC, abstractmethod
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import structlog
import trio

from fusemig.disk.tracked import Gate
from fusemig.errors import DiskError, FuseUnavailableError, StateError
from fusemig.fuse.device import GONE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fusemig.fuse.export import Export, Exports
    from fusemig.fuse.operations import DiskOperations, MountStatistics

START_TIMEOUT_S: Final = 10.0
"""For the first request to be answered."""
INVALIDATE_TIMEOUT_S: Final = 5.0
"""For the kernel to push out what it holds of one file."""
STOP_TIMEOUT_S: Final = 10.0
"""For requests in progress, and then for the unmount."""

_session = threading.Lock()

log = structlog.get_logger()


@contextmanager
def only_session() -> Iterator[None]:
    """Hold pyfuse3's one session for a block.

    Raises:
        StateError: this process has a mount already.
    """
    if not _session.acquire(blocking=False):
        raise StateError("this process has a mount already: serve all disks in one mount, or start another process")
    try:
        yield
    finally:
        _session.release()


class BaseMount(ABC):
    """A mounted file system."""

    def __init__(self, mountpoint: Path, exports: Exports, operations: DiskOperations) -> None:
        """Made by what also serves and ends it."""
        self.mountpoint = mountpoint
        self._exports = exports
        self._operations = operations
        self._serving = trio.CancelScope(shield=True)  # ends by `_stop`, also if the body is cancelled
        self._ended = trio.Event()
        self._failure: Exception | None = None
        self._n_invalidating = 0
        self._is_adopted = False

    async def invalidate(self, export: Export, *, attributes_only: bool = False) -> None:
        """Push out the kernel's dirty pages of an export, then drop its cached pages and attributes.

        To be called *before* the gate is closed: dirty pages are pushed out as guest writes. Only what the kernel
        knows of attributes is dropped with ``attributes_only``.

        Raises:
            DiskError: ETIMEDOUT, the kernel is still at it after `INVALIDATE_TIMEOUT_S` seconds; or its own errno.

        Cancellation: the kernel goes on by itself; a later call waits for it again.
        """
        if self._ended.is_set():
            return  # nothing is cached of what is not mounted
        try:
            with trio.fail_after(INVALIDATE_TIMEOUT_S):
                await self._notify_invalid(export.inode, attributes_only=attributes_only)
        except trio.TooSlowError as exc:
            what = f"disk '{export.name}': push out the pages that the kernel holds"
            raise DiskError(errno.ETIMEDOUT, what) from exc
        except OSError as exc:
            if exc.errno not in GONE:  # ENOENT: the kernel knows nothing of this inode
                what = f"disk '{export.name}': invalidate the kernel's pages"
                raise DiskError(exc.errno or errno.EIO, what) from exc

    @abstractmethod
    async def _notify_invalid(self, inode: int, *, attributes_only: bool) -> None:
        """Tell the kernel that an inode has changed, in a thread: it may wait for our own handlers.

        Cancellation: returns at once, the thread goes on and is counted in ``_n_invalidating``.
        """

    async def wait_unmounted(self) -> None:
        """Wait until the file system is served no longer; return at once if it has been unmounted already.

        Raises:
            FuseUnavailableError: pyfuse3's loop has failed.
        """
        await self._ended.wait()
        if self._failure is not None:
            raise FuseUnavailableError(
                f"serving {self.mountpoint} failed ({self._failure}); see the log, then start again"
            ) from self._failure

    def is_busy(self, export: Export | None = None) -> bool:
        """Tell whether a file of the mount, or of this export, is open.

        Of a mount that a predecessor made that is not known, and the answer is yes: what it opened may still be open.
        """
        if self._is_adopted:
            return True
        exports = self._exports if export is None else (export,)
        return any(self._operations.open_handles(one) for one in exports)

    @abstractmethod
    def count_requests(self) -> int:
        """Return how many reads and writes guests have made; cheap, and callable from any thread."""

    @abstractmethod
    def statistics(self) -> MountStatistics:
        """Return the counters as they are now."""

    async def _wait_ready(self) -> int:
        """Wait for the first answer; return the device number of the mount."""
        results: list[os.stat_result] = []
        with trio.move_on_after(START_TIMEOUT_S):
            results.append(await trio.to_thread.run_sync(os.stat, self.mountpoint, abandon_on_cancel=True))
        if not results:
            raise FuseUnavailableError(
                f"{self.mountpoint} was mounted, but answered nothing for {START_TIMEOUT_S:.0f} s; "
                "see the kernel's log (dmesg)"
            )
        return results[0].st_dev

    async def _push_out(self) -> None:
        """Push out what the kernel holds of the files that are open, where the gate lets it through."""
        if self._ended.is_set():
            return
        for export in self._exports:
            if export.disk is not None and export.disk.gate is Gate.OPEN and self.is_busy(export):
                try:
                    await self.invalidate(export)
                except DiskError as exc:
                    log.warning("stores through mmap may be lost at unmount", disk=export.name, error=str(exc))
