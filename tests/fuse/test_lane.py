"""The data lane under real mounts.

Every file call goes through a thread or a process: one made on the event loop would wait for itself. A call that may
stay unanswered when a test fails is made by a process, which can be killed; a thread of ours cannot.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import pyfuse3
import pytest
import trio

from fusemig.core.units import CHUNK_SIZE
from fusemig.disk.memory import MemoryDisk
from fusemig.disk.tracked import Gate, TrackedDisk
from fusemig.errors import DiskError, FuseUnavailableError, StateError
from fusemig.fuse import abi, base
from fusemig.fuse.export import Exports
from fusemig.fuse.lane_mount import open_data_lane_mount
from fusemig.fuse.link import edited_init
from fusemig.fuse.pool import FLUSH_THREADS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from fusemig.disk.base import Disk

pytestmark = pytest.mark.fuse

_T = TypeVar("_T")
SIZE = 4 * CHUNK_SIZE
DEADLINE_S = 15.0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


async def in_thread(call: Callable[..., _T], *args: object) -> _T:
    """Make a call that may wait for the mount."""
    with trio.fail_after(DEADLINE_S):
        return await trio.to_thread.run_sync(call, *args, abandon_on_cancel=True)


async def errno_of(call: Callable[..., object], *args: object) -> int | None:
    """Return the errno that a call failed with, None if it did not."""
    try:
        await in_thread(call, *args)
    except OSError as exc:
        return exc.errno
    return None


async def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for something that no event tells."""
    with trio.fail_after(DEADLINE_S):
        while not condition():
            await trio.sleep(0.002)


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    """Open a file for a block."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def write_at(path: Path, data: bytes, offset: int, flags: int = os.O_RDWR, how: int = 0) -> int:
    """Write through a handle of its own, from aligned memory."""
    with opened(path, flags) as fd, mmap.mmap(-1, len(data)) as page:
        page[:] = data
        return os.pwritev(fd, [page], offset, how)


def read_at(path: Path, length: int, offset: int) -> bytes:
    """Read through a handle of its own."""
    with opened(path, os.O_RDONLY) as fd:
        return os.pread(fd, length, offset)


def is_mounted(path: Path) -> bool:
    """Tell whether something is mounted there."""
    return os.path.ismount(path)


def read_direct(path: Path, length: int, offset: int) -> bytes:
    """Read with O_DIRECT: a buffered open waits in the kernel for the direct writes that are under way."""
    with opened(path, os.O_RDONLY | os.O_DIRECT) as fd, mmap.mmap(-1, length) as page:
        return page[: os.preadv(fd, [page], offset)]


def fsync(path: Path) -> None:
    """Call fsync through a handle of its own."""
    with opened(path) as fd:
        os.fsync(fd)


def seek(path: Path, offset: int, whence: int) -> int:
    """Seek through a handle of its own."""
    with opened(path, os.O_RDONLY) as fd:
        return os.lseek(fd, offset, whence)


def fallocate(path: Path, mode: int, offset: int, length: int) -> None:
    """Call fallocate through a handle of its own."""
    with opened(path) as fd:
        if _libc.fallocate(fd, mode, offset, length):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))


def serving(*images: Disk, read_only: bool = False) -> tuple[Exports, list[TrackedDisk]]:
    """Export each image under its name."""
    exports, disks = Exports(), [TrackedDisk(image) for image in images]
    for disk in disks:
        exports.add(disk.name, disk, read_only=read_only)
    return exports, disks


_CLIENT = """
import os, signal, sys, time
fd = os.open(sys.argv[1], os.O_RDWR)
signal.signal(signal.SIGUSR1, lambda *_: None)
print("open", flush=True)
exec(sys.argv[2])
print("done", flush=True)
sys.stdin.read()
"""


@asynccontextmanager
async def client(path: Path, code: str) -> AsyncIterator[subprocess.Popen[bytes]]:
    """Run code on an open file ``fd`` in a process that ends with the block; it has said "open" and no more."""
    command = [sys.executable, "-c", _CLIENT, str(path), code]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    process = await in_thread(start)
    assert process.stdout is not None
    try:
        assert await in_thread(process.stdout.readline) == b"open\n"
        yield process
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await in_thread(process.communicate)


async def line_of(process: subprocess.Popen[bytes]) -> bytes:
    """Return the next line of a client."""
    assert process.stdout is not None
    return (await in_thread(process.stdout.readline)).strip()


class SleepyDisk(MemoryDisk):
    """A disk whose flushes, or cold reads, wait until told."""

    def __init__(self, name: str) -> None:
        """Start awake."""
        super().__init__(name, SIZE)
        self.awake = threading.Event()
        self.awake.set()
        self.is_cold = False
        self.n_asleep = 0

    def _sleep(self) -> None:
        self.n_asleep += 1
        assert self.awake.wait(DEADLINE_S)
        self.n_asleep -= 1

    def flush(self) -> None:
        """Wait."""
        self._sleep()
        super().flush()

    def pread_nowait(self, buffer: memoryview, offset: int) -> bool:
        """Refuse while cold."""
        return not self.is_cold and super().pread_nowait(buffer, offset)

    def pwrite_may_sleep(self, offset: int, length: int) -> bool:
        """Warn while cold."""
        return self.is_cold

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Wait while cold."""
        if self.is_cold:
            self._sleep()
        super().pread_into(buffer, offset)


