"""Pages that the kernel could not write: a real block device whose store fails, and what we make of it.

The device is a loop device on a file of nbdfuse, which serves an image through nbdkit's `error` filter. Another program
has it open all the time, as somebody may, so that its pages stay in memory.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import pytest

from fusemig.disk.raw import RawDisk
from fusemig.errors import DiskError
from support.hosts import is_mounted, wait_until
from support.keeper import Keeper
from support.loops import loop_device, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(os.geteuid() != 0, reason="loop devices need root"),
    pytest.mark.skipif(shutil.which("nbdfuse") is None, reason="nbdfuse is not installed"),
]

MIB = 1 << 20
OLD, NEW = b"old".ljust(4096), b"new".ljust(4096)


class Failing(NamedTuple):
    """A block device, and the file that makes its store refuse writes while it exists."""

    path: Path
    flag: Path


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Failing]:
    """Give a device that holds `OLD`, durably."""
    with failing(tmp_path) as device:
        fd = os.open(device.path, os.O_RDWR)
        try:
            os.pwrite(fd, OLD, 0)
            os.fdatasync(fd)
            yield device
        finally:
            os.close(fd)


@contextmanager
def failing(directory: Path) -> Iterator[Failing]:
    """Give a device whose store can be made to fail."""
    image, store, flag = directory / "image", directory / "store", directory / "flag"
    store.touch()
    image.touch()
    os.truncate(image, 4 * MIB)
    nbd = ["nbdkit", "-s", "--exit-with-parent", "--filter=error", "file", str(image)]
    nbd += ["error-pwrite=EIO", "error-pwrite-rate=100%", f"error-file={flag}"]
    process = subprocess.Popen(
        ["nbdfuse", store, "--command", *nbd], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: is_mounted(store), "nbdfuse")
        with loop_device(store) as device:
            yield Failing(device, flag)
    finally:
        flag.unlink(missing_ok=True)
        run("umount", "-l", store, check=False)
        process.terminate()
        process.wait(20)


def lose_the_new(disk: RawDisk, device: Failing, n_flushes: int = 1) -> list[str]:
    """Write `NEW`, which the store refuses when it is flushed; return what became of the flushes, made at once."""
    device.flag.touch()
    disk.pwrite(NEW, 0)
    answers: list[str] = []

    def flush() -> None:
        try:
            disk.flush()
        except DiskError:
            answers.append("failed")
        else:
            answers.append("durable")

    threads = [threading.Thread(target=flush) for _ in range(n_flushes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    device.flag.unlink()
    return answers


def test_all_of_several_flushes_fail(device: Failing) -> None:
    """The kernel would fail one of them, and let the others succeed."""
    with RawDisk("vda", device.path) as disk:
        assert lose_the_new(disk, device, n_flushes=8) == ["failed"] * 8


def test_a_daemon_that_was_killed_as_it_heard_of_it_leaves_it_to_its_successor(device: Failing) -> None:
    """It could not say so: the kernel owes it to the open file that is kept, not to the one that was synced."""
    store = Keeper()
    first = RawDisk("vda", device.path, store=store)
    heirs = store.successor()  # what is kept before the failure is
    assert lose_the_new(first, device) == ["failed"]
    heir = RawDisk("vda", device.path, store=heirs)
    with pytest.raises(DiskError):
        heir.flush()
    heirs.ending()
    heir.close()
    store.ending()
    first.close()


def test_a_store_that_lost_nothing_is_inherited_and_flushed(device: Failing) -> None:
    """Every time."""
    store = Keeper()
    first = RawDisk("vda", device.path, store=store)
    first.pwrite(NEW, 0)
    first.flush()
    heirs = store.successor()
    heir = RawDisk("vda", device.path, store=heirs)
    for _ in range(2):
        heir.pwrite(NEW, 4096)
        heir.flush()
    heirs.ending()
    heir.close()
    store.ending()
    first.close()


def test_what_is_in_memory_only_is_not_taken_for_durable(device: Failing) -> None:
    """Served anew, the disk can be flushed, and its cache may still have what was lost: not once that was dropped."""
    with RawDisk("vda", device.path) as disk:
        assert lose_the_new(disk, device) == ["failed"]
    with RawDisk("vda", device.path) as disk:
        disk.drop_cache()
        assert disk.pread(4096, 0) == OLD
