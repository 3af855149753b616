"""Two hosts whose disks, epoch files and connection can fail, in one loop on a mock clock."""

from __future__ import annotations

from contextlib import suppress
from itertools import count
from typing import TYPE_CHECKING

import trio
import trio.testing

from fusemig.core.phase import MigrationPhase
from fusemig.core.units import CHUNK_SIZE
from fusemig.disk.fault import FaultDisk
from fusemig.disk.tracked import Gate, TrackedDisk
from fusemig.errors import DiskError, GateClosedError, StateError
from fusemig.migration.commit import SourceDisk
from fusemig.migration.destination import DestinationMigration
from fusemig.migration.source import SourceMigration
from fusemig.migration.stats import MigrationParameters
from fusemig.records.epoch import EpochFile, Ownership
from support.faults import faulty_connection
from support.pair import Side, inline, nothing

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from pathlib import Path

    from fusemig.records.epoch import EpochRecord
    from support.faults import FaultyStream

P = MigrationPhase
SIZES = {"a": 2 * CHUNK_SIZE + 1536, "b": CHUNK_SIZE}
LINK_BYTES_PER_S = 100.0 * CHUNK_SIZE
N_BUSY_WRITES = 2000


class FaultyEpochFile(EpochFile):
    """An epoch file whose nth write fails, with or without having reached the disk."""

    def __init__(self, path: Path) -> None:
        """Fail nothing."""
        super().__init__(path)
        self.n_writes = 0
        self.fails: Callable[[int], bool] = lambda _number: False
        """Asked with the number of each write, from 1."""
        self.is_stored = False
        """Whether a failing write is on the disk all the same, as after a failed fdatasync."""

    def write(self, record: EpochRecord) -> None:
        """Write, or fail."""
        self.n_writes += 1
        if self.fails(self.n_writes):
            if self.is_stored:
                EpochFile(self.path).write(record)
            self.is_certain = False
            raise StateError(f"cannot write the epoch file {self.path}: on purpose")
        super().write(record)


class FaultySide(Side):
    """A host of which everything can fail."""

    def __init__(self, directory: Path, gate: Gate, sleep: Callable[[float], object]) -> None:
        super().__init__(directory, SIZES, gate)
        self.faults = {name: FaultDisk(image, sleep=sleep) for name, image in self.images.items()}
        self.disks = {name: TrackedDisk(layer, gate=gate) for name, layer in self.faults.items()}
        self.faulty_epochs = {name: FaultyEpochFile(directory / f"{name}.fusemig") for name in SIZES}
        self.epochs = dict(self.faulty_epochs)

    def mend(self) -> None:
        """Let nothing fail any more."""
        for layer in self.faults.values():
            layer.mend()
        for file in self.faulty_epochs.values():
            file.fails = lambda _number: False

    def durable_state(self, name: str) -> Ownership | None:
        """Return what a daemon that starts now would read."""
        record = EpochFile(self.epochs[name].path).record
        return None if record is None else record.state


