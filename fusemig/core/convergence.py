"""When to switch over: rates, the pending estimate and the decision after each pass.

QEMU's rule (migration/migration.c, migration_completion) is: switch when pending <= bandwidth * downtime_limit. Taken
alone it freezes the guest for the whole limit even where one more pass would halve the rest. So passes go on while
they still shrink the rest, and the limit is only the bound:

    expected downtime > limit              another pass, always
    the pass took a tenth off or more      another pass: it makes the freeze shorter
    otherwise                              switch over

The passes of the second line may take `EXTRA_LIMITS` times the limit together, or `EXTRA_S`. Passes that each take a
third off need three times the limit for all that they can do, so what is cut short are only those that hardly help.

Pure: time comes in as ``now``, in seconds of a monotonic clock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import Final

SHRINK: Final = 2 / 3
"""A pass that leaves more than this share of what it was to send will not bring a rest that is too large down."""

WORTH_SHRINK: Final = 0.9
"""A pass that leaves more than this share of what it was to send does not make the freeze shorter."""

EXTRA_LIMITS: Final = 4.0
"""How long passes that only make the freeze shorter may take together, in downtime limits..."""

EXTRA_S: Final = 1.0
"""...or in seconds, where that is longer."""

LONG_FREEZE_S: Final = 0.03
"""A rest that takes longer than this to send, in seconds, is worth mirroring what is hot for a pass or two."""

SMALL_REST_S: Final = 0.002
"""A rest that takes less than this to send, in seconds, is not worth another pass."""

MAX_EXTRA_PASSES: Final = 50
"""Passes made only to shorten the freeze, at most."""

BUSY_REQUESTS_PER_S: Final = 20_000
"""Guests that make so many requests a second get all the courtesy there is."""

REST_SHARE: Final = 3.0
"""Rest per time worked, for busy guests: the bulk phase then takes a quarter of a core."""

LONGEST_REST_S: Final = 0.005


class Decision(Enum):
    """What to do after a pass."""

    CONTINUE = "continue"
    SWITCH_OVER = "switch-over"


class Rate:
    """Bytes per second over a sliding window."""

    def __init__(self, window_s: float = 2.0) -> None:
        """Average over the last ``window_s`` seconds."""
        self._window_s = window_s
        self._samples: deque[tuple[float, int]] = deque()
        self._total = 0
        self._last = 0.0

    def add(self, n_bytes: int, now: float) -> None:
        """Count ``n_bytes`` at time ``now``."""
        self._total += n_bytes
        samples = self._samples
        if samples and now - samples[-1][0] < self._window_s / 50:
            samples[-1] = (samples[-1][0], self._total)
        else:
            samples.append((now, self._total))
        while len(samples) > 2 and now - samples[0][0] > self._window_s:
            samples.popleft()

    def per_second(self, now: float) -> float:
        """Return the average rate in bytes per second; the last known one while nothing is counted."""
        samples = self._samples
        if len(samples) >= 2 and now - samples[-1][0] < self._window_s:
            span = samples[-1][0] - samples[0][0]
            if span > 0:
                self._last = (samples[-1][1] - samples[0][1]) / span
        return self._last


class Throughput:
    """Bytes per second while there is something under way.

    Unlike `Rate` it does not count idle time: what small passes and a rate limit leave unused is still there when the
    guest is frozen, because the last pass is not limited.
    """

    def __init__(self, window_s: float = 1.0) -> None:
        """Average over the last ``window_s`` busy seconds."""
        self._window_s = window_s
        self._samples: deque[tuple[int, float]] = deque()
        self._bytes = 0
        self._seconds = 0.0

    def add(self, n_bytes: int, busy_s: float) -> None:
        """Count ``n_bytes`` that took ``busy_s`` seconds."""
        self._samples.append((n_bytes, busy_s))
        self._bytes += n_bytes
        self._seconds += busy_s
        while self._seconds > self._window_s and len(self._samples) > 1:
            old_bytes, old_s = self._samples.popleft()
            self._bytes -= old_bytes
            self._seconds -= old_s

    @property
    def per_second(self) -> float:
        """The average in bytes per second; 0 before anything was counted."""
        return self._bytes / self._seconds if self._seconds > 0 else 0.0


@dataclass(frozen=True)
class Forecast:
    """What a switchover at this moment would cost."""

    pending_bytes: int
    bandwidth: float
    """Bytes per second that the destination acknowledges."""
    expected_downtime_s: float


class Convergence:
    """Decides after each pass; one per migration."""

    def __init__(self) -> None:
        """Start before the first pass."""
        self._extra_s = 0.0
        self._is_extra = False
        """Whether the pass under way is made only to shorten the freeze."""
        self._n_extra = 0
        self.n_passes_without_progress = 0
        """Passes in a row after which no less was pending than before: the guest writes faster than the link sends."""

    def forecast(self, pending_bytes: int, bandwidth: float) -> Forecast:
        """Return the expected downtime for ``pending_bytes`` at ``bandwidth`` bytes per second."""
        expected = pending_bytes / bandwidth if bandwidth > 0 else (0.0 if not pending_bytes else float("inf"))
        return Forecast(pending_bytes, bandwidth, expected)

    def after_pass(self, before_bytes: float, took_s: float, forecast: Forecast, downtime_limit_s: float) -> Decision:
        """Decide what follows the pass that just ended, which was to send ``before_bytes`` and took ``took_s``."""
        if self._is_extra:
            self._extra_s += took_s
        self._is_extra = False
        if forecast.expected_downtime_s > downtime_limit_s:
            made_progress = forecast.pending_bytes < before_bytes
            self.n_passes_without_progress = 0 if made_progress else self.n_passes_without_progress + 1
            return Decision.CONTINUE
        self.n_passes_without_progress = 0
        is_shrinking = forecast.pending_bytes <= before_bytes * WORTH_SHRINK
        has_time = self._extra_s < max(EXTRA_S, EXTRA_LIMITS * downtime_limit_s) and self._n_extra < MAX_EXTRA_PASSES
        if forecast.expected_downtime_s <= SMALL_REST_S or not is_shrinking or not has_time:
            return Decision.SWITCH_OVER
        self._n_extra += 1
        self._is_extra = True
        return Decision.CONTINUE


class RateLimit:
    """A token bucket: how long to wait before sending. The rate may change at any time; 0 is unlimited."""

    def __init__(self, bytes_per_s: int, burst_s: float = 0.02) -> None:
        """Allow ``bytes_per_s``, and what that is in ``burst_s`` seconds at once."""
        self.bytes_per_s = bytes_per_s
        self._burst_s = burst_s
        self._free_at = 0.0

    def delay_s(self, n_bytes: int, now: float) -> float:
        """Account for ``n_bytes`` to be sent and return how many seconds to wait before sending them."""
        if self.bytes_per_s <= 0:
            return 0.0
        start = max(self._free_at, now - self._burst_s)
        self._free_at = start + n_bytes / self.bytes_per_s
        return max(0.0, start - now)

    def step_bytes(self, largest: int) -> int:
        """Return how much to send in one step: about a hundredth of a second's worth, at most ``largest``."""
        if self.bytes_per_s <= 0:
            return largest
        return max(64 * 1024, min(largest, self.bytes_per_s // 100))


class Courtesy:
    """How long the bulk phase rests so that guests are served first.

    The rule: for each millisecond that a chunk took, the sender rests up to three, in proportion to how busy guests
    are. A guest that makes 20,000 requests a second or more gets the whole rest; dirty passes and the last one do not
    rest, because there a slow sender would only make the guest's work longer.
    """

    def __init__(self) -> None:
        """Start with guests that have done nothing."""
        self._n_requests: int | None = None

    def rest_s(self, n_requests: int, took_s: float) -> float:
        """Return how many seconds to rest after a chunk that took ``took_s`` seconds.

        Args:
            n_requests: how many requests guests have ever made.
            took_s: since the last rest ended.
        """
        before, self._n_requests = self._n_requests, n_requests
        if before is None or took_s <= 0:
            return 0.0
        busyness = min(1.0, (n_requests - before) / took_s / BUSY_REQUESTS_PER_S)
        return min(LONGEST_REST_S, took_s * REST_SHARE * busyness)
