"""The vocabulary of what is asked of a migration: the arguments of `migrate` and its kin, and the parameters."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import UNSET, UnsetType

from fusemig.qmp.base import Arguments, Result
from fusemig.qmp.words import Compression, MigrationCapability, MigrationStatus, Mode, Order, Side, WireName

# The description of a range is what QEMU says the parameter "expects".

UInt63 = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1, description="uint64")]
"""QEMU's size type, without the upper half that nobody means."""
DowntimeLimit = Annotated[
    int, msgspec.Meta(ge=0, le=2_000_000, description="an integer in the range of 0 to (2000 * 1000) ms")
]
Channels = Annotated[int, msgspec.Meta(ge=1, le=255, description="a value between 1 and 255")]
Streams = Annotated[int, msgspec.Meta(ge=1, le=16, description="a value between 1 and 16")]
ZstdLevel = Annotated[int, msgspec.Meta(ge=0, le=20, description="a value between 0 and 20")]
ThrottleMax = Annotated[int, msgspec.Meta(ge=0, le=99, description="an integer in the range of 0 to 99")]
CommandDeadline = Annotated[
    int, msgspec.Meta(ge=1, le=3_600_000, description="an integer in the range of 1 to (3600 * 1000) ms")
]


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
    x_fusemig_streams: Streams = 1
    """Connections to send over, at most. No ``multifd-channels``: that is of QEMU's ``multifd``, which both sides set
    and which has a stream format of its own."""
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