class World(trio.abc.Instrument):
    """Two hosts, a guest, and an eye on both at every step of every task."""

    def __init__(self, directory: Path, clock: trio.testing.MockClock, **parameters: object) -> None:
        self.clock = clock
        self.source = FaultySide(directory / "source", Gate.OPEN, clock.jump)
        self.destination = FaultySide(directory / "destination", Gate.READ_ONLY, clock.jump)
        self.parameters = MigrationParameters(**parameters)  # type: ignore[arg-type]
        self.model = {name: bytearray(image.size) for name, image in self.source.images.items()}
        self.phases: list[MigrationPhase] = []
        self.on_phase: Callable[[MigrationPhase], None] = lambda _phase: None
        self.violations: list[str] = []
        self.longest_freeze_s = 0.0
        self._frozen_at: float | None = None
        self.n_acknowledged_writes = self.n_held_replies = self.n_paced_writes = 0
        self.longest_hold_s = 0.0
        """The longest time that a write waited for its turn, or its reply for the destination."""
        self.incoming: DestinationMigration | None = None
        self.on_further: Callable[[FaultyStream, FaultyStream], None] = lambda _here, _there: None
        """Called with both ends of each connection that is to join."""
        self.connect()

    def connect(self) -> None:
        """Make a new connection and a new migration for it."""
        self.phases.clear()
        self.streams: tuple[FaultyStream, FaultyStream] = faulty_connection(LINK_BYTES_PER_S)
        self.is_connected = False
        self.further: list[tuple[FaultyStream, FaultyStream]] = []
        self.outgoing = SourceMigration(
            [SourceDisk(disk, self.source.epochs[name], nothing) for name, disk in self.source.disks.items()],
            self._connect,
            self.parameters,
            inline,
            self._note_phase,
        )

    async def _connect(self) -> FaultyStream:
        """Return the connection of the handshake, and after that further ones, which join it."""
        await trio.lowlevel.checkpoint()
        if not self.is_connected:
            self.is_connected = True
            return self.streams[0]
        here, there = faulty_connection(LINK_BYTES_PER_S)
        self.further.append((here, there))
        self.on_further(here, there)
        self._nursery.start_soon(self._receive_further, there)
        return here

    async def _receive_further(self, stream: FaultyStream) -> None:
        await DestinationMigration(stream, self.destination, inline).run()
        await stream.aclose()

    def _note_phase(self, phase: MigrationPhase) -> None:
        self.phases.append(phase)
        self.check_ownership()
        self.on_phase(phase)

    def fill(self, rng: random.Random) -> None:
        """Give the source's disks data and holes, and the destination's what an earlier migration left."""
        for name, content in self.model.items():
            for start in range(0, len(content), CHUNK_SIZE):
                if rng.random() < 0.7:
                    end = min(len(content), start + CHUNK_SIZE)
                    content[start:end] = rng.randbytes(end - start)
            self.source.images[name].content[:] = content
            if rng.random() < 0.5:
                stale = self.destination.images[name].content
                stale[: len(stale) // 2] = rng.randbytes(len(stale) // 2)

    async def migrate(self) -> None:
        """Run both ends to their end."""
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(self._receive)
            self._nursery.start_soon(self.outgoing.run)

    async def _receive(self) -> None:
        self.incoming = DestinationMigration(self.streams[1], self.destination, inline)
        await self.incoming.run()
        await self.streams[1].aclose()

    async def guest(self, rng: random.Random, pause_s: float) -> None:
        """Write until a disk is not ours any more; until then every acknowledged write is in the model.

        Where a deadline of half a minute is waited out, most of it passes at a slower pace: every wake costs real time.
        """
        for n_writes in count():
            if n_writes == N_BUSY_WRITES:
                pause_s *= 50
            name = rng.choice(list(self.model))
            length = min(rng.choice([1, 512, 4096, 10_000, 100_000]), len(self.model[name]))
            offset = rng.randrange(len(self.model[name]) - length + 1)
            data = bytes(length) if rng.random() < 0.2 else rng.randbytes(length)
            if not await self.guest_writes(name, offset, data):
                return
            await trio.sleep(rng.random() * 2 * pause_s)

    async def guest_writes(self, name: str, offset: int, data: bytes) -> bool:
        """Make one write as a lane does; return whether guests may go on."""
        disk, place = self.source.disks[name], slice(offset, offset + len(data))
        while True:
            try:
                disk.pwrite(data, offset)
            except GateClosedError as paused:
                changed, since, is_paced = trio.Event(), trio.current_time(), disk.gate is Gate.OPEN
                if disk.write_gate.park(changed.set, paused):
                    await changed.wait()
                    if is_paced:
                        self.n_paced_writes += 1
                        self.longest_hold_s = max(self.longest_hold_s, trio.current_time() - since)
            except DiskError:
                if disk.gate is Gate.READ_ONLY:
                    return False
                # Nobody acknowledged it: any part of it may be there, and what is there counts.
                self.model[name][place] = self.source.images[name].content[place]
                return True
            else:
                self.model[name][place] = data
                self.n_acknowledged_writes += 1
                await self._wait_answered(disk, offset, len(data))
                return True

    async def _wait_answered(self, disk: TrackedDisk, offset: int, length: int) -> None:
        """Wait for the reply to a write that was made, as long as the migration holds it."""
        if not disk.write_gate.holds_replies:
            return
        answered, since = trio.Event(), trio.current_time()
        if disk.write_gate.hold_reply(offset, length, answered.set):
            await answered.wait()
            self.n_held_replies += 1
            self.longest_hold_s = max(self.longest_hold_s, trio.current_time() - since)

    # The eye

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Look at every gate after every step of every task."""
        now = trio.current_time()
        gates = [disk.gate for disk in self.source.disks.values()]
        if Gate.CLOSED in gates:
            self._frozen_at = now if self._frozen_at is None else self._frozen_at
            self.longest_freeze_s = max(self.longest_freeze_s, now - self._frozen_at)
        else:
            self._frozen_at = None
        for name, disk in self.source.disks.items():
            if disk.gate is Gate.OPEN and self.destination.disks[name].gate is Gate.OPEN:
                self.violations.append(f"both sides of '{name}' may write, after a step of {task.name}")

    def check_ownership(self) -> None:
        """Read the epoch files anew: no two owners, and whoever writes is one (or was never asked)."""
        for name, disk in self.source.disks.items():
            here, there = self.source.durable_state(name), self.destination.durable_state(name)
            if here in (None, Ownership.OWNER) and there is Ownership.OWNER:
                self.violations.append(f"the epoch files of '{name}' name two owners")
            if disk.gate is Gate.OPEN and there is Ownership.OWNER:
                self.violations.append(f"the source may write '{name}', which the destination owns")
            if self.destination.disks[name].gate is Gate.OPEN and there is not Ownership.OWNER:
                self.violations.append(f"the destination writes '{name}' without owning it durably")

    def check_outcome(self) -> None:
        """Hold a migration that is over against its promises."""
        self.check_ownership()
        assert not self.violations, self.violations[:3]
        assert self.outgoing.is_over
        gates = {disk.gate for disk in self.source.disks.values()}
        there = {disk.gate for disk in self.destination.disks.values()}
        phase = self.outgoing.phase
        if phase in (P.COMPLETED, P.CANCELLED):
            assert not any(disk._admission.marks.trackers for disk in self.source.disks.values()), "tracking goes on"
        for name, content in self.model.items():
            assert self.source.images[name].content == content, f"the source's '{name}' was changed"
        if phase is P.COMPLETED:
            assert self.outgoing.error is None
            assert (gates, there) == ({Gate.READ_ONLY}, {Gate.OPEN})
            for name, content in self.model.items():
                assert self.destination.images[name].content == content, f"'{name}' is not what was acknowledged"
        elif phase is P.IN_DOUBT:
            assert P.COMMITTED in self.phases
            assert gates == {Gate.READ_ONLY}
        else:
            assert phase in (P.FAILED, P.CANCELLED), phase
            assert P.COMMITTED not in self.phases
            assert (gates, there) == ({Gate.OPEN}, {Gate.READ_ONLY}), self.outgoing.error
            kind = None if self.outgoing.error is None else self.outgoing.error.kind
            assert (kind == "cancelled") == (phase is P.CANCELLED), self.outgoing.error

    async def succeed_now(self) -> None:
        """With everything mended, a new migration from the same source succeeds."""
        self.source.mend()
        self.destination.mend()
        self.on_phase = lambda _phase: None
        self.on_further = lambda _here, _there: None
        self.outgoing.forget()
        self.connect()
        await self.migrate()
        assert self.outgoing.phase is P.COMPLETED, self.outgoing.error
        self.check_outcome()


def run(main: Callable[[World], object], directory: Path, deadline_s: float = 600.0, **parameters: object) -> World:
    """Run ``main`` (async) in a new world, for at most ``deadline_s`` seconds of its own time."""
    clock = trio.testing.MockClock(autojump_threshold=0)
    directory.mkdir()
    worlds: list[World] = []

    async def bounded() -> None:
        world = World(directory, clock, **parameters)
        worlds.append(world)
        trio.lowlevel.add_instrument(world)
        with trio.fail_after(deadline_s):
            await main(world)  # type: ignore[misc]
        trio.lowlevel.remove_instrument(world)

    trio.run(bounded, clock=clock)
    return worlds[0]


def cancel_if_possible(world: World) -> None:
    """Cancel, unless that is refused."""
    with suppress(StateError):
        world.outgoing.cancel()
