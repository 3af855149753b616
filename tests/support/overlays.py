"""Overlays in memory for the sides of a `support.pair.Pair`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusemig.disk.allocation import AllocationMap, BaseIdentity, map_size, write_header
from fusemig.disk.memory import MemoryDisk
from fusemig.disk.overlay import OverlayDisk
from fusemig.disk.tracked import TrackedDisk

if TYPE_CHECKING:
    from fusemig.disk.tracked import Gate
    from support.pair import Side


def lay_over(side: Side, content: bytes, size: int, gate: Gate) -> OverlayDisk:
    """Give a side a fresh overlay of ``size`` bytes over a base of its own with this content, as disk ``a``."""
    base, image = MemoryDisk("a", len(content)), MemoryDisk("a", size)
    base.content[:] = content
    store = MemoryDisk("a", map_size(size))
    write_header(store, size, BaseIdentity(size=len(content), digest=f"{hash(content):x}"))
    overlay = OverlayDisk(image, base, AllocationMap(store, size, "boot"))
    side.images["a"] = image
    side.disks["a"] = TrackedDisk(overlay, gate=gate)
    side.dirty_files.clear()
    return overlay
