"""The hand-off's two tables: each transition, and the safety of every joint state that the network can make of them."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest

from fusemig.core.handoff import (
    DESTINATION_TABLE,
    SOURCE_TABLE,
    DestinationEvent,
    DestinationHandoff,
    DestinationState,
    Evidence,
    SourceEvent,
    SourceHandoff,
    SourceState,
    Verdict,
    judge,
    settled,
)
from fusemig.errors import RemoteProtocolError

S, SE, D, DE = SourceState, SourceEvent, DestinationState, DestinationEvent

SOURCE_PATHS = {
    S.SENDING: [],
    S.FINAL_SENT: [SE.FROZEN_AND_SENT],
    S.PEER_PREPARED: [SE.FROZEN_AND_SENT, SE.PREPARED],
    S.PLEDGED: [SE.FROZEN_AND_SENT, SE.PREPARED, SE.PLEDGE_DURABLE],
    S.BOUND: [SE.FROZEN_AND_SENT, SE.PREPARED, SE.PLEDGE_DURABLE, SE.COMMIT_DECIDED],
    S.HANDED_OFF: [SE.FROZEN_AND_SENT, SE.PREPARED, SE.HANDOFF_DURABLE],
    S.RELEASED: [SE.FROZEN_AND_SENT, SE.PREPARED, SE.HANDOFF_DURABLE, SE.TAKEN],
    S.ABORTED: [SE.FAILURE],
    S.TAKEN_BACK: [SE.FROZEN_AND_SENT, SE.PREPARED, SE.HANDOFF_DURABLE, SE.CALLED_OFF],
}
DESTINATION_PATHS = {
    D.INCOMING: [],
    D.PREPARED: [DE.PREPARED_DURABLE],
    D.OWNER: [DE.PREPARED_DURABLE, DE.OWNER_DURABLE],
    D.ABORTED: [DE.FAILURE],
}


def source_at(state: SourceState) -> SourceHandoff:
    """Return a source that was led to ``state``."""
    source = SourceHandoff()
    for event in SOURCE_PATHS[state]:
        source.on(event)
    return source


def destination_at(state: DestinationState) -> DestinationHandoff:
    """Return a destination that was led to ``state``."""
    destination = DestinationHandoff()
    for event in DESTINATION_PATHS[state]:
        destination.on(event)
    return destination


@pytest.mark.parametrize(("state", "event"), itertools.product(S, SE), ids=lambda value: value.name)
def test_the_source_does_what_the_table_says(state: SourceState, event: SourceEvent) -> None:
    """What is in the table happens; all else is the peer's fault and changes nothing."""
    source = source_at(state)
    if (state, event) in SOURCE_TABLE:
        source.on(event)
        assert source.state is SOURCE_TABLE[state, event]
    else:
        with pytest.raises(RemoteProtocolError, match=f"^hand-off out of order at the source: .* while {state.value}$"):
            source.on(event)
        assert source.state is state


@pytest.mark.parametrize(("state", "event"), itertools.product(D, DE), ids=lambda value: value.name)
def test_the_destination_does_what_the_table_says(state: DestinationState, event: DestinationEvent) -> None:
    """As for the source."""
    destination = destination_at(state)
    if (state, event) in DESTINATION_TABLE:
        destination.on(event)
        assert destination.state is DESTINATION_TABLE[state, event]
    else:
        with pytest.raises(RemoteProtocolError, match=r"^hand-off out of order at the destination: "):
            destination.on(event)
        assert destination.state is state


def test_only_the_destinations_word_leads_back_from_the_handoff() -> None:
    """Once handed off the source never thaws by itself, whatever happens; an owner stays one."""
    ways = {event: new for (old, event), new in SOURCE_TABLE.items() if old in (S.HANDED_OFF, S.RELEASED)}
    assert ways == {SE.TAKEN: S.RELEASED, SE.CALLED_OFF: S.TAKEN_BACK}
    assert not [old for old, _ in DESTINATION_TABLE if old is D.OWNER]
    assert {state for state in S if not source_at(state).may_thaw} == {S.PLEDGED, S.BOUND, S.HANDED_OFF, S.RELEASED}
    ways = {event: new for (old, event), new in SOURCE_TABLE.items() if old in (S.PLEDGED, S.BOUND)}
    assert ways == {
        SE.ABORT_DECIDED: S.PEER_PREPARED,
        SE.COMMIT_DECIDED: S.BOUND,
        SE.HANDOFF_DURABLE: S.HANDED_OFF,
    }


class Joint(NamedTuple):
    """Everything that matters of one migration at one moment.

    The messages are all that were ever sent: any of them may arrive at any time, again, out of order, or never. A
    stream does less harm than that, and a cut connection is only messages that never arrive.
    """

    source: SourceState
    destination: DestinationState
    messages: frozenset[str]


