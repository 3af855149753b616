"""Inbound: the daemon as a destination, and as one that is asked what became of a disk."""

from __future__ import annotations

from collections import Counter
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog
import trio

from fusemig.core.handoff import Evidence
from fusemig.core.phase import MigrationPhase
from fusemig.disk.room import Need, lack
from fusemig.errors import AuthenticationError, FusemigError, PeerRefusedError, StateError
from fusemig.log_context import log_fields
from fusemig.migration.arrival import greet
from fusemig.migration.fetch_plan import Loan
from fusemig.migration.incoming import AwaitedDisk
from fusemig.migration.joining import Gatherings
from fusemig.migration.witness import RecalledDisk
from fusemig.migration.writer import IncomingDisk
from fusemig.net.listener import listening
from fusemig.net.transport import parse_uri
from fusemig.records.epoch import Ownership, evidence_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

    from fusemig.daemon.announcer import Announcer
    from fusemig.daemon.security import Security
    from fusemig.daemon.served import ServedDisk
    from fusemig.migration.incoming import IncomingMigration
    from fusemig.net.listener import Connection, Listener
    from fusemig.net.transport import ByteStream, Uri
    from fusemig.succession.fdstore import FdStore
    from fusemig.wire.base import IncomingWire
    from fusemig.wire.native import AskedDisk, DiskOffer

_TAKEN: Final = frozenset({Ownership.OWNER, Ownership.BORROWING})
DEFER: Final = "defer"
"""For a URI: listen when QMP's `migrate-incoming` says where."""

log = structlog.get_logger(__name__)


