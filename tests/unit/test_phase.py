"""The phases: every transition there is, and none else."""

from __future__ import annotations

import itertools

import pytest

from fusemig.errors import StateError
from fusemig.phase import OVER, QMP_STATUS, MigrationPhase, PhaseMachine

P = MigrationPhase

WAY = [P.SETUP, P.BULK, P.DIRTY, P.PRE_SWITCHOVER, P.FROZEN, P.COMMITTED, P.COMPLETED]
BEFORE_COMMIT = WAY[:5]

ALLOWED = {
    (P.NONE, P.SETUP),
    (P.SETUP, P.BULK),
    (P.BULK, P.DIRTY),
    (P.BULK, P.PRE_SWITCHOVER),
    (P.BULK, P.FROZEN),
    (P.DIRTY, P.PRE_SWITCHOVER),
    (P.DIRTY, P.FROZEN),
    (P.PRE_SWITCHOVER, P.FROZEN),
    (P.FROZEN, P.COMMITTED),
    (P.FROZEN, P.DIRTY),
    (P.FROZEN, P.PLEDGED),
    *((P.PLEDGED, decided) for decided in (P.COMMITTED, P.FAILED, P.IN_DOUBT)),
    *((P.NONE, found) for found in (P.POSTCOPY, P.IN_DOUBT, P.COMPLETED, P.FAILED)),
    (P.COMMITTED, P.COMPLETED),
    (P.COMMITTED, P.IN_DOUBT),
    (P.COMMITTED, P.POSTCOPY),
    (P.POSTCOPY, P.COMPLETED),
    (P.IN_DOUBT, P.COMPLETED),
    (P.IN_DOUBT, P.FAILED),
    (P.CANCELLING, P.CANCELLED),
    (P.CANCELLING, P.FAILED),
    *((phase, end) for phase in BEFORE_COMMIT for end in (P.CANCELLING, P.FAILED)),
}
"""Written out here a second time, so that a change of the table is a decision."""

PATHS: dict[MigrationPhase, list[MigrationPhase]] = {
    P.NONE: [],
    P.CANCELLING: [P.SETUP, P.CANCELLING],
    P.CANCELLED: [P.SETUP, P.CANCELLING, P.CANCELLED],
    P.FAILED: [P.SETUP, P.FAILED],
    P.IN_DOUBT: [*WAY[:6], P.IN_DOUBT],
    P.PLEDGED: [*WAY[:5], P.PLEDGED],
    P.POSTCOPY: [*WAY[:6], P.POSTCOPY],
    **{phase: WAY[: number + 1] for number, phase in enumerate(WAY)},
}


def machine_at(phase: MigrationPhase) -> PhaseMachine:
    """Return a machine that was led to ``phase``."""
    machine = PhaseMachine()
    for step in PATHS[phase]:
        machine.enter(step)
    return machine


@pytest.mark.parametrize(("old", "new"), itertools.product(P, P), ids=lambda phase: phase.value)
def test_every_pair_of_phases(old: MigrationPhase, new: MigrationPhase) -> None:
    """What the table has is done; all else is refused with both names, and nothing has changed."""
    machine = machine_at(old)
    if (old, new) in ALLOWED:
        machine.enter(new)
        assert machine.phase is new
    else:
        with pytest.raises(StateError, match=f"^a migration cannot go from {old.value} to {new.value}$"):
            machine.enter(new)
        assert machine.phase is old


@pytest.mark.parametrize("phase", P, ids=lambda phase: phase.value)
def test_what_a_phase_means(phase: MigrationPhase) -> None:
    """Cancel only before the commit; over is over; every phase has a name in QMP."""
    machine = machine_at(phase)
    assert machine.may_cancel == (phase in BEFORE_COMMIT)
    assert machine.is_over == (phase in {P.COMPLETED, P.FAILED, P.CANCELLED, P.IN_DOUBT})
    assert machine.is_over == (phase in OVER)
    assert QMP_STATUS[phase] in {
        "none",
        "setup",
        "active",
        "pre-switchover",
        "device",
        "postcopy-active",
        "completed",
        "failed",
        "cancelling",
        "cancelled",
    }


def test_from_the_commit_on_only_a_doubt_leads_back() -> None:
    """The one path from COMMITTED to a phase in which the source serves on is that of a doubt that was settled."""
    reachable, frontier = {P.COMMITTED}, [P.COMMITTED]
    while frontier:
        here = frontier.pop()
        for old, new in ALLOWED:
            if old is here and new not in reachable:
                reachable.add(new)
                frontier.append(new)
    assert reachable == {P.COMMITTED, P.POSTCOPY, P.COMPLETED, P.IN_DOUBT, P.FAILED}
    assert {old for old, new in ALLOWED if new is P.FAILED and old in reachable} == {P.IN_DOUBT}
