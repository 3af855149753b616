"""Mounts, the same through either lane.

Where the lanes differ by design, the test says so for each.
Every file call goes through a thread or a process: one made on the event loop would wait for itself.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import shutil
import stat
import subprocess
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import pyfuse3
import pytest
import trio
import trio.testing

from fusemig.core.units import CHUNK_SIZE
from fusemig.disk.memory import MemoryDisk
from fusemig.disk.raw import RawDisk, create_image
from fusemig.disk.tracked import Gate, TrackedDisk
from fusemig.errors import DiskError, FuseUnavailableError, StateError
from fusemig.fuse import base, preflight
from fusemig.fuse.export import Exports
from fusemig.fuse.lane_mount import open_data_lane_mount
from fusemig.fuse.mount import open_mount as open_pyfuse3_mount
from fusemig.fuse.preflight import MountOptions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from contextlib import AbstractAsyncContextManager

    from fusemig.disk.base import Disk
    from fusemig.fuse.lanes import AnyMount

pytestmark = pytest.mark.fuse

_T = TypeVar("_T")
SIZE = 4 * CHUNK_SIZE
ODD_SIZE = 5 * CHUNK_SIZE + 1536
DEADLINE_S = 30.0
WRITE_BACK = MountOptions(write_back=True)


class OpenMount(Protocol):
    """Mounts through one of the lanes."""

    def __call__(
        self, mountpoint: Path, exports: Exports, options: MountOptions | None = None
    ) -> AbstractAsyncContextManager[AnyMount]:
        """Mount for a block."""


@pytest.fixture(params=["pyfuse3", "data"])
def lane(request: pytest.FixtureRequest) -> str:
    """Name the lane that serves the test."""
    return str(request.param)


@pytest.fixture
def open_mount(lane: str) -> OpenMount:
    """Mount through the lane of the test."""
    return open_data_lane_mount if lane == "data" else open_pyfuse3_mount


async def in_thread(call: Callable[..., _T], *args: object) -> _T:
    """Make a call that may wait for the mount."""
    with trio.fail_after(DEADLINE_S):
        return await trio.to_thread.run_sync(call, *args, abandon_on_cancel=True)


async def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for something that no event tells."""
    with trio.fail_after(DEADLINE_S):
        while not condition():
            await trio.sleep(0.002)


def is_mounted(path: Path) -> bool:
    """Tell from the kernel's table, without asking the file system itself."""
    return any(line.split()[4] == str(path) for line in Path("/proc/self/mountinfo").read_text().splitlines())


def serving(*images: Disk, read_only: bool = False) -> tuple[Exports, list[TrackedDisk]]:
    """Export each image under its name."""
    exports, disks = Exports(), [TrackedDisk(image) for image in images]
    for disk in disks:
        exports.add(disk.name, disk, read_only=read_only)
    return exports, disks


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    """Open a file for a block."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def write_at(path: Path, data: bytes, offset: int, flags: int = os.O_RDWR) -> int:
    """Write through a handle of its own."""
    with opened(path, flags) as fd:
        return os.pwrite(fd, data, offset)


def read_at(path: Path, length: int, offset: int) -> bytes:
    """Read through a handle of its own."""
    with opened(path, os.O_RDONLY) as fd:
        return os.pread(fd, length, offset)


def sync_file(path: Path) -> None:
    """Call fsync through a handle of its own."""
    with opened(path) as fd:
        os.fsync(fd)


_STORE = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
view = mmap.mmap(fd, 0)
offset = int(sys.argv[2])
view[offset:offset + 5] = b"store"
if sys.argv[3] == "msync":
    view.flush()
print("stored", flush=True)
sys.stdin.read()
os._exit(0)
"""


@asynccontextmanager
async def stored_through_mmap(path: Path, offset: int, how: str = "no msync") -> AsyncIterator[None]:
    """Hold a shared mapping with a store in it, in a process of its own: a page fault would keep our GIL."""
    command = [sys.executable, "-c", _STORE, str(path), str(offset), how]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    process = await in_thread(start)
    assert process.stdout is not None
    try:
        assert await in_thread(process.stdout.readline) == b"stored\n"
        yield
    finally:
        with trio.CancelScope(shield=True):
            await in_thread(process.communicate)


async def errno_of(call: Callable[..., object], *args: object) -> int | None:
    """Return the errno that a call failed with, None if it did not."""
    try:
        await in_thread(call, *args)
    except OSError as exc:
        return exc.errno
    return None


# Reading and writing


async def test_random_io_equals_a_model(open_mount: OpenMount, mountpoint: Path) -> None:
    """Unaligned reads and writes of any length, on a disk whose size is no multiple of a block, are exact."""
    image = MemoryDisk("disk", ODD_SIZE)
    exports, _ = serving(image)

    def work(path: Path) -> None:
        rng = random.Random(7)
        model = bytearray(ODD_SIZE)
        with opened(path) as fd:
            for _ in range(150):
                offset = rng.randrange(ODD_SIZE)
                length = min(rng.choice((1, 511, 512, 4096, 70_000, 2_500_000)), ODD_SIZE - offset)
                if rng.random() < 0.6:
                    data = rng.randbytes(length)
                    assert os.pwrite(fd, data, offset) == length
                    model[offset : offset + length] = data
                else:
                    assert os.pread(fd, length, offset) == model[offset : offset + length]
            os.fsync(fd)
        assert path.read_bytes() == model
        assert image.content == model

    async with open_mount(mountpoint, exports):
        await in_thread(work, mountpoint / "disk")


