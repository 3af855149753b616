"""The hand-off of two disks, model-checked: every order of steps, lost messages, crashes, restarts and failed writes.

A state holds what is durable on both sides, where the two processes are, and every byte under way. A step of either
process, one durable write of one disk, the arrival of one message, the loss of a connection, a crash and a restart are
all steps of their own, taken in every order. What the sides conclude is not modelled again: `evidence_of`, `judge`,
`settled` and `resolved` are called.

A durable write may fail and be stored all the same; a process then does what `fusemig.migration.commit` does.
"""

from __future__ import annotations

from collections import defaultdict
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from fusemig.core.handoff import SourceState, Verdict, judge, settled
from fusemig.records.epoch import EpochRecord, Ownership, Side, evidence_of, resolved

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fusemig.core.handoff import Evidence

O = Ownership  # noqa: E741
N = 2
"""Disks that move together: that they are two is what makes half of something possible."""
EPOCH = 4


class Source(Enum):
    """Where the source's process is."""

    DOWN = "down"
    SERVING = "serving, not migrating"
    SENT = "FINAL sent"
    HANDING_OFF = "PREPARED received, writing `handed-off`"
    UNDOING = "that failed: writing `owner`"
    FORGETTING = "that failed too: ABORT sent, waiting for ABORT"
    THAWED = "called off; guests write"
    COMMITTED = "COMMIT sent"
    RELEASING = "TAKEN received, writing `released`"
    DOUBT = "in doubt, not asking"
    ASKED = "ASK sent"
    TOLD = "COMMIT or ABORT sent after ANSWER"
    SETTLING = "the last ANSWER received, writing what follows"


class Destination(Enum):
    """Where the destination's process is."""

    DOWN = "down"
    IDLE = "waiting for a source"
    RECEIVING = "on the migration's connection, HELLO heard"
    PREPARING = "FINAL received, writing `prepared`"
    PREPARED = "PREPARED sent"
    TAKING = "COMMIT received, writing `owner`"
    FORGETTING = "ABORT received, writing `incoming`"
    ANSWERED = "ANSWER sent on a connection of its own"
    TAKING_LATE = "COMMIT received after ANSWER, writing `owner`"
    FORGETTING_LATE = "ABORT received after ANSWER, writing `incoming`"


class World(NamedTuple):
    """Everything at one moment."""

    source: Source
    destination: Destination
    here: tuple[Ownership, ...]
    """Durable at the source. A disk taken back is OWNER too: `epochs` tells."""
    epochs: tuple[int, ...]
    there: tuple[Ownership, ...]
    """Durable at the destination."""
    believed: tuple[Ownership, ...] | None
    """What the source's process goes by, where a failed write makes it differ from what is durable."""
    forth: tuple[str, ...]
    back: tuple[str, ...]
    """What is under way on the connection that both ends are on."""
    is_linked: bool
    stale: tuple[str, ...]
    """What the destination has still to read of a connection whose source is gone."""
    answer: tuple[Evidence, ...]
    is_taken: bool
    has_thawed: bool
    """Whether a guest may have written at the source after FINAL: what is prepared is not the disk any more."""
    has_failed: bool
    """One failing epoch file is enough."""


START = World(
    source=Source.SENT,
    destination=Destination.RECEIVING,
    here=(O.OWNER,) * N,
    epochs=(EPOCH,) * N,
    there=(O.INCOMING,) * N,
    believed=None,
    forth=("FINAL",),
    back=(),
    is_linked=True,
    stale=(),
    answer=(),
    is_taken=False,
    has_thawed=False,
    has_failed=False,
)


def record(state: Ownership, epoch: int) -> EpochRecord:
    """Return an epoch file's record in this migration."""
    return EpochRecord(state=state, image_id="d15c", epoch=epoch, session="5e55", peer="there", group=N)


@cache
def says(there: tuple[Ownership, ...]) -> tuple[Evidence, ...]:
    """Return what the destination answers."""
    return tuple(evidence_of(record(s, EPOCH + 1), session="5e55", image_id="d15c", epoch=EPOCH) for s in there)


def put(states: tuple[Ownership, ...], index: int, new: Ownership) -> tuple[Ownership, ...]:
    return (*states[:index], new, *states[index + 1 :])


