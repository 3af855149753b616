"""The QMP commands: what each asks of the daemon, and the daemon's state in QMP's words.

One function per command, in the order of `fusemig.qmp.schema.COMMANDS`. What cannot be honoured is refused with the
reason and the next step, never silently accepted.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from msgspec import UNSET, UnsetType

from fusemig import __version__
from fusemig.control import Command, CommandError
from fusemig.disk.tracked import Gate
from fusemig.migration.outgoing import OutgoingMigration
from fusemig.migration.qemu_source import DEFAULT_MACHINE
from fusemig.phase import QMP_STATUS, MigrationPhase
from fusemig.qmp import schema
from fusemig.runtimes.account import guest_info
from fusemig.runtimes.options import guest_options
from fusemig.units import CHUNK_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fusemig.control import Session
    from fusemig.daemon import Daemon
    from fusemig.migration.incoming import IncomingMigration
    from fusemig.migration.stats import DiskStatistics
    from fusemig.served import ServedDisk


def command_table(daemon: Daemon) -> Mapping[str, Command]:
    """Return the commands that act on ``daemon``."""
    commands = _Commands(daemon)
    functions: dict[str, Callable[[Session, Any], Any]] = {
        "query-name": commands.query_name,
        "query-status": commands.query_status,
        "query-block": commands.query_block,
        "query-blockstats": commands.query_blockstats,
        "query-migrate": commands.query_migrate,
        "query-migrate-parameters": commands.query_migrate_parameters,
        "query-migrate-capabilities": commands.query_migrate_capabilities,
        "migrate": commands.migrate,
        "migrate_cancel": commands.migrate_cancel,
        "migrate-continue": commands.migrate_continue,
        "migrate-set-parameters": commands.migrate_set_parameters,
        "migrate-set-capabilities": commands.migrate_set_capabilities,
        "quit": commands.quit,
        "x-fusemig-status": commands.status,
    }
    return {name: Command(schema.COMMANDS[name], function) for name, function in functions.items()}


class _Commands:
    """The commands; each is called with the session and its checked arguments."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def query_name(self, _session: Session, _arguments: schema.NoArguments) -> schema.Name:
        return schema.Name(name=str(self._daemon.options.mountpoint))

    def query_status(self, _session: Session, _arguments: schema.NoArguments) -> schema.StatusInfo:
        state = _run_state(self._daemon)
        return schema.StatusInfo(running=state is schema.RunState.RUNNING, status=state)

    def query_block(self, _session: Session, _arguments: schema.NoArguments) -> list[schema.BlockInfo]:
        return [_block_info(served) for served in self._daemon.disks.values()]

    def query_blockstats(self, _session: Session, _arguments: schema.QueryBlockstats) -> list[schema.BlockStats]:
        return [
            schema.BlockStats(
                device=served.name,
                node_name=served.name,
                stats=schema.BlockDeviceStats(wr_bytes=0 if served.disk is None else served.disk.bytes_written),
            )
            for served in self._daemon.disks.values()
        ]

    def query_migrate(self, _session: Session, _arguments: schema.NoArguments) -> schema.MigrationInfo:
        return _migration_info(self._daemon)

    def query_migrate_parameters(self, _session: Session, _arguments: schema.NoArguments) -> schema.MigrationParameters:
        parameters = self._daemon.parameters
        return schema.MigrationParameters(
            max_bandwidth=parameters.max_bandwidth, downtime_limit=round(parameters.downtime_limit_s * 1000)
        )

    def query_migrate_capabilities(
        self, _session: Session, _arguments: schema.NoArguments
    ) -> list[schema.MigrationCapabilityStatus]:
        return [
            schema.MigrationCapabilityStatus(capability=one, state=one in self._daemon.capabilities)
            for one in schema.MigrationCapability
        ]

    def migrate(self, _session: Session, arguments: schema.Migrate) -> None:
        if arguments.blk is False:
            raise CommandError("Parameter 'blk' must be true: fusemig migrates disks and nothing else")
        for name, is_asked in (
            ("inc", arguments.inc),
            ("resume", arguments.resume),
            (f"x-fusemig-mode={arguments.x_fusemig_mode}", arguments.x_fusemig_mode is not schema.Mode.PRECOPY),
            ("x-fusemig-compress", arguments.x_fusemig_compress is not UNSET),
        ):
            if is_asked:
                raise CommandError(f"'{name}' is not supported by version {__version__}: leave it out")
        disks = None if isinstance(arguments.x_fusemig_disks, UnsetType) else arguments.x_fusemig_disks
        machine = None if isinstance(arguments.x_fusemig_machine, UnsetType) else arguments.x_fusemig_machine
        is_qemu = arguments.x_fusemig_wire is schema.WireName.QEMU
        if machine is not None and not is_qemu:
            raise CommandError("'x-fusemig-machine' goes with 'x-fusemig-wire' qemu: leave it out, or add that")
        guest = guest_options(arguments, are_commands_allowed=self._daemon.options.allow_guest_commands)
        if guest is not None and is_qemu:
            raise CommandError("a guest moves with its disks over the native wire only: leave 'x-fusemig-wire' out")
        self._daemon.migrate(arguments.uri, disks, is_qemu=is_qemu, machine=machine or DEFAULT_MACHINE, guest=guest)

    def migrate_cancel(self, _session: Session, _arguments: schema.NoArguments) -> None:
        # QEMU answers {} also when there is nothing to cancel.
        if self._daemon.outgoing is not None and self._daemon.is_migrating:
            self._daemon.outgoing.cancel()

    def migrate_continue(self, _session: Session, arguments: schema.MigrateContinue) -> None:
        outgoing = self._daemon.outgoing
        phase = MigrationPhase.NONE if outgoing is None else outgoing.phase
        if outgoing is None or QMP_STATUS[phase] != arguments.state:
            raise CommandError(f"Migration not in expected state: {QMP_STATUS[phase]}")
        outgoing.proceed()

    def migrate_set_parameters(self, _session: Session, arguments: schema.MigrateSetParameters) -> None:
        for name, is_asked in (
            ("block-incremental", bool(arguments.block_incremental)),
            ("tls-creds", bool(arguments.tls_creds)),
            ("tls-hostname", bool(arguments.tls_hostname)),
            ("tls-authz", bool(arguments.tls_authz)),
            ("multifd-channels", arguments.multifd_channels not in (UNSET, 2)),
            ("multifd-compression", arguments.multifd_compression not in (UNSET, schema.Compression.NONE)),
            ("multifd-zstd-level", arguments.multifd_zstd_level not in (UNSET, 1)),
        ):
            if is_asked:
                raise CommandError(f"Parameter '{name}' is not supported by fusemig {__version__}: leave it out")
        if not isinstance(arguments.max_bandwidth, UnsetType):
            self._daemon.parameters.max_bandwidth = arguments.max_bandwidth
        if not isinstance(arguments.downtime_limit, UnsetType):
            self._daemon.parameters.downtime_limit_s = arguments.downtime_limit / 1000

    def migrate_set_capabilities(self, _session: Session, arguments: schema.MigrateSetCapabilities) -> None:
        if self._daemon.is_migrating:
            raise CommandError("There's a migration process in progress")
        for one in arguments.capabilities:
            if one.state and one.capability not in schema.SUPPORTED_CAPABILITIES:
                raise CommandError(f"Capability '{one.capability}' is not supported: it is about guest memory")
            if not one.state and one.capability in schema.ALWAYS_ON_CAPABILITIES:
                raise CommandError(f"Capability '{one.capability}' is always on: fusemig migrates disks")
        for one in arguments.capabilities:
            (self._daemon.capabilities.add if one.state else self._daemon.capabilities.discard)(one.capability)

    def quit(self, _session: Session, _arguments: schema.NoArguments) -> None:
        self._daemon.stop("host-qmp-quit")

    def status(self, _session: Session, _arguments: schema.NoArguments) -> schema.DaemonStatus:
        daemon = self._daemon
        disks = [_served_disk(served) for served in daemon.disks.values()]
        info = _migration_info(daemon)
        return schema.DaemonStatus(
            version=__version__,
            pid=os.getpid(),
            mountpoint=str(daemon.options.mountpoint),
            status=_run_state(daemon),
            disks=disks,
            role=_role(daemon),
            gates_closed=sum(disk.gate == Gate.CLOSED.value for disk in disks),
            parked_writes=sum(disk.parked_writes for disk in disks),
            handler_errors=0 if daemon.mount is None else daemon.mount.statistics().handler_errors,
            incoming=_incoming(daemon),
            migration=UNSET if info.status is UNSET else info,
        )


