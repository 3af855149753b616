"""Groups, model-checked: two sources, two destinations, a coordinator, a decision.

A state is what is durable, and where each process is. Every durable write, message, crash and restart is a step of its
own, taken in every order. What the processes do is what `fusemig.handoff`, `fusemig.group` and `fusemig.epoch` say;
what is written here is the world around them. Each rule of docs/groups.md that is taken out leads to a state that
breaks a promise.
"""

from __future__ import annotations

from collections import defaultdict, deque
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

import pytest

from fusemig.epoch import EpochRecord, Ownership, redeemed
from fusemig.group import Conduct, Standing, Step, Word, conduct, next_step
from fusemig.handoff import SourceEvent, SourceHandoff, SourceState

if TYPE_CHECKING:
    from collections.abc import Iterator

N = 2
S, E = SourceState, SourceEvent


class Rule(Enum):
    """What the design rests on; one may be broken."""

    ALL_PLEDGE = "`commit` is proposed only when every source has pledged"
    ONE_DECISION = "a decision stays as long as a source is pledged"
    PLEDGE_IS_DURABLE = "a pledge is durable before the coordinator hears of it"
    PLEDGE_IS_REMEMBERED = "a source that starts again is bound by its pledge"
    NO_TIMEOUT = "a pledged source thaws only when `abort` is durable"
    FIRST_HAND = "a pledge counts only as told by the process that made it"
    RIGHT_PLACE = "nobody decides where he has laid no proposal"


class World(NamedTuple):
    """Everything at one moment: for each disk the records here and there and both processes, then what is shared."""

    here: tuple[Ownership, ...] = (Ownership.OWNER,) * N
    there: tuple[str, ...] = ("incoming",) * N
    source: tuple[SourceState | None, ...] = (S.SENDING,) * N
    """None: its process is dead."""
    is_first: tuple[bool, ...] = (True,) * N
    """Whether that is the process which the coordinator talks to."""
    is_written: tuple[bool, ...] = (False,) * N
    """Guests wrote what a destination that is prepared has not."""
    heard: tuple[Standing, ...] = (Standing.MOVING,) * N
    """What the coordinator saw of each when it looked last."""
    decision: Word | None = None
    coordinator: str = "leads"
    word: Word | None = None
    """What it knows to be decided."""

    def at(
        self,
        index: int,
        *,
        here: Ownership | None = None,
        there: str | None = None,
        source: SourceState | None = None,
    ) -> World:
        """Return this world with the parts of one disk changed; guests that may write do."""
        return self._replace(
            here=changed(self.here, index, here),
            there=changed(self.there, index, there),
            source=changed(self.source, index, source),
            is_written=changed(self.is_written, index, True if source is S.ABORTED else None),
        )


T = TypeVar("T")


def changed(values: tuple[T, ...], index: int, value: T | None) -> tuple[T, ...]:
    return values if value is None else (*values[:index], value, *values[index + 1 :])


@cache
def after(state: SourceState, *events: SourceEvent) -> SourceState:
    """Return where events take a source, by its table."""
    machine = SourceHandoff(state)
    for event in events:
        machine.on(event)
    return machine.state


class StepTaken(NamedTuple):
    """What may happen next; only what is neither the coordinator's nor a crash can be relied on."""

    world: World
    is_certain: bool = True


def standing(world: World, index: int, broken: Rule | None) -> Standing:
    """Return what a coordinator that looks at a source sees."""
    state = world.source[index]
    if state is None or (not world.is_first[index] and broken is not Rule.FIRST_HAND):
        return Standing.LOST
    return {
        S.PLEDGED: Standing.PLEDGED,
        S.HANDED_OFF: Standing.DOUBTFUL,
        S.RELEASED: Standing.MOVED,
        S.ABORTED: Standing.STAYS,
    }.get(state, Standing.MOVING)