def first_but(states: tuple[Ownership, ...], wanted: Ownership) -> int | None:
    """Return the first disk that is not yet as wanted."""
    return next((index for index, state in enumerate(states) if state is not wanted), None)


def unlinked(w: World, **changes: object) -> World:
    """Return the world with its connection gone; what the destination did not read may still be read."""
    stale = w.forth if w.destination in ON_CONNECTION else ()
    return w._replace(is_linked=False, forth=(), back=(), stale=stale, **changes)  # type: ignore[arg-type]


ON_CONNECTION = frozenset(
    {
        Destination.RECEIVING,
        Destination.PREPARING,
        Destination.PREPARED,
        Destination.TAKING,
        Destination.FORGETTING,
        Destination.ANSWERED,
        Destination.TAKING_LATE,
        Destination.FORGETTING_LATE,
    }
)


def source_steps(w: World) -> Iterator[World]:
    s, here = w.source, w.believed or w.here
    if s is Source.DOWN:
        in_doubt = O.HANDED_OFF in w.here
        may_write = O.OWNER in w.here
        yield w._replace(
            source=Source.DOUBT if in_doubt else Source.SERVING,
            believed=None,
            has_thawed=w.has_thawed or may_write,
        )
        return
    # A crash, at any moment.
    yield unlinked(w, source=Source.DOWN, believed=None, answer=(), is_taken=False)
    if s is Source.SENT or (s is Source.HANDING_OFF and here == (O.OWNER,) * N):
        # Cancelled, timed out, connection lost: thaws, and says so or not.
        yield unlinked(w, source=Source.THAWED, has_thawed=True)
        if w.is_linked:
            yield w._replace(source=Source.THAWED, has_thawed=True, forth=(*w.forth, "ABORT"))
    if s is Source.SENT and w.back[:1] == ("PREPARED",):
        yield w._replace(source=Source.HANDING_OFF, back=w.back[1:])
    if s is Source.HANDING_OFF:
        index = first_but(w.here, O.HANDED_OFF)
        if index is None:
            # On the connection or into the void: it is not known before COMMIT is sent.
            yield w._replace(source=Source.COMMITTED, forth=(*w.forth, "COMMIT") if w.is_linked else ())
        else:
            yield w._replace(here=put(w.here, index, O.HANDED_OFF))
            if not w.has_failed:  # fails, stored or not
                yield w._replace(source=Source.UNDOING, has_failed=True)
                yield w._replace(source=Source.UNDOING, has_failed=True, here=put(w.here, index, O.HANDED_OFF))
    if s is Source.UNDOING:
        yield unlinked(w, source=Source.THAWED, here=(O.OWNER,) * N, has_thawed=True)
        # It fails once more, with any of the files written or not.
        if w.is_linked:
            yield w._replace(source=Source.FORGETTING, forth=(*w.forth, "ABORT"))
        yield unlinked(w, source=Source.DOUBT, believed=(O.HANDED_OFF,) * N)
    if s is Source.FORGETTING:
        if "ABORT" in w.back:
            yield unlinked(w, source=Source.THAWED, believed=(O.OWNER,) * N, has_thawed=True)
        yield unlinked(w, source=Source.DOUBT, believed=(O.HANDED_OFF,) * N)
    if s is Source.COMMITTED:
        if w.back[:1] == ("TAKEN",):
            yield w._replace(source=Source.RELEASING, back=w.back[1:])
        yield unlinked(w, source=Source.DOUBT)
    if s is Source.RELEASING:
        index = first_but(w.here, O.RELEASED)
        if index is None:
            yield unlinked(w, source=Source.SERVING)
        else:
            yield w._replace(here=put(w.here, index, O.RELEASED))
    if s is Source.DOUBT and not w.is_linked and w.destination is Destination.IDLE:
        yield w._replace(source=Source.ASKED, is_linked=True, forth=("ASK",), back=(), stale=())
    if s is Source.ASKED and w.back[:1] == ("ANSWER",):
        asked = [index for index, state in enumerate(here) if state is O.HANDED_OFF]
        heard = w.answer
        is_whole = all(state in (O.HANDED_OFF, O.RELEASED) for state in here)
        verdict = judge([heard[index] for index in asked], is_whole=is_whole, is_taken=w.is_taken)
        told = w._replace(source=Source.TOLD, back=())
        if verdict is Verdict.COMMIT:
            # `handed-off` is made durable first, where that is not certain.
            durable = tuple(O.HANDED_OFF if index in asked else state for index, state in enumerate(w.here))
            yield told._replace(forth=("COMMIT",), here=durable, believed=None)
            if w.believed is not None:
                yield unlinked(w, source=Source.DOUBT)
        elif verdict is Verdict.CALL_OFF:
            yield told._replace(forth=("ABORT",))
        else:
            yield w._replace(source=Source.SETTLING, back=())
    if s is Source.TOLD and w.back[:1] == ("ANSWER",):
        yield w._replace(source=Source.SETTLING, back=())
    if s in (Source.ASKED, Source.TOLD):
        yield unlinked(w, source=Source.DOUBT)
    if s is Source.SETTLING:
        yield from settling(w, here)


