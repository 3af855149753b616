"""Outlook: what is to be expected of a migration that runs, by the model that estimates one before it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fusemig.core.forecast import Plan, predict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fusemig.core.forecast import Prediction
    from fusemig.core.shaping import MirrorLag
    from fusemig.migration.reader import OutgoingDisk
    from fusemig.migration.stats import MigrationParameters

FRESH_S: Final = 0.5
"""A prediction is good for so long, in seconds: it is asked for ten times a second."""
SETTLED_S: Final = 1.0
"""After so long in a pass, what was acknowledged a second tells how fast passes are; before, what the link carries."""


class Outlook:
    """The outlook of one migration; `begin_pass` and `look` from the loop."""

    def __init__(self, parameters: MigrationParameters) -> None:
        """Nothing is known; ``parameters`` may be changed by the caller."""
        self._parameters = parameters
        self._pass_began_at = 0.0
        self._prediction: Prediction | None = None
        self._looked_at = 0.0

    def begin_pass(self, now: float) -> None:
        """A pass begins."""
        self._pass_began_at = now
        self._prediction = None

    def look(
        self,
        now: float,
        disks: Sequence[OutgoingDisk],
        pending_bytes: int,
        bandwidth: float,
        send_rate: float,
        shortening_lag: MirrorLag | None,
    ) -> Prediction | None:
        """Return what is to be expected from ``now`` on; None as long as nothing is known of the link.

        Args:
            now: on the clock of `begin_pass`.
            disks: that move.
            pending_bytes: what is to be sent or acknowledged, of the present pass and of later ones.
            bandwidth: bytes per second that the link carries.
            send_rate: bytes per second acknowledged lately, pauses included; 0 where that says nothing.
            shortening_lag: as `Plan` has it.
        """
        if bandwidth <= 0:
            return None
        if self._prediction is not None and now - self._looked_at < FRESH_S:
            return self._prediction
        elapsed_s = now - self._pass_began_at
        rates = [float(rate) for rate in (self._parameters.max_bandwidth,) if rate > 0]
        if send_rate > 0 and elapsed_s > SETTLED_S:
            rates.append(send_rate)
        working_sets = [disk.disk.heat.working_set() for disk in disks]
        behind = sum(one.mean(0.0, elapsed_s) for one in working_sets)
        self._looked_at = now
        self._prediction = predict(
            Plan(
                working_sets,
                max(0.0, pending_bytes - behind),
                bandwidth,
                min(rates, default=0.0),
                self._parameters.downtime_limit_s,
                self._parameters.freeze_deadline_s,
                elapsed_s,
                shortening_lag=shortening_lag,
            )
        )
        return self._prediction
