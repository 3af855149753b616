"""T1 to T3: what need not be sent. A link of 1 Gbit/s; every copy is compared byte for byte before it counts."""

from __future__ import annotations

import os
import random
from functools import partial
from typing import TYPE_CHECKING

from benchlib import images, network
from benchlib.measure import BenchError, Contender, Goal, Row, Sample, run_case
from benchlib.settings import MIB
from benchlib.stage import Stage, free_port
from benchlib.subject import Daemon, side_name, start_migration, why_missing

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchlib.settings import Settings
    from benchlib.subject import Migration

_TIMEOUT_S = 120.0


def _trip(  # one migration between two daemons that the caller made
    stage: Stage, source: Daemon, host: str, port: int, *options: str
) -> Migration:
    return start_migration(stage, source, f"tcp:{host}:{port}", *options).finish(_TIMEOUT_S)


def _wire(migration: Migration) -> float:
    wire = migration.wire_bytes
    if wire is None:
        raise BenchError("the migration does not tell its bytes on the wire")
    return wire


def _contenders(settings: Settings, once: Callable[[str | None], Sample]) -> list[Contender]:
    return [Contender(side_name(lane), "us", partial(once, lane), why_missing(settings)) for lane in settings.lanes]


def row_t1(settings: Settings) -> Row:
    """A disk that comes home."""
    size = settings.pick(1024, 512) * MIB
    row = Row("T1", f"an idle disk of {size // MIB} MiB comes back over 1 Gbit/s, proved by records and maps")

    def once(lane: str | None) -> Sample:
        with Stage(settings) as stage:
            link = network.make_link(stage)
            here, there = (
                images.random_image(stage.images / "here", size),
                images.empty_image(stage.images / "there", size),
            )
            ports = free_port(), free_port()
            source = Daemon(stage, {"disk": here}, lane=lane, prefix=link.prefixes[0])
            target = Daemon(
                stage, {"disk": there}, lane=lane, incoming=f"tcp:0.0.0.0:{ports[0]}", prefix=link.prefixes[1]
            )
            first = _trip(stage, source, link.host, ports[0])
            source.program.stop()
            home = Daemon(
                stage,
                {"disk": here},
                lane=lane,
                incoming=f"tcp:0.0.0.0:{ports[1]}",
                prefix=link.prefixes[0],
                goes_on=True,
            )
            back = _trip(stage, target, link.source_host, ports[1])
            usages = target.program.usage(), home.program.usage()
            for daemon in (home, target):
                daemon.program.stop()
            images.check_equal(there, here)
            extra = {"percent": 100 * _wire(back) / size, "first_s": first.seconds, "back_s": back.seconds}
            return Sample(first.seconds / back.seconds, *usages, extra)

    case = run_case(
        "first trip / return trip", "times", _contenders(settings, once), settings.rounds(), goals=(Goal(50),)
    )
    row.cases.append(case)
    share = case.derive("return trip on the wire", "% of the disk", "percent", higher_is_better=False)
    share.goals = [Goal(1, at_most=True)]
    row.cases.append(share)
    row.cases.append(case.derive("return trip", "s", "back_s", higher_is_better=False))
    return row


def row_t2(settings: Settings) -> Row:
    """An overlay over a base that both sides have."""
    base_size, written = settings.pick(1024, 256) * MIB, 20 * MIB
    row = Row("T2", f"an overlay with 20 MiB written in blocks of 4 KiB, base of {base_size // MIB} MiB on both sides")

    def once(lane: str | None) -> Sample:
        with Stage(settings) as stage:
            link = network.make_link(stage)
            base = images.random_image(stage.images / "base", base_size)
            port = free_port()
            source = Daemon(stage, {"disk": stage.images / "here"}, lane=lane, prefix=link.prefixes[0], base=base)
            _scribble(source.file(), base_size, written)
            target = Daemon(
                stage,
                {"disk": stage.images / "there"},
                lane=lane,
                incoming=f"tcp:0.0.0.0:{port}",
                prefix=link.prefixes[1],
                base=base,
            )
            trip = _trip(stage, source, link.host, port)
            images.check_equal(source.file(), target.file())
            usages = source.program.usage(), target.program.usage()
            for daemon in (source, target):
                daemon.program.stop()
            return Sample(_wire(trip) / MIB, *usages, {"seconds": trip.seconds})

    case = run_case(
        "on the wire",
        "MiB",
        _contenders(settings, once),
        settings.rounds(),
        higher_is_better=False,
        goals=(Goal(21, at_most=True),),
    )
    row.cases.append(case)
    row.cases.append(case.derive("time", "s", "seconds", higher_is_better=False))
    return row


