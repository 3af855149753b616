"""What follows a pass, decided without a migration: without disks, a link or a guest."""

from __future__ import annotations

from fusemig.core.convergence import SMALL_REST_S, Convergence
from fusemig.migration.iteration import Iteration, NextStep
from fusemig.migration.pacer import Pacer
from fusemig.migration.stats import MigrationParameters

BANDWIDTH = 100 << 20
MUCH, LITTLE = 200 << 20, int(BANDWIDTH * SMALL_REST_S / 2)
"""What takes longer than the downtime limit, and what is not worth another pass."""


class Passes:
    """Passes of a migration of no disks."""

    def __init__(
        self, *, is_grouped: bool = False, can_mirror: bool = False, pause: bool = False, limit_s: float = 0.3
    ) -> None:
        parameters = MigrationParameters(pause_before_switchover=pause, downtime_limit_s=limit_s)
        self.convergence = Convergence()
        self.pacer = Pacer(parameters, list, lambda: BANDWIDTH, lambda _reach, _percent: None, can_mirror=can_mirror)
        self.iteration = Iteration(self.convergence, self.pacer, parameters, is_grouped=is_grouped)

    def end(self, left_bytes: int, *, is_allowed: bool = False) -> NextStep:
        """End a pass that was to send as much as it leaves."""
        self.pacer.begin_pass(left_bytes)
        forecast = self.convergence.forecast(left_bytes, BANDWIDTH)
        return self.iteration.after_pass(left_bytes, 1.0, forecast, may_switch_over=is_allowed)


async def test_passes_go_on_while_a_switchover_would_take_too_long() -> None:
    """However many there were."""
    passes = Passes()
    assert {passes.end(MUCH) for _ in range(20)} == {NextStep.AGAIN}


async def test_both_ends_sync_once_before_the_first_switchover() -> None:
    """And what guests wrote meanwhile is sent before it."""
    passes = Passes()
    assert [passes.end(LITTLE) for _ in range(3)] == [NextStep.SYNC, NextStep.SWITCH_OVER, NextStep.SWITCH_OVER]


async def test_it_waits_until_it_is_allowed() -> None:
    """Only if it has to be."""
    passes = Passes(pause=True)
    assert [passes.end(LITTLE) for _ in range(3)] == [NextStep.SYNC, NextStep.WAIT, NextStep.WAIT]
    assert passes.end(MUCH) is NextStep.AGAIN, "it does not converge any more"
    assert passes.end(LITTLE) is NextStep.WAIT


async def test_what_was_written_while_it_waited_is_synced_before_the_switchover_too() -> None:
    """Once, when it is allowed; and not where it did not wait."""
    passes = Passes(pause=True)
    assert [passes.end(LITTLE) for _ in range(4)] == [NextStep.SYNC] + [NextStep.WAIT] * 3
    assert passes.end(MUCH, is_allowed=True) is NextStep.AGAIN
    assert [passes.end(LITTLE, is_allowed=True) for _ in range(2)] == [NextStep.SYNC, NextStep.SWITCH_OVER]
    passes = Passes(pause=True)
    assert [passes.end(LITTLE, is_allowed=True) for _ in range(2)] == [NextStep.SYNC, NextStep.SWITCH_OVER]


async def test_a_group_that_is_allowed_to_switch_over_syncs_in_the_freeze() -> None:
    """The guests of its other daemons may be frozen by now, and wait no longer than their deadline."""
    passes = Passes(is_grouped=True, pause=True)
    assert [passes.end(LITTLE) for _ in range(2)] == [NextStep.SYNC, NextStep.WAIT]
    assert passes.end(LITTLE, is_allowed=True) is NextStep.SWITCH_OVER


async def test_a_group_whose_guests_wait_makes_no_pass_to_shorten_its_freeze() -> None:
    """What another pass would save here, the guests of other daemons would wait for."""
    worth_it = int(BANDWIDTH * 0.2)
    for is_grouped, step in ((True, NextStep.SYNC), (False, NextStep.AGAIN)):
        passes = Passes(is_grouped=is_grouped)
        passes.pacer.begin_pass(MUCH)
        forecast = passes.convergence.forecast(worth_it, BANDWIDTH)
        assert passes.iteration.after_pass(MUCH, 1.0, forecast, may_switch_over=True) is step


async def test_a_long_freeze_is_made_shorter_by_mirroring_first_what_is_hot_then_everything() -> None:
    """Each takes two passes: in the first the destination gets the chunks, in the second guests wait for them."""
    left = int(BANDWIDTH * 0.2)
    passes = Passes(can_mirror=True)
    assert [passes.end(left) for _ in range(6)] == [
        NextStep.SYNC,
        NextStep.AGAIN,
        NextStep.AGAIN,
        NextStep.AGAIN,
        NextStep.AGAIN,
        NextStep.SWITCH_OVER,
    ]
    passes = Passes(can_mirror=False)
    assert [passes.end(left) for _ in range(2)] == [NextStep.SYNC, NextStep.SWITCH_OVER]
