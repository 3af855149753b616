"""OverlayDisk and OverlayFile: what is read and copied, two writers of one block, flushes, files that do not fit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusemig.core.units import BLOCK_SIZE, CHUNK_SIZE
from fusemig.daemon.disk_spec import DiskSpec
from fusemig.daemon.served import ServedDisk
from fusemig.disk import overlay_file
from fusemig.disk.allocation import AllocationMap, BaseIdentity, map_size, write_header
from fusemig.disk.base import Extent
from fusemig.disk.fault import Fault, FaultDisk, Operation
from fusemig.disk.memory import MemoryDisk
from fusemig.disk.overlay import OverlayDisk
from fusemig.disk.overlay_file import OverlayFile, content_digest
from fusemig.disk.raw import RawDisk, create_image
from fusemig.disk.stamp import stamp_of
from fusemig.errors import ConfigError, DiskError, PeerBusyError, PeerRefusedError
from fusemig.fuse.export import Exports
from fusemig.records.epoch import EpochRecord, Ownership
from fusemig.wire import native
from support.crash import CrashDisk, Fate
from support.keeper import Keeper
from support.lost_pages import lost_pages

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusemig.disk.base import Disk
    from fusemig.succession.fdstore import FdStore

SIZE = 64 * BLOCK_SIZE + 512
HUGE = 15 << 40
IDENTITY = BaseIdentity(size=SIZE, digest="", path="base")


def base_disk(size: int = SIZE) -> MemoryDisk:
    """Return a base full of bytes that are no zeros."""
    base = MemoryDisk("d", size)
    base.content[:] = bytes(1 + at % 251 for at in range(size))
    return base


def lay(image: Disk, base: Disk, store: Disk | None = None) -> OverlayDisk:
    """Return a fresh overlay of stores in memory."""
    if store is None:
        store = MemoryDisk("d", map_size(image.size))
    write_header(store, image.size, IDENTITY)
    allocation = AllocationMap(store, image.size, "boot")
    allocation.begin(image.flush, "")
    return OverlayDisk(image, base, allocation)


@given(
    st.lists(st.tuples(st.integers(0, 70_000), st.integers(1, 40_000)), max_size=6),
    st.lists(st.integers(0, 70_000), min_size=1, max_size=4),
)
def test_the_next_block_that_is_not_held(held: list[tuple[int, int]], questions: list[int]) -> None:
    """Whatever is held before and behind it, over pages of the map that are full, empty and mixed."""
    blocks = 2 * 32_768 + 4_465
    store = MemoryDisk("d", map_size(blocks * BLOCK_SIZE))
    write_header(store, blocks * BLOCK_SIZE, BaseIdentity(size=SIZE, digest="", path="base"))
    allocation = AllocationMap(store, blocks * BLOCK_SIZE, "boot")
    model = bytearray(blocks)
    for first, count in held:
        if first < blocks:
            stop = min(blocks, first + count)
            allocation.add(first, stop)
            model[first:stop] = b"\1" * (stop - first)
    for first in [*questions, 0, 32_768]:
        expected = model.find(0, first)
        assert allocation.next_clear(first) == (blocks if expected < 0 else expected)


def test_a_partial_write_copies_the_rest_of_its_block() -> None:
    """The image holds the whole block, and nothing of others."""
    base = base_disk()
    image = MemoryDisk("d", SIZE)
    disk = lay(image, base)
    disk.pwrite(b"xy", BLOCK_SIZE + 10)
    expected = bytearray(base.content)
    expected[BLOCK_SIZE + 10 : BLOCK_SIZE + 12] = b"xy"
    assert disk.pread(SIZE, 0) == expected
    assert list(disk.allocated(0, SIZE)) == [(BLOCK_SIZE, BLOCK_SIZE)]
    assert disk.allocated_bytes == BLOCK_SIZE
    assert image.content == bytes(BLOCK_SIZE) + expected[BLOCK_SIZE : 2 * BLOCK_SIZE] + bytes(SIZE - 2 * BLOCK_SIZE)


def test_the_short_last_block() -> None:
    """It is copied as far as the disk goes."""
    base = base_disk()
    image = MemoryDisk("d", SIZE)
    disk = lay(image, base)
    disk.pwrite(b"z", SIZE - 1)
    assert disk.pread(512, SIZE - 512) == base.content[-512:-1] + b"z"
    assert len(image.content) == SIZE
    assert list(disk.allocated(0, SIZE)) == [(SIZE - 512, 512)]


def test_zeroing_never_exposes_the_base() -> None:
    """Whole blocks become holes of the overlay; of blocks at the edges the rest is copied."""
    base = base_disk()
    image = MemoryDisk("d", SIZE)
    image.content[:] = b"\xee" * SIZE  # what a write that failed may have left
    disk = lay(image, base)
    disk.write_zeroes(100, 3 * BLOCK_SIZE)
    expected = bytearray(base.content)
    expected[100 : 100 + 3 * BLOCK_SIZE] = bytes(3 * BLOCK_SIZE)
    assert disk.pread(SIZE, 0) == expected
    assert list(disk.allocated(0, SIZE)) == [(0, 4 * BLOCK_SIZE)]
    assert Extent(BLOCK_SIZE, 2 * BLOCK_SIZE, is_data=False) in list(disk.extents(0, SIZE))


def test_a_base_that_is_smaller() -> None:
    """Beyond its end the disk reads as zeros until it is written, also inside a block."""
    base = base_disk(3 * BLOCK_SIZE + 512)
    disk = lay(MemoryDisk("d", SIZE), base)
    expected = bytearray(base.content.ljust(SIZE, b"\0"))
    assert disk.pread(SIZE, 0) == expected
    assert list(disk.extents(0, SIZE)) == [
        Extent(0, base.size, is_data=True),
        Extent(base.size, SIZE - base.size, is_data=False),
    ]
    disk.pwrite(b"abc", base.size - 1)
    expected[base.size - 1 : base.size + 2] = b"abc"
    assert disk.pread(SIZE, 0) == expected


def test_a_base_that_is_larger() -> None:
    """Part of it could not be seen."""
    with pytest.raises(ConfigError, match="at least as large as its base"):
        lay(MemoryDisk("d", SIZE), base_disk(SIZE + 512))


def test_reads_of_holes_are_one_call_to_the_base() -> None:
    """A read of any length that the overlay holds nothing of falls through as it is; so does one that it all holds."""
    base, image = FaultDisk(base_disk()), FaultDisk(MemoryDisk("d", SIZE))
    disk = lay(image, base)
    disk.pread(SIZE, 0)
    assert (base.n_requests(Operation.READ), image.n_requests(Operation.READ)) == (1, 0)
    disk.pwrite(bytes(SIZE), 0)
    disk.pread(SIZE, 0)
    assert (base.n_requests(Operation.READ), image.n_requests(Operation.READ)) == (1, 1)


def test_a_read_that_would_sleep_promises_nothing() -> None:
    """Whichever part of it it is."""
    for layer in ("base", "image"):
        base, image = FaultDisk(base_disk()), FaultDisk(MemoryDisk("d", SIZE))
        disk = lay(image, base)
        disk.pwrite(b"x", 0)
        buffer = memoryview(bytearray(3 * BLOCK_SIZE))
        assert disk.pread_nowait(buffer, 0)
        (base if layer == "base" else image).add(Fault(frozenset({Operation.READ})))
        assert not disk.pread_nowait(buffer, 0)


class SlowDisk(MemoryDisk):
    """A base that gives others a turn before it answers."""

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Copy out, later."""
        threading.Event().wait(0.001)
        super().pread_into(buffer, offset)


