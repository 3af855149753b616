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

pyfuse3 keeps its session in module globals: one mount per process.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import subprocess
import threading
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pyfuse3
import structlog
import trio

from fusemig.disk.tracked import Gate
from fusemig.errors import DiskError, FuseUnavailableError, StateError
from fusemig.fuse.operations import DiskOperations
from fusemig.fuse.polling import polling_trio
from fusemig.fuse.tuning import raise_limits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fusemig.fuse.export import Export, Exports
    from fusemig.fuse.operations import MountStatistics

START_TIMEOUT_S: Final = 10.0
"""For the first request to be answered."""
INVALIDATE_TIMEOUT_S: Final = 5.0
"""For the kernel to push out what it holds of one file."""
STOP_TIMEOUT_S: Final = 10.0
"""For requests in progress, and then for the unmount."""

_FUSE_DEVICE = Path("/dev/fuse")
_FUSE_CONFIG = Path("/etc/fuse.conf")
_MNT_FORCE: Final = 1
_MNT_DETACH: Final = 2
_GONE: Final = frozenset({errno.ENOENT, errno.ENOTCONN, errno.ENODEV})

_session = threading.Lock()  # pyfuse3's own limit: its session is a module global

log = structlog.get_logger()


@dataclass(frozen=True)
class MountOptions:
    """How to mount."""

    allow_other: bool = False
    """Let other users in; without root it needs ``user_allow_other`` in /etc/fuse.conf."""
    max_tasks: int = 4096
    """Requests handled at a time; every parked write occupies one."""


class Mount:
    """A mounted file system; made by `open_mount`."""

    def __init__(self, mountpoint: Path, exports: Exports, operations: DiskOperations, nursery: trio.Nursery) -> None:
        """Made by `open_mount`, which also serves and ends it."""
        self.mountpoint = mountpoint
        self._exports = exports
        self._operations = operations
        self._nursery = nursery
        self._serving = trio.CancelScope(shield=True)  # ends by `_stop`, also if the body is cancelled
        self._ended = trio.Event()
        self._failure: Exception | None = None
        self._n_invalidating = 0
        self._is_stopping = False

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
        outcome: list[OSError | None] = []
        done = trio.Event()
        self._n_invalidating += 1
        self._nursery.start_soon(self._run_invalidation, export.inode, attributes_only, outcome, done)
        with trio.move_on_after(INVALIDATE_TIMEOUT_S):
            await done.wait()
        if not outcome:
            raise DiskError(errno.ETIMEDOUT, f"disk '{export.name}': push out the pages that the kernel holds")
        error = outcome[0]
        if error is not None and error.errno not in _GONE:  # ENOENT: the kernel knows nothing of this inode
            code = error.errno or errno.EIO
            raise DiskError(code, f"disk '{export.name}': invalidate the kernel's pages") from error

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

    async def wait_unmounted(self) -> None:
        """Wait until the file system is served no longer; return at once if it has been unmounted already.

        Raises:
            FuseUnavailableError: the loop that serves it has failed.
        """
        await self._ended.wait()
        if self._failure is not None:
            raise FuseUnavailableError(
                f"serving {self.mountpoint} failed ({self._failure}); see the log, then start again"
            ) from self._failure

    def is_busy(self, export: Export | None = None) -> bool:
        """Tell whether a file of the mount, or of this export, is open."""
        exports = self._exports if export is None else (export,)
        return any(self._operations.open_handles(one) for one in exports)

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

    async def _wait_ready(self) -> int:
        """Wait for the first answer; return the device number of the mount."""
        device: list[int] = []
        with trio.move_on_after(START_TIMEOUT_S):
            path = self.mountpoint
            result = await trio.to_thread.run_sync(os.stat, path, abandon_on_cancel=True)
            device.append(result.st_dev)
        if not device:
            raise FuseUnavailableError(
                f"{self.mountpoint} was mounted, but answered nothing for {START_TIMEOUT_S:.0f} s; "
                "see the kernel's log (dmesg)"
            )
        return device[0]

    async def _stop(self) -> None:
        """Push out, answer what is parked, end the loop; in the caller's shield."""
        self._is_stopping = True
        if not self._ended.is_set():
            for export in self._exports:
                if export.disk is not None and export.disk.gate is Gate.OPEN and self.is_busy(export):
                    try:
                        await self.invalidate(export)
                    except DiskError as exc:
                        log.warning("stores through mmap may be lost at unmount", disk=export.name, error=str(exc))
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
    if not _session.acquire(blocking=False):
        raise StateError("this process has a mount already: serve all disks in one mount, or start another process")
    try:
        mountpoint = Path(os.path.abspath(mountpoint))  # noqa: ASYNC240  (no link is followed, no file touched)
        await trio.to_thread.run_sync(_check, mountpoint, options)
        operations = DiskOperations(exports)
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
    finally:
        _session.release()


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


def _check(mountpoint: Path, options: MountOptions) -> None:
    """Raise `FuseUnavailableError`, with what to do, for every reason that can be told beforehand."""
    if "FUSE_URING_ENABLE" in os.environ:
        raise FuseUnavailableError(
            "FUSE_URING_ENABLE is set: libfuse would run its own threads, which pyfuse3 does not survive; unset it"
        )
    _check_device()
    is_root = os.geteuid() == 0
    if not is_root and shutil.which("fusermount3") is None:
        raise FuseUnavailableError("mounting without root needs fusermount3: install the package fuse3, or run as root")
    if options.allow_other and not is_root and not _is_allow_other_allowed():
        raise FuseUnavailableError(
            f"allow-other without root needs the line user_allow_other in {_FUSE_CONFIG}: add it, or run as root"
        )
    _check_mountpoint(mountpoint)


def _check_device() -> None:
    try:
        os.close(os.open(_FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError as exc:
        raise FuseUnavailableError(
            f"there is no {_FUSE_DEVICE}: load the module (modprobe fuse), "
            "or start the container with --device /dev/fuse"
        ) from exc
    except OSError as exc:
        raise FuseUnavailableError(
            f"cannot open {_FUSE_DEVICE}: {exc.strerror}; "
            "give this user access to it, or start the container with --device /dev/fuse"
        ) from exc


def _is_allow_other_allowed() -> bool:
    try:
        lines = _FUSE_CONFIG.read_text(errors="replace").splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)


def _check_mountpoint(mountpoint: Path) -> None:
    try:
        mode = mountpoint.stat().st_mode
    except OSError as exc:
        hint = {
            errno.ENOENT: f"create it (mkdir -p {mountpoint})",
            errno.ENOTCONN: f"a dead mount is left there: unmount it (fusermount3 -u -z {mountpoint})",
        }.get(exc.errno or 0, "check the path")
        raise FuseUnavailableError(f"cannot mount at {mountpoint}: {exc.strerror}; {hint}") from exc
    if not stat.S_ISDIR(mode):
        raise FuseUnavailableError(f"cannot mount at {mountpoint}: it is not a directory; name an empty directory")
    if os.path.ismount(mountpoint):
        raise FuseUnavailableError(
            f"cannot mount at {mountpoint}: something is mounted there already; unmount it, or name another directory"
        )
    with contextlib.suppress(PermissionError):  # not readable for us: the mount itself will tell
        if any(mountpoint.iterdir()):
            raise FuseUnavailableError(
                f"cannot mount at {mountpoint}: it is not empty, and the mount would hide what is in it; "
                "name an empty directory"
            )
