"""C1 to C4: moving a disk whose guest writes 0.5 to 4 times as much as the link carries; does it end, at what price?

Every side has the same capped link, the same writer (`benchlib.load`, one write at a time) and the same patience. What
does not end within it is called off and noted; its figures then are those of the time until then.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from benchlib import images
from benchlib.copiers import MIRROR, MirrorPair
from benchlib.exporters import QSD
from benchlib.load import BLOCK, Load
from benchlib.measure import BenchError, Contender, Goal, Row, Sample, run_case
from benchlib.network import make_link
from benchlib.settings import MIB
from benchlib.stage import Stage, missing, run
from benchlib.subject import Pair, side_name, why_missing

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchlib.load import Recording
    from benchlib.measure import Case, Usage
    from benchlib.settings import Settings

_MBIT: Final = 100
_LINK: Final = _MBIT * 1e6 / 8
_PATIENCE: Final = 8.0
"""How long a side may take, in times of what the link needs for the whole disk."""
_FACTORS: Final = (0.5, 0.9, 1.5, 4.0)
_HOT_SHARE: Final = 20
"""The hot part of a disk is one of so many."""

_GUEST_SHARE: Final = 0.8
"""What guests that write more than the link carries should keep, in times of what it carries."""
_DOWNTIME_MS: Final = 30


@dataclass(frozen=True)
class _Cell:
    """What a guest does."""

    factor: float
    """What it writes, if nobody slows it down, in times of what the link carries."""
    is_sequential: bool
    is_hot: bool
    size: int

    def load(self, stage: Stage, target: str) -> Load:
        """Start the guest."""
        length = self.size // _HOT_SHARE // BLOCK * BLOCK if self.is_hot else self.size
        return Load(
            stage,
            target,
            rate=int(self.factor * _LINK / BLOCK),
            start=self.size // 3 // BLOCK * BLOCK if self.is_hot else 0,
            length=length,
            is_sequential=self.is_sequential,
        )

    @property
    def patience_s(self) -> float:
        """How long a side may take, in seconds."""
        return _PATIENCE * self.size / _LINK

    def sample(
        self,
        seen: Recording,
        seconds: float,
        span: tuple[float, float],
        wire: int,
        downtime_ms: float,
        usages: tuple[Usage, Usage],
        *,
        has_ended: bool,
    ) -> Sample:
        """Return what came of it; the guest's figures are those of ``span``, in which its disk was moved."""
        written = BLOCK * len(seen.between(*span))
        extra = {
            "ended": float(has_ended),
            "guest": written / (span[1] - span[0]) / _LINK,
            "p99_ms": _p99(seen.between(*span)) * 1000,
            "amplification": max(0.0, wire - self.size) / max(written, 1),
        }
        if has_ended:
            extra["downtime_ms"] = downtime_ms
        return Sample(seconds, *usages, extra)


def _p99(latencies: list[float]) -> float:
    ranked = sorted(latencies)
    return ranked[int(len(ranked) * 0.99)] if ranked else 0.0


def _ours(settings: Settings, cell: _Cell, note: Callable[[str], None], name: str, *options: str) -> Contender:
    def once() -> Sample:
        with Stage(settings) as stage:
            link = make_link(stage, _MBIT)
            source = images.random_image(stage.images / "source", cell.size)
            destination = images.empty_image(stage.images / "copy", cell.size)
            pair = Pair(stage, source, destination, lane=settings.lanes[0], host=link.host, prefixes=link.prefixes)
            load = cell.load(stage, str(pair.source.file()))
            wire = link.sent_bytes()
            migration = pair.start(*options)
            has_ended = migration.program.wait_ended(cell.patience_s)
            ended = time.monotonic()
            if not has_ended:
                note(f"{name} at {cell.factor:g}x did not end within {cell.patience_s:.0f} s and was cancelled")
                run([*settings.fusemig, "cancel", pair.source.control])
                with suppress(BenchError):
                    migration.program.check(20)
            else:
                migration.finish(5)
            wire = link.sent_bytes() - wire
            seen = load.stop()
            usages = pair.usage(migration)
            pair.stop()
            if has_ended:
                images.check_equal(source, destination)
            downtime_ms = migration.number("downtime") if has_ended else None
            # Not the start and the end of the command: the disk was not moved yet then, or it was elsewhere.
            span = (seen.stopped_at - migration.seconds, seen.stopped_at) if has_ended else (migration.started, ended)
            return cell.sample(
                seen, ended - migration.started, span, wire, downtime_ms or 0.0, usages, has_ended=has_ended
            )

    return Contender(name, "us", once, why_missing(settings))