def coordinator_steps(world: World, broken: Rule | None) -> Iterator[World]:
    if world.coordinator == "dead":
        return
    yield world._replace(coordinator="dead")
    for index in range(N):
        if world.heard[index] is not Standing.LOST:
            yield world._replace(heard=changed(world.heard, index, standing(world, index, broken)))
    for is_called_off in (False, True):
        step = next_step(world.heard, world.word, is_continued=True, is_called_off=is_called_off)
        if broken is Rule.ALL_PLEDGE and world.word is None and Standing.PLEDGED in world.heard:
            step = Step.PROPOSE_COMMIT
        if broken is Rule.ONE_DECISION and world.word is not None:
            step = Step.REMOVE
        match step:
            case Step.PROPOSE_COMMIT | Step.PROPOSE_ABORT:
                word = world.decision or (Word.COMMIT if step is Step.PROPOSE_COMMIT else Word.ABORT)
                yield world._replace(decision=word, word=word)
            case Step.REMOVE:
                yield world._replace(decision=None, coordinator="dead")


def source_steps(world: World, index: int, broken: Rule | None) -> Iterator[World]:
    # A destination that is down, or cannot be reached, is one whose steps come later: every delay is an order too.
    peer, state = world.there[index], world.source[index]
    match state:
        case S.SENDING:
            yield world.at(index, source=after(state, E.FROZEN_AND_SENT))
            yield world.at(index, source=after(state, E.FAILURE))
        case S.FINAL_SENT:
            if peer == "incoming":
                yield world.at(index, there="prepared")
            if peer == "prepared":
                yield world.at(index, source=after(state, E.PREPARED))
            yield world.at(index, source=after(state, E.FAILURE))
        case S.PEER_PREPARED:
            yield world.at(index, source=after(state, E.FAILURE))
            if world.decision is None:
                pledged = after(state, E.PLEDGE_DURABLE)
                yield world.at(index, here=Ownership.PLEDGED, source=pledged)
                if broken is Rule.PLEDGE_IS_DURABLE:
                    yield world.at(index, source=pledged)
                # It could not be made durable, as far as is known, and is all the same.
                yield world.at(index, here=Ownership.PLEDGED, source=after(state, E.FAILURE))
        case S.PLEDGED:
            yield from pledged_steps(world, index, state, broken)
        case S.BOUND:
            yield world.at(index, here=Ownership.HANDED_OFF, source=after(state, E.HANDOFF_DURABLE))
        case S.HANDED_OFF:
            if peer == "prepared":
                yield world.at(index, there="owner")
            if peer == "owner":
                yield world.at(index, here=Ownership.RELEASED, source=after(state, E.TAKEN))
        case S.ABORTED:
            if peer == "prepared":
                yield world.at(index, there="incoming")


def pledged_steps(world: World, index: int, state: SourceState, broken: Rule | None) -> Iterator[World]:
    for is_overdue in (False, True) if world.is_first[index] else (True,):
        match conduct(world.decision, is_overdue=is_overdue):
            case Conduct.PROPOSE_ABORT:
                yield world._replace(decision=Word.ABORT)
            case Conduct.HAND_OFF:
                yield world.at(index, source=after(state, E.COMMIT_DECIDED))
            case Conduct.TAKE_BACK:
                back = after(state, E.ABORT_DECIDED, E.FAILURE)
                yield world.at(index, here=redeemed(PLEDGE, Word.ABORT).state, source=back)
                if world.is_first[index]:  # whose record cannot be written, and says `pledged` still
                    yield world.at(index, source=back)
    # What the rules forbid:
    if broken is Rule.NO_TIMEOUT or (broken is Rule.RIGHT_PLACE and not world.is_first[index]):
        yield world.at(index, here=Ownership.OWNER, source=S.ABORTED)


PLEDGE: Final = EpochRecord(state=Ownership.PLEDGED, image_id="disk", epoch=0, decision="/group")


