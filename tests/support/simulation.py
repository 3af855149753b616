"""Two hosts that can be killed, lose power and be started again, in one loop on a virtual clock.

    SimHost      what survives (stores, epoch files) and what does not (disks, gates, migrations, connections)
    SimWorld     a source, a destination, the connection between them, a guest, and an eye on both at every step

Who may write after a start is decided by the product's own `ServedDisk`, from what is durable. A process that was
killed runs on only in that its tasks are unwound: every call of it that could be seen from outside raises
`KilledError` from the moment of its death.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import trio
import trio.testing

from fusemig.disk.fault import FaultDisk
from fusemig.disk.tracked import Gate
from fusemig.epoch import EpochFile
from fusemig.errors import DiskError, GateClosedError, PeerRefusedError, StateError
from fusemig.fuse.export import Exports
from fusemig.migration.commit import SourceDisk
from fusemig.migration.destination import DestinationMigration
from fusemig.migration.source import SourceMigration
from fusemig.migration.stats import MigrationParameters
from fusemig.migration.witness import RecalledDisk
from fusemig.migration.writer import IncomingDisk
from fusemig.phase import MigrationPhase as P
from fusemig.served import DiskSpec, ServedDisk
from fusemig.units import CHUNK_SIZE, SECTOR_SIZE
from support.crash import CrashDisk, Fate, KilledError
from support.faults import FaultyStream
from support.matrix import Moment
from support.pair import inline, nothing
from support.streams import Pipe

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path

    from fusemig.disk.base import Buffer
    from fusemig.disk.overlay_file import OverlayFile
    from fusemig.disk.raw import RawDisk
    from fusemig.disk.tracked import TrackedDisk
    from fusemig.epoch import EpochRecord, Ownership
    from fusemig.errors import FusemigError
    from fusemig.migration.borrow import Loan
    from fusemig.migration.incoming import AwaitedDisk
    from fusemig.wire.native import DiskOffer

SIZES = {"a": CHUNK_SIZE + 17 * 4096 + 1536, "b": 64 * 1024}
"""A disk of two chunks, of which the last is short and ends inside a block; and one of a part of a chunk."""
LINK_BYTES_PER_S = 20e6
N_GUEST_WRITES = 50


_MOMENT_OF = {
    P.SETUP: Moment.SETUP,
    P.BULK: Moment.BULK,
    P.DIRTY: Moment.DIRTY,
    P.FROZEN: Moment.FROZEN,
    P.COMMITTED: Moment.COMMITTED,
}


class HostFate(Fate):
    """Kills a host at one of its calls to come, and lets nothing through afterwards."""

    def __init__(self, host: SimHost) -> None:
        super().__init__()
        self._host = host
        self.is_power_loss = False
        """How it dies when `left` calls were made."""

    def meet(self) -> bool:
        """Count a call; tell whether it is the last one."""
        self._host.check_alive()
        if not super().meet():
            return False
        self._host.die(is_power_loss=self.is_power_loss)
        return True


class SimEpochFile(EpochFile):
    """An epoch file whose writes can fail, tear and be the last thing that happens."""

    def __init__(self, path: Path, host: SimHost) -> None:
        super().__init__(path)
        self._host = host

    def write(self, record: EpochRecord) -> None:
        """Write, fail or die."""
        host = self._host
        if host.fate.meet():
            if host.rng.random() < 0.7:
                before = self.path.read_bytes() if self.path.exists() else b""
                EpochFile(self.path).write(record)
                if host.rng.random() < 0.5:
                    after = self.path.read_bytes()
                    cut = host.rng.randrange(len(after) + 1)
                    self.path.write_bytes(after[:cut] + before[cut:])
            raise KilledError
        if host.fails_epoch_writes is not None:
            host.on_fault()
            is_stored, host.fails_epoch_writes = host.fails_epoch_writes, host.next_epoch_writes
            if is_stored:
                EpochFile(self.path).write(record)
            raise StateError(f"cannot write the epoch file {self.path}: on purpose; free space there first")
        super().write(record)


class SimDisk(ServedDisk):
    """A served disk over a simulated store; everything that decides about it is the product's."""

    def __init__(self, host: SimHost, name: str, *, is_incoming: bool) -> None:
        self.layer = host.layers[name]
        super().__init__(DiskSpec(name, host.directory / f"{name}.img"), Exports(), None, is_incoming=is_incoming)
        self.epoch_file = SimEpochFile(self.epoch_file.path, host)

    def _open_image(self) -> RawDisk:
        return self.layer  # type: ignore[return-value]

    def _open_dirty_file(self, image: RawDisk | OverlayFile, disk: TrackedDisk) -> None:
        """Keep none: what goes on after an interruption has a simulation of its own."""

    @property
    def guest(self) -> TrackedDisk:
        """The guest's side; the store exists from the start."""
        assert self.disk is not None
        return self.disk


