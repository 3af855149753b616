"""The report of a migration: one HTML page without a script, from its record (`x-fusemig-query-history`)."""

from __future__ import annotations

import html
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec
from msgspec import UnsetType

from fusemig.pages.page import assemble
from fusemig.units import format_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fusemig.pages.page import HtmlPage
    from fusemig.qmp.schema import FusemigMigration, MigrationRecord
    from fusemig.qmp.seeing import RecordParameters, Sample

WIDTH: Final = 900
HEIGHT: Final = 170
SHOWN_PASSES: Final = 12
"""The first and the last of them, so many each; while a migration waits for `fusemig continue` there are many."""
_OUTCOMES: Final = {
    "completed": "The destination holds every byte, proved it, and owns the disks.",
    "failed": "Nothing was handed over; the disks stayed at the source.",
    "cancelled": "It was called off; the disks stayed at the source.",
    "in-doubt": "It is not known whether the destination took the disks: see `fusemig resolve`.",
}
_PHASES: Final = {
    "setup": "connecting, handshake, finding what is allocated",
    "bulk": "first pass over all that is allocated",
    "dirty": "passes over what guests wrote meanwhile",
    "pre-switchover": "converged; waiting for `fusemig continue`",
    "frozen": "guests' writes wait; the last pass, and the proof",
    "committed": "the hand-off",
    "postcopy": "the destination owns the disks and fetches the rest",
    "cancelling": "cleaning up",
}


class Span(NamedTuple):
    """A part of a migration's time, in milliseconds since it began."""

    name: str
    start_ms: float
    end_ms: float


def report_page(record: MigrationRecord) -> HtmlPage:
    """Return the page."""
    own = record.info.x_fusemig
    assert not isinstance(own, UnsetType)
    disks = ", ".join(disk.name for disk in own.disks) or "disks"
    way = "to" if own.role.value == "source" else "from"
    title = f"Migration of {disks} {way} {record.peer}"
    parts = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="faint">began {_time(record.began)} · session {_text(own.session)} · wire {own.wire.value}</p>',
        _card("Outcome", _outcome(record, own)),
        _card("Timeline", _timeline(phases(record))),
        _card("Downtime", _downtime(record, own)),
        _card("Rates and what was pending", _charts(record.samples)),
        _card("Passes", _passes(record)),
        _card("Disks", _disks(own)),
        _card("Parameters", _parameters(record.parameters)),
        _card("Everything, as data", _data(record)),
    ]
    return assemble(title, "\n".join(part for part in parts if part), ("base.css", "report.css"))


def phases(record: MigrationRecord) -> list[Span]:
    """Return the phases with their ends; the last one, if the migration is over, takes no time and is left out."""
    ends = [step.at_ms for step in record.phases[1:]]
    if record.phases and record.phases[-1].phase not in _OUTCOMES:
        ends.append(max([record.phases[-1].at_ms, *(sample.at_ms for sample in record.samples)]))
    return [Span(step.phase, step.at_ms, end) for step, end in zip(record.phases, ends, strict=False)]


def freeze(record: MigrationRecord) -> list[Span]:
    """Return what the last freeze was made of; nothing if there was none.

    It ends when the source knows that the destination owns the disks, as the measured downtime does: what comes after
    that, until the migration is completed, keeps no guest waiting.
    """
    frozen = [span for span in phases(record) if span.name == "frozen"]
    if not frozen:
        return []
    start, proved = frozen[-1].start_ms, frozen[-1].end_ms
    last_passes = [step.at_ms for step in record.passes if start <= step.at_ms <= proved]
    begun = last_passes[0] if last_passes else start
    spans = [Span("writes in progress end", start, begun)] if last_passes else []
    spans.append(Span("last pass, syncs, digests", begun, proved))
    committed = [span for span in phases(record) if span.name == "committed" and span.start_ms >= proved]
    if committed:
        own = record.info.x_fusemig
        measured = 0.0 if isinstance(own, UnsetType) or isinstance(record.info.downtime, UnsetType) else own.frozen_ms
        end = max(proved, start + measured) if measured else committed[-1].end_ms
        spans.append(Span("hand-off", proved, end))
    return spans


def _text(value: object) -> str:
    return html.escape(str(value))


def _time(ms: int) -> str:
    return f"{datetime.fromtimestamp(ms / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _duration(ms: float) -> str:
    if ms < 1000:
        return f"{ms:.1f} ms"
    return f"{ms / 1000:.2f} s" if ms < 120_000 else f"{ms // 60_000:.0f} min {ms % 60_000 / 1000:.0f} s"


