"""D1 to D3: moving a disk that is being written, and what its guest feels of it."""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import TYPE_CHECKING

from benchlib import copiers, images, paced
from benchlib.copiers import MAX_COPY_S, MIRROR, QEMU_MIGRATE, MirrorPair, QemuPair
from benchlib.exporters import QSD
from benchlib.load import BLOCK, Load, merge
from benchlib.measure import BenchError, Contender, Goal, Row, Sample, run_case
from benchlib.settings import GIB, MIB
from benchlib.stage import Stage, missing
from benchlib.subject import Pair, side_name, why_missing

if TYPE_CHECKING:
    from pathlib import Path

    from benchlib.load import Recording
    from benchlib.program import Program
    from benchlib.settings import Settings

_CAP: int = 128 * MIB
_RATE = 1000
_GUESTS = 4
_BACKGROUND_RATE: int = 50 * MIB


def row_d1(settings: Settings) -> Row:
    """What a small write costs on the wire."""
    size = settings.pick(512 * MIB, 256 * MIB)
    patience_s = settings.pick(20.0, 5.0)
    row = Row("D1", f"4 KiB random writes at {_RATE}/s while {size // MIB} MiB move at {_CAP // MIB} MiB/s")

    def ours(lane: str | None) -> Contender:
        def once() -> Sample:
            with Stage(settings) as stage:
                source, destination = _images(stage, size)
                pair = Pair(stage, source, destination, lane=lane)
                load = Load(stage, str(pair.source.file()), rate=_RATE, start=0, length=size)
                migration = pair.start("--max-bandwidth", f"{_CAP // MIB}M").finish(MAX_COPY_S)
                seen = load.stop()
                usages = pair.usage(migration)
                pair.stop()
                images.check_equal(source, destination)
                wire = migration.wire_bytes
                if wire is None:
                    raise BenchError("`migrate --progress json` reports neither wire-bytes nor disk.transferred")
                # The guest's own count from the command on; the engine's, if it gives one, is kept beside it.
                dirtied = BLOCK * len(seen.between(migration.started, float("inf")))
                extra = {"wire_bytes": wire, "bytes_dirtied": float(dirtied), "seconds": migration.seconds}
                if migration.bytes_dirtied is not None:
                    extra["bytes_dirtied_reported"] = migration.bytes_dirtied
                return Sample(_amplification(wire, size, dirtied), *usages, extra)

        return Contender(side_name(lane), "us", once, why_missing(settings))

    unfinished: list[str] = []

    def qemu() -> Sample:
        with Stage(settings) as stage:
            source, destination = _images(stage, size)
            pair = QemuPair(stage, source, destination)
            load = Load(stage, _export_to_guest(stage, pair), rate=_RATE, start=0, length=size)
            pair.limit(_CAP)
            meters = pair.source.meter(), pair.destination.meter()
            began = time.monotonic()
            pair.start()
            info = pair.query()
            wire = 0
            while info["status"] in ("setup", "active", "device") and time.monotonic() - began < patience_s:
                time.sleep(0.02)
                info = pair.query() or info
                wire = pair.wire_bytes() or wire
            dirtied = BLOCK * len(load.stop().between(began, float("inf")))
            if info["status"] == "active":
                unfinished.append(f"{QEMU_MIGRATE} did not converge within {patience_s:.0f} s and was cancelled")
                pair.qmp.execute("migrate_cancel")
            extra = {"wire_bytes": float(wire), "bytes_dirtied": float(dirtied)}
            return Sample(_amplification(wire, size, dirtied), meters[0](), meters[1](), extra)

    contenders = [*(ours(lane) for lane in settings.lanes)]
    contenders.append(Contender(QEMU_MIGRATE, "peer", qemu, missing("qemu-system-x86_64")))
    row.cases.append(
        run_case(
            "bytes sent beyond the disk's size",
            "per byte written",
            contenders,
            settings.rounds(3, 1),
            higher_is_better=False,
            goals=(Goal(1.25, at_most=True),),
        )
    )
    row.notes += sorted(set(unfinished))
    row.notes.append("QEMU's guest is the same writer through an NBD export of the migrating QEMU")
    return row


def _images(stage: Stage, size: int) -> tuple[Path, Path]:
    return (
        images.random_image(stage.images / "source", size),
        images.empty_image(stage.images / "copy", size),
    )


