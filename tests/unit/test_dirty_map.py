"""The persistent dirty maps: what they note, when they count, and what happens when their file fails."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from fusemig.core.units import CHUNK_SIZE
from fusemig.disk.dirty_file import DirtyFile, open_dirty_file
from fusemig.disk.dirty_map import MapBase, Since, dirty_file_size
from fusemig.disk.fault import Fault, FaultDisk, Operation
from fusemig.disk.memory import MemoryDisk
from fusemig.disk.raw import RawDisk, create_image
from fusemig.disk.tracked import Gate, TrackedDisk
from fusemig.errors import DiskError, GateClosedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fusemig.disk.base import Buffer

SIZE = 20 * CHUNK_SIZE + 1536
BASE = MapBase(image_id="image", epoch=3, session="s")


class MeetingDisk(MemoryDisk):
    """A memory disk that calls the test before a write."""

    in_the_middle: Callable[[], None] = staticmethod(lambda: None)

    def pwrite(self, data: Buffer, offset: int) -> None:
        self.in_the_middle()
        super().pwrite(data, offset)


class Maps:
    """A disk with its maps, which can be opened again as after a kill."""

    def __init__(self) -> None:
        self.image = MeetingDisk("d", SIZE)
        self.store = MemoryDisk("d", dirty_file_size(SIZE))
        self.faults = FaultDisk(self.store)
        self.open("boot")

    def open(self, boot: str) -> None:
        self.disk = TrackedDisk(self.image)
        self.file = DirtyFile(self.disk, boot, self.faults, lambda: self.faults)

    def written(self, since: Since = Since.SESSION) -> list[int]:
        return [first for run in self.file.written(since).runs() for first in range(*run)]


def test_a_map_tells_what_was_written_since_its_base_also_after_a_kill() -> None:
    """Each chunk that a write or a zeroing touches, short last one included, and none that was written before."""
    maps = Maps()
    maps.disk.pwrite(b"x", 0)
    assert maps.file.begin(Since.SESSION, BASE)
    maps.disk.pwrite(b"x" * 1024, 3 * CHUNK_SIZE - 512)
    maps.disk.write_zeroes(17 * CHUNK_SIZE, 2 * CHUNK_SIZE)
    maps.disk.pwrite(b"x", SIZE - 1)
    for _ in range(2):
        assert maps.file.base(Since.SESSION) == BASE
        assert maps.file.base(Since.OWNED) is None
        assert maps.written() == [2, 3, 17, 18, 20]
        maps.open("boot")
    maps.disk.pwrite(b"x", 0)
    assert maps.written() == [0, 2, 3, 17, 18, 20]
    maps.open("another boot")
    assert maps.file.base(Since.SESSION) is None


def test_the_two_maps_of_a_file_have_bases_of_their_own() -> None:
    """Beginning one leaves the other as it is, and both note what comes then."""
    maps = Maps()
    assert maps.file.begin(Since.OWNED, BASE)
    maps.disk.pwrite(b"x", CHUNK_SIZE)
    assert maps.file.begin(Since.SESSION, MapBase(image_id="image", epoch=3, session="other"))
    maps.disk.pwrite(b"x", 5 * CHUNK_SIZE)
    maps.open("boot")
    assert maps.written(Since.OWNED) == [1, 5]
    assert maps.written(Since.SESSION) == [5]
    assert maps.file.base(Since.OWNED) == BASE


def test_a_write_that_began_before_the_base_is_waited_for() -> None:
    """A map begun in the middle of a write counts only when that write has ended, and not if it does not end."""
    maps = Maps()
    outcomes: list[bool] = []

    def begin() -> None:
        maps.image.in_the_middle = lambda: None
        outcomes.append(maps.file.begin(Since.SESSION, BASE))

    maps.image.in_the_middle = begin
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fusemig.disk.dirty_file.BEGIN_DEADLINE_S", 0.01)
        maps.disk.pwrite(b"x", 0)
    assert outcomes == [False]
    assert maps.file.base(Since.SESSION) is None
    assert maps.file.begin(Since.SESSION, BASE)
    assert maps.file.base(Since.SESSION) == BASE


def test_a_write_that_is_parked_is_no_harm() -> None:
    """A parked write may be noted; refused or written later, the map tells no less than the truth."""
    maps = Maps()
    assert maps.file.begin(Since.SESSION, BASE)
    maps.disk.set_gate(Gate.CLOSED)
    with pytest.raises(GateClosedError):
        maps.disk.pwrite(b"x", 0)
    maps.disk.set_gate(Gate.OPEN)
    maps.disk.pwrite(b"x", 0)
    assert maps.written() == [0]


def test_a_map_that_cannot_be_written_is_given_up() -> None:
    """The guest's write succeeds, and after a kill the map is not believed."""
    maps = Maps()
    assert maps.file.begin(Since.SESSION, BASE)
    maps.faults.add(Fault(frozenset({Operation.WRITE}), nth=1, errno=errno.EIO))
    maps.disk.pwrite(b"x", 0)
    assert maps.file.base(Since.SESSION) is None
    maps.open("boot")
    assert maps.file.base(Since.SESSION) is None


