"""The daemon as a whole in QMP's words: `x-fusemig-status`, from which `fusemig status` and the metrics are made."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import Counter
from typing import TYPE_CHECKING, Final

from msgspec import UNSET

from fusemig import __version__
from fusemig.daemon.block_info import served_disk
from fusemig.daemon.migration_info import incoming_info, migration_info, role
from fusemig.disk.tracked import Gate
from fusemig.qmp import schema

if TYPE_CHECKING:
    from collections.abc import Mapping

    from msgspec import UnsetType

    from fusemig.daemon.daemon import Daemon
    from fusemig.migration.incoming import IncomingMigration
    from fusemig.migration.outgoing import OutgoingMigration

FREEZE_BUCKETS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Up to the freeze deadline."""


class Totals:
    """Counts what became of the daemon's migrations, each once when it ends."""

    def __init__(self) -> None:
        """None has ended."""
        self._outgoing: Counter[str] = Counter()
        self._incoming: Counter[str] = Counter()
        self._n_passes = 0
        self._n_frozen = 0
        self._frozen_s = 0.0
        self._in_bucket = [0] * (len(FREEZE_BUCKETS_S) + 1)

    def outgoing_over(self, migration: OutgoingMigration) -> None:
        """Count an outgoing migration that has ended."""
        stats = migration.statistics()
        self._outgoing[stats.phase.value] += 1
        self._n_passes += stats.pass_number
        if stats.frozen_s:
            self._n_frozen += 1
            self._frozen_s += stats.frozen_s
            self._in_bucket[bisect_left(FREEZE_BUCKETS_S, stats.frozen_s)] += 1

    def incoming_over(self, migration: IncomingMigration) -> None:
        """Count an incoming migration that has ended."""
        self._incoming[migration.phase.value] += 1

    def info(self, running: OutgoingMigration | None) -> schema.MigrationTotals:
        """Return the counts, the passes of a running migration among them."""
        n_within, within = 0, []
        for limit_s, count in zip(FREEZE_BUCKETS_S, self._in_bucket, strict=False):
            n_within += count
            within.append(schema.FrozenWithin(limit_ms=limit_s * 1000, count=n_within))
        return schema.MigrationTotals(
            outgoing=_counts(self._outgoing),
            incoming=_counts(self._incoming),
            passes=self._n_passes + (0 if running is None else running.statistics().pass_number),
            n_frozen=self._n_frozen,
            frozen_ms=self._frozen_s * 1000,
            frozen_within=within,
        )


def _counts(counted: Mapping[str, int]) -> list[schema.Count]:
    """Return counts in the order of their names."""
    return [schema.Count(what=what, count=count) for what, count in sorted(counted.items())]


def daemon_status(daemon: Daemon) -> schema.DaemonStatus:
    """Return everything that `fusemig status` shows."""
    disks = [served_disk(served) for served in daemon.disks.values()]
    info = migration_info(daemon)
    return schema.DaemonStatus(
        version=__version__,
        pid=os.getpid(),
        mountpoint=str(daemon.options.mountpoint),
        status=run_state(daemon),
        disks=disks,
        role=role(daemon),
        gates_closed=sum(disk.gate == Gate.CLOSED.value for disk in disks),
        parked_writes=sum(disk.parked_writes for disk in disks),
        handler_errors=0 if daemon.mount is None else daemon.mount.statistics().handler_errors,
        incoming=incoming_info(daemon),
        migration=UNSET if info.status is UNSET else info,
        succession=_succession(daemon),
        totals=daemon.totals.info(daemon.migrator.migration if daemon.migrator.is_migrating else None),
        web=UNSET if daemon.web is None else daemon.web.address,
        web_token=UNSET if daemon.web is None else str(daemon.web.token_path),
        metrics=UNSET if daemon.metrics is None else str(daemon.metrics.uri),
    )


def migration_parameters(daemon: Daemon) -> schema.MigrationParameters:
    """Return the parameters of the migration that runs, or of the next one."""
    parameters, security = daemon.migrator.parameters, daemon.security
    return schema.MigrationParameters(
        block_incremental=bool(parameters.block_incremental),
        max_bandwidth=parameters.max_bandwidth,
        downtime_limit=round(parameters.downtime_limit_s * 1000),
        tls_creds=security.tls_creds,
        tls_hostname=security.tls_hostname,
        tls_authz=security.tls_authz,
        x_fusemig_auto_mirror=parameters.auto_mirror,
        x_fusemig_mirror_lag=str(parameters.mirror_lag),
        x_fusemig_throttle_max=parameters.throttle_max,
    )


def run_state(daemon: Daemon) -> schema.RunState:
    """Return the one word for all disks: the state that keeps most from being written."""
    disks = [served.disk for served in daemon.disks.values() if served.disk is not None]
    if io_error(daemon) is not None:
        return schema.RunState.IO_ERROR
    if any(disk.is_frozen for disk in disks):
        return schema.RunState.FINISH_MIGRATE
    if any(disk.gate is Gate.CLOSED for disk in disks):
        return schema.RunState.PAUSED
    if any(disk.gate is Gate.OPEN for disk in disks):
        return schema.RunState.RUNNING
    if any(served.is_waiting for served in daemon.disks.values()):
        return schema.RunState.INMIGRATE
    return schema.RunState.POSTMIGRATE


def io_error(daemon: Daemon) -> str | None:
    """Return which disk must not be written any more, and why; None if all is well."""
    for served in daemon.disks.values():
        if served.io_error is not None:
            return f"disk '{served.name}' has an I/O error: {served.io_error}"
    return None


def _succession(daemon: Daemon) -> schema.Succession | UnsetType:
    found, pause_s = daemon.inheritance.found, daemon.inheritance.pause_s
    if found is None:
        return UNSET
    return schema.Succession(
        predecessors=found.n_predecessors + 1,
        predecessor=found.software,
        pause_ms=UNSET if pause_s is None else pause_s * 1000,
    )