def test_writers_of_one_block_lose_nothing() -> None:
    """Each writes its own sectors of the same blocks: all of them are there at the end."""
    base = SlowDisk("d", SIZE)
    base.content[:] = base_disk().content
    disk = lay(MemoryDisk("d", SIZE), base)
    n_writers = 8
    start = threading.Barrier(n_writers)
    failures: list[Exception] = []

    def write(number: int) -> None:
        try:
            start.wait()
            for block in range(48):
                at = block * BLOCK_SIZE + number * 512
                if number == 3:
                    disk.write_zeroes(at, 512)
                else:
                    disk.pwrite(bytes([number]) * 256, at)
        except Exception as exc:
            failures.append(exc)
            raise

    threads = [threading.Thread(target=write, args=(number,)) for number in range(n_writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    expected = bytearray(base.content)
    for block in range(48):
        for number in (0, 1, 2, 4, 5, 6, 7):
            at = block * BLOCK_SIZE + number * 512
            expected[at : at + 256] = bytes([number]) * 256
        at = block * BLOCK_SIZE + 3 * 512
        expected[at : at + 512] = bytes(512)
    assert disk.pread(SIZE, 0) == expected
    assert not disk._claims


@pytest.mark.parametrize("operation", [Operation.READ, Operation.WRITE])
def test_a_write_that_fails_allocates_nothing(operation: Operation) -> None:
    """Whether the base cannot be read or the image not be written: the block is the base's as before."""
    base, image = FaultDisk(base_disk()), FaultDisk(MemoryDisk("d", SIZE))
    disk = lay(image, base)
    fault = Fault(frozenset({operation}), torn_bytes=1000)
    (base if operation is Operation.READ else image).add(fault)
    with pytest.raises(DiskError):
        disk.pwrite(b"xy", 10)
    assert list(disk.allocated(0, SIZE)) == []
    assert disk.pread(SIZE, 0) == base_disk().content
    disk.pwrite(b"xy", 10)  # the claim was given back
    assert disk.pread(2, 10) == b"xy"


def test_a_full_store_of_the_map() -> None:
    """The write fails, the block stays the base's; a flush that could not write the map is made good by the next."""
    store = FaultDisk(MemoryDisk("d", map_size(SIZE)))
    disk = lay(MemoryDisk("d", SIZE), base_disk(), store)
    fault = store.add(Fault(frozenset({Operation.WRITE}), errno=28))
    with pytest.raises(DiskError, match="No space left"):
        disk.pwrite(b"xy", 10)
    assert fault.is_over
    assert disk.pread(2, 10) == base_disk().content[10:12]
    disk.pwrite(b"xy", 10)
    store.add(Fault(frozenset({Operation.WRITE}), errno=28))
    with pytest.raises(DiskError):
        disk.flush()
    assert str(disk.io_error) == str(disk._flush_error) != "None"
    disk.flush()
    assert not disk.io_error
    assert AllocationMap(store, SIZE, "another boot").mask(0, 8) == 1


@pytest.mark.parametrize("where", ["image", "map"])
def test_a_failed_sync_stays_failed(where: str) -> None:
    """Of the data or of the map."""
    image, store = FaultDisk(MemoryDisk("d", SIZE)), FaultDisk(MemoryDisk("d", map_size(SIZE)))
    disk = lay(image, base_disk(), store)
    disk.pwrite(b"x", 0)
    (image if where == "image" else store).add(Fault(frozenset({Operation.FLUSH})))
    for _ in range(3):
        with pytest.raises(DiskError):
            disk.flush()
    assert disk.io_error is not None
    assert AllocationMap(store, SIZE, "another boot").mask(0, 8) == int(where == "map")


@pytest.mark.parametrize("boot", ["boot", "another boot"])
def test_a_map_that_is_in_memory_only_is_not_taken_for_durable(boot: str) -> None:
    """Served anew after a sync of the map failed: what a guest writes and syncs then has its bits in the store.

    After another boot that is what the store has, which is not written again.
    """
    rng = random.Random(1)
    image, store = CrashDisk("d", SIZE, Fate(), rng), CrashDisk("d", map_size(SIZE), Fate(), rng)
    disk = lay(image, base_disk(), store)
    disk.pwrite(b"early", 0)
    store.fail_to_write()
    with pytest.raises(DiskError):
        disk.flush()
    if boot != "boot":
        store.lose_power()
    again = AllocationMap(store, SIZE, boot)
    again.begin(image.flush, "")
    disk = OverlayDisk(image, base_disk(), again)
    disk.pwrite(b"later", 0)
    disk.flush()
    store.lose_power()
    image.lose_power()
    after = OverlayDisk(image, base_disk(), AllocationMap(store, SIZE, "the last boot"))
    assert after.pread(5, 0) == b"later"


def test_an_inherited_map_that_was_synced_is_not_written_again() -> None:
    """Guests wait for a successor, and a sync through the open file that it inherits would have failed."""
    store = FaultDisk(MemoryDisk("d", map_size(SIZE)))
    disk = lay(MemoryDisk("d", SIZE), base_disk(), store)
    disk.pwrite(b"early", 0)
    disk.flush()
    for is_inherited, n_writes in ((True, 2), (False, 3)):  # the recent map is emptied, the session written
        count = store.add(Fault(frozenset({Operation.WRITE, Operation.ZERO}), nth=10**6))
        AllocationMap(store, SIZE, "boot", is_inherited=is_inherited).begin(disk.image.flush, "")
        assert count.n_seen == n_writes


def test_what_is_written_during_a_flush_is_not_in_it() -> None:
    """A block that comes while the data is being synced must not be durable in the map: its data may not be."""
    rng = random.Random(1)
    rng.choice = lambda states: states[0]  # type: ignore[method-assign,assignment]
    image, store = (CrashDisk("d", size, Fate(), rng) for size in (SIZE, map_size(SIZE)))
    disk = lay(image, base_disk(), store)
    sync = image.flush

    def sync_and_write() -> None:
        sync()
        image.flush = sync  # type: ignore[method-assign]
        disk.pwrite(b"late", 10 * BLOCK_SIZE)

    disk.pwrite(b"early", 9 * BLOCK_SIZE)
    image.flush = sync_and_write  # type: ignore[method-assign]
    disk.flush()
    image.lose_power()
    store.lose_power()
    again = OverlayDisk(image, base_disk(), AllocationMap(store, SIZE, "another boot"))
    assert again.pread(5, 9 * BLOCK_SIZE) == b"early"
    assert again.pread(4, 10 * BLOCK_SIZE) == base_disk().content[10 * BLOCK_SIZE :][:4]


def test_data_is_synced_before_the_map() -> None:
    """In this order, and the map only when it has something new."""
    calls: list[str] = []

    class Noting(MemoryDisk):
        def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
            calls.append(f"write {self.name}")
            super().pwrite(data, offset)

        def flush(self) -> None:
            calls.append(f"sync {self.name}")

    disk = lay(Noting("image", SIZE), base_disk(), Noting("map", map_size(SIZE)))
    calls.clear()
    disk.pwrite(b"x", 0)
    disk.flush()
    disk.flush()
    disk.pwrite(b"y", 0)
    expected = ["write image", "write map", "sync image", "write map", "sync map", "sync image", "write image"]
    assert calls == expected


def test_forget() -> None:
    """The disk is its base again, also after a crash of the host."""
    image, store = MemoryDisk("d", SIZE), MemoryDisk("d", map_size(SIZE))
    disk = lay(image, base_disk(), store)
    disk.pwrite(b"x" * 10_000, 5)
    disk.flush()
    disk.forget()
    assert disk.pread(SIZE, 0) == base_disk().content
    assert disk.allocated_bytes == 0
    assert not any(image.content)
    for boot in ("boot", "another boot"):
        assert AllocationMap(store, SIZE, boot).n_allocated == 0


@given(st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 5 * BLOCK_SIZE), st.sampled_from("wzfr"))))
def test_like_a_plain_disk(calls: list[tuple[int, int, str]]) -> None:
    """Whatever is written, zeroed and flushed, it reads as a bytearray that began as the base."""
    base = base_disk(SIZE // 2 // 512 * 512)
    disk = lay(MemoryDisk("d", SIZE), base)
    model = bytearray(base.content.ljust(SIZE, b"\0"))
    for number, (offset, length, kind) in enumerate(calls):
        end = min(SIZE, offset + length)
        if kind == "w":
            model[offset:end] = bytes([number % 256]) * (end - offset)
            disk.pwrite(model[offset:end], offset)
        elif kind == "z":
            model[offset:end] = bytes(end - offset)
            disk.write_zeroes(offset, end - offset)
        elif kind == "f":
            disk.flush()
        else:
            assert disk.pread(end - offset, offset) == model[offset:end]
            assert sum(extent.length for extent in disk.extents(offset, end - offset)) == end - offset
    assert disk.pread(SIZE, 0) == model


# Files


def make_base(directory: Path, size: int = 3 * CHUNK_SIZE) -> Path:
    """Store a base with a hole in its middle; its times are old enough to be trusted."""
    path = directory / "golden.img"
    create_image(path, size)
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), random.Random(1).randbytes(CHUNK_SIZE), 0)
        os.pwrite(file.fileno(), b"end", size - 3)
    return path