class SimHost:
    """What survives on a host, and the daemon that runs on it now."""

    def __init__(
        self,
        directory: Path,
        rng: random.Random,
        sleep: Callable[[float], object],
        sizes: dict[str, int],
        *,
        is_incoming: bool,
    ) -> None:
        directory.mkdir()
        self.directory = directory
        self.rng = rng
        self.is_incoming = is_incoming
        self.fate = HostFate(self)
        self.stores = {name: CrashDisk(name, size, self.fate, rng) for name, size in sizes.items()}
        self.layers = {name: FaultDisk(store, sleep=sleep) for name, store in self.stores.items()}
        for name in sizes:
            (directory / f"{name}.img").touch()
        self.on_fault: Callable[[], None] = lambda: None
        """Called when a fault on purpose strikes an epoch file."""
        self.on_death: Callable[[], None] = lambda: None
        """Called just before the process dies."""
        self.n_restarts = 0
        self.start()

    def start(self) -> None:
        """Start a daemon.

        Raises:
            ConfigError: it refuses, from what is durable.
        """
        self.is_dead = self.had_power_loss = False
        self.fate.left = None
        self.fails_epoch_writes: bool | None = None
        """Whether writes of epoch files fail (not None), and whether what failed is on the disk all the same."""
        self.next_epoch_writes: bool | None = None
        """What comes after the next failure."""
        self.streams: list[SimStream] = []
        self._lives: list[trio.CancelScope] = []
        self.dropped: set[str] = set()
        """Disks whose cached pages were dropped since they were claimed."""
        self.served = {name: SimDisk(self, name, is_incoming=self.is_incoming) for name in self.stores}

    def restart(self) -> None:
        """Kill the daemon if it lives, and start another one from what is durable."""
        if not self.is_dead:
            self.die(is_power_loss=False)
        if self.had_power_loss:
            for store in self.stores.values():
                store.lose_power()
        self.n_restarts += 1
        self.on_death = lambda: None
        self.mend()
        self.start()

    def mend(self) -> None:
        """Let nothing fail any more."""
        for layer in self.layers.values():
            layer.mend()
        self.fails_epoch_writes = self.next_epoch_writes = None
        self.fate.left = None

    def check_alive(self) -> None:
        """Raise `KilledError` in a process that is no more."""
        if self.is_dead:
            raise KilledError

    def die(self, *, is_power_loss: bool) -> None:
        """End the process: its sockets are closed by the kernel, or fall silent with the whole host."""
        if self.is_dead:
            return
        self.on_death()
        self.is_dead = True
        self.had_power_loss = is_power_loss
        for stream in self.streams:
            stream.die(is_silent=is_power_loss, keeps_sent=self.rng.random() < 0.5)
        for scope in self._lives:
            scope.cancel()

    async def live(self, function: Callable[[], Awaitable[object]]) -> None:
        """Run a part of the daemon until it ends or the process does."""
        scope = trio.CancelScope()
        self._lives.append(scope)
        try:
            with scope:
                self.check_alive()
                await function()
        except* KilledError:
            pass
        finally:
            if scope in self._lives:
                self._lives.remove(scope)

    def end(self) -> None:
        """Cancel what the daemon does, as its orderly end does to what runs in its nursery."""
        for scope in self._lives:
            scope.cancel()

    def durable_state(self, name: str) -> Ownership | None:
        """Return what a daemon that starts now would read."""
        record = EpochFile(self.served[name].epoch_file.path).record
        return None if record is None else record.state

    # The host of an incoming migration, as the daemon is

    async def awaited(self) -> list[AwaitedDisk]:
        """Say that no wire needs this here."""
        raise PeerRefusedError("only the native wire is simulated")

    async def claim(self, offers: Sequence[DiskOffer], session: str, peer: str) -> list[IncomingDisk]:
        """Reserve offered disks, all or none."""
        for offer in offers:
            if offer.name not in self.served:
                raise PeerRefusedError(f"disk '{offer.name}' is not awaited there")
            self.served[offer.name].check_offer(offer)
        chosen = [self.served[offer.name] for offer in offers]
        for served in chosen:
            served.busy = f"it is being received from {peer}"
        try:
            claimed = []
            for served, offer in zip(chosen, offers, strict=True):
                disk = await inline(served.receive, offer, session, peer)
                self.dropped.discard(served.name)
                claimed.append(IncomingDisk(disk, served.epoch_file, self._dropper(served.name)))
        except BaseException:
            for served in chosen:
                served.busy = ""
            raise
        return claimed

    def _dropper(self, name: str) -> Callable[[], Awaitable[None]]:
        async def drop() -> None:
            self.dropped.add(name)
            await trio.lowlevel.checkpoint()

        return drop

    def release(self, disks: Sequence[IncomingDisk]) -> None:
        """End a reservation."""
        for disk in disks:
            served = self.served[disk.disk.name]
            served.busy = ""
            served.is_waiting = not served.is_writable

    def recall(self, session: str, image_ids: Sequence[str], peer: str) -> list[RecalledDisk]:
        """Reserve every disk whose record names the migration or one of the images."""
        found = [
            served
            for served in self.served.values()
            for record in [served.epoch_file.record]
            if record is not None and (record.session == session or record.image_id in image_ids)
        ]
        for served in found:
            if served.busy:
                raise PeerRefusedError(f"disk '{served.name}' is busy: {served.busy}")
            served.busy = f"{peer} asks who owns it"
        return [RecalledDisk(served.name, served.epoch_file, served.disk) for served in found]

    def loans(self, session: str, image_ids: Sequence[str], scope: trio.CancelScope) -> list[Loan]:
        """Lend nothing: post-copy has a simulation of its own."""
        raise PeerRefusedError("nothing is borrowed here")

    def let_go(self, disks: Sequence[RecalledDisk]) -> None:
        """End a reservation."""
        for disk in disks:
            self.served[disk.name].busy = ""


