"""SourceMigration: moves disks away over the native wire, while guests write them.

    setup          SourceSetup: HELLO, WELCOME; and what the destination has, if it goes on
    passes         NativePasses, with acknowledgements and proof of life beside them
    switchover     OutgoingHandoff: FINAL, PREPARED, (a pledge to the group,) COMMIT, TAKEN
    afterwards     SourcePostcopy: the rest, if the destination took over before it had everything

The order of passes is `fusemig.migration.outgoing`'s. Setup and passes are made anew for each connection: one that is
lost, or over which damaged bytes came, whichever side noticed, is made again as `Reconnection` allows. Guests notice
nothing of it; in the switchover, they go on first.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Final

import trio

from fusemig.core.compression import Packer
from fusemig.core.phase import SENDING, MigrationPhase
from fusemig.errors import FusemigError, MigrationError
from fusemig.failpoint import reach
from fusemig.migration.commit import NO_ROUTE, OutgoingHandoff
from fusemig.migration.joining import join_streams
from fusemig.migration.link import BufferPool, NativeLink
from fusemig.migration.native_passes import NativePasses, Sent
from fusemig.migration.outgoing import TICK_S, OutgoingMigration
from fusemig.migration.pledge import Pledge
from fusemig.migration.postcopy import SourcePostcopy
from fusemig.migration.reconnection import CONNECTION_ERRORS, Reconnection
from fusemig.migration.source_setup import SourceSetup
from fusemig.migration.stats import WindowStatistics
from fusemig.records.epoch import Ownership
from fusemig.tasks import run_beside
from fusemig.wire import native

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path

    from fusemig.core.mirror import Reach
    from fusemig.migration.commit import Route, SourceDisk
    from fusemig.migration.link import Offload
    from fusemig.migration.resume import ResumePoint
    from fusemig.migration.stats import MigrationParameters, MigrationStatistics
    from fusemig.net.transport import ByteStream
    from fusemig.records.epoch import EpochRecord

PROGRESS_INTERVAL_S: Final = 1.0


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
        if resume is not None:
            self.session = resume.session
            self._log = self._log.bind(migration=self.session[:8])
        if group is not None:
            self.group = str(group)
        self._route = route
        self._count_requests = count_requests
        self._pledge = None if group is None else Pledge(group, self.session, offload)
        self._handoff: OutgoingHandoff = self._new_handoff()
        self._setup = SourceSetup(self.session, self._disks, parameters, offload, resume)
        self._reconnection = Reconnection(parameters, n_reconnects=n_reconnects, waiting=waiting)
        self._unproved = ""
        """Which base may not be told of yet; "": none, or none is to be."""
        self._postcopy = SourcePostcopy(self._disks, parameters, offload)
        self._pool = BufferPool()
        self._packer = None if parameters.compression_level is None else Packer(parameters.compression_level)
        self._passes: NativePasses | None = None
        """Over the present connection, or the last one."""
        self._sent = Sent()
        """Over those before it."""
        self._n_streams = 1

    def _new_handoff(self) -> OutgoingHandoff:
        return OutgoingHandoff(
            self._disks.lent, self.session, self._parameters, self._offload, self._route, self._pledge
        )

    async def _migrate(self) -> None:
        if self._pledge is None:
            await self._move()
            return
        try:
            await self._pledge.prepare()
            await self._move()
        finally:
            if all(_is_past_pledge(lent) for lent in self._disks.lent):
                await self._pledge.forget()

    async def _move(self) -> None:
        """Make connections until everything is sent and handed off over one of them."""
        if self._parameters.incremental is not False:
            try:
                await self._disks.wait_for_bases(self._note_unproved)
            finally:
                self._unproved = ""
        records = await self._handoff.own_records()
        while True:
            try:
                await self._migrate_once(records)
            except CONNECTION_ERRORS as exc:
                if not self._may_reconnect(exc):
                    raise
                failure = exc
            else:
                break
            if self._machine.phase is MigrationPhase.FROZEN:
                await self._let_guests_go_on()
            await self._reconnection.put_off(failure)
            if self._passes is not None:
                self._sent.add(self._passes.sent)
                self._passes = None
        if self._handoff.is_loan:
            self._thaw()
            self._enter(MigrationPhase.POSTCOPY)
            await self._postcopy.run(self._connect)

    def _note_unproved(self, reason: str) -> None:
        self._log.warning("not connecting yet", reason=reason)
        self._unproved = reason

    async def _migrate_once(self, records: Sequence[EpochRecord]) -> None:
        """Make one connection, send over it what is not there, and hand off."""
        stream = await self._connect()
        self._peer = stream.peer
        self._reconnection.note_connected()
        link = NativeLink(stream, native.Decoder(native.FROM_DESTINATION, preface=False), self._pool)
        try:
            welcome = await self._greet(link, records)
            try:
                with link.heard_out():
                    passes = self._passes = await self._set_up(link, welcome, records)
                    await self._make_passes(passes)
                    await self._hand_off(link, passes)
            except BaseException as exc:
                if self._passes is not None:
                    self._setup.note_lost(self._passes.sender)
                if isinstance(exc, FusemigError) and self._may_reconnect(exc):
                    raise
                if self._handoff.may_thaw:
                    await self._call_off(link, exc)
                raise
        finally:
            self._pacer.release()
            self._pool.clear()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await link.stream.aclose()

    async def _call_off(self, link: NativeLink, cause: BaseException) -> None:
        """Have the guests go on here, and tell the destination why."""
        await self._handoff.call_off()
        self._thaw()
        await self.guest.fall_back()
        if self._is_cancel_requested:
            reason = "cancelled at the source"
        else:
            reason = str(cause) if isinstance(cause, FusemigError) else "the source stopped"
        await self._handoff.say_abort(link, reason)

    # Setup

    async def _greet(self, link: NativeLink, records: Sequence[EpochRecord]) -> native.Welcome:
        """Hear that the destination receives the disks, and make the further connections that it takes."""
        welcome = await self._setup.shake_hands(link, records)
        reach("after-welcome")
        n_asked = self._parameters.streams
        self._n_streams = await join_streams(self._connect, link, self.session, welcome, n_asked)
        if self._n_streams < n_asked:
            self._log.warning("fewer streams than asked for", streams=self._n_streams, asked=n_asked)
        return welcome

    async def _set_up(self, link: NativeLink, welcome: native.Welcome, records: Sequence[EpochRecord]) -> NativePasses:
        """Agree with the destination on what is to be sent over this connection."""
        if await self._setup.find_what_to_send(link, welcome, records):
            # So that what is pending now does not count as dirtied by guests.
            dirtied_bytes = self._meter.dirtied_bytes
            self._sent.acknowledged_bytes = self._disks.allocated_bytes + dirtied_bytes - self._disks.pending_bytes
        self._reconnection.note_agreed()
        return NativePasses(
            link,
            self._disks,
            self._pool,
            self._packer,
            self._parameters,
            self._meter,
            self._pacer,
            self._offload,
            self._count_requests,
            self._progress,
            self._reconnection.note_progress,
            is_journaled=self._setup.can_resume,
        )

    def _progress(self) -> native.Progress:
        return native.Progress(self._pass_number, self._pending_bytes(), self._disks.allocated_bytes)

    # Passes

    async def _make_passes(self, passes: NativePasses) -> None:
        """Send everything, up to the last pass behind the closed gate."""
        self._pacer.start()
        await run_beside(
            self._send_all,
            passes.receive,
            partial(self._tick, passes),
            self._pacer.run,
            on_failure=self._pacer.release,
        )

    async def _tick(self, passes: NativePasses) -> None:
        next_progress = trio.current_time()
        while True:
            now = trio.current_time()
            self._count_dirtied(now)
            passes.tune()
            if now >= next_progress:
                next_progress = now + PROGRESS_INTERVAL_S
                await passes.say_progress()
            await trio.sleep(TICK_S)

    async def _run_pass(self, *, is_limited: bool) -> None:
        assert self._passes is not None
        if self._is_postcopy() and not self._setup.can_lend:
            raise MigrationError(
                f"{self._peer} does not know post-copy: upgrade it, or migrate without --mode postcopy"
            )
        await self._passes.run_pass(is_bulk=self._machine.phase is MigrationPhase.BULK, is_limited=is_limited)

    async def _sync_ahead(self) -> None:
        assert self._passes is not None
        await self._passes.sync()

    @property
    def may_start_postcopy(self) -> bool:
        """Whether the hand-off may still be made to come at once."""
        may = self._machine.phase in (MigrationPhase.SETUP, *SENDING)
        return may and not self.guest.is_moving and self._pledge is None

    # Switchover

    async def _hand_off(self, link: NativeLink, passes: NativePasses) -> None:
        """Run the two-phase commit; it is shielded from the moment when it cannot be called off."""
        digests = {disk.disk.name: disk.digest.value for disk in self._disks.tracked}
        with self._switchover.in_time():
            if self._is_postcopy():
                self._handoff.is_loan = await self._postcopy.tell_missing(link)
            await self._handoff.prove(link, digests)
            if self.guest.is_moving:
                # A destination that goes away meanwhile ends it before COMMIT is said.
                await run_beside(self.guest.load, passes.receive)
                await trio.lowlevel.checkpoint_if_cancelled()
        if self._is_cancel_requested:  # granted while PREPARED was on its way to this task
            raise self._cancelled_error()
        self._disks.check_stores()
        with trio.CancelScope(shield=True):
            await self._handoff.pledge(link, self._switchover.deadline, lambda: self._enter(MigrationPhase.PLEDGED))
            await self._handoff.commit(link, self._on_committed)
            self._switchover.note_taken()
            self._thaw()  # answers the parked writes: EROFS
            await self.guest.run_there()
            await self._handoff.release(link)

    def _on_committed(self) -> None:
        self.guest.on_committed()
        self._enter(MigrationPhase.COMMITTED)

    # A lost connection

    def resume_point(self) -> ResumePoint | None:
        """Return where this migration was interrupted, for another one to go on from there; None: nowhere."""
        return self._setup.resume_point if self._machine.phase is MigrationPhase.FAILED else None

    def _may_reconnect(self, failure: FusemigError) -> bool:
        if self._is_cancel_requested or self.guest.is_moving:  # a guest may stand still: it is better off running here
            return False
        return self._reconnection.may_follow(
            failure,
            self._machine.phase,
            may_thaw=self._handoff.may_thaw,
            can_resume=self._setup.can_resume,
            is_resumed=self._setup.is_resumed,
        )

    async def _let_guests_go_on(self) -> None:
        """The destination was lost in the switchover, which is tried again when it is back."""
        self._reconnection.note_lost_switchover()
        await self._handoff.call_off()
        self._thaw()
        if self._is_cancel_requested:  # meanwhile
            raise self._cancelled_error()
        self._switchover.undo()
        self._enter(MigrationPhase.DIRTY)
        self._handoff = self._new_handoff()
        await self._handoff.own_records()

    def _give_up_in_flight(self) -> None:
        """Keep it, where it is known which frames it went in: the next connection tells."""
        if self._setup.resume_point is None:
            super()._give_up_in_flight()

    # The end

    def _end(self, phase: MigrationPhase, error: FusemigError | None) -> None:
        if self._postcopy.was_left:
            self._log.warning(
                "this daemon ends, and the destination does not have everything: serve the disks here again, and it "
                "goes on"
            )
            return
        super()._end(phase, error)

    async def wind_down(self) -> None:
        """Call the migration off if that is still possible, and wait for its end; lending goes on after a restart."""
        if self._machine.phase is MigrationPhase.POSTCOPY:
            self._postcopy.leave()
        await super().wind_down()

    # Account

    def statistics(self) -> MigrationStatistics:
        """Return what is known at this moment."""
        stats, packer, to_fetch = super().statistics(), self._packer, self._postcopy.pending_bytes
        if to_fetch is not None:
            stats = replace(stats, pending_bytes=0 if stats.phase is MigrationPhase.COMPLETED else to_fetch)
        return replace(
            stats,
            n_reconnects=self._reconnection.n_reconnects,
            n_streams=self._n_streams,
            kept_bytes=self._setup.kept_bytes,
            unchanged_bytes=self._sent_in_all().unchanged_bytes,
            has_packer=packer is not None,
            packed_in_bytes=0 if packer is None else packer.bytes_in,
            packed_out_bytes=0 if packer is None else packer.bytes_out,
            is_packing=packer is not None and packer.rule.is_on,
            waiting=self._unproved or self._reconnection.waiting,
        )

    def _sent_in_all(self) -> Sent:
        total = replace(self._sent)
        if self._passes is not None:
            total.add(self._passes.sent)
        return total

    @property
    def _wire_bytes(self) -> int:
        return self._sent_in_all().wire_bytes + self._postcopy.wire_bytes

    @property
    def _acknowledged_bytes(self) -> int:
        return self._sent_in_all().acknowledged_bytes

    def _window(self) -> WindowStatistics:
        return WindowStatistics(0, 0, 0, 0) if self._passes is None else self._passes.window()


def _is_past_pledge(lent: SourceDisk) -> bool:
    record = lent.epoch_file.record
    return lent.epoch_file.is_certain and (record is None or record.state is not Ownership.PLEDGED)
