"""What ``fusemig top`` shows: views of daemons as lines of text, for a screen of a given size."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from msgspec import UNSET, UnsetType
from rich.text import Text

from fusemig.qmp.seeing import MAX_CELLS
from fusemig.units import format_size

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from fusemig.qmp.schema import MigrationInfo, ServedDisk, View
    from fusemig.qmp.seeing import ChunkMap, DiskView

MAX_ROWS: Final = 12
"""Of one disk's map."""
N_EVENTS: Final = 4
_LINES_PER_DAEMON: Final = 4
_LINES_PER_DISK: Final = 2
_TREND: Final = 40
"""Moments in a small chart."""
_OVER: Final = ("completed", "failed", "cancelled", "in-doubt")

_NO_CONTROLS: Final = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)], "\N{REPLACEMENT CHARACTER}")
"""What a peer says may be shown, and must not move the cursor."""

# After Okabe and Ito: told apart in every kind of colour blindness. The signs differ as well.
_STYLES: Final = {
    "in-flight": "bold bright_white",
    "dirty": "#e69f00",
    "missing": "#cc79a7",
    "sent": "#56b4e9",
    "allocated": "bright_black",
    "hole": "bright_black",
    "hot": "#ff6a2b",
    "dirty and hot": "bold #e69f00",
}


class Signs(NamedTuple):
    """A sign for each state of a cell, and what charts and bars are drawn with."""

    of: dict[str, str]
    levels: str
    full: str
    empty: str


_NAMES: Final = tuple(_STYLES)
UNICODE: Final = Signs(dict(zip(_NAMES, "►●○■░·△▲", strict=True)), "▁▂▃▄▅▆▇█", "█", "░")
ASCII: Final = Signs(dict(zip(_NAMES, ">dm=-.hD", strict=True)), "_.-=+*#@", "#", ".")


class Watched:
    """A daemon that is looked at: its last view, and what came before."""

    def __init__(self, path: Path) -> None:
        """Nothing was heard yet."""
        self.path = path
        self.view: View | None = None
        self.problem = ""
        """Why there is no newer view."""
        self.rates: deque[int] = deque(maxlen=_TREND)
        self.dirty_rates: deque[int] = deque(maxlen=_TREND)
        self._before: View | None = None

    def take(self, view: View) -> None:
        """Take a newer view."""
        self._before, self.view, self.problem = self.view, view, ""
        info = view.status.migration
        own = UNSET if isinstance(info, UnsetType) else info.x_fusemig
        rates = (0, 0) if isinstance(own, UnsetType) or own.phase in _OVER else (own.bandwidth, own.dirty_rate)
        self.rates.append(rates[0])
        self.dirty_rates.append(rates[1])

    def guest_rates(self, at: int) -> tuple[float, float] | None:
        """Return what guests read and write of a disk, in bytes per second; None where that is not known yet."""
        before, now = self._before, self.view
        if before is None or now is None or before.status.pid != now.status.pid or now.clock <= before.clock:
            return None
        passed_s = (now.clock - before.clock) / 1000
        old, new = before.disks[at], now.disks[at]
        return (new.read_bytes - old.read_bytes) / passed_s, (new.written_bytes - old.written_bytes) / passed_s