def _peer(settings: Settings, cell: _Cell, note: Callable[[str], None], copy_mode: str) -> Contender:
    name = f"{MIRROR}, {copy_mode}"

    def once() -> Sample:
        with Stage(settings) as stage:
            link = make_link(stage, _MBIT)
            source = images.random_image(stage.images / "source", cell.size)
            destination = images.empty_image(stage.images / "copy", cell.size)
            path = stage.path("n")
            pair = MirrorPair(
                stage, source, destination, guest_export=str(path), host=link.host, prefixes=link.prefixes
            )
            meters = pair.source.meter(), pair.destination.meter()
            load = cell.load(stage, f"nbd:{path}:disk")
            wire = link.sent_bytes()
            began = time.monotonic()
            pair.start(copy_mode)
            has_ended = True
            try:
                pair.wait_bulk(cell.patience_s)
            except BenchError:
                has_ended = False
                note(f"{name} at {cell.factor:g}x was not ready within {cell.patience_s:.0f} s and was given up")
            frozen = time.monotonic()
            seen = load.stop()  # as a virtual machine is stopped before it goes on elsewhere
            if has_ended:
                frozen = time.monotonic()
                pair.finish(30)
            ended = time.monotonic()
            wire = link.sent_bytes() - wire
            if has_ended:
                images.check_equal(source, destination)
            usages = meters[0](), meters[1]()
            return cell.sample(
                seen, frozen - began, (began, frozen), wire, (ended - frozen) * 1000, usages, has_ended=has_ended
            )

    return Contender(name, "peer", once, missing(QSD))


def _short(settings: Settings, cell: _Cell, note: Callable[[str], None]) -> list[Contender]:
    """A hot set that fits the default downtime limit is sent while guests stand still, unless the limit is shorter."""
    return [
        _ours(settings, cell, note, f"{side_name(settings.lanes[0])} --downtime-limit 30ms", "--downtime-limit", "30ms")
    ]


def _row(settings: Settings, key: str, *, is_sequential: bool, is_hot: bool) -> Row:
    size = settings.pick(128 * MIB, 32 * MIB)
    order = "sequential" if is_sequential else "random"
    where = f"in a hot {100 // _HOT_SHARE} %" if is_hot else "on the whole disk"
    row = Row(key, f"{order} 4 KiB writes {where}, {size // MIB} MiB over {_MBIT} Mbit/s")
    notes: list[str] = []
    for factor in _FACTORS:
        cell = _Cell(factor, is_sequential, is_hot, size)
        contenders = [
            _ours(settings, cell, notes.append, side_name(settings.lanes[0])),
            _ours(settings, cell, notes.append, f"{side_name(settings.lanes[0])} --mode mirror", "--mode", "mirror"),
            *(_short(settings, cell, notes.append) if is_hot else ()),
            *(_peer(settings, cell, notes.append, copy_mode) for copy_mode in ("background", "write-blocking")),
        ]
        case = run_case(f"{factor:g}x: time", "s", contenders, settings.rounds(3, 1), higher_is_better=False)
        row.cases += [
            case,
            _held_to(case.derive(f"{factor:g}x: ended", "of 1", "ended"), Goal(1)),
            _held_to(
                case.derive(f"{factor:g}x: guest's throughput", "of the link", "guest"),
                *([Goal(_GUEST_SHARE)] if factor > 1 else []),
            ),
            case.derive(f"{factor:g}x: guest's p99", "ms", "p99_ms", higher_is_better=False),
            case.derive(
                f"{factor:g}x: bytes beyond the disk's size", "per byte written", "amplification",
                higher_is_better=False,
            ),
            _held_to(
                case.derive(f"{factor:g}x: downtime", "ms", "downtime_ms", higher_is_better=False),
                Goal(_DOWNTIME_MS, at_most=True),
            ),
        ]  # fmt: skip
    row.notes += sorted(set(notes))
    row.notes.append(
        "ours: downtime as the engine reports it, hand-off and proof included; the peer: from the stop of the writer "
        "to the end of the job, without a hand-off; the peer's guest writes through NBD"
    )
    return row


def _held_to(case: Case, *goals: Goal) -> Case:
    case.goals += goals
    return case


def row_c1(settings: Settings) -> Row:
    """Random writes on the whole disk."""
    return _row(settings, "C1", is_sequential=False, is_hot=False)


def row_c2(settings: Settings) -> Row:
    """Random writes in a hot part."""
    return _row(settings, "C2", is_sequential=False, is_hot=True)


def row_c3(settings: Settings) -> Row:
    """Sequential writes over the whole disk, again and again."""
    return _row(settings, "C3", is_sequential=True, is_hot=False)


def row_c4(settings: Settings) -> Row:
    """Sequential writes in a hot part, again and again."""
    return _row(settings, "C4", is_sequential=True, is_hot=True)
