"""The vocabulary of `query-migrate`: what is told of a migration."""

from __future__ import annotations

from msgspec import UNSET, UnsetType, field

from fusemig.qmp.base import Result
from fusemig.qmp.words import MigrationStatus, MirrorReach, Mode, Role, SocketAddressType, WireName


class MigrationStats(Result, frozen=True, kw_only=True):
    """``ram`` and ``disk`` of ``query-migrate``; what has no meaning for a disk is 0, as it is in QEMU."""

    transferred: int = 0
    remaining: int = 0
    total: int = 0
    duplicate: int = 0
    """QEMU: pages of zeros. Here: chunks of zeros."""
    skipped: int = 0
    normal: int = 0
    normal_bytes: int = 0
    dirty_pages_rate: int = 0
    mbps: float = 0
    dirty_sync_count: int = 0
    """How many passes were begun."""
    postcopy_requests: int = 0
    page_size: int = 0
    multifd_bytes: int = 0
    pages_per_second: int = 0
    precopy_bytes: int = 0
    downtime_bytes: int = 0
    postcopy_bytes: int = 0
    dirty_sync_missed_zero_copy: int = 0


class MigratingDisk(Result, frozen=True, kw_only=True):
    """One disk of a migration."""

    name: str
    size: int
    dirty_bytes: int = 0
    dirty_chunks: int = 0
    """Chunks that are dirty, wholly or in part."""
    in_flight_chunks: int = 0
    sent_bytes: int = 0
    """Bytes of the disk that were sent, in all passes; what crossed the wire is in ``wire-bytes``."""
    pass_progress: float = 0.0
    """How much of the present pass is over, 0 to 1."""
    digest: str | UnsetType = UNSET
    """Digest of the whole disk, once both sides agree on it."""


class MigrationWindow(Result, frozen=True, kw_only=True):
    """The chunks between disk and wire, under the names of QEMU's migration/block.c."""

    submitted: int = 0
    """Being read."""
    read_done: int = 0
    """Read and not sent."""
    in_flight: int = 0
    """Sent and not acknowledged."""
    transferred: int = 0
    """Acknowledged, since the start."""


class GuestStep(Result, frozen=True, kw_only=True):
    """A state that a guest came to on its way (`fusemig.core.guest`)."""

    state: str
    at_ms: float
    """Since the migration began."""


class GuestInfo(Result, frozen=True, kw_only=True):
    """A guest that moves with its disks."""

    runtime: str
    """``qemu`` or ``command``."""
    state: str
    """Where it is: the last of ``timeline``, or ``at-source``."""
    timeline: list[GuestStep] = field(default_factory=list)
    downtime_ms: float | UnsetType = UNSET
    """How long it stood still, once it runs again, on either side."""
    error: str | UnsetType = UNSET
    """Why it does not run where it may, and what to do."""


class MigrationPacing(Result, frozen=True, kw_only=True):
    """What a migration does to its guests."""

    mirror: MirrorReach = MirrorReach.NONE
    mirrored_chunks: int = 0
    behind_bytes: int = 0
    """What the destination lacks of the mirrored chunks."""
    window_bytes: int = 0
    """How much that may be before writes wait."""
    waiting_writes: int = 0
    """Writes that wait for their turn."""
    held_replies: int = 0
    """Writes that were made and are answered when the destination has them."""
    throttle_percentage: int = 0
    """By which guests' writes are slowed down (QEMU: cpu-throttle-percentage)."""
    fallbacks: int = 0
    """How often mirroring rested because the destination acknowledged nothing."""


class CompressionInfo(Result, frozen=True, kw_only=True):
    """What became of ``x-fusemig-compress``."""

    active: bool
    """Whether frames are being compressed at the moment; not where that would be slower."""
    bytes_in: int
    """Bytes that went compressed, before that."""
    bytes_out: int
    """And what they became."""


class FusemigMigration(Result, frozen=True, kw_only=True):
    """``x-fusemig`` of ``query-migrate``: what QEMU has no word for."""

    role: Role
    session: str
    """Names the migration, the same on both sides."""
    phase: str
    """The phase's own name; ``status`` is the nearest word of QEMU's."""
    mode: Mode
    wire: WireName
    pass_: int = field(name="pass", default=0)
    """Number of the present pass; 1 is the bulk phase."""
    disks: list[MigratingDisk] = field(default_factory=list)
    window: MigrationWindow = MigrationWindow()
    pacing: MigrationPacing = MigrationPacing()
    bandwidth: int = 0
    """Measured."""
    dirty_rate: int = 0
    """Measured: bytes that guests make dirty per second."""
    bytes_dirtied: int = 0
    """Bytes that guests made dirty since the start."""
    converges: bool | UnsetType = UNSET
    """Whether passes will come to fit the downtime limit while guests write as they do; absent: not known."""
    eta: int | UnsetType = UNSET
    """How long it will still take, in ms, waiting for ``migrate-continue`` not counted; absent: not known, or never."""
    wire_bytes: int = 0
    """Bytes that crossed the wire, framing included and compression counted."""
    frozen_ms: float = 0.0
    """How long the write gate has been closed, or was."""
    reconnects: int = 0
    """How often a lost connection was made again."""
    streams: int = 1
    """Connections that the source sends over; the destination may take fewer than were asked for."""
    kept_bytes: int = 0
    """What the destination had already; it is not sent unless it is written."""
    unchanged_bytes: int = 0
    """What guests wrote again with the bytes that were there; it is not sent again."""
    compression: CompressionInfo | UnsetType = UNSET
    """Present where compression was asked for."""
    waiting: str | UnsetType = UNSET
    """Why there is no connection at the moment, and one is going to be tried."""
    error_kind: str | UnsetType = UNSET
    """`FusemigError.kind` of what ended a failed migration."""
    group: str | UnsetType = UNSET
    """As ``x-fusemig-group`` said; in the phase ``pledged`` its decision is waited for."""
    guest: GuestInfo | UnsetType = UNSET
    """The guest that moves with the disks, if one does."""


class SocketAddress(Result, frozen=True, kw_only=True):
    """Where a destination listens."""

    type: SocketAddressType
    host: str | UnsetType = UNSET
    port: str | UnsetType = UNSET
    path: str | UnsetType = UNSET


class MigrationInfo(Result, frozen=True, kw_only=True):
    """``query-migrate``; empty where there was no migration."""

    status: MigrationStatus | UnsetType = UNSET
    ram: MigrationStats | UnsetType = UNSET
    disk: MigrationStats | UnsetType = UNSET
    total_time: int | UnsetType = UNSET
    setup_time: int | UnsetType = UNSET
    expected_downtime: int | UnsetType = UNSET
    downtime: int | UnsetType = UNSET
    error_desc: str | UnsetType = UNSET
    blocked_reasons: list[str] | UnsetType = UNSET
    socket_address: list[SocketAddress] | UnsetType = UNSET
    """Of a destination."""
    x_fusemig: FusemigMigration | UnsetType = UNSET