def test_a_map_that_cannot_even_be_given_up_fails_the_write() -> None:
    """Nothing is written that a map which may be believed does not know of."""
    maps = Maps()
    assert maps.file.begin(Since.SESSION, BASE)
    maps.faults.add(Fault(frozenset({Operation.WRITE}), times=None, errno=errno.EIO))
    with pytest.raises(DiskError):
        maps.disk.pwrite(b"x", 0)
    assert not any(maps.image.content[:CHUNK_SIZE])


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_map_that_cannot_be_begun_is_no_error(nth: int) -> None:
    """The migration goes on without one; a second try is a map again."""
    maps = Maps()
    maps.faults.add(Fault(frozenset({Operation.WRITE}), nth=nth, errno=errno.ENOSPC))
    assert not maps.file.begin(Since.SESSION, BASE)
    assert maps.file.base(Since.SESSION) is None
    assert maps.file.begin(Since.SESSION, BASE)


@pytest.mark.parametrize("at", [0, 40, 100, 300])
def test_a_damaged_header_is_not_believed(at: int) -> None:
    """Any flipped bit of the record."""
    maps = Maps()
    assert maps.file.begin(Since.SESSION, BASE)
    maps.store.content[at] ^= 1
    maps.open("boot")
    assert maps.file.base(Since.SESSION) is None


def test_an_unsynced_image_has_no_map() -> None:
    """After a failed sync the image may have lost what was written before the base."""
    maps = Maps()
    assert maps.file.begin(Since.SESSION, BASE)
    maps.file.close(is_synced=False)
    maps.open("boot")
    assert maps.file.base(Since.SESSION) is None


class Files:
    """An image and its map as files."""

    def __init__(self, directory: Path) -> None:
        self.image, self.path = directory / "d.img", directory / "d.img.fusemig-dirty"
        create_image(self.image, SIZE)

    def open(self, boot: str = "boot") -> tuple[TrackedDisk, DirtyFile]:
        raw = RawDisk("d", self.image)
        disk = TrackedDisk(raw)
        return disk, open_dirty_file(disk, self.path, boot, raw.stat)


def test_closed_in_order_a_map_outlives_a_reboot_and_not_a_change(tmp_path: Path) -> None:
    """The stamp of the image vouches for it; a change behind our back is noticed."""
    files = Files(tmp_path)
    disk, file = files.open()
    assert file.begin(Since.OWNED, BASE)
    assert not list(tmp_path.glob("*.new"))
    disk.pwrite(b"x", 0)
    file.close(is_synced=True)
    disk.close()
    disk, file = files.open("another boot")
    assert file.base(Since.OWNED) == BASE
    file.close(is_synced=True)
    disk.close()
    with files.image.open("r+b") as image:
        image.write(b"y")
    disk, file = files.open("another boot")
    assert file.base(Since.OWNED) is None
    file.close(is_synced=True)
    disk.close()


def test_a_file_of_another_size_is_replaced(tmp_path: Path) -> None:
    """It belongs to another image."""
    files = Files(tmp_path)
    files.path.write_bytes(bytes(4096))
    disk, file = files.open()
    assert file.base(Since.SESSION) is None
    assert file.begin(Since.SESSION, BASE)
    assert files.path.stat().st_size == dirty_file_size(SIZE)
    file.close(is_synced=True)
    disk.close()
