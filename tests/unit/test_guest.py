"""The guest's table: each transition, and what holds in every state that it and the disks' hand-off can be in."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from fusemig.core.guest import OVER, SITUATIONS, TABLE, GuestEvent, GuestMachine, GuestState, Side
from fusemig.core.handoff import SourceEvent, SourceHandoff, SourceState
from fusemig.errors import RemoteProtocolError, StateError

S, E, SE = GuestState, GuestEvent, SourceEvent

BEFORE_COMMIT = {S.AT_SOURCE, S.COPYING, S.STANDING_STILL, S.LOADING, S.LOADED}
STRAIGHT = [E.COPY_BEGUN, E.STOOD_STILL, E.DISKS_PROVED, E.LOADED, E.COMMITTED, E.TAKEN, E.RUNS_THERE]
DOCUMENT = Path(__file__).parents[2] / "docs" / "guest.md"


def machine_at(state: GuestState) -> GuestMachine:
    """Return a machine that stands in ``state``."""
    machine = GuestMachine()
    machine.state = state
    return machine


def reachable(start: GuestState) -> set[GuestState]:
    """Return every state that events can lead to from ``start``."""
    found, frontier = {start}, [start]
    while frontier:
        state = frontier.pop()
        for (old, _), new in TABLE.items():
            if old is state and new not in found:
                found.add(new)
                frontier.append(new)
    return found


@pytest.mark.parametrize(("state", "event"), itertools.product(S, E), ids=lambda value: value.name)
def test_it_does_what_the_table_says(state: GuestState, event: GuestEvent) -> None:
    """What is in the table happens; all else is refused and changes nothing."""
    machine = machine_at(state)
    if (state, event) in TABLE:
        machine.on(event)
        assert machine.state is TABLE[state, event]
    else:
        with pytest.raises(StateError, match=f"^the guest's move is out of order: .* while {state.value}$"):
            machine.on(event)
        assert machine.state is state


def test_the_straight_path() -> None:
    """Seven steps from one host to the other."""
    machine = GuestMachine()
    for event in STRAIGHT:
        assert not machine.is_over
        machine.on(event)
    assert machine.state is S.AT_DESTINATION
    assert machine.is_over


@pytest.mark.parametrize("state", S, ids=lambda state: state.name)
def test_a_failure_leads_where_the_guest_may_run_or_nowhere(state: GuestState) -> None:
    """Before COMMIT it is taken back; after it never; what is over is over."""
    if state in OVER:
        assert not [old for old, _ in TABLE if old is state]
        return
    machine = machine_at(state)
    before = SITUATIONS[machine.state]
    machine.on(E.FAILURE)
    if state in BEFORE_COMMIT:
        assert machine.state is S.RETURNING
    assert SITUATIONS[machine.state].may_run is before.may_run, "a failure gives the guest to nobody else"


def test_every_state_is_reachable_and_every_end_is_final() -> None:
    """The table has no island, and every way ends."""
    assert reachable(S.AT_SOURCE) == set(S)
    assert {old for old, _ in TABLE} == set(S) - OVER
    assert set(SITUATIONS) == set(S)


@pytest.mark.parametrize("state", S, ids=lambda state: state.name)
def test_situations_are_safe(state: GuestState) -> None:
    """A guest runs only where its disks may be written; who may run it owns them."""
    situation = SITUATIONS[state]
    assert situation.running in (None, situation.may_run)
    assert situation.may_run is situation.writer


def test_nothing_leads_back_over_the_commit() -> None:
    """From GIVEN on the source may never run the guest again; before it the destination never may."""
    assert all(SITUATIONS[state].may_run is not Side.SOURCE for state in reachable(S.GIVEN))
    assert reachable(S.GIVEN) == {S.GIVEN, S.ARRIVED, S.AT_DESTINATION, S.IN_DOUBT, S.STUCK_AT_DESTINATION}
    assert reachable(S.RETURNING) == {S.RETURNING, S.RETURNED, S.STUCK_AT_SOURCE}
    into = {old for (old, _), new in TABLE.items() if new is S.GIVEN}
    assert into == {S.LOADED}, "COMMIT is said only when the destination holds all of the guest"


class Joint(NamedTuple):
    """A guest and its disks' hand-off at the source."""

    guest: GuestState
    disks: SourceState


PAIRED = {E.DISKS_PROVED: SE.PREPARED, E.COMMITTED: SE.HANDOFF_DURABLE, E.TAKEN: SE.TAKEN}
"""What is one event for both; every other is of one of them alone."""


def following(joint: Joint) -> set[Joint]:
    """Return every joint state that one event can lead to."""
    found = set()
    for event in E:
        guest = machine_at(joint.guest)
        try:
            guest.on(event)
        except StateError:
            continue
        disks = SourceHandoff()
        disks.state = joint.disks
        steps = [PAIRED[event]] if event in PAIRED else []
        if event is E.FAILURE and disks.may_thaw and joint.disks is not SourceState.ABORTED:
            steps = [SE.FAILURE]
        if event is E.STOOD_STILL:
            steps = [SE.FROZEN_AND_SENT]
        try:
            for step in steps:
                disks.on(step)
        except RemoteProtocolError:
            continue
        found.add(Joint(guest.state, disks.state))
    return found


def test_the_guest_and_the_hand_off_agree_in_every_joint_state() -> None:
    """Where the guest may run at the source, its disks may be thawed there, and the other way round."""
    start = Joint(S.AT_SOURCE, SourceState.SENDING)
    seen, frontier = {start}, [start]
    while frontier:
        joint = frontier.pop()
        disks = SourceHandoff()
        disks.state = joint.disks
        assert (SITUATIONS[joint.guest].may_run is Side.SOURCE) == disks.may_thaw, joint
        for new in following(joint) - seen:
            seen.add(new)
            frontier.append(new)
    assert {joint.guest for joint in seen} == set(S), "the walk has seen every state"


def test_the_document_has_the_table() -> None:
    """docs/guest.md describes each state with what holds in it."""
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| (.*) \|$", DOCUMENT.read_text(), re.MULTILINE))
    words = {None: "nobody", Side.SOURCE: "source", Side.DESTINATION: "destination"}
    for state, situation in SITUATIONS.items():
        runs, writes = (cell.strip() for cell in rows[state.value].split("|")[:2])
        assert (runs, writes) == (words[situation.running], words[situation.writer]), state
        on_failure = TABLE.get((state, E.FAILURE))
        last = rows[state.value].split("|")[-1].strip()
        assert last == ("–" if on_failure is None else f"`{on_failure.value}`"), state