async def test_o_direct_io(open_mount: OpenMount, mountpoint: Path, tmp_path: Path) -> None:
    """O_DIRECT reads and writes work and pass the page cache by."""
    path = tmp_path / "image"
    create_image(path, SIZE)

    def work(file: Path) -> None:
        page = mmap.mmap(-1, 8192)
        page[:] = b"\xa5" * 8192
        with opened(file, os.O_RDWR | os.O_DIRECT) as fd:
            assert os.pwrite(fd, page, 4096) == 8192
            page[:] = bytes(8192)
            assert os.preadv(fd, [page], 4096) == 8192
            assert page[:] == b"\xa5" * 8192
        page.close()

    with RawDisk("disk", path) as image:
        exports, _ = serving(image)
        async with open_mount(mountpoint, exports):
            await in_thread(work, mountpoint / "disk")
    assert path.read_bytes()[4096:12288] == b"\xa5" * 8192


async def test_two_handles_see_each_other(open_mount: OpenMount, mountpoint: Path) -> None:
    """A write through one handle is read through another, and its mtime and ctime are seen at once."""
    exports, _ = serving(MemoryDisk("disk", SIZE))

    def work(path: Path) -> None:
        with opened(path) as one, opened(path) as other:
            assert os.pread(other, 4, 0) == bytes(4)
            before = os.fstat(other)
            os.pwrite(one, b"seen", 0)
            assert os.pread(other, 4, 0) == b"seen"
            after = os.fstat(other)
            assert after.st_mtime_ns > before.st_mtime_ns
            assert after.st_ctime_ns > before.st_ctime_ns

    async with open_mount(mountpoint, exports):
        await in_thread(work, mountpoint / "disk")


async def test_the_end_of_the_disk_is_that_of_a_block_device(open_mount: OpenMount, mountpoint: Path) -> None:
    """A write never makes the file longer: what fits is written, ENOSPC if nothing does."""
    image = MemoryDisk("disk", ODD_SIZE)
    exports, _ = serving(image)
    async with open_mount(mountpoint, exports):
        path = mountpoint / "disk"
        assert await in_thread(write_at, path, b"x" * 100, ODD_SIZE - 60) == 60
        assert await errno_of(write_at, path, b"x", ODD_SIZE) == errno.ENOSPC
        assert await errno_of(write_at, path, b"x", ODD_SIZE + 10 * CHUNK_SIZE) == errno.ENOSPC
        assert await in_thread(read_at, path, 4096, ODD_SIZE - 60) == b"x" * 60
        assert (await in_thread(os.stat, path)).st_size == ODD_SIZE
    assert image.content[-61:] == b"\0" + b"x" * 60


# Durability


def flushes_of_a_synchronous_write(lane: str) -> tuple[int, ...]:
    """Tell how often one buffered write may flush: the data lane does it at the write, and again at the FSYNC."""
    return (1, 2) if lane == "data" else (1,)


@pytest.mark.parametrize("flag", [os.O_DSYNC, os.O_SYNC])
async def test_synchronous_opens_flush_before_the_write_returns(
    open_mount: OpenMount, lane: str, mountpoint: Path, flag: int
) -> None:
    """A write through O_DSYNC or O_SYNC has reached the disk's flush when it returns; a plain one has not."""
    image = MemoryDisk("disk", SIZE)
    exports, _ = serving(image)

    def work(path: Path) -> None:
        with opened(path) as fd:
            os.pwrite(fd, b"plain", 0)
            assert image.n_flushes == 0
        with opened(path, os.O_RDWR | flag) as fd:
            os.pwrite(fd, b"durable", 0)
            assert image.n_flushes in flushes_of_a_synchronous_write(lane)
        before = image.n_flushes
        with opened(path, os.O_RDWR | flag | os.O_DIRECT) as fd, mmap.mmap(-1, 4096) as page:
            os.pwrite(fd, page, 0)
            assert image.n_flushes == before + 1

    async with open_mount(mountpoint, exports):
        await in_thread(work, mountpoint / "disk")


async def test_rwf_dsync_fsync_and_fdatasync_flush(open_mount: OpenMount, lane: str, mountpoint: Path) -> None:
    """Each request for durability is a flush of the disk, those of the kernel are counted; a close is none."""
    image = MemoryDisk("disk", SIZE)
    exports, _ = serving(image)

    def work(path: Path) -> None:
        with opened(path) as fd:
            os.pwritev(fd, [b"one"], 0, os.RWF_DSYNC)
            assert image.n_flushes in flushes_of_a_synchronous_write(lane)
            before = image.n_flushes
            os.fsync(fd)
            assert image.n_flushes == before + 1
            os.fdatasync(fd)
            assert image.n_flushes == before + 2
        assert image.n_flushes == before + 2

    async with open_mount(mountpoint, exports) as mount:
        await in_thread(work, mountpoint / "disk")
        assert mount.statistics().flushes == 3


async def test_mmap_stores_arrive_with_msync(open_mount: OpenMount, mountpoint: Path) -> None:
    """A store through a shared mapping is in the image, and flushed, when msync returns."""
    image = MemoryDisk("disk", SIZE)
    exports, _ = serving(image)
    async with open_mount(mountpoint, exports), stored_through_mmap(mountpoint / "disk", 5000, "msync"):
        assert image.content[5000:5005] == b"store"
        assert image.n_flushes == 1