def _card(title: str, content: str) -> str:
    return f'<section class="card"><h2>{title}</h2>{content}</section>' if content else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, is_text: bool = False) -> str:
    """Return a table; ``is_text``: its last column is."""
    last = ' class="text"' if is_text else ""
    lines = []
    for row in rows:
        cells = "".join(f"<td>{cell}</td>" for cell in row[:-1])
        lines.append(f"<tr>{cells}<td{last}>{row[-1]}</td></tr>")
    if not lines:
        return ""
    titles = "".join(f"<th>{title}</th>" for title in head[:-1]) + f"<th{last}>{head[-1]}</th>"
    return f'<div class="scroll"><table><tr>{titles}</tr>{"".join(lines)}</table></div>'


def _figures(pairs: Iterable[tuple[str, str]]) -> str:
    boxes = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in pairs)
    return f'<dl class="figures">{boxes}</dl>'


def _outcome(record: MigrationRecord, own: FusemigMigration) -> str:
    info = record.info
    mark = {"completed": "good", "failed": "bad", "in-doubt": "bad"}.get(own.phase, "faint")
    said = _OUTCOMES.get(own.phase, "It was under way when this was written.")
    if own.phase == "completed" and own.wire.value == "qemu":
        said = "Everything was sent; QEMU's wire proves nothing."
    lines = [f'<p><span class="{mark}">{_text(own.phase)}</span> {_text(said)}</p>']
    if not isinstance(info.error_desc, UnsetType):
        lines.append(f'<p class="bad">{_text(info.error_desc)}</p>')
    figures = []
    if not isinstance(info.total_time, UnsetType):
        figures.append(("took", _duration(info.total_time)))
        if info.total_time and own.wire_bytes:
            figures.append(("on average", f"{format_size(own.wire_bytes * 1000 / info.total_time)}/s"))
    figures += [("on the wire", format_size(own.wire_bytes)), ("passes", f"{own.pass_}")]
    if not isinstance(info.downtime, UnsetType):
        figures.insert(1, ("downtime", _duration(own.frozen_ms)))
    for name, amount in (
        ("dirtied meanwhile", own.bytes_dirtied),
        ("already there", own.kept_bytes),
        ("rewritten unchanged", own.unchanged_bytes),
    ):
        if amount:
            figures.append((name, format_size(amount)))
    if not isinstance(own.compression, UnsetType) and own.compression.bytes_in:
        figures.append(("compressed to", f"{own.compression.bytes_out / own.compression.bytes_in:.0%}"))
    if own.reconnects:
        figures.append(("reconnects", f"{own.reconnects}"))
    if not isinstance(own.guest, UnsetType):
        figures.append((f"guest ({_text(own.guest.runtime)})", _text(own.guest.state)))
    return "".join([*lines, _figures(figures)])


def _bar(spans: Sequence[Span], classes: Sequence[str]) -> str:
    """Return a bar of spans, each at least visible."""
    start, end = spans[0].start_ms, max(spans[-1].end_ms, spans[0].start_ms + 0.001)
    boxes = []
    for span, name in zip(spans, classes, strict=True):
        x = WIDTH * (span.start_ms - start) / (end - start)
        width = max(1.5, WIDTH * (span.end_ms - span.start_ms) / (end - start))
        title = f"{_text(span.name)}: {_duration(span.end_ms - span.start_ms)}"
        boxes.append(
            f'<rect class="{_text(name)}" x="{x:.1f}" y="0" width="{width:.1f}" height="22">'
            f"<title>{title}</title></rect>"
        )
    return (
        f'<svg viewBox="0 0 {WIDTH} 40" role="img" aria-label="timeline">{"".join(boxes)}<text x="0" y="36">0</text>'
        f'<text x="{WIDTH}" y="36" text-anchor="end">{_duration(end - start)}</text></svg>'
    )


def _timeline(spans: Sequence[Span]) -> str:
    if not spans:
        return ""
    rows = [
        (
            _text(span.name),
            _duration(span.start_ms),
            _duration(span.end_ms - span.start_ms),
            _text(_PHASES.get(span.name, "")),
        )
        for span in spans
    ]
    return _bar(spans, [span.name for span in spans]) + _table(
        ("phase", "began after", "took", "what happened"), rows, is_text=True
    )


