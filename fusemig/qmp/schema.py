"""The vocabulary of the control socket: commands' arguments and results, events, capabilities.

Rules:

1. Names and types are those of QEMU 7.2's QAPI (qapi/migration.json, qapi/block-core.json, qapi/run-state.json); what
   is ours begins with ``x-fusemig-`` or lives inside a member of that name. Python names have underscores for hyphens.
2. Arguments are checked whole before a command sees them (`fusemig.qmp.check`), with QEMU's texts, in QEMU's order:
   members in the order of their declaration, then unknown ones. A member that we do not honour is not declared, so it
   is refused.
3. An optional member that is absent is `UNSET`, in results too. Sizes are bytes, times milliseconds, rates bytes/s.
4. Everything here is data. What a command does, and which value it can honour at the moment, is the daemon's.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Final

import msgspec
from msgspec import UNSET, UnsetType, field  # noqa: TC002  (msgspec reads the annotations)

from fusemig.qmp import block, codec, estimate, objects, seeing
from fusemig.qmp.base import Arguments as Arguments
from fusemig.qmp.base import NoArguments as NoArguments
from fusemig.qmp.base import Result as Result

# Enumerations


class MigrationStatus(StrEnum):
    """QAPI MigrationStatus; where there was no migration, ``query-migrate`` has no ``status``."""

    NONE = "none"
    SETUP = "setup"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    ACTIVE = "active"
    POSTCOPY_ACTIVE = "postcopy-active"
    POSTCOPY_PAUSED = "postcopy-paused"
    POSTCOPY_RECOVER = "postcopy-recover"
    COMPLETED = "completed"
    FAILED = "failed"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"


class RunState(StrEnum):
    """The QAPI RunStates that a disk server can be in."""

    RUNNING = "running"
    """Guests may write."""
    PAUSED = "paused"
    """``stop`` closed the gate."""
    FINISH_MIGRATE = "finish-migrate"
    """The switchover has closed the gate."""
    POSTMIGRATE = "postmigrate"
    """The disks were handed off."""
    INMIGRATE = "inmigrate"
    """The disks are not complete yet."""
    IO_ERROR = "io-error"
    SHUTDOWN = "shutdown"


class MigrationCapability(StrEnum):
    """QAPI MigrationCapability of QEMU 7.2, in its order; most of it is about guest memory and never supported."""

    XBZRLE = "xbzrle"
    RDMA_PIN_ALL = "rdma-pin-all"
    AUTO_CONVERGE = "auto-converge"
    ZERO_BLOCKS = "zero-blocks"
    COMPRESS = "compress"
    EVENTS = "events"
    POSTCOPY_RAM = "postcopy-ram"
    X_COLO = "x-colo"
    RELEASE_RAM = "release-ram"
    BLOCK = "block"
    RETURN_PATH = "return-path"
    PAUSE_BEFORE_SWITCHOVER = "pause-before-switchover"
    MULTIFD = "multifd"
    DIRTY_BITMAPS = "dirty-bitmaps"
    POSTCOPY_BLOCKTIME = "postcopy-blocktime"
    LATE_BLOCK_ACTIVATE = "late-block-activate"
    X_IGNORE_SHARED = "x-ignore-shared"
    VALIDATE_UUID = "validate-uuid"
    BACKGROUND_SNAPSHOT = "background-snapshot"
    ZERO_COPY_SEND = "zero-copy-send"
    POSTCOPY_PREEMPT = "postcopy-preempt"


SUPPORTED_CAPABILITIES: Final = frozenset(
    {
        MigrationCapability.EVENTS,
        MigrationCapability.PAUSE_BEFORE_SWITCHOVER,
        MigrationCapability.ZERO_BLOCKS,
        MigrationCapability.BLOCK,
        MigrationCapability.RETURN_PATH,
    }
)
"""What may be switched on."""

ALWAYS_ON_CAPABILITIES: Final = frozenset({MigrationCapability.ZERO_BLOCKS, MigrationCapability.BLOCK})
"""What cannot be switched off: there is nothing to migrate but blocks, and zero chunks are never sent as bytes."""


class QmpCapability(StrEnum):
    """QAPI QMPCapability; none is offered."""

    OOB = "oob"


class ShutdownCause(StrEnum):
    """The QAPI ShutdownCauses of a disk server's end."""

    HOST_QMP_QUIT = "host-qmp-quit"
    HOST_SIGNAL = "host-signal"


