"""What a migration is told and what it tells: parameters and statistics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from fusemig.core.mirror import Reach
from fusemig.core.shaping import DEFAULT_LAG
from fusemig.migration.order import Order

if TYPE_CHECKING:
    from fusemig.core.forecast import Prediction
    from fusemig.core.phase import MigrationPhase
    from fusemig.core.shaping import MirrorLag

DEFAULT_DOWNTIME_LIMIT_S: Final = 0.3
"""QEMU's default (migration/options.c: DEFAULT_MIGRATE_SET_DOWNTIME, 300 ms)."""
FREEZE_DEADLINE_S: Final = 5.0
"""Longest time that a guest's write is parked before the source thaws or answers it."""
TAKEN_DEADLINE_S: Final = 10.0
"""How long after COMMIT the source waits for TAKEN before it reports the hand-off as in doubt."""


@dataclass
class MigrationParameters:
    """What may be changed while a migration runs."""

    max_bandwidth: int = 0
    """Bytes per second on the wire; 0 is unlimited."""
    downtime_limit_s: float = DEFAULT_DOWNTIME_LIMIT_S
    """Switch over only when the guest is expected to be frozen no longer than this, in seconds."""
    pause_before_switchover: bool = False
    """Wait for `proceed` when converged."""
    freeze_deadline_s: float = FREEZE_DEADLINE_S
    taken_deadline_s: float = TAKEN_DEADLINE_S
    is_postcopy: bool = False
    """Hand over now, and let the destination fetch what it lacks."""
    order: Order = Order.SEQUENTIAL
    """Of the chunks of the bulk phase."""
    reconnect_limit_s: float = 0.0
    """How long to try to get a lost connection back, in seconds without progress; 0: not at all."""
    mirrors: bool = False
    """Mode ``mirror``: forward guests' writes from the start."""
    auto_mirror: bool = True
    """Mirror what passes cannot follow."""
    mirror_lag: MirrorLag = DEFAULT_LAG
    """How far the destination may be behind with what is mirrored."""
    throttle_max: int = 0
    """Per cent by which guests' writes may be slowed down before anything is mirrored; 0: not at all."""
    incremental: bool | None = None
    """What is left out. None: what the destination provably has. True: also what it has after comparing contents, and
    a shared base is a must. False: nothing."""
    block_incremental: bool | None = None
    """QMP's parameter: what ``incremental`` is where a migration does not say."""
    compression_level: int | None = None
    """Of Zstandard; None: nothing is compressed."""
    streams: int = 1
    """Connections to send over, at most."""


@dataclass(frozen=True)
class DiskStatistics:
    """One disk of a migration; bytes and chunks."""

    name: str
    size: int
    allocated_bytes: int
    """Bytes of chunks that held data when the migration began."""
    dirty_bytes: int
    dirty_chunks: int
    in_flight_chunks: int
    sent_bytes: int
    """Disk bytes read for sending, repeats and zeros included."""
    parked_writes: int
    digest: int


@dataclass(frozen=True)
class WindowStatistics:
    """The chunks on their way, in QEMU's words (BlkMigState: submitted, read_done, transferred), in frames."""

    submitted: int
    """Being read."""
    read_done: int
    """Read, waiting to be sent."""
    in_flight: int
    """Sent, not acknowledged."""
    transferred: int
    """Acknowledged."""


@dataclass(frozen=True)
class PacingStatistics:
    """What a migration does to its guests (`fusemig.migration.pacer`)."""

    is_mirror_wanted: bool = False
    """Whether the user wants everything mirrored."""
    reach: Reach = Reach.NONE
    """What is mirrored now."""
    mirrored_chunks: int = 0
    behind_bytes: int = 0
    """What the destination lacks of the mirrored chunks."""
    window_bytes: int = 0
    """How much that may be."""
    paced_writes: int = 0
    """Writes that wait for their turn."""
    held_replies: int = 0
    """Writes that were made and are answered when the destination has them."""
    throttle_percent: int = 0
    n_fallbacks: int = 0
    """How often mirroring was given up for a while because nothing was acknowledged."""


@dataclass(frozen=True)
class MigrationStatistics:
    """A migration at one moment; times in seconds, sizes in bytes."""

    phase: MigrationPhase
    session: str
    peer: str
    pass_number: int
    disks: tuple[DiskStatistics, ...]
    window: WindowStatistics
    pending_bytes: int
    wire_bytes: int
    """Bytes sent, headers included."""
    dirtied_bytes: int
    """Bytes of blocks that guests dirtied after they had been taken for sending (or in holes)."""
    bandwidth: float
    """Bytes per second that the way to the destination carries while it is used."""
    send_rate: float
    """Bytes per second acknowledged lately, pauses included."""
    dirty_rate: float
    """Bytes per second dirtied lately."""
    expected_downtime_s: float
    """As predicted; before and after that, what is pending over the bandwidth."""
    setup_s: float
    total_s: float
    frozen_s: float
    """How long the write gate has been closed, or was; 0 before."""
    downtime_s: float | None
    """From closing the write gate to TAKEN, once known."""
    passes_without_progress: int
    error: str | None
    error_kind: str | None
    pacing: PacingStatistics = field(default_factory=PacingStatistics)
    prediction: Prediction | None = None
    """What is to be expected, while passes run and the link is known."""
    n_reconnects: int = 0
    """How often the connection was lost and made again."""
    n_streams: int = 1
    """Connections that the source sends over."""
    kept_bytes: int = 0
    """What the destination had already and need not be sent."""
    unchanged_bytes: int = 0
    """What guests wrote again with the bytes that were there, and was not sent again."""
    has_packer: bool = False
    """Whether compression was asked for."""
    packed_in_bytes: int = 0
    """What was compressed."""
    packed_out_bytes: int = 0
    """And what became of it."""
    is_packing: bool = False
    """Whether frames are being compressed at the moment."""
    is_postcopy: bool = False
    """Whether the hand-off comes, or came, before everything was sent."""
    waiting: str = ""
    """Why there is no connection at the moment."""