async def test_invalidate_pushes_mmap_stores_out(open_mount: OpenMount, mountpoint: Path) -> None:
    """A store that was never msync'ed is in the image when `invalidate` returns."""
    image = MemoryDisk("disk", SIZE)
    exports, disks = serving(image)
    async with open_mount(mountpoint, exports) as mount, stored_through_mmap(mountpoint / "disk", 5000):
        assert image.content[5000:5005] == bytes(5)
        await mount.invalidate(next(iter(exports)))
        assert image.content[5000:5005] == b"store"
        assert disks[0].written_chunks == 1


async def test_invalidate_drops_stale_pages(open_mount: OpenMount, mountpoint: Path) -> None:
    """Bytes that changed below the guest's side, as a destination's do, are read after `invalidate`."""
    image = MemoryDisk("disk", SIZE)
    exports, _ = serving(image)
    async with open_mount(mountpoint, exports) as mount:
        path = mountpoint / "disk"
        fd = await in_thread(os.open, path, os.O_RDONLY)
        try:
            assert await in_thread(os.pread, fd, 5, 0) == bytes(5)
            image.pwrite(b"fresh", 0)
            assert await in_thread(os.pread, fd, 5, 0) == bytes(5)  # the kernel's page: why the call is needed
            await mount.invalidate(next(iter(exports)))
            assert await in_thread(os.pread, fd, 5, 0) == b"fresh"
        finally:
            await in_thread(os.close, fd)


async def test_invalidate_has_a_deadline(
    open_mount: OpenMount, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the gate closed the kernel's dirty pages cannot be pushed out: an error, no hang, and the store survives."""
    monkeypatch.setattr(base, "INVALIDATE_TIMEOUT_S", 0.05)
    image = MemoryDisk("disk", SIZE)
    exports, disks = serving(image)
    async with open_mount(mountpoint, exports) as mount, stored_through_mmap(mountpoint / "disk", 0):
        disks[0].set_gate(Gate.CLOSED)
        with pytest.raises(DiskError) as caught:
            await mount.invalidate(next(iter(exports)))
        assert caught.value.errno == errno.ETIMEDOUT
        disks[0].set_gate(Gate.OPEN)
        await wait_until(lambda: image.content[0:5] == b"store")


async def test_clean_unmount_pushes_mmap_stores_out(open_mount: OpenMount, mountpoint: Path) -> None:
    """A store that the kernel still holds is in the image after the mount has ended."""
    image = MemoryDisk("disk", SIZE)
    exports, _ = serving(image)
    async with AsyncExitStack() as guests:
        async with open_mount(mountpoint, exports) as mount:
            await guests.enter_async_context(stored_through_mmap(mountpoint / "disk", 0))
            assert mount.is_busy()
            assert image.content[0:5] == bytes(5)
        assert image.content[0:5] == b"store"


async def test_failed_fdatasync_is_reported_and_sticky(
    open_mount: OpenMount, mountpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the backing's fdatasync has failed every later fsync fails too, also when it would succeed."""
    create_image(tmp_path / "image", SIZE)

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), fd)

    with RawDisk("disk", tmp_path / "image") as image:
        exports, _ = serving(image)
        async with open_mount(mountpoint, exports):
            path = mountpoint / "disk"
            await in_thread(sync_file, path)
            with monkeypatch.context() as patch:
                patch.setattr(os, "fdatasync", fail)
                assert await errno_of(sync_file, path) == errno.EIO
            assert await errno_of(sync_file, path) == errno.EIO
            assert await errno_of(write_at, path, b"x", 0, os.O_RDWR | os.O_DSYNC) == errno.EIO


# The kernel's write-back cache


async def test_write_back_is_unseen_until_synced(open_mount: OpenMount, mountpoint: Path) -> None:
    """What it costs: a buffered write is acknowledged, and neither stored nor marked before fsync; nothing is lost."""
    image = MemoryDisk("disk", SIZE)
    exports, disks = serving(image)
    tracking = disks[0].start_tracking()

    def work(path: Path) -> None:
        with opened(path) as fd:
            os.pwrite(fd, b"cached", 5000)
            assert os.pread(fd, 6, 5000) == b"cached"
            assert image.content[5000:5006] == bytes(6)
            assert tracking.dirty_bytes == 0
            assert disks[0].written_chunks == 0
            os.fsync(fd)
            assert image.content[5000:5006] == b"cached"
            assert image.n_flushes == 1
            assert tracking.dirty_bytes == 4096
            assert os.fstat(fd).st_size == SIZE

    async with open_mount(mountpoint, exports, WRITE_BACK):
        await in_thread(work, mountpoint / "disk")


@pytest.mark.parametrize("flag", [os.O_DSYNC, os.O_SYNC, os.O_DIRECT])
async def test_write_back_leaves_other_opens_as_they_are(open_mount: OpenMount, mountpoint: Path, flag: int) -> None:
    """Synchronous and direct writes have arrived when they return, and a direct read sees what the cache holds."""
    image = MemoryDisk("disk", SIZE)
    exports, _ = serving(image)

    def work(path: Path) -> None:
        with opened(path) as cached, opened(path, os.O_RDWR | flag) as fd, mmap.mmap(-1, 4096) as page:
            os.pwrite(cached, b"cached", 4096)
            page[:] = b"\xa5" * 4096
            assert os.pwrite(fd, page, 0) == 4096
            assert image.content[:4096] == b"\xa5" * 4096
            assert image.n_flushes >= (flag != os.O_DIRECT)
            assert os.preadv(fd, [page], 4096) == 4096
            assert page[:6] == b"cached"
            assert os.pread(cached, 4, 0) == b"\xa5" * 4

    async with open_mount(mountpoint, exports, WRITE_BACK):
        await in_thread(work, mountpoint / "disk")