class SocketAddressType(StrEnum):
    """The QAPI SocketAddressTypes that we know."""

    INET = "inet"
    UNIX = "unix"


class Compression(StrEnum):
    """QAPI MultiFDCompression."""

    NONE = "none"
    ZLIB = "zlib"
    ZSTD = "zstd"


class Mode(StrEnum):
    """How a disk moves."""

    PRECOPY = "precopy"
    """Passes over what is dirty, then the switchover."""
    MIRROR = "mirror"
    """Guests' writes to what was sent are forwarded as they happen, and wait if it is too far behind."""
    POSTCOPY = "postcopy"
    """The destination takes over first and fetches what it lacks."""


class MirrorReach(StrEnum):
    """What is mirrored now."""

    NONE = "none"
    HOT = "hot"
    """What guests kept writing when passes did not help."""
    ALL = "all"


class Order(StrEnum):
    """In which order the bulk phase sends chunks."""

    SEQUENTIAL = "sequential"
    """Ascending, as QEMU does."""
    HEAT = "heat"
    """What guests write most comes last."""


class WireName(StrEnum):
    """The stream format."""

    NATIVE = "native"
    QEMU = "qemu"


class Side(StrEnum):
    """A side of a hand-off, as a person names the owner of a disk."""

    SOURCE = "source"
    DESTINATION = "destination"


class Role(StrEnum):
    """Which side of a migration this daemon is."""

    SOURCE = "source"
    DESTINATION = "destination"


# Arguments. The description of a range is what QEMU says the parameter "expects".

UInt63 = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1, description="uint64")]
"""QEMU's size type, without the upper half that nobody means."""
DowntimeLimit = Annotated[
    int, msgspec.Meta(ge=0, le=2_000_000, description="an integer in the range of 0 to (2000 * 1000) ms")
]
Channels = Annotated[int, msgspec.Meta(ge=1, le=255, description="a value between 1 and 255")]
ZstdLevel = Annotated[int, msgspec.Meta(ge=0, le=20, description="a value between 0 and 20")]
ThrottleMax = Annotated[int, msgspec.Meta(ge=0, le=99, description="an integer in the range of 0 to 99")]
CommandDeadline = Annotated[
    int, msgspec.Meta(ge=1, le=3_600_000, description="an integer in the range of 1 to (3600 * 1000) ms")
]


class QmpCapabilities(Arguments, frozen=True, kw_only=True):
    """``qmp_capabilities``; none is offered, so only the empty list can be honoured."""

    enable: list[QmpCapability] = field(default_factory=list)