class BuggyDisk(MemoryDisk):
    """A disk that fails in ways no disk should."""

    def pread_nowait(self, buffer: memoryview, offset: int) -> bool:
        """Raise what is neither DiskError nor OSError."""
        raise ZeroDivisionError

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Raise what a disk may raise."""
        raise DiskError(errno.ENOSPC, "full", offset, len(data))

    def flush(self) -> None:
        """Raise in a pool's thread."""
        raise KeyError


# Durability


@pytest.mark.parametrize("flag", [os.O_DSYNC, os.O_SYNC])
@pytest.mark.parametrize("direct", [0, os.O_DIRECT])
async def test_synchronous_opens_flush_before_the_write_returns(mountpoint: Path, flag: int, direct: int) -> None:
    """I2, also where the kernel sends no FSYNC: for a file that is open with O_DIRECT."""
    exports, disks = serving(image := MemoryDisk("disk", SIZE))
    async with open_data_lane_mount(mountpoint, exports) as mount:
        assert await in_thread(write_at, mountpoint / "disk", b"x" * 4096, 0, os.O_RDWR | flag | direct) == 4096
        assert image.n_flushes >= 1
        assert image.content[:4096] == b"x" * 4096
        if direct:
            assert "fsync" not in mount.lane.statistics().requests  # so it was the lane that flushed
    assert disks[0].bytes_written == 4096


async def test_one_rwf_dsync_write_of_a_direct_handle_flushes(mountpoint: Path) -> None:
    """The flags of the one write count, not those of the open."""
    exports, _ = serving(image := MemoryDisk("disk", SIZE))
    async with open_data_lane_mount(mountpoint, exports):
        await in_thread(write_at, mountpoint / "disk", b"x" * 4096, 0, os.O_RDWR | os.O_DIRECT)
        assert image.n_flushes == 0
        await in_thread(write_at, mountpoint / "disk", b"x" * 4096, 0, os.O_RDWR | os.O_DIRECT, os.RWF_DSYNC)
        assert image.n_flushes == 1


async def test_a_slow_flush_holds_nothing_else_up(mountpoint: Path, nursery: trio.Nursery) -> None:
    """Reads, writes and metadata go on under more sleeping flushes than there are threads for them.

    (The flushes are those of synchronous writes: the kernel sends one FSYNC of an inode at a time.)
    """
    exports, _ = serving(image := SleepyDisk("disk"))
    image.awake.clear()
    path, direct = mountpoint / "disk", os.O_RDWR | os.O_DIRECT
    async with open_data_lane_mount(mountpoint, exports, n_threads=1):
        for number in range(FLUSH_THREADS + 2):
            nursery.start_soon(in_thread, write_at, path, b"s" * 512, 512 * number, direct | os.O_DSYNC)
        await wait_until(lambda: image.n_asleep == FLUSH_THREADS)
        assert await in_thread(write_at, path, b"meanwhile" + bytes(503), 8192, direct) == 512
        assert (await in_thread(read_direct, path, 512, 8192)).startswith(b"meanwhile")
        assert image.n_flushes == 0
        image.awake.set()
        await wait_until(lambda: image.n_flushes == FLUSH_THREADS + 2)


