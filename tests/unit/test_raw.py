"""RawDisk on real files: locks against other processes, what it opens, holes, a store that fails."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import pytest

from fusemig.core.units import MAX_DISK_SIZE
from fusemig.disk.raw import RawDisk, create_image
from fusemig.errors import ConfigError, DiskError
from support.keeper import Keeper

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20
IN_USE = r"is in use by another process \(a running QEMU or fusemig\); stop it first"
HOLD = """
import sys
from pathlib import Path
from fusemig.disk.raw import RawDisk
with RawDisk("a", Path(sys.argv[1]), read_only="ro" in sys.argv):
    print("open", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a sparse image of 4 MiB."""
    path = tmp_path / "image"
    create_image(path, 4 * MIB)
    return path


@contextmanager
def holder(path: Path, *args: str) -> Iterator[None]:
    """Have another process hold the image open."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, path, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
            yield
        finally:
            assert process.stdin is not None
            process.stdin.close()
            if process.wait(10):
                process.kill()


def test_what_is_written_is_read(path: Path) -> None:
    """Any offset and length, up to the last byte."""
    with RawDisk("a", path) as disk:
        assert disk.size == 4 * MIB
        disk.pwrite(b"abc", 4 * MIB - 3)
        disk.pwrite(memoryview(b"x" * MIB), 5)
        assert disk.pread(3, 4 * MIB - 3) == b"abc"
        assert disk.pread(MIB + 10, 0) == b"\0" * 5 + b"x" * MIB + b"\0" * 5
        disk.flush()
        assert disk.io_error is None
    assert path.read_bytes()[:6] == b"\0" * 5 + b"x"


def test_another_process_holds_it(path: Path) -> None:
    """Two writers refuse each other; two readers do not; a reader and a writer do; closing gives it free."""
    with holder(path):
        for read_only in (False, True):
            with pytest.raises(ConfigError, match=IN_USE):
                RawDisk("a", path, read_only=read_only)
    with holder(path, "ro"):
        RawDisk("a", path, read_only=True).close()
        with pytest.raises(ConfigError, match=IN_USE):
            RawDisk("a", path)
    RawDisk("a", path).close()


def test_the_lock_is_the_open_files_not_the_processs(path: Path) -> None:
    """Opening and closing the image elsewhere in this process does not drop the lock, nor allow a second one."""
    with RawDisk("a", path):
        path.read_bytes()
        with pytest.raises(ConfigError, match=IN_USE):
            RawDisk("b", path)
        with pytest.raises(ConfigError, match=IN_USE):
            RawDisk("b", path, read_only=True)


def qemu(*command: object) -> subprocess.CompletedProcess[str]:
    """Run a program of QEMU's."""
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=20, check=False)


@pytest.mark.qemu
@pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-io is not installed")
def test_qemu_and_we_refuse_each_others_images(path: Path) -> None:
    """QEMU's own locks keep us out, and ours keep QEMU out."""
    process = subprocess.Popen(
        ["qemu-io", "-f", "raw", str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write("length\n")
            assert "4 MiB" in process.stdout.readline()
            with pytest.raises(ConfigError, match=IN_USE):
                RawDisk("a", path)
        finally:
            process.stdin.write("quit\n")
            process.stdin.close()
            if process.wait(10):
                process.kill()
    with RawDisk("a", path):
        answer = qemu("qemu-io", "-f", "raw", "-c", "write 0 512", path)
        assert answer.returncode != 0
        assert "lock" in answer.stderr
    assert qemu("qemu-io", "-f", "raw", "-c", "write -P 7 0 512", path).returncode == 0
    with RawDisk("a", path) as disk:
        assert disk.pread(1, 0) == b"\7"


def test_a_link_is_not_followed(tmp_path: Path, path: Path) -> None:
    """The text says to name the image itself."""
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(ConfigError, match="it is a symbolic link: name the image itself"):
        RawDisk("a", link)


def test_what_is_no_image(tmp_path: Path) -> None:
    """Missing, a directory, a pipe, a character device: each is refused, and at once."""
    with pytest.raises(ConfigError, match="create it first"):
        RawDisk("a", tmp_path / "missing")
    with pytest.raises(ConfigError, match="Is a directory"):
        RawDisk("a", tmp_path)
    with pytest.raises(ConfigError, match="is neither a regular file nor a block device"):
        RawDisk("a", tmp_path, read_only=True)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ConfigError, match="is neither a regular file nor a block device"):
        RawDisk("a", pipe)


@pytest.mark.parametrize("size", [0, 1, 511, 513, MIB + 1, MAX_DISK_SIZE + 512])
def test_sizes_that_no_disk_has(tmp_path: Path, size: int) -> None:
    """The text says the size and what is allowed; nothing stays locked."""
    path = tmp_path / "image"
    path.touch()
    try:
        os.truncate(path, size)
    except OSError as exc:
        pytest.skip(f"this file system has no files of {size} bytes: {exc.strerror}")
    for _ in range(2):
        with pytest.raises(ConfigError, match=f"has {size} bytes: a disk is a multiple of 512 bytes"):
            RawDisk("a", path)


@pytest.mark.parametrize("size", [512, 1536, 5 * MIB + 1536])
def test_sizes_that_a_disk_has(tmp_path: Path, size: int) -> None:
    """Any multiple of a sector."""
    create_image(tmp_path / "image", size)
    with RawDisk("a", tmp_path / "image") as disk:
        assert disk.size == size
        assert sum(extent.length for extent in disk.extents(0, size)) == size


def test_an_image_is_created_sparse_and_never_over_another(tmp_path: Path) -> None:
    """The new file is its user's alone and costs nothing."""
    create_image(tmp_path / "image", 64 * MIB)
    status = (tmp_path / "image").stat()
    assert (status.st_size, status.st_mode & 0o777) == (64 * MIB, 0o600)
    assert status.st_blocks * 512 < MIB
    with pytest.raises(ConfigError, match=r"cannot create image .*: File exists"):
        create_image(tmp_path / "image", 512)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # a file system's own is no limit at all on tmpfs, XFS and Btrfs
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"cannot make image .* large"):
            create_image(tmp_path / "vast", 2 * MIB)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "vast").exists()


