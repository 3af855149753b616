"""The fault matrix: what may go wrong, when, and how each disk may come out of it.

One table, from which `tests/property/test_fault_matrix.py` generates the runs of the simulation, and which
`docs/reliability.md` shows. Rules:

1. A cell is a fault that struck at a moment. It names every outcome that is right; a run with another one fails.
2. A cell that the simulation cannot play names the test that does (`shown_by`), and that test has to exist.
3. A cell without an outcome cannot happen (`NEVER`): a run that hits it all the same fails.
4. Where the story goes on after what the simulation plays, the cell names the test that plays the rest (`further`).
5. What is promised for a cell and not built yet is written in it (`not_yet`) and never counted as shown.
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

    outcomes: frozenset[Outcome] = frozenset()
    shown_by: str = ""
    """A test, as ``FILE::NAME`` under ``tests``, where the simulation has nothing of what fails."""
    further: str = ""
    """The test of what follows, as above: the disk's owner is found out, or the migration is gone on with."""
    not_yet: str = ""
    """What is promised beyond the outcomes and not built yet."""


def _cell(codes: str, shown_by: str = "", further: str = "", not_yet: str = "") -> Cell:
    return Cell(frozenset(Outcome(code) for code in codes), shown_by, further, not_yet)


NEVER: Final = Cell()
_R, _C, _T = _cell("R"), _cell("C"), _cell("TC")
_OWNER = "property/test_handoff_crashes.py::test_each_death"
_RESUME = "property/test_resume_simulation.py::test_interrupted_migrations_go_on"
_ADMITTED = "e2e/test_tls.py::test_strangers_disturb_nobody"
_RESUMED = _cell("R", further=_RESUME)
_BOUND = _cell("RB", further=_OWNER)
_DOUBT = _cell("BTC", further=_OWNER)
_CLEAN = _cell("R", not_yet="a frame is not sent again alone")


def _row(*cells: Cell) -> dict[Moment, Cell]:
    return dict(zip(Moment, cells, strict=True))


_CRASH = _row(_R, _RESUMED, _RESUMED, _R, _BOUND, _DOUBT, _T)
_COMMAND = "e2e/test_ends.py::test_a_command_that_is_killed_leaves_its_migration"
_CLIENT = "control/test_control.py::test_dropping_a_client_does_not_cancel_its_command"

MATRIX: Final[dict[Fault, dict[Moment, Cell]]] = {
    # A source that was killed knows no dirty map any more, and is served again with everything it had.
    Fault.SOURCE_KILLED: _CRASH,
    # A destination that died after PREPARED has said so: a source that heard it commits, and is in doubt.
    Fault.DESTINATION_KILLED: _CRASH,
    Fault.SOURCE_POWER: _CRASH,
    Fault.DESTINATION_POWER: _CRASH,
    Fault.LINK_RESET: _CRASH,
    Fault.LINK_STALLED: _CRASH,
    # A collapse just before the freeze cannot be foreseen; the freeze deadline ends it.
    Fault.LINK_SLOW: _row(_C, _C, _cell("RC"), _cell("RC"), _cell("RBC"), _cell("BTC"), _T),
    Fault.DESTINATION_FULL: _row(
        _cell("R", not_yet="the room is not looked at before the first byte"), _RESUMED, _RESUMED, _R, NEVER, NEVER, _T
    ),
    Fault.DESTINATION_EIO: _row(NEVER, _R, _R, _R, NEVER, NEVER, _T),
    Fault.SOURCE_EIO: _row(_R, _R, _R, _R, NEVER, NEVER, NEVER),
    Fault.SOURCE_SYNC: _row(_R, _R, _R, _R, _cell("RC"), _C, NEVER),
    # A failed write of `handed-off` that is durable all the same, and cannot be taken back: read-only after a restart.
    Fault.SOURCE_STATE: _row(_R, NEVER, NEVER, NEVER, _cell("RB"), NEVER, _T),
    Fault.DESTINATION_STATE: _row(_R, NEVER, NEVER, _R, NEVER, _cell("BT", further=_OWNER), NEVER),
    Fault.FLIPPED: _row(_R, _CLEAN, _CLEAN, _CLEAN, _BOUND, _DOUBT, _T),
    Fault.MANGLED: _row(_cell("RC"), _cell("RC"), _cell("RC"), _cell("RBC"), _cell("RBTC", further=_OWNER), _DOUBT, _T),
    Fault.STRANGER: _row(*[_cell("C", further=_ADMITTED)] * 6, _T),
    Fault.RIVAL: _row(_C, _C, _C, _C, _C, _C, _T),
    Fault.MISMATCH: _row(_R, NEVER, NEVER, NEVER, NEVER, NEVER, NEVER),
    Fault.CANCELLED: _row(_R, _R, _R, _R, _cell("RC"), _C, _T),
    Fault.SOURCE_ENDED: _row(_R, _R, _R, _R, _cell("RBTC"), _cell("TC"), _T),
    Fault.DESTINATION_ENDED: _row(_R, _RESUMED, _RESUMED, _R, _BOUND, _DOUBT, _T),
    Fault.CLIENT_GONE: _row(*[_cell("C", _CLIENT)] * 2, *[_cell("C", _COMMAND)] * 5),
    Fault.GUEST_BUSY: _row(_C, _C, _C, _C, _C, _C, _T),
    Fault.HANDLER: _row(
        *[_cell("C", "fuse/test_mount.py::test_an_exception_in_a_handler_is_eio_and_the_mount_survives")] * 3,
        *[_cell("C", "fuse/test_mount.py::test_many_parked_writes_do_not_starve_other_disks")] * 4,
    ),
    Fault.CLOCK_JUMP: _row(_cell("RC"), _cell("RC"), _cell("RC"), _cell("RC"), _cell("RBTC"), _DOUBT, _T),
}

assert list(MATRIX) == list(Fault)


def simulated_cells() -> list[tuple[Fault, Moment]]:
    """Return the cells that the simulation has to hit, in the order of the table."""
    return [
        (fault, moment)
        for fault, row in MATRIX.items()
        for moment, cell in row.items()
        if cell.outcomes and not cell.shown_by
    ]


def markdown() -> str:
    """Return the table as docs/reliability.md has it."""
    lines = ["| fault | " + " | ".join(moment.value for moment in Moment) + " |", "|---" * (len(Moment) + 1) + "|"]
    for fault, row in MATRIX.items():
        cells = ["".join(o.value for o in Outcome if o in cell.outcomes) or "–" for cell in row.values()]
        marks = ["°" * bool(cell.further) + "*" * bool(cell.not_yet) for cell in row.values()]
        shown = ["ᵗ" if cell.shown_by else "" for cell in row.values()]
        texts = [cell + mark + test for cell, mark, test in zip(cells, marks, shown, strict=True)]
        lines.append(f"| {fault.value} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"
