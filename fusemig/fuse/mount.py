"""Mount: the exports as a FUSE file system, for the time of an ``async with`` block.

Tasks. `open_mount` has one nursery, with the task that runs `pyfuse3.main` and one task per running `invalidate`.
The body runs beside them and is never cancelled by them: a file system that ends by itself, because somebody unmounted
it, is told through `Mount.wait_unmounted`.

The end, whatever the body did, shielded and timed:

1. Stores through ``mmap`` that the kernel still holds are pushed out, for disks whose gate is open.
2. Parked writes are answered EIO. A parked write is never lost in silence: either the gate has changed before the
   mount ends, and it was made, or its guest is told that it was not. Who wants none to fail thaws the disks, or gives
   them up, and asks `is_busy`, before leaving the block.
3. The loop ends after the requests in progress; those that outlive the deadline are cancelled.
4. The session is closed: the file system is unmounted lazily, and guests that still have files open get ENOTCONN.

An invalidation is a write to the kernel that may wait for the guest's dirty pages, hence for our own handlers: it runs
in a thread, and only while the loop serves. The session must not be destroyed under it, so a mount whose invalidation
cannot be ended is unmounted, but its session is left to the end of the process.
"""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pyfuse3
import structlog
import trio

from fusemig.errors import FuseUnavailableError
from fusemig.fuse.base import STOP_TIMEOUT_S, BaseMount, only_session
from fusemig.fuse.operations import DiskOperations
from fusemig.fuse.polling import polling_trio
from fusemig.fuse.preflight import MountOptions, check_mountable
from fusemig.fuse.tuning import raise_limits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fusemig.fuse.export import Exports
    from fusemig.fuse.operations import MountStatistics

_MNT_FORCE: Final = 1
_MNT_DETACH: Final = 2

log = structlog.get_logger()


class Mount(BaseMount):
    """A file system served by pyfuse3; made by `open_mount`."""

    def __init__(self, mountpoint: Path, exports: Exports, operations: DiskOperations, nursery: trio.Nursery) -> None:
        """Made by `open_mount`, which also serves and ends it."""
        super().__init__(mountpoint, exports, operations)
        self._nursery = nursery
        self._is_stopping = False

    async def _notify_invalid(self, inode: int, *, attributes_only: bool) -> None:
        outcome: list[OSError | None] = []
        done = trio.Event()
        self._n_invalidating += 1
        self._nursery.start_soon(self._run_invalidation, inode, attributes_only, outcome, done)
        await done.wait()
        if outcome[0] is not None:
            raise outcome[0]

    async def _run_invalidation(
        self, inode: int, attributes_only: bool, outcome: list[OSError | None], done: trio.Event
    ) -> None:
        try:
            with trio.CancelScope(shield=True):  # the thread uses the session, so the nursery waits for it
                await trio.to_thread.run_sync(pyfuse3.invalidate_inode, inode, attributes_only)
        except OSError as exc:
            outcome.append(exc)
        else:
            outcome.append(None)
        finally:
            self._n_invalidating -= 1
            done.set()

    def count_requests(self) -> int:
        """Return how many reads and writes guests have made; cheap, and callable from any thread."""
        return self._operations.count_requests()

    def statistics(self) -> MountStatistics:
        """Return the counters as they are now."""
        return self._operations.statistics()

    async def _serve(self, max_tasks: int) -> None:
        """Run pyfuse3's loop until it ends; its failure is kept for `wait_unmounted`."""
        try:
            with self._serving:
                await pyfuse3.main(max_tasks=max_tasks)
        except Exception as exc:
            self._failure = exc
            log.exception("the file system is served no longer", mountpoint=str(self.mountpoint))
        finally:
            self._ended.set()
            if not self._is_stopping:
                log.info("the file system was unmounted from outside", mountpoint=str(self.mountpoint))

    async def _stop(self) -> None:
        """Push out, answer what is parked, end the loop; in the caller's shield."""
        self._is_stopping = True
        await self._push_out()
        self._operations.refuse_parked()
        if not self._ended.is_set():
            pyfuse3.terminate()
        with trio.move_on_after(STOP_TIMEOUT_S):
            await self._ended.wait()
        self._serving.cancel()
        if self._n_invalidating:
            log.warning("aborting the connection: the kernel does not finish an invalidation")
            await trio.to_thread.run_sync(_abort, self.mountpoint, abandon_on_cancel=True)


@asynccontextmanager
async def open_mount(mountpoint: Path, exports: Exports, options: MountOptions | None = None) -> AsyncIterator[Mount]:
    """Mount ``exports`` at ``mountpoint`` and serve them while the body runs.

    The body starts when the file system has answered its first request.

    Raises:
        FuseUnavailableError: it cannot be mounted here, with the cause and what to do about it.
        StateError: this process has a mount already.

    Resource handling: no mount is left behind, also if the body raises or is cancelled. Nothing below is closed: the
    disks are their owner's.
    """
    options = MountOptions() if options is None else options
    with only_session():
        mountpoint = Path(os.path.abspath(mountpoint))  # noqa: ASYNC240  (no link is followed, no file touched)
        await trio.to_thread.run_sync(check_mountable, mountpoint, options)
        operations = DiskOperations(exports, write_back=options.write_back)
        _mount(operations, mountpoint, options)
        error: BaseException | None = None
        try:
            with polling_trio() as is_polling:
                if not is_polling:
                    log.info("this pyfuse3 does not wait through trio as expected: serving without the faster wait")
                async with trio.open_nursery() as nursery:
                    mount = Mount(mountpoint, exports, operations, nursery)
                    nursery.start_soon(mount._serve, options.max_tasks)  # noqa: SLF001
                    try:
                        device = await mount._wait_ready()  # noqa: SLF001
                        await trio.to_thread.run_sync(raise_limits, device, options.max_tasks)
                        yield mount
                    except BaseException as exc:
                        error = exc
                    with trio.CancelScope(shield=True):
                        await mount._stop()  # noqa: SLF001
        finally:
            with trio.CancelScope(shield=True):
                await _close(mountpoint)
        if error is not None:
            raise error


def _mount(operations: DiskOperations, mountpoint: Path, options: MountOptions) -> None:
    fuse_options = set(pyfuse3.default_options) | {"fsname=fusemig", "subtype=fusemig", "default_permissions"}
    if options.allow_other:
        fuse_options.add("allow_other")
    try:
        pyfuse3.init(operations, str(mountpoint), fuse_options)
    except RuntimeError as exc:
        if "mount" in str(exc):  # there is a session to destroy only if it was the mount that failed
            pyfuse3.close(unmount=False)
        raise FuseUnavailableError(
            f"cannot mount at {mountpoint}: {exc} (libfuse has written the reason to stderr); "
            "in a container, add --device /dev/fuse --cap-add SYS_ADMIN"
        ) from exc


async def _close(mountpoint: Path) -> None:
    """Unmount and destroy the session."""
    with trio.move_on_after(STOP_TIMEOUT_S) as deadline:
        await trio.to_thread.run_sync(pyfuse3.close, abandon_on_cancel=True)
    if deadline.cancelled_caught:
        log.error("the unmount hangs; unmount by hand: fusermount3 -u -z", mountpoint=str(mountpoint))


def _abort(mountpoint: Path) -> None:
    """Have the kernel end the connection: whatever waits in it gets ECONNABORTED."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(mountpoint), _MNT_FORCE | _MNT_DETACH) and ctypes.get_errno() == errno.EPERM:
        subprocess.run(["fusermount3", "-u", "-q", "-z", str(mountpoint)], check=False, timeout=STOP_TIMEOUT_S)
