"""The chunk map: in which state the chunks of a disk are, counted in cells, for people to look at.

A cell is a run of chunks; a disk has at most as many cells as whoever looks has room for. Of each cell it is counted
how many chunks are in which state, and each chunk is in one, the first of `STATES` that applies:

    in-flight    taken for sending, not acknowledged
    dirty        bytes of it are still to be sent
    missing      bytes of it are still at the source (post-copy)
    sent         the destination has it
    allocated    it holds data
    hole         it reads as zeros and costs nothing

Hot is no such state: it is told beside them how many chunks guests write all the time (`fusemig.heat.HOT_LEVEL`),
whatever else they are.

What is looked at changes meanwhile, cell by cell; every chunk is counted once all the same. The cost is that of the
words of the bitmaps (docs/seeing.md has figures).
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

STATES: Final = ("in-flight", "dirty", "missing", "sent", "allocated", "hole")
"""The most important one first."""
MAX_CELLS: Final = 4096


class Cell(NamedTuple):
    """How many chunks of a cell are in which state; all but the last add up to the chunks of the cell."""

    in_flight: int
    dirty: int
    missing: int
    sent: int
    allocated: int
    hole: int
    hot: int


class Chunks(Protocol):
    """Where the states of a disk's chunks are looked up: bits from ``first`` on, for ``first`` to ``stop - 1``."""

    def dirty_bits(self, first: int, stop: int) -> int:
        """Tell which are to be sent."""

    def allocated_bits(self, first: int, stop: int) -> int:
        """Tell which hold data."""

    def missing_bits(self, first: int, stop: int) -> int:
        """Tell of which something is still at the source."""

    def count_hot(self, first: int, stop: int) -> int:
        """Tell how many guests write all the time."""


def chunks_per_cell(n_chunks: int, max_cells: int) -> int:
    """Return how many chunks a cell has, the last one perhaps fewer, so that ``max_cells`` cells are enough."""
    return max(1, -(-n_chunks // max_cells))


def count_cell(chunks: Chunks, in_flight: Sequence[int], first: int, stop: int, *, is_sending: bool) -> Cell:
    """Count the chunks ``first`` to ``stop - 1``.

    Args:
        chunks: where they are looked up.
        in_flight: the chunks of the whole disk that are in flight, in ascending order.
        first: of the cell.
        stop: of the cell.
        is_sending: what holds data and is neither to be sent nor in flight is at the destination.
    """
    flying = 0
    for chunk in in_flight[bisect_left(in_flight, first) : bisect_left(in_flight, stop)]:
        flying |= 1 << chunk - first
    dirty = chunks.dirty_bits(first, stop) & ~flying
    counted = flying | dirty
    missing = chunks.missing_bits(first, stop) & ~counted
    counted |= missing
    held = (chunks.allocated_bits(first, stop) & ~counted).bit_count()
    n_counted = counted.bit_count()
    return Cell(
        in_flight=flying.bit_count(),
        dirty=dirty.bit_count(),
        missing=missing.bit_count(),
        sent=held if is_sending else 0,
        allocated=0 if is_sending else held,
        hole=stop - first - n_counted - held,
        hot=chunks.count_hot(first, stop),
    )