async def test_cold_reads_hold_nothing_else_up(mountpoint: Path, nursery: trio.Nursery) -> None:
    """A disk whose reads sleep takes threads of its own only; what slept is answered rightly."""
    exports, _ = serving(cold := SleepyDisk("cold"), MemoryDisk("warm", SIZE))
    cold.content[:4] = b"cold"
    cold.is_cold = True
    cold.awake.clear()
    results: list[bytes] = []
    far = SIZE - 4096  # beyond what the kernel reads ahead, whose pages a write would wait for

    async def read_cold() -> None:
        results.append(await in_thread(read_at, mountpoint / "cold", 4, 0))

    async with open_data_lane_mount(mountpoint, exports, n_threads=1) as mount:
        handle = await in_thread(os.open, mountpoint / "cold", os.O_RDWR)  # an open would wait for the pages being read
        for _ in range(3):
            nursery.start_soon(read_cold)
        await wait_until(lambda: cold.n_asleep > 0)
        assert await in_thread(write_at, mountpoint / "warm", b"x", 0) == 1
        assert await in_thread(os.pwrite, handle, b"y" * 4096, far) == 4096
        cold.awake.set()
        await wait_until(lambda: results == [b"cold"] * 3)
        assert mount.lane.statistics().handed_over > 0
        await in_thread(os.close, handle)
    assert cold.content[far : far + 4096] == b"y" * 4096


# The gate


async def test_held_write_is_made_when_the_gate_opens(mountpoint: Path) -> None:
    """No thread waits: the other disk is served by the one lane thread, and a second closing holds the write again."""
    exports, (disk, _) = serving(image := MemoryDisk("disk", SIZE), MemoryDisk("other", SIZE))
    async with open_data_lane_mount(mountpoint, exports, n_threads=1) as mount:
        disk.set_gate(Gate.CLOSED)
        async with client(mountpoint / "disk", "os.pwrite(fd, b'held', 4094)") as process:
            await wait_until(lambda: disk.parked_writes == 1)
            assert await in_thread(write_at, mountpoint / "other", b"x", 0) == 1
            assert image.content[4094:4098] == bytes(4)
            disk.set_gate(Gate.OPEN)
            assert await line_of(process) == b"done"
            assert image.content[4094:4098] == b"held"
        assert mount.lane.statistics().held == 1
    assert disk.bytes_written == 4


async def test_held_changes_are_refused_when_the_disk_is_given_up(mountpoint: Path) -> None:
    """After a hand-off a held write and a held discard are answered EROFS, and nothing is written."""
    exports, (disk,) = serving(image := MemoryDisk("disk", SIZE))
    image.content[:] = b"a" * SIZE
    code = "try: os.pwrite(fd, b'b' * 10, 0)\nexcept OSError as exc: print(exc.errno, flush=True)"
    results: list[int | None] = []
    async with open_data_lane_mount(mountpoint, exports), client(mountpoint / "disk", "") as keeper:
        assert await line_of(keeper) == b"done"
        disk.set_gate(Gate.CLOSED)
        async with client(mountpoint / "disk", code) as process, trio.open_nursery() as nursery:

            async def discard() -> None:
                results.append(await errno_of(fallocate, mountpoint / "disk", 3, 0, 4096))

            await wait_until(lambda: disk.parked_writes == 1)
            nursery.start_soon(discard)
            await trio.sleep(0.05)  # behind the write's inode lock in the kernel, or held: either is fine
            disk.set_gate(Gate.READ_ONLY)
            assert await line_of(process) == str(errno.EROFS).encode()
    assert results == [errno.EROFS]
    assert image.content == b"a" * SIZE


