"""The answer of ``x-fusemig-estimate``: what a migration that has not begun would take (`fusemig.core.forecast`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio
from msgspec import UNSET

from fusemig.core.forecast import Plan, RemedyKind, predict, remedies
from fusemig.core.units import BLOCK_SIZE, n_blocks
from fusemig.errors import StateError
from fusemig.migration.link import HANDSHAKE_DEADLINE_S
from fusemig.migration.probe import measure
from fusemig.net.transport import parse_uri
from fusemig.qmp import estimate as answer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fusemig.core.working_set import WorkingSet
    from fusemig.daemon.dialer import Dialer
    from fusemig.daemon.migrator import Migrator
    from fusemig.disk.tracked import TrackedDisk
    from fusemig.migration.stats import MigrationParameters

POINTS_S: Final = (1, 10, 60, 600)
"""Where the curve of a working set is shown."""
_TIMES: Final = frozenset({RemedyKind.DOWNTIME_LIMIT, RemedyKind.POSTCOPY})
"""Of which the value is a time."""


@dataclass(frozen=True)
class _Disk:
    disk: TrackedDisk
    data_bytes: int
    working_set: WorkingSet

    def describe(self) -> answer.EstimatedDisk:
        curve = self.working_set
        return answer.EstimatedDisk(
            name=self.disk.name,
            size=self.disk.size,
            data_bytes=self.data_bytes,
            zero_bytes=self.disk.size - self.data_bytes,
            write_rate=round(curve.write_rate),
            dirty_rate=round(curve.after(1.0)),
            observed_ms=round(self.disk.heat.observed_s * 1000),
            working_set=[
                answer.WorkingSetPoint(seconds=seconds, bytes=round(curve.after(seconds))) for seconds in POINTS_S
            ],
        )


async def estimate(
    migrator: Migrator,
    dialer: Dialer,
    uri: str | None,
    link: int | None,
    names: Sequence[str] | None,
    downtime_limit_s: float | None,
) -> answer.EstimateInfo:
    """Estimate a migration of the named disks, or of all that can move.

    Args:
        migrator: has the disks and the parameters.
        dialer: connects to the destination.
        uri: of the destination; the way there is measured unless ``link`` is given.
        link: bytes per second that the way carries.
        names: of disks.
        downtime_limit_s: None: the parameter.

    Raises:
        StateError: a disk cannot be migrated now, or neither ``uri`` nor ``link`` is given.
        FusemigError: the way cannot be measured, or a disk not be read.
    """
    chosen = migrator.choose(names)
    if link is not None:
        bandwidth, source = float(link), answer.BandwidthSource.GIVEN
    elif uri is not None:
        bandwidth, source = await _measured(dialer, uri), answer.BandwidthSource.MEASURED
    else:
        raise StateError("name the destination, to have the way there measured, or say how fast it is with --link RATE")
    disks = []
    for served in chosen:
        assert served.disk is not None
        data_bytes = await trio.to_thread.run_sync(_allocated, served.disk)
        disks.append(_Disk(served.disk, data_bytes, served.disk.heat.working_set()))
    return _answer(uri, disks, bandwidth, source, _limited(migrator.parameters, downtime_limit_s))


async def _measured(dialer: Dialer, uri: str) -> float:
    stream = await dialer.try_out(parse_uri(uri))
    try:
        with trio.fail_after(3 * HANDSHAKE_DEADLINE_S):
            return (await measure(stream)).bytes_per_s
    except trio.TooSlowError:
        raise StateError(f"{uri} took too long to be measured: say how fast the way is with --link RATE") from None
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
            await stream.aclose()


def _allocated(disk: TrackedDisk) -> int:
    """Return the bytes of blocks that hold data; may sleep."""
    end = total = 0
    for extent in disk.extents(0, disk.size):
        if extent.is_data:
            first = max(end, extent.offset - extent.offset % BLOCK_SIZE)
            end = min(n_blocks(extent.offset + extent.length) * BLOCK_SIZE, disk.size)
            total += max(0, end - first)
    return total


def _limited(parameters: MigrationParameters, downtime_limit_s: float | None) -> tuple[float, float, float]:
    limit_s = parameters.downtime_limit_s if downtime_limit_s is None else downtime_limit_s
    return float(parameters.max_bandwidth), limit_s, parameters.freeze_deadline_s


def _answer(
    uri: str | None,
    disks: Sequence[_Disk],
    bandwidth: float,
    source: answer.BandwidthSource,
    limits: tuple[float, float, float],
) -> answer.EstimateInfo:
    described = [disk.describe() for disk in disks]
    data_bytes = sum(disk.data_bytes for disk in described)
    plan = Plan([disk.working_set for disk in disks], data_bytes, bandwidth, *limits)
    found = predict(plan)
    return answer.EstimateInfo(
        uri=UNSET if uri is None else uri,
        disks=described,
        data_bytes=data_bytes,
        zero_bytes=sum(disk.zero_bytes for disk in described),
        write_rate=sum(disk.write_rate for disk in described),
        dirty_rate=sum(disk.dirty_rate for disk in described),
        observed_ms=min(disk.observed_ms for disk in described),
        bandwidth=round(plan.pass_bandwidth),
        bandwidth_source=source,
        downtime_limit=round(plan.downtime_limit_s * 1000),
        converges=found.converges,
        expected_total_time=round(found.duration_s * 1000) if found.converges else UNSET,
        expected_passes=found.n_passes if found.converges else UNSET,
        expected_bytes=round(found.sent_bytes) if found.converges else UNSET,
        expected_downtime=round(found.downtime_s * 1000),
        remedies=[]
        if found.converges
        else [
            answer.EstimateRemedy(
                kind=answer.RemedyKind(remedy.kind.value),
                value=round(remedy.value * (1000 if remedy.kind in _TIMES else 1)),
            )
            for remedy in remedies(plan)
        ],
    )