class Inbound:
    """Takes connections, one migration each; this is their `IncomingHost`."""

    def __init__(
        self,
        disks: Mapping[str, ServedDisk],
        incoming: str | None,
        wire: IncomingWire,
        security: Security,
        announcer: Announcer,
        push_out: Callable[[ServedDisk], Awaitable[None]],
        show_size: Callable[[ServedDisk], Awaitable[None]],
        on_phase: Callable[[IncomingMigration], None],
        on_over: Callable[[IncomingMigration], None],
        store: FdStore | None = None,
    ) -> None:
        """Listen to nobody yet.

        Args:
            disks: all disks of the daemon.
            incoming: where sources come to, `DEFER`, or None if none may.
            wire: what they may speak.
            security: decides who is admitted.
            announcer: hears of phases.
            push_out: has the kernel write back and forget what it holds of a disk.
            show_size: has the kernel ask for the attributes of a disk anew.
            on_phase: hears of each migration as it begins, and at each change of its phase.
            on_over: hears of it again when it has ended.
            store: keeps the listening socket for a successor of the daemon.
        """
        self._disks = disks
        self._incoming = incoming
        self._wire = wire
        self._security = security
        self._announcer = announcer
        self._push_out = push_out
        self._show_size = show_size
        self._on_phase = on_phase
        self._on_over = on_over
        self._store = store
        self.gatherings = Gatherings()
        self.listener: Listener | None = None
        self.migration: IncomingMigration | None = None
        """The last one that began."""
        self._rejected: Counter[str] = Counter()
        self._is_listening = False
        self._fetching: dict[str, trio.CancelScope] = {}
        """The scope of the connection over which each migration's disks are fetched."""
        self._nursery: trio.Nursery | None = None

    @property
    def is_destination(self) -> bool:
        """Whether disks may come here."""
        return self._incoming is not None

    def listen_at(self, uri_text: str) -> None:
        """Have `listening` take an address that a daemon before this one was given, or had got; before that."""
        if self._incoming is not None:
            self._incoming = uri_text

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run what `listen` starts, and what comes to the listener that was opened before, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            if self.listener is not None:
                self._is_listening = True
                self._nursery.start_soon(self.listener.serve, self._receive)
            task_status.started()
            await trio.sleep_forever()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Have the socket that was asked for while the body runs; connections wait for `run`."""
        if self._incoming in (None, DEFER):
            yield
            return
        uri = parse_uri(self._incoming)
        try:
            self._security.check_listen(uri)
        except AuthenticationError as exc:  # an object that is missing after a restart
            if self._store is None or not self._store.has_mount:
                raise
            log.error("no source is admitted", reason=str(exc))  # `admit` sees to it
        async with listening(uri, self._store) as self.listener:
            yield

    async def listen(self, uri: Uri) -> None:
        """Begin to listen where ``--incoming defer`` left that open; return once connections are taken.

        Raises:
            StateError: it listens, or was not started as a destination.
            ConnectError: the address cannot be bound.
            ConfigError: anybody could come, in plain text.
        """
        if self._incoming is None:
            raise StateError(
                "'-incoming' was not specified on the command line: start `fusemig serve` with --incoming defer"
            )
        if self._is_listening:
            raise StateError("The incoming migration has already been started")
        self._security.check_listen(uri)
        assert self._nursery is not None
        self._is_listening = True
        try:
            await self._nursery.start(self._serve_listener, uri)
        except BaseException:
            self._is_listening = False
            raise
        # As in QEMU, where this `setup` is that of the first migration to come.
        self._announcer.begin()
        self._announcer.status(MigrationPhase.SETUP)

    async def _serve_listener(self, uri: Uri, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with listening(uri, self._store) as self.listener:
            task_status.started()
            await self.listener.serve(self._receive)

    async def _receive(self, connection: Connection) -> None:
        """Handle one connection; whatever it does, the others go on."""
        try:
            stream = await self._security.admit(connection.stream)
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
            self.migration = migration
            self._on_phase(migration)
            self._announcer.incoming_phase(phase)

        try:
            migration = await greet(stream, self._wire, self, trio.to_thread.run_sync, on_phase, connection.settle)
        except FusemigError as exc:
            self._note_rejected(stream, exc)
            return
        try:
            with log_fields(lambda: _log_fields(migration)):
                await migration.run()
        except FusemigError as exc:  # a cleanup that failed; the migration's own errors are in `error`
            log.error("incoming connection", peer=stream.peer, reason=str(exc))
        if migration.is_question:
            if migration.error is not None:
                log.warning("a question was not settled", peer=stream.peer, reason=str(migration.error))
        elif migration.phase is MigrationPhase.NONE:
            self._note_rejected(stream, migration.error)
        else:
            self._on_over(migration)

    @property
    def rejected(self) -> Counter[str]:
        """How many connections never became a migration, by the kind of error; ``displaced`` had to give way."""
        n_displaced = 0 if self.listener is None else self.listener.n_displaced
        return self._rejected + Counter(displaced=n_displaced)

    def _note_rejected(self, stream: ByteStream, reason: FusemigError | None) -> None:
        self._rejected["failed" if reason is None else reason.kind] += 1
        log.warning("connection rejected", peer=stream.peer, reason=str(reason))

    async def awaited(self) -> list[AwaitedDisk]:
        """Return every disk that waits and is not busy (`IncomingHost.awaited`)."""
        waiting = [served for served in self._disks.values() if served.is_waiting]
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
                await self._show_size(served)
        return awaited

    async def claim(self, offers: Sequence[DiskOffer], session: str, peer: str) -> list[IncomingDisk]:
        """Reserve offered disks, all or none, and mark them `incoming` (`IncomingHost.claim`)."""
        names = [offer.name for offer in offers]
        if len(set(names)) < len(names):
            raise PeerRefusedError("a disk is offered twice")
        for offer in offers:
            if offer.name not in self._disks:
                awaited = ", ".join(sorted(name for name, disk in self._disks.items() if disk.is_waiting)) or "none"
                raise PeerRefusedError(f"disk '{offer.name}' is not awaited there; awaited are: {awaited}")
            self._disks[offer.name].check_offer(offer)
        chosen = [self._disks[name] for name in names]
        for served in chosen:
            served.busy = f"it is being received from {peer}"
        try:
            await trio.to_thread.run_sync(_check_room, chosen, offers)
            return [
                await self._prepare_incoming(served, offer, session, peer)
                for served, offer in zip(chosen, offers, strict=True)
            ]
        except BaseException:
            for served in chosen:
                served.busy = ""
            raise

    async def _prepare_incoming(self, served: ServedDisk, offer: DiskOffer, session: str, peer: str) -> IncomingDisk:
        had_size = served.disk is not None
        is_as_released = await trio.to_thread.run_sync(served.is_as_released, offer)
        disk = await trio.to_thread.run_sync(served.receive, offer, session, peer)
        if not had_size:
            await self._show_size(served)
        return IncomingDisk(
            disk,
            served.epoch_file,
            partial(self._push_out, served),
            served.open_journal,
            served.borrow,
            served.end_loan,
            served.taken,
            is_as_released,
        )

    def release(self, disks: Sequence[IncomingDisk]) -> None:
        """End a reservation (`IncomingHost.release`)."""
        for disk in disks:
            served = self._disks[disk.disk.name]
            served.busy = ""
            served.is_waiting = not served.is_writable

    def loans(self, session: str, lent: Sequence[AskedDisk], scope: trio.CancelScope) -> list[Loan]:
        """Return the disks of a migration that are to be fetched (`IncomingHost.loans`)."""
        taken = {
            record.image_id: served
            for served in self._disks.values()
            for record in [served.epoch_file.record]
            if record is not None and record.session == session and record.state in _TAKEN
        }
        if not lent or not all(disk.image_id in taken or self._has_moved_on(session, disk) for disk in lent):
            raise PeerRefusedError("that migration did not bring these disks here")
        if not any(disk.image_id in taken for disk in lent):
            return []
        if session in self._fetching:
            self._fetching[session].cancel()  # its connection is dead, or about to be told
        self._fetching[session] = scope
        here = [taken.get(disk.image_id) for disk in lent]
        return [Loan() if served is None else Loan(served.loan, served.repay) for served in here]

    def _has_moved_on(self, session: str, lent: AskedDisk) -> bool:
        """Tell whether a disk that was lent to us is known to have left again: only with all of it here could it."""
        return any(
            evidence_of(record, session=session, image_id=lent.image_id, epoch=lent.epoch) is Evidence.OWNED
            for served in self._disks.values()
            for record in [served.epoch_file.record]
            if record is not None and record.state is not Ownership.BORROWING
        )

    def recall(self, session: str, image_ids: Sequence[str], peer: str) -> list[RecalledDisk]:
        """Reserve every disk whose record names the migration or one of the images (`RecallHost.recall`)."""
        found = [
            served
            for served in self._disks.values()
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
            served = self._disks[disk.name]
            served.busy = ""
            served.look_again(is_destination=self.is_destination)


def _check_room(chosen: Sequence[ServedDisk], offers: Sequence[DiskOffer]) -> None:
    """Raise `PeerRefusedError` where the images would not hold what is offered; may sleep."""
    needs = [
        Need(offer.name, offer.allocated_bytes, room)
        for served, offer in zip(chosen, offers, strict=True)
        if offer.allocated_bytes and served.base is None
        for room in [served.room()]
        if room is not None
    ]
    if reason := lack(needs):
        raise PeerRefusedError(reason)


def _log_fields(migration: IncomingMigration) -> dict[str, object]:
    fields: dict[str, object] = {"phase": migration.phase.value}
    if migration.session:
        fields |= {"migration": migration.session[:8], "disks": [one.disk.name for one in migration.disks]}
    return fields