def test_holes_are_found_and_made(path: Path) -> None:
    """Extents tell data from holes, in order and without gaps; zeroing gives the space back."""
    with RawDisk("a", path) as disk:
        assert [tuple(extent) for extent in disk.extents(0, disk.size)] == [(0, 4 * MIB, False)]
        disk.pwrite(b"x" * MIB, MIB)
        disk.pwrite(b"y" * 4096, 3 * MIB)
        disk.flush()
        assert [tuple(extent) for extent in disk.extents(0, disk.size)] == [
            (0, MIB, False),
            (MIB, MIB, True),
            (2 * MIB, MIB, False),
            (3 * MIB, 4096, True),
            (3 * MIB + 4096, MIB - 4096, False),
        ]
        assert [tuple(extent) for extent in disk.extents(MIB + 512, 512)] == [(MIB + 512, 512, True)]
        blocks = path.stat().st_blocks
        disk.write_zeroes(MIB, MIB)
        assert disk.pread(MIB, MIB) == bytes(MIB)
        assert path.stat().st_blocks * 512 <= blocks * 512 - MIB
        assert path.stat().st_size == 4 * MIB
        disk.pwrite(b"z" * 8192, 0)
        disk.write_zeroes(100, 5000)
        assert disk.pread(8192, 0) == b"z" * 100 + bytes(5000) + b"z" * 3092


def test_a_read_that_must_not_sleep_is_right_or_refused(path: Path) -> None:
    """What `pread_nowait` promises is the content."""
    with RawDisk("a", path) as disk:
        disk.pwrite(b"abcd", 4096)
        buffer = bytearray(4)
        if disk.pread_nowait(memoryview(buffer), 4096):
            assert buffer == b"abcd"
        assert isinstance(disk.pwrite_may_sleep(4097, 100), bool)
        assert not disk.pwrite_may_sleep(4096, 4096)


def test_a_store_that_is_full(path: Path) -> None:
    """The guest sees the store's errno; the error has the request's place; what was there is kept."""
    with RawDisk("a", path) as disk:
        disk.pwrite(b"a" * 4096, 0)
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, old[1]))
        try:
            with pytest.raises(DiskError, match=r"^disk 'a' \(.*\): write at 1048064\+1024: File too large$") as caught:
                disk.pwrite(b"x" * 1024, MIB - 512)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        assert (caught.value.errno, caught.value.offset, caught.value.length) == (errno.EFBIG, MIB - 512, 1024)
        assert disk.pread(4096, 0) == b"a" * 4096
        assert disk.pread(1024, MIB - 512) == b"x" * 512 + bytes(512)


def test_an_image_that_became_shorter(path: Path) -> None:
    """EIO, never made-up zeros."""
    with RawDisk("a", path) as disk:
        os.truncate(path, MIB)
        with pytest.raises(DiskError, match="short read") as caught:
            disk.pread(1024, MIB - 512)
        assert caught.value.errno == errno.EIO


def test_a_read_only_image_is_not_written(path: Path) -> None:
    """Also not by a caller who should know."""
    with RawDisk("a", path, read_only=True) as disk, pytest.raises(DiskError) as caught:
        disk.pwrite(b"x", 0)
    assert caught.value.errno == errno.EBADF


