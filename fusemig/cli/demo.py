"""``fusemig demo``: move a busy disk between two mounts on this machine, then look for anything that was lost.

    writer ─> sqlite3 ─> ext4 ─> loop device ─> source mount ═ native wire ═> destination mount

With sqlite3 the migration waits at pre-switchover, where the writer is stopped and its file system unmounted: a file
system lives in one place at a time, and a VM would be paused there. Where there is no loop device, a plain writer of
numbered records writes to the mount itself, through the switchover, until it is told that the disk has gone.

What is checked afterwards does not rest on fusemig's word: e2fsck, ``PRAGMA integrity_check``, the writer's own
log, and a hash of both images made from the files.
"""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import trio
from xxhash import xxh3_128

from fusemig.cli.demo_report import Check, Report
from fusemig.cli.demo_stage import (
    DISK,
    DemoError,
    daemon,
    fill_with_random,
    in_thread,
    loop_mount,
    make_ext4,
    place,
    program,
    tool_result,
    why_no_loop,
)
from fusemig.cli.demo_writer import check_plain, check_sqlite, read_log
from fusemig.control.client import open_control
from fusemig.core.units import SECTOR_SIZE
from fusemig.errors import ConfigError, FusemigError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from fusemig.cli.demo_stage import LoopMount, Place, Program
    from fusemig.cli.demo_writer import Log
    from fusemig.control.client import ControlClient

MIN_SIZE: Final = 32 << 20
MIGRATE_DEADLINE_S: Final = 600.0
VERIFY_DEADLINE_S: Final = 300.0
_POLL_S: Final = 0.01
_SPARE_BYTES: Final = 16 << 20
_READ_STEP: Final = 1 << 20
_OVER: Final = frozenset({"completed", "failed", "cancelled"})
_DATABASE: Final = "demo.db"


async def demo_command(size: int, seconds: float, directory: Path | None) -> int:
    """Run the demo; return 0 only if everything held.

    SIGINT and SIGTERM end it early; then, as always, nothing of it is left.

    Raises:
        FusemigError: a step failed, so that there was nothing to check.
    """
    check_options(size, seconds)
    return await until_interrupted(partial(_demo, size, seconds, directory))


def check_options(size: int, seconds: float) -> None:
    """Raise `ConfigError` unless a demo can be made of these."""
    if size < MIN_SIZE or size % SECTOR_SIZE:
        raise ConfigError(f"--size {size}: give at least {MIN_SIZE >> 20}M, a multiple of {SECTOR_SIZE} bytes")
    if not 0 < seconds <= MIGRATE_DEADLINE_S:
        raise ConfigError(f"--seconds {seconds:g}: give more than 0 and at most {MIGRATE_DEADLINE_S:g}")


async def until_interrupted(job: Callable[[], Awaitable[int]]) -> int:
    """Run a demo, which SIGINT and SIGTERM cancel; return its exit code."""
    error: FusemigError | None = None
    code = 130
    async with trio.open_nursery() as nursery:
        await nursery.start(_watch_signals, nursery.cancel_scope)
        try:
            code = await job()
        except FusemigError as exc:
            error = exc  # outside the nursery, which would make a group of it
        nursery.cancel_scope.cancel()
    if error is not None:
        raise error
    return code


