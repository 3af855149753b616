"""The vocabulary of `x-fusemig-query-view` and `x-fusemig-query-history`, as far as it needs no other.

Times within a migration are milliseconds since it began.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import UNSET, UnsetType, field

from fusemig.qmp.base import Arguments, Result

MAX_CELLS: Final = 4096
"""As `fusemig.core.chunk_map` has it."""


class QueryView(Arguments, frozen=True, kw_only=True):
    """``x-fusemig-query-view``."""

    cells: Annotated[int, msgspec.Meta(ge=1, le=MAX_CELLS, description="an integer in the range of 1 to 4096")] = 512
    """Into so many cells, or fewer, the chunks of each disk are counted."""


class ChunkMap(Result, frozen=True, kw_only=True):
    """How many chunks of each cell are in which state (`fusemig.core.chunk_map`); each is in one of the first six.

    A list is empty where it would say 0 for every cell.
    """

    chunks: int
    """Of the disk."""
    chunks_per_cell: int
    """Of each cell but the last one, which has the rest."""
    in_flight: list[int]
    dirty: list[int]
    missing: list[int]
    sent: list[int]
    allocated: list[int]
    hole: list[int]
    hot: list[int]
    """Of which guests write several blocks a second, whatever else they are."""


class DiskView(Result, frozen=True, kw_only=True):
    """What is to be seen of a disk beside its part of the status."""

    name: str
    read_bytes: int = 0
    """Guests', since the disk was opened."""
    written_bytes: int = 0
    waiting_writes: int = 0
    """Those that a migration's brake holds back."""
    map: ChunkMap | UnsetType = UNSET
    """Absent while the image is still to come."""


class RecentEvent(Result, frozen=True, kw_only=True):
    """An event of the control socket."""

    number: int
    """Counts the daemon's events, from 1."""
    at: int
    """Milliseconds since the epoch."""
    event: str
    text: str
    """Its data, for people."""


class RecordParameters(Result, frozen=True, kw_only=True):
    """What a migration was asked for."""

    uri: str
    downtime_limit: int
    """Milliseconds."""
    max_bandwidth: int
    """Bytes per second; 0: no limit."""
    order: str
    auto_mirror: bool
    mirror_lag: str
    throttle_max: int
    reconnect: int
    """Milliseconds; 0: not at all."""
    pause_before_switchover: bool
    incremental: bool | UnsetType = UNSET
    """Absent: what provably is there is left out."""
    compression_level: int | UnsetType = UNSET
    """Absent: nothing is compressed."""
    streams: int = 1


class PhaseStep(Result, frozen=True, kw_only=True):
    """A phase and when it began."""

    phase: str
    at_ms: float


class PassStep(Result, frozen=True, kw_only=True):
    """A pass and when it began."""

    pass_: int = field(name="pass")
    at_ms: float
    remaining: int
    """Bytes to be sent then."""
    wire_bytes: int
    """Bytes that had crossed the wire by then."""


class Sample(Result, frozen=True, kw_only=True):
    """The figures of a migration at a moment; bytes, and bytes per second."""

    at_ms: float
    remaining: int
    wire_bytes: int
    bandwidth: int
    dirty_rate: int
