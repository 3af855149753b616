"""P1: post-copy over 1 Gbit/s: how soon the destination's guest reads, and what its reads wait for meanwhile."""

from __future__ import annotations

import mmap
import os
import random
import time
from contextlib import closing
from statistics import median
from typing import TYPE_CHECKING

from benchlib import images, network
from benchlib.copiers import MAX_COPY_S
from benchlib.measure import BenchError, Contender, Goal, Row, Sample, run_case
from benchlib.settings import GIB, MIB
from benchlib.stage import Stage
from benchlib.subject import Pair, side_name, why_missing

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchlib.settings import Settings

_SIZE = 10 * GIB
_N_READS = 100


def row_p1(settings: Settings) -> Row:
    """A disk of 10 GiB that is handed over before anything was sent."""
    data = settings.pick(GIB, 256 * MIB)
    row = Row("P1", f"post-copy over 1 Gbit/s, {_SIZE // GIB} GiB with {data // MIB} MiB of data")
    reason = why_missing(settings)
    first = run_case(
        "from before the freeze to the first write and read at the destination",
        "ms",
        [Contender(side_name(lane), "us", _handed_over(settings, lane, data), reason) for lane in settings.lanes],
        settings.rounds(),
        higher_is_better=False,
    )
    downtime = first.derive("downtime", "ms", "downtime_ms", higher_is_better=False)
    read = first.derive("the first read of a missing block", "ms", "first_read_ms", higher_is_better=False)
    frozen = first.derive("from the freeze to that block", "ms", "frozen_ms", higher_is_better=False)
    frozen.goals = [Goal(50, at_most=True)]
    others = first.derive("4 KiB reads of missing blocks, median", "ms", "read_ms", higher_is_better=False)
    whole = first.derive("whole migration", "s", "seconds", higher_is_better=False)
    row.cases += [first, downtime, read, frozen, others, whole]
    row.notes.append("reads are O_DIRECT, of random blocks with data, while the rest is fetched in the background")
    return row


def _handed_over(settings: Settings, lane: str | None, data: int) -> Callable[[], Sample]:
    def once() -> Sample:
        with Stage(settings) as stage:
            link = network.make_link(stage)
            source = images.random_image(stage.images / "source", data)
            os.truncate(source, _SIZE)
            destination = images.empty_image(stage.images / "copy", _SIZE)
            pair = Pair(stage, source, destination, lane=lane, host=link.host, prefixes=link.prefixes)
            began = time.monotonic()
            migration = pair.start("--mode", "postcopy")
            file = pair.destination.file()
            fd = _open_when_ours(file)
            try:
                reads = [_read_s(fd, data, seed) for seed in range(_N_READS)]
                until_read = time.monotonic() - began - sum(reads[1:])
            finally:
                os.close(fd)
            migration.finish(MAX_COPY_S)
            usages = pair.usage(migration)
            extra = {
                "first_read_ms": reads[0] * 1000,
                "frozen_ms": (migration.number("downtime") or 0.0) + reads[0] * 1000,
                "read_ms": median(reads) * 1000,
                "downtime_ms": migration.number("downtime") or 0.0,
                "seconds": migration.seconds,
            }
            pair.stop()
            images.check_equal(source, destination)
            return Sample(until_read * 1000, *usages, extra)

    return once


def _open_when_ours(file: Path) -> int:
    """Return a descriptor of the file as soon as it can be written: it tries to write zeros into a hole."""
    fd = os.open(file, os.O_RDWR | os.O_DIRECT)
    deadline = time.monotonic() + MAX_COPY_S
    with closing(mmap.mmap(-1, 4096)) as zeros:
        while time.monotonic() < deadline:
            try:
                os.pwrite(fd, zeros, _SIZE - 4096)
            except OSError:
                time.sleep(0.0005)
            else:
                return fd
    os.close(fd)
    raise BenchError("the destination did not take over")


def _read_s(fd: int, data: int, seed: int) -> float:
    offset = random.Random(seed).randrange(data // 4096) * 4096
    with closing(mmap.mmap(-1, 4096)) as buffer:
        began = time.monotonic()
        if os.preadv(fd, [buffer], offset) != 4096:
            raise BenchError("a read at the destination was short")
        return time.monotonic() - began
