"""SourceMigration: moves disks away over the native wire, while guests write them.

    handshake             HELLO, WELCOME; and what the destination has, if it goes on (`fusemig.migration.resume`)
    passes                PassSender in slices on a worker thread ─> wire
                          receiver <─ acknowledgements     ticker: proof of life
    hand-off              OutgoingHandoff: FINAL, PREPARED, (a pledge to the group,) COMMIT, TAKEN

The order of things is `fusemig.migration.outgoing`'s. When a migration fails, the tracker still knows what the
destination does not hold: `resume_point`. A connection that is lost, or over which damaged bytes came, whichever side
noticed, is made again, with pauses that grow, until there was no progress for as long as the parameters allow. Guests
notice nothing of it; in the switchover, they go on first.
"""

from __future__ import annotations

import struct
import uuid
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Final

import trio

from fusemig.core.backoff import Backoff
from fusemig.core.compression import Packer
from fusemig.core.phase import MigrationPhase
from fusemig.core.units import BLOCK_SIZE, BLOCKS_PER_CHUNK, CHUNK_SIZE, n_blocks
from fusemig.disk.dirty_map import MapBase, Since
from fusemig.errors import (
    AuthenticationError,
    ConnectionLostError,
    FusemigError,
    MigrationError,
    PeerBusyError,
    PeerRefusedError,
    RemoteProtocolError,
    TransportError,
)
from fusemig.failpoint import reach
from fusemig.migration.commit import NO_ROUTE, OutgoingHandoff
from fusemig.migration.delta_offers import DeltaOffers
from fusemig.migration.joining import join_streams
from fusemig.migration.lend import Lending, LentDisk
from fusemig.migration.link import HANDSHAKE_DEADLINE_S, SLICE_BYTES, BufferPool, NativeLink, Need
from fusemig.migration.order import HeatOrder, Order
from fusemig.migration.outgoing import TICK_S, OutgoingMigration
from fusemig.migration.packing import PackingWatch
from fusemig.migration.pledge import Pledge
from fusemig.migration.reader import PassReader
from fusemig.migration.resume import (
    ContentReconciliation,
    LivingReconciliation,
    MappedReconciliation,
    ResumePoint,
)
from fusemig.migration.sender import WINDOW_BYTES, PassSender
from fusemig.migration.stats import WindowStatistics
from fusemig.records.epoch import Ownership
from fusemig.wire import native

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path

    from fusemig.core.mirror import Reach
    from fusemig.disk.tracked import TrackedDisk
    from fusemig.migration.commit import Route, SourceDisk
    from fusemig.migration.link import Offload
    from fusemig.migration.resume import Reconciliation
    from fusemig.migration.stats import MigrationParameters, MigrationStatistics
    from fusemig.net.transport import ByteStream
    from fusemig.records.epoch import EpochRecord

PROGRESS_INTERVAL_S: Final = 1.0
FIRST_RETRY_S: Final = 0.25
MAX_RETRY_S: Final = 10.0
"""How long a try to get a lost connection back is put off."""

MAX_LOST_SWITCHOVERS: Final = 3
"""Connections that may be lost while guests' writes wait: each costs the guests a pause."""

_LAST_FRAME_S: Final = 0.5
"""How long a migration that ends may go on sending the frame that it was in."""
_SENDING: Final = (MigrationPhase.BULK, MigrationPhase.DIRTY, MigrationPhase.PRE_SWITCHOVER)

_CONNECTION_ERRORS: Final = (TransportError, PeerBusyError, RemoteProtocolError)
"""What another connection may be free of. Once bytes came damaged, nothing that follows them can be told from garbage:
what was sent and is not known to be durable is sent again, over a connection that begins anew."""


