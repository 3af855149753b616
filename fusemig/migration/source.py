"""SourceMigration: moves disks away while guests write them.

    run ── connect, handshake, tracking on, find allocated chunks            SETUP
         ├ passes: PassSender in slices on a worker thread ─> wire           BULK, DIRTY
         │         receiver <─ acknowledgements     ticker: proof of life
         ├ (wait for `proceed`, with passes going on)                        PRE_SWITCHOVER
         ├ gate closed, drained, synced; last pass                           FROZEN
         └ OutgoingHandoff: FINAL, PREPARED, COMMIT, TAKEN                   COMMITTED, COMPLETED

Every way out before COMMITTED opens the gates again, however it is taken: an error, `cancel`, the daemon's end. The
tracker then still knows what the destination does not hold. From COMMITTED on nothing opens a gate.

Tasks share this object's fields; each is written by one task only, between two awaits (see docs/architecture.md).
"""

from __future__ import annotations

import uuid
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog
import trio

from fusemig.convergence import Convergence, Decision, Rate, RateLimit, Throughput
from fusemig.disk.tracked import Gate
from fusemig.errors import (
    CancelledByUserError,
    FusemigError,
    InDoubtError,
    MigrationError,
    PeerRefusedError,
    RemoteProtocolError,
    StateError,
)
from fusemig.migration.commit import OutgoingHandoff
from fusemig.migration.link import HANDSHAKE_DEADLINE_S, SLICE_BYTES, BufferPool, NativeLink, Need
from fusemig.migration.reader import OutgoingDisk, PassReader
from fusemig.migration.sender import WINDOW_BYTES, PassSender
from fusemig.migration.stats import DiskStatistics, MigrationStatistics, WindowStatistics
from fusemig.phase import MigrationPhase, PhaseMachine
from fusemig.units import CHUNK_SIZE
from fusemig.wire import native

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from fusemig.epoch import EpochRecord
    from fusemig.migration.commit import SourceDisk
    from fusemig.migration.link import Offload
    from fusemig.migration.stats import MigrationParameters
    from fusemig.transport import ByteStream

log = structlog.get_logger(__name__)

PROGRESS_INTERVAL_S: Final = 1.0
_TICK_S: Final = 0.1


