"""``fusemig estimate``: what a migration would take, before it begins."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from fusemig.cli.output import print_json
from fusemig.control.client import open_control
from fusemig.core.shaping import MAX_THROTTLE_PERCENT
from fusemig.core.units import format_size

if TYPE_CHECKING:
    from pathlib import Path

SHORT_MS: Final = 10_000
"""Whoever was watched for less may do something else soon."""


@dataclass(frozen=True)
class EstimateRequest:
    """The options of ``fusemig estimate``."""

    socket: Path
    uri: str | None = None
    link: int | None = None
    disks: tuple[str, ...] = ()
    downtime_limit: float | None = None
    as_json: bool = False

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of QMP's ``x-fusemig-estimate``."""
        arguments: dict[str, Any] = {}
        if self.uri is not None:
            arguments["uri"] = self.uri
        if self.link is not None:
            arguments["link"] = self.link
        if self.disks:
            arguments["disks"] = list(self.disks)
        if self.downtime_limit is not None:
            arguments["downtime-limit"] = round(self.downtime_limit * 1000)
        return arguments


async def estimate_command(request: EstimateRequest) -> None:
    """Ask the daemon and print its answer."""
    async with open_control(request.socket) as control:
        answer = await control.execute("x-fusemig-estimate", request.arguments())
    if request.as_json:
        print_json(answer)
        return
    for line in _describe(answer):
        print(line)


def _describe(answer: dict[str, Any]) -> list[str]:
    lines = [
        f"  {disk['name']:16} {format_size(disk['data-bytes']):>12} of {format_size(disk['size'])}, "
        f"written {format_size(disk['write-rate'])}/s; different bytes: {_curve(disk['working-set'])}"
        for disk in answer["disks"]
    ]
    lines.append(f"link: {format_size(answer['bandwidth'])}/s ({answer['bandwidth-source']})")
    if answer["converges"]:
        lines.append(
            f"expected: {_seconds(answer['expected-total-time'])}, {answer['expected-passes']} passes, "
            f"{format_size(answer['expected-bytes'])} sent, downtime {answer['expected-downtime']} ms "
            f"(limit {answer['downtime-limit']} ms)"
        )
    else:
        lines.append(
            f"passes will not converge: guests dirty more than the link carries, and a switchover would take "
            f"{_seconds(answer['expected-downtime'])} (limit {answer['downtime-limit']} ms)"
        )
        lines += [f"  it would end with {_remedy(remedy, answer['write-rate'])}" for remedy in answer["remedies"]]
    if answer["observed-ms"] < SHORT_MS:
        lines.append(f"guests have been watched for {_seconds(answer['observed-ms'])} only: ask again later")
    return lines


def _curve(points: list[dict[str, Any]]) -> str:
    return ", ".join(f"{format_size(point['bytes'])} in {point['seconds']:g} s" for point in points)


def _seconds(milliseconds: int) -> str:
    return f"{milliseconds / 1000:.1f} s"


def _remedy(remedy: dict[str, Any], write_rate: int) -> str:
    kind, value = remedy["kind"], remedy["value"]
    if kind == "bandwidth":
        return f"{format_size(value)}/s of bandwidth"
    if kind == "downtime-limit":
        return f"--downtime-limit {value}ms"
    if kind == "mirror":
        return (
            f"mirroring, which `migrate` begins by itself: guests can write {format_size(value)}/s or more meanwhile "
            "(--mode mirror: from the start)"
        )
    if kind == "postcopy":
        return f"--mode postcopy: guests are moved at once, and need both hosts for {_seconds(value)} or more"
    percent = math.ceil(100 * (1 - value / write_rate)) if write_rate > value else 1
    option = f" (--throttle-max {percent})" if percent <= MAX_THROTTLE_PERCENT else ""
    return f"guests that write no more than {format_size(value)}/s{option}"