class Migrate(Arguments, frozen=True, kw_only=True):
    """``migrate``: start, and return at once."""

    uri: str
    blk: bool | UnsetType = UNSET
    """QEMU's way to ask for block migration; False cannot be honoured."""
    inc: bool | UnsetType = UNSET
    """QEMU: the destination has the shared base; send only what differs from it. Here also: compare with the older
    copy that it has. False: send everything. Absent: as ``block-incremental`` says, if that was set; else leave out
    what provably is there, a shared base included."""
    detach: bool = True
    """Of no meaning, in QEMU too: the command never waits."""
    resume: bool = False
    """Continue a failed migration: send only what the destination lacks."""
    x_fusemig_disks: list[str] | UnsetType = UNSET
    """Names of the disks to move; absent: all."""
    x_fusemig_mode: Mode = Mode.PRECOPY
    x_fusemig_wire: WireName = WireName.NATIVE
    x_fusemig_machine: str | UnsetType = UNSET
    """The machine type of a destination that is a QEMU, which insists on its own; goes with ``qemu``."""
    x_fusemig_reconnect: UInt63 | UnsetType = UNSET
    """How long to try to get a lost connection back, in milliseconds without progress; absent or 0: not at all."""
    x_fusemig_order: Order = Order.SEQUENTIAL
    x_fusemig_group: str | UnsetType = UNSET
    """DIR/NAME, absolute: the disks move together with those of other daemons of this host, all or none; what decides
    is DIR/NAME.decision (docs/groups.md). Waits at pre-switchover, as with ``pause-before-switchover``."""
    x_fusemig_compress: str | UnsetType = UNSET
    """``zstd`` or ``zstd:LEVEL``; absent: nothing is compressed."""
    x_fusemig_guest: str | UnsetType = UNSET
    """``qmp:PATH`` of the QEMU that runs the guest, which moves with its disks."""
    x_fusemig_guest_destination: str | UnsetType = UNSET
    """``qmp:PATH`` of the QEMU that waits for it."""
    x_fusemig_guest_uri: str | UnsetType = UNSET
    """Where the guest's memory goes to, in QEMU's words; absent: where the QEMU at the destination listens."""
    x_fusemig_pause_command: str | UnsetType = UNSET
    """Brings a guest that is no QEMU's to a standstill; run by a shell, where the daemon allows it."""
    x_fusemig_resume_command: str | UnsetType = UNSET
    """Lets it run again, on the side that FUSEMIG_SIDE names."""
    x_fusemig_command_deadline: CommandDeadline | UnsetType = UNSET
    """For each of the two, in ms."""
    x_fusemig_tls_creds: str | UnsetType = UNSET
    """A directory of credentials for this migration alone; absent: the parameter ``tls-creds`` counts."""
    x_fusemig_tls_hostname: str = ""
    """What the destination's certificate must say; empty: the parameter, or else the URI's host."""
    x_fusemig_insecure: bool = False
    """Plain text may cross the network."""


class MigrateContinue(Arguments, frozen=True, kw_only=True):
    """``migrate-continue``: leave the state, which the caller must name (pre-switchover)."""

    state: MigrationStatus


class MigrateSetParameters(Arguments, frozen=True, kw_only=True):
    """``migrate-set-parameters``: what is absent stays as it is."""

    block_incremental: bool | UnsetType = UNSET
    tls_creds: str | UnsetType = UNSET
    tls_hostname: str | UnsetType = UNSET
    tls_authz: str | UnsetType = UNSET
    max_bandwidth: UInt63 | UnsetType = UNSET
    """Bytes per second, 0 for no limit. QEMU takes -1 for no limit; we refuse it."""
    downtime_limit: DowntimeLimit | UnsetType = UNSET
    multifd_channels: Channels | UnsetType = UNSET
    multifd_compression: Compression | UnsetType = UNSET
    multifd_zstd_level: ZstdLevel | UnsetType = UNSET
    x_fusemig_mode: Mode | UnsetType = UNSET
    """Of the migration that runs; ``migrate`` says it for the next one."""
    x_fusemig_auto_mirror: bool | UnsetType = UNSET
    """Whether ``precopy`` mirrors what its passes cannot follow."""
    x_fusemig_mirror_lag: str | UnsetType = UNSET
    """How far the destination may be behind with what is mirrored: a time, a size, or 0 to answer no write earlier."""
    x_fusemig_throttle_max: ThrottleMax | UnsetType = UNSET
    """Per cent by which guests' writes may be slowed down (QEMU: max-cpu-throttle)."""


class MigrationCapabilityStatus(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """One capability and whether it is, or shall be, on."""

    capability: MigrationCapability
    state: bool


class MigrateSetCapabilities(Arguments, frozen=True, kw_only=True):
    """``migrate-set-capabilities``: what is not listed stays as it is."""

    capabilities: list[MigrationCapabilityStatus]


class MigrateIncoming(Arguments, frozen=True, kw_only=True):
    """``migrate-incoming``: start to listen, where ``--incoming defer`` did not."""

    uri: str


CpuIndex = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1, description="a CPU number")]


class HumanMonitorCommand(Arguments, frozen=True, kw_only=True):
    """``human-monitor-command``: a line of QEMU's human monitor."""

    command_line: str
    cpu_index: CpuIndex | UnsetType = UNSET
    """Of no meaning; there is no CPU but number 0."""


