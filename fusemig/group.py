"""Groups: the disks of several daemons of one host in one switchover, all or none. The rules; pure.

Each source and its destination hand over as `fusemig.handoff` says. What is added is one *decision* for all sources of
the group, `commit` or `abort`, that can be made once and is then the same for everybody (`fusemig.decision`), and what
binds a source to it, its durable *pledge*:

    a source, pledged       decision      it may                            its record then
    in time                 none          wait                              `pledged`
    overdue, or restarted   none          propose `abort`, and look again   `pledged`
    any                     commit        hand off, and nothing else        `handed-off`
    any                     abort         take its disks back               `owner`
    any                     unreadable    neither                           `pledged`: in doubt

The coordinator proposes `commit` if every source is pledged, and `abort` at any time before: when one is out of it, or
was lost. A pledge counts for it only as told by the process that made it, in this migration: a process that failed to
make one durable lets its guests write on, and may have made it durable all the same, so what a *restarted* daemon
reads of its pledge says nothing of the destination's copy. Nobody ever waits for the coordinator.

A decision may be removed when every source has said that it is past its pledge; an undecided group whose name is never
used again needs none. docs/groups.md has the whole, and tests/property/test_group_design.py plays every order of it.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence


class Word(Enum):
    """What can be decided of a group."""

    COMMIT = "commit"
    ABORT = "abort"


class Conduct(Enum):
    """What a pledged source does next."""

    WAIT = "wait"
    PROPOSE_ABORT = "propose `abort`, and do what is decided then"
    HAND_OFF = "make `handed-off` durable, then say COMMIT"
    TAKE_BACK = "let the guests go on, here"


def conduct(word: Word | None, *, is_overdue: bool) -> Conduct:
    """Return what a pledged source does.

    Args:
        word: what is decided; None: nothing, provably.
        is_overdue: the freeze deadline has passed, the destination was lost, or the process that pledged has ended.
    """
    if word is Word.COMMIT:
        return Conduct.HAND_OFF
    if word is Word.ABORT:
        return Conduct.TAKE_BACK
    return Conduct.PROPOSE_ABORT if is_overdue else Conduct.WAIT


class Standing(Enum):
    """Where a daemon of the group is, as its coordinator sees it."""

    MOVING = "moving"
    """Passes; or between `continue` and its pledge."""
    READY = "ready"
    """It waits at pre-switchover, and is expected to fit the downtime limit."""
    PLEDGED = "pledged"
    MOVED = "moved"
    """Its disks are its destination's."""
    STAYS = "stays"
    """Its migration is over, and its disks are here."""
    DOUBTFUL = "in doubt"
    """It does not know who owns its disks."""
    LOST = "lost"
    """It does not answer any more; another process may come in its place."""


OVER: Final = frozenset({Standing.MOVED, Standing.STAYS, Standing.DOUBTFUL, Standing.LOST})
"""Nothing more is to be heard of it in this run."""
PAST: Final = frozenset({Standing.MOVED, Standing.STAYS})
"""It is pledged no more, and never will be again in this group."""


class Step(Enum):
    """What the coordinator does next."""

    WAIT = "wait"
    CONTINUE = "have all of them switch over"
    PROPOSE_COMMIT = "propose `commit`"
    PROPOSE_ABORT = "propose `abort`, and call off what can be"
    REMOVE = "remove the decision: nobody needs it any more"
    LEAVE = "end, with the decision in its place for whoever is bound by it"


def next_step(standings: Sequence[Standing], word: Word | None, *, is_continued: bool, is_called_off: bool) -> Step:
    """Return what the coordinator of a group does.

    Args:
        standings: of its daemons, at least one.
        word: what it knows to be decided.
        is_continued: it has said `continue`.
        is_called_off: the user does not want it any more.
    """
    if word is not None:
        if not OVER.issuperset(standings):
            return Step.WAIT
        return Step.REMOVE if PAST.issuperset(standings) else Step.LEAVE
    if is_called_off or not OVER.isdisjoint(standings):
        return Step.PROPOSE_ABORT
    if all(standing is Standing.PLEDGED for standing in standings):
        return Step.PROPOSE_COMMIT
    if not is_continued and all(standing is Standing.READY for standing in standings):
        return Step.CONTINUE
    return Step.WAIT
