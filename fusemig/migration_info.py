"""Migrations in QMP's words: what ``query-migrate`` and ``x-fusemig-status`` tell of the last one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import UNSET

from fusemig.migration.outgoing import OutgoingMigration
from fusemig.phase import QMP_STATUS, MigrationPhase
from fusemig.qmp import schema
from fusemig.runtimes.account import guest_info

if TYPE_CHECKING:
    from msgspec import UnsetType

    from fusemig.daemon import Daemon
    from fusemig.migration.incoming import IncomingMigration
    from fusemig.migration.stats import DiskStatistics, MigrationStatistics, PacingStatistics


def role(daemon: Daemon) -> schema.Role | UnsetType:
    """Return which end of the migration that is shown, or of one to come, the daemon is."""
    if isinstance(daemon.shown, OutgoingMigration):
        return schema.Role.SOURCE
    if daemon.inbound.is_destination:
        return schema.Role.DESTINATION
    return UNSET


def incoming_info(daemon: Daemon) -> schema.Incoming | UnsetType:
    """Return how the daemon stands as a destination, if it is one."""
    if not daemon.inbound.is_destination:
        return UNSET
    incoming = daemon.inbound.migration
    error = None if incoming is None else incoming.error
    return schema.Incoming(
        uri="defer" if daemon.inbound.listener is None else str(daemon.inbound.listener.uri),
        status=schema.MigrationStatus(QMP_STATUS[MigrationPhase.NONE if incoming is None else incoming.phase]),
        error_desc=UNSET if error is None else str(error),
        rejected_connections=daemon.inbound.rejected.total(),
        rejected_by_reason=[schema.Count(what=kind, count=n) for kind, n in sorted(daemon.inbound.rejected.items())],
        tls=daemon.security.has_server_credentials,
    )


def migration_info(daemon: Daemon) -> schema.MigrationInfo:
    """Return the migration that is shown; without a status if there is none."""
    shown = daemon.shown
    if isinstance(shown, OutgoingMigration) and shown.phase is not MigrationPhase.NONE:
        return outgoing_info(shown)
    where = _socket_address(daemon)
    if shown is None or isinstance(shown, OutgoingMigration) or shown.phase is MigrationPhase.NONE:
        return schema.MigrationInfo(socket_address=where)
    return incoming_migration_info(shown, where)


def _socket_address(daemon: Daemon) -> list[schema.SocketAddress] | UnsetType:
    if daemon.inbound.listener is None:
        return UNSET
    uri = daemon.inbound.listener.uri
    if uri.kind == "unix":
        return [schema.SocketAddress(type=schema.SocketAddressType.UNIX, path=uri.path)]
    return [schema.SocketAddress(type=schema.SocketAddressType.INET, host=uri.host, port=str(uri.port))]


_RUNNING = frozenset({"setup", "active", "pre-switchover", "device", "cancelling"})


def outgoing_info(migration: OutgoingMigration) -> schema.MigrationInfo:
    """Return a migration of ours as a source."""
    stats = migration.statistics()
    status = QMP_STATUS[stats.phase]
    prediction = stats.prediction
    return schema.MigrationInfo(
        status=schema.MigrationStatus(status),
        disk=schema.MigrationStats(
            transferred=stats.wire_bytes,
            remaining=stats.pending_bytes,
            total=sum(disk.size for disk in stats.disks),
            dirty_sync_count=stats.pass_number,
            mbps=stats.send_rate * 8 / 1e6,
        ),
        ram=schema.MigrationStats(),
        total_time=round(stats.total_s * 1000),
        setup_time=round(stats.setup_s * 1000),
        expected_downtime=_milliseconds(stats.expected_downtime_s) if status in _RUNNING else UNSET,
        downtime=UNSET if stats.downtime_s is None else _milliseconds(stats.downtime_s),
        error_desc=UNSET if stats.error is None else stats.error,
        x_fusemig=schema.FusemigMigration(
            role=schema.Role.SOURCE,
            session=stats.session,
            phase=stats.phase.value,
            mode=_mode(stats),
            wire=schema.WireName(migration.wire),
            pass_=stats.pass_number,
            pacing=_pacing(stats.pacing),
            disks=[_migrating_disk(disk) for disk in stats.disks],
            window=schema.MigrationWindow(
                submitted=stats.window.submitted,
                read_done=stats.window.read_done,
                in_flight=stats.window.in_flight,
                transferred=stats.window.transferred,
            ),
            bandwidth=round(stats.send_rate),
            dirty_rate=round(stats.dirty_rate),
            bytes_dirtied=stats.dirtied_bytes,
            converges=UNSET if prediction is None else prediction.converges,
            eta=UNSET if prediction is None or not prediction.converges else round(prediction.duration_s * 1000),
            wire_bytes=stats.wire_bytes,
            frozen_ms=stats.frozen_s * 1000,
            reconnects=stats.n_reconnects,
            kept_bytes=stats.kept_bytes,
            unchanged_bytes=stats.unchanged_bytes,
            compression=schema.CompressionInfo(
                active=stats.is_packing, bytes_in=stats.packed_in_bytes, bytes_out=stats.packed_out_bytes
            )
            if stats.has_packer
            else UNSET,
            waiting=stats.waiting or UNSET,
            error_kind=UNSET if stats.error_kind is None else stats.error_kind,
            group=migration.group or UNSET,
            guest=guest_info(migration.guest.account(), migration.started_at),
        ),
    )


def _mode(stats: MigrationStatistics) -> schema.Mode:
    if stats.is_postcopy:
        return schema.Mode.POSTCOPY
    return schema.Mode.MIRROR if stats.pacing.is_mirror_wanted else schema.Mode.PRECOPY


def _pacing(pacing: PacingStatistics) -> schema.MigrationPacing:
    return schema.MigrationPacing(
        mirror=schema.MirrorReach(pacing.reach.value),
        mirrored_chunks=pacing.mirrored_chunks,
        behind_bytes=pacing.behind_bytes,
        window_bytes=pacing.window_bytes,
        waiting_writes=pacing.paced_writes,
        held_replies=pacing.held_replies,
        throttle_percentage=pacing.throttle_percent,
        fallbacks=pacing.n_fallbacks,
    )


def _milliseconds(seconds: float) -> int:
    """Round up: a downtime of 0 ms is not to be had."""
    return min(2_000_000, int(seconds * 1000) + 1) if seconds != float("inf") else 2_000_000


def _migrating_disk(disk: DiskStatistics) -> schema.MigratingDisk:
    allocated = disk.allocated_bytes
    return schema.MigratingDisk(
        name=disk.name,
        size=disk.size,
        dirty_bytes=disk.dirty_bytes,
        dirty_chunks=disk.dirty_chunks,
        in_flight_chunks=disk.in_flight_chunks,
        sent_bytes=disk.sent_bytes,
        pass_progress=1.0 - min(1.0, disk.dirty_bytes / allocated) if allocated else 1.0,
        digest=f"{disk.digest:016x}",
    )


def incoming_migration_info(
    migration: IncomingMigration, socket_address: list[schema.SocketAddress] | UnsetType = UNSET
) -> schema.MigrationInfo:
    """Return a migration of ours as a destination, which listens at ``socket_address``."""
    stats = migration.statistics()
    fields: dict[str, Any] = {}
    if stats.error is not None:
        fields["error_desc"] = stats.error
    return schema.MigrationInfo(
        status=schema.MigrationStatus(QMP_STATUS[stats.phase]),
        disk=schema.MigrationStats(
            transferred=stats.received_bytes, remaining=stats.pending_bytes, total=stats.total_bytes
        ),
        ram=schema.MigrationStats(),
        x_fusemig=schema.FusemigMigration(
            role=schema.Role.DESTINATION,
            session=stats.session,
            phase=stats.phase.value,
            mode=schema.Mode.POSTCOPY if migration.is_loan else schema.Mode.PRECOPY,
            wire=schema.WireName(migration.wire),
            pass_=stats.pass_number,
            wire_bytes=stats.received_bytes,
            error_kind=UNSET if stats.error_kind is None else stats.error_kind,
        ),
        # As in QEMU, it is not told of a migration that has been taken over.
        socket_address=UNSET if stats.phase is MigrationPhase.COMPLETED else socket_address,
        **fields,
    )