def _scribble(path: Path, size: int, n_bytes: int) -> None:
    chance = random.Random(1)
    fd = os.open(path, os.O_WRONLY)
    try:
        for block in chance.sample(range(size // 4096), n_bytes // 4096):
            os.pwrite(fd, chance.randbytes(4096), block * 4096)
        os.fsync(fd)
    finally:
        os.close(fd)


def row_t3(settings: Settings) -> Row:
    """Compression on a link, and where it does not pay."""
    size = settings.pick(512, 128) * MIB
    row = Row("T3", f"{size // MIB} MiB, compressed and as it is")

    def once(*options: str, text: bool, on_link: bool) -> Sample:
        with Stage(settings) as stage:
            link = network.make_link(stage) if on_link else None
            prefixes = link.prefixes if link else ((), ())
            fill = _text_image if text else images.random_image
            here, there = fill(stage.images / "here", size), images.empty_image(stage.images / "there", size)
            images.fill(there)
            port = free_port()
            source = Daemon(stage, {"disk": here}, prefix=prefixes[0])
            target = Daemon(stage, {"disk": there}, incoming=f"tcp:0.0.0.0:{port}", prefix=prefixes[1])
            host = link.host if link else "127.0.0.1"
            trip = _trip(stage, source, host, port, *options)
            usages = source.program.usage(), target.program.usage()
            for daemon in (source, target):
                daemon.program.stop()
            images.check_equal(here, there)
            return Sample(size / MIB / trip.seconds, *usages, {"wire": _wire(trip) / MIB})

    why = why_missing(settings)
    capped = ("--max-bandwidth", "25M")
    for name, text, on_link, options, goals in (
        ("text, --max-bandwidth 25M", True, False, capped, (Goal(2, "as it is"),)),
        ("text, 1 Gbit/s", True, True, (), (Goal(1.1, "as it is"),)),
        ("noise, 1 Gbit/s", False, True, (), (Goal(0.95, "as it is"),)),
        ("text, loopback", True, False, (), (Goal(0.8, "as it is"),)),
    ):
        contenders = [
            Contender("fusemig", "us", partial(once, *options, "--compress", "zstd", text=text, on_link=on_link), why),
            Contender("as it is", "peer", partial(once, *options, text=text, on_link=on_link), why),
        ]
        case = run_case(name, "MiB/s", contenders, settings.rounds(), goals=goals)
        row.cases.append(case)
        row.cases.append(case.derive(f"{name}, on the wire", "MiB", "wire", higher_is_better=False))
    row.notes.append(
        "on loopback the rule has to find out that compressing is what takes the time; a trial costs 0.2 s"
    )
    return row


def _text_image(path: Path, size: int) -> Path:
    """Write an image of hexadecimal words, which Zstandard makes two and a half times smaller, at 150 MiB/s here."""
    chance = random.Random(1)
    words = [chance.randbytes(chance.randrange(2, 9)).hex().encode() for _ in range(4000)]
    piece = b" ".join(chance.choice(words) for _ in range(1_000_000))
    with path.open("wb", buffering=0) as file:
        for at in range(0, size, MIB):
            start = at // MIB * 999_983 % (len(piece) - MIB)
            file.write(piece[start : start + min(MIB, size - at)])
    return path
