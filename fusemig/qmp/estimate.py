"""What ``x-fusemig-estimate`` returns. Sizes are bytes, times milliseconds, rates bytes per second."""

from __future__ import annotations

from enum import StrEnum

from msgspec import UNSET, UnsetType, field

from fusemig.qmp.base import Result


class WorkingSetPoint(Result, frozen=True, kw_only=True):
    """How many different bytes of a disk guests write within a time, on average."""

    seconds: float
    bytes: int


class EstimatedDisk(Result, frozen=True, kw_only=True):
    """One disk of an estimate."""

    name: str
    size: int
    data_bytes: int
    """Allocated bytes, which the bulk phase reads."""
    zero_bytes: int
    """The rest: holes, which cost nothing."""
    write_rate: int
    """Bytes per second that guests write, in whole blocks."""
    dirty_rate: int
    """Different ones of them, in a second."""
    observed_ms: int
    """How long it has been watched."""
    working_set: list[WorkingSetPoint]


class RemedyKind(StrEnum):
    """What would make a migration converge (`fusemig.core.forecast.RemedyKind`)."""

    BANDWIDTH = "bandwidth"
    """A link, or ``max-bandwidth``, of so many bytes per second."""
    DOWNTIME_LIMIT = "downtime-limit"
    """In ms."""
    THROTTLE = "throttle"
    """Guests that write at most so many bytes per second."""
    MIRROR = "mirror"
    """Mirroring, beside which guests write at least so many bytes per second."""
    POSTCOPY = "postcopy"
    """Post-copy, after which both hosts are needed for so many ms at least."""


class EstimateRemedy(Result, frozen=True, kw_only=True):
    """One thing that would do, by itself."""

    kind: RemedyKind
    value: int


class BandwidthSource(StrEnum):
    """Where the bandwidth of an estimate comes from."""

    GIVEN = "given"
    MEASURED = "measured"


class EstimateInfo(Result, frozen=True, kw_only=True):
    """``x-fusemig-estimate``; sums of all disks."""

    uri: str | UnsetType = UNSET
    disks: list[EstimatedDisk]
    data_bytes: int
    zero_bytes: int
    write_rate: int
    dirty_rate: int
    observed_ms: int
    """How long guests have been watched; of the disk that was watched for the shortest time."""
    bandwidth: int
    """What passes can use, in bytes per second: of the link, or ``max-bandwidth`` if that is less."""
    bandwidth_source: BandwidthSource
    downtime_limit: int
    converges: bool
    """Whether the downtime limit can be met while guests write as they do now."""
    expected_total_time: int | UnsetType = UNSET
    expected_passes: int | UnsetType = UNSET
    expected_bytes: int | UnsetType = UNSET
    """To be sent, repeats included."""
    expected_downtime: int
    """In ms; where it does not converge, what a switchover would take after any number of passes."""
    remedies: list[EstimateRemedy] = field(default_factory=list)
    """Where it does not converge: each would do by itself."""