@pytest.fixture(autouse=True)
def _trust_young_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let times count at once: the tests' bases are younger than two seconds."""
    monkeypatch.setattr(overlay_file, "_YOUNG_NS", 0)


def open_file(directory: Path, *, read_only: bool = False, store: FdStore | None = None) -> OverlayFile:
    """Open the overlay of a directory."""
    image = directory / "overlay.img"
    map_path = directory / "overlay.img.fusemig-map"
    return OverlayFile("vda", image, directory / "golden.img", map_path, read_only=read_only, store=store)


def test_files(tmp_path: Path) -> None:
    """A new overlay is as large as its base and takes no space; what is written is there the next time."""
    content = bytearray(make_base(tmp_path).read_bytes())
    with open_file(tmp_path) as disk:
        assert disk.size == len(content)
        assert disk.pread(disk.size, 0) == content
        disk.pwrite(b"new", 4095)
        disk.write_zeroes(0, 100)
    content[4095:4098] = b"new"
    content[:100] = bytes(100)
    assert (tmp_path / "overlay.img").stat().st_blocks * 512 == 2 * BLOCK_SIZE
    for read_only in (False, True):
        with open_file(tmp_path, read_only=read_only) as disk:
            assert disk.pread(disk.size, 0) == content
            assert disk.allocated_bytes == 2 * BLOCK_SIZE
            assert [extent.is_data for extent in disk.extents(0, disk.size)][1:] == [True, False, True]
    assert (tmp_path / "golden.img").read_bytes() != content
    # A prepared image may be larger than its base.
    for name in ("overlay.img", "overlay.img.fusemig-map"):
        (tmp_path / name).unlink()
    create_image(tmp_path / "overlay.img", 2 * len(content))
    with open_file(tmp_path) as disk:
        assert disk.pread(disk.size, 0) == (tmp_path / "golden.img").read_bytes() + bytes(len(content))