async def test_write_back_is_pushed_out_before_the_gate_closes(open_mount: OpenMount, mountpoint: Path) -> None:
    """The switchover: pages held before it are pushed out as guest writes; a write after it fails when it is synced."""
    image = MemoryDisk("disk", SIZE)
    exports, disks = serving(image)
    async with open_mount(mountpoint, exports, WRITE_BACK) as mount:
        fd = await in_thread(os.open, mountpoint / "disk", os.O_RDWR)
        try:
            await in_thread(os.pwrite, fd, b"before", 0)
            assert image.content[:6] == bytes(6)
            await mount.invalidate(next(iter(exports)))
            assert image.content[:6] == b"before"
            disks[0].set_gate(Gate.READ_ONLY)
            assert await in_thread(os.pwrite, fd, b"after!", 0) == 6  # acknowledged by the kernel, not by us
            assert await errno_of(os.fsync, fd) == errno.EROFS
            assert image.content[:6] == b"before"
        finally:
            with contextlib.suppress(OSError):
                await in_thread(os.close, fd)


async def test_write_back_ends_with_everything_in_the_image(open_mount: OpenMount, mountpoint: Path) -> None:
    """An unmount with the file open pushes out what was never synced."""
    image = MemoryDisk("disk", SIZE)
    exports, _ = serving(image)
    async with open_mount(mountpoint, exports, WRITE_BACK):
        fd = await in_thread(os.open, mountpoint / "disk", os.O_RDWR)
        await in_thread(os.pwrite, fd, b"unsynced", 0)
        assert image.content[:8] == bytes(8)
    assert image.content[:8] == b"unsynced"
    assert await errno_of(os.close, fd) in (None, errno.ENOTCONN, errno.ECONNABORTED)


async def test_write_back_with_a_disk_that_is_still_to_come(open_mount: OpenMount, mountpoint: Path) -> None:
    """The kernel trusts the size it knows; it is told to forget that of a disk that had none."""
    exports = Exports()
    export = exports.add("disk", None)
    async with open_mount(mountpoint, exports, WRITE_BACK) as mount:
        path = mountpoint / "disk"
        assert (await in_thread(os.stat, path)).st_size == 0
        early = await in_thread(os.open, path, os.O_RDONLY)
        export.disk = TrackedDisk(MemoryDisk("disk", SIZE))
        await mount.invalidate(export, attributes_only=True)
        assert (await in_thread(os.stat, path)).st_size == SIZE
        assert await in_thread(write_at, path, b"end", SIZE - 3) == 3
        assert export.disk.pread(3, SIZE - 3) == b"end"
        assert await errno_of(os.pread, early, 1, 0) == errno.EIO  # opened too early: it must be opened again
        assert await errno_of(os.close, early) == errno.EIO
        await wait_until(lambda: not mount.is_busy())


# What is shown


async def test_attributes(open_mount: OpenMount, mountpoint: Path, tmp_path: Path) -> None:
    """Size, mode, owner and the image's own allocation are shown; utimens is kept; statfs is the image's."""
    create_image(tmp_path / "image", SIZE)

    def work(image: RawDisk) -> None:
        path = mountpoint / "disk"
        write_at(path, b"x" * 4096, CHUNK_SIZE)
        shown = path.stat()
        assert (shown.st_size, shown.st_blksize, shown.st_nlink) == (SIZE, 4096, 1)
        assert shown.st_blocks == image.stat().st_blocks < SIZE // 512
        assert stat.S_IMODE(shown.st_mode) == 0o600
        assert (shown.st_uid, shown.st_gid) == (os.geteuid(), os.getegid())
        os.utime(path, ns=(10**18, 2 * 10**18))
        assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (10**18, 2 * 10**18)
        assert os.listdir(mountpoint) == ["disk"]
        assert stat.S_ISDIR(mountpoint.stat().st_mode)
        store = os.statvfs(tmp_path)
        assert (os.statvfs(path).f_frsize, os.statvfs(path).f_blocks) == (store.f_frsize, store.f_blocks)
        assert not (mountpoint / "other").exists()

    with RawDisk("disk", tmp_path / "image") as image:
        exports, _ = serving(image)
        async with open_mount(mountpoint, exports):
            await in_thread(work, image)


async def test_sixteen_tebibytes(open_mount: OpenMount, mountpoint: Path, tmp_path: Path) -> None:
    """The largest disk there is can be used up to its last byte."""
    path = tmp_path / "image"
    size = 16 << 40
    try:
        create_image(path, size)
    except Exception as exc:
        size = (16 << 40) - 4096  # ext4's largest file
        path.unlink(missing_ok=True)
        try:
            create_image(path, size)
        except Exception:
            pytest.skip(f"this file system has no such large files: {exc}")
    with RawDisk("disk", path) as image:
        exports, _ = serving(image)
        async with open_mount(mountpoint, exports):
            file = mountpoint / "disk"
            assert (await in_thread(os.stat, file)).st_size == size
            assert await in_thread(write_at, file, b"end", size - 3) == 3
            assert await in_thread(read_at, file, 100, size - 3) == b"end"
            assert await errno_of(write_at, file, b"x", size) in (errno.ENOSPC, errno.EFBIG)


async def test_more_exports_than_fit_one_readdir_answer(open_mount: OpenMount, mountpoint: Path) -> None:
    """A listing that takes several requests names every export once."""
    names = sorted(f"disk-{n:03}-{'x' * 50}" for n in range(200))
    exports, _ = serving(*(MemoryDisk(name, 512) for name in names))
    async with open_mount(mountpoint, exports):
        assert sorted(await in_thread(os.listdir, mountpoint)) == names


