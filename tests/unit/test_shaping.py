"""What a migration does about guests that write faster than passes can follow."""

from __future__ import annotations

import pytest

from fusemig.core.mirror import Reach
from fusemig.core.shaping import (
    DEFAULT_LAG,
    FIRST_WINDOW_BYTES,
    MAX_WINDOW_BYTES,
    MIN_RATE,
    MIN_WINDOW_BYTES,
    Escalation,
    MirrorLag,
    Stall,
    limits,
)
from fusemig.errors import ConfigError

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "lag", "shown", "is_blocking"),
    [
        ("20ms", DEFAULT_LAG, "20ms", False),
        ("1.5s", MirrorLag(seconds=1.5), "1500ms", False),
        ("4M", MirrorLag(seconds=None, size=4 * MIB), "4.0 MiB", False),
        ("0", MirrorLag(seconds=None, size=0), "0", True),
        ("0ms", MirrorLag(seconds=0.0), "0", True),
    ],
)
def test_lags(text: str, lag: MirrorLag, shown: str, is_blocking: bool) -> None:
    """A time, a size, or 0; what is shown can be read again."""
    assert MirrorLag.parse(text) == lag
    assert str(lag) == shown
    assert MirrorLag.parse(shown).is_blocking == lag.is_blocking == is_blocking


@pytest.mark.parametrize("text", ["", "ms", "fast", "-1", "5 minutes"])
def test_what_is_no_lag_is_refused(text: str) -> None:
    """With what to write instead."""
    with pytest.raises(ConfigError, match=r"is no lag: write a time such as 20ms, a size such as 4M, or 0"):
        MirrorLag.parse(text)


def test_the_window_is_what_the_link_carries_in_the_lag_and_fits_the_downtime_limit() -> None:
    """Within bounds that keep writes from waiting for single round trips, and memory bounded."""
    assert DEFAULT_LAG.window_bytes(100 * MIB, 0.3) == 2 * MIB
    assert MirrorLag(None, 8 * MIB).window_bytes(100 * MIB, 0.3) == 8 * MIB
    assert MirrorLag(None, 8 * MIB).window_bytes(100 * MIB, 0.03) == int(1.5 * MIB)
    assert MirrorLag(None, 0).window_bytes(100 * MIB, 0.3) == MIN_WINDOW_BYTES
    assert DEFAULT_LAG.window_bytes(1e12, 0.3) == MAX_WINDOW_BYTES
    assert DEFAULT_LAG.window_bytes(0, 0.3) == FIRST_WINDOW_BYTES


def test_a_stall_is_seconds_of_passes_that_did_not_help() -> None:
    """A burst is none, and one pass that helps begins anew."""
    stall = Stall()
    assert not stall.after_pass(100, 90, 1.9, is_over_limit=True)
    assert not stall.after_pass(100, 50, 1.9, is_over_limit=True)
    assert not stall.after_pass(100, 90, 1.9, is_over_limit=True)
    assert stall.after_pass(100, 90, 0.2, is_over_limit=True)
    assert not stall.after_pass(100, 100, 1.9, is_over_limit=True)
    assert not stall.after_pass(100, 100, 60.0, is_over_limit=False)
    assert stall.after_pass(100, 100, 60.0, is_over_limit=True)


def steps(n: int, dirty_rate: float, *, throttle_max: int, may_mirror: bool = True) -> list[tuple[Reach, int]]:
    """Take steps with guests that would dirty ``dirty_rate`` times the link; return what they led to."""
    escalation, seen = Escalation(), []
    for _ in range(n):
        now = dirty_rate * (1 - escalation.throttle_percent / 100)
        escalation.step(now, 1.0, throttle_max=throttle_max, may_mirror=may_mirror, is_mirroring=False)
        seen.append((escalation.reach, escalation.throttle_percent))
    return seen


def test_by_default_what_is_hot_is_mirrored_then_everything() -> None:
    """Guests are not throttled unless somebody allowed it."""
    assert steps(3, 4.0, throttle_max=0) == [(Reach.HOT, 0), (Reach.ALL, 0), (Reach.ALL, 0)]


def test_the_throttle_is_gentle_first_and_goes_as_far_as_is_needed_and_allowed() -> None:
    """Then mirroring begins, and the throttle ends."""
    assert [percent for _, percent in steps(4, 4.0, throttle_max=45)] == [20, 30, 40, 45]
    assert steps(5, 4.0, throttle_max=45)[-1] == (Reach.HOT, 0)
    # Half of what the link carries would be enough: 1 - 0.5 / 0.6.
    assert [percent for _, percent in steps(1, 0.6, throttle_max=99)] == [17]
    assert steps(3, 4.0, throttle_max=20, may_mirror=False)[-1] == (Reach.NONE, 20)


def test_nothing_is_escalated_where_everything_is_mirrored_anyway() -> None:
    """Mode mirror."""
    assert not Escalation().step(4.0, 1.0, throttle_max=99, may_mirror=True, is_mirroring=True)


def test_to_shorten_a_freeze_what_is_hot_is_mirrored_then_everything() -> None:
    """Beside a throttle that works; not where it may not be, where all is mirrored anyway, or where all was done."""
    escalation = Escalation()
    escalation.step(4.0, 1.0, throttle_max=45, may_mirror=True, is_mirroring=False)
    assert not escalation.shorten(may_mirror=False, is_mirroring=False)
    assert not escalation.shorten(may_mirror=True, is_mirroring=True)
    assert (escalation.reach, escalation.throttle_percent) == (Reach.NONE, 20)
    assert escalation.shorten(may_mirror=True, is_mirroring=False)
    assert (escalation.reach, escalation.throttle_percent) == (Reach.HOT, 20)
    assert escalation.shorten(may_mirror=True, is_mirroring=False)
    assert (escalation.reach, escalation.throttle_percent) == (Reach.ALL, 20)
    assert not escalation.shorten(may_mirror=True, is_mirroring=False)


def test_what_made_a_freeze_shorter_ends_with_the_switchover_that_was_lost() -> None:
    """And what passes need goes on."""
    escalation = Escalation()
    assert escalation.shorten(may_mirror=True, is_mirroring=False)
    escalation.end_shortening()
    assert (escalation.reach, escalation.throttle_percent) == (Reach.NONE, 0)
    assert escalation.step(4.0, 1.0, throttle_max=0, may_mirror=True, is_mirroring=False)
    assert escalation.shorten(may_mirror=True, is_mirroring=False)
    assert (escalation.reach, escalation.throttle_percent) == (Reach.ALL, 0)
    escalation.end_shortening()
    assert (escalation.reach, escalation.throttle_percent) == (Reach.HOT, 0)


def test_passes_that_stop_to_help_while_a_freeze_is_made_shorter_take_over() -> None:
    """The next step goes beyond what is mirrored already, and is no longer for a moment."""
    escalation = Escalation()
    assert escalation.shorten(may_mirror=True, is_mirroring=False)
    assert escalation.step(4.0, 1.0, throttle_max=0, may_mirror=True, is_mirroring=False)
    escalation.end_shortening()
    assert escalation.reach is Reach.ALL
    assert not escalation.step(4.0, 1.0, throttle_max=0, may_mirror=True, is_mirroring=False)


def test_limits_leave_idle_disks_alone_and_every_disk_something() -> None:
    """No guest is stopped."""
    assert limits([100 * MIB, 0.0, 1.0], 75) == [25 * MIB, 0.0, MIN_RATE]
    assert limits([100 * MIB], 0) == [0.0]
