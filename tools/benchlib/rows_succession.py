"""U1: how long a guest waits while one daemon succeeds another."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

from benchlib import images
from benchlib.measure import Contender, Goal, Row, Sample, run_case
from benchlib.qmp import Qmp
from benchlib.settings import MIB
from benchlib.stage import Stage, run
from benchlib.subject import Daemon, why_missing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchlib.settings import Settings

_STANDBY_S = 2.0
"""After which a standby waits warm."""
_AFTER_S = 0.5
_END_S = 10.0
_SUCCESSOR_S = 20.0


def row_u1(settings: Settings) -> Row:
    """The longest pause of a 1 ms writer: no succession at all, an upgrade, SIGKILL with a standby and without."""
    row = Row("U1", "a daemon is succeeded by another under a guest that writes 4 KiB every millisecond")
    reason = why_missing(settings)
    for name, options, succeed, goals in (
        ("nothing happens: longest pause", ("--standby",), _nothing, ()),
        ("upgrade: longest pause", ("--standby",), _upgrade, (Goal(20, at_most=True),)),
        ("SIGKILL, standby: longest pause", ("--standby",), _kill, (Goal(50, at_most=True),)),
        ("SIGKILL: longest pause", (), _kill, (Goal(300, at_most=True),)),
    ):
        take = _taker(settings, ("--resilient", *options), succeed)
        contenders = [Contender("fusemig", "us", take, reason)]
        row.cases.append(run_case(name, "ms", contenders, settings.rounds(), higher_is_better=False, goals=goals))
    row.notes.append("the first line is what the machine itself makes such a guest wait")
    return row


def _taker(
    settings: Settings, options: Sequence[str], succeed: Callable[[Stage, Daemon], None]
) -> Callable[[], Sample]:
    def take() -> Sample:
        with Stage(settings) as stage:
            image = images.random_image(stage.images / "image", 64 * MIB)
            daemon = Daemon(stage, {"disk": image}, options=options)
            time.sleep(_STANDBY_S)
            record = stage.work / "steady"
            guest = stage.start(sys.executable, "-m", "benchlib.steady", str(daemon.file()), str(record))
            guest.wait_ready(lambda: record.with_name("steady.ready").exists(), _END_S)
            succeed(stage, daemon)
            time.sleep(_AFTER_S)
            record.with_name("steady.stop").touch()
            guest.wait(_END_S)
            return Sample(1000 * json.loads(record.read_text())["gap_s"])

    return take


def _nothing(_stage: Stage, _daemon: Daemon) -> None:
    time.sleep(_AFTER_S)


def _upgrade(stage: Stage, daemon: Daemon) -> None:
    run([*stage.settings.fusemig, "upgrade", str(daemon.control)], timeout_s=_SUCCESSOR_S)


def _kill(_stage: Stage, daemon: Daemon) -> None:
    with Qmp(daemon.control) as client:
        pid = client.execute("x-fusemig-status")["pid"]
    os.kill(pid, signal.SIGKILL)
    with Qmp(daemon.control) as client:  # which waits for the successor
        client.execute("query-status")
