"""Samples, their statistics, the goals, and the loop that alternates the sides.

A row has cases (kinds of work); a case has sides (us, the peers, the limit); a side has one sample a round. Sides take
turns inside a round and a different side starts each round, so a slow minute of the machine hurts all of them.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


class BenchError(Exception):
    """A side could not be measured; the text says why and goes into the report."""


@dataclass(frozen=True)
class Usage:
    """What a program cost: CPU seconds (user and system) and the peak of its resident memory."""

    cpu_s: float
    peak_rss_bytes: int

    def __add__(self, other: Usage) -> Usage:
        """Add up programs that ran side by side."""
        return Usage(self.cpu_s + other.cpu_s, self.peak_rss_bytes + other.peak_rss_bytes)


@dataclass(frozen=True)
class Sample:
    """One measurement: the figure, what each end cost, and figures beside it by name."""

    value: float
    source: Usage | None = None
    destination: Usage | None = None
    extra: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Side:
    """Who is measured, its samples, and why it stopped being measured."""

    name: str
    kind: str
    """``us``, ``peer`` or ``limit``."""
    samples: list[Sample] = field(default_factory=list)
    reason: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def values(self) -> list[float]:
        """Return the figures, one a round."""
        return [sample.value for sample in self.samples]

    @property
    def median(self) -> float:
        """Return the median; NaN without samples."""
        return statistics.median(self.values) if self.samples else math.nan

    def percentile(self, percent: float) -> float:
        """Return the nearest-rank percentile over the rounds; NaN without samples."""
        ranked = sorted(self.values)
        return ranked[max(0, math.ceil(len(ranked) * percent / 100) - 1)] if ranked else math.nan

    def note(self, text: str) -> None:
        """Add a remark for the report, once."""
        if text not in self.notes:
            self.notes.append(text)


@dataclass(frozen=True)
class Goal:
    """What a case should reach: a ratio to another side, or a bound on our own figure."""

    bound: float
    against: str = ""
    """A side's name: the ratio of medians is at least ``bound``. Empty: our figure itself is bounded."""
    at_most: bool = False
    percent: float = 50
    """The percentile of our rounds that an absolute goal looks at."""
    lane: str = ""
    """Only for our side of this lane; empty: for every lane without a goal of its own."""


@dataclass
class Case:
    """One kind of work."""

    name: str
    unit: str
    sides: list[Side]
    higher_is_better: bool = True
    goals: list[Goal] = field(default_factory=list)

    def side(self, name: str) -> Side | None:
        """Return the side of this name."""
        return next((side for side in self.sides if side.name == name), None)

    def ratio(self, ours: Side, other: Side) -> float:
        """Return how many times better ``ours`` is by the medians; NaN if either was not measured."""
        a, b = (ours.median, other.median) if self.higher_is_better else (other.median, ours.median)
        return a / b if a and b else math.nan

    def goals_of(self, ours: Side) -> list[Goal]:
        """Return the goals that one of our sides is held to."""
        lane = ours.name.partition(" ")[2]
        own = [goal for goal in self.goals if goal.lane and f"{goal.lane} lane" == lane]
        return own or [goal for goal in self.goals if not goal.lane]

    def verdict(self, ours: Side, goal: Goal) -> tuple[float, bool | None]:
        """Return the figure that a goal looks at, and whether it is reached; None if it was not measured."""
        if goal.against:
            other = self.side(goal.against)
            figure = self.ratio(ours, other) if other else math.nan
        else:
            figure = ours.percentile(goal.percent) if goal.percent != 50 else ours.median
        if math.isnan(figure):
            return figure, None
        return figure, figure <= goal.bound if goal.at_most else figure >= goal.bound

    def derive(self, name: str, unit: str, key: str, **changes: bool) -> Case:
        """Return a case made of a figure that this case's samples carry beside their own."""
        sides = []
        for side in self.sides:
            samples = [
                Sample(sample.extra[key], sample.source, sample.destination)
                for sample in side.samples
                if key in sample.extra
            ]
            if samples or side.reason:
                sides.append(Side(side.name, side.kind, samples, side.reason))
        return Case(name, unit, sides, higher_is_better=changes.get("higher_is_better", True))


@dataclass
class Row:
    """A row of the table."""

    key: str
    title: str
    cases: list[Case] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Contender:
    """A side and how to take one sample of it."""

    name: str
    kind: str
    run: Callable[[], Sample]
    missing: str = ""
    """Why it cannot be measured at all."""


def say(text: str) -> None:
    """Tell the person who waits what is going on."""
    print(text, file=sys.stderr, flush=True)


def run_case(
    name: str,
    unit: str,
    contenders: Sequence[Contender],
    rounds: int,
    *,
    higher_is_better: bool = True,
    goals: Sequence[Goal] = (),
) -> Case:
    """Measure every contender once a round, taking turns; one that fails is not tried again."""
    sides = [Side(contender.name, contender.kind, reason=contender.missing) for contender in contenders]
    pairs = list(zip(contenders, sides, strict=True))
    for round_number in range(rounds):
        turn = round_number % len(pairs) if pairs else 0
        for contender, side in pairs[turn:] + pairs[:turn]:
            if side.reason:
                continue
            started = time.monotonic()
            try:
                sample = contender.run()
            except BenchError as error:
                side.reason = str(error)
                say(f"    {name} · {side.name}: not counted: {error}")
                continue
            side.samples.append(sample)
            took = time.monotonic() - started
            say(f"    {name} · {side.name} · round {round_number + 1}: {sample.value:,.4g} {unit}  ({took:.1f} s)")
    return Case(name, unit, sides, higher_is_better, list(goals))
