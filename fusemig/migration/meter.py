"""Meter: how fast an outgoing migration sends, and how fast its guests dirty what was sent. No clock: it is told."""

from __future__ import annotations

from fusemig.core.convergence import Rate, Throughput


class Meter:
    """Of one migration, over all its connections; used by the event loop only."""

    def __init__(self) -> None:
        """Nothing was sent."""
        self._bandwidth = Throughput()
        self._sent = Rate()
        self._dirtied = Rate()
        self._busy_since = 0.0
        self.dirtied_bytes = 0
        """Bytes of blocks that guests dirtied after they had been taken for sending (or in holes)."""

    @property
    def bandwidth(self) -> float:
        """Bytes per second that the way to the destination carries while it is used."""
        return self._bandwidth.per_second

    def send_rate(self, now: float) -> float:
        """Return the bytes per second that arrived lately, pauses included."""
        return self._sent.per_second(now)

    def dirty_rate(self, now: float) -> float:
        """Return the bytes per second that were dirtied lately."""
        return self._dirtied.per_second(now)

    def begin_busy(self, now: float) -> None:
        """The link was idle, and is used from now on."""
        self._busy_since = now

    def count_sent(self, n_bytes: int, now: float) -> None:
        """So much arrived, and the link was busy with it since it was last counted or began to be busy."""
        self._sent.add(n_bytes, now)
        self._bandwidth.add(n_bytes, now - self._busy_since)
        self._busy_since = now

    def count_dirtied(self, now: float, *, pending_bytes: int, arrived_bytes: int, allocated_bytes: int) -> None:
        """Derive what guests dirtied from what is left: all that was ever to be sent, less what there was to begin."""
        dirtied = max(self.dirtied_bytes, pending_bytes + arrived_bytes - allocated_bytes)
        self._dirtied.add(dirtied - self.dirtied_bytes, now)
        self.dirtied_bytes = dirtied
