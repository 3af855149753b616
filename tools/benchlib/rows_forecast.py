"""F1 and F2: the forecast against what then happens, and what the order of the bulk phase is worth."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from benchlib import images
from benchlib.copiers import MAX_COPY_S
from benchlib.load import Load
from benchlib.measure import BenchError, Contender, Row, Sample, run_case
from benchlib.qmp import Qmp
from benchlib.settings import MIB
from benchlib.stage import Stage
from benchlib.subject import Pair, side_name, why_missing

if TYPE_CHECKING:
    from benchlib.settings import Settings

_CAP: Final = 32 * MIB
"""Small, so that a guest of moderate speed is a busy one."""
_BLOCK: Final = 4096


@dataclass(frozen=True)
class _Workload:
    name: str
    share: float
    """Of the cap that its guest writes."""
    hot: float
    """Of the disk that it writes to."""


_WORKLOADS: Final = (
    _Workload("idle", 0.0, 1.0),
    _Workload("0.3 of the cap, whole disk", 0.3, 1.0),
    _Workload("0.3 of the cap, a hot 6 %", 0.3, 1 / 16),
    _Workload("0.7 of the cap, whole disk", 0.7, 1.0),
    _Workload("0.7 of the cap, a hot 6 %", 0.7, 1 / 16),
)


def _load(stage: Stage, pair: Pair, size: int, workload: _Workload) -> Load | None:
    if not workload.share:
        return None
    length = int(size * workload.hot)
    rate = round(workload.share * _CAP / _BLOCK)
    return Load(stage, str(pair.source.file()), rate=rate, start=size // 4 if workload.hot < 1 else 0, length=length)


def row_f1(settings: Settings) -> Row:
    """How far an estimate is from what happens."""
    size, watched_s = settings.pick(512 * MIB, 128 * MIB), settings.pick(20.0, 6.0)
    row = Row("F1", f"`estimate` after {watched_s:.0f} s of watching, then the migration: {size // MIB} MiB, "
                    f"--max-bandwidth {_CAP // MIB}M")  # fmt: skip

    def once(workload: _Workload, lane: str | None) -> Sample:
        with Stage(settings) as stage:
            source = images.random_image(stage.images / "source", size)
            destination = images.empty_image(stage.images / "copy", size)
            pair = Pair(stage, source, destination, lane=lane)
            load = _load(stage, pair, size, workload)
            time.sleep(watched_s)
            with Qmp(pair.source.control, timeout_s=MAX_COPY_S) as qmp:
                qmp.execute("migrate-set-parameters", max_bandwidth=_CAP)
                foreseen = qmp.execute("x-fusemig-estimate", uri=pair.uri)
            migration = pair.start().finish(MAX_COPY_S)
            usages = pair.usage(migration)
            if load is not None:
                load.stop()
            pair.stop()
            images.check_equal(source, destination)
            wire, downtime = migration.wire_bytes, migration.number("downtime")
            if not foreseen["converges"] or wire is None or downtime is None:
                raise BenchError(f"the estimate, or the account of the migration, is missing: {foreseen}")
            return Sample(
                _error(foreseen["expected-total-time"], 1000 * migration.seconds),
                *usages,
                {
                    "bytes": _error(foreseen["expected-bytes"], wire),
                    "downtime_foreseen_ms": foreseen["expected-downtime"],
                    "downtime_ms": downtime,
                    "seconds": migration.seconds,
                },
            )

    for workload in _WORKLOADS:
        contenders = [
            Contender(
                side_name(lane),
                "us",
                lambda workload=workload, lane=lane: once(workload, lane),  # type: ignore[misc]
                why_missing(settings),
            )
            for lane in settings.lanes
        ]
        case = run_case(
            f"{workload.name}: time", "% foreseen beyond what it was", contenders, settings.rounds(5, 1),
            higher_is_better=False,
        )  # fmt: skip
        row.cases.append(case)
        for what, unit, key in (
            ("bytes", "% foreseen beyond what it was", "bytes"),
            ("downtime foreseen", "ms", "downtime_foreseen_ms"),
            ("downtime", "ms", "downtime_ms"),
        ):
            row.cases.append(case.derive(f"{workload.name}: {what}", unit, key, higher_is_better=False))
    return row


def _error(foreseen: float, happened: float) -> float:
    return 100 * (foreseen - happened) / happened


def row_f2(settings: Settings) -> Row:
    """What is sent twice, by the order of the bulk phase."""
    size = settings.pick(512 * MIB, 128 * MIB)
    workload = _Workload("", 0.7, 1 / 16)
    row = Row("F2", f"4 KiB at random on 6 % of {size // MIB} MiB, at 0.7 of --max-bandwidth {_CAP // MIB}M")

    def once(order: str) -> Sample:
        with Stage(settings) as stage:
            source = images.random_image(stage.images / "source", size)
            destination = images.empty_image(stage.images / "copy", size)
            pair = Pair(stage, source, destination, lane=settings.lanes[0])
            load = _load(stage, pair, size, workload)
            assert load is not None
            time.sleep(5.0)
            migration = pair.start("--max-bandwidth", f"{_CAP // MIB}M", "--order", order).finish(MAX_COPY_S)
            usages = pair.usage(migration)
            load.stop()
            pair.stop()
            images.check_equal(source, destination)
            wire = migration.wire_bytes
            if wire is None:
                raise BenchError("`migrate --progress json` does not say what crossed the wire")
            return Sample((wire - size) / MIB, *usages, {"seconds": migration.seconds})

    contenders = [
        Contender(f"--order {order}", "us", lambda order=order: once(order), why_missing(settings))  # type: ignore[misc]
        for order in ("sequential", "heat")
    ]
    case = run_case("sent beyond the disk's size", "MiB", contenders, settings.rounds(5, 1), higher_is_better=False)
    row.cases += [case, case.derive("time", "s", "seconds", higher_is_better=False)]
    return row