class SourceMigration(OutgoingMigration):
    """One outgoing migration over the native wire."""

    wire: ClassVar[str] = "native"
    can_mirror: ClassVar[bool] = True

    def __init__(
        self,
        disks: Sequence[SourceDisk],
        connect: Callable[[], Awaitable[ByteStream]],
        parameters: MigrationParameters,
        offload: Offload,
        on_phase: Callable[[MigrationPhase], None] = lambda _phase: None,
        on_pass: Callable[[int], None] = lambda _number: None,
        count_requests: Callable[[], int] = lambda: 0,
        on_pace: Callable[[Reach, int], None] = lambda _reach, _percent: None,
        resume: ResumePoint | None = None,
        route: Route = NO_ROUTE,
        *,
        group: Path | None = None,
        n_reconnects: int = 0,
        waiting: str = "",
    ) -> None:
        """Prepare as `OutgoingMigration` does.

        Args:
            disks: in the order of the bulk phase.
            connect: makes the connection to the destination.
            parameters: may be changed by the caller while `run` runs.
            offload: runs calls that may sleep.
            on_phase: called at once at each change of phase.
            on_pass: called at the start of each pass with its number, from 1.
            count_requests: tells how many requests guests have ever made; the bulk phase makes room for them.
            on_pace: as `OutgoingMigration` has it.
            resume: where an earlier migration of the same disks was interrupted, to go on from there.
            route: how the destination is talked to, for whoever has to ask it later.
            group: names what decides of these disks and others together (`fusemig.records.decision`).
            n_reconnects: how often it got its connection back before, in another daemon.
            waiting: why it has none now; "" for one that begins.
        """
        super().__init__(disks, connect, parameters, offload, on_phase, on_pass, on_pace)
        self._count_requests = count_requests
        # Where to go on from; None: with nothing.
        self._resume = resume
        if resume is not None:
            self.session = resume.session
            self._log = self._log.bind(migration=self.session[:8])
            self._disks = resume.disks
        if group is not None:
            self.group = str(group)
        self._route = route
        self._attempt = 0
        self._attempt_scope = trio.CancelScope()
        self._is_reconciled = False
        self._can_resume = False
        self._can_lend = True
        self._lending: Lending | None = None
        self._stalled_since: float | None = None
        self._backoff = Backoff(FIRST_RETRY_S, MAX_RETRY_S)
        self._n_reconnects = n_reconnects
        self._n_lost_switchovers = 0
        self._was_connected = False
        self._kept_bytes = 0
        self._waiting = waiting
        self._n_streams = 1
        self._missing_bytes = 0
        """What the destination was told to fetch."""
        self._lending_scope = trio.CancelScope()
        # What the connections before this one sent, and what of it was taken back:
        self._earlier_wire_bytes = 0
        self._earlier_acknowledged_bytes = 0
        self._delta = DeltaOffers(disks, parameters.incremental, offload)
        self._pledge = None if group is None else Pledge(group, self.session, offload)
        self._handoff: OutgoingHandoff = OutgoingHandoff(disks, self.session, parameters, offload, route, self._pledge)
        self._pool = BufferPool()
        self._sender = PassSender(self._pool, count_requests)
        self._reader = PassReader((), self._pool)
        self._packer = None if parameters.compression_level is None else Packer(parameters.compression_level)
        self._earlier_unchanged_bytes = 0
        # Set by the receiver:
        self._progress_made = trio.Event()
        self._synced = trio.Event()

    async def _migrate(self) -> None:
        if self._pledge is None:
            await self._move()
            return
        try:
            await self._pledge.prepare()
            await self._move()
        finally:
            if all(_is_past_pledge(lent) for lent in self._lent):
                await self._pledge.forget()

    async def _move(self) -> None:
        records = await self._handoff.own_records()
        while True:
            with trio.CancelScope() as self._attempt_scope:
                try:
                    await self._migrate_once(records)
                except _CONNECTION_ERRORS as exc:
                    self._failure = self._failure or exc
                else:
                    break
            failure = self._failure
            if failure is None:
                return  # the user's cancel, which ends the scope outside too
            if not self._may_reconnect(failure):
                raise failure
            self._failure = None
            if self._machine.phase is MigrationPhase.FROZEN:
                await self._go_on()
            await self._put_off(failure)
            self._renew()
        if self._handoff.is_loan:
            await self._lend()

    async def _migrate_once(self, records: Sequence[EpochRecord]) -> None:
        """Make one connection and send over it what is not there, up to the hand-off."""
        self._attempt = uuid.uuid4().int >> 65
        self._is_reconciled = False
        stream = await self._connect()
        self._peer = stream.peer
        self._was_connected = True
        decoder = native.Decoder(native.FROM_DESTINATION, preface=False)
        link = self._link = NativeLink(stream, decoder, self._pool)
        try:
            welcome = await self._handshake(link, records)
            reach("after-welcome")
            self._n_streams = await join_streams(self._connect, link, self.session, welcome, self._parameters.streams)
            self._say_streams()
            try:
                await self._find_what_to_send(link, welcome, records)
                self._reader = PassReader(self._disks, self._pool, self._packer)
                self._pacer.start()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._guard, self._receive, link)
                    nursery.start_soon(self._guard, self._tick, link)
                    nursery.start_soon(self._pacer.run)
                    await self._guard(self._send_all)
                    nursery.cancel_scope.cancel()
                await self._hand_off(link)
            except BaseException as exc:
                self._note_doubtful()
                failure = self._failure or exc
                if isinstance(failure, FusemigError) and self._may_reconnect(failure):
                    raise
                if self._handoff.may_thaw:
                    await self._handoff.call_off()
                    self._thaw()
                    await self.guest.fall_back()
                    await self._handoff.say_abort(link, self._reason(exc))
                raise
        finally:
            self._pacer.release()
            self._pool.clear()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await link.stream.aclose()

    async def _guard(self, task: Callable[..., Awaitable[None]], *args: object) -> None:
        """Run a task of a nursery; its failure ends this connection."""
        try:
            await task(*args)
        except FusemigError as exc:
            if self._failure is None:
                self._failure = exc
            self._pacer.release()
            self._attempt_scope.cancel()

    async def _handshake(self, link: NativeLink, records: Sequence[EpochRecord]) -> native.Welcome:
        offers = [
            self._delta.offer(
                lent,
                record,
                is_resumed=self._resume is not None,
                allocated_bytes=await self._offload(lent.count_allocated),
            )
            for lent, record in zip(self._lent, records, strict=True)
        ]
        features = [native.RESUME, native.POSTCOPY]
        hello = native.Hello(
            native.VERSION, self.session, CHUNK_SIZE, offers, features, self._attempt, self._parameters.streams
        )
        await link.send([native.PREFACE, native.encode_message(hello)])
        answer = await link.receive(HANDSHAKE_DEADLINE_S)
        if isinstance(answer, native.Refuse):
            kind: type[FusemigError] = PeerBusyError if answer.is_busy else PeerRefusedError
            if answer.kind == AuthenticationError.kind:
                kind = AuthenticationError
            raise kind(f"{link.peer} refused: {answer.reason}")
        if not isinstance(answer, native.Welcome):
            raise RemoteProtocolError(f"{link.peer} sent {type(answer).__name__} where an answer to HELLO was due")
        self._delta.check(link.peer, offers, answer)
        if self._packer is not None and native.ZSTD not in answer.features:
            raise PeerRefusedError(
                f"{link.peer} cannot unpack what is compressed: upgrade fusemig there, or migrate without --compress"
            )
        return answer

    def _say_streams(self) -> None:
        if self._n_streams < self._parameters.streams:
            self._log.warning("fewer streams than asked for", streams=self._n_streams, asked=self._parameters.streams)

    # What is to be sent

    async def _find_what_to_send(
        self, link: NativeLink, welcome: native.Welcome, records: Sequence[EpochRecord]
    ) -> None:
        """Bring the tracker in line with what the destination has: nothing, or what it says."""
        self._can_resume = self._sender.is_journaled = native.RESUME in welcome.features
        self._can_lend = native.POSTCOPY in welcome.features
        resume, resumption = self._resume, welcome.resumption
        if resume is not None and resumption is native.Resumption.NOTHING:
            raise MigrationError(
                f"{link.peer} cannot go on with an interrupted migration: migrate without --resume, to send everything"
            )
        has_lived = resume is not None and bool(resume.disks) and resumption is native.Resumption.JOURNAL
        if has_lived and [disk.is_thin for disk in self._disks] != (welcome.thin or [False] * len(self._disks)):
            raise MigrationError(f"{link.peer} has other bases than before: migrate without --resume")
        if not has_lived:
            self.forget()
            self._disks = []
            if resume is not None:
                self._resume = resume = ResumePoint(self.session)  # until it is known again what is allocated
            if resumption is not native.Resumption.JOURNAL:
                await self._begin_maps(records)
            elif not all(map(self._has_map, self._lent, records)):
                raise MigrationError("there is no map of what was written since: this is a bug, please report it")
            await self._start_tracking([at for at, is_thin in enumerate(welcome.thin) if is_thin])
            if resume is not None:
                resume.disks = self._disks
        if resume is not None:
            await self._reconcile(link, welcome, has_lived=has_lived)
            is_mapped = not has_lived and resumption is native.Resumption.JOURNAL
            if is_mapped and not all(map(self._has_map, self._lent, records)):
                # It may have lacked a write when it was asked; one that counts now did not.
                raise MigrationError("the map of what was written was lost just now: migrate with --resume again")
        elif welcome.deltas:
            pending = self._pending_bytes()
            await self._delta.run(link, self._disks, welcome.deltas)
            self._kept_bytes += max(0, pending - self._pending_bytes())
        if resume is not None or welcome.deltas:
            # So that what is pending now does not count as dirtied by guests.
            allocated = sum(disk.allocated_bytes for disk in self._disks)
            self._earlier_acknowledged_bytes = allocated + self._dirtied_bytes - self._pending_bytes()
        # From here on the tracker and the digests know, whatever becomes of this connection.
        self._resume = ResumePoint(self.session, self._disks)
        self._is_reconciled = True
        if self._waiting:
            self._waiting = ""
            self._n_reconnects += 1

    def _has_map(self, lent: SourceDisk, record: EpochRecord) -> bool:
        """Tell whether a disk has a map of what was written since this session began."""
        base = MapBase(image_id=record.image_id, epoch=record.epoch, session=self.session)
        return lent.dirty_file is not None and lent.dirty_file.base(Since.SESSION) == base

    async def _begin_maps(self, records: Sequence[EpochRecord]) -> None:
        """Have it kept from now on what guests write, in case this daemon does not live to the end."""
        for lent, record in zip(self._lent, records, strict=True):
            if lent.dirty_file is not None:
                base = MapBase(image_id=record.image_id, epoch=record.epoch, session=self.session)
                await self._offload(lent.dirty_file.begin, Since.SESSION, base)

    async def _reconcile(self, link: NativeLink, welcome: native.Welcome, *, has_lived: bool) -> None:
        if has_lived:
            assert self._resume is not None
            if len(welcome.covered) != len(self._disks):
                raise RemoteProtocolError(f"{self._peer} covers {len(welcome.covered)} disks of {len(self._disks)}")
            self._resume.land(welcome.covered)
        walks = [self._walk(at, welcome, has_lived=has_lived) for at in range(len(self._disks))]
        current = 0
        while True:
            event = await link.receive()
            if isinstance(event, native.Abort):
                raise self._aborted(event)
            if not isinstance(event, native.Have):
                raise RemoteProtocolError(f"{link.peer} sent {type(event).__name__} where HAVE was due")
            if event.disk == -1:
                break
            if not current <= event.disk < len(walks):
                raise RemoteProtocolError(f"{link.peer} has chunks of disk {event.disk}; there are {len(walks)}")
            current = event.disk
            walk = walks[current]
            await self._offload(walk.on_have, event, welcome.resumption)
            if isinstance(walk, ContentReconciliation):
                await link.send_message(
                    native.Kept(current, event.first, struct.pack(f"<{len(walk.kept)}Q", *walk.kept))
                )
        for walk in walks:
            await self._offload(walk.end)
        kept = sum(walk.n_kept for walk in walks)
        self._kept_bytes += kept * CHUNK_SIZE
        self._log.info("going on", how=welcome.resumption.value, kept_chunks=kept, pending_bytes=self._pending_bytes())

    def _walk(self, at: int, welcome: native.Welcome, *, has_lived: bool) -> Reconciliation:
        disk, resume, dirty_file = self._disks[at], self._resume, self._lent[at].dirty_file
        assert resume is not None
        if welcome.resumption is native.Resumption.COMPARE:
            return ContentReconciliation(disk)
        if not has_lived:
            assert dirty_file is not None
            return MappedReconciliation(disk, dirty_file.written(Since.SESSION))
        doubtful = resume.doubtful_chunks(disk, welcome.covered[at]) if resume.is_doubt_counted else None
        return LivingReconciliation(disk, doubtful)

    # A lost connection

    def resume_point(self) -> ResumePoint | None:
        """Return where this migration was interrupted, for another one to go on from there; None: nowhere."""
        if self._machine.phase is not MigrationPhase.FAILED or self._resume is None or not self._resume.disks:
            return None
        return self._resume

    def _note_doubtful(self) -> None:
        """The connection is over: what it sent and the destination did not say to be durable may have been lost."""
        if not self._is_reconciled:
            return
        assert self._resume is not None
        sender = self._sender
        self._resume.is_doubt_counted = sender.is_journaled
        self._resume.in_flight = [(self._attempt, frame) for frame in sender.unacknowledged]
        self._resume.doubtful = [*((self._attempt, frame) for frame in sender.undurable), *self._resume.in_flight]
        self._is_reconciled = False

    def _give_up_in_flight(self) -> None:
        """Keep it, where it is known which frames it went in: the next connection tells."""
        if self._resume is None or not self._resume.disks:
            super()._give_up_in_flight()

    def _may_reconnect(self, failure: FusemigError) -> bool:
        if not isinstance(failure, _CONNECTION_ERRORS) or self._is_cancel_requested:
            return False
        if self._parameters.reconnect_limit_s <= 0:
            return False
        if self.guest.is_moving:
            return False  # it may stand still: it is better off running on here
        phase = self._machine.phase
        if phase is MigrationPhase.SETUP:
            return self._may_begin_again(failure)
        if phase is MigrationPhase.FROZEN:
            return self._can_resume and self._handoff.may_thaw and self._n_lost_switchovers < MAX_LOST_SWITCHOVERS
        return phase in _SENDING and self._can_resume

    def _may_begin_again(self, failure: FusemigError) -> bool:
        """Tell whether to try again what has not got as far as sending: not an address where nobody ever was."""
        if isinstance(failure, AuthenticationError | RemoteProtocolError):
            return False
        if isinstance(failure, PeerBusyError):
            # It may not have noticed yet that the connection which is gone on with is gone.
            return self._resume is not None or bool(self._waiting)
        return self._was_connected or bool(self._waiting)

    async def _go_on(self) -> None:
        """Let the guests go on: the destination was lost in the switchover, which is tried again when it is back."""
        self._n_lost_switchovers += 1
        await self._handoff.call_off()
        self._thaw()
        if self._is_cancel_requested:  # meanwhile
            raise self._cancelled_error()
        self._frozen_at = None
        self._missing_bytes = 0
        self._enter(MigrationPhase.DIRTY)
        self._handoff = OutgoingHandoff(
            self._lent, self.session, self._parameters, self._offload, self._route, self._pledge
        )
        await self._handoff.own_records()

    async def _put_off(self, failure: FusemigError) -> None:
        """Wait before the next try.

        Raises:
            ConnectionLostError: there was no progress for too long.
        """
        now, limit_s = trio.current_time(), self._parameters.reconnect_limit_s
        if self._stalled_since is None:
            self._stalled_since = now
            self._backoff.reset()
        delay_s = self._backoff.next_s()
        if now + delay_s > self._stalled_since + limit_s:
            raise ConnectionLostError(
                f"{failure}; for {limit_s:g} s nothing could be sent: see to the link and the destination, then go on"
                " with `fusemig migrate --resume`"
            ) from failure
        self._waiting = str(failure)
        self._log.warning("connection lost, trying again", reason=str(failure), delay_s=delay_s)
        await trio.sleep(delay_s)

    def _renew(self) -> None:
        """Begin a new account of frames, for a new connection."""
        sender = self._sender
        self._earlier_wire_bytes += sender.wire_bytes
        self._earlier_acknowledged_bytes += sender.acknowledged_bytes + self._reader.unchanged_bytes
        self._earlier_unchanged_bytes += self._reader.unchanged_bytes
        self._reader = PassReader((), self._pool)
        self._sender = PassSender(self._pool, self._count_requests)
        self._synced = trio.Event()

    # Passes

    async def _run_pass(self, *, is_limited: bool) -> None:
        """Send everything that is dirty once, and wait until it is acknowledged."""
        self._begin_pass()
        self._check_can_lend()
        is_bulk = self._machine.phase is MigrationPhase.BULK
        self._reader.begin_pass(
            self._heat_order() if is_bulk and self._parameters.order is Order.HEAT else None,
            only_holes=self._is_postcopy() and not is_limited,
        )
        link = self._link
        sender, need = self._sender, Need.SLICE
        # Of compressed bytes a slice would take long, and its end is when it is looked whether they were worth it.
        slice_bytes = SLICE_BYTES if self._packer is None else SLICE_BYTES >> 3
        run_slice = partial(sender.run_slice, self._reader, link.stream, is_courteous=is_bulk)
        while need is not Need.NOTHING and not (is_limited and self._is_postcopy()):
            if need is Need.ACKNOWLEDGEMENT:
                await self._wait_progress(lambda: sender.has_room)
            self._tune(sender)
            is_courteous = is_bulk and not self._pacer.is_mirroring  # guests would wait for us
            run_slice = partial(sender.run_slice, self._reader, link.stream, is_courteous=is_courteous)
            self._limit.bytes_per_s = self._parameters.max_bandwidth if is_limited else 0
            if not sender.unacknowledged:
                self._busy_since = trio.current_time()
            wire_bytes = sender.wire_bytes
            watch = PackingWatch(self._packer, sender.sent_bytes)
            async with link.sending, link.frame():
                need = await self._offload(run_slice, self._limit.step_bytes(slice_bytes))
                try:
                    while need is Need.STREAM:
                        with watch.waiting():
                            await link.stream.wait_writable()
                        need = await self._offload(run_slice, 0)
                except trio.Cancelled:
                    # Behind half a frame the destination could not be told why it ends.
                    deadline = trio.current_time() + _LAST_FRAME_S
                    with trio.CancelScope(shield=True, deadline=deadline), suppress(FusemigError):
                        while need is Need.STREAM:
                            await link.stream.wait_writable()
                            need = await self._offload(run_slice, 0)
                        link.end_frame()
                    raise
            with watch.waiting():
                await trio.sleep(self._limit.delay_s(sender.wire_bytes - wire_bytes, trio.current_time()))
            watch.end(sender.sent_bytes)
        if sender.unacknowledged:
            await self._say_progress(link)  # which has the destination acknowledge at once
        await self._wait_progress(lambda: not sender.unacknowledged)
        self._stalled_since = None

    def _tune(self, sender: PassSender) -> None:
        """Keep what is under way short, and have it acknowledged soon, while guests' writes wait behind it."""
        if self._pacer.is_mirroring:
            sender.window_bytes = self._pacer.under_way_bytes
            sender.prompt = native.encode_message(self._progress())
        else:
            sender.window_bytes, sender.prompt = WINDOW_BYTES, b""

    def _heat_order(self) -> HeatOrder:
        return HeatOrder([(disk.disk.heat, disk.disk.size) for disk in self._disks])

    def _hot_chunks(self, disk: TrackedDisk) -> list[int]:
        """Return what is to be fetched first; writes have ended, so this is asked once, before the heat fades."""
        if self._parameters.order is not Order.HEAT:
            return []
        return disk.heat.hottest(native.MAX_HOT // len(self._lent))

    def _check_can_lend(self) -> None:
        if self._is_postcopy() and not self._can_lend:
            raise MigrationError(
                f"{self._peer} does not know post-copy: upgrade it, or migrate without --mode postcopy"
            )

    async def _wait_progress(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._progress_made = trio.Event()
            await self._progress_made.wait()

    async def _sync_ahead(self) -> None:
        await self._link.send_message(native.Sync())
        for disk in self._disks:
            await self._flush(disk)
        await self._synced.wait()

    # Background tasks

    async def _receive(self, link: NativeLink) -> None:
        while True:
            event = await link.receive()
            match event:
                case native.Ack():
                    self._acknowledge(event.sequence)
                case native.Synced():
                    self._synced.set()
                case native.Journaled():
                    self._sender.journaled(event.sequence)
                case native.Abort():
                    raise self._aborted(event)
                case _:
                    raise RemoteProtocolError(f"{link.peer} sent {type(event).__name__} during a pass")

    def _aborted(self, abort: native.Abort) -> FusemigError:
        reason = f"{self._peer} aborted the migration: {abort.reason}"
        return ConnectionLostError(reason) if abort.is_damaged else MigrationError(reason)

    def _acknowledge(self, sequence: int) -> None:
        sender = self._sender
        if sequence > sender.last_sequence:
            raise RemoteProtocolError(f"frame {sequence} was acknowledged; the last one sent is {sender.last_sequence}")
        n_bytes = sender.acknowledge(sequence)
        if n_bytes:
            now = trio.current_time()
            self._send_rate.add(n_bytes, now)
            self._bandwidth.add(n_bytes, now - self._busy_since)
            self._busy_since = now
            self._stalled_since = None
            self._pacer.note_acknowledged(now)
        self._progress_made.set()

    async def _tick(self, link: NativeLink) -> None:
        next_progress = trio.current_time()
        while True:
            now = trio.current_time()
            self._count_dirtied(now)
            self._tune(self._sender)  # also in the middle of a slice
            if now >= next_progress:
                next_progress = now + PROGRESS_INTERVAL_S
                await self._say_progress(link)
            await trio.sleep(TICK_S)

    async def _say_progress(self, link: NativeLink) -> None:
        await link.send_message(self._progress())

    def _progress(self) -> native.Progress:
        total = sum(disk.allocated_bytes for disk in self._disks)
        return native.Progress(self._pass_number, self._pending_bytes(), total)

    # Switchover

    async def _hand_off(self, link: NativeLink) -> None:
        """Run the two-phase commit; it is shielded from the moment when it cannot be called off."""
        digests = {disk.disk.name: disk.digest.value for disk in self._disks}
        with trio.move_on_at(self._freeze_ends_at) as scope:
            if self._is_postcopy():
                await self._tell_missing(link)
            await self._handoff.prove(link, digests)
            if self.guest.is_moving:
                await self._load_guest(link)
        if scope.cancelled_caught:
            raise self._freeze_deadline_error()
        if self._is_cancel_requested:  # granted while PREPARED was on its way to this task
            raise self._cancelled_error()
        self._check_stores()
        with trio.CancelScope(shield=True):
            await self._handoff.pledge(link, self._freeze_ends_at, lambda: self._enter(MigrationPhase.PLEDGED))
            await self._handoff.commit(link, self._on_committed)
            self._taken_at = trio.current_time()
            self._thaw()  # answers the parked writes: EROFS
            await self.guest.run_there()
            await self._handoff.release(link)

    @property
    def may_start_postcopy(self) -> bool:
        """Whether the hand-off may still be made to come at once."""
        may = self._machine.phase in (MigrationPhase.SETUP, *_SENDING)
        return may and not self.guest.is_moving and self._pledge is None

    async def _tell_missing(self, link: NativeLink) -> None:
        """Tell the destination what it has to fetch, if there is anything."""
        for disk in self._disks:
            runs = await self._offload(disk.tracking.dirty_runs)
            if len(runs) > native.MAX_DISK_RUNS:
                runs = _in_chunks(runs, disk.disk.size)
            self._handoff.is_loan |= bool(runs)
            self._missing_bytes += sum(stop - first for first, stop in runs) * BLOCK_SIZE
            for at in range(0, len(runs), native.MAX_RUNS):
                await link.send_message(native.Missing(disk.index, runs[at : at + native.MAX_RUNS]))

    async def _lend(self) -> None:
        """Have the destination fetch the rest; both hosts hold a part of the disks until that has ended."""
        self._thaw()
        self._enter(MigrationPhase.POSTCOPY)
        disks = [
            LentDisk(lent.disk.name, lent.disk.image, lent.epoch_file, await self._offload(self._hot_chunks, lent.disk))
            for lent in self._lent
        ]
        self._lending = Lending(disks, self._connect, self._offload)
        self.forget()
        with self._lending_scope:
            await self._lending.run()

    def _end(self, phase: MigrationPhase, error: FusemigError | None) -> None:
        if self._lending_scope.cancelled_caught:
            self._log.warning(
                "this daemon ends, and the destination does not have everything: serve the disks here again, and it "
                "goes on"
            )
            return
        super()._end(phase, error)

    async def wind_down(self) -> None:
        """Call the migration off if that is still possible, and wait for its end; lending goes on after a restart."""
        if self._machine.phase is MigrationPhase.POSTCOPY:
            self._lending_scope.cancel()
        await super().wind_down()

    async def _load_guest(self, link: NativeLink) -> None:
        """Have the rest of the guest moved; a destination that goes away meanwhile ends it before COMMIT is said."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._guard, self._receive, link)
            await self._guard(self.guest.load)
            nursery.cancel_scope.cancel()
        await trio.lowlevel.checkpoint_if_cancelled()

    def _on_committed(self) -> None:
        self.guest.on_committed()
        self._enter(MigrationPhase.COMMITTED)

    def _reason(self, exc: BaseException) -> str:
        if self._is_cancel_requested:
            return "cancelled at the source"
        error = self._failure or exc
        return str(error) if isinstance(error, FusemigError) else "the source stopped"

    # Account

    def statistics(self) -> MigrationStatistics:
        """Return what is known at this moment."""
        stats, packer = super().statistics(), self._packer
        if self._lending is not None:
            pending = max(0, self._missing_bytes - self._lending.sent_bytes)
            stats = replace(stats, pending_bytes=0 if stats.phase is MigrationPhase.COMPLETED else pending)
        return replace(
            stats,
            n_reconnects=self._n_reconnects,
            n_streams=self._n_streams,
            kept_bytes=self._kept_bytes,
            unchanged_bytes=self._earlier_unchanged_bytes + self._reader.unchanged_bytes,
            has_packer=packer is not None,
            packed_in_bytes=0 if packer is None else packer.bytes_in,
            packed_out_bytes=0 if packer is None else packer.bytes_out,
            is_packing=packer is not None and packer.rule.is_on,
            waiting=self._waiting,
        )

    @property
    def _wire_bytes(self) -> int:
        lent = 0 if self._lending is None else self._lending.wire_bytes
        return self._earlier_wire_bytes + self._sender.wire_bytes + lent

    @property
    def _acknowledged_bytes(self) -> int:
        return self._earlier_acknowledged_bytes + self._sender.acknowledged_bytes + self._reader.unchanged_bytes

    def _window(self) -> WindowStatistics:
        sender = self._sender
        return WindowStatistics(
            submitted=int(sender.is_reading),
            read_done=sender.n_read_done,
            in_flight=len(sender.unacknowledged) - sender.n_read_done,
            transferred=sender.n_transferred,
        )


def _is_past_pledge(lent: SourceDisk) -> bool:
    record = lent.epoch_file.record
    return lent.epoch_file.is_certain and (record is None or record.state is not Ownership.PLEDGED)


def _in_chunks(runs: Sequence[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Return runs of blocks widened to whole chunks, which are fewer."""
    widened: list[tuple[int, int]] = []
    for first, stop in runs:
        low = first - first % BLOCKS_PER_CHUNK
        high = min(n_blocks(size), stop + -stop % BLOCKS_PER_CHUNK)
        if widened and low <= widened[-1][1]:
            widened[-1] = widened[-1][0], high
        else:
            widened.append((low, high))
    return widened
