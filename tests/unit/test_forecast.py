"""The forecast against passes that are played through block by block, and the remedies against the forecast."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusemig.core.convergence import Convergence, Decision
from fusemig.core.forecast import HANDOFF_S, PASS_S, Plan, RemedyKind, predict, remedies
from fusemig.core.shaping import DEFAULT_LAG, MIRROR_SHARE
from fusemig.core.units import BLOCK_SIZE
from fusemig.core.working_set import WorkingSet

MIB = 1 << 20
N_BLOCKS = 4000
"""Of the disk that is played through: small, and slow to send, so that a run is quick."""


def random_writes(rate: float, hot_bytes: float, size: float, n_epochs: int = 100) -> WorkingSet:
    """Return the curve of writes at random places of a hot set, in closed form."""
    distinct = [-hot_bytes * math.expm1(-rate * t / hot_bytes) for t in range(1, n_epochs + 1)]
    return WorkingSet(rate, 1.0, distinct, size)


def play(rate: int, n_hot: int, bandwidth: float, limit_s: float, seed: int) -> tuple[float, int, float] | None:
    """Send a disk while ``rate`` blocks a second of ``n_hot`` are written; return seconds, bytes, the last pass's time.

    Block by block, in ascending order from a cursor, as the real passes go; None if 30 passes do not end it.
    """
    rng, decider = random.Random(seed), Convergence()
    hot = rng.sample(range(N_BLOCKS), n_hot)
    dirty, now, n_sent, written = set(range(N_BLOCKS)), 0.0, 0, 0
    block_s, is_synced = BLOCK_SIZE / bandwidth, False

    def guests_write() -> None:
        nonlocal written
        while written < now * rate:
            written += 1
            dirty.add(rng.choice(hot))

    for _ in range(30):
        before, began = len(dirty) * BLOCK_SIZE, now
        for block in range(N_BLOCKS):
            if block in dirty:
                dirty.remove(block)
                n_sent += 1
                now += block_s
                guests_write()
        now += PASS_S
        guests_write()
        forecast = decider.forecast(len(dirty) * BLOCK_SIZE, bandwidth)
        if decider.after_pass(before, now - began, forecast, limit_s) is Decision.SWITCH_OVER:
            if is_synced:
                last_s = forecast.expected_downtime_s + HANDOFF_S
                return now + last_s, (n_sent + len(dirty)) * BLOCK_SIZE, last_s
            is_synced = True
    return None


@pytest.mark.parametrize("n_hot", [N_BLOCKS // 20, N_BLOCKS // 4, N_BLOCKS])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_forecast_is_what_happens(n_hot: int, share: float) -> None:
    """Time and bytes within a few percent, downtime within some blocks, for guests slower than the link."""
    bandwidth = 400.0 * BLOCK_SIZE
    rate = round(400 * share)
    plan = Plan(
        [random_writes(rate * BLOCK_SIZE, n_hot * BLOCK_SIZE, N_BLOCKS * BLOCK_SIZE)],
        N_BLOCKS * BLOCK_SIZE,
        bandwidth,
        downtime_limit_s=0.3,
    )
    found = predict(plan)
    happened = [play(rate, n_hot, bandwidth, 0.3, seed) for seed in range(5)]
    times, sizes, lasts = zip(*(one for one in happened if one is not None), strict=True)
    assert found.converges
    assert len(times) == 5
    assert found.duration_s == pytest.approx(sum(times) / 5, rel=0.07)
    assert found.sent_bytes == pytest.approx(sum(sizes) / 5, rel=0.07)
    assert found.downtime_s == pytest.approx(sum(lasts) / 5, abs=0.12)


@pytest.mark.parametrize(("n_hot", "converges"), [(60, True), (N_BLOCKS // 4, False), (N_BLOCKS, False)])
def test_guests_faster_than_the_link(n_hot: int, converges: bool) -> None:
    """A hot set that fits the downtime limit is no obstacle at any rate; a larger one does not converge."""
    bandwidth, rate = 400.0 * BLOCK_SIZE, 1600
    curve = random_writes(rate * BLOCK_SIZE, n_hot * BLOCK_SIZE, N_BLOCKS * BLOCK_SIZE)
    found = predict(Plan([curve], N_BLOCKS * BLOCK_SIZE, bandwidth, downtime_limit_s=0.3))
    assert found.converges == converges == (play(rate, n_hot, bandwidth, 0.3, 1) is not None)


def test_an_idle_disk() -> None:
    """Its bytes once, three passes of which two are empty, and the hand-off."""
    found = predict(Plan([WorkingSet(0.0, 1.0, [0.0], MIB)], 100.0 * MIB, 100.0 * MIB))
    assert found.converges
    assert found.sent_bytes == 100 * MIB
    assert found.downtime_s == HANDOFF_S
    assert found.duration_s == pytest.approx(1.0, abs=0.1)


def test_a_pass_comes_by_a_block_at_any_moment_of_it() -> None:
    """200 MiB that are all dirty after a second: a pass of two leaves the mean of 100, in the first, and of 200."""
    curve = WorkingSet(200.0 * MIB, 1.0, [200.0 * MIB] * 128, 200.0 * MIB)
    found = predict(Plan([curve], 200.0 * MIB, 100.0 * MIB))
    assert not found.converges
    assert found.downtime_s == pytest.approx(1.5 + HANDOFF_S, abs=0.01)


def test_what_is_left_of_a_running_pass_counts() -> None:
    """In the middle of the bulk phase half of its time is left; what follows is the same."""
    curve = random_writes(10.0 * MIB, 1024.0 * MIB, 1024.0 * MIB)
    whole = predict(Plan([curve], 1000.0 * MIB, 100.0 * MIB))
    half = predict(Plan([curve], 500.0 * MIB, 100.0 * MIB, elapsed_s=5.0))
    assert whole.duration_s - half.duration_s == pytest.approx(5.0, abs=0.1)
    assert half.downtime_s == pytest.approx(whole.downtime_s)


def test_a_rest_that_is_hot_is_shortened_by_two_passes_to_a_window() -> None:
    """A hot set that is written over and over leaves 60 ms of the link; with mirroring 20 are left, later."""
    curve = random_writes(400.0 * MIB, 8.0 * MIB, 1024.0 * MIB)
    plan = Plan([curve], 100.0 * MIB, 100.0 * MIB)
    plain, shortened = predict(plan), predict(replace(plan, shortening_lag=DEFAULT_LAG))
    rest_s = plain.downtime_s - HANDOFF_S
    assert rest_s == pytest.approx(0.06, abs=0.003)
    assert shortened.downtime_s == pytest.approx(0.02 + HANDOFF_S, abs=0.001)
    assert shortened.n_passes == plain.n_passes + 2
    later_s = (rest_s + 0.02) / (1 - MIRROR_SHARE) + 2 * PASS_S  # guests have their share of the link meanwhile
    assert shortened.duration_s - plain.duration_s == pytest.approx(later_s - (rest_s - 0.02), abs=0.02)


def test_a_rest_in_new_places_is_shortened_by_four_passes() -> None:
    """What is hot is not enough where guests write where they have not written."""
    curve = WorkingSet(90.0 * MIB, 1.0, [90.0 * MIB * n for n in range(1, 100)], 1e12)
    plan = Plan([curve], 100.0 * MIB, 100.0 * MIB)
    plain, shortened = predict(plan), predict(replace(plan, shortening_lag=DEFAULT_LAG))
    assert plain.downtime_s > 0.1
    assert shortened.downtime_s == pytest.approx(0.02 + HANDOFF_S, abs=0.001)
    assert shortened.n_passes == plain.n_passes + 4


def test_a_rest_that_is_small_is_not_shortened() -> None:
    """Nor is what does not converge."""
    little = Plan([random_writes(100.0 * MIB, 2.0 * MIB, 1024.0 * MIB)], 100.0 * MIB, 100.0 * MIB)
    much = Plan([random_writes(400.0 * MIB, 100.0 * MIB, 1024.0 * MIB)], 100.0 * MIB, 100.0 * MIB)
    for plan in (little, much):
        assert predict(replace(plan, shortening_lag=DEFAULT_LAG)) == predict(plan)


def test_the_last_pass_is_not_held_back() -> None:
    """--max-bandwidth makes passes slow, and not the switchover."""
    curve = random_writes(5.0 * MIB, 64.0 * MIB, 1024.0 * MIB)
    free = predict(Plan([curve], 100.0 * MIB, 100.0 * MIB))
    held = predict(Plan([curve], 100.0 * MIB, 100.0 * MIB, max_bandwidth=10.0 * MIB))
    assert held.duration_s > 9 * free.duration_s / 1.2
    assert held.downtime_s < free.downtime_s + 0.1


CURVES = st.builds(random_writes, st.floats(1e3, 1e9), st.floats(1e4, 1e10), st.just(1e10), st.integers(1, 128))


@given(st.lists(CURVES, min_size=1, max_size=3), st.floats(0, 1e11), st.floats(1e4, 1e10), st.floats(0.001, 10))
def test_any_plan_has_an_answer_and_its_remedies_are_true(
    curves: list[WorkingSet], send_bytes: float, bandwidth: float, limit_s: float
) -> None:
    """A prediction keeps the limit, and each remedy converges by itself while clearly less of it does not."""
    plan = Plan(curves, send_bytes, bandwidth, downtime_limit_s=limit_s)
    found, shortened = predict(plan), predict(replace(plan, shortening_lag=DEFAULT_LAG))
    assert shortened.converges == found.converges
    assert shortened.downtime_s <= found.downtime_s
    assert shortened.duration_s >= found.duration_s - found.downtime_s
    if found.converges:
        assert found.downtime_s <= limit_s + HANDOFF_S + 1e-9
        assert found.sent_bytes >= send_bytes
        assert found.duration_s >= send_bytes / bandwidth
        return
    written = sum(curve.write_rate for curve in curves)
    for remedy in remedies(plan):
        value = remedy.value
        if remedy.kind in (RemedyKind.MIRROR, RemedyKind.POSTCOPY):
            continue  # these are other ways than passes
        cured, less = {
            RemedyKind.BANDWIDTH: (replace(plan, bandwidth=value), replace(plan, bandwidth=value / 1.2)),
            RemedyKind.DOWNTIME_LIMIT: (
                replace(plan, downtime_limit_s=value),
                replace(plan, downtime_limit_s=value / 1.2),
            ),
            RemedyKind.THROTTLE: (replace(plan, speed=value / written), replace(plan, speed=1.2 * value / written)),
        }[remedy.kind]
        assert predict(cured).converges
        is_noticeable = {
            RemedyKind.BANDWIDTH: value > 1.3 * bandwidth,
            RemedyKind.DOWNTIME_LIMIT: value > 1.3 * limit_s,
            RemedyKind.THROTTLE: 1.3 * value < written,
        }[remedy.kind]
        assert not is_noticeable or not predict(less).converges


def test_a_longer_limit_than_the_freeze_deadline_does_not_help() -> None:
    """What would take longer than the freeze may, is never offered nor counted on."""
    curve = random_writes(1000.0 * MIB, 1000.0 * MIB, 10_000.0 * MIB)
    plan = Plan([curve], 10_000.0 * MIB, 100.0 * MIB, downtime_limit_s=60.0)
    assert not predict(plan).converges
    assert {remedy.kind for remedy in remedies(replace(plan, downtime_limit_s=0.3))} == {
        RemedyKind.BANDWIDTH,
        RemedyKind.THROTTLE,
        RemedyKind.MIRROR,
        RemedyKind.POSTCOPY,
    }


def other_ways(plan: Plan) -> dict[RemedyKind, float]:
    return {one.kind: one.value for one in remedies(plan) if one.kind in (RemedyKind.MIRROR, RemedyKind.POSTCOPY)}


def test_what_mirroring_and_post_copy_cost() -> None:
    """Mirroring leaves guests their share of what passes may use; post-copy takes what the whole link needs."""
    curve = random_writes(1000.0 * MIB, 1000.0 * MIB, 10_000.0 * MIB)
    plan = Plan([curve], 10_000.0 * MIB, 100.0 * MIB)
    assert other_ways(plan) == {RemedyKind.MIRROR: MIRROR_SHARE * 100 * MIB, RemedyKind.POSTCOPY: 100.0}
    held = replace(plan, max_bandwidth=10.0 * MIB)
    assert other_ways(held) == {RemedyKind.MIRROR: MIRROR_SHARE * 10 * MIB, RemedyKind.POSTCOPY: 100.0}


def test_mirroring_slows_nobody_who_writes_less_than_its_share() -> None:
    """Guests that miss the limit by a little only are said to write on as they do."""
    curve = random_writes(78.0 * MIB, 1000.0 * MIB, 10_000.0 * MIB)
    plan = Plan([curve], 1000.0 * MIB, 100.0 * MIB, downtime_limit_s=0.003)
    assert not predict(plan).converges
    assert other_ways(plan)[RemedyKind.MIRROR] == curve.write_rate


def test_a_limit_below_the_least_window_is_not_met_by_mirroring() -> None:
    """256 KiB may be missing in any case: on a link that needs longer for them than the limit it is not offered."""
    curve = random_writes(100.0 * MIB, 1000.0 * MIB, 10_000.0 * MIB)
    plan = Plan([curve], 1000.0 * MIB, 1.0 * MIB, downtime_limit_s=0.2)
    assert other_ways(plan).keys() == {RemedyKind.POSTCOPY}
    assert RemedyKind.MIRROR in other_ways(replace(plan, downtime_limit_s=0.3))
