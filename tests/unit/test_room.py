"""Whether what is offered fits: by file system, with what the images hold already."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusemig.disk.room import Need, Room, lack, room_of

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1 << 30


def need(name: str, gib: int, free_gib: int, held_gib: int = 0, device: int = 1) -> Need:
    """Return a need, in GiB."""
    return Need(name, gib * GIB, Room(device, f"/store{device}", free_gib * GIB, held_gib * GIB))


def test_what_fits() -> None:
    """To the last byte; and an image that is full already needs no more."""
    assert lack([]) == ""
    assert lack([need("a", 3, 3)]) == ""
    assert lack([need("a", 3, 1, held_gib=2)]) == ""
    assert lack([need("a", 3, 0, held_gib=5)]) == ""


def test_what_does_not_fit() -> None:
    """The text names the disk, what it lacks, where, and the next step."""
    assert lack([need("a", 3, 1, held_gib=1)]) == (
        "disk 'a' needs 2.0 GiB more there, and /store1 has 1.0 GiB free: make room there, then migrate again"
    )


def test_disks_share_a_file_system() -> None:
    """Each would fit, both do not; on another file system they do; and one that holds more than it needs lends none."""
    assert "disks 'a', 'b' need 4.0 GiB more" in lack([need("a", 2, 3), need("b", 2, 3)])
    assert lack([need("a", 2, 3), need("b", 2, 3, device=2)]) == ""
    assert "need 4.0 GiB more" in lack([need("a", 4, 3), need("b", 0, 3, held_gib=2)])


def test_the_room_of_an_image(tmp_path: Path) -> None:
    """Of one that is there, one that is not yet, and one in a place that is not there."""
    image = tmp_path / "image"
    before = room_of(image)
    assert before is not None
    assert (before.held_bytes, before.where) == (0, str(tmp_path))
    assert before.free_bytes > 0
    image.write_bytes(bytes(range(256)) * 4096)
    after = room_of(image)
    assert after is not None
    assert after.device == before.device
    assert after.held_bytes >= 1 << 20
    assert room_of(tmp_path / "nowhere" / "image") is None
