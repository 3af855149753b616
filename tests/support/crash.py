"""CrashDisk: a store that can be killed in the middle of any call, and lose what was not synced.

What is written is in the page cache (`content`) at once and on the medium (`durable`) after a flush. A power loss
leaves of each sector any one of the states that it had since the last flush, independently of the others: nothing
orders two writes but a flush between them.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from fusemig.core.units import SECTOR_SIZE
from fusemig.disk.memory import MemoryDisk
from fusemig.errors import DiskError

if TYPE_CHECKING:
    import random

    from fusemig.disk.base import Buffer


class KilledError(BaseException):
    """The process is no more: nothing in it runs after this."""


class Fate:
    """Kills the process at one of the calls to come, of all its stores together."""

    def __init__(self) -> None:
        """Nothing happens until `left` is set."""
        self.left: int | None = None
        """How many more calls that change something are made; None: any number."""
        self.n_calls = 0

    def meet(self) -> bool:
        """Count a call; tell whether it is the last one."""
        self.n_calls += 1
        if self.left is None:
            return False
        self.left -= 1
        return self.left < 0


class CrashDisk(MemoryDisk):
    """A store in memory with a page cache, a medium and a fate."""

    def __init__(self, name: str, size: int, fate: Fate, rng: random.Random) -> None:
        """Make a store of zeros, which are durable."""
        super().__init__(name, size)
        self.durable = bytearray(size)
        self._fate = fate
        self._rng = rng
        self._is_failing = False
        self._history: dict[int, list[bytes]] = {}
        """The states of each sector since the last flush, but not the durable one."""

    def pwrite(self, data: Buffer, offset: int) -> None:
        """Write, or a part of it when this is the end."""
        if self._fate.meet():
            self._store(bytes(data)[: self._rng.randrange(len(data) + 1)], offset)
            raise KilledError
        self._store(bytes(data), offset)

    def write_zeroes(self, offset: int, length: int) -> None:
        """Zero, or a part of it when this is the end."""
        if self._fate.meet():
            self._store(bytes(self._rng.randrange(length + 1)), offset)
            raise KilledError
        self._store(bytes(length), offset)

    def _store(self, data: bytes, offset: int) -> None:
        super().pwrite(data, offset)
        for sector in range(offset // SECTOR_SIZE, -(-(offset + len(data)) // SECTOR_SIZE)):
            state = bytes(self.content[sector * SECTOR_SIZE : (sector + 1) * SECTOR_SIZE])
            self._history.setdefault(sector, []).append(state)

    def flush(self) -> None:
        """Make all of it durable; at the end, perhaps."""
        is_end = self._fate.meet()
        if self._is_failing:
            self._is_failing = False
            self._history.clear()
            raise DiskError(errno.EIO, f"disk '{self.name}': pages were lost", 0, self.size)
        if not is_end or self._rng.random() < 0.5:
            for sector in self._history:
                part = slice(sector * SECTOR_SIZE, (sector + 1) * SECTOR_SIZE)
                self.durable[part] = self.content[part]
            self._history.clear()
            self.n_flushes += 1
        if is_end:
            raise KilledError

    def fail_to_write(self) -> None:
        """Have the next flush fail as Linux does: pages that were not written stay in memory, as if they were clean."""
        self._is_failing = True

    def lose_power(self) -> None:
        """Keep of what was not durable whatever the medium happens to hold."""
        for sector, states in self._history.items():
            at = sector * SECTOR_SIZE
            old = bytes(self.durable[at : at + SECTOR_SIZE])
            self.durable[at : at + SECTOR_SIZE] = self._rng.choice([old, *states])
        self.content[:] = self.durable
        self._history.clear()