class SimStream(FaultyStream):
    """One host's end of a connection; it goes with the host."""

    def __init__(self, peer: str, outgoing: Pipe, incoming: Pipe, host: SimHost) -> None:
        super().__init__(peer, outgoing, incoming, LINK_BYTES_PER_S)
        self.host = host
        self.on_fault: Callable[[], None] = lambda: None
        self.is_silent = False
        """What is sent is lost, and nobody is told."""
        self._piece_bytes = CHUNK_SIZE
        host.streams.append(self)

    def slow_down(self, bytes_per_s: float) -> None:
        """Send no faster from now on."""
        self._bytes_per_s = bytes_per_s
        self._piece_bytes = 4096

    def send_nowait(self, buffers: Sequence[Buffer]) -> int:
        """Send, unless this is the end."""
        is_last = self.host.fate.meet()
        if self.is_silent:
            return len(buffers[0])
        before = self.n_sends
        try:
            n = super().send_nowait([memoryview(buffers[0])[: self._piece_bytes]])
        finally:
            if self.n_sends > before and self.n_sends in self.faults:
                self.on_fault()
        if is_last:
            raise KilledError
        return n

    def receive_nowait(self, buffer: memoryview) -> int:
        """Receive, unless dead."""
        self.host.check_alive()
        return super().receive_nowait(buffer)

    async def wait_readable(self) -> None:
        """Wait for data or the end of anything."""
        while not self._incoming.data and not self._incoming.is_closed and not self.host.is_dead:
            await self._incoming.changed.wait()
        await trio.lowlevel.checkpoint()

    def die(self, *, is_silent: bool, keeps_sent: bool) -> None:
        """End with the process; its peer gets what was sent, unless that was still here."""
        if is_silent:
            self.is_silent = True
        else:
            for pipe in (self._incoming, self._outgoing):
                pipe.is_closed = True
        if not keeps_sent:
            self._outgoing.data.clear()
        for pipe in (self._incoming, self._outgoing):
            pipe.note()

    def close(self) -> None:
        """Close, unless the process that would is gone: then the kernel did, or nobody."""
        if not self.is_silent:
            super().close()


