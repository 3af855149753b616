"""Room: whether the file systems of images that are to be filled can take what is offered, before a byte is sent.

An estimate in the safe direction for an honest store: what the source's image holds, against what is free and what the
image here holds already. Blocks of zeros that were written out are counted, and not sent; a store that compresses may
take more than it says. What changes while a migration runs is not foreseen: a store that runs full then is an error of
its own.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from fusemig.core.units import format_size

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class Room(NamedTuple):
    """What the file system of an image has; bytes."""

    device: int
    """Names the file system."""
    where: str
    free_bytes: int
    held_bytes: int
    """What the image takes of it already."""


class Need(NamedTuple):
    """What is offered for a disk."""

    name: str
    allocated_bytes: int
    """What the source's image holds."""
    room: Room


def room_of(image: Path) -> Room | None:
    """Return the room for ``image``, which need not exist; None where that cannot be known. May sleep."""
    try:
        found = os.stat(image) if image.exists() else os.stat(image.parent)
        if stat.S_ISBLK(found.st_mode):
            return None
        held = found.st_blocks * 512 if stat.S_ISREG(found.st_mode) else 0
        free = os.statvfs(image if held else image.parent)
    except OSError:
        return None  # whatever is wrong there, opening the image will say it
    if not free.f_blocks:
        return None  # a file system that does not count
    n_free = free.f_bfree if os.geteuid() == 0 else free.f_bavail
    return Room(found.st_dev, str(image.parent), n_free * free.f_frsize, held)


def lack(needs: Sequence[Need]) -> str:
    """Say which disks do not fit together, and where; empty if all fit."""
    for device in dict.fromkeys(need.room.device for need in needs):
        here = [need for need in needs if need.room.device == device]
        wanted = sum(max(0, need.allocated_bytes - need.room.held_bytes) for need in here)
        free = min(need.room.free_bytes for need in here)
        if wanted > free:
            names = ", ".join(f"'{need.name}'" for need in here)
            disks = f"disk {names} needs" if len(here) == 1 else f"disks {names} need"
            return (
                f"{disks} {format_size(wanted)} more there, and {here[0].room.where} has {format_size(free)} free: make"
                " room there, then migrate again"
            )
    return ""
