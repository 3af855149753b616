"""Migrator: the daemon's migrations as a source, one at a time."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio
from msgspec import UNSET

from fusemig.core.phase import MigrationPhase
from fusemig.daemon.choice import choose_disks, resume_point
from fusemig.daemon.errand import Errand, route_of, set_parameters
from fusemig.daemon.lenders import Lenders
from fusemig.disk.tracked import Gate
from fusemig.errors import InDoubtError, StateError
from fusemig.handover.state import Request
from fusemig.log_context import log_fields
from fusemig.migration.commit import SourceDisk
from fusemig.migration.order import Order
from fusemig.migration.qemu_source import DEFAULT_MACHINE, QemuSource
from fusemig.migration.source import SourceMigration
from fusemig.migration.stats import MigrationParameters
from fusemig.net.transport import parse_uri
from fusemig.qmp import schema
from fusemig.qmp.seeing import RecordParameters
from fusemig.records.epoch import Ownership
from fusemig.runtimes.move import GuestMove
from fusemig.runtimes.options import make_runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fusemig.daemon.announcer import Announcer
    from fusemig.daemon.dialer import Dialer
    from fusemig.daemon.pause import Pause
    from fusemig.daemon.security import Security
    from fusemig.daemon.served import ServedDisk
    from fusemig.handover.state import Outgoing
    from fusemig.migration.outgoing import OutgoingMigration
    from fusemig.net.credentials import Credentials
    from fusemig.runtimes.options import GuestOptions


class Migrator:
    """Starts migrations of the daemon's disks; `run` owns them."""

    def __init__(
        self,
        disks: Mapping[str, ServedDisk],
        pause: Pause,
        security: Security,
        dialer: Dialer,
        announcer: Announcer,
        count_requests: Callable[[], int],
        on_begin: Callable[[OutgoingMigration], None],
        on_over: Callable[[], None],
        on_change: Callable[[], None],
        *,
        is_destination: bool,
    ) -> None:
        """Nothing is migrated.

        Args:
            disks: all disks of the daemon.
            pause: pushes out the pages of a disk.
            security: decides how a destination may be talked to.
            dialer: connects to it.
            announcer: hears of phases and passes.
            count_requests: tells how many requests guests have made.
            on_begin: hears of each migration before it runs.
            on_over: hears when one has ended.
            on_change: hears at once when `lasting` has changed, before anybody else hears of the reason; never raises.
            is_destination: disks may come back into the images that they leave.
        """
        self.parameters = MigrationParameters()
        self.capabilities = set(schema.ALWAYS_ON_CAPABILITIES)
        self._disks = disks
        self._pause = pause
        self._security = security
        self._dialer = dialer
        self._announcer = announcer
        self._count_requests = count_requests
        self._on_begin = on_begin
        self._on_over = on_over
        self._on_change = on_change
        self._is_destination = is_destination
        self._errand: Errand | None = None
        """The last one that began."""
        self._lenders = Lenders(disks, dialer.dial, self._note_lent, is_destination=is_destination)
        self._nursery: trio.Nursery | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run what `migrate` starts, until cancelled; `wind_down` comes first."""
        async with trio.open_nursery() as self._nursery:
            self._go_on_lending()
            task_status.started()
            await trio.sleep_forever()

    async def wind_down(self) -> None:
        """Bring the migration to an end: called off if it can be, else run out; within deadlines."""
        if self.migration is not None:
            await self.migration.wind_down()

    @property
    def migration(self) -> OutgoingMigration | None:
        """The last one that began."""
        return None if self._errand is None else self._errand.migration

    @property
    def uri(self) -> str:
        """Where the last migration goes or went to; empty if there was none."""
        return "" if self._errand is None else self._errand.request.uri

    @property
    def lasting(self) -> Outgoing | None:
        """What a successor must know of the last migration (`Errand.lasting`)."""
        return None if self._errand is None else self._errand.lasting(self.parameters)

    @property
    def is_migrating(self) -> bool:
        """Whether an outgoing migration has not ended."""
        return self.migration is not None and not self.migration.is_over

    def asked(self, uri: str) -> RecordParameters:
        """Return what the last migration, to ``uri``, is asked for now."""
        now = self.parameters
        return RecordParameters(
            uri=uri,
            downtime_limit=round(now.downtime_limit_s * 1000),
            max_bandwidth=now.max_bandwidth,
            order=now.order.value,
            auto_mirror=now.auto_mirror,
            mirror_lag=str(now.mirror_lag),
            throttle_max=now.throttle_max,
            reconnect=round(now.reconnect_limit_s * 1000),
            pause_before_switchover=now.pause_before_switchover,
            incremental=UNSET if now.incremental is None else now.incremental,
            compression_level=UNSET if now.compression_level is None else now.compression_level,
            streams=now.streams,
        )

    def migrate(
        self,
        uri_text: str,
        names: Sequence[str] | None,
        *,
        is_qemu: bool = False,
        machine: str = DEFAULT_MACHINE,
        guest: GuestOptions | None = None,
        tls: Credentials | None = None,
        tls_hostname: str = "",
        is_insecure: bool = False,
        is_resumed: bool = False,
        reconnect_limit_s: float = 0.0,
        mirrors: bool = False,
        incremental: bool | None = None,
        compression_level: int | None = None,
        streams: int = 1,
        is_postcopy: bool = False,
        order: Order = Order.SEQUENTIAL,
        group: str = "",
    ) -> None:
        """Start a migration of the named disks, or of every writable one; returns at once.

        Args:
            uri_text: of the destination.
            names: of the disks.
            is_qemu: chooses QEMU's wire.
            machine: the type of the QEMU there.
            guest: moves with the disks.
            tls: credentials for this migration alone (`Security.outgoing`).
            tls_hostname: what the destination's certificate must say.
            is_insecure: plain text may cross the network.
            is_resumed: go on with the migration of these disks that was interrupted last.
            reconnect_limit_s: as `MigrationParameters` has it.
            mirrors: as it has it.
            incremental: as `MigrationParameters` has it.
            compression_level: as `MigrationParameters` has it.
            streams: as `MigrationParameters` has it.
            is_postcopy: as `MigrationParameters` has it.
            order: of the bulk phase; QEMU's wire knows the sequential one only.
            group: the path that names what decides of these disks and others together; it waits at pre-switchover.

        Raises:
            StateError: one is running, or a disk cannot be migrated now.
            ConfigError: the URI is wrong, or plain text may not go there.
            AuthenticationError: there are no credentials of the name that was set.
        """
        uri = parse_uri(uri_text)
        if self.migration is not None and self.migration.phase is MigrationPhase.IN_DOUBT:
            raise InDoubtError("the last migration is in doubt: find out who owns the disks first (`fusemig resolve`)")
        if self.is_migrating:
            raise StateError("There's a migration process in progress")
        secure = self._security.outgoing(uri, tls, tls_hostname, is_insecure=is_insecure)
        chosen = self.choose(names)
        resume = resume_point(self.migration, chosen) if is_resumed else None
        request = Request(
            uri=uri_text,
            disks=tuple(served.name for served in chosen),
            is_qemu=is_qemu,
            has_guest=guest is not None,
            tls_directory="" if tls is None else str(tls.directory.absolute()),
            tls_hostname=tls_hostname,
            is_insecure=is_insecure,
            is_resumed=is_resumed,
            reconnect_limit_s=reconnect_limit_s,
            is_postcopy=is_postcopy,
            order=order.value,
            incremental=incremental,
            compression_level=compression_level,
            streams=streams,
            mirrors=mirrors,
            group=group,
        )
        self._dialer.remember(uri, secure)
        if self.migration is not None and (resume is None or not resume.disks):
            self.migration.forget()
        new = (
            partial(QemuSource, machine=machine)
            if is_qemu
            else partial(SourceMigration, resume=resume, route=route_of(request), group=Path(group) if group else None)
        )
        errand = self.make(new, request, chosen)
        migration = errand.migration
        if guest is not None:
            migration.guest = GuestMove(make_runtime(guest, migration.session), lambda: migration.may_thaw)
        self.start(errand, chosen)

    def make(self, new: Callable[..., OutgoingMigration], request: Request, chosen: Sequence[ServedDisk]) -> Errand:
        """Make the migration that is asked for, and have it known as the last one; it does not run yet."""
        lent = []
        for served in chosen:
            assert served.disk is not None
            lent.append(
                SourceDisk(
                    served.disk,
                    served.epoch_file,
                    partial(self._pause.push_out, served),
                    served.dirty_file,
                    served.count_allocated,
                    served.stamp,
                )
            )
        pauses = schema.MigrationCapability.PAUSE_BEFORE_SWITCHOVER in self.capabilities
        set_parameters(self.parameters, request, pauses=pauses)
        self._announcer.begin()
        migration = new(
            lent,
            partial(self._dialer.connect, parse_uri(request.uri)),
            self.parameters,
            trio.to_thread.run_sync,
            self._on_phase,
            self._on_pass,
            self._count_requests,
            self._announcer.paced,
        )
        self._errand = Errand(request, migration)
        self._on_begin(migration)
        return self._errand

    def start(self, errand: Errand, chosen: Sequence[ServedDisk]) -> None:
        """Have the migration that was made run."""
        assert self._nursery is not None
        for served in chosen:
            served.busy = f"it is being migrated to {errand.request.uri}"
        self._on_change()
        self._nursery.start_soon(self._run_outgoing, errand.migration, chosen)

    def start_postcopy(self) -> None:
        """Have the migration that runs hand over at once.

        Raises:
            StateError: none runs, or it cannot be done with it.
        """
        migration = self.migration
        if not isinstance(migration, SourceMigration) or not migration.may_start_postcopy:
            raise StateError(
                "postcopy can only be started during a migration over the native wire, before its hand-off and without "
                "a guest"
            )
        self.parameters.is_postcopy = True
        self._on_change()

    def choose(self, names: Sequence[str] | None) -> list[ServedDisk]:
        """Return the named disks, or every writable one; raises as `choose_disks` does."""
        return choose_disks(self._disks, names)

    async def _run_outgoing(self, migration: OutgoingMigration, chosen: Sequence[ServedDisk]) -> None:
        try:
            with log_fields(partial(_log_fields, migration, [served.name for served in chosen])):
                await migration.run()
        finally:
            for served in chosen:
                served.busy = ""
                # A daemon that listens gets the disk back into the image that it released.
                served.is_waiting = self._is_destination and served.ownership is Ownership.RELEASED
            self._go_on_lending()
            self._on_over()

    def _go_on_lending(self) -> None:
        assert self._nursery is not None
        self._lenders.go_on(self._nursery)

    def _note_lent(self, session: str) -> None:
        migration = self.migration
        if migration is None or migration.session != session or not migration.is_stand_in:
            return  # another one's disks: what runs here lends its own, and ends by itself
        if migration.phase is MigrationPhase.POSTCOPY:
            migration.settle(is_handed_off=True)

    def look_again(self, settled: Sequence[ServedDisk]) -> None:
        """Follow disks whose records were changed by others than their migration."""
        for served in settled:
            served.look_again(is_destination=self._is_destination)
        self._go_on_lending()
        if any(served.disk is not None and served.disk.gate is Gate.OPEN for served in settled):
            self._announcer.writable_again()

    def _on_phase(self, phase: MigrationPhase) -> None:
        if self._errand is not None:
            self._errand.note_phase(phase)
        self._on_change()  # first: whoever hears of the end finds a successor that would not go on
        self._announcer.outgoing_phase(phase, is_pausing=self.parameters.pause_before_switchover)

    def _on_pass(self, number: int) -> None:
        self._on_change()  # it may have its connection back
        self._announcer.pass_begins(number)


def _log_fields(migration: OutgoingMigration, disks: list[str]) -> dict[str, object]:
    return {"migration": migration.session[:8], "phase": migration.phase.value, "disks": disks}
