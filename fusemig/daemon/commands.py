"""The QMP commands: what each asks of the daemon, and the daemon's state in QMP's words.

One function per command, in the order of `fusemig.qmp.schema.COMMANDS`. What cannot be honoured is refused with the
reason and the next step, never silently accepted.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog
import trio
from msgspec import UNSET, UnsetType

from fusemig import __version__
from fusemig.control.server import Command, CommandError, DeviceNotFoundError
from fusemig.core.compression import parse_compression
from fusemig.core.phase import QMP_STATUS, MigrationPhase
from fusemig.core.shaping import MirrorLag
from fusemig.daemon.block_info import block_info, block_node, block_stats
from fusemig.daemon.estimate import estimate
from fusemig.daemon.info import daemon_status, io_error, migration_parameters, run_state
from fusemig.daemon.migration_info import migration_info
from fusemig.daemon.qmp_objects import load, make_object
from fusemig.daemon.view import look
from fusemig.errors import ConfigError, StateError
from fusemig.migration.order import Order
from fusemig.migration.qemu_source import DEFAULT_MACHINE
from fusemig.net.credentials import Endpoint
from fusemig.net.transport import parse_uri
from fusemig.qmp import monitor, schema
from fusemig.records.decision import DecisionFile
from fusemig.records.epoch import Ownership, Side
from fusemig.runtimes.options import guest_options

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fusemig.control.server import Session
    from fusemig.daemon.daemon import Daemon
    from fusemig.qmp import block, objects, seeing
    from fusemig.qmp.estimate import EstimateInfo

log = structlog.get_logger(__name__)


_NO_MIRROR: Final = "nothing can be mirrored over QEMU's wire, which acknowledges nothing: leave 'x-fusemig-mode' out"


def command_table(daemon: Daemon) -> Mapping[str, Command]:
    """Return the commands that act on ``daemon``."""
    commands = _Commands(daemon)
    functions: dict[str, Callable[[Session, Any], Any]] = {
        "query-name": commands.query_name,
        "query-uuid": commands.query_uuid,
        "query-status": commands.query_status,
        "query-block": commands.query_block,
        "query-blockstats": commands.query_blockstats,
        "query-block-jobs": commands.query_block_jobs,
        "query-named-block-nodes": commands.query_named_block_nodes,
        "query-migrate": commands.query_migrate,
        "query-migrate-parameters": commands.query_migrate_parameters,
        "query-migrate-capabilities": commands.query_migrate_capabilities,
        "migrate": commands.migrate,
        "migrate_cancel": commands.migrate_cancel,
        "migrate-continue": commands.migrate_continue,
        "migrate-start-postcopy": commands.migrate_start_postcopy,
        "migrate-incoming": commands.migrate_incoming,
        "migrate-pause": commands.migrate_pause,
        "migrate-set-parameters": commands.migrate_set_parameters,
        "migrate-set-capabilities": commands.migrate_set_capabilities,
        "object-add": commands.object_add,
        "object-del": commands.object_del,
        "stop": commands.stop,
        "cont": commands.cont,
        "quit": commands.quit,
        "human-monitor-command": commands.human_monitor_command,
        "x-fusemig-status": commands.status,
        "x-fusemig-estimate": commands.estimate,
        "x-fusemig-resolve": commands.resolve,
        "x-fusemig-upgrade": commands.upgrade,
        "x-fusemig-ask": commands.ask,
        "x-fusemig-query-view": commands.query_view,
        "x-fusemig-query-history": commands.query_history,
    }
    return {name: Command(schema.COMMANDS[name], function) for name, function in functions.items()}


class _Commands:
    """The commands; each is called with the session and its checked arguments."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def query_name(self, _session: Session, _arguments: schema.NoArguments) -> schema.Name:
        return schema.Name(name=str(self._daemon.options.mountpoint))

    def query_uuid(self, _session: Session, _arguments: schema.NoArguments) -> schema.Uuid:
        return schema.Uuid()

    def query_status(self, _session: Session, _arguments: schema.NoArguments) -> schema.StatusInfo:
        return _status(self._daemon)

    def query_block(self, _session: Session, _arguments: schema.NoArguments) -> list[block.BlockInfo]:
        return [block_info(served) for served in self._daemon.disks.values()]

    def query_blockstats(self, _session: Session, _arguments: block.QueryBlockstats) -> list[block.BlockStats]:
        return [block_stats(served) for served in self._daemon.disks.values()]

    def query_block_jobs(self, _session: Session, _arguments: schema.NoArguments) -> list[Any]:
        return []

    def query_named_block_nodes(
        self, _session: Session, _arguments: block.QueryNamedBlockNodes
    ) -> list[block.BlockDeviceInfo]:
        nodes = [block_node(served) for served in self._daemon.disks.values()]
        return [node for node in nodes if node is not None]

    async def query_migrate(self, _session: Session, _arguments: schema.NoArguments) -> schema.MigrationInfo:
        if self._daemon.inheritance.left_outgoing is not None:
            await self._daemon.wait_ready()  # else it would seem that the migration is gone
        return migration_info(self._daemon)

    async def query_view(self, _session: Session, arguments: seeing.QueryView) -> schema.View:
        return await look(self._daemon, arguments.cells)

    def query_history(self, _session: Session, _arguments: schema.NoArguments) -> list[schema.MigrationRecord]:
        return self._daemon.history.records(trio.current_time())

    def query_migrate_parameters(self, _session: Session, _arguments: schema.NoArguments) -> schema.MigrationParameters:
        return migration_parameters(self._daemon)

    def query_migrate_capabilities(
        self, _session: Session, _arguments: schema.NoArguments
    ) -> list[schema.MigrationCapabilityStatus]:
        return [
            schema.MigrationCapabilityStatus(capability=one, state=one in self._daemon.migrator.capabilities)
            for one in schema.MigrationCapability
        ]

    async def migrate(self, _session: Session, arguments: schema.Migrate) -> None:
        if arguments.blk is False:
            raise CommandError("Parameter 'blk' must be true: fusemig migrates disks and nothing else")
        disks = self._known(arguments.x_fusemig_disks)
        machine = None if isinstance(arguments.x_fusemig_machine, UnsetType) else arguments.x_fusemig_machine
        is_qemu = arguments.x_fusemig_wire is schema.WireName.QEMU
        if machine is not None and not is_qemu:
            raise CommandError("'x-fusemig-machine' goes with 'x-fusemig-wire' qemu: leave it out, or add that")
        guest = guest_options(arguments, are_commands_allowed=self._daemon.options.allow_guest_commands)
        if guest is not None and is_qemu:
            raise CommandError("a guest moves with its disks over the native wire only: leave 'x-fusemig-wire' out")
        mirrors = arguments.x_fusemig_mode is schema.Mode.MIRROR
        if mirrors and is_qemu:
            raise CommandError(_NO_MIRROR)
        is_postcopy = arguments.x_fusemig_mode is schema.Mode.POSTCOPY
        if is_postcopy and is_qemu:
            raise CommandError("post-copy goes over the native wire only: QEMU's cannot fetch")
        if is_postcopy and guest is not None:
            raise CommandError("post-copy moves disks only: leave the guest out, or migrate with mode 'precopy'")
        reconnect = arguments.x_fusemig_reconnect
        if is_qemu and (arguments.resume or reconnect is not UNSET):
            raise CommandError("'resume' and 'x-fusemig-reconnect' do not go with QEMU's wire: leave them out")
        order = Order(arguments.x_fusemig_order)
        if is_qemu and order is not Order.SEQUENTIAL:
            raise CommandError(
                "'x-fusemig-order' does not go with QEMU's wire, whose order is sequential: leave it out"
            )
        if is_qemu and (arguments.inc is not UNSET or arguments.x_fusemig_compress is not UNSET):
            raise CommandError("'inc' and 'x-fusemig-compress' do not go with QEMU's wire: leave them out")
        if is_qemu and arguments.x_fusemig_streams != 1:
            raise CommandError("'x-fusemig-streams' does not go with QEMU's wire, which has one: leave it out")
        incremental = self._daemon.migrator.parameters.block_incremental
        if not isinstance(arguments.inc, UnsetType):
            incremental = arguments.inc
        compression_level = None
        if not isinstance(arguments.x_fusemig_compress, UnsetType):
            try:
                compression_level = parse_compression(arguments.x_fusemig_compress)
            except ConfigError as exc:
                raise ConfigError(f"Parameter 'x-fusemig-compress': {exc}") from exc
        try:
            parse_uri(arguments.uri)
        except ConfigError as exc:
            raise ConfigError(f"Parameter 'uri' expects a valid migration protocol: {exc}") from exc
        tls = None
        if not isinstance(arguments.x_fusemig_tls_creds, UnsetType):
            tls = await load(arguments.x_fusemig_tls_creds, Endpoint.CLIENT)
        group = await self._group(arguments)
        await self._daemon.wait_ready()
        self._daemon.migrator.migrate(
            arguments.uri,
            disks,
            is_qemu=is_qemu,
            machine=machine or DEFAULT_MACHINE,
            guest=guest,
            tls=tls,
            tls_hostname=arguments.x_fusemig_tls_hostname,
            is_insecure=arguments.x_fusemig_insecure,
            is_resumed=arguments.resume,
            reconnect_limit_s=0.0 if isinstance(reconnect, UnsetType) else reconnect / 1000,
            mirrors=mirrors,
            incremental=incremental,
            compression_level=compression_level,
            streams=arguments.x_fusemig_streams,
            is_postcopy=is_postcopy,
            order=order,
            group=group,
        )

    async def _group(self, arguments: schema.Migrate) -> str:
        """Return the group that a migration is a part of, whose directory was looked at; "" for none."""
        group = arguments.x_fusemig_group
        if isinstance(group, UnsetType):
            return ""
        for is_asked, what, why in (
            (arguments.x_fusemig_wire is schema.WireName.QEMU, "QEMU's wire", "which has no two-phase commit"),
            (arguments.x_fusemig_mode is schema.Mode.POSTCOPY, "post-copy", "which hands over when it begins"),
            (arguments.x_fusemig_guest is not UNSET, "a guest", "whose hand-over is its own"),
            (arguments.x_fusemig_pause_command is not UNSET, "a guest", "whose hand-over is its own"),
        ):
            if is_asked:
                raise CommandError(f"'x-fusemig-group' does not go with {what}, {why}: leave one of them out")
        beside = {served.epoch_file.path.parent for served in self._daemon.disks.values()}
        await trio.to_thread.run_sync(DecisionFile(Path(group)).check, beside)
        return group

    def _known(self, names: list[str] | UnsetType) -> list[str] | None:
        if isinstance(names, UnsetType):
            return None
        for name in names:
            if name not in self._daemon.disks:
                raise DeviceNotFoundError(name, self._daemon.disks)
        return names

    def migrate_cancel(self, _session: Session, _arguments: schema.NoArguments) -> None:
        # QEMU answers {} also when there is nothing to cancel.
        if self._daemon.migrator.migration is not None and self._daemon.migrator.is_migrating:
            self._daemon.migrator.migration.cancel()

    def migrate_start_postcopy(self, _session: Session, _arguments: schema.NoArguments) -> None:
        self._daemon.migrator.start_postcopy()

    def migrate_continue(self, _session: Session, arguments: schema.MigrateContinue) -> None:
        outgoing = self._daemon.migrator.migration
        phase = MigrationPhase.NONE if outgoing is None else outgoing.phase
        if outgoing is None or QMP_STATUS[phase] != arguments.state:
            raise CommandError(f"Migration not in expected state: {QMP_STATUS[phase]}")
        outgoing.proceed()
        self._daemon.inheritance.keep()

    async def migrate_incoming(self, _session: Session, arguments: schema.MigrateIncoming) -> None:
        try:
            uri = parse_uri(arguments.uri)
        except ConfigError as exc:
            raise ConfigError(f"unknown migration protocol: {arguments.uri}: {exc}") from exc
        await self._daemon.wait_ready()
        await self._daemon.inbound.listen(uri)
        self._daemon.inheritance.keep()

    def migrate_pause(self, _session: Session, _arguments: schema.NoArguments) -> None:
        if migration_info(self._daemon).status is schema.MigrationStatus.POSTCOPY_ACTIVE:
            raise CommandError(
                "post-copy cannot be paused: a lost connection is waited for and made again; leave both daemons running"
            )
        raise CommandError(
            "migrate-pause is currently only supported during postcopy-active state; to call a migration off, use "
            "migrate_cancel"
        )

    def migrate_set_parameters(self, _session: Session, arguments: schema.MigrateSetParameters) -> None:
        for name, is_asked in (
            ("multifd-channels", arguments.multifd_channels not in (UNSET, 2)),
            ("multifd-compression", arguments.multifd_compression not in (UNSET, schema.Compression.NONE)),
            ("multifd-zstd-level", arguments.multifd_zstd_level not in (UNSET, 1)),
        ):
            if is_asked:
                raise CommandError(f"Parameter '{name}' is not supported by fusemig {__version__}: leave it out")
        self._set_pacing(arguments)
        if not isinstance(arguments.block_incremental, UnsetType):
            self._daemon.migrator.parameters.block_incremental = arguments.block_incremental
        if not isinstance(arguments.max_bandwidth, UnsetType):
            self._daemon.migrator.parameters.max_bandwidth = arguments.max_bandwidth
        if not isinstance(arguments.downtime_limit, UnsetType):
            self._daemon.migrator.parameters.downtime_limit_s = arguments.downtime_limit / 1000
        security = self._daemon.security
        if not isinstance(arguments.tls_creds, UnsetType):
            security.tls_creds = arguments.tls_creds
        if not isinstance(arguments.tls_hostname, UnsetType):
            security.tls_hostname = arguments.tls_hostname
        if not isinstance(arguments.tls_authz, UnsetType):
            security.tls_authz = arguments.tls_authz
        self._daemon.inheritance.keep()

    def _set_pacing(self, arguments: schema.MigrateSetParameters) -> None:
        migrator, mode, lag = self._daemon.migrator, arguments.x_fusemig_mode, arguments.x_fusemig_mirror_lag
        parameters = migrator.parameters
        if mode is schema.Mode.POSTCOPY:
            raise CommandError("a migration that runs becomes post-copy with migrate-start-postcopy: use that")
        if not isinstance(mode, UnsetType) and (not migrator.is_migrating or migrator.migration is None):
            raise CommandError("no migration is running whose mode could change: say 'x-fusemig-mode' with 'migrate'")
        if not isinstance(mode, UnsetType) and parameters.is_postcopy:
            raise CommandError("a post-copy migration stays one: leave 'x-fusemig-mode' out")
        if mode is schema.Mode.MIRROR and migrator.migration is not None and not migrator.migration.can_mirror:
            raise CommandError(_NO_MIRROR)
        if not isinstance(lag, UnsetType):
            parameters.mirror_lag = MirrorLag.parse(lag)
        if not isinstance(mode, UnsetType):
            parameters.mirrors = mode is schema.Mode.MIRROR
        if not isinstance(arguments.x_fusemig_auto_mirror, UnsetType):
            parameters.auto_mirror = arguments.x_fusemig_auto_mirror
        if not isinstance(arguments.x_fusemig_throttle_max, UnsetType):
            parameters.throttle_max = arguments.x_fusemig_throttle_max

    async def object_add(self, _session: Session, arguments: objects.ObjectAdd) -> None:
        security = self._daemon.security
        security.add(arguments, await make_object(arguments))
        try:
            self._daemon.inheritance.keep()
        except StateError:
            security.remove(arguments.id)
            raise

    def object_del(self, _session: Session, arguments: objects.ObjectDel) -> None:
        self._daemon.security.remove(arguments.id)
        self._daemon.inheritance.keep()

    def migrate_set_capabilities(self, _session: Session, arguments: schema.MigrateSetCapabilities) -> None:
        if self._daemon.migrator.is_migrating:
            raise CommandError("There's a migration process in progress")
        for one in arguments.capabilities:
            if one.state and one.capability not in schema.SUPPORTED_CAPABILITIES:
                raise CommandError(f"Capability '{one.capability}' is not supported: it is about guest memory")
            if not one.state and one.capability in schema.ALWAYS_ON_CAPABILITIES:
                raise CommandError(f"Capability '{one.capability}' is always on: fusemig migrates disks")
        for one in arguments.capabilities:
            (self._daemon.migrator.capabilities.add if one.state else self._daemon.migrator.capabilities.discard)(
                one.capability
            )
        self._daemon.inheritance.keep()

    async def stop(self, _session: Session, _arguments: schema.NoArguments) -> None:
        daemon = self._daemon
        was_running = run_state(daemon) is schema.RunState.RUNNING

        def on_stopped() -> None:
            daemon.inheritance.keep()
            if was_running:
                daemon.events.emit("STOP")

        await daemon.pause.start(on_stopped)

    def cont(self, _session: Session, _arguments: schema.NoArguments) -> None:
        daemon = self._daemon
        state = run_state(daemon)
        if state is schema.RunState.RUNNING:
            return
        if state is schema.RunState.FINISH_MIGRATE:
            raise CommandError("Migration is not finalized yet")
        if state is schema.RunState.POSTMIGRATE or not daemon.pause.is_on:
            raise CommandError(_why_guests_may_not_write(daemon))
        daemon.pause.lift()
        daemon.inheritance.keep()
        if run_state(daemon) is schema.RunState.RUNNING:
            daemon.events.emit("RESUME")

    def human_monitor_command(self, _session: Session, arguments: schema.HumanMonitorCommand) -> str:
        if arguments.cpu_index not in (UNSET, 0):
            raise CommandError("Parameter 'cpu-index' expects a CPU number")
        return monitor.answer(arguments.command_line, _Queries(self._daemon))

    def quit(self, _session: Session, _arguments: schema.NoArguments) -> None:
        self._daemon.stop("host-qmp-quit")

    def status(self, _session: Session, _arguments: schema.NoArguments) -> schema.DaemonStatus:
        return daemon_status(self._daemon)

    async def estimate(self, _session: Session, arguments: schema.Estimate) -> EstimateInfo:
        disks = self._known(arguments.disks)
        await self._daemon.wait_ready()
        limit = arguments.downtime_limit
        return await estimate(
            self._daemon.migrator,
            self._daemon.dialer,
            None if isinstance(arguments.uri, UnsetType) else arguments.uri,
            None if isinstance(arguments.link, UnsetType) else arguments.link,
            disks,
            None if isinstance(limit, UnsetType) else limit / 1000,
        )

    async def upgrade(self, session: Session, _arguments: schema.NoArguments) -> schema.UpgradeInfo:
        log.info("asked to upgrade", pid=session.pid, uid=session.uid)
        await self._daemon.wait_ready()
        info = await self._daemon.upgrade.agree()
        self._daemon.give_way(info)
        return info

    async def ask(self, _session: Session, arguments: schema.Ask) -> None:
        self._check_disks(arguments.disks)
        parse_uri(arguments.uri)
        await self._daemon.wait_ready()
        await self._daemon.doubts.ask_at(arguments.disks, arguments.uri)

    def _check_disks(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self._daemon.disks:
                raise DeviceNotFoundError(name, self._daemon.disks)
        if not names:
            raise CommandError("Parameter 'disks' is empty: name at least one disk")

    async def resolve(self, session: Session, arguments: schema.Resolve) -> None:
        self._check_disks(arguments.disks)
        log.warning("asked to resolve", disks=arguments.disks, owner=arguments.owner, pid=session.pid, uid=session.uid)
        await self._daemon.doubts.resolve(
            arguments.disks, Side(arguments.owner), is_other_fenced=arguments.i_have_fenced_the_other
        )


class _Queries:
    """What the human monitor asks of the daemon (`monitor.Queries`)."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def blocks(self) -> list[block.BlockInfo]:
        return [block_info(served) for served in self._daemon.disks.values()]

    def status(self) -> schema.StatusInfo:
        return _status(self._daemon)

    def migration(self) -> schema.MigrationInfo:
        return migration_info(self._daemon)


def _status(daemon: Daemon) -> schema.StatusInfo:
    state = run_state(daemon)
    return schema.StatusInfo(running=state is schema.RunState.RUNNING, status=state)


def _why_guests_may_not_write(daemon: Daemon) -> str:
    """Say why `cont` cannot be honoured, and what to do: to open a gate here might make a second writer."""
    error = io_error(daemon)
    if error is not None:
        return f"{error}; mend the store, then restart `fusemig serve`"
    for served in daemon.disks.values():
        record = served.epoch_file.record
        if served.is_waiting:
            return f"disk '{served.name}' is still to come: it may be written here once a migration has been taken over"
        if record is not None and record.state is Ownership.PLEDGED:
            return (
                f"disk '{served.name}' is pledged to a group of migrations, and what is decided of that is not known: "
                f"{served.doubt or 'it is being looked at'}; see `fusemig resolve --help`"
            )
        if record is not None and record.state is Ownership.HANDED_OFF:
            return (
                f"it is not known whether {record.peer or 'the destination'} took disk '{served.name}', and a guest "
                "may be writing it there: look there first (`fusemig status`), then see `fusemig resolve --help`"
            )
        if record is not None and record.state is Ownership.RELEASED:
            return (
                f"disk '{served.name}' was handed off to {record.peer or 'another host'}, and a guest may be writing "
                "it there: migrate it back to write it here; if that host is gone for good, see `fusemig resolve -h`"
            )
    return "every disk is served with --readonly"
