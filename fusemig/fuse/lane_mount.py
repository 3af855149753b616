"""DataLaneMount: the exports as a file system whose data requests are answered by a `DataLane`.

    kernel <──/dev/fuse──> lane threads ─────────── requests that they do not answer ───────────> pyfuse3
       ^                                              (a SOCK_SEQPACKET pair)                        │
       └──────────────────── link thread: edits the replies to INIT and OPEN <── replies ────────────┘

pyfuse3 is unmodified: it is given one end of the pair as ``/dev/fd/N``, which libfuse takes for a mounted /dev/fuse,
and its handlers are those of the other lane. What it cannot say is said by `MetadataLink`, in the replies.

Tasks and threads. One nursery task runs `pyfuse3.main`; the lane threads, their pools and the link thread are plain
threads. Nothing cancels the body: a file system that ends by itself is told through `wait_unmounted`.

The end, whatever the body did, shielded and timed:

1. Stores through ``mmap`` that the kernel still holds are pushed out, for disks whose gate is open.
2. Held writes are answered EIO: their guests are told that they were not made.
3. The file system is unmounted, which ends the lane threads; lazily if files are open. Then the threads are still
   asleep in the kernel, so each is sent one last request (`_nudge`).
4. Requests in the pools are finished and answered. pyfuse3 ends; the link thread ends with it.
5. The descriptor is closed: guests that still have files open get ENOTCONN. Where a thread still uses its number,
   because a store does not answer, /dev/null takes the number over.

A mount that outlives its daemon (docs/resilience.md): its descriptor and its INIT request are kept elsewhere
(`fusemig.succession`), and an end that nobody asked for unmounts nothing. A successor *adopts* the mount: pyfuse3 is
given the INIT request again, its reply goes to nobody, because the kernel has one, and the kernel is asked to send
again what nobody has answered. Requests that come so may have been carried out. That is harmless for every one of ours:
they set what they say, whatever was before, and none was acknowledged. What a predecessor's guests have opened or
cached is not known, and they may have opened and cached all of it (`BaseMount.is_busy`).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pyfuse3
import structlog
import trio

from fusemig import failpoint
from fusemig.errors import FuseUnavailableError
from fusemig.fuse import abi, device
from fusemig.fuse.base import START_TIMEOUT_S, STOP_TIMEOUT_S, BaseMount, only_session
from fusemig.fuse.lane_service import LaneService
from fusemig.fuse.link import MAX_BACKGROUND
from fusemig.fuse.operations import DiskOperations, MountStatistics
from fusemig.fuse.preflight import MountOptions, check_mountable
from fusemig.fuse.tuning import raise_limits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fusemig.fuse.export import Exports
    from fusemig.succession.mount import KeptMount

NUDGE_TIMEOUT_S: Final = 0.1
"""After which a request that woke no lane thread, because a guest's own request did, is followed by another."""

log = structlog.get_logger()