def _downtime(record: MigrationRecord, own: FusemigMigration) -> str:
    spans = freeze(record)
    if not spans:
        return "<p>Guests were never frozen.</p>" if own.role.value == "source" else ""
    rows = [(_text(span.name), _duration(span.end_ms - span.start_ms)) for span in spans]
    limit = record.parameters
    note = "" if isinstance(limit, UnsetType) else f"<p>The limit was {_duration(limit.downtime_limit)}.</p>"
    classes = ["dirty", "frozen", "committed"][-len(spans) :]
    return _bar(spans, classes) + _table(("part", "took"), rows) + note


def _charts(samples: Sequence[Sample]) -> str:
    if len(samples) < 2:
        return "<p>Too short for a chart.</p>"
    rates = _chart(
        samples, {"rate": [one.bandwidth for one in samples], "dirty-rate": [one.dirty_rate for one in samples]}
    )
    pending = _chart(samples, {"rate": [one.remaining for one in samples]}, unit="")
    return (
        f'{rates}<p class="keys">solid: acknowledged a second; dashed: dirtied a second</p>'
        f'{pending}<p class="keys">still to be sent</p>'
    )


def _chart(samples: Sequence[Sample], lines: dict[str, list[int]], unit: str = "/s") -> str:
    start, end = samples[0].at_ms, max(samples[-1].at_ms, samples[0].at_ms + 1)
    top = max(1, *(value for values in lines.values() for value in values))
    low, high = HEIGHT - 18, 16
    drawn = []
    for name, values in lines.items():
        points = " ".join(
            f"{WIDTH * (one.at_ms - start) / (end - start):.1f},{low - (low - high) * value / top:.1f}"
            for one, value in zip(samples, values, strict=True)
        )
        drawn.append(f'<polyline class="line {name}" points="{points}"/>')
    grid = "".join(
        f'<line class="grid" x1="0" x2="{WIDTH}" y1="{low - (low - high) * share:.1f}" '
        f'y2="{low - (low - high) * share:.1f}"/>'
        for share in (0.0, 0.5, 1.0)
    )
    marks = "".join(
        f'<text x="2" y="{low - (low - high) * share - 3:.1f}">{format_size(top * share)}{unit}</text>'
        for share in (0.5, 1.0)
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="chart">{grid}{"".join(drawn)}{marks}'
        f'<text x="{WIDTH}" y="{HEIGHT - 4}" text-anchor="end">{_duration(end)}</text></svg>'
    )


def _passes(record: MigrationRecord) -> str:
    ends = [step.at_ms for step in record.passes[1:]]
    rows = [
        (
            f"{step.pass_}",
            _duration(step.at_ms),
            _duration(ends[at] - step.at_ms) if at < len(ends) else "",
            format_size(step.remaining),
            format_size(step.wire_bytes),
        )
        for at, step in enumerate(record.passes)
    ]
    n_left_out = len(rows) - 2 * SHOWN_PASSES
    if n_left_out > 0:
        rows[SHOWN_PASSES:-SHOWN_PASSES] = [("…", "", "", f"{n_left_out} more in the data below", "")]
    return _table(("pass", "began after", "took", "pending then", "on the wire by then"), rows)


def _disks(own: FusemigMigration) -> str:
    is_proved = own.phase == "completed" and own.wire.value == "native"
    rows = [
        (
            _text(disk.name),
            format_size(disk.size),
            format_size(disk.sent_bytes),
            format_size(disk.dirty_bytes),
            "" if isinstance(disk.digest, UnsetType) else f"<code>{_text(disk.digest)}</code>",
        )
        for disk in own.disks
    ]
    title = "digest, the same on both sides" if is_proved else "digest of what was sent"
    return _table(("disk", "size", "sent, in all passes", "still dirty", title), rows)


def _parameters(parameters: RecordParameters | UnsetType) -> str:
    if isinstance(parameters, UnsetType):
        return ""
    rows = [(_text(name), _text(_value(name, value))) for name, value in msgspec.to_builtins(parameters).items()]
    return _table(("parameter", "value"), rows, is_text=True)


def _value(name: str, value: object) -> str:
    if name == "max-bandwidth" and isinstance(value, int):
        return f"{format_size(value)}/s" if value else "no limit"
    if name in ("downtime-limit", "reconnect") and isinstance(value, int):
        return _duration(value)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _data(record: MigrationRecord) -> str:
    text = json.dumps(msgspec.to_builtins(record), indent=1)
    return f"<details><summary>JSON</summary><pre>{_text(text)}</pre></details>"