@pytest.mark.parametrize("lost", ["overlay.img", "overlay.img.fusemig-map"])
@pytest.mark.parametrize("told", ["before the kill", "at the start"])
def test_a_failed_sync_does_not_keep_a_successor_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str, told: str
) -> None:
    """Guests get what they wrote, and the error from every flush."""
    make_base(tmp_path)
    stores = [Keeper()]
    disks = [open_file(tmp_path, store=stores[0])]
    disks[0].pwrite(b"first", 10)
    if told == "before the kill":
        with lost_pages(monkeypatch, tmp_path / lost), pytest.raises(DiskError):
            disks[0].flush()
    for number in range(1, 4):
        stores.append(stores[-1].successor())
        with lost_pages(monkeypatch, tmp_path / lost) if told == "at the start" and number == 1 else nullcontext():
            disk = open_file(tmp_path, store=stores[-1])
        disks.append(disk)
        assert lost in str(disk.io_error)
        assert disk.pread(5, 10) == b"first"
        assert disk.allocated_bytes == number * BLOCK_SIZE
        for block in (0, number):  # one that it holds, and one that it does not
            disk.pwrite(b"x", block * BLOCK_SIZE)
            with pytest.raises(DiskError):
                disk.flush()
    for store, disk in zip(stores, disks, strict=True):
        store.ending()
        disk.close()