async def test_export_without_a_disk_yet(open_mount: OpenMount, mountpoint: Path) -> None:
    """A destination's file is empty and refuses writes until its size is known; then the size is seen at once."""
    exports = Exports()
    export = exports.add("disk", None)
    async with open_mount(mountpoint, exports):
        path = mountpoint / "disk"
        assert (await in_thread(os.stat, path)).st_size == 0
        assert await in_thread(read_at, path, 10, 0) == b""
        assert await errno_of(write_at, path, b"x", 0) == errno.EROFS
        await in_thread(sync_file, path)
        export.disk = TrackedDisk(MemoryDisk("disk", SIZE), gate=Gate.READ_ONLY)
        assert (await in_thread(os.stat, path)).st_size == SIZE
        assert await in_thread(read_at, path, 10, SIZE - 10) == bytes(10)


# What is refused


async def test_the_namespace_is_fixed(open_mount: OpenMount, mountpoint: Path) -> None:
    """Everything that would change names, size, mode, owner or extended attributes is EPERM."""
    image = MemoryDisk("disk", SIZE)
    image.pwrite(b"kept", 0)
    exports, _ = serving(image, MemoryDisk("other", SIZE))
    path, other, new = mountpoint / "disk", mountpoint / "other", mountpoint / "new"
    refused: list[tuple[Callable[..., object], tuple[object, ...]]] = [
        (os.open, (new, os.O_CREAT | os.O_RDWR)),
        (os.open, (path, os.O_TRUNC | os.O_RDWR)),
        (os.mknod, (new,)),
        (os.mkdir, (new,)),
        (os.unlink, (path,)),
        (os.rename, (path, new)),
        (os.rename, (path, other)),
        (os.link, (path, new)),
        (os.symlink, ("disk", new)),
        (os.truncate, (path, 0)),
        (os.truncate, (path, SIZE + 512)),
        (os.chmod, (path, 0o644)),
        (os.chmod, (mountpoint, 0o700)),
        (os.chown, (path, 1, 1)),
        (os.setxattr, (path, "user.x", b"y")),
        (os.removexattr, (path, "user.x")),
    ]
    async with open_mount(mountpoint, exports) as mount:
        for call, args in refused:
            assert await errno_of(call, *args) == errno.EPERM, call
        assert await errno_of(os.getxattr, path, "user.x") == errno.ENOTSUP
        await in_thread(os.truncate, path, SIZE)  # many tools set the size that is there
        assert await in_thread(read_at, path, 4, 0) == b"kept"
        assert sorted(await in_thread(os.listdir, mountpoint)) == ["disk", "other"]
        assert mount.statistics().handler_errors == 0


async def test_read_only_export(open_mount: OpenMount, mountpoint: Path) -> None:
    """A read-only export can be read, and not be opened for writing."""
    exports, _ = serving(MemoryDisk("disk", SIZE), read_only=True)
    async with open_mount(mountpoint, exports):
        path = mountpoint / "disk"
        assert await in_thread(read_at, path, 4, 0) == bytes(4)
        assert await errno_of(write_at, path, b"x", 0) == errno.EROFS
        assert stat.S_IMODE((await in_thread(os.stat, path)).st_mode) == 0o400


async def test_read_only_gate_lets_open_and_refuses_writes(open_mount: OpenMount, mountpoint: Path) -> None:
    """An incoming disk can be opened for writing early; each write is EROFS until the disk is taken over."""
    exports, disks = serving(MemoryDisk("disk", SIZE))
    disks[0].set_gate(Gate.READ_ONLY)
    async with open_mount(mountpoint, exports):
        fd = await in_thread(os.open, mountpoint / "disk", os.O_RDWR)
        try:
            assert await errno_of(os.pwrite, fd, b"x", 0) == errno.EROFS
            assert await in_thread(os.pread, fd, 1, 0) == b"\0"
            disks[0].set_gate(Gate.OPEN)
            assert await in_thread(os.pwrite, fd, b"x", 0) == 1
        finally:
            await in_thread(os.close, fd)


# Parked writes


async def test_parked_write_is_made_when_the_gate_opens(
    open_mount: OpenMount, mountpoint: Path, nursery: trio.Nursery
) -> None:
    """A write to a frozen disk waits, other disks and reads go on, and the write is there once it is answered."""
    image = MemoryDisk("frozen", SIZE)
    exports, disks = serving(image, MemoryDisk("other", SIZE))
    written: list[int] = []

    async def writer(path: Path) -> None:
        written.append(await in_thread(write_at, path, b"parked", 10))

    async with open_mount(mountpoint, exports) as mount:
        disks[0].set_gate(Gate.CLOSED)
        nursery.start_soon(writer, mountpoint / "frozen")
        await wait_until(lambda: disks[0].parked_writes == 1)
        await in_thread(write_at, mountpoint / "other", b"goes on", 0, os.O_RDWR | os.O_DSYNC)
        await in_thread(sync_file, mountpoint / "other")
        assert await in_thread(read_at, mountpoint / "frozen", 6, 8192) == bytes(6)
        assert written == []
        assert image.content[10:16] == bytes(6)
        disks[0].set_gate(Gate.OPEN)
        await wait_until(lambda: written == [6])
        assert image.content[10:16] == b"parked"
        assert mount.statistics().parked_total == 1


