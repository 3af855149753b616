"""One conformance suite: what a file does, a disk does through either lane.

The same seeded operations run on a plain file, through the pyfuse3 lane and through the data lane, each time against a
bytearray as the model. The client is a process of its own: a page fault on a mapping would hold our interpreter's lock
while it waits for us.
"""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio

from fusemig.core.units import CHUNK_SIZE
from fusemig.disk.memory import MemoryDisk
from fusemig.disk.raw import RawDisk, create_image
from fusemig.disk.tracked import TrackedDisk
from fusemig.fuse.export import Exports
from fusemig.fuse.lane_mount import open_data_lane_mount
from fusemig.fuse.mount import open_mount
from fusemig.fuse.preflight import MountOptions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from fusemig.disk.base import Disk

SIZE = 4 * CHUNK_SIZE + 4096
DEADLINE_S = 60.0

_CLIENT = """
import ctypes, errno, mmap, os, random, sys, threading

path, size, seed, n_steps, lane, n_threads = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5], int(sys.argv[6])
libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
KEEP, PUNCH, ZERO = 1, 2, 16
failures = []


class Client:
    # One thread's share of the file: [start, stop), page aligned, and its model.

    def __init__(self, number):
        share = size // n_threads // 4096 * 4096
        self.start = number * share
        self.stop = size if number == n_threads - 1 else self.start + share
        self.random = random.Random(f"{seed}/{number}")
        self.buffered = [os.open(path, os.O_RDWR), os.open(path, os.O_RDWR | self.random.choice([0, os.O_DSYNC]))]
        self.direct = os.open(path, os.O_RDWR | os.O_DIRECT)
        self.view = mmap.mmap(self.random.choice([self.buffered[0], self.direct]), size)
        self.page = mmap.mmap(-1, 1 << 20)
        self.model = bytearray(os.pread(self.buffered[0], self.stop - self.start, self.start))

    def span(self, unit=1, most=1 << 18):
        length = self.random.randrange(1, min(most, self.stop - self.start) // unit + 1) * unit
        offset = self.start + self.random.randrange((self.stop - self.start - length) // unit + 1) * unit
        return offset, length

    def put(self, offset, data):
        self.model[offset - self.start : offset - self.start + len(data)] = data

    def get(self, offset, length):
        return self.model[offset - self.start : offset - self.start + length]

    def write(self):
        offset, length = self.span()
        data = self.random.randbytes(length)
        assert os.pwrite(self.random.choice(self.buffered), data, offset) == length
        self.put(offset, data)

    def read(self):
        offset, length = self.span()
        assert os.pread(self.random.choice(self.buffered), length, offset) == self.get(offset, length)

    def direct_write(self):
        offset, length = self.span(512)
        data = self.random.randbytes(length)
        self.page[:length] = data
        assert os.pwritev(self.direct, [memoryview(self.page)[:length]], offset) == length
        self.put(offset, data)

    def direct_read(self):
        offset, length = self.span(512)
        assert os.preadv(self.direct, [memoryview(self.page)[:length]], offset) == length
        assert self.page[:length] == self.get(offset, length)

    def store(self):
        offset, length = self.span(most=1 << 16)
        data = self.random.randbytes(length)
        self.view[offset : offset + length] = data
        if self.random.random() < 0.5:  # unsynced stores must be seen through the other handles as well
            self.view.flush(offset // 4096 * 4096, offset + length - offset // 4096 * 4096)
        self.put(offset, data)

    def load(self):
        offset, length = self.span(most=1 << 16)
        assert self.view[offset : offset + length] == self.get(offset, length)

    def sync(self):
        self.random.choice([os.fsync, os.fdatasync])(self.random.choice([*self.buffered, self.direct]))

    def dsync_write(self):
        offset, length = self.span(most=8192)
        data = self.random.randbytes(length)
        assert os.pwritev(self.buffered[0], [data], offset, os.RWF_DSYNC) == length
        self.put(offset, data)

    def punch(self):
        offset, length = self.span()
        mode = self.random.choice([PUNCH | KEEP, ZERO, ZERO | KEEP])
        if libc.fallocate(self.buffered[0], mode, offset, length):
            # tmpfs and some others have no ZERO_RANGE; the pyfuse3 lane has no fallocate at all
            assert ctypes.get_errno() == errno.EOPNOTSUPP and lane != "data", (mode, ctypes.get_errno())
            return
        self.put(offset, bytes(length))

    def seek(self):
        # Where a hole is reported, the model must hold zeros: true for every store, however it allocates.
        os.fsync(self.buffered[0])
        # Between the two calls the kernel may write pages back, also on the plain file, and then both may name one
        # place; asked again it is one or the other.
        at, n_same = self.start, 0
        while at < self.stop:
            try:
                data = os.lseek(self.buffered[1], at, os.SEEK_DATA)
            except OSError as exc:
                assert exc.errno == errno.ENXIO
                data = size
            assert not any(self.get(at, min(data, self.stop) - at))
            if data >= self.stop:
                break
            at = os.lseek(self.buffered[1], data, os.SEEK_HOLE)
            n_same = n_same + 1 if at == data else 0
            assert at >= data
            assert n_same < 100

    def run(self):
        steps = [self.write, self.read, self.direct_write, self.direct_read, self.store, self.load]
        steps += [self.sync, self.dsync_write, self.seek]
        if lane != "pyfuse3":
            steps.append(self.punch)
        for number in range(n_steps):
            step = self.random.choice(steps)
            try:
                step()
            except BaseException as exc:
                failures.append((self.start, number, step.__name__, repr(exc)[:300]))
                return
        self.view.flush()
        os.fsync(self.buffered[0])
        for fd in (*self.buffered, self.direct):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.lseek(fd, 0, os.SEEK_SET)
        if os.pread(self.buffered[1], self.stop - self.start, self.start) != self.model:
            failures.append((self.start, "content differs at the end"))


clients = [Client(number) for number in range(n_threads)]
threads = [threading.Thread(target=client.run) for client in clients]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
if failures:
    sys.exit(str(failures))
sys.stdout.buffer.write(b"".join(client.model for client in clients))
"""


