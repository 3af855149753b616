"""The demo's writer: a program that commits numbered records without pause and notes each acknowledged one.

    python -m fusemig.cli.demo_writer sqlite DATABASE LOG     rows, each a transaction of its own
    python -m fusemig.cli.demo_writer plain FILE LOG          4 KiB records, O_DSYNC, all over the file

A commit counts once the call that made it has returned; its number and the times before and after the call are then a
line of LOG, which is not on the disk that moves. SIGTERM ends it after the commit in progress. The plain writer also
ends when a write is refused as read-only, and notes when it was. `check_sqlite` and `check_plain` read back what LOG
says: they are what the promise "no acknowledged commit is lost" means.
"""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import sys
import threading
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from xxhash import xxh3_128_digest

from fusemig.core.units import BLOCK_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

KINDS: Final = ("sqlite", "plain")
_STEP: Final = 7919
"""Blocks from one plain record to the next; a prime, so that records spread over all blocks."""
_REFUSED: Final = 0
"""In place of a number: the write was answered EROFS."""


@dataclass(frozen=True)
class Commit:
    """One line of the log; times in seconds of the machine's monotonic clock."""

    number: int
    begun_at: float
    ended_at: float

    @property
    def seconds(self) -> float:
        """How long its caller waited."""
        return self.ended_at - self.begun_at


@dataclass(frozen=True)
class Log:
    """What a writer noted."""

    commits: list[Commit]
    refused: Commit | None
    """The write that found the disk read-only, with the time that this took."""


def read_log(path: Path) -> Log:
    """Read a writer's log."""
    lines = [line.split() for line in path.read_text().splitlines()]
    entries = [Commit(int(number), float(begun), float(ended)) for number, begun, ended in lines]
    refused = [entry for entry in entries if entry.number == _REFUSED]
    return Log([entry for entry in entries if entry.number != _REFUSED], refused[0] if refused else None)


def check_sqlite(database: Path, log: Log) -> tuple[int, str]:
    """Return how many acknowledged commits the database lacks, and what ``PRAGMA integrity_check`` says.

    Raises:
        sqlite3.Error: it cannot be read.
    """
    with closing(sqlite3.connect(database)) as connection:
        verdict = str(connection.execute("PRAGMA integrity_check").fetchone()[0])
        rows = dict(connection.execute("SELECT number, body FROM commits").fetchall())
    return sum(rows.get(commit.number) != _body(commit.number) for commit in log.commits), verdict


def check_plain(file: Path, log: Log) -> int:
    """Return how many acknowledged records the file lacks; of those in one place, the last one has to be there."""
    n_blocks = file.stat().st_size // BLOCK_SIZE
    last_at = {_block(commit.number, n_blocks): commit.number for commit in log.commits}
    n_missing = 0
    with file.open("rb") as stream:
        for block, number in sorted(last_at.items()):
            stream.seek(block * BLOCK_SIZE)
            n_missing += stream.read(BLOCK_SIZE) != _record(number)
    return n_missing


def _body(number: int) -> bytes:
    return xxh3_128_digest(number.to_bytes(8, "big")) * 32


def _record(number: int) -> bytes:
    return _body(number) * (BLOCK_SIZE // 512)


def _block(number: int, n_blocks: int) -> int:
    return number * _STEP % n_blocks


def _write_sqlite(database: Path, stop: threading.Event) -> Iterator[Commit]:
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("CREATE TABLE commits (number INTEGER PRIMARY KEY, body BLOB)")
        number = 0
        while not stop.is_set():
            number += 1
            begun_at = time.monotonic()
            connection.execute("INSERT INTO commits VALUES (?, ?)", (number, _body(number)))
            yield Commit(number, begun_at, time.monotonic())


def _write_plain(file: Path, stop: threading.Event) -> Iterator[Commit]:
    fd = os.open(file, os.O_WRONLY | os.O_DSYNC | os.O_CLOEXEC)
    try:
        n_blocks = os.fstat(fd).st_size // BLOCK_SIZE
        number = 0
        while not stop.is_set():
            number += 1
            begun_at = time.monotonic()
            try:
                os.pwrite(fd, _record(number), _block(number, n_blocks) * BLOCK_SIZE)
            except OSError as exc:
                if exc.errno != errno.EROFS:
                    raise
                yield Commit(_REFUSED, begun_at, time.monotonic())
                return
            yield Commit(number, begun_at, time.monotonic())
    finally:
        os.close(fd)


def main(kind: str, target: str, log: str) -> None:
    """Write until SIGTERM, or until the disk is read-only."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    commits = (_write_sqlite if kind == "sqlite" else _write_plain)(Path(target), stop)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        for commit in commits:
            # One unbuffered write a line: what was acknowledged is noted even if this program is killed.
            os.write(fd, f"{commit.number} {commit.begun_at:.6f} {commit.ended_at:.6f}\n".encode())
    except (OSError, sqlite3.Error) as exc:
        sys.exit(f"{kind} writer: {exc}")
    finally:
        os.close(fd)


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in KINDS:
        sys.exit(f"usage: {sys.argv[0]} {'|'.join(KINDS)} TARGET LOG")
    main(*sys.argv[1:])
