"""The demo's one screen: what moved, what it cost, and what was checked afterwards."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from fusemig.core.units import format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fusemig.cli.demo_writer import Log

_LABEL_WIDTH: Final = 15


@dataclass(frozen=True)
class Check:
    """One thing that had to hold."""

    is_ok: bool
    text: str


@dataclass
class Report:
    """Everything that the screen shows."""

    writer: str
    size: int
    log: Log
    info: dict[str, Any]
    """The source's last ``query-migrate``."""
    begun_at: float
    """When the migration was asked for, on the machine's monotonic clock, in seconds."""
    converged_s: float | None
    """From then to pre-switchover; None where the migration did not wait there."""
    ended_at: float
    checks: list[Check] = field(default_factory=list)

    @property
    def is_ok(self) -> bool:
        """Whether everything held."""
        return all(check.is_ok for check in self.checks)

    def lines(self) -> list[str]:
        """Return the screen, line by line."""
        rows = [("writer", self.writer), *self._move(), *self._commits()]
        return page("A busy disk moved from one mount to another while it was being written", rows, self.checks)

    def _move(self) -> list[tuple[str, str]]:
        own = self.info["x-fusemig"]
        total_s = self.info["total-time"] / 1000
        copying_s = total_s if self.converged_s is None else self.converged_s
        took = f"{total_s:.2f} s"
        if self.converged_s is not None:
            took += f" ({copying_s:.2f} s to converge, the rest for the writer to stop and unmount)"
        dirtied = format_size(own["bytes-dirtied"])
        return [
            ("disk", f"{format_size(self.size)}, full of random data"),
            ("moved in", took),
            ("rate", f"{format_size(self.size / max(copying_s, 1e-3))}/s, verified"),
            ("passes", f"{own['pass']}"),
            ("sent", f"{format_size(own['wire-bytes'])} on the wire (zeros cost nothing), {dirtied} dirtied meanwhile"),
            ("downtime", f"{own['frozen-ms']:.1f} ms from closing the write gate to the take-over"),
        ]

    def _commits(self) -> list[tuple[str, str]]:
        during = [commit.seconds for commit in self.log.commits if self.begun_at < commit.ended_at <= self.ended_at]
        before = [commit.seconds for commit in self.log.commits if commit.ended_at <= self.begun_at]
        rows = [("commits", f"{len(self.log.commits):,} acknowledged, {len(during):,} of them while the disk moved")]
        if self.log.refused is not None:
            rows.append(
                ("last write", f"answered 'read-only' after {_ms(self.log.refused.seconds)}, at the switchover")
            )
            during.append(self.log.refused.seconds)
        if during and before:
            seen = f"{_ms(max(during))} that a commit saw while the disk moved"
            usual = f"before: {_ms(max(before))}, in the median {_ms(statistics.median(before))}"
            rows.append(("longest pause", f"{seen} ({usual})"))
        return rows


def page(title: str, rows: Sequence[tuple[str, str]], checks: Sequence[Check]) -> list[str]:
    """Return a demo's screen, line by line."""
    n_failed = sum(not check.is_ok for check in checks)
    verdict = "everything held" if not n_failed else f"{n_failed} of {len(checks)} checks FAILED"
    return [
        title,
        "",
        *(f"  {label:{_LABEL_WIDTH}}{value}" for label, value in rows),
        "",
        *(f"  {'ok    ' if check.is_ok else 'FAILED'}  {check.text}" for check in checks),
        "",
        f"  {verdict}",
    ]


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"