@asynccontextmanager
async def served(
    lane: str, image: Disk, mountpoint: Path, options: MountOptions | None = None, *, is_read_only: bool = False
) -> AsyncIterator[Path]:
    """Serve an image through a lane; give the file that guests see."""
    exports = Exports()
    exports.add(image.name, TrackedDisk(image), read_only=is_read_only)
    open_lane = open_data_lane_mount if lane == "data" else open_mount
    async with open_lane(mountpoint, exports, options):
        yield mountpoint / image.name


async def model_of(path: Path, seed: int, lane: str, *, n_steps: int, n_threads: int) -> bytes:
    """Run the client; return what its model holds at the end."""
    command = [sys.executable, "-c", _CLIENT, str(path), str(SIZE), str(seed), str(n_steps), lane, str(n_threads)]

    def run() -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(command, capture_output=True, timeout=DEADLINE_S, check=False)

    with trio.fail_after(DEADLINE_S + 5):
        result = await trio.to_thread.run_sync(run, abandon_on_cancel=True)
    assert result.returncode == 0, result.stderr.decode()[-1000:]
    return result.stdout


@pytest.mark.fuse
@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("lane", ["plain file", "pyfuse3", "data"])
async def test_random_operations_equal_the_model(
    lane: str, seed: int, n_threads: int, mountpoint: Path, tmp_path: Path
) -> None:
    """Every read sees what was written last, by whichever handle, and the image holds the model at the end."""
    image_path = tmp_path / "image"
    create_image(image_path, SIZE)
    if lane == "plain file":
        assert await model_of(image_path, seed, lane, n_steps=150, n_threads=n_threads) == image_path.read_bytes()
        return
    with RawDisk("disk", image_path) as image:
        async with served(lane, image, mountpoint) as path:
            model = await model_of(path, seed, lane, n_steps=150, n_threads=n_threads)
        assert image.pread(SIZE, 0) == model