def restarted(record: Ownership, broken: Rule | None) -> SourceState:
    if record is Ownership.PLEDGED and broken is Rule.PLEDGE_IS_REMEMBERED:
        return S.ABORTED
    return {
        Ownership.OWNER: S.ABORTED,
        Ownership.PLEDGED: S.PLEDGED,
        Ownership.HANDED_OFF: S.HANDED_OFF,
        Ownership.RELEASED: S.RELEASED,
    }[record]


def steps(world: World, broken: Rule | None) -> Iterator[StepTaken]:
    for following in coordinator_steps(world, broken):
        yield StepTaken(following, is_certain=False)
    for index in range(N):
        if world.source[index] is None:
            yield StepTaken(world.at(index, source=restarted(world.here[index], broken)))
        else:
            dead = (*world.source[:index], None, *world.source[index + 1 :])
            yield StepTaken(
                world._replace(source=dead, is_first=changed(world.is_first, index, False)), is_certain=False
            )
        for following in source_steps(world, index, broken):
            yield StepTaken(following)


def violation(world: World) -> str:
    """Return which promise a state breaks."""
    for index in range(N):
        state = world.source[index]
        if world.there[index] == "owner" and state is not None and SourceHandoff(state).may_thaw:
            return "two writers"
        if world.there[index] == "owner" and world.is_written[index]:
            return "what guests wrote is lost"
    has_moved = [record in (Ownership.HANDED_OFF, Ownership.RELEASED) for record in world.here]
    stays = [
        state is S.ABORTED or record is Ownership.OWNER for state, record in zip(world.source, world.here, strict=True)
    ]
    if any(stays) and any(has_moved):
        return "some moved, some stay"
    return ""


def canonical(world: World) -> World:
    """Return the world with its disks in an order of its own: they are alike, so that halves the number of worlds."""
    order = sorted(range(N), key=lambda at: str([part[at] for part in world[:6]]))
    if order == list(range(N)):
        return world

    def turned(values: tuple[T, ...]) -> tuple[T, ...]:
        return tuple(values[at] for at in order)

    return world._replace(
        here=turned(world.here),
        there=turned(world.there),
        source=turned(world.source),
        is_first=turned(world.is_first),
        is_written=turned(world.is_written),
        heard=turned(world.heard),
    )


def explore(broken: Rule | None) -> tuple[dict[World, list[StepTaken]], str]:
    """Return every state that can be reached, or the first promise that is broken."""
    found: dict[World, list[StepTaken]] = {}
    ahead = deque([World()])
    while ahead:
        world = ahead.popleft()
        if world in found:
            continue
        if broke := violation(world):
            return found, broke
        found[world] = [step._replace(world=canonical(step.world)) for step in steps(world, broken)]
        ahead.extend(step.world for step in found[world])
    return found, ""


def is_settled(world: World) -> bool:
    return all(state in (S.ABORTED, S.RELEASED) for state in world.source)


def test_all_or_none_and_never_two_writers_and_nobody_waits_for_the_coordinator() -> None:
    """In every state that can be reached; and from each of them both ends can be, or stay, where they belong."""
    found, broke = explore(None)
    assert broke == ""
    assert any(world.here == (Ownership.RELEASED,) * N for world in found)
    before = defaultdict(list)
    for world, following in found.items():
        for step in following:
            if step.is_certain:
                before[step.world].append(world)
    can_settle = {world for world in found if is_settled(world)}
    ahead = deque(can_settle)
    while ahead:
        for world in before[ahead.popleft()]:
            if world not in can_settle:
                can_settle.add(world)
                ahead.append(world)
    assert can_settle == found.keys()
    print(f"{len(found)} states")


@pytest.mark.parametrize("rule", Rule)
def test_each_rule_is_needed(rule: Rule) -> None:
    """Without it some disks of the group move and others stay, or a destination takes what is older."""
    assert explore(rule)[1] in BROKEN[rule]


BROKEN: Final = {
    rule: ("what guests wrote is lost", "two writers") if rule is Rule.FIRST_HAND else ("some moved, some stay",)
    for rule in Rule
}
