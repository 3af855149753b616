"""Forecast: what a migration will take, from what guests write, and what would make one converge that does not.

The passes are played through with the rules that decide about the real ones (`fusemig.core.convergence`); only what
guests dirty meanwhile comes from their working sets. D(t) is what they dirty in a time t. A block counts from the
moment when the pass comes by it, which is any moment of the pass, so

    a pass of T seconds leaves              the mean of D from 0 to T
    the next one, of T' seconds, sends      the mean of D from T' to T      (what is dirtied ahead of it, it sends too)
    the last one, behind the closed gate, what the one before it left

D flattens, so passes shrink to a few blocks as long as the link is faster than the guests, and to the hot set over and
over where it is not. A rest that fits the limit and would take long all the same is made smaller by mirroring, if that
is allowed (`Escalation.shorten`): two passes beside guests that have their share of the link, and what they write in
places that these passes did not come by is left; or two more, and a window of it is. Not in the model: the time that
stores need to sync, compression, zeros inside allocated chunks, and what guests cost the sender of processor time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Final

from fusemig.core.convergence import LONG_FREEZE_S, Convergence, Decision
from fusemig.core.mirror import Reach
from fusemig.core.shaping import DEFAULT_LAG, MIRROR_SHARE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fusemig.core.shaping import MirrorLag
    from fusemig.core.working_set import WorkingSet

HANDOFF_S: Final = 0.01
"""What a switchover takes beside the last bytes: draining, syncs, epoch files, messages. Bench row F1, on tmpfs."""
PASS_S: Final = 0.003
"""What a pass takes beside its bytes: waiting for the last acknowledgement. Measured."""

_MAX_PASSES: Final = 500
_STANDSTILL: Final = 0.995
"""A pass that leaves more than this share of what the one before left: the next ones will not do better."""
_LARGEST_FACTOR: Final = 1024.0


@dataclass(frozen=True)
class Plan:
    """What is to be moved, over what, and how long guests may be frozen."""

    working_sets: Sequence[WorkingSet]
    send_bytes: float
    """What the present pass has to send; of a migration that has not begun, everything that is allocated."""
    bandwidth: float
    """Bytes per second that the way to the destination carries."""
    max_bandwidth: float = 0.0
    """What passes may use of it, but not the last one; 0: all."""
    downtime_limit_s: float = 0.3
    freeze_deadline_s: float = 5.0
    elapsed_s: float = 0.0
    """How long the present pass has been running."""
    speed: float = 1.0
    """How fast guests write, of how fast they wrote while they were watched."""
    shortening_lag: MirrorLag | None = None
    """How far behind the destination may be while mirroring makes a freeze shorter; None: nothing is mirrored."""

    def dirtied(self, start_s: float, stop_s: float) -> float:
        """Return the mean of what guests dirty in times from ``start_s`` to ``stop_s``."""
        return sum(one.mean(start_s * self.speed, stop_s * self.speed) for one in self.working_sets)

    @property
    def pass_bandwidth(self) -> float:
        """Bytes per second of every pass but the last."""
        return min(self.bandwidth, self.max_bandwidth) if self.max_bandwidth > 0 else self.bandwidth

    @property
    def write_rate(self) -> float:
        """Bytes per second that guests write, repeats included."""
        return sum(one.write_rate for one in self.working_sets) * self.speed


@dataclass(frozen=True)
class Prediction:
    """What is to be expected, from now on."""

    converges: bool
    n_passes: int
    """Including the present one and the last."""
    duration_s: float
    """Until the destination has the disks; meaningless where it does not converge."""
    sent_bytes: float
    """Of the disks, repeats included; about what crosses the wire."""
    downtime_s: float
    """Where it does not converge: what a switchover would take after any number of passes."""


class RemedyKind(Enum):
    """What would make a migration converge."""

    BANDWIDTH = "bandwidth"
    """A link, or a ``max-bandwidth``, of so many bytes per second."""
    DOWNTIME_LIMIT = "downtime-limit"
    """A limit of so many seconds."""
    THROTTLE = "throttle"
    """Guests that write at most so many bytes per second."""
    MIRROR = "mirror"
    """Mirroring (docs/convergence.md), beside which guests write at least so many bytes per second, or all they do."""
    POSTCOPY = "postcopy"
    """Post-copy (docs/postcopy.md), after which both hosts are needed for so many seconds at least."""


@dataclass(frozen=True)
class Remedy:
    """One thing that would do, everything else as it is."""

    kind: RemedyKind
    value: float


def predict(plan: Plan) -> Prediction:
    """Play the migration through; returns for any plan with a bandwidth above 0."""
    convergence = Convergence()
    limit_s = min(plan.downtime_limit_s, plan.freeze_deadline_s)
    sent = plan.send_bytes
    took = plan.elapsed_s + sent / plan.pass_bandwidth + PASS_S
    duration = took - plan.elapsed_s
    is_synced, before = False, math.inf
    for n_passes in range(1, _MAX_PASSES):
        pending = plan.dirtied(0.0, took)
        forecast = convergence.forecast(round(pending), plan.bandwidth)
        decision = convergence.after_pass(before, took, forecast, limit_s)
        if decision is Decision.SWITCH_OVER:
            if is_synced:
                n_more, more_s, more_bytes, pending = _shorten(plan, pending, took)
                downtime_s = pending / plan.bandwidth + HANDOFF_S
                return Prediction(
                    True, n_passes + n_more + 1, duration + more_s + downtime_s, sent + more_bytes + pending, downtime_s
                )
            is_synced = True
        elif pending > before * _STANDSTILL and forecast.expected_downtime_s > limit_s:
            break
        before = pending
        bytes_, took = _next_pass(plan, took)
        sent += bytes_
        duration += took
    return Prediction(False, 0, math.inf, sent, pending / plan.bandwidth + HANDOFF_S)


def _next_pass(plan: Plan, before_s: float) -> tuple[float, float]:
    """Return bytes and seconds of the pass after one of ``before_s`` seconds."""
    took = 0.0
    for _ in range(50):
        sent = plan.dirtied(took, before_s)
        longer = sent / plan.pass_bandwidth + PASS_S
        if abs(longer - took) <= 0.005 * longer:
            break
        took = longer
    return sent, longer


def _shorten(plan: Plan, pending: float, before_s: float) -> tuple[int, float, float, float]:
    """Play what makes the freeze shorter after a pass of ``before_s`` seconds that left ``pending`` bytes.

    Returns:
        Passes, their seconds, what they send, and what they leave.
    """
    lag, n_passes, seconds, sent = plan.shortening_lag, 0, 0.0, 0.0
    if lag is None:
        return n_passes, seconds, sent, pending
    guests = min(plan.write_rate, MIRROR_SHARE * plan.pass_bandwidth)
    window = lag.window_bytes(plan.pass_bandwidth, plan.downtime_limit_s)
    for reach in (Reach.HOT, Reach.ALL):
        if pending / plan.bandwidth <= LONG_FREEZE_S:
            break
        for _ in range(2):
            took = pending / (plan.pass_bandwidth - guests) + PASS_S
            n_passes, seconds, sent = n_passes + 1, seconds + took, sent + pending + guests * took
            missed = plan.dirtied(before_s, before_s + took) - plan.dirtied(before_s, before_s)
            pending = min(pending, plan.dirtied(0.0, took), window + (missed if reach is Reach.HOT else 0.0))
            before_s += took
    return n_passes, seconds, sent, pending


def remedies(plan: Plan) -> list[Remedy]:
    """Return what would make a plan converge that does not, each by itself; what cannot is left out."""
    found = []
    factor = _least(lambda factor: predict(_faster(plan, factor)).converges, _LARGEST_FACTOR)
    if factor is not None:
        found.append(Remedy(RemedyKind.BANDWIDTH, plan.pass_bandwidth * factor))
    # By how much it misses the limit depends on how far passes shrink, and that on the limit: so it is tried.
    longest = plan.freeze_deadline_s / plan.downtime_limit_s if plan.downtime_limit_s > 0 else 0.0
    factor = _least(
        lambda factor: predict(replace(plan, downtime_limit_s=plan.downtime_limit_s * factor)).converges, longest
    )
    if factor is not None:
        found.append(Remedy(RemedyKind.DOWNTIME_LIMIT, plan.downtime_limit_s * factor))
    factor = _least(lambda factor: predict(replace(plan, speed=plan.speed / factor)).converges, _LARGEST_FACTOR)
    rate = plan.write_rate
    if factor is not None:
        found.append(Remedy(RemedyKind.THROTTLE, rate / factor))
    # With mirroring no more than the window is ever missing, whatever guests do. What they write to mirrored chunks
    # crosses the link once at most, so its share of the link is a lower bound: what is written again within the lag
    # costs nothing, and no more do chunks that were not sent yet.
    limit_s = min(plan.downtime_limit_s, plan.freeze_deadline_s)
    window = DEFAULT_LAG.window_bytes(plan.bandwidth, plan.downtime_limit_s)
    if window / plan.bandwidth <= limit_s:
        found.append(Remedy(RemedyKind.MIRROR, min(rate, MIRROR_SHARE * plan.pass_bandwidth)))
    # What is fetched is not held back by max-bandwidth.
    found.append(Remedy(RemedyKind.POSTCOPY, plan.send_bytes / plan.bandwidth))
    return found


def _faster(plan: Plan, factor: float) -> Plan:
    faster = plan.pass_bandwidth * factor
    return replace(plan, bandwidth=max(plan.bandwidth, faster), max_bandwidth=faster if plan.max_bandwidth > 0 else 0.0)


def _least(is_enough: Callable[[float], bool], largest: float) -> float | None:
    """Return about the least factor above 1 that is enough, up to ``largest``; None if that is not."""
    if largest <= 1 or not is_enough(largest):
        return None
    low, high = 0.0, math.log(largest)
    while high - low > 0.03:
        middle = (low + high) / 2
        if is_enough(math.exp(middle)):
            high = middle
        else:
            low = middle
    return math.exp(high)
