"""The vocabulary of `x-fusemig-status` and of what is made from it: what a daemon is, and does besides migrating."""

from __future__ import annotations

from msgspec import UNSET, UnsetType, field

from fusemig.qmp import seeing
from fusemig.qmp.base import Result
from fusemig.qmp.migrate import MigrationParameters
from fusemig.qmp.migration import MigrationInfo
from fusemig.qmp.words import MigrationStatus, Role, RunState


class StatusInfo(Result, frozen=True, kw_only=True):
    """``query-status``."""

    running: bool
    status: RunState
    singlestep: bool = False


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
