"""The results as Markdown for people and as JSON for history."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import TYPE_CHECKING, Any

from benchlib.settings import MIB

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchlib.measure import Case, Goal, Row, Side, Usage


def markdown(rows: Sequence[Row], versions: dict[str, str], command: str) -> str:
    """Return the whole report."""
    parts = ["# fusemig beside its peers", "", f"`{command}`", ""]
    parts += [", ".join(f"{name} {version}" for name, version in versions.items()), ""]
    parts += ["## Goals", "", *_goal_table(rows), ""]
    for row in rows:
        parts += [f"## {row.key}: {row.title}", "", *_row_table(row), ""]
        parts += [f"- {note}" for note in row.notes]
        parts += [f"- {text}" for text in _reasons(row)]
        parts += [f"- took {row.seconds:.0f} s", ""]
    parts.append("ours/this is the ratio of medians, above 1 where fusemig is better. CPU and peak memory are those of")
    parts.append("the serving or copying programs: source + destination; per round, median.")
    return "\n".join(parts) + "\n"


def _goal_table(rows: Sequence[Row]) -> list[str]:
    lines = ["| row | work | side | goal | figure | reached |", "|---|---|---|---|---:|---|"]
    for row in rows:
        for case in row.cases:
            for side in case.sides:
                if side.kind != "us":
                    continue
                for goal in case.goals_of(side):
                    figure, reached = case.verdict(side, goal)
                    word = {True: "yes", False: "**no**", None: "not measured"}[reached]
                    text = _number(figure) + ("x" if goal.against and not math.isnan(figure) else "")
                    lines.append(
                        f"| {row.key} | {case.name} | {side.name} | {goal_text(case, goal)} | {text} | {word} |"
                    )
    return lines


def goal_text(case: Case, goal: Goal) -> str:
    """Return a goal in words."""
    sign = "≤" if goal.at_most else "≥"
    if goal.against:
        return f"{sign} {goal.bound:g}x {goal.against}"
    which = {50.0: "median", 100.0: "max"}.get(goal.percent, f"p{goal.percent:g}")
    return f"{which} {sign} {goal.bound:g} {case.unit}"


def _row_table(row: Row) -> list[str]:
    lines = [
        "| work | side | n | min | median | max | ours/this | CPU s | peak MiB |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for case in row.cases:
        ours = next((side for side in case.sides if side.kind == "us"), None)
        for side in case.sides:
            if not side.samples:
                continue
            ratio = "" if ours is None or side is ours or math.isnan(case.ratio(ours, side)) else (
                f"{case.ratio(ours, side):.2f}x"
            )  # fmt: skip
            values = side.values
            figures = " | ".join(_number(value) for value in (min(values), side.median, max(values)))
            name = f"{side.name} (limit)" if side.kind == "limit" else side.name
            lines.append(
                f"| {case.name}, {case.unit} | {name} | {len(values)} | {figures} | {ratio} "
                f"| {_ends(side, _cpu)} | {_ends(side, _peak)} |"
            )
    return lines


def _reasons(row: Row) -> list[str]:
    seen: dict[tuple[str, str], str] = {}
    for case in row.cases:
        for side in case.sides:
            if side.reason:
                seen.setdefault((side.name, side.reason), case.name)
            for note in side.notes:
                seen.setdefault((side.name, note), case.name)
    return [f"not counted: {side}, {case}: {reason}" for (side, reason), case in seen.items()]


def _cpu(usage: Usage) -> float:
    return usage.cpu_s


def _peak(usage: Usage) -> float:
    return usage.peak_rss_bytes / MIB


def _ends(side: Side, what: Any) -> str:
    words = []
    for end in ("source", "destination"):
        usages = [usage for sample in side.samples if (usage := getattr(sample, end)) is not None]
        if usages:
            words.append(_number(statistics.median(what(usage) for usage in usages)))
    return " + ".join(words)


def _number(value: float) -> str:
    if math.isnan(value):
        return "–"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def as_json(rows: Sequence[Row], versions: dict[str, str], command: str, when: str) -> dict[str, Any]:
    """Return everything that was measured, for a history of runs."""
    result = []
    for row in rows:
        cases = []
        for case in row.cases:
            entry = dataclasses.asdict(case)
            for side, plain in zip(case.sides, entry["sides"], strict=True):
                if side.samples:
                    plain["median"] = side.median
                    plain["min"], plain["max"] = min(side.values), max(side.values)
                if side.kind == "us":
                    plain["goals"] = [
                        {"goal": goal_text(case, goal), "figure": figure if reached is not None else None,
                         "reached": reached}
                        for goal in case.goals_of(side)
                        for figure, reached in [case.verdict(side, goal)]
                    ]  # fmt: skip
            cases.append(entry)
        result.append({"key": row.key, "title": row.title, "seconds": row.seconds, "notes": row.notes, "cases": cases})
    return {"when": when, "command": command, "versions": versions, "rows": result}