@pytest.mark.fuse
@pytest.mark.parametrize("lane", ["pyfuse3", "data"])
async def test_random_operations_on_a_disk_in_memory(lane: str, mountpoint: Path) -> None:
    """The same on the reference disk, whose extents are exact."""
    image = MemoryDisk("disk", SIZE)
    async with served(lane, image, mountpoint) as path:
        model = await model_of(path, 3, lane, n_steps=100, n_threads=2)
    assert image.content == model


@pytest.mark.fuse
@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("lane", ["pyfuse3", "data"])
async def test_random_operations_through_the_write_back_cache(
    lane: str, n_threads: int, mountpoint: Path, tmp_path: Path
) -> None:
    """The kernel's write-back cache changes when writes arrive, and nothing of what any handle sees."""
    image_path = tmp_path / "image"
    create_image(image_path, SIZE)
    with RawDisk("disk", image_path) as image:
        async with served(lane, image, mountpoint, MountOptions(write_back=True)) as path:
            model = await model_of(path, 4, lane, n_steps=150, n_threads=n_threads)
        assert image.pread(SIZE, 0) == model


@pytest.mark.fuse
@pytest.mark.parametrize("is_read_only", [False, True], ids=["", "read-only"])
@pytest.mark.parametrize("lane", ["pyfuse3", "data"])
async def test_attributes(lane: str, is_read_only: bool, mountpoint: Path, tmp_path: Path) -> None:
    """Asked for anew, they are the export's and the image's."""
    atime_ns, mtime_ns = 1_600_000_000_000_000_001, 1_500_000_000_123_456_789

    def ask(path: Path) -> os.stat_result:
        os.utime(path, ns=(atime_ns, mtime_ns))
        fd = os.open(path, os.O_RDONLY)
        try:
            os.pread(fd, 1, 0)  # the kernel takes atime for changed, and asks
            return os.fstat(fd)
        finally:
            os.close(fd)

    image_path = tmp_path / "image"
    create_image(image_path, SIZE)
    with RawDisk("disk", image_path) as image:
        image.pwrite(bytes(8192), 4096)
        async with served(lane, image, mountpoint, is_read_only=is_read_only) as path:
            found = await trio.to_thread.run_sync(ask, path)
        assert stat.filemode(found.st_mode) == ("-r--------" if is_read_only else "-rw-------")
        assert (found.st_ino, found.st_nlink, found.st_rdev) == (2, 1, 0)
        assert (found.st_uid, found.st_gid) == (os.geteuid(), os.getegid())
        assert (found.st_size, found.st_blksize) == (SIZE, 4096)
        assert found.st_blocks == image.stat().st_blocks > 0
        assert (found.st_atime_ns, found.st_mtime_ns) == (atime_ns, mtime_ns)
        assert found.st_ctime_ns > mtime_ns


class UncleanDisk(MemoryDisk):
    """A disk whose image cannot be looked at once it is unclean."""

    is_unclean = False

    def stat(self) -> os.stat_result:
        """Fail, or say nothing of use."""
        if self.is_unclean:
            raise OSError(errno.EUCLEAN, "on purpose")
        return os.stat("/")


@pytest.mark.fuse
@pytest.mark.parametrize("lane", ["pyfuse3", "data"])
async def test_attributes_that_the_store_does_not_give(lane: str, mountpoint: Path) -> None:
    """The store's errno, and the file is served on."""
    image = UncleanDisk("disk", SIZE)

    def ask(path: Path) -> int | None:
        fd = os.open(path, os.O_RDWR)
        try:
            image.is_unclean = True
            os.pwrite(fd, b"x", 0)
            with pytest.raises(OSError, match="clean") as failed:
                os.fstat(fd)
            image.is_unclean = False
            assert os.fstat(fd).st_size == SIZE
            return failed.value.errno
        finally:
            os.close(fd)

    async with served(lane, image, mountpoint) as path:
        assert await trio.to_thread.run_sync(ask, path) == errno.EUCLEAN
    assert image.content[:1] == b"x"