def _run_state(daemon: Daemon) -> schema.RunState:
    """Return the one word for all disks: the state that keeps most from being written."""
    gates = {
        served.name: Gate.READ_ONLY if served.disk is None else served.disk.gate for served in daemon.disks.values()
    }
    if any(served.image is not None and served.image.io_error is not None for served in daemon.disks.values()):
        return schema.RunState.IO_ERROR
    if Gate.CLOSED in gates.values():
        return schema.RunState.FINISH_MIGRATE
    if Gate.OPEN in gates.values():
        return schema.RunState.RUNNING
    if any(served.is_waiting for served in daemon.disks.values()):
        return schema.RunState.INMIGRATE
    return schema.RunState.POSTMIGRATE


def _role(daemon: Daemon) -> schema.Role | UnsetType:
    if isinstance(daemon.shown, OutgoingMigration):
        return schema.Role.SOURCE
    if daemon.listener is not None:
        return schema.Role.DESTINATION
    return UNSET


def _block_info(served: ServedDisk) -> schema.BlockInfo:
    if served.disk is None or served.image is None:
        return schema.BlockInfo(device=served.name)
    return schema.BlockInfo(
        device=served.name,
        io_status="ok" if served.image.io_error is None else "failed",
        inserted=schema.BlockDeviceInfo(
            file=str(served.path),
            ro=served.is_read_only,
            node_name=served.name,
            image=schema.ImageInfo(
                filename=str(served.path),
                virtual_size=served.disk.size,
                actual_size=served.image.stat().st_blocks * 512,
            ),
            dirty_bitmaps=[
                schema.DirtyBitmapInfo(
                    name="x-fusemig-written",
                    count=min(served.disk.written_chunks * CHUNK_SIZE, served.disk.size),
                    granularity=CHUNK_SIZE,
                    recording=True,
                    busy=bool(served.busy),
                    persistent=False,
                )
            ],
        ),
    )