class DataLaneMount(BaseMount):
    """A file system served by a data lane; made by `open_data_lane_mount`."""

    def __init__(
        self,
        mountpoint: Path,
        exports: Exports,
        service: LaneService,
        *,
        write_back: bool,
        kept: KeptMount | None = None,
    ) -> None:
        """Made by `open_data_lane_mount`, which also serves and ends it."""
        super().__init__(mountpoint, exports, DiskOperations(exports, write_back=write_back))
        self._service = service
        self._device, self._link = service.device, service.link
        self.lane = service.lane
        """Answers what guests do; keeps counters of its own."""
        self._kept = kept
        self._is_adopted = service.is_adopted
        self._token = trio.lowlevel.current_trio_token()
        self._metadata_ended = trio.Event()

    def _lane_ended(self) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._ended.set)

    async def _notify_invalid(self, inode: int, *, attributes_only: bool) -> None:
        offset = -1 if attributes_only else 0
        await trio.to_thread.run_sync(self._invalidate, inode, offset, abandon_on_cancel=True)

    def _invalidate(self, inode: int, offset: int) -> None:
        self._n_invalidating += 1  # only ever seen as zero or not, after the last call
        try:
            os.write(self._device, abi.invalidate_inode(inode, offset))
        finally:
            self._n_invalidating -= 1

    @property
    def started_s(self) -> float:
        """When requests about data were first taken (`time.monotonic`)."""
        return self._service.started_s

    def count_requests(self) -> int:
        """Return how many reads and writes guests have made; cheap, and callable from any thread."""
        return self.lane.count_requests()

    def leave(self, timeout_s: float) -> bool:
        """Take no more requests, for a successor (`DataLane.leave`); the process ends soon, and not the mount."""
        return self.lane.leave(timeout_s)

    def statistics(self) -> MountStatistics:
        """Return the counters as they are now."""
        lane, metadata = self.lane.statistics(), self._operations.statistics()
        return MountStatistics(
            reads=lane.requests.get("read", 0),
            read_bytes=lane.read_bytes,
            writes=lane.requests.get("write", 0),
            written_bytes=lane.written_bytes,
            flushes=lane.requests.get("fsync", 0),
            parked_total=lane.held,
            thread_requests=lane.handed_over,
            handler_errors=lane.bugs + metadata.handler_errors,
            open_handles=metadata.open_handles,
        )

    async def _serve_metadata(self) -> None:
        """Run pyfuse3's loop until it ends; its failure is kept for `wait_unmounted`."""
        try:
            with self._serving:
                await pyfuse3.main()
        except Exception as exc:
            self._failure = exc
            self._ended.set()
            log.exception("the file system's metadata is served no longer", mountpoint=str(self.mountpoint))
        finally:
            self._metadata_ended.set()

    def _start(self) -> None:
        """Give pyfuse3 its end of the link, and let the requests come if they do not already."""
        try:
            pyfuse3.init(self._operations, self._link.start(), set())
            if not self._service.started_s:
                self._service.start()
        except BaseException:
            self._link.close(STOP_TIMEOUT_S)
            raise
        self._service.when_ended(self._lane_ended)

    async def _wait_served(self) -> int | None:
        """Wait until requests are answered; return the device number of the mount, None if it is mounted nowhere."""
        if self._kept is None or not self._is_adopted or not self._kept.init_request:
            return await self._wait_ready()
        # Not by a request of ours: until somebody answers it, this process could not even be killed.
        if not await trio.to_thread.run_sync(self._link.has_init.wait, START_TIMEOUT_S, abandon_on_cancel=True):
            raise FuseUnavailableError(f"pyfuse3 did not take the mount at {self.mountpoint} over; see the log")
        return device.mounted_at(self.mountpoint)

    async def _stop(self, device_number: int | None) -> None:
        """End everything, in the caller's shield; see the steps at the top."""
        await self._push_out()
        self.lane.refuse_held()
        is_clean = False
        with trio.move_on_after(2 * STOP_TIMEOUT_S):
            is_clean = await trio.to_thread.run_sync(self._stop_threads, device_number, abandon_on_cancel=True)
        if not self._metadata_ended.is_set():
            pyfuse3.terminate()
        with trio.move_on_after(STOP_TIMEOUT_S):
            await self._metadata_ended.wait()
        self._serving.cancel()
        await self._metadata_ended.wait()
        pyfuse3.close(unmount=False)
        await trio.to_thread.run_sync(self._link.close, STOP_TIMEOUT_S)
        if self._kept is not None:
            self._kept.forget()  # until now who keeps it would have unmounted in our place
        if is_clean and not self._n_invalidating:
            os.close(self._device)
        else:
            log.error("a store does not answer: ending the mount without it", mountpoint=str(self.mountpoint))
            self.lane.abandon()
            device.replace_by_null(self._device)

    def _stop_threads(self, device_number: int | None) -> bool:
        """Unmount and wait for the lane; False if something still uses the descriptor."""
        if device_number is None and self._is_adopted:
            self.lane.stop()  # it was unmounted lazily, and what may be at its place now is not ours
        elif device_number is None or device.is_mounted(device_number):
            self._unmount()
        return self.lane.join(STOP_TIMEOUT_S)

    def _unmount(self) -> None:
        if device.unmount(self.mountpoint):
            return
        root = -1
        with contextlib.suppress(OSError):
            root = os.open(self.mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not device.unmount(self.mountpoint, lazily=True):
                log.error("cannot unmount; unmount by hand: fusermount3 -u -z", mountpoint=str(self.mountpoint))
            self.lane.stop()
            if root >= 0:
                self._nudge(root)
        finally:
            if root >= 0:
                os.close(root)

    def _nudge(self, root: int) -> None:
        """Wake the lane threads, which sleep in a read, by a request each; a stopping lane answers it ENOTCONN.

        A request that finds no lane any more waits until the descriptor is closed, so each has a thread of its own.
        """
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while (n_alive := self.lane.n_alive) and time.monotonic() < deadline:
            threading.Thread(target=_ask, args=(root,), name="lane-nudge", daemon=True).start()
            patience = time.monotonic() + NUDGE_TIMEOUT_S
            while self.lane.n_alive == n_alive and time.monotonic() < patience:
                time.sleep(0.0005)


def _started(
    mountpoint: Path, exports: Exports, service: LaneService, kept: KeptMount | None, *, write_back: bool
) -> DataLaneMount:
    try:
        mount = DataLaneMount(mountpoint, exports, service, write_back=write_back, kept=kept)
        mount._start()  # noqa: SLF001
    except BaseException as exc:
        if kept is not None:
            if kept.device is not None:
                kept.leave(exc)
            kept.forget()
        os.close(service.device)  # first: nobody is there to answer what an unmount might ask
        device.unmount(mountpoint, lazily=True)
        if isinstance(exc, RuntimeError):
            raise FuseUnavailableError(
                f"cannot serve {mountpoint}: {exc} (libfuse has written the reason to stderr); libfuse 3.3 or later is "
                "needed for the data lane"
            ) from exc
        raise
    return mount


def _ask(root: int) -> None:
    with contextlib.suppress(OSError):
        os.fstatvfs(root)


@asynccontextmanager
async def open_data_lane_mount(
    mountpoint: Path,
    exports: Exports,
    options: MountOptions | None = None,
    *,
    n_threads: int | None = None,
    kept: KeptMount | None = None,
    service: LaneService | None = None,
) -> AsyncIterator[DataLaneMount]:
    """Mount ``exports`` at ``mountpoint`` and serve them while the body runs, their data by lane threads.

    The body starts when the file system has answered its first request. With ``kept`` the mount outlives this process
    where that can be; one that a predecessor left there is adopted, and is not mounted. A ``service``
    that serves that one already is taken over.

    Raises:
        FuseUnavailableError: it cannot be mounted here, with the cause and what to do about it.
        StateError: this process has a mount already.

    Resource handling: no mount is left behind, also if the body raises or is cancelled. Nothing below is closed: the
    disks are their owner's. But what outlives this process is left to the successor, and an error of the body's ends
    the process at once (`KeptMount.leave`).
    """
    options = MountOptions() if options is None else options
    with only_session():
        mountpoint = Path(os.path.abspath(mountpoint))  # noqa: ASYNC240  (no link is followed, no file touched)
        if kept is not None and kept.device is not None:
            device_fd = kept.device
        else:
            await trio.to_thread.run_sync(check_mountable, mountpoint, options)
            device_fd = await trio.to_thread.run_sync(device.mount_device, mountpoint, options)
            if kept is not None:
                kept.keep_device(device_fd)
            failpoint.reach("after-mount")
        if service is None:
            service = LaneService(device_fd, exports, n_threads, kept)
        mount = _started(mountpoint, exports, service, kept, write_back=options.write_back)
        error: BaseException | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mount._serve_metadata)  # noqa: SLF001
            device_number = None
            is_left = kept is not None and kept.device is not None
            try:
                device_number = await mount._wait_served()  # noqa: SLF001
                if kept is not None:
                    kept.check()
                if device_number is not None:
                    await trio.to_thread.run_sync(raise_limits, device_number, MAX_BACKGROUND)
                is_left = True
                yield mount
            except BaseException as exc:
                if kept is not None and is_left:
                    kept.leave(exc)
                error = exc
            with trio.CancelScope(shield=True):
                await mount._stop(device_number)  # noqa: SLF001
        if error is not None:
            raise error
