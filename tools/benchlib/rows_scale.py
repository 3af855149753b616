"""S1 and S2: what size costs, and a link that is the limit."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchlib import copiers, images, network
from benchlib.copiers import LIMIT, MAX_COPY_S
from benchlib.load import Load
from benchlib.measure import BenchError, Case, Contender, Goal, Row, Sample, Side, run_case
from benchlib.settings import GIB, MIB
from benchlib.stage import Stage
from benchlib.subject import Daemon, Pair, side_name, why_missing

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchlib.settings import Settings

_TIB = 1 << 40
_MAX_RSS_MIB = 120


def row_s1(settings: Settings) -> Row:
    """Memory and CPU of big and of many disks."""
    row = Row("S1", "memory and CPU: 16 TiB sparse, 500 disks, a day of tracking")
    reason = why_missing(settings)
    rss_goals = (Goal(_MAX_RSS_MIB, at_most=True, percent=100),)
    for name, sizes in (("1 disk of 16 TiB", [16 * _TIB]), ("500 disks of 1 GiB", [GIB] * 500)):
        case = run_case(
            f"{name}: resident",
            "MiB",
            [Contender(side_name(lane), "us", _idle(settings, sizes, lane), reason) for lane in settings.lanes],
            1,
            higher_is_better=False,
            goals=rss_goals,
        )
        idle = case.derive(f"{name}: CPU while idle", "%", "idle_percent", higher_is_better=False)
        idle.goals = [Goal(0.5, at_most=True)]
        row.cases += [case, idle]
    size = settings.pick(16 * _TIB, _TIB)
    moved = run_case(
        f"{size // _TIB} TiB, {settings.pick(5000, 1000):,} places with data, moved under writes: peak, either end",
        "MiB",
        [Contender(side_name(lane), "us", _moved(settings, lane, size), reason) for lane in settings.lanes],
        1,
        higher_is_better=False,
        goals=rss_goals,
    )
    row.cases += [moved, moved.derive("the same: time", "s", "seconds", higher_is_better=False)]
    if reason:
        row.cases.append(Case("a pass", "µs/chunk", [Side("fusemig", "us", reason=reason)], higher_is_better=False))
        return row
    for n_dirty in (1_000, 100_000):
        row.cases.append(
            run_case(
                f"a pass over 16 TiB with {n_dirty:,} dirty chunks, in process",
                "µs/chunk",
                [Contender("fusemig", "us", lambda n_dirty=n_dirty: _one_pass(n_dirty))],  # type: ignore[misc]
                settings.rounds(),
                higher_is_better=False,
            )
        )
    n_marks = settings.pick(4_000_000, 400_000)
    row.cases.append(
        run_case(
            f"{n_marks:,} random marks in 64 GiB of 16 TiB, in process: memory grown",
            "MiB",
            [Contender("fusemig", "us", lambda: _a_day(n_marks))],
            1,
            higher_is_better=False,
        )
    )
    row.notes.append("a day is compressed to its marks: what counts is which blocks they hit, not when")
    return row


def _idle(settings: Settings, sizes: list[int], lane: str | None) -> Callable[[], Sample]:
    def once() -> Sample:
        with Stage(settings) as stage:
            disks = {
                f"d{number}": images.empty_image(stage.images / f"d{number}", size) for number, size in enumerate(sizes)
            }
            program = Daemon(stage, disks, lane=lane).program
            time.sleep(0.5)
            meter = program.meter()
            seconds = settings.pick(10.0, 3.0)
            time.sleep(seconds)
            usage = meter()
            extra = {"idle_percent": 100 * usage.cpu_s / seconds}
            return Sample(program.resident_bytes() / MIB, usage, None, extra)

    return once


def _moved(settings: Settings, lane: str | None, size: int) -> Callable[[], Sample]:
    def once() -> Sample:
        with Stage(settings) as stage:
            source = images.empty_image(stage.images / "source", size)
            chance = random.Random(3)
            with source.open("r+b", buffering=0) as file:
                for _ in range(settings.pick(5000, 1000)):
                    os.pwrite(file.fileno(), chance.randbytes(4096), chance.randrange(size // 4096) * 4096)
            destination = images.empty_image(stage.images / "copy", size)
            pair = Pair(stage, source, destination, lane=lane)
            load = Load(stage, str(pair.source.file()), rate=settings.pick(1000, 200), start=0, length=size)
            time.sleep(1)
            migration = pair.start().finish(MAX_COPY_S)
            load.stop()
            usages = pair.usage(migration)
            peak = max(pair.source.program.usage().peak_rss_bytes, pair.destination.program.usage().peak_rss_bytes)
            pair.stop()
            images.check_equal(source, destination)
            return Sample(peak / MIB, *usages, {"seconds": migration.seconds})

    return once


def _one_pass(n_dirty: int) -> Sample:
    from fusemig.core.tracker import ChunkTracker

    tracker = ChunkTracker(16 * _TIB)
    chance = random.Random(5)
    for chunk in chance.sample(range(16 << 20), n_dirty):
        tracker.mark(chunk * MIB + 4096, 4096)
    began = time.perf_counter()
    n_taken, chunk_or_end = 0, tracker.next_dirty(0)
    while chunk_or_end is not None:
        tracker.take(chunk_or_end)
        n_taken += 1
        chunk_or_end = tracker.next_dirty(chunk_or_end + 1)
    seconds = time.perf_counter() - began
    if n_taken != n_dirty:
        raise BenchError(f"a pass took {n_taken} of {n_dirty} chunks")
    return Sample(seconds / n_dirty * 1e6)


def _a_day(n_marks: int) -> Sample:
    from fusemig.core.tracker import ChunkTracker

    before = _own_resident_bytes()
    tracker = ChunkTracker(16 * _TIB)
    chance = random.Random(6)
    for _ in range(n_marks):
        tracker.mark(chance.randrange(16 << 20) * 4096, 4096)
    return Sample((_own_resident_bytes() - before) / MIB)


def _own_resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def row_s2(settings: Settings) -> Row:
    """A link of 1 Gbit/s, and a cap."""
    row = Row("S2", "a link of 1 Gbit/s (tbf between two network namespaces), and --max-bandwidth")
    size = settings.pick(512 * MIB, 128 * MIB)
    reason = why_missing(settings)

    def over_link(lane: str | None) -> Contender:
        def once() -> Sample:
            with Stage(settings) as stage:
                link = network.make_link(stage)
                source = images.random_image(stage.images / "source", size)
                destination = images.empty_image(stage.images / "copy", size)
                pair = Pair(stage, source, destination, lane=lane, host=link.host, prefixes=link.prefixes)
                migration = pair.start().finish(MAX_COPY_S)
                usages = pair.usage(migration)
                pair.stop()
                images.check_equal(source, destination)
                return Sample(size / MIB / migration.seconds, *usages)

        return Contender(side_name(lane), "us", once, reason)

    def limit() -> Sample:
        with Stage(settings) as stage:
            link = network.make_link(stage)
            source = images.random_image(stage.images / "source", size)
            destination = images.empty_image(stage.images / "copy", size)
            sample = copiers.limit(stage, source, destination, host=link.host, prefixes=link.prefixes)
            images.check_equal(source, destination)
            return Sample(size / MIB / sample.value, sample.source, sample.destination)

    contenders = [*(over_link(lane) for lane in settings.lanes), Contender(LIMIT, "limit", limit)]
    row.cases.append(run_case("1 Gbit/s link", "MiB/s", contenders, settings.rounds(), goals=(Goal(0.97, LIMIT),)))
    cap_mib = 50

    def capped(lane: str | None) -> Contender:
        def once() -> Sample:
            with Stage(settings) as stage:
                source = images.random_image(stage.images / "source", size)
                destination = images.empty_image(stage.images / "copy", size)
                pair = Pair(stage, source, destination, lane=lane)
                migration = pair.start("--max-bandwidth", f"{cap_mib}M").finish(MAX_COPY_S)
                usages = pair.usage(migration)
                pair.stop()
                images.check_equal(source, destination)
                return Sample(size / MIB / migration.seconds / cap_mib, *usages)

        return Contender(side_name(lane), "us", once, reason)

    goals = (Goal(0.97), Goal(1.03, at_most=True))
    row.cases.append(
        run_case(
            f"--max-bandwidth {cap_mib}M on loopback",
            "of the cap",
            [capped(lane) for lane in settings.lanes],
            settings.rounds(3, 1),
            goals=goals,
        )
    )
    return row