async def test_a_killed_client_dies_while_its_write_is_held(mountpoint: Path) -> None:
    """FUSE_INTERRUPT: it is answered EINTR, and its write is not made when the gate opens."""
    exports, (disk,) = serving(image := MemoryDisk("disk", SIZE))
    async with open_data_lane_mount(mountpoint, exports) as mount:
        disk.set_gate(Gate.CLOSED)
        async with client(mountpoint / "disk", "os.pwrite(fd, b'late', 0)") as process:
            await wait_until(lambda: disk.parked_writes == 1)
            process.send_signal(signal.SIGKILL)
            await in_thread(process.wait)
        assert mount.lane.statistics().interrupted == 1
        assert disk.parked_writes == 0  # its place is free for another write
        disk.set_gate(Gate.OPEN)
        assert await in_thread(read_at, mountpoint / "disk", 4, 0) == bytes(4)
    assert image.content == bytes(SIZE)


async def test_a_signal_that_does_not_kill_does_not_disturb_a_held_write(mountpoint: Path) -> None:
    """A disk's write is not interruptible: the guest sees neither EINTR nor a lost write."""
    exports, (disk,) = serving(image := MemoryDisk("disk", SIZE))
    async with open_data_lane_mount(mountpoint, exports) as mount:
        disk.set_gate(Gate.CLOSED)
        async with client(mountpoint / "disk", "os.pwrite(fd, b'kept', 0)") as process:
            await wait_until(lambda: disk.parked_writes == 1)
            process.send_signal(signal.SIGUSR1)
            await wait_until(lambda: mount.lane.statistics().requests.get("interrupt", 0) == 1)
            disk.set_gate(Gate.OPEN)
            assert await line_of(process) == b"done"
        assert mount.lane.statistics().interrupted == 0
    assert image.content[:4] == b"kept"


# What a disk answers


async def test_the_end_of_the_disk_is_that_of_a_block_device(mountpoint: Path) -> None:
    """Reads end at the end; writes are cut there, and ENOSPC behind it."""
    exports, _ = serving(image := MemoryDisk("disk", 4608))
    path = mountpoint / "disk"
    async with open_data_lane_mount(mountpoint, exports):
        assert await in_thread(read_at, path, 8192, 4096) == bytes(512)
        assert await in_thread(read_at, path, 10, 4608) == b""
        assert await errno_of(write_at, path, b"x" * 512, 4608, os.O_RDWR | os.O_DIRECT) == errno.ENOSPC
        assert await in_thread(write_at, path, b"x" * 1024, 4096, os.O_RDWR | os.O_DIRECT) == 512
        assert (await in_thread(os.stat, path)).st_size == 4608
    assert image.content[4096:] == b"x" * 512


async def test_zeroing_and_seeking(mountpoint: Path) -> None:
    """A fallocate makes zeros and marks them dirty; lseek tells data from holes."""
    exports, (disk,) = serving(image := MemoryDisk("disk", SIZE))
    path = mountpoint / "disk"
    image.content[:] = b"a" * SIZE
    tracking = disk.start_tracking()
    async with open_data_lane_mount(mountpoint, exports):
        await in_thread(fallocate, path, abi.FALLOC_PUNCH_HOLE | abi.FALLOC_KEEP_SIZE, 0, CHUNK_SIZE)
        assert tracking.dirty_bytes == CHUNK_SIZE
        await in_thread(fallocate, path, abi.FALLOC_ZERO_RANGE, CHUNK_SIZE, 4096)
        await in_thread(fallocate, path, abi.FALLOC_ZERO_RANGE | abi.FALLOC_KEEP_SIZE, SIZE - 4096, 1 << 30)
        assert await errno_of(fallocate, path, abi.FALLOC_ZERO_RANGE, SIZE - 4096, 8192) == errno.ENOSPC
        for mode in (0, abi.FALLOC_KEEP_SIZE, 0x08, 0x20):  # allocate, collapse, insert
            assert await errno_of(fallocate, path, mode, 0, 4096) == errno.EOPNOTSUPP
        zeroed = CHUNK_SIZE + 4096
        assert await in_thread(seek, path, 0, os.SEEK_DATA) == zeroed
        assert await in_thread(seek, path, zeroed, os.SEEK_HOLE) == SIZE - 4096
        assert await errno_of(seek, path, SIZE - 4096, os.SEEK_DATA) == errno.ENXIO
        assert await errno_of(seek, path, SIZE, os.SEEK_HOLE) == errno.ENXIO
        assert (await in_thread(os.stat, path)).st_size == SIZE
    assert image.content == bytes(zeroed) + b"a" * (SIZE - zeroed - 4096) + bytes(4096)
    assert tracking.dirty_bytes == zeroed + 4096


