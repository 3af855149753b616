"""OutgoingMigration: what sending disks away is, whatever the wire.

    run ── connect, tracking on, find allocated chunks                       SETUP
         ├ passes, until what is left is expected to fit the downtime limit  BULK, DIRTY
         ├ (wait for `proceed`, with passes going on)                        PRE_SWITCHOVER
         ├ (bring the guest to a standstill, with passes going on)           `Switchover`
         ├ gate closed, drained, synced; last pass                           FROZEN
         └ hand-off, as far as the wire knows one                            COMMITTED, COMPLETED

Every way out before COMMITTED opens the gates again, however it is taken: an error, `cancel`, the daemon's end; but a
migration that is PLEDGED to its group only ends when that is decided. From COMMITTED on nothing opens a gate.

What the steps work on are objects of their own: the disks (`DiskGroup`), what is known of the link (`Meter`), what
guests are held back by (`Pacer`), what comes after a pass (`Iteration`). Here is their order, and what every way out
must do. Tasks share this object's fields; each is written by one task only, between two awaits (docs/architecture.md).
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Final, Protocol

import structlog
import trio

from fusemig.core.convergence import Convergence
from fusemig.core.phase import SENDING, MigrationPhase, PhaseMachine
from fusemig.errors import CancelledByUserError, FusemigError, InDoubtError, MigrationError, StateError
from fusemig.migration.disk_group import DiskGroup
from fusemig.migration.guest import NoGuest
from fusemig.migration.iteration import Iteration, NextStep
from fusemig.migration.meter import Meter
from fusemig.migration.outlook import Outlook
from fusemig.migration.pacer import Pacer
from fusemig.migration.stats import MigrationStatistics
from fusemig.migration.switchover import Switchover

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

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
        self.is_stand_in = False
        """Whether it does not run here: another daemon ran it, and what has become of it is shown."""
        self.elapsed_before_s = 0.0
        """How long the daemons before this one ran it; set before `run`."""
        self._handoff: Handoff
        self._connect = connect
        self._parameters = parameters
        self._offload = offload
        self._on_phase = on_phase
        self._on_pass = on_pass
        self._machine = PhaseMachine()
        self._disks = DiskGroup(disks, offload)
        self._meter = Meter()
        self._convergence = Convergence()
        self._outlook = Outlook(parameters)
        self._peer = ""
        self._log = log.bind(migration=self.session[:8])
        # The whole run:
        self._scope = trio.CancelScope()
        self._is_cancel_requested = False
        self._proceed = trio.Event()
        self._over = trio.Event()
        self._pass_number = 0
        self._pacer = Pacer(
            parameters, lambda: self._disks.tracked, lambda: self._meter.bandwidth, on_pace, can_mirror=self.can_mirror
        )
        self._switchover = Switchover(self._disks, self._pacer, parameters)
        self.started_at = self._ended_at = 0.0  # trio's clock

    # What a wire does in its own way

    @abstractmethod
    async def _migrate(self) -> None:
        """Connect, start tracking, send everything (`_send_all`) and hand off."""

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
        return self._disks.tracking_of(disk)

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
        self.is_stand_in = True
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
        self._disks.stop_tracking()

    def settle(self, *, is_handed_off: bool) -> None:
        """End a migration that is in doubt: its disks are known to be the destination's, or are ours again."""
        self.forget()
        if is_handed_off:
            self._switchover.note_taken()
            self._ended_at = trio.current_time()
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
            self._check_not_cancelled()
        except BaseException:
            self._thaw()
            await self.guest.fall_back()
            raise

    def _check_not_cancelled(self) -> None:
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
            self._disks.end_writing()
            self._pacer.release()
            return
        self._disks.thaw()
        self._pacer.release()
        self._give_up_in_flight()

    def _give_up_in_flight(self) -> None:
        """Nobody will say any more whether it arrived."""
        self._disks.give_up_in_flight()

    def _enter(self, phase: MigrationPhase) -> None:
        self._machine.enter(phase)
        self._log.info("migration phase", phase=phase.value, pass_number=self._pass_number)
        self._on_phase(phase)

    async def _send_all(self) -> None:
        """Make the destination hold every byte: passes, and the last one behind the closed gate."""
        await self._converge()
        if self.guest.is_moving:
            await self._switchover.bring_to_standstill(self.guest, self._keep_up)
            await trio.lowlevel.checkpoint_if_cancelled()
        await self._freeze()

    async def _converge(self) -> None:
        """Make passes until a switchover is worth it and allowed."""
        if self._machine.phase is MigrationPhase.SETUP:  # else the connection was lost, and is back
            self._enter(MigrationPhase.BULK)
        iteration = Iteration(self._convergence, self._pacer, self._parameters, is_grouped=bool(self.group))
        while True:
            before_bytes, began_at = self._pending_bytes(), trio.current_time()
            if not self._is_postcopy():
                self._pacer.begin_pass(before_bytes)
                await self._make_pass(is_limited=True)
            if self._is_postcopy():
                await self._disks.flush()  # so that the sync of the freeze is short
                return
            if self._machine.phase is MigrationPhase.BULK:
                self._enter(MigrationPhase.DIRTY)
            forecast = self._convergence.forecast(self._pending_bytes(), self._meter.bandwidth)
            took_s = trio.current_time() - began_at
            match iteration.after_pass(before_bytes, took_s, forecast, may_switch_over=self._proceed.is_set()):
                case NextStep.SYNC:
                    with self._pacer.suspended():
                        await self._sync_ahead()
                case NextStep.WAIT:
                    if self._machine.phase is not MigrationPhase.PRE_SWITCHOVER:
                        self._enter(MigrationPhase.PRE_SWITCHOVER)
                    await self._pacer.pause(TICK_S, self._proceed)
                case NextStep.SWITCH_OVER:
                    return

    async def _keep_up(self, until: trio.Event) -> None:
        """Make passes until something has happened, so that little is left to be sent then."""
        while not until.is_set():
            await self._make_pass(is_limited=True)
            await self._pacer.pause(TICK_S, until)

    def _is_postcopy(self) -> bool:
        """Whether the hand-off is to come at once; may become so at any moment."""
        return self._parameters.is_postcopy

    async def _make_pass(self, *, is_limited: bool) -> None:
        self._pass_number += 1
        self._outlook.begin_pass(trio.current_time())
        self._on_pass(self._pass_number)
        await self._run_pass(is_limited=is_limited)

    @property
    def _shortening_lag(self) -> MirrorLag | None:
        """How far behind the destination may be while mirroring makes the freeze shorter; None: nothing does."""
        may_shorten = self._parameters.auto_mirror and self.can_mirror and not self.group
        return self._parameters.mirror_lag if may_shorten else None

    def _pending_bytes(self) -> int:
        return self._disks.pending_bytes

    def _count_dirtied(self, now: float) -> None:
        self._meter.count_dirtied(
            now,
            pending_bytes=self._pending_bytes(),
            arrived_bytes=self._acknowledged_bytes,
            allocated_bytes=self._disks.allocated_bytes,
        )

    async def _freeze(self) -> None:
        """Close the gates, drain, sync and send the rest."""
        await self._switchover.push_out_pages(self._keep_up)
        await trio.lowlevel.checkpoint_if_cancelled()
        self._enter(MigrationPhase.FROZEN)
        self._switchover.begin()
        await self._switchover.finish_sending(partial(self._make_pass, is_limited=False))
        if not self._is_postcopy() and not self._disks.is_clean:
            raise MigrationError("blocks were dirtied behind the closed gate: this is a bug, please report it")
        self._count_dirtied(trio.current_time())

    # Statistics

    def statistics(self) -> MigrationStatistics:
        """Return what is known at this moment."""
        now = trio.current_time()
        end = self._ended_at or now
        pending = self._pending_bytes()
        prediction = None
        if self._machine.phase in SENDING and not self._is_postcopy():
            is_bulk = self._machine.phase is MigrationPhase.BULK
            send_rate = self._meter.send_rate(now) if is_bulk else 0.0
            prediction = self._outlook.look(
                now, self._disks.tracked, pending, self._meter.bandwidth, send_rate, self._shortening_lag
            )
        return MigrationStatistics(
            phase=self._machine.phase,
            session=self.session,
            peer=self._peer,
            pass_number=self._pass_number,
            disks=self._disks.statistics(),
            window=self._window(),
            pending_bytes=pending,
            wire_bytes=self._wire_bytes,
            dirtied_bytes=self._meter.dirtied_bytes,
            bandwidth=self._meter.bandwidth,
            send_rate=self._meter.send_rate(now),
            dirty_rate=self._meter.dirty_rate(now),
            expected_downtime_s=self._convergence.forecast(pending, self._meter.bandwidth).expected_downtime_s
            if prediction is None
            else prediction.downtime_s,
            prediction=prediction,
            setup_s=(self._disks.found_at or end) - self.started_at,
            total_s=end - self.started_at,
            frozen_s=self._switchover.frozen_s(end),
            downtime_s=self._switchover.downtime_s,
            pacing=self._pacer.statistics(),
            passes_without_progress=self._convergence.n_passes_without_progress,
            is_postcopy=self._is_postcopy(),
            error=None if self.error is None else str(self.error),
            error_kind=None if self.error is None else self.error.kind,
        )
