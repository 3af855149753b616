"""What a migration does when guests write faster than passes can follow: mirroring, and throttling within limits.

The forecast. A pass sends what guests dirtied during the one before it. Guests that go on as they do dirty in a shorter
time no smaller share of it (what is dirtied again counts once, so the curve bends downwards): a pass that did not
shrink the rest by a third will not be followed by one that does. `Stall` waits for `STALLED_S` of such passes, so that
a burst changes nothing.

What follows (`Escalation`), one step for each stall:

    throttle by 20 %, 30 %, ...    as far as is needed and allowed (QEMU: cpu-throttle-initial, -increment, max-)
    mirror what is hot             chunks that are sent from here on, because guests keep writing them
    mirror everything              guests write new places all the time, so nothing is hot

A switchover that is within the limit and would still take long is made shorter in the same way: what is hot is mirrored
for the passes just before it, and if that was not enough, everything (`Escalation.shorten`). That is over when the
switchover is lost, and a throttle that brought the passes so far goes on beside it.

Mirroring because passes do not help holds guests down to the link by itself, so the throttle ends where that begins.
With everything mirrored the rest is bounded and each cold chunk is sent once more at most: every migration ends.

Pure: time comes in as numbers of seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fusemig.core.convergence import SHRINK
from fusemig.core.mirror import Reach
from fusemig.core.units import format_size, parse_duration, parse_size
from fusemig.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

STALLED_S: Final = 2.0
"""How long passes that did not help must have taken together before something is done about it."""
INITIAL_PERCENT: Final = 20
"""The first step of the throttle (QEMU's cpu-throttle-initial)."""
INCREMENT_PERCENT: Final = 10
"""Each further one (QEMU's cpu-throttle-increment)."""
SAFE_SHARE: Final = 0.5
"""Guests that dirty no more than this share of what the link carries halve the rest with each pass."""
MIN_RATE: Final = 256 << 10
"""Bytes per second that a throttled disk may always write."""
MAX_THROTTLE_PERCENT: Final = 99

MIN_WINDOW_BYTES: Final = 256 << 10
"""What may be missing of a mirrored disk in any case: less would make every write wait for a round trip."""
FIRST_WINDOW_BYTES: Final = 1 << 20
"""The window before anything is known of the link."""
MAX_WINDOW_BYTES: Final = 64 << 20
DEFAULT_LAG_S: Final = 0.02
MIRROR_SHARE: Final = 0.8
"""How much of the link mirrored writes may take while other chunks wait too: guests go first, and the pass ends."""
DOWNTIME_SHARE: Final = 0.5
"""How much of the downtime limit what is missing may take to be sent; the rest is the hand-off's."""


@dataclass(frozen=True)
class MirrorLag:
    """How far the destination may be behind; one of the two counts."""

    seconds: float | None = DEFAULT_LAG_S
    size: int | None = None

    @classmethod
    def parse(cls, text: str) -> MirrorLag:
        """Read ``20ms`` or ``4M``; ``0`` is write-blocking.

        Raises:
            ConfigError: it is neither a time nor a size.
        """
        text = text.strip()
        try:
            if text.lower().endswith("s"):
                return cls(seconds=parse_duration(text))
            return cls(seconds=None, size=parse_size(text))
        except ConfigError as exc:
            raise ConfigError(f"'{text}' is no lag: write a time such as 20ms, a size such as 4M, or 0") from exc

    def __str__(self) -> str:
        if self.is_blocking:
            return "0"
        return f"{self.seconds * 1000:g}ms" if self.seconds is not None else format_size(self.size or 0)

    @property
    def is_blocking(self) -> bool:
        """Whether a guest's write is answered only when both sides have it."""
        return not self.seconds and not self.size

    def window_bytes(self, bandwidth: float, downtime_limit_s: float) -> int:
        """Return how many bytes may be missing at the destination.

        Args:
            bandwidth: of the link, in bytes per second; 0: not known yet.
            downtime_limit_s: the whole window has to be sent while guests stand still.
        """
        if not bandwidth:
            return FIRST_WINDOW_BYTES
        wanted = self.size if self.size is not None else (self.seconds or 0.0) * bandwidth
        allowed = downtime_limit_s * DOWNTIME_SHARE * bandwidth
        return int(max(MIN_WINDOW_BYTES, min(wanted, allowed, MAX_WINDOW_BYTES)))


DEFAULT_LAG: Final = MirrorLag()


class Stall:
    """Tells when passes have stopped to help; one per migration."""

    def __init__(self) -> None:
        """Start before the first pass."""
        self._stalled_s = 0.0

    def after_pass(self, before_bytes: int, after_bytes: int, took_s: float, *, is_over_limit: bool) -> bool:
        """Judge a pass that took ``took_s`` seconds and left ``after_bytes`` of ``before_bytes``; True: a stall."""
        if not is_over_limit or after_bytes <= before_bytes * SHRINK:
            self._stalled_s = 0.0
            return False
        self._stalled_s += took_s
        if self._stalled_s < STALLED_S:
            return False
        self._stalled_s = 0.0
        return True


class Escalation:
    """What was done so far, and what comes next."""

    def __init__(self) -> None:
        """Start with nothing done."""
        self._lasting = Reach.NONE
        """What is mirrored because passes do not help."""
        self._brief = Reach.NONE
        """What is mirrored, perhaps beyond that, for the moment before a switchover."""
        self.throttle_percent = 0

    @property
    def reach(self) -> Reach:
        """Which chunks are to be mirrored."""
        return self._lasting if self._brief is Reach.NONE else self._brief

    def step(
        self, dirty_rate: float, bandwidth: float, *, throttle_max: int, may_mirror: bool, is_mirroring: bool
    ) -> bool:
        """Do more; return whether there was more to do.

        Args:
            dirty_rate: bytes per second that guests dirtied in the last pass, throttled as they were.
            bandwidth: of the link, in bytes per second.
            throttle_max: per cent by which guests may be slowed down.
            may_mirror: whether chunks may be mirrored without being asked for.
            is_mirroring: whether everything is mirrored because the user wants it.
        """
        if is_mirroring:
            return False
        if self._lasting is Reach.NONE:
            percent = self._next_percent(dirty_rate, bandwidth, throttle_max)
            if percent > self.throttle_percent:
                self.throttle_percent = percent
                return True
        if not may_mirror or self._lasting is Reach.ALL:
            return False
        self._lasting, self._brief = _further(self.reach), Reach.NONE
        self.throttle_percent = 0
        return True

    def shorten(self, *, may_mirror: bool, is_mirroring: bool) -> bool:
        """Mirror more for the moment before a switchover, first what is hot; return whether there was more."""
        if is_mirroring or not may_mirror or self.reach is Reach.ALL:
            return False
        self._brief = _further(self.reach)
        return True

    def end_shortening(self) -> None:
        """The switchover did not come: mirror no more than passes need."""
        self._brief = Reach.NONE

    def _next_percent(self, dirty_rate: float, bandwidth: float, throttle_max: int) -> int:
        now = self.throttle_percent
        unthrottled = dirty_rate / (1 - now / 100)
        needed = 100 * (1 - SAFE_SHARE * bandwidth / unthrottled) if unthrottled > 0 else 0.0
        step = INITIAL_PERCENT if not now else now + INCREMENT_PERCENT
        return max(now, min(step, -int(-needed // 1), throttle_max))


def _further(reach: Reach) -> Reach:
    return Reach.HOT if reach is Reach.NONE else Reach.ALL


def limits(written_rates: Sequence[float], percent: int) -> list[float]:
    """Return each disk's limit in bytes per second, from what it was written at when nothing was throttled.

    A disk that was not written is not limited (0): it did not make the rest grow.
    """
    share = 1 - percent / 100
    return [max(MIN_RATE, rate * share) if rate > 0 and percent else 0.0 for rate in written_rates]