def _served_disk(served: ServedDisk) -> schema.ServedDisk:
    disk, record = served.disk, served.epoch_file.record
    return schema.ServedDisk(
        name=served.name,
        size=0 if disk is None else disk.size,
        path=str(served.path),
        state="owner"
        if record is None and not served.is_waiting
        else "waiting"
        if record is None
        else record.state.value,
        gate=Gate.READ_ONLY.value if disk is None else disk.gate.value,
        parked_writes=0 if disk is None else disk.parked_writes,
        read_only=served.is_read_only,
        io_error=served.image is not None and served.image.io_error is not None,
        dirty_bytes=0 if disk is None else min(disk.written_chunks * CHUNK_SIZE, disk.size),
        epoch=UNSET if record is None else record.epoch,
    )


def _incoming(daemon: Daemon) -> schema.Incoming | UnsetType:
    if daemon.listener is None:
        return UNSET
    incoming = daemon.incoming
    error = None if incoming is None else incoming.error
    return schema.Incoming(
        uri=str(daemon.listener.uri),
        status=schema.MigrationStatus(QMP_STATUS[MigrationPhase.NONE if incoming is None else incoming.phase]),
        error_desc=UNSET if error is None else str(error),
        rejected_connections=daemon.n_rejected,
    )


def _migration_info(daemon: Daemon) -> schema.MigrationInfo:
    shown = daemon.shown
    if shown is None or shown.phase is MigrationPhase.NONE:
        return schema.MigrationInfo()
    return _outgoing_info(shown) if isinstance(shown, OutgoingMigration) else _incoming_info(shown)


_RUNNING = frozenset({"setup", "active", "pre-switchover", "device", "cancelling"})


def _outgoing_info(migration: OutgoingMigration) -> schema.MigrationInfo:
    stats = migration.statistics()
    status = QMP_STATUS[stats.phase]
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
            mode=schema.Mode.PRECOPY,
            wire=schema.WireName(migration.wire),
            pass_=stats.pass_number,
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
            wire_bytes=stats.wire_bytes,
            frozen_ms=stats.frozen_s * 1000,
            error_kind=UNSET if stats.error_kind is None else stats.error_kind,
            guest=guest_info(migration.guest.account(), migration.started_at),
        ),
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
        in_flight_chunks=disk.in_flight_chunks,
        sent_bytes=disk.sent_bytes,
        pass_progress=1.0 - min(1.0, disk.dirty_bytes / allocated) if allocated else 1.0,
        digest=f"{disk.digest:016x}",
    )


def _incoming_info(migration: IncomingMigration) -> schema.MigrationInfo:
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
            mode=schema.Mode.PRECOPY,
            wire=schema.WireName(migration.wire),
            pass_=stats.pass_number,
            wire_bytes=stats.received_bytes,
            error_kind=UNSET if stats.error_kind is None else stats.error_kind,
        ),
        **fields,
    )