def settling(w: World, here: tuple[Ownership, ...]) -> Iterator[World]:
    asked = [index for index, state in enumerate(here) if state is O.HANDED_OFF]
    states = settled([w.answer[index] for index in asked], is_taken=w.is_taken)
    for index, state in zip(asked, states, strict=True):
        if state is SourceState.RELEASED:
            new = record(O.RELEASED, w.epochs[index])
        elif state is SourceState.TAKEN_BACK:
            new = resolved(record(O.HANDED_OFF, w.epochs[index]), Side.SOURCE)
        else:
            continue
        yield w._replace(
            here=put(w.here, index, new.state),
            believed=None if w.believed is None else put(w.believed, index, new.state),
            epochs=(*w.epochs[:index], new.epoch, *w.epochs[index + 1 :]),
            has_thawed=w.has_thawed or new.state is O.OWNER,
        )
        return
    yield unlinked(w, source=Source.DOUBT if O.HANDED_OFF in here else Source.SERVING)


def destination_steps(w: World) -> Iterator[World]:
    d, there = w.destination, w.there
    if d is Destination.DOWN:
        yield w._replace(destination=Destination.IDLE)
        return
    # A crash, at any moment; the source notices or waits for its deadline, which is one of its own steps.
    yield w._replace(destination=Destination.DOWN, is_linked=False, forth=(), back=(), stale=())
    incoming = w.forth if w.is_linked else w.stale
    head, rest = incoming[:1], incoming[1:]

    def read(**changes: object) -> World:
        taken = w._replace(forth=rest) if w.is_linked else w._replace(stale=rest)
        return taken._replace(**changes)  # type: ignore[arg-type]

    def say(world: World, word: str, **changes: object) -> World:
        back = (*world.back, word) if world.is_linked else ()
        return world._replace(back=back, **changes)  # type: ignore[arg-type]

    def leave(world: World) -> World:
        return world._replace(destination=Destination.IDLE, stale=(), is_linked=False, forth=(), back=())

    if d in ON_CONNECTION and not w.is_linked and not w.stale and d not in WRITING:
        yield leave(w)  # it has read all there was and sees the end
    if d is Destination.IDLE and head == ("ASK",):
        yield say(read(destination=Destination.ANSWERED), "ANSWER", answer=says(there), is_taken=O.OWNER in there)
    if d is Destination.RECEIVING:
        if head == ("FINAL",):
            yield read(destination=Destination.PREPARING)
        if head == ("ABORT",):
            yield leave(say(read(), "ABORT"))
    if d is Destination.PREPARING:
        index = first_but(there, O.PREPARED)
        if index is None:
            yield say(w, "PREPARED", destination=Destination.PREPARED)
        else:
            yield w._replace(there=put(there, index, O.PREPARED))
    if d is Destination.PREPARED:
        if head == ("COMMIT",):
            yield read(destination=Destination.TAKING)
        if head == ("ABORT",):
            yield read(destination=Destination.FORGETTING)
        if not w.is_linked:  # an idle deadline: it does not wait for what a dead connection holds
            yield leave(w)
    if d is Destination.ANSWERED and head in (("COMMIT",), ("ABORT",)):
        is_commit = head == ("COMMIT",)
        yield read(destination=Destination.TAKING_LATE if is_commit else Destination.FORGETTING_LATE)
    if d in (Destination.TAKING, Destination.TAKING_LATE):
        index = first_but(there, O.OWNER)
        if index is not None:
            yield w._replace(there=put(there, index, O.OWNER))
            yield leave(w)  # the epoch file cannot be written: nobody is told anything
        elif d is Destination.TAKING:
            yield say(w, "TAKEN", destination=Destination.PREPARED)
        else:
            yield say(w, "ANSWER", destination=Destination.ANSWERED, answer=says(there), is_taken=True)
    if d in (Destination.FORGETTING, Destination.FORGETTING_LATE):
        index = first_but(there, O.INCOMING)
        if index is not None:
            yield w._replace(there=put(there, index, O.INCOMING))
            yield leave(w)
        elif d is Destination.FORGETTING:
            yield say(w, "ABORT", destination=Destination.RECEIVING)
        else:
            yield say(w, "ANSWER", destination=Destination.ANSWERED, answer=says(there), is_taken=False)


