"""What guests and early readers know of a simulated disk: what was acknowledged, what was synced, what they cached."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusemig.core.units import SECTOR_SIZE

if TYPE_CHECKING:
    from fusemig.disk.base import Disk

PAGE = 4096


class PageCache:
    """The kernel's pages of a disk's file: what was read once is not asked for again."""

    def __init__(self) -> None:
        """Hold nothing."""
        self._pages: dict[int, bytes] = {}

    def read(self, disk: Disk, number: int) -> None:
        """Read a page of ``disk`` as a program does that opened the file."""
        if number not in self._pages:
            at = number * PAGE
            self._pages[number] = bytes(disk.pread(min(PAGE, disk.size - at), at))

    def drop(self) -> None:
        """Forget everything, as `invalidate_inode` has the kernel do."""
        self._pages.clear()

    def stale(self, content: bytearray) -> list[int]:
        """Return the pages that are not those of ``content``."""
        return [n for n, page in self._pages.items() if page != content[n * PAGE : n * PAGE + len(page)]]


class GuestRecord:
    """What a guest knows of one disk: what it wrote, and what was synced."""

    def __init__(self, size: int) -> None:
        self.acknowledged = bytearray(size)
        self.synced = bytearray(size)
        self.since: dict[int, list[bytes]] = {}
        """The states of each sector after the last sync, oldest first."""
        self.is_sync_failed = False

    def note(self, content: bytearray, offset: int, length: int) -> None:
        """Take over what is there after a write that was made or tried."""
        self.acknowledged[offset : offset + length] = content[offset : offset + length]
        for sector in range(offset // SECTOR_SIZE, -(-(offset + length) // SECTOR_SIZE)):
            place = slice(sector * SECTOR_SIZE, (sector + 1) * SECTOR_SIZE)
            self.since.setdefault(sector, []).append(bytes(content[place]))

    def note_synced(self) -> None:
        """Everything acknowledged is durable."""
        for sector in self.since:
            place = slice(sector * SECTOR_SIZE, (sector + 1) * SECTOR_SIZE)
            self.synced[place] = self.acknowledged[place]
        self.since.clear()

    def lost_after_power_loss(self, content: bytearray) -> str:
        """Tell what is wrong with a disk that lost power, if anything is; then go on from what it holds."""
        wrong = ""
        expected = bytearray(self.synced)
        for sector, states in self.since.items():
            place = slice(sector * SECTOR_SIZE, (sector + 1) * SECTOR_SIZE)
            if bytes(content[place]) in (bytes(self.synced[place]), *states):
                expected[place] = content[place]
        if expected != content:
            at = next(i for i in range(len(content)) if expected[i] != content[i])
            wrong = f"byte {at} is neither what was synced nor what was written after that"
        self.acknowledged[:] = content
        self.synced[:] = content
        self.since.clear()
        self.is_sync_failed = False
        return wrong