async def test_read_only_and_unknown_disks(mountpoint: Path) -> None:
    """EROFS where nothing may be written, by open or by write; an export without a disk is empty."""
    exports, (disk,) = serving(MemoryDisk("disk", SIZE))
    exports.add("fixed", TrackedDisk(MemoryDisk("fixed", SIZE)), read_only=True)
    exports.add("incoming", None)
    disk.set_gate(Gate.READ_ONLY)
    async with open_data_lane_mount(mountpoint, exports):
        assert await errno_of(write_at, mountpoint / "disk", b"x", 0) == errno.EROFS
        assert await errno_of(fallocate, mountpoint / "disk", 3, 0, 4096) == errno.EROFS
        assert await errno_of(write_at, mountpoint / "fixed", b"x", 0) == errno.EROFS
        assert await errno_of(write_at, mountpoint / "incoming", b"x", 0) == errno.EROFS
        assert await in_thread(read_at, mountpoint / "fixed", 4, 0) == bytes(4)
        assert await in_thread(read_at, mountpoint / "incoming", 4, 0) == b""
        await in_thread(fsync, mountpoint / "incoming")
        assert await errno_of(os.unlink, mountpoint / "disk") == errno.EPERM


async def test_errors_and_bugs_are_answered_and_the_lane_survives(mountpoint: Path) -> None:
    """A disk's errno reaches the guest; any other exception is EIO and counted; the one thread goes on."""
    exports, _ = serving(BuggyDisk("buggy", SIZE), MemoryDisk("fine", SIZE))
    async with open_data_lane_mount(mountpoint, exports, n_threads=1) as mount:
        assert await errno_of(read_at, mountpoint / "buggy", 4, 0) == errno.EIO
        assert await errno_of(fsync, mountpoint / "buggy") == errno.EIO
        assert await errno_of(write_at, mountpoint / "buggy", b"x" * 512, 0, os.O_RDWR | os.O_DIRECT) == errno.ENOSPC
        assert await in_thread(write_at, mountpoint / "fine", b"x", 0) == 1
        assert mount.lane.statistics().bugs == mount.statistics().handler_errors >= 2


# The mount


def test_init_is_edited() -> None:
    """Our answer asks for nothing that the kernel did not offer."""
    out = abi.InitOut(7, 38, 0, 0x11, 0, 0, 4 << 20, 1, 256, 0)
    old = edited_init(0x13, out)
    assert (old.flags, old.max_background, old.congestion_threshold, old.max_write) == (0x11, 128, 96, 1 << 20)
    assert edited_init(0x01, out).flags == 0x01
    offered = 0x11 | abi.INIT_EXT | abi.INIT_DIRECT_IO_ALLOW_MMAP
    assert edited_init(offered, out).flags == offered
    cached = abi.INIT_WRITEBACK_CACHE
    assert edited_init(offered | cached, out._replace(flags=0x11 | cached)).flags == offered | cached
    assert edited_init(0x11 | cached, out._replace(flags=0x11 | cached)).flags == 0x11  # not coherent with O_DIRECT


