"""Migrations that are interrupted again and again, with either side killed or cut from power, and go on to the end.

Each round the link is cut at a random send, between any two frames or inside one, while a guest writes. Then, of the
destination: nothing, or a kill at the moment of the cut, or a power loss then; of the source: nothing, a kill, or a
kill after which its map does not count. The last round completes: the destination holds what the guest last wrote, both
digests are equal (else there is no hand-off), and no more crossed the wire than was missing or had been written.
"""

from __future__ import annotations

import random
import uuid
from collections import Counter
from copy import deepcopy
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from fusemig.core.phase import MigrationPhase as P
from fusemig.core.units import CHUNK_SIZE, n_chunks
from fusemig.disk.dirty_map import Since
from fusemig.disk.journal import journal_size
from fusemig.disk.tracked import Gate, TrackedDisk
from fusemig.errors import TransportError
from fusemig.migration.resume import ResumePoint
from support.crash import CrashDisk, Fate
from support.faults import FaultyStream, faulty_connection
from support.pair import Pair

if TYPE_CHECKING:
    from pathlib import Path

SIZES = {"a": 4 * CHUNK_SIZE + 1536, "b": 3 * CHUNK_SIZE}
LINK_BYTES_PER_S = 100.0 * CHUNK_SIZE


class ResumeWorld(Pair):
    """A pair whose destination can lose what it had not synced."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        super().__init__(directory, SIZES)
        fate = Fate()
        self.stores = {name: CrashDisk(name, size, fate, self.rng) for name, size in SIZES.items()}
        self.journal_stores = {
            name: CrashDisk(name, journal_size(size), fate, self.rng) for name, size in SIZES.items()
        }
        self.model = {name: bytearray(size) for name, size in SIZES.items()}
        for name, content in self.model.items():
            for start in range(0, len(content), CHUNK_SIZE):
                end = min(len(content), start + CHUNK_SIZE)
                match self.rng.choice(["full", "full", "part", "hole"]):
                    case "full":
                        content[start:end] = self.rng.randbytes(end - start)
                    case "part" if end - start == CHUNK_SIZE:
                        content[start : start + 300_000] = self.rng.randbytes(300_000)
            self.source.images[name].content[:] = content
            self.stores[name].content[: CHUNK_SIZE * 2] = self.rng.randbytes(CHUNK_SIZE * 2)
            self.stores[name].durable[:] = self.stores[name].content
        self.put_stores()
        self.boot = 0
        self.written: set[tuple[str, int]] = set()
        """Chunks written since the last connection began."""
        self.outcomes: Counter[str] = Counter()
        self.crash: tuple[dict[str, CrashDisk], dict[str, CrashDisk]] | None = None

    def put_stores(self) -> None:
        self.destination.disks = {name: TrackedDisk(s, gate=Gate.READ_ONLY) for name, s in self.stores.items()}
        self.destination.journals = dict(self.journal_stores)

    async def guest(self) -> None:
        """Write now and then, until nothing is ours any more."""
        while True:
            name = self.rng.choice(list(SIZES))
            length = self.rng.choice([1, 512, 4096, 10_000, 100_000, CHUNK_SIZE])
            offset = self.rng.randrange(SIZES[name] - length)
            if length == CHUNK_SIZE:
                offset -= offset % CHUNK_SIZE
            data = bytes(length) if self.rng.random() < 0.2 else self.rng.choice([b"A", b"B"]) * length
            while (disk := self.source.disks[name]).gate is not Gate.OPEN:
                if disk.gate is Gate.READ_ONLY:
                    return
                await trio.sleep(0.001)
            disk.pwrite(data, offset)
            self.model[name][offset : offset + length] = data
            touched = range(offset // CHUNK_SIZE, n_chunks(offset + length))
            self.written |= {(name, chunk) for chunk in touched}
            await trio.sleep(self.rng.random() * 0.01)

    def connect_at(self, cut: int | None) -> None:
        """Make a connection that is cut at a send."""
        self.streams = faulty_connection(LINK_BYTES_PER_S)
        stream = self.streams[0]
        assert isinstance(stream, FaultyStream)
        self.crash = None
        if cut is None:
            return
        stream.faults[cut] = self.rng.choice(["cut", "half"])
        send = stream.send_nowait

        def send_nowait(buffers: list[bytes]) -> int:
            if stream.n_sends == cut - 1:
                self.crash = deepcopy((self.stores, self.journal_stores))
            return send(buffers)

        stream.send_nowait = send_nowait  # type: ignore[method-assign, assignment]

    def differing(self) -> set[tuple[str, int]]:
        """Return the chunks that differ at this moment."""
        return {
            (name, chunk)
            for name, size in SIZES.items()
            for chunk in range(n_chunks(size))
            if self.stores[name].content[(part := slice(chunk * CHUNK_SIZE, (chunk + 1) * CHUNK_SIZE))]
            != self.model[name][part]
        }

    def interrupt_destination(self) -> str:
        what = self.rng.choice(["destination lives", "destination lives", "destination killed", "power loss"])
        if what == "destination lives" or self.crash is None:
            return "destination lives"
        self.stores, self.journal_stores = self.crash
        if what == "power loss":
            for store in (*self.stores.values(), *self.journal_stores.values()):
                store.lose_power()
        self.put_stores()
        return what

    def interrupt_source(self) -> tuple[str, ResumePoint]:
        what = self.rng.choice(["source lives", "source lives", "source killed", "map does not count"])
        point = self.outgoing.resume_point()
        if what == "source lives" and point is not None:
            return what, point
        self.outgoing.forget()
        self.source.restart(Gate.OPEN)
        bases = {self.source.dirty_file(name).base(Since.SESSION) for name in SIZES}
        if what == "map does not count" or None in bases or len({base.session for base in bases if base}) > 1:
            return "map does not count", ResumePoint(uuid.uuid4().hex)
        (session,) = {base.session for base in bases if base}
        return "source killed", ResumePoint(session)


def simulate(seed: int, directory: Path, outcomes: Counter[str]) -> None:
    """Interrupt a migration a few times, then let it complete."""
    directory.mkdir()
    clock = trio.testing.MockClock(autojump_threshold=0)
    plan: list[str] = []

    async def main() -> None:
        world = ResumeWorld(directory, seed)
        rng = world.rng
        point: ResumePoint | None = None
        cuts = [rng.randint(2, 40) for _ in range(rng.randint(1, 5))]
        session_written: set[tuple[str, int]] = set()
        missing: set[tuple[str, int]] = set()
        how = ""
        for cut in [*cuts, None]:
            world.renew(point)
            world.connect_at(cut)
            world.parameters.pause_before_switchover = cut is not None  # so that a round with few sends waits
            session_written |= world.written
            world.written = set()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(world.guest)
                if cut is not None:
                    nursery.start_soon(call_off_when_idle, world)
                await world.migrate()
                nursery.cancel_scope.cancel()
            sent = world.streams[0].sent_bytes
            if cut is None:
                break
            if world.outgoing.phase is P.CANCELLED:
                plan.append("cancelled")
            else:
                assert isinstance(world.outgoing.error, TransportError), world.outgoing.error
            there = world.interrupt_destination()
            here, point = world.interrupt_source()
            how = f"{here}, {there}"
            if point.session != world.outgoing.session:
                session_written = set()  # a new map, and everything is compared
            missing = world.differing()
            plan.append(f"cut {cut}: {how}")
            record = world.destination.epochs["a"].record
            if record is None:
                point = None  # the destination has never heard of it
        assert world.outgoing.error is None, world.outgoing.error
        for name, content in world.model.items():
            assert world.stores[name].content == content
        outcomes[how] += 1
        if point is not None and "power" not in how and "killed" not in how.split(",")[1]:
            # What guests wrote this time may go several times.
            bound = len(missing | session_written | world.written) + len(world.written) + 1
            assert sent < bound * CHUNK_SIZE + 100_000, (sent / CHUNK_SIZE, bound)
            outcomes["bounded"] += 1
            outcomes["kept"] += world.outgoing.statistics().kept_bytes // CHUNK_SIZE

    try:
        trio.run(main, clock=clock)
    except BaseException as exc:
        exc.add_note(f"seed {seed}: {'; '.join(plan)}")
        raise


async def call_off_when_idle(world: ResumeWorld) -> None:
    """End a round that has nothing more to send before its cut comes."""
    while world.outgoing.phase is not P.PRE_SWITCHOVER:
        await trio.sleep(0.01)
    await trio.sleep(1)
    world.outgoing.cancel()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("batch", [0, *(pytest.param(n, marks=pytest.mark.nightly) for n in range(1, 4))])
def test_interrupted_migrations_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, nightly: bool
) -> None:
    """Whatever is interrupted, however often: nothing is lost, and what is there is not sent again."""
    monkeypatch.setattr("fusemig.migration.receipt.JOURNAL_INTERVAL_S", 0.01)
    n_runs = 1000 if nightly else 30
    first = random.SystemRandom().getrandbits(40) if nightly else batch * 1_000_000
    outcomes: Counter[str] = Counter()
    for seed in range(first, first + n_runs):
        simulate(seed, tmp_path / str(seed), outcomes)
    print(dict(outcomes))
    assert outcomes["kept"] > 0
