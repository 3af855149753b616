"""Rates, the forecast and the decision after each pass, on a clock that the test holds."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusemig.core import convergence
from fusemig.core.convergence import Convergence, Decision, Rate, RateLimit, Throughput

MIB = 1 << 20


def test_a_steady_rate() -> None:
    """Equal amounts at equal times average to their rate."""
    rate = Rate()
    for tick in range(50):
        rate.add(MIB, tick * 0.1)
    assert rate.per_second(4.9) == pytest.approx(10 * MIB)


def test_a_rate_forgets_what_is_older_than_its_window() -> None:
    """Only the window counts."""
    rate = Rate(window_s=2.0)
    for tick in range(20):
        rate.add(100 * MIB, tick * 0.1)
    for tick in range(20, 80):
        rate.add(MIB, tick * 0.1)
    assert rate.per_second(7.9) == pytest.approx(10 * MIB, rel=0.01)


def test_a_rate_before_there_is_one() -> None:
    """Nothing and a single sample give 0, not an error."""
    rate = Rate()
    assert rate.per_second(1.0) == 0
    rate.add(MIB, 1.0)
    assert rate.per_second(1.0) == 0


def test_a_rate_stands_while_nothing_is_counted() -> None:
    """The last known rate is kept beyond the window."""
    rate = Rate()
    rate.add(MIB, 0.0)
    rate.add(MIB, 1.0)
    assert rate.per_second(1.0) == MIB
    assert rate.per_second(100.0) == MIB


def test_a_rate_joins_samples_that_lie_close() -> None:
    """Ten thousand adds a second average as one would."""
    rate = Rate(window_s=2.0)
    for tick in range(30_000):
        rate.add(1000, tick / 10_000)
    assert rate.per_second(3.0) == pytest.approx(10_000_000, rel=0.03)


def test_throughput_counts_busy_time_only() -> None:
    """Idle time between adds does not exist for it."""
    throughput = Throughput(window_s=1.0)
    assert throughput.per_second == 0
    for _ in range(100):
        throughput.add(MIB, 0.1)
    assert throughput.per_second == pytest.approx(10 * MIB)


def test_throughput_follows_the_last_busy_second() -> None:
    """A link that became slow is seen as slow."""
    throughput = Throughput(window_s=1.0)
    for _ in range(100):
        throughput.add(100 * MIB, 0.1)
    for _ in range(20):
        throughput.add(MIB, 0.1)
    assert throughput.per_second == pytest.approx(10 * MIB, rel=0.2)


def test_throughput_with_a_clock_that_stands() -> None:
    """Bytes that took no time give no rate and no division by zero."""
    throughput = Throughput()
    throughput.add(MIB, 0.0)
    assert throughput.per_second == 0


@pytest.mark.parametrize(
    ("pending", "bandwidth", "expected"), [(0, 0.0, 0.0), (1, 0.0, math.inf), (MIB, float(MIB), 1.0), (0, 5.0, 0.0)]
)
def test_the_forecast(pending: int, bandwidth: float, expected: float) -> None:
    """Pending over bandwidth; without a bandwidth only an empty rest is free."""
    assert Convergence().forecast(pending, bandwidth).expected_downtime_s == expected


def run_passes(pending: list[int], bandwidth: float, limit_s: float) -> list[Decision]:
    """Return the decisions after passes that left ``pending``."""
    decider = Convergence()
    before = [math.inf, *pending[:-1]]
    return [
        decider.after_pass(sent, 0.0, decider.forecast(left, bandwidth), limit_s)
        for sent, left in zip(before, pending, strict=True)
    ]


def test_never_above_the_limit() -> None:
    """While the expected downtime is above the limit there is another pass, however many there were."""
    assert set(run_passes([100 * MIB] * 200, MIB, 0.3)) == {Decision.CONTINUE}


def test_an_empty_rest_is_switched_over_at_once() -> None:
    """An idle disk needs no extra pass."""
    assert run_passes([0], 100.0 * MIB, 0.3) == [Decision.SWITCH_OVER]


def test_passes_go_on_while_they_shrink_the_rest() -> None:
    """Below the limit, a pass that takes a tenth off is worth it; the first that does not is the last."""
    assert run_passes([20 * MIB, 10 * MIB, 5 * MIB, 4 * MIB, 4 * MIB - 1], 100.0 * MIB, 0.3) == [
        Decision.CONTINUE,
        Decision.CONTINUE,
        Decision.CONTINUE,
        Decision.CONTINUE,
        Decision.SWITCH_OVER,
    ]


def test_a_pass_is_judged_by_what_it_was_to_send() -> None:
    """While the stores are synced between two passes more becomes dirty, for which the second is not to blame."""
    decider = Convergence()
    assert decider.after_pass(math.inf, 0.1, decider.forecast(2 * MIB, 100.0 * MIB), 0.3) is Decision.CONTINUE
    assert decider.after_pass(8 * MIB, 0.1, decider.forecast(4 * MIB, 100.0 * MIB), 0.3) is Decision.CONTINUE
    assert decider.after_pass(4 * MIB, 0.1, decider.forecast(4 * MIB, 100.0 * MIB), 0.3) is Decision.SWITCH_OVER


def freeze_of(factor: float, limit_s: float) -> tuple[float, float]:
    """Return expected downtime and the time of passes within the limit, of a guest that writes in order.

    It dirties ``factor`` times what the link carries, so passes shrink by that.
    """
    decider, rest_s, took_s, extra_s = Convergence(), limit_s, 100.0, 0.0
    while True:
        forecast = decider.forecast(int(rest_s * 1e9), 1e9)
        if decider.after_pass(rest_s / factor * 1e9, took_s, forecast, limit_s) is Decision.SWITCH_OVER:
            return rest_s, extra_s
        took_s = rest_s
        extra_s += took_s
        rest_s *= factor


@pytest.mark.parametrize("limit_s", [0.03, 0.3, 3.0])
def test_what_shorter_freezes_cost_is_bounded(limit_s: float) -> None:
    """Passes that take a third off or more end where there is nothing left to win; others when their time is up."""
    for factor in (0.3, 0.5, 2 / 3):
        rest_s, extra_s = freeze_of(factor, limit_s)
        assert rest_s <= convergence.SMALL_REST_S
        assert extra_s <= 3 * limit_s
    rest_s, extra_s = freeze_of(0.85, limit_s)
    assert 0 < rest_s < 0.5 * limit_s
    assert extra_s <= max(convergence.EXTRA_S, (convergence.EXTRA_LIMITS + 1) * limit_s)
    assert freeze_of(0.95, limit_s) == (limit_s, 0.0)


def test_slow_passes_use_up_the_time() -> None:
    """Under a max-bandwidth a pass takes longer than the freeze that it shortens."""
    decider = Convergence()
    decisions = [
        decider.after_pass((10 - n) * MIB, 0.5, decider.forecast((9 - n) * MIB, 100.0 * MIB), 0.3) for n in range(4)
    ]
    assert decisions == [Decision.SWITCH_OVER if n == 3 else Decision.CONTINUE for n in range(4)]


def test_extra_passes_are_bounded_in_number() -> None:
    """Even a tiny rest that for ever shrinks and grows again ends in a switchover."""
    decider = Convergence()
    forecast = decider.forecast(MIB, 100.0 * MIB)
    decisions = [decider.after_pass(math.inf, 0.1, forecast, 3600) for _ in range(2 * convergence.MAX_EXTRA_PASSES)]
    assert decisions.index(Decision.SWITCH_OVER) == convergence.MAX_EXTRA_PASSES


def test_passes_without_progress_are_counted_in_a_row() -> None:
    """Only passes in a row that leave no less count, and a pass within the limit ends the row."""
    decider = Convergence()
    counts = []
    before: float = math.inf
    for left in (10, 10, 11, 9, 9, 0):
        decider.after_pass(before, 1.0, decider.forecast(left * MIB, MIB), 0.3)
        before = left * MIB
        counts.append(decider.n_passes_without_progress)
    assert counts == [0, 1, 2, 0, 1, 0]


@given(st.lists(st.integers(0, 1 << 30), min_size=1), st.floats(1, 1e9), st.floats(0.001, 10))
def test_a_switchover_is_always_within_the_limit(pending: list[int], bandwidth: float, limit_s: float) -> None:
    """No history of passes leads to a switchover that is expected to take longer than allowed."""
    for left, decision in zip(pending, run_passes(pending, bandwidth, limit_s), strict=True):
        if decision is Decision.SWITCH_OVER:
            assert left / bandwidth <= limit_s


def test_the_rate_limit_holds_over_time() -> None:
    """Whoever waits as told sends at the rate, whatever the steps."""
    limit, now, sent = RateLimit(MIB), 0.0, 0
    while now < 10.0:
        now += limit.delay_s(64 * 1024, now)
        sent += 64 * 1024
    assert sent == pytest.approx(10 * MIB, rel=0.02)


def test_idle_time_is_not_saved_up() -> None:
    """After a pause the burst is what the burst time allows, no more."""
    limit = RateLimit(MIB, burst_s=0.02)
    limit.delay_s(MIB, 0.0)
    assert limit.delay_s(MIB, 1000.0) == 0
    assert limit.delay_s(1, 1000.0) == pytest.approx(0.98)


def test_no_limit() -> None:
    """0 is unlimited, and a limit may be lifted while it holds."""
    limit = RateLimit(1)
    limit.delay_s(1000, 0.0)
    assert limit.delay_s(1, 0.0) > 900
    limit.bytes_per_s = 0
    assert limit.delay_s(1 << 40, 0.0) == 0
    assert limit.step_bytes(4 * MIB) == 4 * MIB


@pytest.mark.parametrize(
    ("rate", "expected"), [(1, 65536), (100 * MIB, MIB), (10 << 30, 4 * MIB), (64 * 1024 * 100, 65536)]
)
def test_steps_are_small_under_a_limit(rate: int, expected: int) -> None:
    """A step is a hundredth of a second's worth, at least 64 KiB, at most what was asked for."""
    assert RateLimit(rate).step_bytes(4 * MIB) == expected