def test_a_sync_that_fails_before_the_first_session_of_a_boot_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the recent map holds is of another boot, so there is nothing to go on with."""
    make_base(tmp_path)
    with open_file(tmp_path) as disk:
        disk.pwrite(b"x", 0)
    monkeypatch.setattr(overlay_file, "boot_id", lambda: "another")
    with (
        lost_pages(monkeypatch, tmp_path / "overlay.img.fusemig-map"),
        pytest.raises(DiskError, match="fdatasync"),
    ):
        open_file(tmp_path)


def test_a_base_that_has_changed(tmp_path: Path) -> None:
    """In its contents or its size: refused, and taken again once it is restored, wherever it lies."""
    base = make_base(tmp_path)
    content = base.read_bytes()
    open_file(tmp_path).close()
    base.write_bytes(content[:-1] + b"?")
    with pytest.raises(
        ConfigError, match=r"golden\.img.*is not the one that .*overlay\.img was made over.*contents dif"
    ):
        open_file(tmp_path)
    base.write_bytes(content + bytes(512))
    with pytest.raises(ConfigError, match=f"it has {len(content) + 512} bytes, not {len(content)}"):
        open_file(tmp_path)
    base.unlink()
    with pytest.raises(ConfigError, match="does not exist"):
        open_file(tmp_path)
    base.write_bytes(content)  # without the hole, in another inode
    open_file(tmp_path).close()


def counted_digests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the digest of each base that is read as a whole from now on."""
    digests: list[str] = []

    def count(disk: Disk, between: Callable[[], None] = lambda: None) -> str:
        digests.append(content_digest(disk, between))
        return digests[-1]

    monkeypatch.setattr(overlay_file, "content_digest", count)
    return digests


