"""T4: several connections where one is slow. Every copy is compared byte for byte before it counts."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from benchlib import images, network
from benchlib.measure import BenchError, Contender, Goal, Row, Sample, run_case
from benchlib.settings import MIB
from benchlib.stage import Stage, free_port
from benchlib.subject import Daemon, start_migration, why_missing

if TYPE_CHECKING:
    from benchlib.settings import Settings

_TIMEOUT_S = 120.0
_DELAY_S = 0.025
_BUFFER_BYTES = 128 << 10
"""Of a connection's receive buffer; Linux makes a window of half of it."""


def row_t4(settings: Settings) -> Row:
    """Windows that do not fill a long way."""
    size = settings.pick(16, 2) * MIB
    title = f"{size // MIB} MiB over a link of 50 ms, tcp_rmem {_BUFFER_BYTES >> 10} KiB, without setup"
    row = Row("T4", title)

    def once(n_streams: int) -> Sample:
        with Stage(settings) as stage:
            link = network.make_delayed_link(stage, _DELAY_S, _BUFFER_BYTES)
            here = images.random_image(stage.images / "here", size)
            there = images.empty_image(stage.images / "there", size)
            port = free_port()
            source = Daemon(stage, {"disk": here}, prefix=link.prefixes[0])
            target = Daemon(stage, {"disk": there}, incoming=f"tcp:0.0.0.0:{port}", prefix=link.prefixes[1])
            migration = start_migration(stage, source, f"tcp:{link.host}:{port}", "--streams", str(n_streams))
            setup_ms = migration.finish(_TIMEOUT_S).number("setup-time")
            if setup_ms is None:
                raise BenchError("the migration does not tell how long its setup took")
            usages = source.program.usage(), target.program.usage()
            for daemon in (source, target):
                daemon.program.stop()
            images.check_equal(here, there)
            return Sample(size / 1e6 / (migration.seconds - setup_ms / 1000), *usages, {"setup_ms": setup_ms})

    why = why_missing(settings)
    contenders = [Contender("1 stream", "peer", partial(once, 1), why)]
    contenders += [Contender(f"{n} streams", "us", partial(once, n), why) for n in settings.pick((4, 16), (4,))]
    case = run_case("rate", "MB/s", contenders, settings.rounds(3, 1), goals=(Goal(settings.pick(3, 2), "1 stream"),))
    row.cases.append(case)
    row.cases.append(case.derive("setup", "ms", "setup_ms", higher_is_better=False))
    row.notes.append(
        "slow start and the three round trips of the hand-off count: the more streams, the more they weigh"
    )
    return row
