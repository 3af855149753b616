"""Two hosts in one loop of which either can be killed at any durable write and any message, and started again.

A host that is killed does nothing more: its epoch files and its streams refuse, so that no cleanup of the dying task
can be mistaken for something that a killed process did. Started again, it knows its epoch files and its images only. A
power loss also takes from the images what was not synced.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import trio

from fusemig.core.phase import MigrationPhase
from fusemig.core.units import CHUNK_SIZE
from fusemig.disk.tracked import Gate, TrackedDisk
from fusemig.errors import FusemigError
from fusemig.migration.commit import SourceDisk
from fusemig.migration.destination import DestinationMigration
from fusemig.migration.settlement import DoubtfulDisk, Settlement
from fusemig.migration.source import SourceMigration
from fusemig.migration.stats import MigrationParameters
from fusemig.records.decision import DecisionFile
from fusemig.records.epoch import DOUBTFUL, EpochFile, Ownership
from support.crash import CrashDisk, Fate, KilledError
from support.pair import Side, inline, nothing
from support.streams import MemoryStream, Pipe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from typing import Any

    from fusemig.disk.base import Buffer
    from fusemig.records.epoch import EpochRecord

SIZES = {"a": CHUNK_SIZE + 1536, "b": 4096}


class Life:
    """How long a host lives: it dies at the nth of its steps."""

    def __init__(self, n_steps: int | None = None) -> None:
        """Live for ``n_steps`` steps; None: for ever."""
        self.left = n_steps
        self.is_over = False
        self.log: list[str] = []
        self.on_end: Callable[[], None] = lambda: None

    def step(self, what: str) -> None:
        """Take a step, or die before it."""
        if self.is_over:
            raise KilledError
        self.log.append(what)
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.is_over = True
                self.on_end()
                raise KilledError


class MortalEpochFile(EpochFile):
    """Each write is two steps: the host may die before it and after it."""

    def __init__(self, path: Path, life: Life) -> None:
        self._life = life
        super().__init__(path)

    def write(self, record: EpochRecord) -> None:
        self._life.step(f"before {record.state.value} of {self.path.name}")
        super().write(record)
        self._life.step(f"after {record.state.value} of {self.path.name}")


class MortalStream(MemoryStream):
    """Each send and each receive is a step."""

    def __init__(self, peer: str, outgoing: Pipe, incoming: Pipe, life: Life) -> None:
        super().__init__(peer, outgoing, incoming)
        self._life = life

    def send_nowait(self, buffers: Sequence[Buffer]) -> int:
        self._life.step("before send")
        n = super().send_nowait(buffers)
        self._life.step("after send")
        return n

    def receive_nowait(self, buffer: memoryview) -> int:
        n = super().receive_nowait(buffer)
        if n:
            self._life.step("after receive")
        return n


class MortalSide(Side):
    """A host with images that know what was synced."""

    def __init__(self, directory: Path, gate: Gate, images: dict[str, CrashDisk] | None = None) -> None:
        super().__init__(directory, SIZES, gate)
        rng = random.Random(1)
        self.directory = directory
        self.life = Life()
        self.images: dict[str, CrashDisk] = images or {  # type: ignore[assignment]
            name: CrashDisk(name, size, Fate(), rng) for name, size in SIZES.items()
        }
        self.disks = {name: TrackedDisk(image, gate=gate) for name, image in self.images.items()}
        self.live(Life())

    def live(self, life: Life) -> None:
        """Begin a life, with what the epoch files say."""
        self.life = life
        self.epochs = {name: MortalEpochFile(self.directory / f"{name}.fusemig", life) for name in SIZES}

    def durable(self, name: str) -> EpochRecord | None:
        """Return what the epoch file says."""
        return EpochFile(self.directory / f"{name}.fusemig").record


class Hosts:
    """A source and a destination, and what guests were told is durable."""

    def __init__(self, directory: Path, *, is_power_lost: bool, is_flight_lost: bool) -> None:
        """Begin with a disk group at the source.

        ``is_power_lost``: a host that dies loses what its images did not sync. ``is_flight_lost``: and what it sent and
        nobody read yet is lost with it.
        """
        self._is_power_lost = is_power_lost
        self._is_flight_lost = is_flight_lost
        rng = random.Random(2)
        self.source = MortalSide(directory / "source", Gate.OPEN)
        self.destination = MortalSide(directory / "destination", Gate.READ_ONLY)
        self.acknowledged = {name: bytearray(rng.randbytes(size)) for name, size in SIZES.items()}
        for name, content in self.acknowledged.items():
            image = self.source.images[name]
            image.content[:] = image.durable[:] = content
        self.parameters = MigrationParameters(freeze_deadline_s=3.0, taken_deadline_s=3.0)
        self._rng = random.Random(3)
        self.outgoing: SourceMigration | None = None
        """The migration that runs, or ran last."""

    def write(self) -> bool:
        """Write and sync something on whichever side takes it; return whether one did."""
        name = self._rng.choice(list(SIZES))
        data, offset = self._rng.randbytes(512), 512 * self._rng.randrange(SIZES[name] // 512)
        takers = [side for side in (self.source, self.destination) if side.disks[name].gate is Gate.OPEN]
        assert len(takers) <= 1, f"both sides of '{name}' may be written"
        for side in takers:
            if not side.life.is_over:
                side.disks[name].pwrite(data, offset)
                side.disks[name].flush()
                self.acknowledged[name][offset : offset + len(data)] = data
                return True
        return False

    def _connection(self) -> tuple[MortalStream, MortalStream]:
        forth, back = Pipe(), Pipe()
        ends = (
            MortalStream("destination", forth, back, self.source.life),
            MortalStream("source", back, forth, self.destination.life),
        )
        for side, end, sent in ((self.source, ends[0], forth), (self.destination, ends[1], back)):

            def on_end(end: MortalStream = end, sent: Pipe = sent) -> None:
                if self._is_flight_lost:
                    sent.data.clear()
                end.close()

            side.life.on_end = on_end
        return ends

    async def migrate(self, group: Path | None = None) -> SourceMigration:
        """Run a migration, with a guest, until both ends are over or dead; as a part of a group, if one is named."""
        here, there = self._connection()

        async def connect() -> MortalStream:
            await trio.lowlevel.checkpoint()
            return here

        lent = [SourceDisk(disk, self.source.epochs[name], nothing) for name, disk in self.source.disks.items()]

        def on_phase(phase: MigrationPhase) -> None:
            if phase is MigrationPhase.FROZEN:  # the gates are open for a moment still
                for _ in range(4):
                    self.write()

        life = self.source.life

        async def offload(function: Any, *args: Any, abandon_on_cancel: bool = False) -> Any:
            is_step = isinstance(getattr(function, "__self__", None), DecisionFile) and function.__name__ != "read"
            if is_step:  # reads are as many as there is time for, and change nothing
                life.step(f"before {function.__name__}")
            result = await inline(function, *args)
            if is_step:
                life.step(f"after {function.__name__}")
            return result

        self.outgoing = outgoing = SourceMigration(lent, connect, self.parameters, offload, on_phase, group=group)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._until_dead, self._receive, there)
            nursery.start_soon(self._until_dead, outgoing.run)
            for step in range(200):  # of the loop, not of the clock: a connection in memory takes no time
                if step % 25 == 0:
                    self.write()
                await trio.lowlevel.checkpoint()
        return outgoing

    async def _receive(self, stream: MortalStream) -> None:
        await DestinationMigration(stream, self.destination, inline).run()
        await stream.aclose()

    async def _until_dead(self, function: Callable[..., object], *args: object) -> None:
        try:
            await function(*args)  # type: ignore[misc]
        except KilledError:
            pass
        except BaseExceptionGroup as group:
            rest = group.split(KilledError)[1]
            if rest is not None:
                raise rest from None

    def restart(self, source_life: Life, destination_life: Life) -> None:
        """Start anew whoever is dead."""
        if self.source.life.is_over:
            self.source = self._successor(self.source, source_life)
        if self.destination.life.is_over:
            self.destination = self._successor(self.destination, destination_life)

    def _successor(self, dead: MortalSide, life: Life) -> MortalSide:
        if self._is_power_lost:
            for image in dead.images.values():
                image.lose_power()
        new = MortalSide(dead.directory, Gate.READ_ONLY, dead.images)
        new.live(life)
        for name, file in new.epochs.items():
            is_source = dead is self.source
            state = None if file.record is None else file.record.state
            if state is Ownership.OWNER or (state is None and is_source):
                new.disks[name].set_gate(Gate.OPEN)
        return new

    def in_doubt(self) -> dict[str, MortalEpochFile]:
        """Return the source's disks of which it is not known who owns them."""
        return {
            name: file  # type: ignore[misc]
            for name, file in self.source.epochs.items()
            if file.record is not None and file.record.state in DOUBTFUL
        }

    async def settle_once(self) -> None:
        """Have the source ask, once, as `fusemig.daemon.doubt` does."""
        doubtful = self.in_doubt()
        if not doubtful:
            return
        here, there = self._connection()
        n_released = sum(
            file.record is not None and file.record.state is Ownership.RELEASED for file in self.source.epochs.values()
        )
        record = next(iter(doubtful.values())).record
        assert record is not None
        settlement = Settlement(
            [DoubtfulDisk(name, file) for name, file in doubtful.items()],
            inline,
            is_whole=len(doubtful) + n_released == record.group,
        )

        async def ask() -> None:
            try:
                await settlement.run(here)
            except FusemigError:
                pass  # it asks again
            finally:
                here.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._until_dead, self._receive, there)
            nursery.start_soon(self._until_dead, ask)
        for name, file in self.source.epochs.items():
            if file.record is not None and file.record.state is Ownership.OWNER and not self.source.life.is_over:
                self.source.disks[name].set_gate(Gate.OPEN)

    def check(self) -> str:
        """Hold what is durable against the promises; return which side owns the disks, or may."""
        owners = set()
        for name in SIZES:
            here, there = self.source.durable(name), self.destination.durable(name)
            is_here = here is None or here.state is Ownership.OWNER
            is_there = there is not None and there.state is Ownership.OWNER
            assert not (is_here and is_there), f"'{name}' has two owners"
            if here is not None and here.state is Ownership.RELEASED:
                assert is_there, f"'{name}' was released to nobody"
            owners.add("source" if is_here else "destination" if is_there else "nobody")
            if is_here:
                assert self.source.images[name].content == self.acknowledged[name]
            if is_there:
                assert self.destination.images[name].content == self.acknowledged[name]
        return owners.pop() if len(owners) == 1 else "both"