class Estimate(Arguments, frozen=True, kw_only=True):
    """``x-fusemig-estimate``: what a migration to ``uri`` would take."""

    uri: str | UnsetType = UNSET
    """The way there is measured, by sending for a second; not needed where ``link`` is given."""
    link: Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1, description="a rate above 0")] | UnsetType = UNSET
    """Bytes per second that the way to the destination carries."""
    disks: list[str] | UnsetType = UNSET
    """Names of the disks to move; absent: all."""
    downtime_limit: DowntimeLimit | UnsetType = UNSET
    """Absent: the parameter of that name."""


class Resolve(Arguments, frozen=True, kw_only=True):
    """``x-fusemig-resolve``: a person's word for who owns disks that are in doubt, or takes released ones back."""

    disks: list[str]
    owner: Side
    i_have_fenced_the_other: bool = False
    """That the other side cannot write the disks and never will; it is not honoured without."""


class Ask(Arguments, frozen=True, kw_only=True):
    """``x-fusemig-ask``: ask who owns disks that are in doubt at ``uri``, where their destination is now."""

    disks: list[str]
    uri: str


# Results


class Name(Result, frozen=True, kw_only=True):
    """An element of ``query-commands`` and ``query-events``, and ``query-name`` itself."""

    name: str | UnsetType = UNSET


class StatusInfo(Result, frozen=True, kw_only=True):
    """``query-status``."""

    running: bool
    status: RunState
    singlestep: bool = False


class MigrationParameters(Result, frozen=True, kw_only=True):
    """``query-migrate-parameters``, with the defaults."""

    block_incremental: bool = False
    tls_creds: str = ""
    tls_hostname: str = ""
    tls_authz: str = ""
    max_bandwidth: int = 0
    """0 is no limit, and our default. QEMU's default is 134217728 (128 MiB/s)."""
    downtime_limit: int = 300
    multifd_channels: int = 2
    multifd_compression: Compression = Compression.NONE
    multifd_zstd_level: int = 1
    x_fusemig_auto_mirror: bool = True
    x_fusemig_mirror_lag: str = "20ms"
    x_fusemig_throttle_max: int = 0


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
    """A state that a guest came to on its way (`fusemig.guest`)."""

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
    kept_bytes: int = 0
    """What the destination had already; it is not sent unless it is written."""
    unchanged_bytes: int = 0
    """What guests wrote again with the bytes that were there; it is not sent again."""
    compression: CompressionInfo | UnsetType = UNSET
    """Present where compression was asked for."""
    waiting: str | UnsetType = UNSET
    """Why there is no connection at the moment; another one is being tried."""
    error_kind: str | UnsetType = UNSET
    """`FusemigError.kind` of what ended a failed migration."""
    group: str | UnsetType = UNSET
    """As ``x-fusemig-group`` said; in the phase ``pledged`` its decision is waited for."""
    guest: GuestInfo | UnsetType = UNSET
    """The guest that moves with the disks, if one does."""


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


class ServedDisk(Result, frozen=True, kw_only=True):
    """One disk of ``x-fusemig-status``."""

    name: str
    size: int
    path: str
    state: str
    """By its epoch file: ``owner``, ``incoming``, ``prepared``, ``handed-off``, ``released``, ``lending``,
    ``borrowing``; without one ``owner``, or ``waiting`` for a first source."""
    gate: str
    """``open``, ``closed`` (frozen) or ``read-only``."""
    parked_writes: int = 0
    read_only: bool = False
    io_error: bool = False
    """A flush failed; every later one fails too."""
    dirty_bytes: int = 0
    missing_bytes: int = 0
    """Of a disk that was taken over before all of it was sent: how much is still at its source."""
    waiting_requests: int = 0
    """Guests' requests that wait for some of that."""
    epoch: int | UnsetType = UNSET
    in_doubt: str | UnsetType = UNSET
    """Present where it is not known who owns the disk: what has become of asking."""


class Count(Result, frozen=True, kw_only=True):
    """How often something was the case."""

    what: str
    count: int