def _amplification(wire: float, size: int, dirtied: int) -> float:
    if not dirtied:
        raise BenchError("the guest wrote nothing during the migration")
    return max(wire - size, 0.0) / dirtied


def _export_to_guest(stage: Stage, pair: QemuPair) -> str:
    path = stage.path("n")
    pair.qmp.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
    pair.qmp.execute("block-export-add", type="nbd", id="g", node_name="f", name="disk", writable=True)
    return f"nbd:{path}:disk"


def row_d2(settings: Settings) -> Row:
    """What a guest keeps of its speed during the bulk phase."""
    size, idle_s = settings.pick(4 * GIB, 512 * MIB), settings.pick(3.0, 1.0)
    row = Row(
        "D2", f"{_GUESTS} guests writing 4 KiB at random during the bulk phase of {size // MIB} MiB, uncapped, tmpfs"
    )

    def ours(lane: str | None) -> Contender:
        def once() -> Sample:
            with Stage(settings) as stage:
                source, destination = _images(stage, size)
                pair = Pair(stage, source, destination, lane=lane)
                guests = _guests(stage, str(pair.source.file()), size)
                began = time.monotonic()
                time.sleep(idle_s)
                migration = pair.start().finish(MAX_COPY_S)
                seen = merge([guest.stop() for guest in guests])
                usages = pair.usage(migration)
                pair.stop()
                images.check_equal(source, destination)
                moved = seen.times[-1]  # the source's last acknowledgement: there the guest stops
                sample = _share(seen, (began, migration.started), moved - migration.seconds, moved)
                return Sample(sample.value, *usages, sample.extra)

        return Contender(side_name(lane), "us", once, why_missing(settings))

    def mirror() -> Sample:
        with Stage(settings) as stage:
            source, destination = _images(stage, size)
            path = stage.path("n")
            pair = MirrorPair(stage, source, destination, guest_export=str(path))
            meters = pair.source.meter(), pair.destination.meter()
            guests = _guests(stage, f"nbd:{path}:disk", size)
            idle_from = time.monotonic()
            time.sleep(idle_s)
            began = time.monotonic()
            pair.start()
            pair.wait_first_pass(MAX_COPY_S)
            ended = time.monotonic()
            seen = merge([guest.stop() for guest in guests])
            pair.wait_bulk(MAX_COPY_S)
            pair.finish(30)
            images.check_equal(source, destination)
            sample = _share(seen, (idle_from, began), began, ended)
            return Sample(sample.value, meters[0](), meters[1](), sample.extra)

    contenders = [*(ours(lane) for lane in settings.lanes), Contender(MIRROR, "peer", mirror, missing(QSD))]
    case = run_case("throughput kept", "of idle", contenders, settings.rounds(5, 1), goals=(Goal(0.7),))
    tail = case.derive("p99 latency", "times idle", "p99_ratio", higher_is_better=False)
    tail.goals = [Goal(3.0, at_most=True)]
    row.cases += [case, tail]
    for name, unit, key, higher in (
        ("writes/s, idle", "IOPS", "idle_iops", True),
        ("writes/s, during", "IOPS", "busy_iops", True),
        ("p99, during", "µs", "busy_p99_us", False),
        ("bulk phase", "s", "seconds", False),
    ):
        row.cases.append(case.derive(name, unit, key, higher_is_better=higher))
    row.notes.append("the bulk phase of the mirror ends when as many bytes as the disk has are copied")
    row.notes.append("each side against its own idle; the peer's guest writes through NBD, ours through the mount")
    return row


def _guests(stage: Stage, target: str, size: int) -> list[Load]:
    # Several, so that the processors do not fall asleep between two writes: a lone idle guest would be slower than a
    # busy one, for the time it takes to wake them.
    part = size // _GUESTS
    return [Load(stage, target, rate=0, start=number * part, length=part) for number in range(_GUESTS)]


