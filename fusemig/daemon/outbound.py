"""Outbound: the daemon's migrations as a source, one at a time."""

from __future__ import annotations

import time
import uuid
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
import structlog
import trio
from msgspec import UNSET

from fusemig.core.phase import MigrationPhase
from fusemig.daemon.doubt import in_doubt
from fusemig.disk.tracked import Gate
from fusemig.errors import FusemigError, InDoubtError, MigrationError, StateError
from fusemig.handover.state import Outgoing, Request
from fusemig.log_context import log_fields
from fusemig.migration.commit import Route, SourceDisk
from fusemig.migration.lend import Lending, LentDisk
from fusemig.migration.order import Order
from fusemig.migration.qemu_source import DEFAULT_MACHINE, QemuSource
from fusemig.migration.resume import ResumePoint
from fusemig.migration.source import SourceMigration
from fusemig.migration.stats import MigrationParameters
from fusemig.net.credentials import Endpoint, load_credentials
from fusemig.net.transport import connect, parse_uri
from fusemig.qmp import schema
from fusemig.qmp.seeing import RecordParameters
from fusemig.records.epoch import DOUBTFUL, Ownership
from fusemig.runtimes.move import GuestMove
from fusemig.runtimes.options import make_runtime

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from fusemig.daemon.announcer import Announcer
    from fusemig.daemon.pause import Pause
    from fusemig.daemon.security import Security
    from fusemig.daemon.served import ServedDisk
    from fusemig.migration.outgoing import OutgoingMigration
    from fusemig.net.credentials import Credentials
    from fusemig.net.transport import ByteStream, SocketStream, Uri
    from fusemig.records.epoch import EpochRecord
    from fusemig.runtimes.options import GuestOptions

CONNECT_DEADLINE_S: Final = 10.0
RECONNECT_LIMIT_S: Final = 30.0
"""How long a successor tries to reach the destination again, where nobody has said how long."""
_DONE_WITH: Final = frozenset(
    {MigrationPhase.CANCELLING, MigrationPhase.CANCELLED, MigrationPhase.COMPLETED, MigrationPhase.FAILED}
)
"""A successor has nothing to do with a migration in these; whoever cancelled it was answered."""
_RESTARTED: Final = "the daemon was restarted"
_RESTARTED_IN_GROUP: Final = (
    "the daemon was restarted while its disks were to move in a group, which was called off: they stay here; migrate "
    "the group again"
)
_KILLED_IN_HANDOFF: Final = (
    "the daemon was restarted in the moment of the hand-off: the destination is being asked whether it owns the disks, "
    "see `fusemig status`; if it is gone for good, see `fusemig resolve --help`"
)
_RESTARTED_WITH_GUEST: Final = (
    "the daemon was restarted while a guest was to move with the disks, which stay here: see that the guest runs here "
    "and that none waits at the destination, then migrate again"
)
_RESTARTED_ON_QEMU_WIRE: Final = (
    "the daemon was restarted, and a migration on QEMU's wire cannot go on; the disks stay here: restart the QEMU that "
    "was to receive them, then migrate again"
)

log = structlog.get_logger(__name__)