async def test_parked_write_is_refused_when_the_disk_is_given_up(
    open_mount: OpenMount, mountpoint: Path, nursery: trio.Nursery
) -> None:
    """After a hand-off the source answers what it had parked with EROFS, and nothing of it is written."""
    image = MemoryDisk("disk", SIZE)
    exports, disks = serving(image)
    outcome: list[int | None] = []

    async def writer(path: Path) -> None:
        outcome.append(await errno_of(write_at, path, b"parked", 0))

    async with open_mount(mountpoint, exports):
        disks[0].set_gate(Gate.CLOSED)
        nursery.start_soon(writer, mountpoint / "disk")
        await wait_until(lambda: disks[0].parked_writes == 1)
        disks[0].set_gate(Gate.READ_ONLY)
        await wait_until(lambda: outcome == [errno.EROFS])
    assert image.content[0:6] == bytes(6)


async def test_gate_changed_from_a_thread_and_closed_again(
    open_mount: OpenMount, mountpoint: Path, nursery: trio.Nursery
) -> None:
    """A parked write survives a gate that opens and closes again, whichever thread moves it."""
    image = MemoryDisk("disk", SIZE)
    exports, disks = serving(image)
    written: list[int] = []

    async def writer(path: Path) -> None:
        written.append(await in_thread(write_at, path, b"parked", 0))

    def flip() -> None:
        disks[0].set_gate(Gate.OPEN)
        disks[0].set_gate(Gate.CLOSED)

    async with open_mount(mountpoint, exports):
        disks[0].set_gate(Gate.CLOSED)
        nursery.start_soon(writer, mountpoint / "disk")
        await wait_until(lambda: disks[0].parked_writes == 1)
        flip()  # on the loop: the write cannot slip through in between
        await wait_until(lambda: disks[0].parked_writes == 1)
        assert written == []
        await in_thread(disks[0].set_gate, Gate.OPEN)
        await wait_until(lambda: written == [6])
    assert image.content[0:6] == b"parked"


async def test_many_parked_writes_do_not_starve_other_disks(open_mount: OpenMount, mountpoint: Path) -> None:
    """With 130 writes parked, more than pyfuse3 handles by default, another disk is served; then all arrive.

    One to a disk: the kernel lets one buffered write at a time into a file.
    """
    n_frozen = 130
    exports, disks = serving(*(MemoryDisk(f"d{n}", 4096) for n in range(n_frozen)), MemoryDisk("other", SIZE))
    frozen = disks[:n_frozen]
    limit = trio.CapacityLimiter(n_frozen)

    async def writer(disk: TrackedDisk) -> None:
        await trio.to_thread.run_sync(write_at, mountpoint / disk.name, b"parked", 0, limiter=limit)

    # The mount is the inner block, so that a failure ends it, which answers the writers: they cannot be cancelled.
    async with trio.open_nursery() as writers, open_mount(mountpoint, exports):
        for disk in frozen:
            disk.set_gate(Gate.CLOSED)
            writers.start_soon(writer, disk)
        await wait_until(lambda: all(disk.parked_writes == 1 for disk in frozen))
        await in_thread(write_at, mountpoint / "other", b"served", 0, os.O_RDWR | os.O_DSYNC)
        assert await in_thread(read_at, mountpoint / "other", 6, 0) == b"served"
        for disk in frozen:
            disk.set_gate(Gate.OPEN)
        await wait_until(lambda: not writers.child_tasks)
    assert all(disk.pread(6, 0) == b"parked" for disk in frozen)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can raise the mount's max_background")
@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
async def test_deep_asynchronous_queues_are_parked_without_starving_others(
    open_mount: OpenMount, mountpoint: Path
) -> None:
    """120 asynchronous O_DIRECT writes of one frozen disk leave room for those of another disk."""
    exports, disks = serving(MemoryDisk("frozen", SIZE), MemoryDisk("other", SIZE))
    frozen = disks[0]

    async def fio(name: str, pattern: str) -> None:
        command = ["fio", f"--name={name}", f"--filename={mountpoint / name}", "--rw=write", "--bs=4k", "--direct=1"]
        command += ["--ioengine=libaio", "--iodepth=120", f"--size={SIZE}", f"--buffer_pattern={pattern}"]
        await trio.run_process(command, capture_stdout=True, capture_stderr=True, shell=False)

    async with trio.open_nursery() as writers, open_mount(mountpoint, exports):
        frozen.set_gate(Gate.CLOSED)
        try:
            writers.start_soon(fio, "frozen", "0x5a")
            await wait_until(lambda: frozen.parked_writes == 120)
            with trio.fail_after(DEADLINE_S):
                await fio("other", "0xa5")
        finally:
            frozen.set_gate(Gate.OPEN)
        await wait_until(lambda: not writers.child_tasks)
        assert frozen.pread(SIZE, 0) == b"\x5a" * SIZE
        assert disks[1].pread(SIZE, 0) == b"\xa5" * SIZE


# Failures


class BuggyDisk(MemoryDisk):
    """Raises what no disk should."""

    def pread_nowait(self, buffer: memoryview, offset: int) -> bool:
        """Fail."""
        raise RuntimeError("a bug")

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Fail as a disk does."""
        raise DiskError(errno.ENOSPC, "full", offset, len(data))


async def test_an_exception_in_a_handler_is_eio_and_the_mount_survives(open_mount: OpenMount, mountpoint: Path) -> None:
    """A bug is EIO, counted, and ends nothing; a disk's own error keeps its errno and is no bug."""
    exports, _ = serving(BuggyDisk("buggy", SIZE), MemoryDisk("good", SIZE))
    async with open_mount(mountpoint, exports) as mount:
        for _ in range(3):
            assert await errno_of(read_at, mountpoint / "buggy", 10, 0) == errno.EIO
        assert mount.statistics().handler_errors >= 3
        before = mount.statistics().handler_errors
        assert await errno_of(write_at, mountpoint / "buggy", b"x", 0) == errno.ENOSPC
        assert mount.statistics().handler_errors == before
        assert await in_thread(read_at, mountpoint / "good", 10, 0) == bytes(10)