FLUSH = """
import os, sys
from pathlib import Path
from fusemig.disk.raw import RawDisk
from fusemig.errors import DiskError
with RawDisk("a", Path(sys.argv[1])) as disk:
    for _ in range(3):
        disk.pwrite(b"x", 0)
        try:
            disk.flush()
            print("durable")
        except DiskError as exc:
            print(exc.errno, exc is disk.io_error)
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize(("when", "expected"), [("2", ["durable", "5 True", "5 True"]), ("9", ["durable"] * 3)])
def test_a_failed_fdatasync_stays_failed(tmp_path: Path, path: Path, when: str, expected: list[str]) -> None:
    """The kernel fails one fdatasync; it would let the next succeed, having dropped the pages: we do not."""
    trace = tmp_path / "trace"
    inject = ["-e", "trace=fdatasync", "-e", f"inject=fdatasync:error=EIO:when={when}"]
    command = ["strace", "-f", "-qq", "-o", str(trace), *inject, sys.executable, "-c", FLUSH, str(path)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if "ptrace" in answer.stderr and not answer.stdout:
        pytest.skip("strace may not trace here")
    assert answer.stdout.split("\n")[:-1] == expected, answer.stderr
    assert trace.read_text().count("fdatasync(") == (2 if when == "2" else 3)


class _Kernel:
    """An fdatasync that waits, and tells of lost pages once to each open file, as Linux does."""

    def __init__(self) -> None:
        self.n_calls = 0
        self.is_called = threading.Semaphore(0)
        self.may_end = threading.Semaphore(0)
        self.has_lost_pages = False
        self._lock = threading.Lock()

    def fdatasync(self, _fd: int) -> None:
        with self._lock:
            self.n_calls += 1
        self.is_called.release()
        assert self.may_end.acquire(timeout=60)
        with self._lock:
            has_lost_pages, self.has_lost_pages = self.has_lost_pages, False
        if has_lost_pages:
            raise OSError(errno.EIO, "lost pages")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> _Kernel:
    """Have every fdatasync of the test be answered by it."""
    kernel = _Kernel()
    monkeypatch.setattr(os, "fdatasync", kernel.fdatasync)
    return kernel


@contextmanager
def flushing(disk: RawDisk, n: int) -> Iterator[list[str]]:
    """Flush ``n`` times at once, until the block ends; yield what becomes of them."""
    answers: list[str] = []

    def flush() -> None:
        try:
            disk.flush()
        except DiskError as exc:
            answers.append(str(exc))
        else:
            answers.append("durable")

    threads = [threading.Thread(target=flush) for _ in range(n)]
    for thread in threads:
        thread.start()
    yield answers
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_no_flush_succeeds_beside_one_that_fails(path: Path, kernel: _Kernel) -> None:
    """The kernel tells one of two that pages were lost, and lets the other succeed: nobody is told "durable"."""
    kernel.has_lost_pages = True
    with RawDisk("a", path) as disk:
        with flushing(disk, 4) as answers:
            assert kernel.is_called.acquire(timeout=60)
            for _ in range(4):
                kernel.may_end.release()
        assert len(answers) == 4
        assert all("fdatasync at 0+" in answer for answer in answers), answers
        assert kernel.n_calls == 1


def test_flushes_that_wait_are_answered_by_one_sync_that_began_later(path: Path, kernel: _Kernel) -> None:
    """One that was under way when they were asked for may have passed their pages by already."""
    with RawDisk("a", path) as disk, flushing(disk, 1) as first:
        assert kernel.is_called.acquire(timeout=60)
        with flushing(disk, 5) as later:
            kernel.may_end.release()
            assert kernel.is_called.acquire(timeout=60)
            assert later == []
            for _ in range(5):
                kernel.may_end.release()
        assert first == ["durable"]
        assert later == ["durable"] * 5


def test_it_is_not_closed_under_a_sync_that_nobody_waits_for(path: Path, kernel: _Kernel) -> None:
    """What that finds is kept, and the image locked, until it has ended; to flush a closed one is an error only."""
    kernel.has_lost_pages = True
    disk = RawDisk("a", path)
    with flushing(disk, 1) as answers:
        assert kernel.is_called.acquire(timeout=60)
        closing = threading.Thread(target=disk.close)
        closing.start()
        closing.join(0.1)
        with pytest.raises(ConfigError, match="in use by another process"):
            RawDisk("a", path)
        kernel.may_end.release()
    closing.join(60)
    assert ["fdatasync at 0+" in answer for answer in answers] == [True]
    assert disk.io_error is not None
    disk = RawDisk("b", path)
    disk.close()
    with pytest.raises(DiskError, match="after it was closed"):
        disk.flush()
    assert disk.io_error is None


def test_a_sync_that_was_interrupted_proves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither failed nor durable: the next flush makes one of its own."""
    calls: list[int] = []

    def fdatasync(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    with RawDisk("a", path) as disk:
        with pytest.raises(KeyboardInterrupt):
            disk.flush()
        disk.flush()
        assert len(calls) == 2


@pytest.mark.parametrize("has_failed", [True, False])
def test_a_failed_sync_stays_failed_for_every_successor(
    path: Path, monkeypatch: pytest.MonkeyPatch, has_failed: bool
) -> None:
    """The open file that it inherits has told of the lost pages already; only served anew is the disk trusted again."""
    stores = [Keeper()]
    disks = [RawDisk("a", path, store=stores[0])]
    if has_failed:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", _fail)
            with pytest.raises(DiskError):
                disks[0].flush()
    for _ in range(2):
        stores.append(stores[-1].successor())
        disks.append(RawDisk("a", path, store=stores[-1]))
        if not has_failed:
            disks[-1].flush()
            continue
        with pytest.raises(DiskError, match="fdatasync, under an earlier daemon, at 0"):
            disks[-1].flush()
        assert disks[-1].io_error is not None
    for store, disk in zip(stores, disks, strict=True):
        store.ending()
        disk.close()
        assert store.kept == {}


@pytest.mark.parametrize("has_failed", [True, False])
def test_a_sync_that_failed_as_a_successor_started_in_vain_is_known_to_the_next(
    path: Path, monkeypatch: pytest.MonkeyPatch, has_failed: bool
) -> None:
    """The kernel has told the inherited file, which stays, and tells nobody again."""
    first = Keeper()
    with RawDisk("a", path, store=first):
        vain = first.successor()
        with RawDisk("a", path, store=vain) as disk, monkeypatch.context() as patch:
            if has_failed:
                patch.setattr(os, "fdatasync", _fail)
            with pytest.raises(DiskError) if has_failed else nullcontext():
                disk.flush()
        heirs = vain.successor()
        with RawDisk("a", path, store=heirs) as disk:
            assert (disk.io_error is not None) == has_failed
            heirs.ending()
        assert heirs.kept == {}
        first.ending()


def _fail(_fd: int) -> None:
    raise OSError(errno.EIO, "lost pages")


def test_closing_twice(path: Path) -> None:
    """Idempotent; a closed disk answers with an error, not with another file's bytes."""
    disk = RawDisk("a", path)
    disk.close()
    disk.close()
    with pytest.raises(DiskError) as caught:
        disk.pread(1, 0)
    assert caught.value.errno == errno.EBADF


def test_an_image_that_is_not_in_its_place_is_noticed(path: Path) -> None:
    """A daemon that is started later would find nothing there, or something else; guests of this one go on."""
    with RawDisk("vda", path) as disk:
        disk.check_in_place()
        moved = path.rename(path.with_name("moved"))
        with pytest.raises(DiskError, match=r"'vda' .*: the image was removed or replaced, serve it anew there"):
            disk.check_in_place()
        create_image(path, 4 * MIB)
        with pytest.raises(DiskError, match="removed or replaced"):
            disk.check_in_place()
        moved.replace(path)
        disk.check_in_place()
        path.unlink()
        with pytest.raises(DiskError, match="removed or replaced"):
            disk.check_in_place()
        disk.flush()


def test_an_image_that_was_cut_has_no_holes_and_no_sync(tmp_path: Path) -> None:
    """What is behind the new end was lost: nobody may take it for zeros, or for durable."""
    path = tmp_path / "image"
    path.write_bytes(b"x" * 8192)
    with RawDisk("vda", path) as disk:
        assert [extent.is_data for extent in disk.extents(0, 8192)] == [True]
        os.truncate(path, 4096)
        calls = (
            lambda: list(disk.extents(0, 8192)),
            disk.flush,
            lambda: disk.pread(512, 4096),
            lambda: disk.pwrite(b"y" * 512, 7680),
        )
        for call in calls:
            with pytest.raises(DiskError) as caught:
                call()
            assert caught.value.errno == errno.EIO
        with pytest.raises(DiskError, match=r"'vda' .*: the image was cut from 8192 to 4096 bytes, restore it"):
            disk.flush()
        assert "the image was cut" in str(disk.io_error)
        os.truncate(path, 8192)
        disk.flush()
        assert disk.io_error is None


def test_no_write_makes_a_cut_image_whole(tmp_path: Path) -> None:
    """Of any length, in any order: what a guest writes behind the cut is written, and no sync vouches for the rest."""
    path = tmp_path / "image"
    for offset in range(0, 8192, 512):
        for length in range(512, 8193 - offset, 512):
            path.write_bytes(b"x" * 8192)
            with RawDisk("vda", path) as disk:
                os.truncate(path, 4096)
                with pytest.raises(DiskError) if offset + length == 8192 else nullcontext():
                    disk.pwrite(b"y" * length, offset)
                with pytest.raises(DiskError, match="the image was cut"):
                    disk.flush()
                with pytest.raises(DiskError):
                    disk.pread(8192, 0)
                assert disk.io_error is not None