class Outbound:
    """Starts migrations of the daemon's disks; `run` owns them."""

    def __init__(
        self,
        disks: Mapping[str, ServedDisk],
        pause: Pause,
        security: Security,
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
            announcer: hears of phases and passes.
            count_requests: tells how many requests guests have made.
            on_begin: hears of each migration before it runs.
            on_over: hears when one has ended.
            on_change: hears at once when `lasting` has changed, before anybody else hears of the reason; never raises.
            is_destination: disks may come back into the images that they leave.
        """
        self.parameters = MigrationParameters()
        self.capabilities = set(schema.ALWAYS_ON_CAPABILITIES)
        self.migration: OutgoingMigration | None = None
        """The last one that began."""
        self._disks = disks
        self._pause = pause
        self._security = security
        self._announcer = announcer
        self._count_requests = count_requests
        self._on_begin = on_begin
        self._on_over = on_over
        self._on_change = on_change
        self._is_destination = is_destination
        # What was asked for, and how far it got, of `migration`:
        self._request: Request | None = None
        self._began_s = 0.0
        self._has_sent = False
        self._interrupted: Outgoing | None = None
        """What a former daemon ran and left in doubt: to be gone on with if its disks turn out to be ours."""
        self._secured: dict[Uri, Callable[[SocketStream], Awaitable[ByteStream]]] = {}
        """How connections to the destinations of this process's migrations are made fit to be used."""
        self._nursery: trio.Nursery | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run what `migrate` starts, until cancelled; `wind_down` comes first."""
        async with trio.open_nursery() as self._nursery:
            self._lend_on()
            task_status.started()
            await trio.sleep_forever()

    async def wind_down(self) -> None:
        """Bring the migration to an end: called off if it can be, else run out; within deadlines."""
        if self.migration is not None:
            await self.migration.wind_down()

    @property
    def uri(self) -> str:
        """Where the last migration goes or went to; empty if there was none."""
        return "" if self._request is None else self._request.uri

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
        resume = self._resume_point(chosen) if is_resumed else None
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
        new = (
            partial(QemuSource, machine=machine)
            if is_qemu
            else partial(SourceMigration, resume=resume, route=_route(request), group=Path(group) if group else None)
        )
        self._secured[uri] = secure
        if self.migration is not None and (resume is None or not resume.disks):
            self.migration.forget()
        self._interrupted = None
        migration = self._make(new, request, chosen)
        if guest is not None:
            migration.guest = GuestMove(make_runtime(guest, migration.session), lambda: migration.may_thaw)
        self._start(migration, chosen)

    def _make(
        self, new: Callable[..., OutgoingMigration], request: Request, chosen: Sequence[ServedDisk]
    ) -> OutgoingMigration:
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
        self.parameters.pause_before_switchover = (
            schema.MigrationCapability.PAUSE_BEFORE_SWITCHOVER in self.capabilities or bool(request.group)
        )
        self.parameters.reconnect_limit_s = request.reconnect_limit_s
        self.parameters.incremental = request.incremental
        self.parameters.compression_level = request.compression_level
        self.parameters.streams = request.streams
        self.parameters.mirrors = request.mirrors
        self.parameters.is_postcopy = request.is_postcopy
        self.parameters.order = Order(request.order)
        self._announcer.begin()
        self._request, self._began_s, self._has_sent = request, time.monotonic(), request.is_resumed
        self.migration = new(
            lent,
            partial(self._dial, parse_uri(request.uri)),
            self.parameters,
            trio.to_thread.run_sync,
            self._on_phase,
            self._on_pass,
            self._count_requests,
            self._announcer.paced,
        )
        self._on_begin(self.migration)
        return self.migration

    def _start(self, migration: OutgoingMigration, chosen: Sequence[ServedDisk]) -> None:
        assert self._nursery is not None
        assert self._request is not None
        for served in chosen:
            served.busy = f"it is being migrated to {self._request.uri}"
        self._on_change()
        self._nursery.start_soon(self._run_outgoing, migration, chosen)

    # A successor's part

    @property
    def lasting(self) -> Outgoing | None:
        """What a successor must know of the migration; None where there is nothing to go on with or to find out."""
        migration, request = self.migration, self._request
        if migration is None or request is None or migration.phase in _DONE_WITH:
            return None
        return Outgoing(
            request=msgspec.structs.replace(
                request, is_postcopy=self.parameters.is_postcopy, mirrors=self.parameters.mirrors
            ),
            session=migration.session,
            began_s=self._began_s,
            has_sent=self._has_sent,
            may_switch_over=migration.may_switch_over,
            n_reconnects=migration.statistics().n_reconnects,
        )

    def take_up(self, left: Outgoing, tls: Credentials | None) -> None:
        """Go on with the migration that a former daemon ran, or tell what has become of it; returns at once.

        Args:
            left: what that daemon left.
            tls: the credentials of `Request.tls_directory`.
        """
        chosen = [self._disks[name] for name in left.request.disks]
        states = {served.ownership for served in chosen}
        try:
            uri = parse_uri(left.request.uri)
            self._secured[uri] = self._security.outgoing(
                uri, tls, left.request.tls_hostname, is_insecure=left.request.is_insecure
            )
            if not states.isdisjoint(DOUBTFUL):
                self._interrupted = left
                self.stand_for(left, MigrationPhase.IN_DOUBT, InDoubtError(_KILLED_IN_HANDOFF))
            elif Ownership.LENDING in states:
                self.stand_for(left, MigrationPhase.POSTCOPY)  # `_lend_on` goes on with it
            elif states == {Ownership.RELEASED}:
                self.stand_for(left, MigrationPhase.COMPLETED)
            else:
                self._go_on(left, may_be_there=left.has_sent or left.request.is_resumed)
        except FusemigError as exc:
            self.stand_for(left, MigrationPhase.FAILED, exc)

    def stand_for(self, left: Outgoing, phase: MigrationPhase, error: FusemigError | None = None) -> None:
        """Show a former daemon's migration as what it has become."""
        new = partial(QemuSource if left.request.is_qemu else SourceMigration)
        migration = self._make(new, left.request, [self._disks[name] for name in left.request.disks])
        migration.session = left.session
        self._count_from(left, migration)
        migration.stand_for(phase, error)

    def _go_on(self, left: Outgoing, *, may_be_there: bool) -> None:
        request = left.request
        if request.has_guest:
            raise MigrationError(_RESTARTED_WITH_GUEST)
        if request.is_qemu:
            raise MigrationError(_RESTARTED_ON_QEMU_WIRE)
        if request.group:
            raise MigrationError(_RESTARTED_IN_GROUP)
        chosen = self.choose(request.disks)
        resume = self._resume_point(chosen) if may_be_there else None
        if not request.reconnect_limit_s:
            request = msgspec.structs.replace(request, reconnect_limit_s=RECONNECT_LIMIT_S)
        new = partial(
            SourceMigration,
            resume=resume,
            route=_route(request),
            n_reconnects=left.n_reconnects,
            waiting=_RESTARTED,
        )
        migration = self._make(new, request, chosen)
        self._count_from(left, migration)
        if left.may_switch_over:
            migration.allow_switchover()
        log.info("going on with the migration of the daemon before", uri=request.uri, disks=request.disks)
        self._start(migration, chosen)

    def _count_from(self, left: Outgoing, migration: OutgoingMigration) -> None:
        self._began_s, self._has_sent = left.began_s, left.has_sent
        migration.elapsed_before_s = max(0.0, time.monotonic() - left.began_s)

    async def dial(self, record: EpochRecord) -> ByteStream:
        """Connect as the migration of this record did: as is known of it, or as it left behind before a restart.

        Raises:
            FusemigError: there is no connection, or not by the rules as they are now.
        """
        uri = parse_uri(record.peer)
        if uri not in self._secured:
            given = None
            if record.tls_creds:
                given = await trio.to_thread.run_sync(load_credentials, Path(record.tls_creds), Endpoint.CLIENT)
            self._secured[uri] = self._security.outgoing(
                uri, given, record.tls_hostname, is_insecure=record.is_insecure
            )
        return await self._dial(uri)

    async def try_out(self, uri: Uri) -> ByteStream:
        """Connect by the rules as they are now, with no migration to be; raises as `dial` does."""
        secure = self._security.outgoing(uri)
        return await secure(await connect(uri, CONNECT_DEADLINE_S))

    async def _dial(self, uri: Uri) -> ByteStream:
        return await self._secured[uri](await connect(uri, CONNECT_DEADLINE_S))

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

    def _resume_point(self, chosen: Sequence[ServedDisk]) -> ResumePoint:
        """Return where a migration of these disks was interrupted: as the last one knows, or the maps, or unknown."""
        last = self.migration
        point = last.resume_point() if isinstance(last, SourceMigration) else None
        if point is not None and [disk.disk for disk in point.disks] == [served.disk for served in chosen]:
            return point
        sessions = {served.interrupted_session for served in chosen}
        session = sessions.pop()
        if session is None or sessions:
            session = uuid.uuid4().hex  # one that no journal is of: contents are compared
        return ResumePoint(session)

    def choose(self, names: Sequence[str] | None) -> list[ServedDisk]:
        """Return the named disks, or every writable one.

        Raises:
            StateError: one of them cannot be migrated now.
        """
        if names is None:
            chosen = [served for served in self._disks.values() if served.is_writable and not served.is_read_only]
            if not chosen and any(served.is_waiting for served in self._disks.values()):
                raise StateError("Guest is waiting for an incoming migration: no disk here is writable yet")
            chosen = chosen or in_doubt(self._disks)  # to be told so below
            if not chosen:
                raise StateError("no disk here is writable: there is nothing to migrate")
        else:
            chosen = [self._disks[name] for name in dict.fromkeys(names)]
        for served in chosen:
            if served.ownership in DOUBTFUL:
                raise InDoubtError(
                    f"disk '{served.name}' is in doubt: it is not known whether its destination took it "
                    f"({served.doubt or 'it was not asked yet'}); see `fusemig resolve --help`"
                )
            if served.busy:
                raise StateError(f"disk '{served.name}' is busy: {served.busy}")
            if served.loan is not None:
                raise StateError(
                    f"disk '{served.name}' is not all here yet: it can be migrated when its own migration has completed"
                )
            if not served.is_writable:
                raise StateError(f"disk '{served.name}' is read-only here, so there is nothing to hand off")
            if served.io_error is not None:
                raise StateError(f"disk '{served.name}' has an I/O error and cannot be trusted: {served.io_error}")
        return chosen

    async def _run_outgoing(self, migration: OutgoingMigration, chosen: Sequence[ServedDisk]) -> None:
        try:
            with log_fields(partial(_log_fields, migration, [served.name for served in chosen])):
                await migration.run()
        finally:
            for served in chosen:
                served.busy = ""
                # A daemon that listens gets the disk back into the image that it released.
                served.is_waiting = self._is_destination and served.ownership is Ownership.RELEASED
            self._lend_on()
            self._on_over()

    def _lend_on(self) -> None:
        """Go on lending what a destination took over and does not have all of; for disks that nobody lends now."""
        lent: dict[str, list[ServedDisk]] = {}
        for served in self._disks.values():
            record = served.epoch_file.record
            if record is not None and record.state is Ownership.LENDING and not served.busy:
                lent.setdefault(record.session, []).append(served)
        assert self._nursery is not None
        for disks in lent.values():
            for served in disks:
                served.busy = "its destination fetches from here what it lacks"
            self._nursery.start_soon(self._lend, disks)

    async def _lend(self, lent: Sequence[ServedDisk]) -> None:
        record = lent[0].epoch_file.record
        assert record is not None
        disks = [LentDisk(served.name, served.disk.image, served.epoch_file) for served in lent if served.disk]
        try:
            await Lending(disks, partial(self.dial, record), trio.to_thread.run_sync).run()
        finally:
            for served in lent:
                served.busy = ""
                served.look_again(is_destination=self._is_destination)
        if self.migration is not None and self.migration.phase is MigrationPhase.POSTCOPY:  # a former daemon's
            self.migration.settle(is_handed_off=True)

    def settled(self, settled: Sequence[ServedDisk], *, is_by_hand: bool) -> None:
        """Have the rest of the daemon follow disks of which it is known again who owns them.

        A migration of the daemon before this one begins again if they are ours, unless it was a person who said so.
        """
        for served in settled:
            served.look_again(is_destination=self._is_destination)
        self._lend_on()
        if any(served.disk is not None and served.disk.gate is Gate.OPEN for served in settled):
            self._announcer.writable_again()
        migration = self.migration
        if migration is None or migration.phase is not MigrationPhase.IN_DOUBT or in_doubt(self._disks):
            return
        is_handed_off = not any(served.is_writable for served in settled)
        left, self._interrupted = self._interrupted, None
        if left is None or is_handed_off or is_by_hand:
            migration.settle(is_handed_off=is_handed_off)
            return
        try:
            self._go_on(left, may_be_there=False)  # nothing, in the epoch that the disks are in now
        except FusemigError as exc:
            self.stand_for(left, MigrationPhase.FAILED, exc)

    @property
    def is_migrating(self) -> bool:
        """Whether an outgoing migration has not ended."""
        return self.migration is not None and not self.migration.is_over

    def _on_phase(self, phase: MigrationPhase) -> None:
        self._has_sent |= phase is MigrationPhase.BULK
        self._on_change()  # first: whoever hears of the end finds a successor that would not go on
        self._announcer.outgoing_phase(phase, is_pausing=self.parameters.pause_before_switchover)

    def _on_pass(self, number: int) -> None:
        self._on_change()  # it may have its connection back
        self._announcer.pass_begins(number)


def _log_fields(migration: OutgoingMigration, disks: list[str]) -> dict[str, object]:
    return {"migration": migration.session[:8], "phase": migration.phase.value, "disks": disks}


def _route(request: Request) -> Route:
    """Return how the destination of a migration is talked to, for whoever asks it later."""
    return Route(request.tls_directory, request.tls_hostname, request.is_insecure)