def _share(seen: Recording, idle_span: tuple[float, float], start: float, stop: float) -> Sample:
    idle, busy = seen.between(*idle_span), seen.between(start, stop)
    if len(idle) < 100 or len(busy) < 100 or stop - start < 0.1:
        raise BenchError(f"too short to tell: {len(idle)} writes idle, {len(busy)} in {stop - start:.2f} s of copying")
    idle_rate = len(idle) / (idle_span[1] - idle_span[0])
    busy_rate = len(busy) / (stop - start)
    idle_p99, busy_p99 = (statistics.quantiles(some, n=100)[98] for some in (idle, busy))
    extra = {
        "p99_ratio": busy_p99 / idle_p99,
        "idle_iops": idle_rate,
        "busy_iops": busy_rate,
        "idle_p99_us": idle_p99 * 1e6,
        "busy_p99_us": busy_p99 * 1e6,
        "seconds": stop - start,
    }
    return Sample(busy_rate / idle_rate, extra=extra)


def row_d3(settings: Settings) -> Row:
    """The pause that a guest sees."""
    size = settings.pick(512 * MIB, 256 * MIB)
    row = Row("D3", "longest gap between two acknowledged 1 ms-paced writes across the switchover")

    def ours(lane: str | None) -> Contender:
        def once() -> Sample:
            with Stage(settings) as stage:
                source, destination = _images(stage, size)
                pair = Pair(stage, source, destination, lane=lane)
                record = stage.path("paced")
                guest = stage.start(
                    sys.executable, "-m", "benchlib.paced",
                    pair.source.file(), pair.destination.file(), record, "0.3",
                )  # fmt: skip
                guest.wait_ready(record.with_suffix(".ready").exists)
                background = _background(stage, pair.source.file(), size)
                time.sleep(1.0)
                migration = pair.start().finish(MAX_COPY_S)
                usages = pair.usage(migration)
                guest.check(30)
                background.wait(30)
                pair.stop()
                seen = json.loads(record.read_text())
                if not seen["moved"]:
                    raise BenchError("the paced guest never saw EROFS at the source")
                if seen["lost"]:
                    raise BenchError(f"{seen['lost']} acknowledged writes are not at the destination")
                images.check_equal(source, destination, start=paced.REGION)
                extra = {"background_mib_s": _background_rate(background), "seconds": migration.seconds}
                if (downtime := migration.number("downtime")) is not None:
                    extra["downtime_ms"] = downtime
                return Sample(seen["gap_s"] * 1000, *usages, extra)

        return Contender(side_name(lane), "us", once, why_missing(settings))

    def qemu() -> Sample:
        with Stage(settings) as stage:
            source, destination = _images(stage, 128 * MIB)
            sample = copiers.qemu_migrate(stage, source, destination)
            images.check_equal(source, destination)
            return Sample(sample.extra["downtime_ms"], sample.source, sample.destination)

    contenders = [*(ours(lane) for lane in settings.lanes)]
    contenders.append(Contender(f"{QEMU_MIGRATE}: reported downtime", "peer", qemu, missing("qemu-system-x86_64")))
    case = run_case(
        "longest gap",
        "ms",
        contenders,
        settings.rounds(20, 3),
        higher_is_better=False,
        goals=(Goal(20, at_most=True), Goal(60, at_most=True, percent=99)),
    )
    row.cases.append(case)
    row.cases.append(case.derive("reported downtime", "ms", "downtime_ms", higher_is_better=False))
    row.cases.append(case.derive("background writes reached", "MiB/s", "background_mib_s"))
    row.notes.append(
        f"background: {_BACKGROUND_RATE // MIB} MiB/s of 4 KiB random writes until the switchover; QEMU's figure is "
        "for an idle disk, because with these writes it does not converge; every acknowledged write was read back"
    )
    return row


def _background(stage: Stage, file: Path, size: int) -> Program:
    return stage.start(
        "fio", "--name=background", f"--filename={file}", "--rw=randwrite", "--bs=4k", "--direct=1",
        "--ioengine=libaio", "--iodepth=8", f"--rate={_BACKGROUND_RATE}", "--time_based", "--runtime=60",
        f"--offset={paced.REGION}", f"--size={size - paced.REGION}", f"--filesize={size}", "--norandommap",
        "--allow_file_create=0", "--fallocate=none", "--thread", "--output-format=json",
    )  # fmt: skip


def _background_rate(program: Program) -> float:
    text = program.stdout.read_text()
    try:
        job = json.loads(text[text.index("{") : text.rindex("}") + 1])["jobs"][0]
        return float(job["write"]["bw_bytes"]) / MIB
    except (ValueError, LookupError):
        return 0.0