class SourceMigration:
    """One outgoing migration, from `run` to its end; made anew for the next."""

    def __init__(
        self,
        disks: Sequence[SourceDisk],
        connect: Callable[[], Awaitable[ByteStream]],
        parameters: MigrationParameters,
        offload: Offload,
        on_phase: Callable[[MigrationPhase], None] = lambda _phase: None,
        on_pass: Callable[[int], None] = lambda _number: None,
        count_requests: Callable[[], int] = lambda: 0,
    ) -> None:
        """Prepare to move ``disks`` as one group.

        Args:
            disks: in the order of the bulk phase.
            connect: makes the connection to the destination.
            parameters: may be changed by the caller while `run` runs.
            offload: runs calls that may sleep.
            on_phase: called at once at each change of phase.
            on_pass: called at the start of each pass with its number, from 1.
            count_requests: tells how many requests guests have ever made; the bulk phase makes room for them.
        """
        self.session = uuid.uuid4().hex
        self.error: FusemigError | None = None
        self._lent = disks
        self._connect = connect
        self._parameters = parameters
        self._offload = offload
        self._on_phase = on_phase
        self._on_pass = on_pass
        self._machine = PhaseMachine()
        self._handoff = OutgoingHandoff(disks, self.session, parameters, offload)
        self._disks: list[OutgoingDisk] = []
        self._pool = BufferPool()
        self._limit = RateLimit(0)
        self._convergence = Convergence()
        self._peer = ""
        self._log = log.bind(migration=self.session[:8])
        # The whole run, and why a background task ended it:
        self._scope = trio.CancelScope()
        self._is_cancel_requested = False
        self._failure: FusemigError | None = None
        self._proceed = trio.Event()
        self._over = trio.Event()
        self._sender = PassSender(self._pool, count_requests)
        # Set by the receiver:
        self._progress_made = trio.Event()
        self._synced = trio.Event()
        # Clocks and rates:
        self._pass_number = 0
        self._bandwidth = Throughput()
        self._busy_since = 0.0
        self._send_rate = Rate()
        self._dirty_rate = Rate()
        self._dirtied_bytes = 0
        self._started_at = self._ended_at = 0.0
        self._set_up_at: float | None = None
        self._frozen_at: float | None = None
        self._freeze_ends_at = 0.0
        self._taken_at: float | None = None

    # What the daemon may do while it runs

    @property
    def phase(self) -> MigrationPhase:
        """Where it is."""
        return self._machine.phase

    @property
    def is_over(self) -> bool:
        """Whether it has ended; it may be in doubt then."""
        return self._machine.is_over

    def cancel(self) -> None:
        """Call the migration off; `run` then ends as CANCELLED.

        Raises:
            StateError: it is committed or over.
        """
        if self._machine.phase is MigrationPhase.CANCELLING:
            return
        if not self._machine.may_cancel or self._handoff.is_committing:
            raise StateError(f"the migration cannot be cancelled any more: it is {self._machine.phase.value}")
        self._is_cancel_requested = True
        self._enter(MigrationPhase.CANCELLING)
        self._scope.cancel()

    def proceed(self) -> None:
        """Let a migration that waits at pre-switchover go on.

        Raises:
            StateError: it does not wait there.
        """
        if self._machine.phase is not MigrationPhase.PRE_SWITCHOVER:
            raise StateError(f"Migration not in expected state: {self._machine.phase.value}")
        self._proceed.set()

    async def wind_down(self) -> None:
        """Call the migration off if that is still possible, and wait for its end; for the daemon's own end."""
        with suppress(StateError):  # committed or over: it ends by itself, within its deadlines
            self.cancel()
        await self._over.wait()

    def forget(self) -> None:
        """Stop tracking for a resumption that will not come; after `run` has ended."""
        for disk in self._disks:
            disk.tracking.stop()

    # The run

    async def run(self) -> None:
        """Migrate; returns when it is over, with the outcome in `phase` and `error`.

        Cancellation: before the commit the gates are open again when this returns; from the commit on it is shielded
        until TAKEN came or its deadline passed.
        """
        self._started_at = trio.current_time()
        self._enter(MigrationPhase.SETUP)
        try:
            with self._scope:
                await self._migrate()
            self._raise_outcome()
        except InDoubtError as exc:
            self._end(MigrationPhase.IN_DOUBT, exc)
        except CancelledByUserError as exc:
            self._end(MigrationPhase.CANCELLED, exc)
        except FusemigError as exc:
            self._end(MigrationPhase.FAILED, exc)
        else:
            self._end(MigrationPhase.COMPLETED, None)
        finally:
            self._ended_at = trio.current_time()
            self._thaw()
            self._over.set()

    def _raise_outcome(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._scope.cancelled_caught:
            raise self._cancelled_error()

    def _cancelled_error(self) -> CancelledByUserError:
        return CancelledByUserError("the migration was cancelled; the disks stay here")

    def _end(self, phase: MigrationPhase, error: FusemigError | None) -> None:
        self._thaw()
        if self._machine.phase is MigrationPhase.CANCELLING and phase is MigrationPhase.FAILED:
            # Whatever else went wrong on the way out, the user asked for this end and is told so.
            phase, error = MigrationPhase.CANCELLED, self._cancelled_error()
        if phase in (MigrationPhase.COMPLETED, MigrationPhase.CANCELLED):
            self.forget()
        self.error = error
        self._ended_at = trio.current_time()
        if error is not None:
            self._log.warning("migration over", phase=phase.value, reason=str(error))
        self._enter(phase)

    def _thaw(self) -> None:
        """Give the guests their disks back, unless they are not ours to give; idempotent."""
        if not self._handoff.may_thaw:
            for lent in self._lent:
                lent.disk.set_gate(Gate.READ_ONLY)
            return
        for lent in self._lent:
            if lent.disk.gate is Gate.CLOSED:
                lent.disk.set_gate(Gate.OPEN)
        for disk in self._disks:
            disk.tracking.restore_all()

    def _enter(self, phase: MigrationPhase) -> None:
        self._machine.enter(phase)
        self._log.info("migration phase", phase=phase.value, pass_number=self._pass_number)
        self._on_phase(phase)

    async def _migrate(self) -> None:
        records = await self._handoff.own_records()
        stream = await self._connect()
        self._peer = stream.peer
        try:
            decoder = native.Decoder(native.FROM_DESTINATION, preface=False)
            link = NativeLink(stream, decoder, self._pool)
            await self._handshake(link, records)
            try:
                await self._start_tracking()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._guard, self._receive, link)
                    nursery.start_soon(self._guard, self._tick, link)
                    await self._guard(self._stream, link)
                    nursery.cancel_scope.cancel()
                await self._hand_off(link)
            except BaseException as exc:
                if self._handoff.may_thaw:
                    await self._handoff.call_off()
                    self._thaw()
                    await self._handoff.say_abort(link, self._reason(exc))
                raise
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await stream.aclose()

    async def _stream(self, link: NativeLink) -> None:
        """Make the destination hold every byte: passes, and the last one behind the closed gate."""
        await self._converge(link)
        await self._freeze(link)

    async def _guard(self, task: Callable[..., Awaitable[None]], *args: object) -> None:
        """Run a task of a nursery; its failure ends the migration with this error rather than with a group of them."""
        try:
            await task(*args)
        except FusemigError as exc:
            if self._failure is None:
                self._failure = exc
            self._scope.cancel()

    async def _handshake(self, link: NativeLink, records: Sequence[EpochRecord]) -> None:
        offers = [
            native.DiskOffer(lent.disk.name, lent.disk.size, record.image_id, record.epoch)
            for lent, record in zip(self._lent, records, strict=True)
        ]
        hello = native.Hello(native.VERSION, self.session, CHUNK_SIZE, offers)
        await link.send([native.PREFACE, native.encode_message(hello)])
        answer = await link.receive(HANDSHAKE_DEADLINE_S)
        if isinstance(answer, native.Refuse):
            raise PeerRefusedError(f"{link.peer} refused: {answer.reason}")
        if not isinstance(answer, native.Welcome):
            raise RemoteProtocolError(f"{link.peer} sent {type(answer).__name__} where an answer to HELLO was due")

    async def _start_tracking(self) -> None:
        for index, lent in enumerate(self._lent):
            self._disks.append(OutgoingDisk(index, lent.disk, lent.disk.start_tracking()))
        for disk in self._disks:
            await self._offload(disk.find_allocated)
        self._reader = PassReader(self._disks, self._pool)
        self._set_up_at = trio.current_time()

    # Passes

    async def _converge(self, link: NativeLink) -> None:
        """Make passes until a switchover is worth it and allowed."""
        self._enter(MigrationPhase.BULK)
        is_synced = False
        while True:
            await self._run_pass(link, is_limited=True)
            if self._machine.phase is MigrationPhase.BULK:
                self._enter(MigrationPhase.DIRTY)
            forecast = self._convergence.forecast(self._pending_bytes(), self._bandwidth.per_second)
            decision = self._convergence.after_pass(forecast, self._parameters.downtime_limit_s)
            if decision is Decision.CONTINUE:
                continue
            if not is_synced:
                # Make both stores durable while the guest still runs, so that the syncs of the freeze are short.
                is_synced = True
                await self._sync_ahead(link)
                continue
            if self._parameters.pause_before_switchover and not self._proceed.is_set():
                if self._machine.phase is not MigrationPhase.PRE_SWITCHOVER:
                    self._enter(MigrationPhase.PRE_SWITCHOVER)
                with trio.move_on_after(_TICK_S):
                    await self._proceed.wait()
                continue
            return

    async def _run_pass(self, link: NativeLink, *, is_limited: bool) -> None:
        """Send everything that is dirty once, and wait until it is acknowledged."""
        self._pass_number += 1
        self._on_pass(self._pass_number)
        self._reader.begin_pass()
        sender, need = self._sender, Need.SLICE
        is_bulk = self._machine.phase is MigrationPhase.BULK
        run_slice = partial(sender.run_slice, self._reader, link.stream, is_courteous=is_bulk)
        while need is not Need.NOTHING:
            if need is Need.ACKNOWLEDGEMENT:
                await self._wait_progress(lambda: sender.sent_bytes - sender.acknowledged_bytes < WINDOW_BYTES)
            self._limit.bytes_per_s = self._parameters.max_bandwidth if is_limited else 0
            if not sender.unacknowledged:
                self._busy_since = trio.current_time()
            wire_bytes = sender.wire_bytes
            async with link.sending, link.frame():
                need = await self._offload(run_slice, self._limit.step_bytes(SLICE_BYTES))
                while need is Need.STREAM:
                    await link.stream.wait_writable()
                    need = await self._offload(run_slice, 0)
            await trio.sleep(self._limit.delay_s(sender.wire_bytes - wire_bytes, trio.current_time()))
        await self._wait_progress(lambda: not sender.unacknowledged)

    async def _wait_progress(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._progress_made = trio.Event()
            await self._progress_made.wait()

    def _pending_bytes(self) -> int:
        return sum(disk.tracking.pending_bytes for disk in self._disks)

    async def _sync_ahead(self, link: NativeLink) -> None:
        await link.send_message(native.Sync())
        for disk in self._disks:
            await self._offload(disk.disk.flush)
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
                case native.Abort():
                    raise MigrationError(f"{link.peer} aborted the migration: {event.reason}")
                case _:
                    raise RemoteProtocolError(f"{link.peer} sent {type(event).__name__} during a pass")

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
        self._progress_made.set()

    async def _tick(self, link: NativeLink) -> None:
        total = sum(disk.allocated_bytes for disk in self._disks)
        next_progress = trio.current_time()
        while True:
            now = trio.current_time()
            self._count_dirtied(now)
            if now >= next_progress:
                next_progress = now + PROGRESS_INTERVAL_S
                await link.send_message(native.Progress(self._pass_number, self._pending_bytes(), total))
            await trio.sleep(_TICK_S)

    def _count_dirtied(self, now: float) -> None:
        """Derive what guests dirtied from what is left: all that was ever to be sent, less what there was to begin."""
        allocated = sum(disk.allocated_bytes for disk in self._disks)
        dirtied = max(self._dirtied_bytes, self._pending_bytes() + self._sender.acknowledged_bytes - allocated)
        self._dirty_rate.add(dirtied - self._dirtied_bytes, now)
        self._dirtied_bytes = dirtied

    # Switchover

    async def _freeze(self, link: NativeLink) -> None:
        """Close the gates, drain, sync and send the rest."""
        for lent in self._lent:
            await lent.push_out_pages()
        self._enter(MigrationPhase.FROZEN)
        self._frozen_at = trio.current_time()
        self._freeze_ends_at = deadline = self._frozen_at + self._parameters.freeze_deadline_s
        for disk in self._disks:
            disk.disk.set_gate(Gate.CLOSED)
        with trio.move_on_at(deadline) as scope:
            for disk in self._disks:
                left = max(0.0, deadline - trio.current_time())
                if not await self._offload(disk.disk.wait_drained, left):
                    raise MigrationError(
                        f"a write to disk '{disk.disk.name}' did not finish before the freeze deadline"
                    )
            async with trio.open_nursery() as nursery:
                for disk in self._disks:
                    nursery.start_soon(self._guard, self._flush, disk)
                nursery.start_soon(self._guard, self._last_pass, link)
            if not all(disk.tracking.is_clean for disk in self._disks):
                raise MigrationError("blocks were dirtied behind the closed gate: this is a bug, please report it")
            self._count_dirtied(trio.current_time())
        if scope.cancelled_caught:
            raise self._freeze_deadline_error()

    async def _last_pass(self, link: NativeLink) -> None:
        await self._run_pass(link, is_limited=False)

    async def _flush(self, disk: OutgoingDisk) -> None:
        await self._offload(disk.disk.flush)

    def _freeze_deadline_error(self) -> MigrationError:
        return MigrationError(
            f"the switchover took longer than the freeze deadline of {self._parameters.freeze_deadline_s:g} s; "
            "the guests run on here: migrate again, with a lower --downtime-limit or at a quieter time"
        )

    async def _hand_off(self, link: NativeLink) -> None:
        """Run the two-phase commit; it is shielded from the moment when it cannot be called off."""
        digests = {disk.disk.name: disk.digest.value for disk in self._disks}
        with trio.move_on_at(self._freeze_ends_at) as scope:
            await self._handoff.prove(link, digests)
        if scope.cancelled_caught:
            raise self._freeze_deadline_error()
        if self._is_cancel_requested:  # granted while PREPARED was on its way to this task
            raise self._cancelled_error()
        with trio.CancelScope(shield=True):
            await self._handoff.commit(link, lambda: self._enter(MigrationPhase.COMMITTED))
            self._taken_at = trio.current_time()
            self._thaw()  # answers the parked writes: EROFS
            await self._handoff.release(link)

    def _reason(self, exc: BaseException) -> str:
        if self._is_cancel_requested:
            return "cancelled at the source"
        error = self._failure or exc
        return str(error) if isinstance(error, FusemigError) else "the source stopped"

    # Statistics

    def statistics(self) -> MigrationStatistics:
        """Return what is known at this moment."""
        now = trio.current_time()
        end = self._ended_at or now
        pending, sender = self._pending_bytes(), self._sender
        return MigrationStatistics(
            phase=self._machine.phase,
            session=self.session,
            peer=self._peer,
            pass_number=self._pass_number,
            disks=tuple(
                DiskStatistics(
                    name=disk.disk.name,
                    size=disk.disk.size,
                    allocated_bytes=disk.allocated_bytes,
                    dirty_bytes=disk.tracking.dirty_bytes,
                    dirty_chunks=disk.tracking.dirty_chunks,
                    in_flight_chunks=disk.tracking.in_flight_chunks,
                    sent_bytes=disk.sent_bytes,
                    parked_writes=disk.disk.parked_writes,
                    digest=disk.digest.value,
                )
                for disk in self._disks
            ),
            window=WindowStatistics(
                submitted=int(sender.is_reading),
                read_done=sender.n_read_done,
                in_flight=len(sender.unacknowledged) - sender.n_read_done,
                transferred=sender.n_transferred,
            ),
            pending_bytes=pending,
            wire_bytes=sender.wire_bytes,
            dirtied_bytes=self._dirtied_bytes,
            bandwidth=self._bandwidth.per_second,
            send_rate=self._send_rate.per_second(now),
            dirty_rate=self._dirty_rate.per_second(now),
            expected_downtime_s=self._convergence.forecast(pending, self._bandwidth.per_second).expected_downtime_s,
            setup_s=(self._set_up_at or end) - self._started_at,
            total_s=end - self._started_at,
            downtime_s=self._taken_at - self._frozen_at if self._taken_at and self._frozen_at else None,
            passes_without_progress=self._convergence.n_passes_without_progress,
            error=None if self.error is None else str(self.error),
            error_kind=None if self.error is None else self.error.kind,
        )
