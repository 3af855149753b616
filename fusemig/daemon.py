"""The daemon: disks, mount, control socket, incoming migrations and the outgoing one, in one trio program.

    Daemon.run
      ├ control socket (QMP)            fusemig.control with the table of fusemig.commands
      ├ mount                           fusemig.fuse
      ├ listener (--incoming)           one task per connection: IncomingMigration; with `defer`, when told where
      ├ OutgoingMigration, if one runs
      └ signals, unmount from outside   both ask for an orderly end

The end: a migration that can still be called off is cancelled, one that is committed runs out; then every gate is open
or read-only, so no write is parked when the file system is unmounted, and the images are synced and closed.
"""

from __future__ import annotations

import signal
import uuid
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog
import trio

from fusemig.commands import command_table
from fusemig.control import EventHub, serve_control
from fusemig.disk.tracked import Gate
from fusemig.doubt import Doubts
from fusemig.epoch import Ownership
from fusemig.errors import ConfigError, FusemigError, InDoubtError, PeerRefusedError, StateError
from fusemig.fuse.export import Exports
from fusemig.fuse.lanes import Lane, open_lane
from fusemig.fuse.preflight import MountOptions
from fusemig.listener import listening
from fusemig.migration.arrival import IncomingWire, greet
from fusemig.migration.commit import SourceDisk
from fusemig.migration.incoming import AwaitedDisk
from fusemig.migration.qemu_source import DEFAULT_MACHINE, QemuSource
from fusemig.migration.resume import ResumePoint
from fusemig.migration.source import SourceMigration
from fusemig.migration.stats import MigrationParameters
from fusemig.migration.witness import RecalledDisk
from fusemig.migration.writer import IncomingDisk
from fusemig.pause import Pause
from fusemig.phase import QMP_STATUS, MigrationPhase
from fusemig.qmp import schema
from fusemig.runtimes.move import GuestMove
from fusemig.runtimes.options import make_runtime
from fusemig.security import Security
from fusemig.served import ServedDisk
from fusemig.transport import connect, parse_uri

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from pathlib import Path

    from fusemig.credentials import Credentials
    from fusemig.fuse.lanes import AnyMount
    from fusemig.listener import Connection, Listener
    from fusemig.migration.incoming import IncomingMigration
    from fusemig.migration.outgoing import OutgoingMigration
    from fusemig.runtimes.options import GuestOptions
    from fusemig.served import DiskSpec
    from fusemig.transport import ByteStream, SocketStream, Uri
    from fusemig.wire.native import DiskOffer

CONNECT_DEADLINE_S: Final = 10.0
DEFER: Final = "defer"
"""For a URI: listen when QMP's `migrate-incoming` says where."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class ServeOptions:
    """What ``fusemig serve`` was asked for."""

    mountpoint: Path
    disks: tuple[DiskSpec, ...]
    control: Path
    incoming: str | None = None
    wire: IncomingWire = IncomingWire.AUTO
    state_dir: Path | None = None
    allow_other: bool = False
    lane: Lane = Lane.AUTO
    lane_threads: int | None = None
    write_back: bool = False
    """The kernel's write-back cache (``--cache writeback``)."""
    allow_guest_commands: bool = False
    """Run the pause and resume commands that clients of the control socket name."""
    tls: Credentials | None = None
    """What proves this destination to sources; with it they must prove who they are."""
    tls_identities: tuple[str, ...] = ()
    """The sources that are admitted then."""
    tls_client: Credentials | None = None
    """What proves this source where a migration brings no credentials of its own."""
    is_insecure: bool = False
    """Plain text may cross the network."""


