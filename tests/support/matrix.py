"""The fault matrix: what may go wrong, when, and how each disk may come out of it.

One table, from which `tests/property/test_fault_matrix.py` generates the runs of the simulation, and which
`docs/reliability.md` shows. Rules:

1. A cell is a fault that struck at a moment, once, or until somebody mends it. It names every outcome that is right for
   each of the two; a run with another one fails.
2. A cell that the simulation cannot play names the test that does (`shown_by`), and that test has to exist.
3. A cell without an outcome cannot happen (`NEVER`): a run that hits it all the same fails.
4. No run ends with the outcome: `support.aftermath` leads the disks to the destination from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final


class Moment(Enum):
    """When the fault strikes, in the order in which a migration gets there."""

    SETUP = "connect, handshake"
    BULK = "bulk pass"
    DIRTY = "dirty passes"
    FROZEN = "frozen, last pass"
    PREPARED = "prepared, before COMMIT"
    COMMITTED = "COMMIT said"
    TAKEN = "taken"


class Fault(Enum):
    """What goes wrong."""

    SOURCE_KILLED = "source killed (SIGKILL)"
    DESTINATION_KILLED = "destination killed (SIGKILL)"
    SOURCE_POWER = "source loses power"
    DESTINATION_POWER = "destination loses power"
    LINK_RESET = "link reset"
    LINK_STALLED = "link half-open, silent"
    LINK_SLOW = "bandwidth collapses"
    DESTINATION_FULL = "destination's store is full"
    DESTINATION_EIO = "destination's store fails (write, fdatasync)"
    SOURCE_EIO = "source's store fails (read, short read)"
    SOURCE_SYNC = "source's fdatasync fails"
    SOURCE_STATE = "source's epoch file cannot be written"
    DESTINATION_STATE = "destination's epoch file cannot be written"
    FLIPPED = "a bit of a frame is flipped"
    MANGLED = "a frame is cut, doubled or out of order"
    STRANGER = "a stranger sends garbage to the port"
    RIVAL = "a second source for the same disk"
    MISMATCH = "size differs"
    CANCELLED = "cancelled by the user"
    SOURCE_ENDED = "SIGTERM to the source"
    DESTINATION_ENDED = "SIGTERM to the destination"
    CLIENT_GONE = "a QMP client vanishes or floods"
    GUEST_BUSY = "guest writes and syncs all the time"
    HANDLER = "a handler raises; a hundred writes are parked"
    CLOCK_JUMP = "the host is suspended for an hour"


class Outcome(Enum):
    """How one disk comes out; after any restarts, from what is durable."""

    SOURCE_SERVES = "R"
    """The source is writable and misses nothing; the destination is not, and waits for the next try."""
    IN_DOUBT = "B"
    """Neither is writable by itself: the source said (or may have said) COMMIT and knows no more."""
    DESTINATION_OWNS = "T"
    """The destination is writable and holds every acknowledged byte, durably; the source is read-only."""
    COMPLETES = "C"
    """As T, and the source knows it: the fault did no harm."""


@dataclass(frozen=True)
class Cell:
    """What may come of a fault at a moment."""

    once: frozenset[Outcome] = frozenset()
    """Where it happens once."""
    lasting: frozenset[Outcome] = frozenset()
    """Where it goes on until somebody mends it."""
    shown_by: str = ""
    """A test, as ``FILE::NAME`` under ``tests``, where the simulation has nothing of what fails."""

    @property
    def outcomes(self) -> frozenset[Outcome]:
        """Every outcome that is right."""
        return self.once | self.lasting

    def allowed(self, *, is_lasting: bool) -> frozenset[Outcome]:
        """Return the outcomes that are right for a fault that lasts or not."""
        return self.lasting if is_lasting else self.once


def _cell(once: str, lasting: str | None = None, shown_by: str = "") -> Cell:
    codes = [frozenset(map(Outcome, text)) for text in (once, once if lasting is None else lasting)]
    return Cell(codes[0], codes[1], shown_by)


NEVER: Final = Cell()
_R, _C, _T = _cell("R"), _cell("C"), _cell("TC")
_BACK = _cell("C", "R")
_AGAIN = _cell("RC", "R")
"""Lost in the handshake or in the switchover: it is tried again, a few times."""
_DOUBT = _cell("BTC")


def _row(*cells: Cell) -> dict[Moment, Cell]:
    return dict(zip(Moment, cells, strict=True))


_CRASH = _row(_R, _R, _R, _R, _cell("RB"), _DOUBT, _T)
_LOST = _row(_AGAIN, _BACK, _BACK, _AGAIN, _cell("RBC", "RB"), _DOUBT, _T)
_COMMAND = "e2e/test_ends.py::test_a_command_that_is_killed_leaves_its_migration"
_CLIENT = "control/test_control.py::test_dropping_a_client_does_not_cancel_its_command"

MATRIX: Final[dict[Fault, dict[Moment, Cell]]] = {
    # A source that was killed knows no dirty map any more, and is served again with everything it had.
    Fault.SOURCE_KILLED: _CRASH,
    # A destination that died after PREPARED has said so: a source that heard it commits, and is in doubt.
    Fault.DESTINATION_KILLED: _LOST,
    Fault.SOURCE_POWER: _CRASH,
    Fault.DESTINATION_POWER: _LOST,
    Fault.LINK_RESET: _LOST,
    Fault.LINK_STALLED: _LOST,
    # A collapse just before the freeze cannot be foreseen; the freeze deadline ends it.
    Fault.LINK_SLOW: _row(_C, _C, _cell("RC"), _cell("RC"), _cell("RBC"), _cell("BTC"), _T),
    Fault.DESTINATION_FULL: _row(_R, _R, _R, _R, NEVER, NEVER, _T),
    Fault.DESTINATION_EIO: _row(NEVER, _R, _R, _R, NEVER, NEVER, _T),
    Fault.SOURCE_EIO: _row(_R, _R, _R, _R, NEVER, NEVER, NEVER),
    Fault.SOURCE_SYNC: _row(_R, _R, _R, _R, _cell("RC"), _C, NEVER),
    # A failed write of `handed-off` that is durable all the same, and cannot be taken back: read-only after a restart.
    Fault.SOURCE_STATE: _row(_R, NEVER, NEVER, NEVER, _cell("RB"), NEVER, _T),
    Fault.DESTINATION_STATE: _row(_R, NEVER, NEVER, _R, NEVER, _cell("BT"), NEVER),
    Fault.FLIPPED: _row(_AGAIN, _BACK, _BACK, _AGAIN, _cell("RBC", "RB"), _DOUBT, _T),
    # One that lasts may spare everything up to the hand-off, and then double an answer there.
    Fault.MANGLED: _row(*[_cell("RC", "RBTC")] * 3, _cell("RBC", "RBTC"), _cell("RBTC"), _DOUBT, _T),
    Fault.STRANGER: _row(*[_C] * 6, _T),
    Fault.RIVAL: _row(_C, _C, _C, _C, _C, _C, _T),
    Fault.MISMATCH: _row(_R, NEVER, NEVER, NEVER, NEVER, NEVER, NEVER),
    Fault.CANCELLED: _row(_R, _R, _R, _R, _cell("RC"), _C, _T),
    Fault.SOURCE_ENDED: _row(_R, _R, _R, _R, _cell("RBTC"), _cell("TC"), _T),
    Fault.DESTINATION_ENDED: _row(_AGAIN, _BACK, _BACK, _AGAIN, _cell("RBC", "RB"), _DOUBT, _T),
    Fault.CLIENT_GONE: _row(*[_cell("C", shown_by=_CLIENT)] * 2, *[_cell("C", shown_by=_COMMAND)] * 5),
    Fault.GUEST_BUSY: _row(_C, _C, _C, _C, _C, _C, _T),
    Fault.HANDLER: _row(
        *[_cell("C", shown_by="fuse/test_mount.py::test_an_exception_in_a_handler_is_eio_and_the_mount_survives")] * 3,
        *[_cell("C", shown_by="fuse/test_mount.py::test_many_parked_writes_do_not_starve_other_disks")] * 4,
    ),
    Fault.CLOCK_JUMP: _row(_cell("RC"), _cell("RC"), _cell("RC"), _cell("RC"), _cell("RBTC"), _DOUBT, _T),
}

assert list(MATRIX) == list(Fault)


def simulated_cells() -> list[tuple[Fault, Moment, bool]]:
    """Return what the simulation has to hit, in the order of the table; True: with a fault that lasts."""
    return [
        (fault, moment, is_lasting)
        for fault, row in MATRIX.items()
        for moment, cell in row.items()
        for is_lasting in (False, True)
        if cell.outcomes and not cell.shown_by
    ]


def _codes(outcomes: frozenset[Outcome]) -> str:
    return "".join(outcome.value for outcome in Outcome if outcome in outcomes)


def _text(cell: Cell) -> str:
    if not cell.outcomes:
        return "–"
    codes = dict.fromkeys((_codes(cell.once), _codes(cell.lasting)))
    return "/".join(codes) + ("ᵗ" if cell.shown_by else "")


def markdown() -> str:
    """Return the table as docs/reliability.md has it."""
    lines = ["| fault | " + " | ".join(moment.value for moment in Moment) + " |", "|---" * (len(Moment) + 1) + "|"]
    lines += [f"| {fault.value} | " + " | ".join(map(_text, row.values())) + " |" for fault, row in MATRIX.items()]
    return "\n".join(lines) + "\n"
