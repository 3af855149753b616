"""OutgoingMigration: what sending disks away is, whatever the wire.

    run ── connect, tracking on, find allocated chunks                       SETUP
         ├ passes, until what is left is expected to fit the downtime limit  BULK, DIRTY
         ├ (wait for `proceed`, with passes going on)                        PRE_SWITCHOVER
         ├ (bring the guest to a standstill, with passes going on)
         ├ gate closed, drained, synced; last pass                           FROZEN
         └ hand-off, as far as the wire knows one                            COMMITTED, COMPLETED

Every way out before COMMITTED opens the gates again, however it is taken: an error, `cancel`, the daemon's end; but a
migration that is PLEDGED to its group only ends when that is decided. From COMMITTED on nothing opens a gate.

Tasks share this object's fields; each is written by one task only, between two awaits (see docs/architecture.md).
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar, Final, Protocol

import structlog
import trio

from fusemig.core.convergence import LONG_FREEZE_S, Convergence, Decision, Rate, RateLimit, Throughput
from fusemig.core.phase import MigrationPhase, PhaseMachine
from fusemig.disk.tracked import Gate
from fusemig.errors import CancelledByUserError, DiskError, FusemigError, InDoubtError, MigrationError, StateError
from fusemig.migration.guest import NoGuest
from fusemig.migration.outlook import Outlook
from fusemig.migration.pacer import Pacer
from fusemig.migration.reader import OutgoingDisk
from fusemig.migration.stats import DiskStatistics, MigrationStatistics

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Sequence

    from fusemig.core.mirror import Reach
    from fusemig.core.shaping import MirrorLag
    from fusemig.disk.tracked import TrackedDisk
    from fusemig.disk.tracking import Tracking
    from fusemig.migration.commit import SourceDisk
    from fusemig.migration.guest import MovingGuest
    from fusemig.migration.link import Offload
    from fusemig.migration.stats import MigrationParameters, WindowStatistics
    from fusemig.net.transport import ByteStream

log = structlog.get_logger(__name__)

TICK_S: Final = 0.1
_SENDING: Final = (MigrationPhase.BULK, MigrationPhase.DIRTY, MigrationPhase.PRE_SWITCHOVER)


class Handoff(Protocol):
    """What the run must know of the hand-off of its disks."""

    @property
    def may_thaw(self) -> bool:
        """Whether the source may let guests write again."""

    @property
    def is_committing(self) -> bool:
        """Whether nothing stands between here and the commit."""


class OutgoingMigration(ABC):
    """One outgoing migration, from `run` to its end; made anew for the next."""

    wire: ClassVar[str]
    """The name of the stream format."""
    can_mirror: ClassVar[bool] = False
    """Whether what was sent is acknowledged, so that a guest's write can wait for it."""

    def __init__(
        self,
        disks: Sequence[SourceDisk],
        connect: Callable[[], Awaitable[ByteStream]],
        parameters: MigrationParameters,
        offload: Offload,
        on_phase: Callable[[MigrationPhase], None] = lambda _phase: None,
        on_pass: Callable[[int], None] = lambda _number: None,
        on_pace: Callable[[Reach, int], None] = lambda _reach, _percent: None,
    ) -> None:
        """Prepare to move ``disks`` as one group.

        Args:
            disks: in the order of the bulk phase.
            connect: makes the connection to the destination.
            parameters: may be changed by the caller while `run` runs.
            offload: runs calls that may sleep.
            on_phase: called at once at each change of phase.
            on_pass: called at the start of each pass with its number, from 1.
            on_pace: called when other chunks are mirrored, or guests are throttled by another per cent.
        """
        self.session = uuid.uuid4().hex
        self.error: FusemigError | None = None
        self.guest: MovingGuest = NoGuest()
        """The guest that moves with the disks; set before `run`."""
        self.group = ""
        """What decides of these disks together with those of other daemons (`records.decision`); "": nothing does."""
        self.elapsed_before_s = 0.0
        """How long the daemons before this one ran it; set before `run`."""
        self._handoff: Handoff
        self._lent = disks
        self._connect = connect
        self._parameters = parameters
        self._offload = offload
        self._on_phase = on_phase
        self._on_pass = on_pass
        self._machine = PhaseMachine()
        self._disks: list[OutgoingDisk] = []
        self._limit = RateLimit(0)
        self._convergence = Convergence()
        self._outlook = Outlook(parameters)
        self._peer = ""
        self._log = log.bind(migration=self.session[:8])
        # The whole run, and why a background task ended it:
        self._scope = trio.CancelScope()
        self._is_cancel_requested = False
        self._failure: FusemigError | None = None
        self._proceed = trio.Event()
        self._over = trio.Event()
        # Clocks and rates:
        self._pass_number = 0
        self._bandwidth = Throughput()
        self._busy_since = 0.0
        self._send_rate = Rate()
        self._dirty_rate = Rate()
        self._dirtied_bytes = 0
        self._pacer = Pacer(
            parameters, lambda: self._disks, lambda: self._bandwidth.per_second, on_pace, can_mirror=self.can_mirror
        )
        self.started_at = self._ended_at = 0.0  # trio's clock
        self._set_up_at: float | None = None
        self._frozen_at: float | None = None
        self._freeze_ends_at = 0.0
        self._taken_at: float | None = None

    # What a wire does in its own way

    @abstractmethod
    async def _migrate(self) -> None:
        """Connect, start tracking (`_start_tracking`), send everything (`_send_all`) and hand off."""

    @abstractmethod
    async def _run_pass(self, *, is_limited: bool) -> None:
        """Send everything that is dirty once."""

    @abstractmethod
    async def _sync_ahead(self) -> None:
        """Make the stores durable while the guests still run, so that the syncs of the freeze are short."""

    @property
    @abstractmethod
    def _wire_bytes(self) -> int:
        """Bytes handed to the stream, headers included."""

    @property
    @abstractmethod
    def _acknowledged_bytes(self) -> int:
        """Disk bytes that need not be sent again."""

    @abstractmethod
    def _window(self) -> WindowStatistics:
        """Return what is on its way."""

    # What the daemon may do while it runs

    @property
    def phase(self) -> MigrationPhase:
        """Where it is."""
        return self._machine.phase

    @property
    def may_thaw(self) -> bool:
        """Whether the disks are still the source's to write."""
        return self._handoff.may_thaw

    @property
    def is_over(self) -> bool:
        """Whether it has ended; it may be in doubt then."""
        return self._machine.is_over

    def tracking_of(self, disk: TrackedDisk) -> Tracking | None:
        """Return the tracking of a disk that moves, as it is or was last; None where there is none."""
        return next((one.tracking for one in self._disks if one.disk is disk), None)

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
        self._pacer.release()  # now: a task that cannot be cancelled may wait for a guest's write
        self._scope.cancel()

    def proceed(self) -> None:
        """Let a migration that waits at pre-switchover go on.

        Raises:
            StateError: it does not wait there.
        """
        if self._machine.phase is not MigrationPhase.PRE_SWITCHOVER:
            raise StateError(f"Migration not in expected state: {self._machine.phase.value}")
        self.allow_switchover()

    @property
    def may_switch_over(self) -> bool:
        """Whether somebody has let it go on from pre-switchover, or beforehand."""
        return self._proceed.is_set()

    def allow_switchover(self) -> None:
        """Have it not wait at pre-switchover."""
        self._proceed.set()

    def stand_for(self, phase: MigrationPhase, error: FusemigError | None) -> None:
        """Be what has become of a migration that another daemon ran and that does not go on here; instead of `run`."""
        self.started_at = trio.current_time() - self.elapsed_before_s
        self.error = error
        self._enter(phase)
        if self.is_over:
            self._ended_at = trio.current_time()
        self._over.set()

    async def wind_down(self) -> None:
        """Call the migration off if that is still possible, and wait for its end; for the daemon's own end."""
        with suppress(StateError):  # committed or over: it ends by itself, within its deadlines
            self.cancel()
        await self._over.wait()

    async def wait_over(self) -> None:
        """Wait until it has ended; the outcome is in `phase` and `error`."""
        await self._over.wait()

    def forget(self) -> None:
        """Stop tracking for a resumption that will not come; after `run` has ended."""
        for disk in self._disks:
            disk.tracking.stop()

    def settle(self, *, is_handed_off: bool) -> None:
        """End a migration that is in doubt: its disks are known to be the destination's, or are ours again."""
        self.forget()
        if is_handed_off:
            self._taken_at = self._ended_at = trio.current_time()
        self.error = None if is_handed_off else MigrationError("the hand-off was called off; the disks stay here")
        self._enter(MigrationPhase.COMPLETED if is_handed_off else MigrationPhase.FAILED)

    # The run

    async def run(self) -> None:
        """Migrate; returns when it is over, with the outcome in `phase` and `error`.

        Cancellation: before the commit the gates are open again when this returns; from the commit on it is shielded
        until TAKEN came or its deadline passed.
        """
        self.started_at = trio.current_time() - self.elapsed_before_s
        self._enter(MigrationPhase.SETUP)
        try:
            await self._migrate_with_guest()
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

    async def _migrate_with_guest(self) -> None:
        try:
            with self._scope:
                await self.guest.prepare()
                await self._migrate()
            self._raise_outcome()
        except BaseException:
            self._thaw()
            await self.guest.fall_back()
            raise

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
            self._pacer.release()
            return
        for lent in self._lent:
            if lent.disk.gate is Gate.CLOSED:
                lent.disk.set_gate(Gate.OPEN)
        self._pacer.release()
        self._give_up_in_flight()

    def _give_up_in_flight(self) -> None:
        """Nobody will say any more whether it arrived."""
        for disk in self._disks:
            disk.tracking.restore_all()

    def _enter(self, phase: MigrationPhase) -> None:
        self._machine.enter(phase)
        self._log.info("migration phase", phase=phase.value, pass_number=self._pass_number)
        self._on_phase(phase)

    async def _start_tracking(self, thin: Collection[int] = ()) -> None:
        """Track every disk and find what is to be sent; of those whose place is in ``thin``, what is not their base."""
        for index, lent in enumerate(self._lent):
            self._disks.append(OutgoingDisk(index, lent.disk, lent.disk.start_tracking()))
            self._disks[-1].is_thin = index in thin
        for disk in self._disks:
            try:
                await self._offload(disk.find_allocated)
            except DiskError as exc:
                raise MigrationError(f"{exc}; the disk stays here: mend its image, then migrate again") from exc
        self._set_up_at = trio.current_time()

    async def _send_all(self) -> None:
        """Make the destination hold every byte: passes, and the last one behind the closed gate."""
        await self._converge()
        if self.guest.is_moving:
            await self._stand_still()
        await self._freeze()

    async def _guard(self, task: Callable[..., Awaitable[None]], *args: object) -> None:
        """Run a task of a nursery; its failure ends the migration with this error rather than with a group of them."""
        try:
            await task(*args)
        except FusemigError as exc:
            if self._failure is None:
                self._failure = exc
            self._pacer.release()
            self._scope.cancel()

    async def _converge(self) -> None:
        """Make passes until a switchover is worth it and allowed."""
        if self._machine.phase is MigrationPhase.SETUP:  # else the connection was lost, and is back
            self._enter(MigrationPhase.BULK)
        is_synced = is_mirrored_anew = False
        while True:
            before_bytes, began_at = self._pending_bytes(), trio.current_time()
            if not self._is_postcopy():
                self._pacer.begin_pass(before_bytes)
                await self._run_pass(is_limited=True)
            if self._is_postcopy():
                for disk in self._disks:  # so that the sync of the freeze is short
                    await self._flush(disk)
                return
            if self._machine.phase is MigrationPhase.BULK:
                self._enter(MigrationPhase.DIRTY)
            forecast = self._convergence.forecast(self._pending_bytes(), self._bandwidth.per_second)
            took_s = trio.current_time() - began_at
            decision = self._convergence.after_pass(before_bytes, took_s, forecast, self._parameters.downtime_limit_s)
            is_over_limit = forecast.expected_downtime_s > self._parameters.downtime_limit_s
            self._pacer.end_pass(forecast.pending_bytes, is_over_limit=is_over_limit)
            # From `migrate-continue` on the guests of a group's other daemons wait for these disks, too.
            is_urgent = bool(self.group) and self._proceed.is_set()
            if decision is Decision.CONTINUE and (is_over_limit or not is_urgent):
                continue
            if not is_synced:
                # Make both stores durable while the guest still runs, so that the syncs of the freeze are short.
                is_synced = True
                with self._pacer.suspended():
                    await self._sync_ahead()
                continue
            is_waiting = self._parameters.pause_before_switchover and not self._proceed.is_set()
            if is_mirrored_anew:  # the destination has the chunks now; in the next pass guests wait for them
                is_mirrored_anew = False
                continue
            if forecast.expected_downtime_s > LONG_FREEZE_S and not is_waiting and not self.group:
                is_mirrored_anew = self._pacer.shorten_freeze()
                if is_mirrored_anew:
                    continue
            if is_waiting:
                if self._machine.phase is not MigrationPhase.PRE_SWITCHOVER:
                    self._enter(MigrationPhase.PRE_SWITCHOVER)
                await self._pacer.pause(TICK_S, self._proceed)
                continue
            return

    async def _stand_still(self) -> None:
        """Bring the guest to a standstill; passes go on, so that little is left to be sent then."""
        is_still = trio.Event()
        passes = trio.CancelScope()

        async def bring() -> None:
            await self.guest.bring_to_standstill()
            passes.deadline = trio.current_time() + self._parameters.freeze_deadline_s
            is_still.set()

        async def keep_up() -> None:
            with passes:
                await self._keep_up(is_still)
            if passes.cancelled_caught:
                raise self._freeze_deadline_error()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._guard, bring)
            nursery.start_soon(self._guard, keep_up)
        await trio.lowlevel.checkpoint_if_cancelled()

    async def _keep_up(self, until: trio.Event) -> None:
        while not until.is_set():
            await self._run_pass(is_limited=True)
            await self._pacer.pause(TICK_S, until)

    async def _push_out_pages(self) -> None:
        """Have the kernel write what guests stored through mmap; it may have to wait for passes to make room."""
        is_out = trio.Event()

        async def push() -> None:
            for lent in self._lent:
                await lent.push_out_pages()
            is_out.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._guard, push)
            if self._pacer.is_mirroring:
                nursery.start_soon(self._guard, self._keep_up, is_out)
        await trio.lowlevel.checkpoint_if_cancelled()

    def _is_postcopy(self) -> bool:
        """Whether the hand-off is to come at once; may become so at any moment."""
        return self._parameters.is_postcopy

    def _begin_pass(self) -> None:
        self._pass_number += 1
        self._outlook.begin_pass(trio.current_time())
        self._on_pass(self._pass_number)

    @property
    def _shortening_lag(self) -> MirrorLag | None:
        """How far behind the destination may be while mirroring makes the freeze shorter; None: nothing does."""
        may_shorten = self._parameters.auto_mirror and self.can_mirror and not self.group
        return self._parameters.mirror_lag if may_shorten else None

    def _pending_bytes(self) -> int:
        return sum(disk.tracking.pending_bytes for disk in self._disks)

    def _count_dirtied(self, now: float) -> None:
        """Derive what guests dirtied from what is left: all that was ever to be sent, less what there was to begin."""
        allocated = sum(disk.allocated_bytes for disk in self._disks)
        dirtied = max(self._dirtied_bytes, self._pending_bytes() + self._acknowledged_bytes - allocated)
        self._dirty_rate.add(dirtied - self._dirtied_bytes, now)
        self._dirtied_bytes = dirtied

    # Switchover

    async def _freeze(self) -> None:
        """Close the gates, drain, sync and send the rest."""
        await self._push_out_pages()
        self._enter(MigrationPhase.FROZEN)
        self._frozen_at = trio.current_time()
        self._freeze_ends_at = deadline = self._frozen_at + self._parameters.freeze_deadline_s
        for disk in self._disks:
            disk.disk.set_gate(Gate.CLOSED)
        self._pacer.freeze()
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
                nursery.start_soon(self._guard, self._last_pass)
            if not self._is_postcopy() and not all(disk.tracking.is_clean for disk in self._disks):
                raise MigrationError("blocks were dirtied behind the closed gate: this is a bug, please report it")
            self._count_dirtied(trio.current_time())
        if scope.cancelled_caught:
            raise self._freeze_deadline_error()

    async def _last_pass(self) -> None:
        await self._run_pass(is_limited=False)

    async def _flush(self, disk: OutgoingDisk) -> None:
        """Make a disk durable.

        Raises:
            MigrationError: its store failed, and what it holds is not to be trusted; it stays here.
        """
        try:
            await self._offload(disk.disk.flush)
        except DiskError as exc:
            raise self._untrusted_error(exc) from exc

    def _check_stores(self) -> None:
        """Raise `MigrationError` if a guest's own sync failed since ours: such a disk is not handed over."""
        for disk in self._disks:
            if disk.disk.io_error is not None:
                raise self._untrusted_error(disk.disk.io_error)

    def _untrusted_error(self, error: DiskError) -> MigrationError:
        return MigrationError(
            f"{error}; what was written last may be lost, so the disk is not moved: stop its guest, check the image "
            "and its store, then serve it anew"
        )

    def _freeze_deadline_error(self) -> MigrationError:
        return MigrationError(
            f"the switchover took longer than the freeze deadline of {self._parameters.freeze_deadline_s:g} s; "
            "the guests run on here: migrate again, with a lower --downtime-limit or at a quieter time"
        )

    # Statistics

    def statistics(self) -> MigrationStatistics:
        """Return what is known at this moment."""
        now = trio.current_time()
        end = self._ended_at or now
        pending = self._pending_bytes()
        prediction = None
        if self._machine.phase in _SENDING and not self._is_postcopy():
            is_bulk = self._machine.phase is MigrationPhase.BULK
            send_rate = self._send_rate.per_second(now) if is_bulk else 0.0
            prediction = self._outlook.look(
                now, self._disks, pending, self._bandwidth.per_second, send_rate, self._shortening_lag
            )
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
            window=self._window(),
            pending_bytes=pending,
            wire_bytes=self._wire_bytes,
            dirtied_bytes=self._dirtied_bytes,
            bandwidth=self._bandwidth.per_second,
            send_rate=self._send_rate.per_second(now),
            dirty_rate=self._dirty_rate.per_second(now),
            expected_downtime_s=self._convergence.forecast(pending, self._bandwidth.per_second).expected_downtime_s
            if prediction is None
            else prediction.downtime_s,
            prediction=prediction,
            setup_s=(self._set_up_at or end) - self.started_at,
            total_s=end - self.started_at,
            frozen_s=0.0 if self._frozen_at is None else (self._taken_at or end) - self._frozen_at,
            downtime_s=self._taken_at - self._frozen_at if self._taken_at and self._frozen_at else None,
            pacing=self._pacer.statistics(),
            passes_without_progress=self._convergence.n_passes_without_progress,
            is_postcopy=self._is_postcopy(),
            error=None if self.error is None else str(self.error),
            error_kind=None if self.error is None else self.error.kind,
        )