class SleepyDisk(MemoryDisk):
    """Must be asked in a thread."""

    def pread_nowait(self, buffer: memoryview, offset: int) -> bool:
        """Promise nothing."""
        return False

    def pwrite_may_sleep(self, offset: int, length: int) -> bool:
        """Always."""
        return True


async def test_what_may_sleep_is_done_in_threads(open_mount: OpenMount, mountpoint: Path) -> None:
    """Reads and writes of a store that may sleep give the same bytes, and parked ones too."""
    exports, disks = serving(SleepyDisk("disk", SIZE))
    async with open_mount(mountpoint, exports) as mount:
        path = mountpoint / "disk"
        await in_thread(write_at, path, b"sleepy" * 1000, 100)
        assert await in_thread(read_at, path, 6000, 100) == b"sleepy" * 1000
        assert mount.statistics().thread_requests >= 2
        disks[0].set_gate(Gate.CLOSED)
        async with trio.open_nursery() as writers:
            writers.start_soon(in_thread, write_at, path, b"parked", 0)
            await wait_until(lambda: disks[0].parked_writes == 1)
            disks[0].set_gate(Gate.OPEN)
        assert await in_thread(read_at, path, 6, 0) == b"parked"


# The life of a mount


async def refusal(open_mount: OpenMount, mountpoint: Path, options: MountOptions | None = None) -> str:
    """Return the text with which a mount is refused."""
    exports, _ = serving(MemoryDisk("disk", SIZE))
    with pytest.raises(FuseUnavailableError) as caught:
        async with open_mount(mountpoint, exports, options):
            pytest.fail("it was mounted")
    return str(caught.value)


async def test_mount_points_that_cannot_be_used(open_mount: OpenMount, mountpoint: Path) -> None:
    """Each refusal says what is wrong with the mount point, and nothing is mounted."""
    assert "mkdir" in await refusal(open_mount, mountpoint / "missing")
    file = mountpoint.parent / "file"
    file.touch()
    assert "not a directory" in await refusal(open_mount, file)
    assert "not empty" in await refusal(open_mount, mountpoint.parent)
    assert "mounted there already" in await refusal(open_mount, Path("/proc"))


