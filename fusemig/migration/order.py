"""HeatOrder: which chunks of the bulk phase wait until colder ones were sent.

A chunk that guests write all the time is dirty again soon after it was sent; sent last, it is dirty again in fewer
blocks when the bulk phase ends. So the pass becomes sweeps over the disks, each in ascending order and each up to a
level of heat: first what is cold, then the coldest level that was left out, and so on. A chunk is judged when its turn
comes, by what guests do then. A sweep costs a look at each chunk that is left, and there are as many as levels were
seen; a disk that nobody writes is sent in one.

Pure, but for the heat that it reads.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Protocol

from fusemig.core.bitmap import ChunkBitmap
from fusemig.core.units import n_chunks

if TYPE_CHECKING:
    from collections.abc import Sequence


class Order(Enum):
    """In which order the bulk phase sends chunks."""

    SEQUENTIAL = "sequential"
    """Ascending, disk by disk, as QEMU's migration/block.c does."""
    HEAT = "heat"
    """What guests write most comes last."""


class Levels(Protocol):
    """Where the heat of chunks is known (`fusemig.core.heat.Heat`)."""

    def level(self, chunk: int) -> int:
        """Return how hot a chunk is; 0 is cold."""


class HeatOrder:
    """The order of one pass over several disks; a disk is named by its place."""

    def __init__(self, disks: Sequence[tuple[Levels, int]]) -> None:
        """Begin with what is cold; of each disk its heat and its size in bytes."""
        self._heats = [heat for heat, _ in disks]
        self._sent = [ChunkBitmap(n_chunks(size)) for _, size in disks]
        """What was sent in this pass and is dirty again is left for the next one."""
        self._level = 0
        self._next_level: int | None = None

    def is_due(self, disk: int, chunk: int) -> bool:
        """Tell whether a dirty chunk is to be sent in this sweep; it then counts as sent in this pass."""
        if self._sent[disk][chunk]:
            return False
        level = self._heats[disk].level(chunk)
        if level > self._level:
            if self._next_level is None or level < self._next_level:
                self._next_level = level
            return False
        self._sent[disk].set(chunk)
        return True

    def begin_next_sweep(self) -> bool:
        """Go on with the coldest chunks that were left out; False if none were."""
        if self._next_level is None:
            return False
        self._level, self._next_level = self._next_level, None
        return True