async def _watch_signals(
    scope: trio.CancelScope, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for _ in signals:
            say("interrupted; cleaning up")
            scope.cancel()


async def _demo(size: int, seconds: float, directory: Path | None) -> int:
    async with place(directory, 2 * size + _SPARE_BYTES) as where, AsyncExitStack() as stack:
        if why := await why_no_loop(where):
            say(f"no ext4 on a loop device ({why}): a plain writer on the mount takes sqlite3's place")
        say(f"making a disk of {size >> 20} MiB and starting two daemons")
        image, copy = where.images / "source.img", where.images / "destination.img"
        await in_thread(fill_with_random, image, size, deadline_s=VERIFY_DEADLINE_S)
        _, destination_control, arrived = await stack.enter_async_context(
            daemon("destination", where, copy, "--incoming", "tcp:127.0.0.1:0")
        )
        _, source_control, left = await stack.enter_async_context(daemon("source", where, image))
        async with open_control(destination_control) as control:
            uri = (await control.execute("x-fusemig-status"))["incoming"]["uri"]
        journey = _Journey(where, left, arrived, source_control, uri, seconds)
        report = await (_plain(journey, size, why) if why else _sqlite(journey, size))
        report.checks.append(Check(*await in_thread(_same_digest, image, copy, deadline_s=VERIFY_DEADLINE_S)))
        if why:
            n_lost = await in_thread(check_plain, arrived, report.log, deadline_s=VERIFY_DEADLINE_S)
            report.checks.append(_none_lost(report.log, n_lost))
        else:
            await _check_file_system(where, arrived, report)
        report.checks.append(Check(*await in_thread(only_one_writable, left, arrived)))
        for line in report.lines():
            print(line)
        return 0 if report.is_ok else 1


@dataclass(frozen=True)
class _Journey:
    """Where the disk is, where it goes, and how long it is written first."""

    where: Place
    left: Path
    """The disk's file in the source's mount."""
    arrived: Path
    """The disk's file in the destination's mount."""
    control: Path
    """The source's control socket."""
    uri: str
    seconds: float

    @property
    def log(self) -> Path:
        """Where the writer notes what was acknowledged."""
        return self.where.work / "commits"


async def _sqlite(journey: _Journey, size: int) -> Report:
    """Move the disk under sqlite3 on ext4; it is unmounted at pre-switchover."""
    await make_ext4(journey.left)
    async with (
        open_control(journey.control) as control,
        loop_mount(journey.left, journey.where.work / "ext4") as file_system,
        _writer("sqlite", file_system.mountpoint / _DATABASE, journey) as writer,
    ):
        pause = {"capability": "pause-before-switchover", "state": True}
        await control.execute("migrate-set-capabilities", {"capabilities": [pause]})
        begun_at = await _start(control, writer, journey)
        await wait_status(control, "pre-switchover", writer)
        converged_s = time.monotonic() - begun_at
        await _stop_guest(writer, file_system)
        await control.execute("migrate-continue", {"state": "pre-switchover"})
        info = await wait_status(control, "completed")
        ended_at = time.monotonic()
    log = await in_thread(read_log, journey.log)
    name = "sqlite3 (WAL, synchronous=FULL) on ext4 on a loop device on the mount"
    return Report(name, size, log, info, begun_at, converged_s, ended_at)


async def _plain(journey: _Journey, size: int, why: str) -> Report:
    """Move the disk under a plain writer, which goes on until it is refused."""
    async with open_control(journey.control) as control, _writer("plain", journey.left, journey) as writer:
        begun_at = await _start(control, writer, journey)
        info = await wait_status(control, "completed")
        ended_at = time.monotonic()
        if code := await writer.wait(VERIFY_DEADLINE_S):
            raise DemoError(f"the writer failed with {code}: {writer.last_words()}")
    log = await in_thread(read_log, journey.log)
    report = Report(f"4 KiB records, O_DSYNC, on the mount itself ({why})", size, log, info, begun_at, None, ended_at)
    report.checks.append(
        Check(log.refused is not None, "the writer wrote over the switchover until the source refused it")
    )
    return report


def _writer(kind: str, target: Path, journey: _Journey) -> Any:
    log = journey.where.work / "writer.log"
    return program("writer", log, "fusemig.cli.demo_writer", kind, target, journey.log)


async def _start(control: ControlClient, writer: Program, journey: _Journey) -> float:
    """Let the writer write for a while, then start the migration; return when."""
    say(f"the writer commits; the disk moves after {journey.seconds:g} s")
    await trio.sleep(journey.seconds)
    writer.check_alive()
    begun_at = time.monotonic()
    await control.execute("migrate", {"uri": journey.uri, "blk": True})
    return begun_at


async def wait_status(control: ControlClient, status: str, writer: Program | None = None) -> dict[str, Any]:
    """Wait until the migration has come to ``status``; return its ``query-migrate``."""
    try:
        with trio.fail_after(MIGRATE_DEADLINE_S):
            while True:
                if writer is not None:
                    writer.check_alive()
                info: dict[str, Any] = await control.execute("query-migrate")
                if info.get("status") == status:
                    return info
                if info.get("status") in _OVER:
                    raise DemoError(f"the migration ended as {info['status']}: {info.get('error-desc', 'no reason')}")
                await trio.sleep(_POLL_S)
    except trio.TooSlowError as exc:
        raise DemoError(f"the migration did not come to {status} in {MIGRATE_DEADLINE_S:g} s") from exc


async def _stop_guest(writer: Program, file_system: LoopMount) -> None:
    await writer.stop()
    if code := writer.process.returncode:
        raise DemoError(f"the writer failed with {code}: {writer.last_words()}")
    await file_system.close()


async def _check_file_system(where: Place, arrived: Path, report: Report) -> None:
    """Look at what arrived as its next user would: fsck, mount, read the database."""
    code, output = await tool_result("e2fsck", "-fn", arrived)
    said = output.splitlines()[-1] if output else "it said nothing"
    report.checks.append(
        Check(code == 0, "e2fsck -fn: clean" if code == 0 else f"e2fsck -fn: exit code {code}: {said}")
    )
    try:
        async with loop_mount(arrived, where.work / "ext4-arrived") as file_system:
            n_lost, verdict = await in_thread(
                check_sqlite, file_system.mountpoint / _DATABASE, report.log, deadline_s=VERIFY_DEADLINE_S
            )
    except (DemoError, sqlite3.Error) as exc:
        report.checks.append(Check(False, f"the database cannot be read at the destination: {exc}"))
        return
    report.checks.append(_none_lost(report.log, n_lost))
    report.checks.append(Check(verdict == "ok", f"PRAGMA integrity_check: {verdict}"))


def _none_lost(log: Log, n_lost: int) -> Check:
    n = len(log.commits)
    if not n:
        return Check(False, "nothing was committed, so nothing was shown")
    if n_lost:
        return Check(False, f"{n_lost:,} of {n:,} acknowledged commits are missing at the destination")
    return Check(True, f"all {n:,} acknowledged commits are at the destination")


def _same_digest(image: Path, copy: Path) -> tuple[bool, str]:
    ours, theirs = _digest(image), _digest(copy)
    if ours == theirs:
        return True, f"both images have the digest xxh3_128 {ours}"
    return False, f"the images differ: xxh3_128 {ours} at the source, {theirs} at the destination"


def _digest(path: Path) -> str:
    state = xxh3_128()
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(_READ_STEP):
            state.update(block)
    return state.hexdigest()


def only_one_writable(left: Path, arrived: Path) -> tuple[bool, str]:
    """Write the disk's first sector anew, as it is, on both sides."""
    with arrived.open("rb") as stream:
        sector = stream.read(SECTOR_SIZE)
    answers = [_answer(file, sector) for file in (left, arrived)]
    if answers == [errno.EROFS, 0]:
        return True, f"only the destination takes writes; the source's {DISK} is read-only now"
    said = ["accepted" if not answer else os.strerror(answer) for answer in answers]
    return False, f"a write is answered '{said[0]}' at the source and '{said[1]}' at the destination"


def _answer(file: Path, sector: bytes) -> int:
    """Return the errno of a synchronous write of ``sector`` at 0."""
    try:
        fd = os.open(file, os.O_RDWR | os.O_DSYNC | os.O_CLOEXEC)
        try:
            os.pwrite(fd, sector, 0)
        finally:
            os.close(fd)
    except OSError as exc:
        return exc.errno or errno.EIO
    return 0


def say(text: str) -> None:
    """Tell what happens, on stderr."""
    print(f"fusemig demo: {text}", file=sys.stderr)
