"""Fail the nth call to the files that an image has beside it: an overlay's map, the map of written chunks.

N = 1, 2, 3 ... until a story runs clean; once and from there on; with nothing or a part of the write stored. While the
store fails a guest may get errors. What was acknowledged is there all the same, at once and after a restart with or
without a power loss, and a map that is believed tells the truth.
"""

from __future__ import annotations

import itertools
import random
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from fusemig.core.units import BLOCK_SIZE, CHUNK_SIZE
from fusemig.disk.allocation import AllocationMap, BaseIdentity, map_size, write_header
from fusemig.disk.dirty_file import DirtyFile
from fusemig.disk.dirty_map import MapBase, Since, dirty_file_size
from fusemig.disk.fault import Fault, FaultDisk, Operation
from fusemig.disk.memory import MemoryDisk
from fusemig.disk.overlay import OverlayDisk
from fusemig.disk.tracked import TrackedDisk
from fusemig.errors import ConfigError, DiskError
from support.crash import CrashDisk, Fate

if TYPE_CHECKING:
    from collections.abc import Callable

CHANGES = frozenset({Operation.WRITE, Operation.ZERO, Operation.FLUSH})
KINDS = pytest.mark.parametrize(
    ("times", "torn_bytes"), [(1, 0), (1, 3000), (None, 0), (None, 3000)], ids=["once", "once-torn", "on", "on-torn"]
)
SIZE = 7 * BLOCK_SIZE + 1536


class OverlayStory:
    """An overlay whose stores fail, and what each of its bytes may be."""

    def __init__(self, number: int, where: str, times: int | None, torn_bytes: int) -> None:
        rng = random.Random(number)
        self.base = MemoryDisk("d", SIZE)
        self.base.content[:] = rng.randbytes(SIZE)
        self.stores = {"image": CrashDisk("d", SIZE, Fate(), rng), "map": CrashDisk("d", map_size(SIZE), Fate(), rng)}
        write_header(self.stores["map"], SIZE, BaseIdentity(size=SIZE, digest=""))
        self.stores["map"].flush()
        self.layers = {name: FaultDisk(store) for name, store in self.stores.items()}
        self.now = bytearray(self.base.content)
        self.durable: dict[int, set[int]] = {}
        """What a byte that was written since the last sync may be after a power loss."""
        self.unsure: dict[int, set[int]] = {}
        """What a byte may be whose write failed."""
        self.fault = self.layers[where].add(Fault(CHANGES, nth=number, times=times, torn_bytes=torn_bytes))
        self.disk: OverlayDisk | None = None

    def open(self, boot: str) -> OverlayDisk:
        """Open as a new process does."""
        allocation = AllocationMap(self.layers["map"], SIZE, boot)
        disk = OverlayDisk(self.layers["image"], self.base, allocation)
        allocation.begin(self.layers["image"].flush, "stamp")
        return disk

    def run(self) -> None:
        """Live for a while; what fails is an error to the guest and nothing worse."""
        try:
            self.disk = self.open("boot 0")
        except (DiskError, ConfigError):
            return  # refused: nothing was written
        self.write(100, b"a" * 50)
        self.flush()
        self.write(5000, b"b" * 9000)
        self.write(3000, bytes(6000))
        self.flush()
        self.write(120, b"c" * 4096)
        self.write(SIZE - 700, b"d" * 700)
        self.flush()
        self.write(9000, b"e" * 100)

    def write(self, offset: int, data: bytes) -> None:
        """Make a write, of zeros by punching; acknowledged or not."""
        assert self.disk is not None
        try:
            if any(data):
                self.disk.pwrite(data, offset)
            else:
                self.disk.write_zeroes(offset, len(data))
        except DiskError:
            for at, value in enumerate(data, offset):
                self.unsure.setdefault(at, {self.now[at]}).add(value)
        else:
            for at, value in enumerate(data, offset):
                self.durable.setdefault(at, {self.now[at], *self.unsure.get(at, ())}).add(value)
                self.unsure.pop(at, None)
            self.now[offset : offset + len(data)] = data

    def flush(self) -> None:
        """Sync; only one that succeeded makes anything durable."""
        assert self.disk is not None
        try:
            self.disk.flush()
        except DiskError:
            return
        self.durable.clear()

    def check(self, found: bytes, *, is_power_lost: bool) -> None:
        """Hold what is read against what was acknowledged."""
        for at, value in enumerate(found):
            allowed = {self.now[at]} | self.unsure.get(at, set())
            if is_power_lost:
                allowed |= self.durable.get(at, set())
            assert value in allowed, f"byte {at} is {value:#x}"

    def mend(self) -> None:
        for layer in self.layers.values():
            layer.mend()


