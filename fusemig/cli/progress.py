"""What ``fusemig migrate`` shows while it waits: a live display, plain lines, JSON lines, or nothing."""

from __future__ import annotations

import json
import sys
import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fusemig.cli.pacing import notes
from fusemig.core.units import format_size

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

PLAIN_INTERVAL_S: Final = 5.0
JSON_INTERVAL_S: Final = 0.5


class Display(AbstractContextManager["Display"]):
    """Shows answers of ``query-migrate``; this one shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the display; what it shows stays on the screen."""

    def show(self, info: dict[str, Any], of: str = "") -> None:
        """Show one answer; of the daemon ``of``, where there are several."""


def make_display(kind: str) -> Display:
    """Return the display for ``--progress``: auto is the live one on a terminal, plain lines elsewhere."""
    if kind == "none":
        return Display()
    if kind == "json":
        return _JsonDisplay()
    if kind == "plain" or not sys.stderr.isatty():
        return _PlainDisplay()
    return _LiveDisplay()


class _Throttle:
    """Lets something through at an interval, and whenever the status changes."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._next: dict[str, float] = {}
        self._last: dict[str, str] = {}

    def is_due(self, status: str, of: str) -> bool:
        now = time.monotonic()
        if now < self._next.get(of, 0.0) and status == self._last[of]:
            return False
        self._next[of], self._last[of] = now + self._interval_s, status
        return True


class _JsonDisplay(Display):
    """One object a line on stdout, as ``query-migrate`` gives it; the last is the outcome."""

    def __init__(self) -> None:
        self._throttle = _Throttle(JSON_INTERVAL_S)

    def show(self, info: dict[str, Any], of: str = "") -> None:
        if self._throttle.is_due(info.get("status", ""), of):
            print(json.dumps(({"socket": of} if of else {}) | info), flush=True)


class _PlainDisplay(Display):
    """A line on stderr every few seconds and at each change of phase."""

    def __init__(self) -> None:
        self._throttle = _Throttle(PLAIN_INTERVAL_S)

    def show(self, info: dict[str, Any], of: str = "") -> None:
        own = info.get("x-fusemig", {})
        if self._throttle.is_due(own.get("phase", ""), of):
            print(f"fusemig: {f'{of}: ' if of else ''}{summary(info)}", file=sys.stderr, flush=True)


class _LiveDisplay(Display):
    """Phase, a bar for each disk, and the numbers that decide when it ends; redrawn in place."""

    def __init__(self) -> None:
        self._live = Live(console=Console(stderr=True), refresh_per_second=10, transient=False)
        self._shown: dict[str, Group] = {}

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, info: dict[str, Any], of: str = "") -> None:
        own = info.get("x-fusemig", {})
        disks = Table.grid(padding=(0, 1))
        for disk in own.get("disks", []):
            share = disk["pass-progress"]
            disks.add_row(
                Text(disk["name"], style="bold"),
                ProgressBar(total=1.0, completed=share, width=40),
                f"{share:4.0%}",
                f"{format_size(disk['dirty-bytes'])} dirty",
                f"{disk['in-flight-chunks']} in flight",
            )
        self._shown[of] = Group(Text(f"{of}: {summary(info)}" if of else summary(info)), disks)
        self._live.update(Group(*self._shown.values()))


def summary(info: dict[str, Any]) -> str:
    """Describe a running migration in one line."""
    own = info.get("x-fusemig", {})
    parts = [own.get("phase", info.get("status", "starting"))]
    if "guest" in own:
        parts.append(f"guest {own['guest']['state']}")
    if own.get("waiting"):
        parts.append(f"no connection ({own['waiting']}), trying again")
    if own.get("pass"):
        parts.append(f"pass {own['pass']}")
    parts += notes(own)
    if "disk" in info:
        pending, rate = info["disk"]["remaining"], own.get("bandwidth", 0)
        parts.append(f"{format_size(pending)} pending")
        parts.append(f"{format_size(rate)}/s")
        if own.get("dirty-rate"):
            parts.append(f"dirtied {format_size(own['dirty-rate'])}/s")
        if "eta" in own:
            parts.append(f"about {own['eta'] / 1000:.0f} s left")
        elif own.get("converges") is False:
            parts.append("does not converge (see `fusemig estimate -h`)")
    if "expected-downtime" in info and own.get("bandwidth"):  # without, it is only as large as QMP can say
        parts.append(f"expected downtime {info['expected-downtime']} ms")
    if "downtime" in info:
        parts.append(f"downtime {info['downtime']} ms")
    return ", ".join(parts)
