"""The design of docs/groups.md, model-checked before it is built: two sources, two destinations, a coordinator, a file.

A state is what is durable, and where each process is. Every durable write, message, crash and restart is a step of its
own, taken in every order. Each rule of the page that is taken out leads to a state that breaks a promise.
"""

from __future__ import annotations

from collections import defaultdict, deque
from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

N = 2


class Source(Enum):
    """Where a source's process is."""

    DOWN = auto()
    MOVING = auto()
    FROZEN = auto()
    HEARD = auto()
    """PREPARED was received."""
    PLEDGED = auto()
    STAYS = auto()
    """Called off; guests write."""
    DOUBT = auto()
    """COMMIT was said, or may have been."""
    OVER = auto()


class Rule(Enum):
    """What the design rests on; one may be broken."""

    ALL_PLEDGE = "`commit` is proposed only when every source has pledged"
    ONE_DECISION = "a decision stays as long as a source is pledged"
    PLEDGE_IS_DURABLE = "a pledge is durable before the coordinator hears of it"
    PLEDGE_IS_REMEMBERED = "a source that starts again is bound by its pledge"
    NO_TIMEOUT = "a pledged source thaws only when `abort` is durable"


class World(NamedTuple):
    """Everything at one moment: for each disk the records here and there and both processes, then what is shared."""

    here: tuple[str, ...] = ("owner",) * N
    there: tuple[str, ...] = ("incoming",) * N
    source: tuple[Source, ...] = (Source.MOVING,) * N
    is_up: tuple[bool, ...] = (True,) * N
    """The destinations."""
    decision: str | None = None
    coordinator: str = "waiting"
    heard: frozenset[int] = frozenset()
    """Whose pledges the coordinator knows of."""

    def at(
        self,
        index: int,
        *,
        here: str | None = None,
        there: str | None = None,
        source: Source | None = None,
        is_up: bool | None = None,
    ) -> World:
        """Return this world with the parts of one disk changed."""
        return self._replace(
            here=changed(self.here, index, here),
            there=changed(self.there, index, there),
            source=changed(self.source, index, source),
            is_up=changed(self.is_up, index, is_up),
        )


T = TypeVar("T")


def changed(values: tuple[T, ...], index: int, value: T | None) -> tuple[T, ...]:
    return values if value is None else (*values[:index], value, *values[index + 1 :])


class Step(NamedTuple):
    """What may happen next; only what is neither the coordinator's nor a crash can be relied on."""

    world: World
    is_certain: bool = True


def coordinator_steps(world: World, broken: Rule | None) -> Iterator[World]:
    if world.coordinator == "waiting":
        for index in range(N):
            if world.source[index] is Source.PLEDGED:
                yield world._replace(heard=world.heard | {index})
        if len(world.heard) == N or (broken is Rule.ALL_PLEDGE and world.heard):
            yield world._replace(decision=world.decision or "commit", coordinator="done")
        yield world._replace(decision=world.decision or "abort", coordinator="done")
        yield world._replace(coordinator="dead")
    is_past = all(record != "pledged" for record in world.here) and Source.HEARD not in world.source
    if world.coordinator == "done" and (is_past or broken is Rule.ONE_DECISION):
        yield world._replace(decision=None, coordinator="dead")


def source_steps(world: World, index: int, broken: Rule | None) -> Iterator[World]:
    peer, is_heard = world.there[index], world.is_up[index]
    match world.source[index]:
        case Source.MOVING:
            yield world.at(index, source=Source.FROZEN)
            yield world.at(index, source=Source.STAYS)
        case Source.FROZEN:
            if is_heard and peer == "incoming":
                yield world.at(index, there="prepared")
            if is_heard and peer == "prepared":
                yield world.at(index, source=Source.HEARD)
            yield world.at(index, source=Source.STAYS)
        case Source.HEARD:
            yield world.at(index, here="pledged", source=Source.PLEDGED)
            if broken is Rule.PLEDGE_IS_DURABLE:
                yield world.at(index, source=Source.PLEDGED)
            yield world.at(index, source=Source.STAYS)
        case Source.PLEDGED:
            if world.decision is None:
                yield world._replace(decision="abort")
            elif world.decision == "commit":
                yield world.at(index, here="handed-off", source=Source.DOUBT)
            if world.decision == "abort" or broken is Rule.NO_TIMEOUT:
                yield world.at(index, here="owner", source=Source.STAYS)
        case Source.DOUBT:
            if is_heard and peer == "prepared":
                yield world.at(index, there="owner")
            if is_heard and peer == "owner":
                yield world.at(index, here="released", source=Source.OVER)
        case Source.STAYS:
            if is_heard and peer == "prepared":
                yield world.at(index, there="incoming")


def restarted(record: str, broken: Rule | None) -> Source:
    if record == "pledged" and broken is Rule.PLEDGE_IS_REMEMBERED:
        return Source.STAYS
    return {
        "owner": Source.STAYS,
        "pledged": Source.PLEDGED,
        "handed-off": Source.DOUBT,
        "released": Source.OVER,
    }[record]


def steps(world: World, broken: Rule | None) -> Iterator[Step]:
    for following in coordinator_steps(world, broken):
        yield Step(following, is_certain=False)
    for index in range(N):
        if world.source[index] is Source.DOWN:
            yield Step(world.at(index, source=restarted(world.here[index], broken)))
        else:
            yield Step(world.at(index, source=Source.DOWN), is_certain=False)
        yield Step(world.at(index, is_up=not world.is_up[index]), is_certain=not world.is_up[index])
        for following in source_steps(world, index, broken):
            yield Step(following)


def violation(world: World) -> str:
    """Return which promise a state breaks."""
    for index in range(N):
        if world.source[index] in (Source.MOVING, Source.STAYS) and world.there[index] == "owner":
            return "two writers"
    stays = [
        source is Source.STAYS or record == "owner" for source, record in zip(world.source, world.here, strict=True)
    ]
    if any(stays) and any(record in ("handed-off", "released") for record in world.here):
        return "some moved, some stay"
    return ""


def explore(broken: Rule | None) -> tuple[dict[World, list[Step]], str]:
    """Return every state that can be reached, or the first promise that is broken."""
    found: dict[World, list[Step]] = {}
    ahead = deque([World()])
    while ahead:
        world = ahead.popleft()
        if world in found:
            continue
        if broke := violation(world):
            return found, broke
        found[world] = list(steps(world, broken))
        ahead.extend(step.world for step in found[world])
    return found, ""


def is_settled(world: World) -> bool:
    return all(source in (Source.STAYS, Source.OVER) for source in world.source) and "prepared" not in world.there


def test_all_or_none_and_never_two_writers_and_nobody_waits_for_the_coordinator() -> None:
    """In every state that can be reached; and from each of them both ends can be, or stay, where they belong."""
    found, broke = explore(None)
    assert broke == ""
    assert any(world.here == ("released",) * N for world in found)
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
    """Without it some disks of the group move and others stay."""
    assert explore(rule)[1] == "some moved, some stay"