def following(joint: Joint) -> set[Joint]:
    """Return every joint state that one step of either side, or one arrival, can lead to."""
    found = set()

    def source(event: SourceEvent, *sent: str) -> None:
        side = source_at(joint.source)
        try:
            side.on(event)
        except RemoteProtocolError:
            return  # a failure of its own, which FAILURE stands for where the table has it
        found.add(Joint(side.state, joint.destination, joint.messages | set(sent)))

    def destination(event: DestinationEvent, *sent: str) -> None:
        side = destination_at(joint.destination)
        try:
            side.on(event)
        except RemoteProtocolError:
            return
        found.add(Joint(joint.source, side.state, joint.messages | set(sent)))

    source(SE.FROZEN_AND_SENT, "FINAL")
    source(SE.HANDOFF_DURABLE, "COMMIT")
    # Cancelled, timed out, cut, out of order, ABORT received: at any moment, told to the destination or not.
    source(SE.FAILURE, "ABORT to destination")
    source(SE.FAILURE)
    if "PREPARED" in joint.messages:
        source(SE.PREPARED)
    if "TAKEN" in joint.messages:
        source(SE.TAKEN)
    if "FINAL" in joint.messages:
        destination(DE.PREPARED_DURABLE, "PREPARED")
        destination(DE.PREPARED_DURABLE)
    if "COMMIT" in joint.messages:
        destination(DE.OWNER_DURABLE, "TAKEN")
        destination(DE.OWNER_DURABLE)
    if joint.destination is D.INCOMING:
        destination(DE.FAILURE, "ABORT to source")
        destination(DE.FAILURE)
    if "ABORT to destination" in joint.messages:
        destination(DE.FAILURE)
    return found


def test_no_joint_state_has_two_writers() -> None:
    """Walk them all: where the source may thaw, the destination does not own the disk and never can again."""
    start = Joint(S.SENDING, D.INCOMING, frozenset())
    seen, frontier = {start}, [start]
    while frontier:
        joint = frontier.pop()
        may_source_write = source_at(joint.source).may_thaw
        if may_source_write:
            assert joint.destination is not D.OWNER, joint
            assert "COMMIT" not in joint.messages, joint
        if joint.source is S.ABORTED:
            assert "COMMIT" not in joint.messages, joint
        if joint.source is S.RELEASED:
            assert joint.destination is D.OWNER, joint
        for new in following(joint) - seen:
            seen.add(new)
            frontier.append(new)
    # The walk has seen what it is about: success, either side giving up, doubt.
    pairs = {(joint.source, joint.destination) for joint in seen}
    assert {
        (S.RELEASED, D.OWNER),
        (S.ABORTED, D.ABORTED),
        (S.ABORTED, D.PREPARED),
        (S.HANDED_OFF, D.PREPARED),
        (S.HANDED_OFF, D.OWNER),
    } <= pairs


def test_the_straight_path() -> None:
    """Five steps in turn, with the source frozen from the first to the last."""
    source, destination = SourceHandoff(), DestinationHandoff()
    source.on(SE.FROZEN_AND_SENT)
    destination.on(DE.PREPARED_DURABLE)
    source.on(SE.PREPARED)
    source.on(SE.HANDOFF_DURABLE)
    destination.on(DE.OWNER_DURABLE)
    source.on(SE.TAKEN)
    assert source.state is S.RELEASED
    assert destination.state is D.OWNER


# Judging

W, V = Evidence, Verdict


@pytest.mark.parametrize(
    ("testimonies", "is_whole", "is_taken", "verdict"),
    [
        ([W.PREPARED], True, False, V.COMMIT),
        ([W.PREPARED, W.PREPARED], True, False, V.COMMIT),
        ([W.PREPARED], False, False, V.CALL_OFF),
        ([W.PREPARED], False, True, V.COMMIT),
        ([W.OWNED, W.PREPARED], True, False, V.COMMIT),
        ([W.OWNED, W.PREPARED], False, False, V.COMMIT),
        ([W.INCOMING, W.PREPARED], True, False, V.CALL_OFF),
        ([W.UNKNOWN, W.PREPARED], True, False, V.SETTLE),
        ([W.UNKNOWN, W.PREPARED], True, True, V.COMMIT),
        ([W.UNKNOWN, W.PREPARED, W.INCOMING], True, False, V.CALL_OFF),
        ([W.OWNED, W.INCOMING, W.PREPARED], True, True, V.SETTLE),
        ([W.OWNED], True, True, V.SETTLE),
        ([W.INCOMING], True, False, V.SETTLE),
        ([W.UNKNOWN], True, False, V.SETTLE),
    ],
)
def test_what_a_source_in_doubt_says(
    testimonies: list[Evidence], is_whole: bool, is_taken: bool, verdict: Verdict
) -> None:
    """All of a group or none; what was begun is gone on with; half an answer is none."""
    assert judge(testimonies, is_whole=is_whole, is_taken=is_taken) is verdict


def test_what_settles_a_disk() -> None:
    """Owned there or never to be; anything else, and what contradicts itself, stays in doubt."""
    everything = [W.OWNED, W.PREPARED, W.INCOMING, W.UNKNOWN]
    assert settled(everything, is_taken=False) == [S.RELEASED, S.HANDED_OFF, S.HANDED_OFF, S.HANDED_OFF]
    assert settled([W.INCOMING, W.PREPARED], is_taken=False) == [S.TAKEN_BACK, S.HANDED_OFF]
    assert settled([W.INCOMING], is_taken=True) == [S.HANDED_OFF]
