"""The move of a running guest as a state machine: where it stands, who may write its disks, and who may let it run.

    at-source ─> copying ─> standing-still ─> loading ─> loaded ─> given ─> arrived ─> at-destination
        │           │             │              │          │        └> in-doubt  └> stuck-at-destination
        └───────────┴─────────────┴──────────────┴──────────┴─> returning ─> returned
                                                                    └> stuck-at-source

The disks' hand-off (`fusemig.core.handoff`) decides: its COMMIT is `given`. The memory is moved *before* it, as far as
the destination's "loaded": from then on the source's runtime holds a guest that does not run by itself (QEMU:
``postmigrate``), so that nothing can run it on a disk that has gone, whoever dies. The other order, disks first,
would leave QEMU free to resume the guest on the read-only disk when the rest of the memory cannot be sent.

Rules: before GIVEN, every failure runs the guest at the source and nothing runs it at the destination. In GIVEN and
IN_DOUBT nothing runs it anywhere. From ARRIVED on only the destination runs it. The tables below are the whole truth.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, NamedTuple

from fusemig.errors import StateError


class Side(Enum):
    """One of the two hosts."""

    SOURCE = "source"
    DESTINATION = "destination"


class GuestState(Enum):
    """Where the guest is on its way."""

    AT_SOURCE = "at-source"
    """Nothing has been asked of its runtime; the disks are being copied."""
    COPYING = "copying"
    """It runs; its memory is being copied, and what it writes goes on being sent."""
    STANDING_STILL = "standing-still"
    """It stands still; the disks' last blocks are sent and proved."""
    LOADING = "loading"
    """The destination holds every block; the rest of the memory and the devices follow."""
    LOADED = "loaded"
    """The destination holds all of the guest and does not run it; nor does the source, unless it is told to."""
    GIVEN = "given"
    """COMMIT is said: the disks may be the destination's."""
    ARRIVED = "arrived"
    """TAKEN came: the disks are the destination's."""
    AT_DESTINATION = "at-destination"
    """The end: it runs there."""
    RETURNING = "returning"
    """Something failed: the source's runtime is being told to let it run."""
    RETURNED = "returned"
    """An end: it runs at the source."""
    STUCK_AT_SOURCE = "stuck-at-source"
    """An end: the disks are at the source and its runtime could not be made to run the guest."""
    IN_DOUBT = "in-doubt"
    """An end: it is not known who owns the disks, and nobody runs the guest."""
    STUCK_AT_DESTINATION = "stuck-at-destination"
    """An end: the disks are at the destination and its runtime could not be made to run the guest."""


class GuestEvent(Enum):
    """What moves it."""

    COPY_BEGUN = "the runtime copies the memory"
    STOOD_STILL = "the runtime says that the guest stands still"
    DISKS_PROVED = "PREPARED: the destination has proved that it holds every block"
    LOADED = "both runtimes say that the destination holds all"
    COMMITTED = "`handed-off` is durable, COMMIT is said"
    TAKEN = "TAKEN received"
    RUNS_THERE = "the destination's runtime says that the guest runs"
    RUNS_HERE = "the source's runtime says that the guest runs"
    FAILURE = "anything failed, was cancelled or timed out"


class Situation(NamedTuple):
    """What holds in a state."""

    running: Side | None
    """Where the guest runs."""
    writer: Side | None
    """Whose disks may be written, or may be again at once: None where that is not known."""
    may_run: Side | None
    """Who may be told to let the guest run."""


_S, _E, _HERE, _THERE = GuestState, GuestEvent, Side.SOURCE, Side.DESTINATION

SITUATIONS: Final = {
    _S.AT_SOURCE: Situation(_HERE, _HERE, _HERE),
    _S.COPYING: Situation(_HERE, _HERE, _HERE),
    _S.STANDING_STILL: Situation(None, _HERE, _HERE),
    _S.LOADING: Situation(None, _HERE, _HERE),
    _S.LOADED: Situation(None, _HERE, _HERE),
    _S.GIVEN: Situation(None, None, None),
    _S.ARRIVED: Situation(None, _THERE, _THERE),
    _S.AT_DESTINATION: Situation(_THERE, _THERE, _THERE),
    _S.RETURNING: Situation(None, _HERE, _HERE),
    _S.RETURNED: Situation(_HERE, _HERE, _HERE),
    _S.STUCK_AT_SOURCE: Situation(None, _HERE, _HERE),
    _S.IN_DOUBT: Situation(None, None, None),
    _S.STUCK_AT_DESTINATION: Situation(None, _THERE, _THERE),
}

TABLE: Final = {
    (_S.AT_SOURCE, _E.COPY_BEGUN): _S.COPYING,
    (_S.COPYING, _E.STOOD_STILL): _S.STANDING_STILL,
    (_S.STANDING_STILL, _E.DISKS_PROVED): _S.LOADING,
    (_S.LOADING, _E.LOADED): _S.LOADED,
    (_S.LOADED, _E.COMMITTED): _S.GIVEN,
    (_S.GIVEN, _E.TAKEN): _S.ARRIVED,
    (_S.ARRIVED, _E.RUNS_THERE): _S.AT_DESTINATION,
    (_S.RETURNING, _E.RUNS_HERE): _S.RETURNED,
    (_S.AT_SOURCE, _E.FAILURE): _S.RETURNING,
    (_S.COPYING, _E.FAILURE): _S.RETURNING,
    (_S.STANDING_STILL, _E.FAILURE): _S.RETURNING,
    (_S.LOADING, _E.FAILURE): _S.RETURNING,
    (_S.LOADED, _E.FAILURE): _S.RETURNING,
    (_S.RETURNING, _E.FAILURE): _S.STUCK_AT_SOURCE,
    (_S.GIVEN, _E.FAILURE): _S.IN_DOUBT,
    (_S.ARRIVED, _E.FAILURE): _S.STUCK_AT_DESTINATION,
}

OVER: Final = frozenset(
    {_S.AT_DESTINATION, _S.RETURNED, _S.STUCK_AT_SOURCE, _S.IN_DOUBT, _S.STUCK_AT_DESTINATION},
)
"""Nothing leads out of these."""


class GuestMachine:
    """Holds the state and allows only the transitions of the table."""

    def __init__(self) -> None:
        """Start at the source."""
        self.state = GuestState.AT_SOURCE

    def on(self, event: GuestEvent) -> None:
        """Move.

        Raises:
            StateError: the table has no such transition.
        """
        following = TABLE.get((self.state, event))
        if following is None:
            raise StateError(f"the guest's move is out of order: '{event.value}' while {self.state.value}")
        self.state = following

    @property
    def is_over(self) -> bool:
        """Whether it has come to an end, good or bad."""
        return self.state in OVER