class Incoming(Result, frozen=True, kw_only=True):
    """What this daemon waits for, or receives, as a destination."""

    uri: str
    status: MigrationStatus
    error_desc: str | UnsetType = UNSET
    rejected_connections: int = 0
    rejected_by_reason: list[Count] = field(default_factory=list)
    """The same by ``error-kind``; ``displaced`` had to give way to others who came."""
    tls: bool = False
    """Whether sources must prove who they are."""


class FrozenWithin(Result, frozen=True, kw_only=True):
    """One bucket of a histogram: how many freezes were no longer than this."""

    limit_ms: float
    count: int


class MigrationTotals(Result, frozen=True, kw_only=True):
    """What became of the daemon's migrations since it started."""

    outgoing: list[Count] = field(default_factory=list)
    """How many ended in which phase."""
    incoming: list[Count] = field(default_factory=list)
    passes: int = 0
    """Passes of outgoing migrations, the running one included."""
    n_frozen: int = 0
    """Outgoing migrations that froze their guests."""
    frozen_ms: float = 0.0
    """How long those froze them, together."""
    frozen_within: list[FrozenWithin] = field(default_factory=list)


class Succession(Result, frozen=True, kw_only=True):
    """Of a daemon that took over from another one."""

    predecessors: int
    """How many daemons served this mount before."""
    predecessor: str
    """The version of the last of them."""
    pause_ms: float | UnsetType = UNSET
    """How long no request was taken, after an upgrade; absent after a crash."""


class UpgradeInfo(Result, frozen=True, kw_only=True):
    """``x-fusemig-upgrade``: the versions, before the one takes over from the other."""

    running: str
    installed: str


class DaemonStatus(Result, frozen=True, kw_only=True):
    """``x-fusemig-status``."""

    version: str
    pid: int
    mountpoint: str
    status: RunState
    disks: list[ServedDisk]
    role: Role | UnsetType = UNSET
    """Absent: neither; nothing migrates and nothing is awaited."""
    gates_closed: int = 0
    parked_writes: int = 0
    handler_errors: int = 0
    """Requests answered EIO because of a bug of ours; the log has them."""
    incoming: Incoming | UnsetType = UNSET
    migration: MigrationInfo | UnsetType = UNSET
    totals: MigrationTotals
    metrics: str | UnsetType = UNSET
    """Where Prometheus is answered, with the port as bound."""
    web: str | UnsetType = UNSET
    """Where the web page is, with the port as bound."""
    web_token: str | UnsetType = UNSET
    """The file that holds what the page needs to act."""
    succession: Succession | UnsetType = UNSET
    """Absent: this is the first daemon of its mount."""


class View(Result, frozen=True, kw_only=True):
    """``x-fusemig-query-view``: everything that `fusemig top` and the web page show of a moment."""

    at: int
    """Milliseconds since the epoch."""
    clock: float
    """Milliseconds of a clock that is never set: rates are differences of counters over differences of this."""
    status: DaemonStatus
    parameters: MigrationParameters
    disks: list[seeing.DiskView]
    """In the order of ``status``."""
    events: list[seeing.RecentEvent]
    """The last ones, oldest first, those included that the capability ``events`` would have to be on for."""


class MigrationRecord(Result, frozen=True, kw_only=True):
    """A migration in ``x-fusemig-query-history``: how it went, as far as it is."""

    began: int
    """Milliseconds since the epoch; everything else is told in milliseconds since then."""
    peer: str
    """The other side."""
    parameters: seeing.RecordParameters | UnsetType = UNSET
    """As they were last; of a source."""
    phases: list[seeing.PhaseStep]
    passes: list[seeing.PassStep]
    samples: list[seeing.Sample]
    """At least a second apart; of a long migration farther, so that they never become many."""
    info: MigrationInfo
    """What ``query-migrate`` said of it last."""


class Uuid(Result, frozen=True, kw_only=True):
    """``query-uuid``."""

    uuid: str = field(name="UUID", default="00000000-0000-0000-0000-000000000000")
    """What a QEMU without ``-uuid`` says."""


class SocketAddress(Result, frozen=True, kw_only=True):
    """Where a destination listens."""

    type: SocketAddressType
    host: str | UnsetType = UNSET
    port: str | UnsetType = UNSET
    path: str | UnsetType = UNSET


