"""The phases of a migration and what they are called in QMP.

    NONE ─> SETUP ─> BULK ─> DIRTY ─┬─> PRE_SWITCHOVER ─┐
                                    └──────────────────>┴─> FROZEN ─> COMMITTED ─> COMPLETED
    FROZEN ─> PLEDGED ─> COMMITTED     of a group: it is decided for all (`fusemig.core.group`); or FAILED, or IN_DOUBT
    any before COMMITTED ─> CANCELLING ─> CANCELLED           COMMITTED ─> IN_DOUBT
    any before COMMITTED ─> FAILED                            IN_DOUBT ─> COMPLETED, FAILED (once that is known)
    COMMITTED ─> POSTCOPY ─> COMPLETED
    FROZEN ─> DIRTY       the destination was lost in the switchover; the guests go on, and so do passes
    NONE ─> POSTCOPY, IN_DOUBT, COMPLETED, FAILED      what a successor finds of a migration that its predecessor ran

Rule: from COMMITTED on the source never thaws by itself, and in PLEDGED only when that is decided; before them, every
way out thaws. `TRANSITIONS` is the whole
truth and `PhaseMachine` refuses anything else.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from fusemig.errors import StateError


class MigrationPhase(Enum):
    """Where a migration is, seen from the source."""

    NONE = "none"
    """None has been asked for."""
    SETUP = "setup"
    """Connecting, handshake, finding allocated chunks."""
    BULK = "bulk"
    """First pass over all allocated chunks, disk by disk."""
    DIRTY = "dirty"
    """Passes over what guests wrote meanwhile."""
    PRE_SWITCHOVER = "pre-switchover"
    """Converged; passes go on until `migrate-continue` (capability `pause-before-switchover`)."""
    FROZEN = "frozen"
    """The write gate is closed: last dirty blocks, digests."""
    PLEDGED = "pledged"
    """As FROZEN, and the destination is prepared: what becomes of the disks is the group's to decide."""
    COMMITTED = "committed"
    """HANDOFF is durable and COMMIT is on its way: the source waits for TAKEN."""
    POSTCOPY = "postcopy"
    """The destination owns the disks and fetches from the source what it lacks; both hosts are needed until it ends."""
    COMPLETED = "completed"
    """The destination owns the disks."""
    FAILED = "failed"
    """Over without a hand-off; the source serves on."""
    CANCELLING = "cancelling"
    """Cancelled by request, cleaning up."""
    CANCELLED = "cancelled"
    """Over by request; the source serves on."""
    IN_DOUBT = "in-doubt"
    """COMMIT was sent and no TAKEN came: read-only until it is known who owns the disks."""


_P = MigrationPhase
_BEFORE_COMMIT: Final = (_P.SETUP, _P.BULK, _P.DIRTY, _P.PRE_SWITCHOVER, _P.FROZEN)

TRANSITIONS: Final[dict[MigrationPhase, frozenset[MigrationPhase]]] = {
    _P.NONE: frozenset({_P.SETUP, _P.POSTCOPY, _P.IN_DOUBT, _P.COMPLETED, _P.FAILED}),
    _P.SETUP: frozenset({_P.BULK}),
    _P.BULK: frozenset({_P.DIRTY, _P.FROZEN, _P.PRE_SWITCHOVER}),
    _P.DIRTY: frozenset({_P.PRE_SWITCHOVER, _P.FROZEN}),
    _P.PRE_SWITCHOVER: frozenset({_P.FROZEN}),
    _P.FROZEN: frozenset({_P.PLEDGED, _P.COMMITTED, _P.DIRTY}),
    _P.PLEDGED: frozenset({_P.COMMITTED, _P.FAILED, _P.IN_DOUBT}),
    _P.COMMITTED: frozenset({_P.COMPLETED, _P.IN_DOUBT, _P.POSTCOPY}),
    _P.POSTCOPY: frozenset({_P.COMPLETED}),
    _P.CANCELLING: frozenset({_P.CANCELLED}),
    _P.IN_DOUBT: frozenset({_P.COMPLETED, _P.FAILED}),
    _P.COMPLETED: frozenset(),
    _P.FAILED: frozenset(),
    _P.CANCELLED: frozenset(),
}

SENDING: Final = (_P.BULK, _P.DIRTY, _P.PRE_SWITCHOVER)
"""Passes are made, and no guest waits for them to end."""

OVER: Final = frozenset({_P.COMPLETED, _P.FAILED, _P.CANCELLED, _P.IN_DOUBT})
"""Nothing more happens in these by itself."""

QMP_STATUS: Final[dict[MigrationPhase, str]] = {
    _P.NONE: "none",
    _P.SETUP: "setup",
    _P.BULK: "active",
    _P.DIRTY: "active",
    _P.PRE_SWITCHOVER: "pre-switchover",
    _P.FROZEN: "device",
    _P.PLEDGED: "device",
    _P.COMMITTED: "device",
    _P.POSTCOPY: "postcopy-active",
    _P.COMPLETED: "completed",
    _P.FAILED: "failed",
    _P.CANCELLING: "cancelling",
    _P.CANCELLED: "cancelled",
    # QAPI has no word for it. "failed" is what a client must act on; x-fusemig and the run state say the rest.
    _P.IN_DOUBT: "failed",
}
"""MigrationStatus of QEMU's qapi/migration.json for each phase."""


class PhaseMachine:
    """Holds the phase and allows only the transitions of the table."""

    def __init__(self) -> None:
        """Start at NONE."""
        self.phase = MigrationPhase.NONE

    def enter(self, phase: MigrationPhase) -> None:
        """Go to ``phase``.

        Raises:
            StateError: the table has no such transition.
        """
        allowed = TRANSITIONS[self.phase]
        if self.phase in _BEFORE_COMMIT:
            allowed |= {_P.CANCELLING, _P.FAILED}
        elif self.phase is _P.CANCELLING:
            allowed |= {_P.FAILED}
        if phase not in allowed:
            raise StateError(f"a migration cannot go from {self.phase.value} to {phase.value}")
        self.phase = phase

    @property
    def may_cancel(self) -> bool:
        """Whether the hand-off can still be called off."""
        return self.phase in _BEFORE_COMMIT

    @property
    def is_over(self) -> bool:
        """Whether nothing more happens by itself."""
        return self.phase in OVER
