"""A guest that writes 4 KiB blocks, at random or in order, and notes when each was acknowledged.

Run as a program: ``python -m benchlib.load TARGET RECORD --rate N --start BYTES --length BYTES [--sequential]``.
TARGET is a file, or ``nbd:SOCKET:EXPORT``. At random it writes no block twice before it has written all (the length is
cut to a power of two). It stops on SIGTERM or when a write fails (EROFS: the disk has moved), and then leaves in
RECORD: one double for the errno (0: none) and one for the CLOCK_MONOTONIC time at which it stopped, followed by pairs
of the acknowledgement's time and the latency, in seconds. RECORD.ready appears after the first acknowledgement.
"""

from __future__ import annotations

import argparse
import itertools
import mmap
import os
import random
import signal
import sys
import time
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchlib.nbd import NbdDisk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchlib.program import Program
    from benchlib.stage import Stage

BLOCK: Final = 4096


@dataclass(frozen=True)
class Recording:
    """What the guest saw."""

    error: int
    stopped_at: float
    """When it was told to stop, or its write failed, on the monotonic clock."""
    times: array[float]
    latencies: array[float]

    def between(self, start: float, stop: float) -> list[float]:
        """Return the latencies of writes acknowledged in a stretch of time."""
        return [latency for time_s, latency in zip(self.times, self.latencies, strict=True) if start <= time_s < stop]


class Load:
    """The guest as the bench sees it."""

    def __init__(
        self, stage: Stage, target: str, *, rate: int, start: int, length: int, is_sequential: bool = False
    ) -> None:
        """Start it and wait for its first write.

        Raises:
            BenchError: it could not write.
        """
        self._record = stage.path("load")
        self.program: Program = stage.start(
            sys.executable, "-m", "benchlib.load", target, self._record,
            "--rate", str(rate), "--start", str(start), "--length", str(length),
            *(["--sequential"] if is_sequential else []),
        )  # fmt: skip
        self.program.wait_ready(self._record.with_suffix(".ready").exists)

    def stop(self) -> Recording:
        """End it and return what it saw; one that has ended by itself is fine."""
        self.program.stop()
        self.program.check(20)
        values: array[float] = array("d")
        values.frombytes(self._record.read_bytes())
        return Recording(int(values[0]), values[1], values[2::2], values[3::2])


def merge(recordings: list[Recording]) -> Recording:
    """Return what several guests of one disk saw together, in order of time."""
    pairs = sorted(pair for some in recordings for pair in zip(some.times, some.latencies, strict=True))
    times, latencies = array("d", [pair[0] for pair in pairs]), array("d", [pair[1] for pair in pairs])
    error, stopped_at = max(some.error for some in recordings), max(some.stopped_at for some in recordings)
    return Recording(error, stopped_at, times, latencies)


def _blocks(n_blocks: int) -> Iterator[int]:
    n = 1 << (n_blocks.bit_length() - 1)
    # A linear congruential generator of full period (Hull and Dobell): a permutation, so no block comes twice. Its low
    # bits cycle quickly, but they only choose the block inside a chunk.
    state, step = random.Random(7).randrange(n), 0x5851F42D
    multiplier = 4 * 0x1357BD1 + 1
    while True:
        state = (multiplier * state + (step | 1)) % n
        yield state


def _open(target: str) -> tuple[Callable[[mmap.mmap, int], object], Callable[[], None]]:
    if target.startswith("nbd:"):
        _, path, export = target.split(":")
        disk = NbdDisk(path, export)
        return (lambda data, offset: disk.pwrite(data[:], offset)), disk.close
    fd = os.open(target, os.O_WRONLY | os.O_DIRECT)
    return (lambda data, offset: os.pwrite(fd, data, offset)), (lambda: os.close(fd))


def _write_until_told(options: argparse.Namespace, record: array[float]) -> int:
    told = False

    def tell(*_: object) -> None:
        nonlocal told
        told = True

    signal.signal(signal.SIGTERM, tell)
    write, close = _open(options.target)
    data = mmap.mmap(-1, BLOCK)  # page-aligned, as O_DIRECT wants it
    data[:] = os.urandom(BLOCK)
    clock = time.monotonic
    due = clock()
    try:
        n_blocks = options.length // BLOCK
        order = itertools.cycle(range(n_blocks)) if options.sequential else _blocks(n_blocks)
        for n_written, block in enumerate(order):
            if told:
                break
            if options.rate:
                due = max(due + 1 / options.rate, clock() - 0.1)
                time.sleep(max(0.0, due - clock()))
            data[:8] = n_written.to_bytes(8, "little")
            began = clock()
            try:
                write(data, options.start + block * BLOCK)
            except OSError as error:
                return error.errno or 5
            ended = clock()
            record.append(ended)
            record.append(ended - began)
            if n_written == 0:
                Path(f"{options.record}.ready").touch()
    finally:
        close()
    return 0


def main() -> None:
    """Be the guest."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("record")
    parser.add_argument("--rate", type=int, default=0)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--sequential", action="store_true")
    options = parser.parse_args()
    record: array[float] = array("d")
    error = _write_until_told(options, record)
    stopped_at = time.monotonic()
    with Path(options.record).open("wb") as file:
        array("d", [float(error), stopped_at]).tofile(file)
        record.tofile(file)


if __name__ == "__main__":
    main()