# Events


class MigrationEvent(Result, frozen=True, kw_only=True):
    """Data of MIGRATION."""

    status: MigrationStatus


class MigrationPassEvent(Result, frozen=True, kw_only=True):
    """Data of MIGRATION_PASS."""

    pass_: int = field(name="pass")


class PacingEvent(Result, frozen=True, kw_only=True):
    """Data of X_FUSEMIG_PACING: what is done to guests from now on."""

    mirror: MirrorReach
    throttle_percentage: int


class ShutdownEvent(Result, frozen=True, kw_only=True):
    """Data of SHUTDOWN."""

    guest: bool = False
    reason: ShutdownCause = ShutdownCause.HOST_QMP_QUIT


EVENTS: Final[dict[str, type[Result] | None]] = {
    "MIGRATION": MigrationEvent,
    "MIGRATION_PASS": MigrationPassEvent,
    "STOP": None,
    "RESUME": None,
    "SHUTDOWN": ShutdownEvent,
    "X_FUSEMIG_PACING": PacingEvent,
    "X_FUSEMIG_UPGRADE": UpgradeInfo,
}
"""Every event and its data."""

MIGRATION_EVENTS: Final = frozenset({"MIGRATION", "MIGRATION_PASS", "X_FUSEMIG_PACING"})
"""The events that are sent only while the capability ``events`` is on."""


# Commands

COMMANDS: Final[dict[str, type[Arguments]]] = {
    "qmp_capabilities": QmpCapabilities,
    "query-version": NoArguments,
    "query-commands": NoArguments,
    "query-events": NoArguments,
    "query-qmp-schema": NoArguments,
    "query-name": NoArguments,
    "query-uuid": NoArguments,
    "query-status": NoArguments,
    "query-block": NoArguments,
    "query-blockstats": block.QueryBlockstats,
    "query-block-jobs": NoArguments,
    "query-named-block-nodes": block.QueryNamedBlockNodes,
    "query-migrate": NoArguments,
    "query-migrate-parameters": NoArguments,
    "query-migrate-capabilities": NoArguments,
    "migrate": Migrate,
    "migrate_cancel": NoArguments,
    "migrate-continue": MigrateContinue,
    "migrate-start-postcopy": NoArguments,
    "migrate-set-parameters": MigrateSetParameters,
    "migrate-set-capabilities": MigrateSetCapabilities,
    "object-add": objects.ObjectAdd,
    "object-del": objects.ObjectDel,
    "migrate-incoming": MigrateIncoming,
    "migrate-pause": NoArguments,
    "stop": NoArguments,
    "cont": NoArguments,
    "quit": NoArguments,
    "human-monitor-command": HumanMonitorCommand,
    "x-fusemig-status": NoArguments,
    "x-fusemig-estimate": Estimate,
    "x-fusemig-resolve": Resolve,
    "x-fusemig-upgrade": NoArguments,
    "x-fusemig-ask": Ask,
    "x-fusemig-query-view": seeing.QueryView,
    "x-fusemig-query-history": NoArguments,
}
"""Every command and its arguments. The server itself answers the first five."""

RESULTS: Final[dict[str, Any]] = {
    "query-version": codec.Version,
    "query-commands": list[Name],
    "query-events": list[Name],
    "query-qmp-schema": list[Any],
    "query-name": Name,
    "query-uuid": Uuid,
    "query-status": StatusInfo,
    "query-block": list[block.BlockInfo],
    "query-blockstats": list[block.BlockStats],
    "query-block-jobs": list[Any],
    "query-named-block-nodes": list[block.BlockDeviceInfo],
    "query-migrate": MigrationInfo,
    "query-migrate-parameters": MigrationParameters,
    "query-migrate-capabilities": list[MigrationCapabilityStatus],
    "human-monitor-command": str,
    "x-fusemig-status": DaemonStatus,
    "x-fusemig-upgrade": UpgradeInfo,
    "x-fusemig-estimate": estimate.EstimateInfo,
    "x-fusemig-query-view": View,
    "x-fusemig-query-history": list[MigrationRecord],
}
"""What the commands return; those that are not here return the empty object."""