class Daemon:
    """A serving daemon; `run` is its life."""

    def __init__(self, options: ServeOptions) -> None:
        """Keep the options; nothing is opened yet."""
        self.options = options
        self.disks: dict[str, ServedDisk] = {}
        self.parameters = MigrationParameters()
        self.capabilities = set(schema.ALWAYS_ON_CAPABILITIES)
        self.events = EventHub(lambda: schema.MigrationCapability.EVENTS in self.capabilities)
        self.security = Security(
            options.tls, options.tls_identities, client=options.tls_client, is_insecure=options.is_insecure
        )
        self.mount: AnyMount | None = None
        self.pause = Pause(self.disks.values(), self._push_out)
        self.doubts = Doubts(self.disks, self._dial, self._on_settled)
        self.listener: Listener | None = None
        self._secured: dict[Uri, Callable[[SocketStream], Awaitable[ByteStream]]] = {}
        """How connections to the destinations of this process's migrations are made fit to be used."""
        self.outgoing: OutgoingMigration | None = None
        self.incoming: IncomingMigration | None = None
        self.shown: OutgoingMigration | IncomingMigration | None = None
        """What ``query-migrate`` tells of: the last one that began, but an outgoing one until it is over."""
        self._n_rejected = 0
        self.stop_reason = ""
        self._exports = Exports()
        self._nursery: trio.Nursery | None = None
        self._ready = trio.Event()
        self._stop = trio.Event()
        self._is_stopped_for_guests = False
        self._is_listening = False
        self._last_status = ""

    async def run(self) -> None:
        """Serve until asked to stop; on return nothing is mounted, listening or open.

        Raises:
            FusemigError: it could not be started, and why.
        """
        with ExitStack() as images:
            self._open_disks(images)
            try:
                await self._serve()
            except BaseExceptionGroup as group:
                raise _most_telling(group) from group

    def _open_disks(self, images: ExitStack) -> None:
        if not self.options.disks:
            raise ConfigError("no disk to serve: give at least one --disk NAME=PATH")
        is_incoming = self.options.incoming is not None
        for spec in self.options.disks:
            served = ServedDisk(spec, self._exports, self.options.state_dir, is_incoming=is_incoming)
            images.callback(served.close)
            self.disks[served.name] = served

    async def _serve(self) -> None:
        # Heard from before the mount until after it, so that no signal ends us with the mount left behind.
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            await self._serve_until_stopped(signals)

    async def _serve_until_stopped(self, signals: AsyncIterator[int]) -> None:
        async with trio.open_nursery() as control:
            control.start_soon(self._watch_signals, signals)
            # Both sockets exist before the files of the mount do, so whoever waits for a file finds them.
            await control.start(serve_control, self.options.control, command_table(self), self.events)
            options = self.options
            mount_options = MountOptions(allow_other=options.allow_other, write_back=options.write_back)
            async with (
                self._listening() as self.listener,
                open_lane(
                    options.lane, options.mountpoint, self._exports, mount_options, options.lane_threads
                ) as self.mount,
                trio.open_nursery() as self._nursery,
            ):
                self._nursery.start_soon(self._watch_mount)
                self._nursery.start_soon(self.doubts.watch)
                if self.listener is not None:
                    self._is_listening = True
                    self._nursery.start_soon(self.listener.serve, self._receive)
                self._ready.set()
                log.info("serving", mountpoint=str(self.options.mountpoint), disks=sorted(self.disks))
                try:
                    await self._stop.wait()
                finally:
                    with trio.CancelScope(shield=True):
                        await self._wind_down()
                self._nursery.cancel_scope.cancel()
            control.cancel_scope.cancel()

    @asynccontextmanager
    async def _listening(self) -> AsyncIterator[Listener | None]:
        if self.options.incoming in (None, DEFER):
            yield None
            return
        uri = parse_uri(self.options.incoming)
        self.security.check_listen(uri)
        async with listening(uri) as listener:
            yield listener

    async def listen(self, uri: Uri) -> None:
        """Begin to listen where ``--incoming defer`` left that open; return once connections are taken.

        Raises:
            StateError: it listens, or was not started as a destination.
            ConnectError: the address cannot be bound.
            ConfigError: anybody could come, in plain text.
        """
        if self.options.incoming is None:
            raise StateError(
                "'-incoming' was not specified on the command line: start `fusemig serve` with --incoming defer"
            )
        if self._is_listening:
            raise StateError("The incoming migration has already been started")
        self.security.check_listen(uri)
        assert self._nursery is not None
        self._is_listening = True
        try:
            await self._nursery.start(self._serve_listener, uri)
        except BaseException:
            self._is_listening = False
            raise
        # As in QEMU, where this `setup` is that of the first migration to come.
        self._last_status = ""
        self._emit_status(MigrationPhase.SETUP)

    async def _serve_listener(self, uri: Uri, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with listening(uri) as self.listener:
            task_status.started()
            await self.listener.serve(self._receive)

    async def wait_ready(self) -> None:
        """Wait until migrations can be started: the control socket is there before the mount is whole."""
        await self._ready.wait()

    @property
    def is_destination(self) -> bool:
        """Whether disks may come here."""
        return self.options.incoming is not None

    async def _watch_signals(self, signals: AsyncIterator[int]) -> None:
        async for _ in signals:
            self.stop("host-signal")

    async def _watch_mount(self) -> None:
        assert self.mount is not None
        await self.mount.wait_unmounted()
        self.stop("unmounted")

    def stop(self, reason: str) -> None:
        """Ask for an orderly end; returns at once."""
        if not self._stop.is_set():
            self.stop_reason = reason
            causes = [cause for cause in schema.ShutdownCause if cause == reason]
            cause = causes[0] if causes else schema.ShutdownCause.HOST_SIGNAL  # QAPI knows no unmount
            self.events.emit("SHUTDOWN", schema.ShutdownEvent(reason=cause))
            self._stop.set()

    async def _wind_down(self) -> None:
        """Bring migrations to an end and the images to the disk, within deadlines."""
        if self.outgoing is not None:
            await self.outgoing.wind_down()
        for served in self.disks.values():
            if served.disk is not None and served.disk.gate is Gate.CLOSED:
                # What was stopped is not written again: its parked writes are answered EROFS.
                served.disk.set_gate(Gate.READ_ONLY if self.pause.is_on else Gate.OPEN)
        for served in self.disks.values():
            if served.disk is not None and not served.is_read_only:
                try:
                    await trio.to_thread.run_sync(served.disk.flush)
                except FusemigError as exc:
                    log.error("the image may not be durable", disk=served.name, reason=str(exc))

    # Outgoing

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

        Raises:
            StateError: one is running, or a disk cannot be migrated now.
            ConfigError: the URI is wrong, or plain text may not go there.
            AuthenticationError: there are no credentials of the name that was set.
        """
        assert self._nursery is not None
        uri = parse_uri(uri_text)
        if self.outgoing is not None and self.outgoing.phase is MigrationPhase.IN_DOUBT:
            raise InDoubtError("the last migration is in doubt: find out who owns the disks first (`fusemig resolve`)")
        if self.is_migrating:
            raise StateError("There's a migration process in progress")
        secure = self.security.outgoing(uri, tls, tls_hostname, is_insecure=is_insecure)
        chosen = self._choose(names)
        resume = self._resume_point(chosen) if is_resumed else None
        if self.outgoing is not None and (resume is None or not resume.disks):
            self.outgoing.forget()
        lent = []
        for served in chosen:
            assert served.disk is not None
            lent.append(
                SourceDisk(served.disk, served.epoch_file, partial(self.pause.push_out, served), served.dirty_file)
            )

        self._secured[uri] = secure
        self.parameters.pause_before_switchover = (
            schema.MigrationCapability.PAUSE_BEFORE_SWITCHOVER in self.capabilities
        )
        self.parameters.reconnect_limit_s = reconnect_limit_s
        self._last_status = ""
        new = partial(QemuSource, machine=machine) if is_qemu else partial(SourceMigration, resume=resume)
        self.shown = self.outgoing = new(
            lent,
            partial(self._dial, uri_text),
            self.parameters,
            trio.to_thread.run_sync,
            self._on_phase,
            self._on_pass,
            self._count_requests,
        )
        if guest is not None:
            outgoing = self.outgoing
            outgoing.guest = GuestMove(make_runtime(guest, outgoing.session), lambda: outgoing.may_thaw)
        for served in chosen:
            served.busy = f"it is being migrated to {uri}"
        self._nursery.start_soon(self._run_outgoing, self.outgoing, chosen)

    async def _dial(self, uri_text: str) -> ByteStream:
        """Connect as the migration to this URI did, or as the rules are now if that was before a restart."""
        uri = parse_uri(uri_text)
        secure = self._secured.get(uri) or self.security.outgoing(uri)
        return await secure(await connect(uri, CONNECT_DEADLINE_S))

    def _resume_point(self, chosen: Sequence[ServedDisk]) -> ResumePoint:
        """Return where a migration of these disks was interrupted: as the last one knows, or the maps, or unknown."""
        last = self.outgoing
        point = last.resume_point() if isinstance(last, SourceMigration) else None
        if point is not None and [disk.disk for disk in point.disks] == [served.disk for served in chosen]:
            return point
        sessions = {served.interrupted_session for served in chosen}
        session = sessions.pop()
        if session is None or sessions:
            session = uuid.uuid4().hex  # one that no journal is of: contents are compared
        return ResumePoint(session)

    def _choose(self, names: Sequence[str] | None) -> list[ServedDisk]:
        if names is None:
            chosen = [served for served in self.disks.values() if served.is_writable and not served.is_read_only]
            if not chosen and any(served.is_waiting for served in self.disks.values()):
                raise StateError("Guest is waiting for an incoming migration: no disk here is writable yet")
            if not chosen and self.doubts.in_doubt():
                chosen = self.doubts.in_doubt()  # to be told so below
            if not chosen:
                raise StateError("no disk here is writable: there is nothing to migrate")
        else:
            chosen = [self.disks[name] for name in dict.fromkeys(names)]
        for served in chosen:
            if served.ownership is Ownership.HANDED_OFF:
                raise InDoubtError(
                    f"disk '{served.name}' is in doubt: it is not known whether its destination took it "
                    f"({served.doubt or 'it was not asked yet'}); see `fusemig resolve --help`"
                )
            if served.busy:
                raise StateError(f"disk '{served.name}' is busy: {served.busy}")
            if not served.is_writable:
                raise StateError(f"disk '{served.name}' is read-only here, so there is nothing to hand off")
            if served.image is not None and served.image.io_error is not None:
                raise StateError(
                    f"disk '{served.name}' has an I/O error and cannot be trusted: {served.image.io_error}"
                )
        return chosen

    async def _run_outgoing(self, migration: OutgoingMigration, chosen: Sequence[ServedDisk]) -> None:
        try:
            await migration.run()
        finally:
            for served in chosen:
                served.busy = ""
                # A daemon that listens gets the disk back into the image that it released.
                served.is_waiting = self.is_destination and served.ownership is Ownership.RELEASED
            self.doubts.look()

    def _on_settled(self, settled: Sequence[ServedDisk]) -> None:
        """Have the rest of the daemon follow disks of which it is known again who owns them."""
        for served in settled:
            served.look_again(is_destination=self.is_destination)
        if any(served.disk is not None and served.disk.gate is Gate.OPEN for served in settled):
            self._is_stopped_for_guests = False
            self.events.emit("RESUME")
        migration = self.outgoing
        if migration is None or migration.phase is not MigrationPhase.IN_DOUBT or self.doubts.in_doubt():
            return
        migration.settle(is_handed_off=not any(served.is_writable for served in settled))

    @property
    def is_migrating(self) -> bool:
        """Whether an outgoing migration has not ended."""
        return self.outgoing is not None and not self.outgoing.is_over

    def _count_requests(self) -> int:
        assert self.mount is not None
        return self.mount.count_requests()

    def _on_phase(self, phase: MigrationPhase) -> None:
        """Tell QMP clients, in QEMU's order: STOP before the freeze is announced, RESUME after a failure is.

        The first pass is announced before `active`, and `device` only if the migration paused at `pre-switchover`.
        """
        if phase is MigrationPhase.BULK:
            self.events.emit("MIGRATION_PASS", schema.MigrationPassEvent(pass_=1))
        if phase is MigrationPhase.FROZEN and not self.pause.is_on:
            self._is_stopped_for_guests = True
            self.events.emit("STOP")
        if QMP_STATUS[phase] != "device" or self.parameters.pause_before_switchover:
            self._emit_status(phase)
        if phase in (MigrationPhase.FAILED, MigrationPhase.CANCELLED) and self._is_stopped_for_guests:
            self._is_stopped_for_guests = False
            if not self.pause.is_on:
                self.events.emit("RESUME")

    def _emit_status(self, phase: MigrationPhase) -> None:
        status = QMP_STATUS[phase]
        if status != self._last_status:
            self._last_status = status
            self.events.emit("MIGRATION", schema.MigrationEvent(status=schema.MigrationStatus(status)))

    def _on_pass(self, number: int) -> None:
        if number > 1:
            self.events.emit("MIGRATION_PASS", schema.MigrationPassEvent(pass_=number))

    # Incoming: this is the host of IncomingMigration

    async def _receive(self, connection: Connection) -> None:
        """Handle one connection; whatever it does, the others go on."""
        try:
            stream = await self.security.admit(connection.stream)
        except FusemigError as exc:
            self._note_rejected(connection.stream, exc)
            return
        try:
            await self._receive_admitted(stream, connection)
        finally:
            with trio.CancelScope(shield=True):
                await stream.aclose()

    async def _receive_admitted(self, stream: ByteStream, connection: Connection) -> None:
        def on_phase(phase: MigrationPhase) -> None:
            connection.settle()
            self.incoming = migration
            if phase is MigrationPhase.SETUP and not self.is_migrating:
                self.shown = migration
            self._on_incoming_phase(phase)

        try:
            migration = await greet(stream, self.options.wire, self, trio.to_thread.run_sync, on_phase)
        except FusemigError as exc:
            self._note_rejected(stream, exc)
            return
        try:
            await migration.run()
        except FusemigError as exc:  # a cleanup that failed; the migration's own errors are in `error`
            log.error("incoming connection", peer=stream.peer, reason=str(exc))
        if migration.is_question:
            if migration.error is not None:
                log.warning("a question was not settled", peer=stream.peer, reason=str(migration.error))
        elif migration.phase is MigrationPhase.NONE:
            self._note_rejected(stream, migration.error)

    @property
    def n_rejected(self) -> int:
        """How many connections never became a migration."""
        return self._n_rejected + (0 if self.listener is None else self.listener.n_displaced)

    def _note_rejected(self, stream: ByteStream, reason: FusemigError | None) -> None:
        self._n_rejected += 1
        log.warning("connection rejected", peer=stream.peer, reason=str(reason))

    def _on_incoming_phase(self, phase: MigrationPhase) -> None:
        """Tell QMP clients, in QEMU's order: whoever hears `completed` finds the disks writable."""
        if phase is MigrationPhase.COMPLETED and not self.pause.is_on:
            self.events.emit("RESUME")
        if QMP_STATUS[phase] != "device":
            self._emit_status(phase)

    async def awaited(self) -> list[AwaitedDisk]:
        """Return every disk that waits and is not busy (`IncomingHost.awaited`)."""
        assert self.mount is not None
        waiting = [served for served in self.disks.values() if served.is_waiting]
        free = [served for served in waiting if not served.busy]
        if not free:
            busy = "; ".join(f"disk '{served.name}' is busy: {served.busy}" for served in waiting)
            raise PeerRefusedError(f"no disk is awaited here: {busy or 'all are owned or handed off'}")
        awaited = []
        for served in free:
            had_size = served.disk is not None
            size = await trio.to_thread.run_sync(served.open_created)
            awaited.append(AwaitedDisk(served.name, size, served.base is not None))
            if not had_size:
                await self.mount.invalidate(served.export, attributes_only=True)
        return awaited

    async def claim(self, offers: Sequence[DiskOffer], session: str, peer: str) -> list[IncomingDisk]:
        """Reserve offered disks, all or none, and mark them `incoming` (`IncomingHost.claim`)."""
        names = [offer.name for offer in offers]
        if len(set(names)) < len(names):
            raise PeerRefusedError("a disk is offered twice")
        for offer in offers:
            if offer.name not in self.disks:
                awaited = ", ".join(sorted(name for name, disk in self.disks.items() if disk.is_waiting)) or "none"
                raise PeerRefusedError(f"disk '{offer.name}' is not awaited there; awaited are: {awaited}")
            self.disks[offer.name].check_offer(offer)
        chosen = [self.disks[name] for name in names]
        for served in chosen:
            served.busy = f"it is being received from {peer}"
        try:
            return [
                await self._prepare_incoming(served, offer, session, peer)
                for served, offer in zip(chosen, offers, strict=True)
            ]
        except BaseException:
            for served in chosen:
                served.busy = ""
            raise

    async def _prepare_incoming(self, served: ServedDisk, offer: DiskOffer, session: str, peer: str) -> IncomingDisk:
        assert self.mount is not None
        had_size = served.disk is not None
        disk = await trio.to_thread.run_sync(served.receive, offer, session, peer)
        if not had_size:
            await self.mount.invalidate(served.export, attributes_only=True)
        return IncomingDisk(disk, served.epoch_file, partial(self._push_out, served), served.open_journal, served.taken)

    async def _push_out(self, served: ServedDisk) -> None:
        if self.mount is not None:  # what is not mounted is not cached either
            await self.mount.invalidate(served.export)

    def release(self, disks: Sequence[IncomingDisk]) -> None:
        """End a reservation (`IncomingHost.release`)."""
        for disk in disks:
            served = self.disks[disk.disk.name]
            served.busy = ""
            served.is_waiting = not served.is_writable

    def recall(self, session: str, image_ids: Sequence[str], peer: str) -> list[RecalledDisk]:
        """Reserve every disk whose record names the migration or one of the images (`RecallHost.recall`)."""
        found = [
            served
            for served in self.disks.values()
            for record in [served.epoch_file.record]
            if record is not None and (record.session == session or record.image_id in image_ids)
        ]
        for served in found:
            if served.busy:
                raise PeerRefusedError(f"disk '{served.name}' is busy: {served.busy}")
        for served in found:
            served.busy = f"{peer} asks who owns it"
        return [
            RecalledDisk(served.name, served.epoch_file, None if served.is_read_only else served.disk)
            for served in found
        ]

    def let_go(self, disks: Sequence[RecalledDisk]) -> None:
        """End a reservation (`RecallHost.let_go`)."""
        for disk in disks:
            served = self.disks[disk.name]
            served.busy = ""
            served.look_again(is_destination=self.is_destination)


def _most_telling(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the error that a person should see: ours if there is one, else the first."""
    ours, rest = group.split(FusemigError)
    error: BaseException | None = ours or rest
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return group if error is None else error
