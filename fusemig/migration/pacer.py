"""Pacer: mirrors the disks of an outgoing migration and slows their guests down, as wanted and as far as needed.

What is wanted comes from the user (mode ``mirror``) or from how the passes go (`fusemig.core.shaping`); what is done
about it is the disks' (`fusemig.disk.pacing`). Here is what needs a clock:

    begin_pass, end_pass    judge a pass, and take the next step if it did not help
    shorten_freeze          mirror what is hot, or everything, for the passes before a switchover that would take long
    run                     follow a change of mode, size the window, refill the throttle's bucket, keep the deadlines
    pause                   wait between passes, no longer than guests' writes do not wait for one (but for their rate)

Deadlines. A write waits for its turn, or its reply for the destination, at most `HOLD_DEADLINE_S`. When something waits
for the destination and that acknowledged nothing for `SILENCE_S`, everything goes on at once and is only tracked, as in
a plain pass (a *fallback*); mirroring begins again with the acknowledgements. `release` ends it all, in any state.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import structlog
import trio

from fusemig.core.convergence import Rate
from fusemig.core.mirror import Reach
from fusemig.core.shaping import Escalation, Stall, limits
from fusemig.migration.stats import PacingStatistics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fusemig.migration.reader import OutgoingDisk
    from fusemig.migration.stats import MigrationParameters

HOLD_DEADLINE_S: Final = 5.0
"""Longest time that a write waits for its turn, or a reply for the destination (as long as a freeze may last)."""
SILENCE_S: Final = 2.0
"""Without an acknowledgement for so long, nothing waits for one."""
REST_S: Final = 1.0
"""How long mirroring rests at least after a fallback."""
TICK_S: Final = 0.1
THROTTLED_TICK_S: Final = 0.01
"""How often throttled writes get their turns: about as long as each of them is late."""
BANDWIDTH_DECAY: Final = 0.998
"""For each tick: small passes seem slow, as a round trip is most of them, so the best of about half a minute counts."""
UNDER_WAY_S: Final = 0.05
"""How much of the link's time may be sent and not acknowledged while writes wait behind it."""
MIN_UNDER_WAY: Final = 2 << 20
MAX_UNDER_WAY: Final = 64 << 20

log = structlog.get_logger(__name__)