class GuestRecord:
    """What a guest knows of one disk: what it wrote, and what was synced."""

    def __init__(self, size: int) -> None:
        self.acknowledged = bytearray(size)
        self.synced = bytearray(size)
        self.since: dict[int, list[bytes]] = {}
        """The states of each sector after the last sync, oldest first."""
        self.is_sync_failed = False

    def note(self, content: bytearray, offset: int, length: int) -> None:
        """Take over what is there after a write that was made or tried."""
        self.acknowledged[offset : offset + length] = content[offset : offset + length]
        for sector in range(offset // SECTOR_SIZE, -(-(offset + length) // SECTOR_SIZE)):
            place = slice(sector * SECTOR_SIZE, (sector + 1) * SECTOR_SIZE)
            self.since.setdefault(sector, []).append(bytes(content[place]))

    def note_synced(self) -> None:
        """Everything acknowledged is durable."""
        for sector in self.since:
            place = slice(sector * SECTOR_SIZE, (sector + 1) * SECTOR_SIZE)
            self.synced[place] = self.acknowledged[place]
        self.since.clear()

    def lost_after_power_loss(self, content: bytearray) -> str:
        """Tell what is wrong with a disk that lost power, if anything is; then go on from what it holds."""
        wrong = ""
        expected = bytearray(self.synced)
        for sector, states in self.since.items():
            place = slice(sector * SECTOR_SIZE, (sector + 1) * SECTOR_SIZE)
            if bytes(content[place]) in (bytes(self.synced[place]), *states):
                expected[place] = content[place]
        if expected != content:
            at = next(i for i in range(len(content)) if expected[i] != content[i])
            wrong = f"byte {at} is neither what was synced nor what was written after that"
        self.acknowledged[:] = content
        self.synced[:] = content
        self.since.clear()
        self.is_sync_failed = False
        return wrong


class SimWorld(trio.abc.Instrument):
    """A source, a destination, and whatever is between them."""

    def __init__(self, directory: Path, clock: trio.testing.MockClock, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.clock = clock
        self.directory = directory
        self.parameters = MigrationParameters()
        self.source = SimHost(directory / "source", self.rng, clock.jump, SIZES, is_incoming=False)
        self.destination = SimHost(directory / "destination", self.rng, clock.jump, SIZES, is_incoming=True)
        self.later_destination: SimHost | None = None
        """The one that the next migration goes to, if it is another one."""
        self.source.on_fault = self.destination.on_fault = self.note_strike
        self.records = {name: GuestRecord(size) for name, size in SIZES.items()}
        self.violations: list[str] = []
        self.longest_freeze_s = 0.0
        self._frozen_at: float | None = None
        self.n_acknowledged_writes = 0
        self.struck_at: Moment | None = None
        """Where the migration was when the fault struck."""
        self.on_moment: Callable[[Moment], None] = lambda _moment: None
        self.is_cut = False
        """Whether the source's tasks were cancelled: its migration then has no outcome of its own."""
        self.on_claimed: Callable[[], None] = lambda: None
        """Called when the destination has reserved the disks for the source."""
        self.phases: list[P] = []
        self.incoming: DestinationMigration | None = None
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

    def connect(self) -> None:
        """Make a new connection and a new migration for it."""
        self.phases = []
        self.incoming = None
        self.streams = self.connection(self.source)
        self.outgoing = self.migration_from(self.source, self.streams[0], self._on_source_phase)

    def connection(self, host: SimHost) -> tuple[SimStream, SimStream]:
        """Return ``host``'s and the destination's end of a new connection."""
        forth, back = Pipe(), Pipe()
        ends = SimStream("destination", forth, back, host), SimStream("source", back, forth, self.destination)
        for end in ends:
            end.on_fault = self.note_strike
        return ends

    def migration_from(self, host: SimHost, stream: SimStream, on_phase: Callable[[P], None]) -> SourceMigration:
        """Return a migration of every disk of ``host``."""

        async def connect() -> SimStream:
            await trio.lowlevel.checkpoint()
            return stream

        lent = [SourceDisk(served.guest, served.epoch_file, nothing) for served in host.served.values()]
        return SourceMigration(lent, connect, self.parameters, inline, on_phase)

    async def migrate(self) -> None:
        """Run both ends to their end, whatever that is."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.destination.live, self.receive(self.streams[1], self._on_destination_phase))
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(self.source.live, self.outgoing.run)
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
            try:
                await migration.run()
            finally:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                    await stream.aclose()
            return migration

        return run

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
        """At take-over the destination's medium holds every acknowledged byte (I4), with no stale page (I12)."""
        for name, record in self.records.items():
            if self.destination.stores[name].durable != record.acknowledged:
                self.violations.append(f"'{name}' was taken over without every acknowledged byte on the medium")
            if name not in self.destination.dropped:
                self.violations.append(f"'{name}' was taken over with pages that early readers cached")
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
            if self.rng.random() < 0.15:
                self.guest_syncs(host, name)
            else:
                length = min(self.rng.choice([1, 512, 4096, 10_000]), SIZES[name])
                offset = self.rng.randrange(SIZES[name] - length + 1)
                data = bytes(length) if self.rng.random() < 0.2 else self.rng.randbytes(length)
                if not await self.guest_writes(host, name, offset, data):
                    return
            await trio.sleep(self.rng.random() * 2 * pause_s)

    async def guest_writes(self, host: SimHost, name: str, offset: int, data: bytes) -> bool:
        """Make one write as a lane does; return whether guests may go on."""
        disk, record = host.served[name].guest, self.records[name]
        content = host.stores[name].content
        while True:
            try:
                host.check_alive()
                disk.pwrite(data, offset)
            except GateClosedError:
                changed = trio.Event()
                if disk.park(changed.set):
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
                return True

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