async def test_platforms_that_cannot_mount(
    open_mount: OpenMount, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each refusal names the cause and the next step, and one can try again."""
    with monkeypatch.context() as patch:
        patch.setattr(preflight, "FUSE_DEVICE", mountpoint / "no-fuse")
        assert "modprobe fuse" in await refusal(open_mount, mountpoint)
    with monkeypatch.context() as patch:
        patch.setattr(preflight, "FUSE_DEVICE", mountpoint)  # a directory cannot be opened for writing
        assert "cannot open" in await refusal(open_mount, mountpoint)
    with monkeypatch.context() as patch:
        patch.setenv("FUSE_URING_ENABLE", "1")
        assert "unset it" in await refusal(open_mount, mountpoint)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 1000)
        patch.setenv("PATH", str(mountpoint))
        assert "fusermount3" in await refusal(open_mount, mountpoint)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 1000)
        patch.setattr(preflight, "FUSE_CONFIG", mountpoint.parent / "no-config")
        assert "user_allow_other" in await refusal(open_mount, mountpoint, MountOptions(allow_other=True))
    exports, _ = serving(MemoryDisk("disk", SIZE))
    async with open_mount(mountpoint, exports):
        assert is_mounted(mountpoint)


async def test_a_mount_that_libfuse_refuses_can_be_tried_again(
    mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the pyfuse3 lane lets libfuse mount; what it leaves behind is destroyed."""
    with monkeypatch.context() as patch:
        patch.setattr(pyfuse3, "default_options", frozenset({"no_such_option"}))
        assert "cannot mount" in await refusal(open_pyfuse3_mount, mountpoint)
    exports, _ = serving(MemoryDisk("disk", SIZE))
    async with open_pyfuse3_mount(mountpoint, exports):
        assert is_mounted(mountpoint)


async def test_one_mount_per_process(open_mount: OpenMount, mountpoint: Path) -> None:
    """A second mount is refused while one is active, and possible afterwards."""
    exports, _ = serving(MemoryDisk("disk", SIZE))
    for _ in range(2):
        async with open_mount(mountpoint, exports):
            with pytest.raises(StateError):
                async with open_mount(mountpoint, exports):
                    pass
            assert await in_thread(os.listdir, mountpoint) == ["disk"]
        assert not is_mounted(mountpoint)


async def test_the_body_s_error_passes_and_the_mount_is_gone(open_mount: OpenMount, mountpoint: Path) -> None:
    """An error of the body comes out as itself, and nothing stays mounted."""
    exports, _ = serving(MemoryDisk("disk", SIZE))
    with pytest.raises(ValueError, match="the body"):
        async with open_mount(mountpoint, exports):
            raise ValueError("the body")
    assert not is_mounted(mountpoint)


async def test_cancelled_body_leaves_no_mount(open_mount: OpenMount, mountpoint: Path) -> None:
    """Cancellation unmounts too, in good order: a store that the kernel holds is pushed out first."""
    image = MemoryDisk("disk", SIZE)
    exports, _ = serving(image)
    async with AsyncExitStack() as guests:
        with trio.CancelScope() as scope:
            async with open_mount(mountpoint, exports):
                with trio.CancelScope(shield=True):
                    await guests.enter_async_context(stored_through_mmap(mountpoint / "disk", 0))
                scope.cancel()
                await trio.sleep_forever()
        assert scope.cancelled_caught
        assert not is_mounted(mountpoint)
        assert image.content[0:5] == b"store"


async def test_the_end_answers_parked_writes(open_mount: OpenMount, mountpoint: Path, nursery: trio.Nursery) -> None:
    """A write that is still parked when the mount ends fails for its guest: it is not lost in silence."""
    image = MemoryDisk("disk", SIZE)
    exports, disks = serving(image)
    outcome: list[int | None] = []

    async def writer(fd: int) -> None:
        outcome.append(await errno_of(os.pwrite, fd, b"parked", 0))

    async with open_mount(mountpoint, exports):
        fd = await in_thread(os.open, mountpoint / "disk", os.O_RDWR)
        disks[0].set_gate(Gate.CLOSED)
        nursery.start_soon(writer, fd)
        await wait_until(lambda: disks[0].parked_writes == 1)
    await wait_until(lambda: outcome == [errno.EIO])
    assert not is_mounted(mountpoint)
    assert disks[0].parked_writes == 0
    assert await errno_of(os.close, fd) in (errno.ENOTCONN, errno.ECONNABORTED)
    disks[0].set_gate(Gate.OPEN)
    await trio.testing.wait_all_tasks_blocked()
    assert image.content[0:6] == bytes(6)


async def test_unmount_from_outside_is_noticed(open_mount: OpenMount, mountpoint: Path) -> None:
    """Somebody's umount ends the service without an error; invalidating then does nothing."""
    exports, _ = serving(MemoryDisk("disk", SIZE))
    async with open_mount(mountpoint, exports) as mount:
        await in_thread(partial(subprocess.run, ["umount", mountpoint], check=True, timeout=DEADLINE_S))
        with trio.fail_after(DEADLINE_S):
            await mount.wait_unmounted()
        await mount.invalidate(next(iter(exports)))
    assert not is_mounted(mountpoint)


async def test_a_failing_loop_is_told(open_mount: OpenMount, mountpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If pyfuse3's loop itself fails, `wait_unmounted` says so, and nothing stays mounted."""
    failing = trio.Event()
    original = pyfuse3.main

    async def main(min_tasks: int = 1, max_tasks: int = 99) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(original, min_tasks, max_tasks)
            await failing.wait()
            raise OSError(errno.EPROTO, "broken")

    monkeypatch.setattr(pyfuse3, "main", main)
    exports, _ = serving(MemoryDisk("disk", SIZE))
    async with open_mount(mountpoint, exports) as mount:
        failing.set()
        with trio.fail_after(DEADLINE_S), pytest.raises(FuseUnavailableError):
            await mount.wait_unmounted()
    assert not is_mounted(mountpoint)


async def test_open_files_are_counted(open_mount: OpenMount, mountpoint: Path) -> None:
    """A mount is busy while a file is open, and no longer when the kernel has released it."""
    exports, _ = serving(MemoryDisk("one", SIZE), MemoryDisk("two", SIZE))
    one, two = exports
    async with open_mount(mountpoint, exports) as mount:
        assert not mount.is_busy()
        fd = await in_thread(os.open, mountpoint / "one", os.O_RDONLY)
        assert mount.is_busy()
        assert mount.is_busy(one)
        assert not mount.is_busy(two)
        await in_thread(os.close, fd)
        await wait_until(lambda: not mount.is_busy())


async def test_ext4_on_a_loop_device(open_mount: OpenMount, mountpoint: Path, tmp_path: Path) -> None:
    """A file system on a loop device over the mount is consistent in the image."""
    path = tmp_path / "image"
    create_image(path, 32 * CHUNK_SIZE)
    inner = tmp_path / "inner"
    inner.mkdir()

    def run(*command: object) -> subprocess.CompletedProcess[str]:
        arguments = [str(part) for part in command]
        return subprocess.run(arguments, check=False, capture_output=True, text=True, timeout=DEADLINE_S)

    def work() -> str | None:
        setup = run("losetup", "--find", "--show", mountpoint / "disk")
        if setup.returncode:
            return f"no loop device: {setup.stderr.strip()}"
        device = setup.stdout.strip()
        try:
            made = run("mkfs.ext4", "-q", device)
            assert made.returncode == 0, made.stderr
            mounted = run("mount", "-t", "ext4", device, inner)
            if mounted.returncode:
                return f"no mount of a loop device: {mounted.stderr.strip()}"
            try:
                for n in range(50):
                    (inner / f"file-{n}").write_bytes(random.Random(n).randbytes(50_000))
            finally:
                assert run("umount", inner).returncode == 0
        finally:
            run("losetup", "--detach", device)
        return None

    with RawDisk("disk", path) as image:
        exports, _ = serving(image)
        async with open_mount(mountpoint, exports) as mount:
            reason = await trio.to_thread.run_sync(work)
            await wait_until(lambda: not mount.is_busy())
    if reason is not None:
        pytest.skip(reason)
    checked = await in_thread(run, "e2fsck", "-f", "-n", path)
    assert checked.returncode == 0, checked.stdout
    listed = await in_thread(run, "debugfs", "-R", "ls -p /", path)
    assert listed.stdout.count("file-") == 50
