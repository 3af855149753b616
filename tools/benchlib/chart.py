"""The results as one SVG chart: for every kind of work, how many times better fusemig is than each other side.

Bars start at 1 (level with the other side) on a logarithmic axis: to the right fusemig is better. A tick marks
the goal. Before fusemig is measured there are no ratios, and the chart says so.
"""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchlib.measure import Row

_LABEL_WIDTH, _PLOT_WIDTH, _LINE, _TOP, _RIGHT = 470, 520, 20, 64, 70
_COLOURS = {"better": "#2a7f62", "worse": "#c2554a", "limit": "#8a8f98"}


class _Bar(NamedTuple):
    group: str
    label: str
    ratio: float
    goal: float
    is_limit: bool


def svg(rows: Sequence[Row], subtitle: str) -> str:
    """Return the chart."""
    bars = _bars(rows)
    reach = max([2.0, *(max(bar.ratio, 1 / bar.ratio if bar.ratio < 1 else 1, bar.goal) for bar in bars)]) * 1.1
    low = min([0.5, *(bar.ratio for bar in bars)]) / 1.1

    def x(ratio: float) -> float:
        return _LABEL_WIDTH + _PLOT_WIDTH * math.log(ratio / low) / math.log(reach / low)

    lines, y, group = [], _TOP, ""
    for bar in bars:
        if bar.group != group:
            group, y = bar.group, y + _LINE
            lines.append(f'<text x="8" y="{y + 14}" class="group">{escape(group)}</text>')
            y += _LINE
        lines.append(f'<text x="{_LABEL_WIDTH - 8}" y="{y + 14}" class="label">{escape(bar.label)}</text>')
        left, right = sorted((x(1), x(bar.ratio)))
        colour = _COLOURS["limit" if bar.is_limit else "better" if bar.ratio >= 1 else "worse"]
        width = max(right - left, 1)
        lines.append(f'<rect x="{left:.1f}" y="{y + 3}" width="{width:.1f}" height="{_LINE - 6}" fill="{colour}"/>')
        lines.append(f'<text x="{max(right, x(1)) + 5:.1f}" y="{y + 14}">{bar.ratio:.2f}x</text>')
        if bar.goal:
            at = x(bar.goal)
            lines.append(f'<line x1="{at:.1f}" y1="{y}" x2="{at:.1f}" y2="{y + _LINE}" class="goal"/>')
        y += _LINE
    if not bars:
        lines.append(f'<text x="8" y="{y + 14}">fusemig was not measured beside anybody: no ratios to show</text>')
        y += _LINE
    axis = [
        f'<line x1="{x(tick):.1f}" y1="{_TOP}" x2="{x(tick):.1f}" y2="{y}" class="{"one" if tick == 1 else "grid"}"/>'
        f'<text x="{x(tick):.1f}" y="{_TOP - 4}" class="tick">{tick:g}x</text>'
        for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
        if low <= tick <= reach
    ]
    width, height = _LABEL_WIDTH + _PLOT_WIDTH + _RIGHT, y + _LINE
    return "\n".join(
        [
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
                f'height="{height}">'
            ),
            (
                "<style>text{font:12px sans-serif;fill:#222}.title{font-size:16px;font-weight:bold}"
                ".group{font-weight:bold}.label{text-anchor:end}.tick{text-anchor:middle;fill:#666}"
                ".grid{stroke:#ddd}.one{stroke:#444}.goal{stroke:#1f4fa8;stroke-width:2}</style>"
            ),
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
            '<text x="8" y="22" class="title">How many times better fusemig is (medians; blue mark: the goal)</text>',
            f'<text x="8" y="40">{escape(subtitle)}</text>',
            *axis,
            *lines,
            "</svg>",
            "",
        ]
    )


def _bars(rows: Sequence[Row]) -> list[_Bar]:
    bars = []
    for row in rows:
        for case in row.cases:
            for ours in case.sides:
                if ours.kind != "us" or not ours.samples:
                    continue
                goals = {goal.against: goal.bound for goal in case.goals_of(ours) if goal.against}
                for other in case.sides:
                    ratio = case.ratio(ours, other)
                    if other.kind == "us" or math.isnan(ratio) or ratio <= 0:
                        continue
                    label = f"{case.name} · {other.name}"
                    bars.append(
                        _Bar(f"{row.key} {ours.name}", label, ratio, goals.get(other.name, 0.0), other.kind == "limit")
                    )
    return bars