async def test_invalidate_pushes_stores_out_and_drops_stale_pages(mountpoint: Path) -> None:
    """It is a notification written by ourselves; a store that was never msync'ed arrives in the image."""
    exports, _ = serving(image := MemoryDisk("disk", SIZE))
    code = "import mmap; view = mmap.mmap(fd, 0); view[0:5] = b'store'"
    async with open_data_lane_mount(mountpoint, exports) as mount:
        export = exports.by_name("disk")
        assert export is not None
        await mount.invalidate(export)  # the kernel knows nothing of it yet
        async with client(mountpoint / "disk", code) as process:
            assert await line_of(process) == b"done"
            await mount.invalidate(export)
            assert image.content[:5] == b"store"
            handle = await in_thread(os.open, mountpoint / "disk", os.O_RDONLY)  # which drops pages too
            assert await in_thread(os.pread, handle, 5, 0) == b"store"
            image.content[:5] = b"other"
            assert await in_thread(os.pread, handle, 5, 0) == b"store"
            await mount.invalidate(export)
            assert await in_thread(os.pread, handle, 5, 0) == b"other"
            await in_thread(os.close, handle)


async def test_invalidate_has_a_deadline(mountpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dirty pages and a closed gate the kernel cannot finish; we do."""
    monkeypatch.setattr(base, "INVALIDATE_TIMEOUT_S", 0.1)
    exports, (disk,) = serving(MemoryDisk("disk", SIZE))
    code = "import mmap; view = mmap.mmap(fd, 0); view[0:5] = b'store'"
    async with open_data_lane_mount(mountpoint, exports) as mount:
        export = exports.by_name("disk")
        assert export is not None
        async with client(mountpoint / "disk", code) as process:
            assert await line_of(process) == b"done"
            disk.set_gate(Gate.CLOSED)
            with pytest.raises(DiskError) as error:
                await mount.invalidate(export)
            assert error.value.errno == errno.ETIMEDOUT
            disk.set_gate(Gate.OPEN)


@pytest.mark.parametrize("option", ["-l", "-f"])
async def test_unmount_and_abort_from_outside_are_noticed(mountpoint: Path, option: str) -> None:
    """The body is told and goes on; nothing is left mounted afterwards."""
    exports, _ = serving(MemoryDisk("disk", SIZE))
    async with open_data_lane_mount(mountpoint, exports) as mount:
        await in_thread(partial(subprocess.run, ["umount", option, str(mountpoint)], check=True))
        with trio.fail_after(DEADLINE_S):
            await mount.wait_unmounted()
        export = exports.by_name("disk")
        assert export is not None
        await mount.invalidate(export)


async def test_the_end_answers_held_writes_and_open_files(mountpoint: Path) -> None:
    """A held write is told EIO, an open file ENOTCONN; the image stays as it was."""
    exports, (disk,) = serving(image := MemoryDisk("disk", SIZE))
    code = (
        "for step in (lambda: os.pwrite(fd, b'late', 0), lambda: (sys.stdin.readline(), os.pread(fd, 1, 0))):\n"
        "    try: step()\n"
        "    except OSError as exc: print(exc.errno, flush=True)"
    )
    async with trio.open_nursery() as nursery:
        leave = trio.Event()
        ended = trio.Event()
        ready = trio.Event()

        async def serve() -> None:
            async with open_data_lane_mount(mountpoint, exports):
                ready.set()
                await leave.wait()
            ended.set()

        nursery.start_soon(serve)
        await ready.wait()
        disk.set_gate(Gate.CLOSED)
        async with client(mountpoint / "disk", code) as process:
            await wait_until(lambda: disk.parked_writes == 1)
            leave.set()
            assert await line_of(process) == str(errno.EIO).encode()
            with trio.fail_after(DEADLINE_S):
                await ended.wait()
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.flush()
            assert await line_of(process) == str(errno.ENOTCONN).encode()
    disk.set_gate(Gate.OPEN)  # what was answered is not made any more
    assert image.content == bytes(SIZE)


async def test_the_body_s_error_and_cancellation_leave_nothing(mountpoint: Path) -> None:
    """No mount, no thread, no descriptor, also twice in one process and with a file open."""
    exports, _ = serving(MemoryDisk("disk", SIZE))

    def traces() -> tuple[int, list[str]]:
        names = [thread.name for thread in threading.enumerate() if thread.name.startswith("lane")]
        return len(os.listdir("/proc/self/fd")), names

    await in_thread(int)
    n_descriptors, _ = traces()
    with pytest.raises(KeyError):
        async with open_data_lane_mount(mountpoint, exports):
            await in_thread(fsync, mountpoint / "disk")
            raise KeyError
    holders: list[subprocess.Popen[bytes]] = []
    with trio.CancelScope() as scope:
        async with open_data_lane_mount(mountpoint, exports):
            holders.append(await in_thread(hold_open, mountpoint / "disk"))
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert not is_mounted(mountpoint)
    holders[0].kill()
    await in_thread(holders[0].communicate)
    await wait_until(lambda: traces() == (n_descriptors, []))


def hold_open(path: Path) -> subprocess.Popen[bytes]:
    """Start a process that has the file open."""
    command = [sys.executable, "-c", _CLIENT, str(path), ""]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"open\n"
    return process


async def test_what_cannot_start_leaves_nothing(mountpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A libfuse refusing the descriptor, and a second mount, are errors that say what to do."""
    exports, _ = serving(MemoryDisk("disk", SIZE))

    def refuse(*_: object) -> None:
        raise RuntimeError("fuse_session_mount failed")

    with monkeypatch.context() as patch:
        patch.setattr(pyfuse3, "init", refuse)
        with pytest.raises(FuseUnavailableError, match=r"libfuse 3\.3"):
            async with open_data_lane_mount(mountpoint, exports):
                pytest.fail("it was mounted")
    assert not is_mounted(mountpoint)
    async with open_data_lane_mount(mountpoint, exports):
        with pytest.raises(StateError):
            async with open_data_lane_mount(mountpoint, exports):
                pytest.fail("it was mounted")


_AS_NOBODY = """
import os, sys, trio
from pathlib import Path
from fusemig.disk.memory import MemoryDisk
from fusemig.disk.tracked import TrackedDisk
from fusemig.fuse.export import Exports
from fusemig.fuse.lane_mount import open_data_lane_mount

os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
path = Path(sys.argv[1]) / "disk"

def use():
    fd = os.open(path, os.O_RDWR)
    assert os.pwrite(fd, b"hello", 5000) == 5
    os.fsync(fd)
    return fd

async def main():
    exports = Exports()
    exports.add("disk", disk := TrackedDisk(MemoryDisk("disk", 1 << 20)))
    async with open_data_lane_mount(path.parent, exports):
        fd = await trio.to_thread.run_sync(use)
        assert os.path.ismount(path.parent) and disk.image.content[5000:5005] == b"hello"
    assert not os.path.ismount(path.parent)
    try:
        os.pread(fd, 1, 0)
    except OSError as exc:
        print(exc.errno)

trio.run(main)
"""

_WITH_A_PUBLIC_DEVICE = """
set -e
mount -t tmpfs none "$1"
mknod -m 666 "$1/fuse" c 10 229
mount --bind "$1/fuse" /dev/fuse
exec "$2" -c "$3" "$4"
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
async def test_an_ordinary_user_mounts_through_fusermount3(mountpoint: Path, tmp_path: Path) -> None:
    """The descriptor comes over _FUSE_COMMFD, and the end works with a file open; in a mount namespace of its own."""
    devices = tmp_path / "dev"
    devices.mkdir()
    for directory in (mountpoint, *mountpoint.parents):
        is_ours = directory.is_relative_to(tempfile.gettempdir())  # however deep pytest and its workers put us
        if is_ours and not directory.stat().st_mode & stat.S_IXOTH:
            directory.chmod(0o755)
    os.chown(mountpoint, 65534, 65534)
    command = ["unshare", "-m", "--propagation", "private", "sh", "-c", _WITH_A_PUBLIC_DEVICE, "sh"]
    command += [str(devices), sys.executable, _AS_NOBODY, str(mountpoint)]

    def run() -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(command, capture_output=True, timeout=DEADLINE_S, check=False)

    result = await in_thread(run)
    if b"mknod" in result.stderr or b"unshare" in result.stderr:
        pytest.skip(f"no mount namespace here: {result.stderr.decode().strip()}")
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout.split()[-1] == str(errno.ENOTCONN).encode()