def rows_per_disk(height: int, watched: Sequence[Watched]) -> int:
    """Return how many rows a map may have, so that everything fits into ``height`` lines if it can."""
    n_disks = sum(1 if one.view is None else len(one.view.disks) for one in watched)
    fixed = _LINES_PER_DAEMON * len(watched) + _LINES_PER_DISK * n_disks + N_EVENTS + 2
    return max(1, min(MAX_ROWS, (height - fixed) // max(1, n_disks)))


def cells_wanted(width: int, height: int, watched: Sequence[Watched]) -> int:
    """Return how many cells of each disk there is room for."""
    return max(1, min(MAX_CELLS, (width - 2) * rows_per_disk(height, watched)))


def picture(watched: Sequence[Watched], width: int, height: int | None, signs: Signs) -> Text:
    """Return everything; ``height`` lines of it at most, if there is a height."""
    lines: list[Text] = []
    for one in watched:
        lines += _daemon(one, width, signs)
    lines += _events(watched)
    if height is not None:
        lines = lines[: height - 1]
        lines += [Text()] * (height - 1 - len(lines))
        lines.append(Text("q quits", style="bright_black"))
    for line in lines:
        line.plain = line.plain.translate(_NO_CONTROLS)
        line.truncate(width, overflow="ellipsis")
    return Text("\n", no_wrap=True).join(lines)


def _daemon(one: Watched, width: int, signs: Signs) -> list[Text]:
    view = one.view
    head = Text(str(one.path), style="bold")
    lines = [head]
    if view is None:
        head.append(f"  {one.problem or 'connecting'}", style="not bold #e69f00")
        return lines
    status = view.status
    head.append(f"  {status.status.value}", style="bold" if status.status.value == "running" else "bold #e69f00")
    head.append(f"  fusemig {status.version}  pid {status.pid}  at {status.mountpoint}", style="not bold bright_black")
    if one.problem:
        lines.append(Text(f"  away since {_clock(view.at)}: {one.problem}; trying again", style="bold #ff6a2b"))
    if not isinstance(status.migration, UnsetType):
        lines += _migration(one, status.migration, view.parameters.downtime_limit, signs)
    elif not isinstance(status.incoming, UnsetType):
        lines.append(Text(f"  waits for disks at {status.incoming.uri}"))
    for at, (disk, state) in enumerate(zip(view.disks, status.disks, strict=True)):
        lines += _disk(one, at, disk, state, width, signs)
    return lines


def _migration(one: Watched, info: MigrationInfo, limit_ms: int, signs: Signs) -> list[Text]:
    own, disk = info.x_fusemig, info.disk
    assert not isinstance(own, UnsetType)
    assert not isinstance(disk, UnsetType)
    is_source, is_over = own.role.value == "source", own.phase in _OVER
    parts = [
        f"pass {own.pass_}",
        f"{format_size(disk.remaining)} pending",
        f"{format_size(own.wire_bytes)} on the wire",
    ]
    if is_source and not is_over:
        parts += [f"{format_size(own.bandwidth)}/s", f"dirtied {format_size(own.dirty_rate)}/s"]
    if own.pacing.mirror.value != "none":
        parts.append(f"mirroring {own.pacing.mirror.value}")
    if own.pacing.throttle_percentage:
        parts.append(f"guests slowed by {own.pacing.throttle_percentage} %")
    if not isinstance(own.eta, UnsetType):
        parts.append(f"about {own.eta / 1000:.0f} s left")
    if own.converges is False:
        parts.append("does not converge")
    if not isinstance(info.downtime, UnsetType):
        parts.append(f"downtime {own.frozen_ms:.1f} ms")
    if not isinstance(own.waiting, UnsetType):
        parts.append(f"no connection ({own.waiting})")
    first = Text(f"  {'sending' if is_source else 'receiving'}: ")
    first.append(own.phase, style="bold")
    first.append("  " + ", ".join(parts))
    lines = [first]
    if not isinstance(info.error_desc, UnsetType):
        lines.append(Text(f"  {info.error_desc}", style="bold #ff6a2b"))
    if is_source and not is_over and not isinstance(info.expected_downtime, UnsetType):
        share = min(1.0, info.expected_downtime / max(1, limit_ms))
        n = round(16 * share)
        line = Text(f"  expected downtime {info.expected_downtime} ms, limit {limit_ms} ms  ")
        line.append(signs.full * n + signs.empty * (16 - n), style="#e69f00" if share >= 1 else "#56b4e9")
        top = max(1, *one.rates, *one.dirty_rates)
        line.append("  rate ").append(_trend(one.rates, top, signs), style=_STYLES["sent"])
        line.append("  dirtied ").append(_trend(one.dirty_rates, top, signs), style=_STYLES["dirty"])
        lines.append(line)
    return lines


def _trend(values: Sequence[int], top: int, signs: Signs) -> str:
    highest = len(signs.levels) - 1
    return "".join(signs.levels[min(highest, value * len(signs.levels) // top)] for value in list(values)[-20:])


def _disk(one: Watched, at: int, disk: DiskView, state: ServedDisk, width: int, signs: Signs) -> list[Text]:
    head = Text("  ").append(disk.name, style="bold")
    notes = [format_size(state.size) if state.size else "size unknown", state.state, state.gate]
    rates = one.guest_rates(at)
    if rates is not None:
        notes.append(f"guests read {format_size(rates[0])}/s, write {format_size(rates[1])}/s")
    for count, what in (
        (state.parked_writes, "parked writes"),
        (disk.waiting_writes, "slowed writes"),
        (state.waiting_requests, "requests wait for the source"),
    ):
        if count:
            notes.append(f"{count} {what}")
    head.append("  " + "  ".join(notes))
    if state.io_error:
        head.append("  I/O ERROR", style="bold #ff6a2b")
    if not isinstance(state.in_doubt, UnsetType):
        head.append(f"  IN DOUBT: {state.in_doubt}", style="bold #ff6a2b")
    lines = [head]
    if isinstance(disk.map, UnsetType):
        return lines
    head.append(f"  {disk.map.chunks_per_cell:,} MiB a sign", style="bright_black")
    lines += _map(disk.map, width - 2, signs)
    lines.append(_legend(disk.map, signs))
    return lines


def _counts(chunks: ChunkMap) -> dict[str, list[int]]:
    return {
        "in-flight": chunks.in_flight,
        "dirty": chunks.dirty,
        "missing": chunks.missing,
        "sent": chunks.sent,
        "allocated": chunks.allocated,
        "hole": chunks.hole,
    }


def cell_states(chunks: ChunkMap) -> list[str]:
    """Return for each cell what its sign tells: the most important state of its chunks, and whether some are hot."""
    counts = _counts(chunks)
    n = -(-chunks.chunks // chunks.chunks_per_cell)
    states = []
    for cell in range(n):
        state = next((name for name, of in counts.items() if of and of[cell]), "hole")
        if chunks.hot and chunks.hot[cell] and state != "in-flight":
            state = "dirty and hot" if state == "dirty" else "missing" if state == "missing" else "hot"
        states.append(state)
    return states


def _map(chunks: ChunkMap, width: int, signs: Signs) -> list[Text]:
    states = cell_states(chunks)
    lines = []
    for first in range(0, len(states), width):
        line = Text("  ")
        row = states[first : first + width]
        at = 0
        while at < len(row):
            end = at + 1
            while end < len(row) and row[end] == row[at]:
                end += 1
            line.append(signs.of[row[at]] * (end - at), style=_STYLES[row[at]])
            at = end
        lines.append(line)
    return lines


def _legend(chunks: ChunkMap, signs: Signs) -> Text:
    counts = {name: sum(of) for name, of in _counts(chunks).items()} | {"hot": sum(chunks.hot)}
    line = Text("  ")
    for name, count in counts.items():
        if name == "missing" and not count:
            continue
        sign = signs.of[name] + (signs.of["dirty and hot"] if name == "hot" else "")
        line.append(sign, style=_STYLES[name]).append(f" {name.replace('-', ' ')} {count:,}  ")
    return line


def _events(watched: Sequence[Watched]) -> list[Text]:
    events = [(event.at, one, event) for one in watched if one.view is not None for event in one.view.events]
    events.sort(key=lambda item: item[0])
    lines = []
    for at, one, event in events[-N_EVENTS:]:
        name = f"  {one.path.name}" if len(watched) > 1 else ""
        lines.append(Text(f"  {_clock(at)}{name}  {event.event}  {event.text}", style="bright_black"))
    return lines


def _clock(ms: int) -> str:
    return time.strftime("%H:%M:%S", time.localtime(ms / 1000))
