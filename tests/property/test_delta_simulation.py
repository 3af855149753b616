"""Disks that wander between hosts, by whatever way: what arrives is what the guest last wrote.

Each run moves a disk several times among three hosts, a raw image or an overlay, with a guest that writes before and
during the moves. Links are cut, daemons are killed, a host's released image is written behind our back, a return is
gone on with or begun anew, and what is left out is what both sides prove, what compares equal, or nothing. After every
move that succeeds the new owner holds the model's bytes; and moves home without a deed in between send next to nothing.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from fusemig.core.units import CHUNK_SIZE
from fusemig.disk.dirty_map import Since
from fusemig.disk.tracked import Gate
from fusemig.errors import InDoubtError, TransportError
from fusemig.migration.resume import ResumePoint
from support.faults import faulty_connection
from support.overlays import lay_over
from support.pair import Pair, Side

if TYPE_CHECKING:
    from pathlib import Path

    from support.faults import FaultyStream

SIZE = 5 * CHUNK_SIZE + 1536
LINK_BYTES_PER_S = 100.0 * CHUNK_SIZE


class Wanderer(Pair):
    """A disk, three hosts, and a guest that goes where the disk is."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        super().__init__(directory, {"a": SIZE}, compression_level=rng.choice([None, 1]))
        self.hosts = [self.source, self.destination, Side(directory / "third", {"a": SIZE}, Gate.READ_ONLY)]
        self.is_overlay = rng.random() < 0.4
        self.model = bytearray(SIZE)
        if self.is_overlay:
            base = rng.randbytes(3 * CHUNK_SIZE)
            self.model[: len(base)] = base
            for host in self.hosts:
                lay_over(host, base, SIZE, host.disks["a"].gate)
        self.is_touched = True
        """Whether something happened since the last move that a move home has to pay for."""
        self.renew()
        self.write(20)

    def write(self, n: int) -> None:
        """Write here and there, some of it zeros, some of it what is there."""
        for _ in range(n):
            length = self.rng.choice([1, 512, 4096, 10_000, 100_000, CHUNK_SIZE])
            offset = self.rng.randrange(SIZE - length)
            offset -= offset % 4096 if self.rng.random() < 0.5 else 0
            data = self.rng.choice([bytes(length), bytes(self.model[offset : offset + length]), b"AB" * length])[
                :length
            ]
            self.source.disks["a"].pwrite(data, offset)
            self.model[offset : offset + length] = data
            self.is_touched = True

    def content(self, side: Side) -> bytearray:
        """Return what a guest would read there."""
        return side.disks["a"].image.pread(SIZE, 0)

    def tamper(self, side: Side) -> None:
        """Change a byte behind the daemon's back, in the image as it lies in its store."""
        self.rng.choice([side.images["a"].content, side.images["a"].content])[self.rng.randrange(SIZE)] ^= 0x41

    async def guest(self) -> None:
        """Write now and then while the disk may be written."""
        while self.source.disks["a"].gate is Gate.OPEN:
            self.write(1)
            await trio.sleep(self.rng.random() * 0.02)

    async def move(self, cut: int | None, *, is_busy: bool) -> None:
        """Try to move the disk."""
        streams = faulty_connection(LINK_BYTES_PER_S)
        self.streams = streams
        stream: FaultyStream = streams[0]
        if cut is not None:
            stream.faults[cut] = self.rng.choice(["cut", "half"])
        async with trio.open_nursery() as nursery:
            if is_busy:
                nursery.start_soon(self.guest)
            await self.migrate()
            nursery.cancel_scope.cancel()

    def point(self) -> ResumePoint | None:
        """Return where to go on after a cut, with the source alive or killed; or None, to begin anew."""
        point = self.outgoing.resume_point()
        record = self.destination.epochs["a"].record
        if self.rng.random() < 0.3 or record is None or record.session != self.outgoing.session:
            return None
        if self.rng.random() < 0.5 and point is not None:
            return point
        self.outgoing.forget()
        self.source.restart(Gate.OPEN)
        base = self.source.dirty_file("a").base(Since.SESSION)
        return ResumePoint("unknown" if base is None else base.session)


async def wander(world: Wanderer, outcomes: Counter[str], plan: list[str]) -> None:
    rng = world.rng
    for _ in range(rng.randint(3, 6)):
        others = [host for host in world.hosts if host is not world.source]
        home = world.destination
        world.destination = home if rng.random() < 0.7 else rng.choice(others)
        incremental = rng.choice([None, None, True, False])
        is_cut, is_busy = rng.random() < 0.4, rng.random() < 0.5
        if rng.random() < 0.3:
            world.tamper(world.destination)
            world.is_touched = True
        if rng.random() < 0.3:
            world.source.restart(Gate.OPEN)
            world.destination.restart(Gate.READ_ONLY)
        world.parameters.incremental = incremental
        is_cheap = world.destination is home and not world.is_touched and not is_busy and incremental is not False
        plan.append(f"to {world.hosts.index(world.destination)} {incremental} cut {is_cut} busy {is_busy}")
        world.renew()
        await world.move(rng.randint(2, 12) if is_cut else None, is_busy=is_busy)
        while world.outgoing.error is not None:
            if isinstance(world.outgoing.error, InDoubtError):
                outcomes["in doubt"] += 1
                return
            assert isinstance(world.outgoing.error, TransportError), world.outgoing.error
            outcomes["cut"] += 1
            world.write(rng.randrange(3))
            point = world.point()
            outcomes["begun anew" if point is None else "gone on with"] += 1
            world.renew(point)
            await world.move(rng.randint(2, 40) if rng.random() < 0.3 else None, is_busy=is_busy)
        assert world.content(world.destination) == world.model
        outcomes["moves"] += 1
        if is_cheap and not is_cut:
            assert world.streams[0].sent_bytes < 10_000
            outcomes["cheap"] += 1
        if world.outgoing.statistics().kept_bytes:
            outcomes["kept"] += 1
        world.is_touched = False
        world.turn_round()
        world.write(rng.choice([0, 0, 3, 10]))


def simulate(seed: int, directory: Path, outcomes: Counter[str]) -> None:
    """Let a disk wander."""
    directory.mkdir()
    plan: list[str] = []

    async def main() -> None:
        await wander(Wanderer(directory, seed), outcomes, plan)

    try:
        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    except BaseException as exc:
        exc.add_note(f"seed {seed}: {'; '.join(plan)}")
        raise


@pytest.mark.timeout(3600)
def test_disks_wander(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nightly: bool) -> None:
    """Whatever is left out, nothing is lost, and nothing that was written behind our back gets through."""
    monkeypatch.setattr("fusemig.migration.receipt.JOURNAL_INTERVAL_S", 0.01)
    n_runs = 500 if nightly else 40
    first = random.SystemRandom().getrandbits(40) if nightly else 0
    outcomes: Counter[str] = Counter()
    for seed in range(first, first + n_runs):
        simulate(seed, tmp_path / str(seed), outcomes)
    print(dict(outcomes))
    assert min(outcomes[what] for what in ("cheap", "kept", "gone on with", "begun anew")) > 0