WRITING = frozenset(
    {
        Destination.PREPARING,
        Destination.TAKING,
        Destination.FORGETTING,
        Destination.TAKING_LATE,
        Destination.FORGETTING_LATE,
    }
)


def steps(w: World) -> Iterator[World]:
    """Return every world that one step leads to."""
    yield from source_steps(w)
    yield from destination_steps(w)
    if w.is_linked:  # the connection is lost, with what was under way
        yield w._replace(is_linked=False, forth=(), back=(), stale=())
        yield w._replace(is_linked=False, forth=(), back=(), stale=w.forth)


def explore(start: World = START) -> dict[World, list[World]]:
    """Return every world that can come to be, each with those that lead to it."""
    leading: dict[World, list[World]] = defaultdict(list)
    leading[start] = []
    frontier = [start]
    while frontier:
        w = frontier.pop()
        for new in steps(w):
            if new not in leading:
                frontier.append(new)
            leading[new].append(w)
    return leading


def may_write_here(w: World, index: int) -> bool:
    """Whether guests may write at the source, or may once it is started again."""
    return w.here[index] is O.OWNER


def is_settled(w: World) -> bool:
    """Whether each disk has one owner, and the source knows it."""
    return w.source in (Source.SERVING, Source.THAWED) and all(
        (here, there) == (O.RELEASED, O.OWNER) or (here is O.OWNER and there is not O.OWNER)
        for here, there in zip(w.here, w.there, strict=True)
    )


def violations(worlds: dict[World, list[World]]) -> list[str]:
    """Return what is wrong in each world, by itself."""
    found = []
    for w in worlds:
        for index in range(N):
            if may_write_here(w, index) and w.there[index] is O.OWNER:
                found.append(f"two writers: {w}")
            if w.there[index] is O.OWNER and w.has_thawed and w.here[index] is not O.RELEASED:
                found.append(f"a write after FINAL is lost: {w}")
            if w.here[index] is O.RELEASED and w.there[index] is not O.OWNER:
                found.append(f"released, and taken by nobody: {w}")
        if {O.OWNER, O.INCOMING} <= set(w.there):
            found.append(f"half a group was taken: {w}")
    return found


def stuck(worlds: dict[World, list[World]], is_end: Callable[[World], bool]) -> list[World]:
    """Return the worlds from which no way leads to an end."""
    reached = {w for w in worlds if is_end(w)}
    frontier = list(reached)
    while frontier:
        for former in worlds[frontier.pop()]:
            if former not in reached:
                reached.add(former)
                frontier.append(former)
    return [w for w in worlds if w not in reached]


def test_every_joint_state() -> None:
    """Never two writers, never half a group, never a lost write; and from anywhere a way to one owner."""
    worlds = explore()
    print(len(worlds), "worlds")
    assert len(worlds) > 1000
    assert not violations(worlds)[:1]
    assert not stuck(worlds, is_settled)[:1]
    ends = {(w.here, w.there) for w in worlds if is_settled(w)}
    assert ((O.RELEASED,) * N, (O.OWNER,) * N) in ends
    assert ((O.OWNER,) * N, (O.INCOMING,) * N) in ends
    assert ((O.OWNER,) * N, (O.PREPARED,) * N) in ends
    assert all(here in ((O.RELEASED,) * N, (O.OWNER,) * N) for here, _ in ends), "a group was split"