@KINDS
@pytest.mark.parametrize("where", ["map", "image"])
@pytest.mark.parametrize("is_power_lost", [False, True], ids=["killed", "power"])
def test_overlay(where: str, is_power_lost: bool, times: int | None, torn_bytes: int) -> None:
    """Of either store: reads are right at once and after a restart."""
    for number in itertools.count(1):
        story = OverlayStory(number, where, times, torn_bytes)
        story.run()
        try:
            if story.disk is not None:
                story.check(bytes(story.disk.pread(SIZE, 0)), is_power_lost=False)
            story.mend()
            if is_power_lost:
                for store in story.stores.values():
                    store.lose_power()
            again = story.open("boot 1" if is_power_lost else "boot 0")
            story.check(bytes(again.pread(SIZE, 0)), is_power_lost=is_power_lost)
        except BaseException as exc:
            exc.add_note(f"call {number} to the {where}")
            raise
        if not story.fault.n_hit:
            break
    assert number > 8


def story_of_writes(disk: TrackedDisk, begin: Callable[[], None]) -> set[int]:
    """Write chunks, before and after a map was begun; return those that were written after it, acknowledged or not."""
    rng = random.Random(3)
    written: set[int] = set()
    for step in range(12):
        if step == 4:
            begin()
            written.clear()
        chunk = rng.randrange(disk.size // CHUNK_SIZE)
        before = bytes(disk.pread(512, chunk * CHUNK_SIZE))
        with suppress(DiskError):  # refused: nothing of it may be there, or the map says so
            disk.pwrite(rng.randbytes(512), chunk * CHUNK_SIZE)
        if bytes(disk.pread(512, chunk * CHUNK_SIZE)) != before:
            written.add(chunk)
    return written


@KINDS
@pytest.mark.parametrize("is_rebooted", [False, True], ids=["killed", "power"])
def test_dirty_map(is_rebooted: bool, times: int | None, torn_bytes: int) -> None:
    """Guests are served whatever becomes of the map; one that is believed after a restart has every chunk."""
    n_believed = 0
    for number in itertools.count(1):
        rng = random.Random(number)
        size = 9 * CHUNK_SIZE
        image = MemoryDisk("d", size)
        store = CrashDisk("d", dirty_file_size(size), Fate(), rng)
        layer = FaultDisk(store)
        disk = TrackedDisk(image)
        file = DirtyFile(disk, "boot 0", layer, lambda layer=layer: layer)  # type: ignore[misc]
        fault = layer.add(Fault(CHANGES, nth=number, times=times, torn_bytes=torn_bytes))
        base = MapBase(image_id="i", epoch=1, session="s")
        written = story_of_writes(disk, lambda file=file, base=base: file.begin(Since.SESSION, base))  # type: ignore[misc]
        layer.mend()
        if is_rebooted:
            store.lose_power()
        again = DirtyFile(TrackedDisk(image), f"boot {int(is_rebooted)}", store, lambda store=store: store)  # type: ignore[misc]
        if again.base(Since.SESSION) is not None:
            assert not is_rebooted, "believed after a power loss"
            n_believed += 1
            missing = {chunk for chunk in written if not again.written(Since.SESSION)[chunk]}
            assert not missing, f"call {number}: chunks {missing} were written and are not in the map"
        if not fault.n_hit:
            break
    assert number > 6
    assert bool(n_believed) is not is_rebooted
