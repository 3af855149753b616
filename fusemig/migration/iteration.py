"""Iteration: decides after each pass what comes next. It makes nothing happen, but in the pacer, which it leads."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from fusemig.core.convergence import LONG_FREEZE_S, Decision

if TYPE_CHECKING:
    from fusemig.core.convergence import Convergence, Forecast
    from fusemig.migration.pacer import Pacer
    from fusemig.migration.stats import MigrationParameters


class NextStep(Enum):
    """What follows a pass."""

    AGAIN = "again"
    """Another pass."""
    SYNC = "sync"
    """Make the stores at both ends durable while the guests still run, so that the syncs of the freeze are short."""
    WAIT = "wait"
    """It has converged, and is not allowed to switch over yet: passes go on."""
    SWITCH_OVER = "switch over"


class Iteration:
    """The passes of one connection, up to the switchover."""

    def __init__(
        self, convergence: Convergence, pacer: Pacer, parameters: MigrationParameters, *, is_grouped: bool
    ) -> None:
        """The first pass has not begun.

        Args:
            convergence: whether another pass helps, by all that were made.
            pacer: mirrors and throttles where they do not.
            parameters: may be changed meanwhile.
            is_grouped: guests of other daemons wait, too, once the switchover is allowed.
        """
        self._convergence = convergence
        self._pacer = pacer
        self._parameters = parameters
        self._is_grouped = is_grouped
        self._is_synced = self._has_waited = self._is_mirrored_anew = False

    def after_pass(self, sent_bytes: int, took_s: float, forecast: Forecast, *, may_switch_over: bool) -> NextStep:
        """Decide.

        Args:
            sent_bytes: what was pending when the pass began.
            took_s: how long it took.
            forecast: of a switchover that began now.
            may_switch_over: whether it was allowed, where it has to be.
        """
        limit_s = self._parameters.downtime_limit_s
        decision = self._convergence.after_pass(sent_bytes, took_s, forecast, limit_s)
        is_over_limit = forecast.expected_downtime_s > limit_s
        self._pacer.end_pass(forecast.pending_bytes, is_over_limit=is_over_limit)
        # From `migrate-continue` on the guests of a group's other daemons wait for these disks, too.
        is_urgent = self._is_grouped and may_switch_over
        if decision is Decision.CONTINUE and (is_over_limit or not is_urgent):
            return NextStep.AGAIN
        is_waiting = self._parameters.pause_before_switchover and not may_switch_over
        # It may have waited for hours, and what was written meanwhile would be synced in the freeze. Once more will do:
        # a store that takes long would otherwise keep us here. Not where other guests are frozen until we are done.
        is_outdated = self._has_waited and not is_waiting and not self._is_grouped
        if not self._is_synced or is_outdated:
            self._is_synced, self._has_waited = True, False
            return NextStep.SYNC
        if self._is_mirrored_anew:  # the destination has the chunks now; in the next pass guests wait for them
            self._is_mirrored_anew = False
            return NextStep.AGAIN
        if forecast.expected_downtime_s > LONG_FREEZE_S and not is_waiting and not self._is_grouped:
            self._is_mirrored_anew = self._pacer.shorten_freeze()
            if self._is_mirrored_anew:
                return NextStep.AGAIN
        self._has_waited |= is_waiting
        return NextStep.WAIT if is_waiting else NextStep.SWITCH_OVER