def test_an_unchanged_base_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its times and inode tell; once they differ, its contents do."""
    base = make_base(tmp_path)
    open_file(tmp_path).close()
    digests = counted_digests(monkeypatch)
    open_file(tmp_path).close()
    assert len(digests) == 0
    os.utime(base)
    for _ in range(2):
        open_file(tmp_path).close()
    assert len(digests) == 1
    monkeypatch.setattr(overlay_file, "_YOUNG_NS", 1 << 62)
    open_file(tmp_path).close()
    assert len(digests) == 2, "times that are too young are not trusted"


def test_a_successor_does_not_read_a_base_that_nobody_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guests wait for it. Whoever opens the overlay anew does read it, and a successor whose base was replaced."""
    base = make_base(tmp_path)
    digests = counted_digests(monkeypatch)
    monkeypatch.setattr(overlay_file, "_YOUNG_NS", 1 << 62)
    stores = [Keeper()]
    disks = [open_file(tmp_path, store=stores[0])]

    def succeed() -> int:
        before = len(digests)
        stores.append(stores[-1].successor())
        disks.append(open_file(tmp_path, store=stores[-1]))
        return len(digests) - before

    assert succeed() == 0, "times that were too young"
    monkeypatch.setattr(overlay_file, "_YOUNG_NS", 0)
    base.chmod(0o400)
    os.link(base, tmp_path / "other name")
    assert [succeed(), succeed()] == [0, 0], "another time of change, by no write"
    os.utime(base)
    assert [succeed(), succeed()] == [0, 0], "another time of the last write"
    before = len(digests)
    assert [one.is_base_proved for one in disks[-3:]] == [True, False, False]
    disks[-1].prove_base()
    assert (disks[-1].is_base_proved, disks[-1].io_error, len(digests)) == (True, None, before + 1)
    found = base.stat()
    base.rename(tmp_path / "moved")
    shutil.copyfile(tmp_path / "moved", base)
    os.utime(base, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert [succeed(), succeed()] == [1, 0], "another inode"
    status = base.stat()
    kept_as, last = f"base-vda-{status.st_dev:x}-{status.st_ino:x}", stores[-1]
    lost = last.kept.pop(kept_as)
    base.chmod(0o600)
    assert [succeed(), succeed()] == [1, 0], "it had not been kept: who knows who wrote it meanwhile"
    last.kept[kept_as] = lost
    base.chmod(0o644)
    assert succeed() == 0
    for store, disk in zip(stores, disks, strict=True):
        store.ending()
        disk.close()
        # That one is kept still which was moved away.
        assert all(os.path.samestat(os.fstat(fd), found) for fd in store.kept.values())
    before = len(digests)
    first = Keeper()
    first.has_mount = False
    open_file(tmp_path, store=first)  # and it is killed before it has a mount
    second = first.successor()
    base.chmod(0o600)
    second.has_mount = False
    with open_file(tmp_path, store=second):
        assert len(digests) == before + 2, "nobody was served"
    second.ending()


def test_overlays_of_one_daemon_over_one_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has the base kept for its own successor, and gives up no other's."""
    base, store = make_base(tmp_path), Keeper()

    def open_both(store: Keeper) -> list[OverlayFile]:
        paths = {name: tmp_path / f"{name}.img" for name in ("vda", "vdb")}
        return [OverlayFile(name, path, base, path.with_suffix(".map"), store=store) for name, path in paths.items()]

    disks = open_both(store)
    base.chmod(0o400)
    monkeypatch.delattr(overlay_file, "content_digest")
    heir = store.successor()
    heirs = open_both(heir)
    for one, owner in ((heirs, heir), (disks, store)):
        owner.ending()
        for number, disk in enumerate(one, 1):
            disk.close()
            assert len(owner.kept) == 3 * (2 - number)


def test_a_base_that_was_written_is_an_error_once_a_successor_has_read_it(tmp_path: Path) -> None:
    """Under the same inode, which no lock keeps everybody from. Guests are served before that; later it is refused."""
    base = make_base(tmp_path)
    store = Keeper()
    open_file(tmp_path, store=store)
    with base.open("r+b") as file:
        file.write(b"?")
    os.utime(base, ns=(0, 0))
    heirs = [store]
    for _ in range(2):
        heirs.append(heirs[-1].successor())
        disk = open_file(tmp_path, store=heirs[-1])
        disk.pwrite(b"guest", 0)
        disk.flush()
        with pytest.raises(_EndedError):
            disk.prove_base(_end)
        assert (disk.is_base_proved, disk.io_error) == (False, None)
        disk.prove_base()
        assert "its contents differ" in str(disk.io_error)
        with pytest.raises(DiskError, match="its contents differ"):
            disk.flush()
        assert disk.pread(5, 0) == b"guest"
    with base.open("r+b") as file:
        file.truncate(base.stat().st_size - 512)
    with pytest.raises(ConfigError, match="it has"):
        open_file(tmp_path, store=heirs[-1].successor())


def test_a_base_that_cannot_be_read_is_an_error_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its guests read of it is not known to be right, and never will be by this daemon."""
    base, store = make_base(tmp_path), Keeper()
    with open_file(tmp_path, store=store):
        os.utime(base, ns=(0, 0))
        heir = store.successor()
        with open_file(tmp_path, store=heir) as disk:

            def fail(*_: object) -> str:
                raise DiskError(5, "a bad sector", 0, 512)

            monkeypatch.setattr(overlay_file, "content_digest", fail)
            with pytest.raises(DiskError, match="a bad sector"):
                disk.prove_base()
            assert not disk.is_base_proved
            assert "a bad sector" in str(disk.io_error)
            with pytest.raises(DiskError, match="a bad sector"):
                disk.flush()
        heir.ending()
    store.ending()


def test_nothing_comes_onto_a_base_that_is_not_read_yet(tmp_path: Path) -> None:
    """A destination's successor does not take its base for the source's, nor the image for what it once released."""
    base, store = make_base(tmp_path), Keeper()
    spec = DiskSpec("vda", tmp_path / "overlay.img", base=base)
    offer = native.DiskOffer("vda", base.stat().st_size, "image", 3, since="5e55")
    with closing(ServedDisk(spec, Exports(), None, is_incoming=True, store=store)) as served:
        stamp = stamp_of(spec.path.stat())
        released = EpochRecord(
            state=Ownership.RELEASED, image_id="image", epoch=2, session="5e55", peer="peer", stamp=stamp
        )
        served.epoch_file.write(released)
        assert served.is_as_released(offer)
        os.utime(base, ns=(0, 0))
        heir = store.successor()
        with closing(ServedDisk(spec, Exports(), None, is_incoming=True, store=heir)) as served:
            image = served.image
            assert isinstance(image, OverlayFile)
            thin = msgspec.structs.replace(
                offer, base=native.SharedBase(image.shared_base.size, image.shared_base.digest)
            )
            served.epoch_file.write(msgspec.structs.replace(released, stamp=stamp_of(spec.path.stat())))
            served.check_offer(offer)
            with pytest.raises(PeerBusyError, match="is being read"):
                served.check_offer(thin)
            assert not served.is_as_released(offer)
            image.prove_base()
            served.check_offer(thin)
            assert served.is_as_released(offer)
            image.is_base_proved = False
            image.distrust(DiskError(5, "its contents differ", 0, 512))
            with pytest.raises(PeerRefusedError, match="its contents differ"):
                served.check_offer(thin)
        heir.ending()
    store.ending()


class _EndedError(Exception):
    pass


def _end() -> None:
    raise _EndedError


def test_the_digest_is_of_the_contents(tmp_path: Path) -> None:
    """Holes and zeros are the same; what moved or changed is not."""
    content = make_base(tmp_path).read_bytes()
    digests = []
    for changed in (content, content[:-1] + b"?", content[CHUNK_SIZE:] + content[:CHUNK_SIZE], content + bytes(512)):
        disk = MemoryDisk("d", len(changed))
        disk.content[:] = changed
        digests.append(content_digest(disk))
    with RawDisk("d", tmp_path / "golden.img", read_only=True) as disk_with_holes:
        assert content_digest(disk_with_holes) == digests[0]
    assert len(set(digests)) == 3  # zeros at the end are told by the size


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    """Each is refused with what to do, and nothing of them is changed."""
    base = make_base(tmp_path)
    image, store = tmp_path / "overlay.img", tmp_path / "overlay.img.fusemig-map"
    image.write_bytes(b"x" * CHUNK_SIZE * 3)
    with pytest.raises(ConfigError, match="so it is no overlay"):
        open_file(tmp_path)
    image.write_bytes(b"")
    os.truncate(image, CHUNK_SIZE)
    with pytest.raises(ConfigError, match="at least as large as its base"):
        open_file(tmp_path)
    assert not store.exists()
    image.unlink()
    with pytest.raises(ConfigError, match="cannot open image"):
        open_file(tmp_path, read_only=True)
    open_file(tmp_path).close()
    os.truncate(image, 4 * CHUNK_SIZE)
    with pytest.raises(ConfigError, match="do not belong together"):
        open_file(tmp_path)
    image.unlink()
    with pytest.raises(ConfigError, match="delete the map too"):
        open_file(tmp_path)
    store.unlink()
    open_file(tmp_path).close()
    with store.open("r+b") as file:
        file.write(b"?" * 100)
    with pytest.raises(ConfigError, match="is damaged"):
        open_file(tmp_path)
    store.unlink()
    image.unlink()
    os.link(base, image)
    with pytest.raises(ConfigError, match="cannot be its own base"):
        open_file(tmp_path)


def test_locks(tmp_path: Path) -> None:
    """Two overlays share a base, nobody writes to it meanwhile, and nobody else opens the overlay."""
    base = make_base(tmp_path)
    with open_file(tmp_path), RawDisk("other", base, read_only=True):
        with pytest.raises(ConfigError, match="in use by another process"):
            RawDisk("other", base)
        with pytest.raises(ConfigError, match="in use by another process"):
            open_file(tmp_path)
    with RawDisk("other", base), pytest.raises(ConfigError, match="in use by another process"):
        open_file(tmp_path)


def test_a_huge_overlay_costs_nothing(tmp_path: Path) -> None:
    """15 TiB, as much as ext4 takes: the map is sparse, and so is what of it is read."""
    path = tmp_path / "golden.img"
    create_image(path, HUGE)

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident_bytes()
    with open_file(tmp_path) as disk:
        disk.pwrite(b"far", HUGE - 4096)
        disk.flush()
        assert list(disk.extents(0, HUGE))[1:] == [Extent(HUGE - 4096, 4096, is_data=True)]
        assert resident_bytes() - before < 32 << 20  # the map alone has 480 MiB
    store = tmp_path / "overlay.img.fusemig-map"
    assert store.stat().st_blocks * 512 < 1 << 16
    with open_file(tmp_path) as disk:
        assert disk.pread(4, HUGE - 4096) == b"far\0"
        assert list(disk.allocated(0, HUGE)) == [(HUGE - 4096, 4096)]


WRITER = """
import random, sys
from pathlib import Path
from fusemig.disk.overlay_file import OverlayFile
directory = Path(sys.argv[1])
disk = OverlayFile("vda", directory / "overlay.img", directory / "golden.img", directory / "overlay.img.fusemig-map")
rng = random.Random(int(sys.argv[2]))
while True:
    offset, length, value = rng.randrange(disk.size - 9000), rng.randrange(1, 9000), rng.randrange(256)
    disk.pwrite(bytes([value]) * length, offset)
    if rng.random() < 0.05:
        disk.flush()
    sys.stdout.write(f"{offset} {length} {value}\\n")
    sys.stdout.flush()
"""


def test_a_kill_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """A real process, killed in the middle of its writes three times over: every write that it told of is there."""
    model = bytearray(make_base(tmp_path).read_bytes())
    for seed in range(3):
        process = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path, str(seed)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        with process:
            lines = [process.stdout.readline() for _ in range(200)]
            process.send_signal(signal.SIGKILL)
            lines += process.stdout.readlines()
        told = [tuple(map(int, line.split())) for line in lines if line.endswith(b"\n")]
        assert len(told) >= 200
        for offset, length, value in told:
            model[offset : offset + length] = bytes([value]) * length
        # One more may have been made, or half made, and not told.
        rng = random.Random(seed)
        for _ in range(len(told) + 1):
            last = rng.randrange(len(model) - 9000), rng.randrange(1, 9000), rng.randrange(256)
            rng.random()
        offset, length, value = last
        with open_file(tmp_path) as disk:
            found = disk.pread(disk.size, 0)
        part = slice(offset, offset + length)
        assert all(byte in (value, old) for byte, old in zip(found[part], model[part], strict=True))
        model[part] = found[part]
        assert found == model