class Pacer:
    """What one migration does to its guests."""

    def __init__(
        self,
        parameters: MigrationParameters,
        disks: Callable[[], Sequence[OutgoingDisk]],
        measure_bandwidth: Callable[[], float],
        on_change: Callable[[Reach, int], None],
        *,
        can_mirror: bool,
    ) -> None:
        """Do nothing yet.

        Args:
            parameters: may be changed while the migration runs.
            disks: the disks that are tracked now.
            measure_bandwidth: tells what the link carries, in bytes per second.
            on_change: hears which chunks are mirrored and by how many per cent guests are throttled.
            can_mirror: whether the wire acknowledges.
        """
        self._parameters = parameters
        self._disks = disks
        self._measure_bandwidth = measure_bandwidth
        self._on_change = on_change
        self._can_mirror = can_mirror
        self._stall = Stall()
        self._escalation = Escalation()
        self._reach = Reach.NONE
        """What is mirrored now."""
        self._percent = 0
        """By how much guests are throttled now."""
        self._is_suspended = self._is_frozen = False
        self._is_running = False
        self._fell_back_at: float | None = None
        self._acknowledged_at = 0.0
        self._bandwidth = 0.0
        self._window_bytes = 0
        self._written: list[Rate] = []
        self._counted: list[int] = []
        self._unthrottled: list[float] = []
        """Bytes per second that guests wrote to each disk before they were throttled."""
        self._pass_began_at = 0.0
        self._pass_bytes = 0
        self._work = trio.Event()
        self._token: trio.lowlevel.TrioToken | None = None
        self._n_fallbacks = 0
        self._told = Reach.NONE, 0

    @property
    def is_mirroring(self) -> bool:
        """Whether guests' writes may wait for what is sent."""
        return self._reach is not Reach.NONE

    @property
    def under_way_bytes(self) -> int:
        """How many bytes should be under way at most, because mirrored writes go behind them."""
        return int(max(MIN_UNDER_WAY, min(self._bandwidth * UNDER_WAY_S, MAX_UNDER_WAY)))

    # Passes

    def begin_pass(self, pending_bytes: int) -> None:
        """A pass begins, with so much to send."""
        self._pass_began_at, self._pass_bytes = trio.current_time(), pending_bytes
        self._follow(self._pass_began_at)
        if self.is_mirroring:
            self._size_window()

    def end_pass(self, pending_bytes: int, *, is_over_limit: bool) -> None:
        """A pass has ended, and left so much; it is over the limit if a switchover would take too long."""
        took_s = trio.current_time() - self._pass_began_at
        if not self._stall.after_pass(self._pass_bytes, pending_bytes, took_s, is_over_limit=is_over_limit):
            return
        escalation = self._escalation
        if escalation.step(
            pending_bytes / took_s,
            self._link_rate,
            throttle_max=self._parameters.throttle_max,
            may_mirror=self._may_mirror,
            is_mirroring=self._is_mirror_wanted,
        ):
            log.info("passes do not help", mirror=escalation.reach.value, throttle_percent=escalation.throttle_percent)
            self._throttle(trio.current_time())

    def shorten_freeze(self) -> bool:
        """Mirror more from the next pass on; return whether there was more, so that the pass is worth making."""
        if not self._escalation.shorten(may_mirror=self._may_mirror, is_mirroring=self._is_mirror_wanted):
            return False
        log.info("mirroring to make the freeze shorter", mirror=self._escalation.reach.value)
        return True

    async def pause(self, timeout_s: float, event: trio.Event) -> None:
        """Wait for an event, for ``timeout_s`` seconds, or until a guest's write waits for a pass."""

        async def wait_for_event() -> None:
            await event.wait()
            nursery.cancel_scope.cancel()

        async def wait_for_work() -> None:
            self._work = trio.Event()
            while not self._is_pass_awaited:
                await self._work.wait()
                self._work = trio.Event()
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.cancel_scope.deadline = trio.current_time() + timeout_s
            nursery.start_soon(wait_for_event)
            nursery.start_soon(wait_for_work)

    # What happens beside the passes

    def start(self) -> None:
        """There is a connection; `run` is about to run."""
        self._token = trio.lowlevel.current_trio_token()
        self._acknowledged_at = trio.current_time()
        self._is_running = True
        self._throttle(self._acknowledged_at)  # as it was before the connection was lost

    async def run(self) -> None:
        """Keep the deadlines and follow the parameters, for as long as there is a connection."""
        while True:
            self._tick(trio.current_time())
            await trio.sleep(THROTTLED_TICK_S if self._percent else TICK_S)

    def note_acknowledged(self, now: float) -> None:
        """The destination acknowledged something."""
        self._acknowledged_at = now

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Have no write wait for the destination while it is busy with something else."""
        self._is_suspended = True
        self._follow(trio.current_time())
        try:
            yield
        finally:
            self._is_suspended = False

    def freeze(self) -> None:
        """The gates are closed: what waits for its turn is parked there; replies are held until the last pass is done.

        Nothing is mirrored or throttled anew until `release`.
        """
        self._is_frozen = True
        for disk in self._disks():
            disk.tracking.pacing.open_window()

    def release(self) -> None:
        """Hold nothing back, until `start`: the migration or its connection has ended; idempotent."""
        self._is_frozen = self._is_running = False
        self._escalation.end_shortening()
        self._let_go()
        self._tell()

    # Inner

    @property
    def _is_pass_awaited(self) -> bool:
        """Whether guests wait until something is sent; for a rate alone only time helps."""
        return self.is_mirroring and any(disk.tracking.pacing.waits_for_pass for disk in self._disks())

    @property
    def _is_mirror_wanted(self) -> bool:
        return self._parameters.mirrors and self._can_mirror

    @property
    def _may_mirror(self) -> bool:
        """Whether chunks may be mirrored without being asked for."""
        return self._parameters.auto_mirror and self._can_mirror

    @property
    def _link_rate(self) -> float:
        """Bytes per second that passes may send; only the freeze is not limited."""
        return min(self._bandwidth, self._parameters.max_bandwidth or self._bandwidth)

    def _wanted(self) -> Reach:
        if self._is_suspended or self._parameters.is_postcopy:  # then the destination fetches what it lacks
            return Reach.NONE
        return Reach.ALL if self._is_mirror_wanted else self._escalation.reach

    def _follow(self, now: float) -> None:
        """Mirror what is wanted, unless that has just failed."""
        wanted = self._wanted()
        if wanted is self._reach or self._is_frozen or not self._is_running:
            return
        if wanted is Reach.NONE:
            self._let_go()
            self._throttle(now)
        else:
            if self._fell_back_at is not None:
                if now < self._fell_back_at + REST_S or self._acknowledged_at <= self._fell_back_at:
                    return
                self._fell_back_at = None
            self._reach = wanted
            for disk in self._disks():
                disk.tracking.pacing.mirror(wanted, now, self._wake)
            self._size_window()
            self._throttle(now)

    def _size_window(self) -> None:
        parameters, disks = self._parameters, self._disks()
        window_bytes = parameters.mirror_lag.window_bytes(self._link_rate, parameters.downtime_limit_s)
        behind_bytes = sum(disk.tracking.pacing.pending_bytes for disk in disks)
        if sum(disk.tracking.pending_bytes for disk in disks) - behind_bytes > self.under_way_bytes:
            # The pass has other chunks to send, behind which mirrored ones wait: a lag means nothing yet.
            window_bytes = max(window_bytes, self.under_way_bytes)
        self._window_bytes = window_bytes
        for disk in disks:
            disk.tracking.pacing.set_window(
                self._window_bytes // len(disks), is_blocking=parameters.mirror_lag.is_blocking
            )

    def _tick(self, now: float) -> None:
        self._bandwidth = max(self._measure_bandwidth(), self._bandwidth * BANDWIDTH_DECAY)
        self._count_written(now)
        self._follow(now)
        if self.is_mirroring and not self._is_frozen:
            self._size_window()
        longest_s = max((disk.tracking.pacing.advance(now, HOLD_DEADLINE_S) for disk in self._disks()), default=0.0)
        if min(longest_s, now - self._acknowledged_at) >= SILENCE_S and self._is_pass_awaited:
            self._fell_back_at = now
            self._n_fallbacks += 1
            log.warning("nothing was acknowledged, guests go on without being mirrored", waited_s=round(longest_s, 3))
            self._let_go()
            self._tell()
        if self._percent:
            self._work.set()  # who waited for the rate may now wait for a pass

    def _count_written(self, now: float) -> None:
        disks = self._disks()
        if len(self._written) != len(disks):
            self._written = [Rate() for _ in disks]
            self._counted = [disk.disk.bytes_written for disk in disks]
        for at, disk in enumerate(disks):
            total = disk.disk.bytes_written
            self._written[at].add(total - self._counted[at], now)
            self._counted[at] = total

    def _throttle(self, now: float) -> None:
        """Have the disks throttled as the escalation says, unless the user has them mirrored, which is enough."""
        percent = 0 if self._is_mirror_wanted else self._escalation.throttle_percent
        if percent and not self._unthrottled:
            self._unthrottled = [rate.per_second(now) for rate in self._written]
        for disk, bytes_per_s in zip(self._disks(), limits(self._unthrottled, percent), strict=False):
            disk.tracking.pacing.limit_rate(bytes_per_s, now, self._wake)
        self._percent = percent
        self._tell()

    def _let_go(self) -> None:
        self._reach = Reach.NONE
        self._window_bytes = self._percent = 0
        for disk in self._disks():
            disk.tracking.pacing.release()

    def _tell(self) -> None:
        now = self._reach, self._percent
        if now != self._told:
            self._told = now
            self._on_change(*now)

    def _wake(self) -> None:
        """Something waits; called on any thread."""
        assert self._token is not None
        try:
            self._token.run_sync_soon(self._set_work, idempotent=True)
        except trio.RunFinishedError:
            return

    def _set_work(self) -> None:
        self._work.set()

    def statistics(self) -> PacingStatistics:
        """Return what is done to guests at this moment."""
        pacings = [disk.tracking.pacing for disk in self._disks()]
        return PacingStatistics(
            is_mirror_wanted=self._is_mirror_wanted,
            reach=self._reach,
            mirrored_chunks=sum(one.mirrored_chunks for one in pacings),
            behind_bytes=sum(one.pending_bytes for one in pacings),
            window_bytes=self._window_bytes,
            paced_writes=sum(disk.disk.paced_writes for disk in self._disks()),
            held_replies=sum(one.held_replies for one in pacings),
            throttle_percent=self._percent,
            n_fallbacks=self._n_fallbacks,
        )
