"""Two hosts that can be killed, lose power and be started again, in one loop on a virtual clock.

SimHost      what survives, and the daemon of the moment (`support.simhost`)
SimWorld     a source, a destination, the connections between them, a guest, early readers, and an eye on both hosts
             at every step of every task
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import trio
import trio.testing

from fusemig.core.phase import MigrationPhase as P
from fusemig.core.shaping import MirrorLag
from fusemig.core.units import CHUNK_SIZE
from fusemig.disk.tracked import Gate
from fusemig.errors import ConnectError, DiskError, GateClosedError, PeerRefusedError
from fusemig.migration.commit import SourceDisk
from fusemig.migration.destination import DestinationMigration
from fusemig.migration.resume import ResumePoint
from fusemig.migration.source import SourceMigration
from fusemig.migration.stats import MigrationParameters
from fusemig.records.epoch import Ownership
from support.crash import KilledError
from support.matrix import Moment
from support.pair import inline, nothing
from support.simguest import PAGE, GuestRecord
from support.simhost import SimHost, SimStream
from support.streams import Pipe

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from fusemig.errors import FusemigError
    from support.simhost import SimDisk

SIZES = {"a": CHUNK_SIZE + 17 * 4096 + 1536, "b": 64 * 1024}
"""A disk of two chunks, of which the last is short and ends inside a block; and one of a part of a chunk."""
N_GUEST_WRITES = 50
N_EARLY_READS = 40


_MOMENT_OF = {
    P.SETUP: Moment.SETUP,
    P.BULK: Moment.BULK,
    P.DIRTY: Moment.DIRTY,
    P.FROZEN: Moment.FROZEN,
    P.COMMITTED: Moment.COMMITTED,
}


class SimWorld(trio.abc.Instrument):
    """A source, a destination, and whatever is between them."""

    def __init__(self, directory: Path, clock: trio.testing.MockClock, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.clock = clock
        self.directory = directory
        # One of three worlds mirrors, with replies that wait for the destination.
        self.parameters = MigrationParameters(mirrors=seed % 3 == 2, mirror_lag=MirrorLag(seconds=0.0))
        self.on_connection: Callable[[], None] = lambda: None
        """Called for each connection after the first: what lasts strikes again."""
        self.link_faults: Callable[[SimStream], None] = lambda _stream: None
        """Called with each end of a new connection: what is wrong with the link stays wrong."""
        self.source = SimHost(directory / "source", self.rng, clock.jump, SIZES, is_incoming=False)
        self.destination = SimHost(directory / "destination", self.rng, clock.jump, SIZES, is_incoming=True)
        self.later_destination: SimHost | None = None
        """The one that the next migration goes to, if it is another one."""
        self.source.dial = self._dial
        self.source.on_settled = self._on_settled
        self.source.on_fault = self.destination.on_fault = self.note_strike
        self.records = {name: GuestRecord(size) for name, size in SIZES.items()}
        self.violations: list[str] = []
        self.longest_freeze_s = 0.0
        self._frozen_at: float | None = None
        self.n_acknowledged_writes = 0
        self.n_early_reads = 0
        self.is_prompt = False
        """Whether the fault is to strike at its moment, and not at some step after it."""
        self.is_lasting = False
        """Whether the fault goes on until somebody mends it."""
        self._n_receiving = 0
        self.struck_at: Moment | None = None
        """Where the migration was when the fault struck."""
        self.on_moment: Callable[[Moment], None] = lambda _moment: None
        self.is_cut = False
        """Whether the source's tasks were cancelled: its migration then has no outcome of its own."""
        self.on_claimed: Callable[[], None] = lambda: None
        """Called when the destination has reserved the disks for the source."""
        self.phases: list[P] = []
        self.incoming: DestinationMigration | None = None
        self.error: FusemigError | None = None
        """What the first migration ended with."""
        self.nursery: trio.Nursery
        self.fill()
        self.connect()

    def fill(self) -> None:
        """Give the source's disks data and holes, and the destination's what an earlier migration left."""
        for name, record in self.records.items():
            for start in range(0, len(record.synced), 128 * 1024):
                if self.rng.random() < 0.7:
                    end = min(len(record.synced), start + 128 * 1024)
                    record.synced[start:end] = self.rng.randbytes(end - start)
            record.acknowledged[:] = record.synced
            store = self.source.stores[name]
            store.content[:] = store.durable[:] = record.synced
            if self.rng.random() < 0.5:
                stale = self.destination.stores[name]
                stale.content[: stale.size // 2] = self.rng.randbytes(stale.size // 2)
                stale.durable[:] = stale.content

    # The migration

    def connect(self, resume: ResumePoint | None = None) -> None:
        """Make a new connection and a new migration for it, which may go on with another one."""
        self.phases = []
        self.n_connections = 0
        self.streams = self.new_connection()
        self.outgoing = self.migration_from(self.source, self._next_stream, self._on_source_phase, resume)

    def new_connection(self) -> tuple[SimStream, SimStream]:
        """Return both ends of a new connection of the source's."""
        self.incoming = None
        return self.connection(self.source)

    async def _next_stream(self) -> SimStream:
        """Connect; a destination that is dead refuses, and somebody starts it again meanwhile."""
        self.n_connections += 1
        await trio.lowlevel.checkpoint()
        if self.n_connections > 1:
            self._refuse_if_dead()
            self.streams = self.new_connection()
            await self._begin_receiving()
            self.on_connection()
            self.source.check_alive()
        return self.streams[0]

    async def _begin_receiving(self) -> None:
        self.nursery.start_soon(self.destination.live, self.receive(self.streams[1], self._on_destination_phase))
        await trio.testing.wait_all_tasks_blocked()

    def _refuse_if_dead(self) -> None:
        if self.destination.is_dead:
            self.restart(self.destination)
            raise ConnectError("cannot connect to the destination: connection refused")

    def restart(self, host: SimHost) -> None:
        """Start a host's daemon again; what lasts is not mended by that."""
        host.restart(is_mended=not self.is_lasting)

    def mend(self) -> None:
        """End everything that is wrong, for good."""
        self.is_lasting = False
        self.on_connection = lambda: None
        self.link_faults = lambda _stream: None
        if self.later_destination is not None:
            self.destination = self.later_destination
        for host in (self.source, self.destination):
            if host.is_dead:
                host.restart()
            host.mend()

    def in_doubt(self) -> bool:
        """Whether it is not known of a disk who owns it, as the source's daemon sees it."""
        return any(served.ownership is Ownership.HANDED_OFF for served in self.served_here())

    async def _dial(self, uri: str) -> SimStream:
        """Connect to ask who owns the disks."""
        await trio.lowlevel.checkpoint()
        self._refuse_if_dead()
        self.streams = self.new_connection()
        self.nursery.start_soon(self.destination.live, self.receive(self.streams[1], self._on_question_phase))
        self.on_connection()
        self.source.check_alive()
        return self.streams[0]

    def _on_settled(self) -> None:
        migration = self.outgoing
        if migration.phase is P.IN_DOUBT and all(s.ownership is not Ownership.HANDED_OFF for s in self.served_here()):
            migration.settle(is_handed_off=not any(served.is_writable for served in self.served_here()))

    def served_here(self) -> list[SimDisk]:
        """Return the source's disks."""
        return list(self.source.served.values())

    def connection(self, host: SimHost) -> tuple[SimStream, SimStream]:
        """Return ``host``'s and the destination's end of a new connection."""
        forth, back = Pipe(), Pipe()
        ends = SimStream("destination", forth, back, host), SimStream("source", back, forth, self.destination)
        for end in ends:
            end.on_fault = self.note_strike
            self.link_faults(end)
        return ends

    def migration_from(
        self,
        host: SimHost,
        connect: Callable[[], Awaitable[SimStream]],
        on_phase: Callable[[P], None],
        resume: ResumePoint | None = None,
    ) -> SourceMigration:
        """Return a migration of every disk of ``host``."""
        lent = [
            SourceDisk(served.guest, served.epoch_file, nothing, served.dirty_file) for served in host.served.values()
        ]
        return SourceMigration(lent, connect, self.parameters, inline, on_phase, resume=resume)

    def resume_point(self) -> ResumePoint:
        """Return where the migration was interrupted, as `fusemig.daemon.choice` does."""
        point = self.outgoing.resume_point()
        if point is not None and [disk.disk for disk in point.disks] == [served.guest for served in self.served_here()]:
            return point
        sessions = {served.interrupted_session for served in self.served_here()}
        session = sessions.pop()
        return ResumePoint("unknown" if session is None or sessions else session)

    async def migrate(self) -> None:
        """Run both ends to their end, whatever that is."""
        await self._begin_receiving()
        await self.source.live(self.outgoing.run)
        for stream in self.streams:  # a destination that was forgotten without a word
            if not stream.is_silent:
                stream.close()
        await self._wait_received()
        for host in (self.source, self.destination):  # a death that did not come by now was not of this run
            host.fate.left = None
            host.on_death = lambda: None

    def receive(
        self, stream: SimStream, on_phase: Callable[[P], None] = lambda _phase: None
    ) -> Callable[[], Awaitable[DestinationMigration]]:
        """Return what the destination does with a connection."""

        async def run() -> DestinationMigration:
            migration = DestinationMigration(stream, self.destination, inline, on_phase)
            if on_phase == self._on_destination_phase:
                self.incoming = migration
            self._n_receiving += 1
            try:
                await migration.run()
            finally:
                self._n_receiving -= 1
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                    await stream.aclose()
            return migration

        return run

    async def _wait_received(self) -> None:
        while self._n_receiving and not self.destination.is_dead:
            await trio.sleep(0.5)

    def _on_question_phase(self, phase: P) -> None:
        if phase is P.COMPLETED and not self.destination.is_dead:
            self._check_taken()

    def _on_source_phase(self, phase: P) -> None:
        if self.source.is_dead:
            return
        self.phases.append(phase)
        moment = _MOMENT_OF.get(phase)
        if moment is not None:
            self.on_moment(moment)
        self.source.check_alive()

    def _on_destination_phase(self, phase: P) -> None:
        if self.destination.is_dead:
            return
        if phase is P.SETUP:
            self.on_claimed()
        elif phase is P.FROZEN:
            self.on_moment(Moment.PREPARED)
        elif phase is P.COMPLETED:
            self._check_taken()
            self.on_moment(Moment.TAKEN)
        self.destination.check_alive()

    def _check_taken(self) -> None:
        """At take-over the destination's medium holds every acknowledged byte (I4), with no stale page cached (I12)."""
        for name, record in self.records.items():
            if self.destination.stores[name].durable != record.acknowledged:
                self.violations.append(f"'{name}' was taken over without every acknowledged byte on the medium")
            if stale := self.destination.pages[name].stale(record.acknowledged):
                self.violations.append(f"'{name}' was taken over with stale pages that early readers cached: {stale}")
            record.synced[:] = record.acknowledged
            record.since.clear()
            record.is_sync_failed = False

    @property
    def moment(self) -> Moment:
        """Where the migration is."""
        phase = self.outgoing.phase
        there = P.NONE if self.incoming is None else self.incoming.phase
        if there is P.COMPLETED:
            return Moment.TAKEN
        if phase in (P.COMMITTED, P.COMPLETED, P.IN_DOUBT):
            return Moment.COMMITTED
        if there is P.FROZEN:
            return Moment.PREPARED
        if phase is P.FROZEN:
            return Moment.FROZEN
        if phase in (P.DIRTY, P.PRE_SWITCHOVER):
            return Moment.DIRTY
        return Moment.BULK if phase is P.BULK else Moment.SETUP

    def note_strike(self) -> None:
        """The fault of this run strikes now; only its first time counts."""
        if self.struck_at is None:
            self.struck_at = self.moment

    # The guest

    async def guest(self, host: SimHost, n_writes: int, pause_s: float) -> None:
        """Write and sync until the disk is not ours any more."""
        for _ in range(n_writes):
            name = "a" if self.rng.random() < 0.7 else "b"
            kind = self.rng.random()
            if kind < 0.15:
                self.guest_syncs(host, name)
            else:
                length = min(self.rng.choice([1, 512, 4096, 10_000]), SIZES[name])
                offset = self.rng.randrange(SIZES[name] - length + 1)
                data = bytes(length) if self.rng.random() < 0.2 else self.rng.randbytes(length)
                write = self.guest_writes_durably if kind > 0.85 else self.guest_writes
                if not await write(host, name, offset, data):
                    return
            await trio.sleep(self.rng.random() * 2 * pause_s)

    async def early_reader(self, pause_s: float) -> None:
        """Read at the destination before the disks are there, as a program does that opens them early."""
        rng = random.Random(f"reader {self.seed}")
        for _ in range(N_EARLY_READS):
            host = self.destination
            if not host.is_dead:
                name = rng.choice(list(host.served))
                disk = host.served[name].guest
                host.pages[name].read(disk, rng.randrange(-(-disk.size // PAGE)))
                self.n_early_reads += 1
            await trio.sleep(pause_s)

    async def guest_writes_durably(self, host: SimHost, name: str, offset: int, data: bytes) -> bool:
        """Make one write with O_DSYNC, as a lane does; one that was answered is on the medium (I2)."""
        if not await self.guest_writes(host, name, offset, data):
            return False
        place = slice(offset, offset + len(data))
        if self.guest_syncs(host, name) and host.stores[name].durable[place] != self.records[name].acknowledged[place]:
            self.violations.append(f"an O_DSYNC write to '{name}' was answered before it was on the medium")
        return True

    async def guest_writes(self, host: SimHost, name: str, offset: int, data: bytes) -> bool:
        """Make one write as a lane does; return whether guests may go on."""
        disk, record = host.served[name].guest, self.records[name]
        content = host.stores[name].content
        while True:
            try:
                host.check_alive()
                disk.pwrite(data, offset)
            except GateClosedError as paused:
                changed = trio.Event()
                if disk.write_gate.park(changed.set, paused):
                    await changed.wait()
            except KilledError:
                record.note(content, offset, len(data))  # any part of it may be there
                raise
            except DiskError:
                if disk.gate is Gate.READ_ONLY:
                    return False
                # Nobody acknowledged it: any part of it may be there, and what is there counts.
                record.note(content, offset, len(data))
                return True
            else:
                record.note(content, offset, len(data))
                if record.acknowledged[offset : offset + len(data)] != data:
                    self.violations.append(f"a write to '{name}' was acknowledged and not made")
                self.n_acknowledged_writes += 1
                if disk.write_gate.holds_replies:
                    answered = trio.Event()
                    if disk.write_gate.hold_reply(offset, len(data), answered.set):
                        await answered.wait()
                return True

    def guest_writes_now(self) -> None:
        """Make a write while the source's gates are open still."""
        for name, served in self.source.served.items():
            if served.guest.gate is Gate.OPEN:
                try:
                    served.guest.pwrite(self.rng.randbytes(4096), 8192)
                except GateClosedError:  # a migration that mirrors may have it wait, and this guest does not
                    continue
                self.records[name].note(self.source.stores[name].content, 8192, 4096)

    def guest_syncs(self, host: SimHost, name: str) -> bool:
        """Make one fsync; return whether it was acknowledged. One that failed must fail for ever (I1)."""
        record = self.records[name]
        try:
            host.check_alive()
            host.served[name].guest.flush()
        except DiskError:
            record.is_sync_failed = True
            return False
        if record.is_sync_failed:
            self.violations.append(f"an fsync of '{name}' was acknowledged after one that failed")
        if host.stores[name].durable != host.stores[name].content:
            self.violations.append(f"an fsync of '{name}' was acknowledged before its bytes were on the medium")
        record.note_synced()
        return True

    # The eye

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Look at every gate after every step of every task (I5), and at how long writes are parked (I8)."""
        now = trio.current_time()
        source = {} if self.source.is_dead else self.source.served
        is_frozen = False
        there = {} if self.destination.is_dead else self.destination.served
        for name, served in source.items():
            gate = served.guest.gate
            if gate is Gate.CLOSED:
                is_frozen = True
            elif gate is Gate.OPEN and name in there and there[name].guest.gate is Gate.OPEN:
                self.violations.append(f"both sides of '{name}' may write, after a step of {task.name}")
        if is_frozen:
            self._frozen_at = now if self._frozen_at is None else self._frozen_at
            self.longest_freeze_s = max(self.longest_freeze_s, now - self._frozen_at)
        else:
            self._frozen_at = None


def simulate(
    main: Callable[[SimWorld], Awaitable[None]], directory: Path, seed: int, deadline_s: float = 20_000.0
) -> SimWorld:
    """Run ``main`` in a new world, for at most ``deadline_s`` seconds of its own time."""
    clock = trio.testing.MockClock(autojump_threshold=0)
    directory.mkdir()
    worlds: list[SimWorld] = []

    async def bounded() -> None:
        # trio itself shuffles tasks with a generator of its own: a seed must name a run.
        trio._core._run._r.seed(seed)
        world = SimWorld(directory, clock, seed)
        worlds.append(world)
        trio.lowlevel.add_instrument(world)
        with trio.fail_after(deadline_s):
            async with trio.open_nursery() as world.nursery:
                await main(world)
                world.nursery.cancel_scope.cancel()
        trio.lowlevel.remove_instrument(world)

    trio.run(bounded, clock=clock)
    return worlds[0]


def refused(error: FusemigError | None) -> bool:
    """Tell whether a destination said no."""
    return isinstance(error, PeerRefusedError)
