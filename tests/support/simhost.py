"""A host of the simulation: what survives of it, the daemon that runs on it now, and its ends of connections.

Who may write after a start is decided by the product's own `ServedDisk`, from what is durable; who asks and who goes on
with what is the product's `Doubts`, journals and dirty maps. A process that was killed runs on only in that its tasks
are unwound: every call of it that could be seen from outside raises `KilledError` from the moment of its death.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from fusemig.core.units import CHUNK_SIZE
from fusemig.daemon.disk_spec import DiskSpec
from fusemig.daemon.doubt import Doubts
from fusemig.daemon.served import ServedDisk
from fusemig.disk.dirty_file import DirtyFile
from fusemig.disk.dirty_map import dirty_file_size
from fusemig.disk.fault import FaultDisk
from fusemig.disk.journal import ReceiptJournal, journal_size
from fusemig.errors import ConnectError, PeerRefusedError, StateError
from fusemig.fuse.export import Exports
from fusemig.migration.joining import Gatherings
from fusemig.migration.witness import RecalledDisk
from fusemig.migration.writer import IncomingDisk
from fusemig.records.epoch import EpochFile
from support.crash import CrashDisk, Fate, KilledError
from support.faults import FaultyStream
from support.pair import inline
from support.simguest import PageCache

if TYPE_CHECKING:
    import random
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path

    from fusemig.disk.base import Buffer
    from fusemig.disk.overlay_file import OverlayFile
    from fusemig.disk.raw import RawDisk
    from fusemig.disk.tracked import TrackedDisk
    from fusemig.migration.fetch_plan import Loan
    from fusemig.migration.incoming import AwaitedDisk
    from fusemig.net.transport import ByteStream
    from fusemig.records.epoch import EpochRecord, Ownership
    from fusemig.wire.native import AskedDisk, DiskOffer
    from support.streams import Pipe

LINK_BYTES_PER_S = 20e6


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
                if before and host.rng.random() < 0.5:  # the first one is renamed when it is whole
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

    def __init__(self, host: SimHost, name: str, *, is_incoming: bool, is_probe: bool = False) -> None:
        """``is_probe``: look at what is durable and change nothing of it."""
        self.layer = host.layers[name]
        self._host = host
        self._is_probe = is_probe
        super().__init__(DiskSpec(name, host.directory / f"{name}.img"), Exports(), None, is_incoming=is_incoming)
        self.epoch_file = SimEpochFile(self.epoch_file.path, host)

    def _open_image(self) -> RawDisk:
        return self.layer  # type: ignore[return-value]

    def _open_dirty_file(self, image: RawDisk | OverlayFile, disk: TrackedDisk) -> DirtyFile | None:
        if self._is_probe:
            return None
        store = self._host.dirty_stores[self.name]
        return DirtyFile(disk, f"boot {self._host.n_boots}", store, lambda: store)

    def open_journal(self) -> ReceiptJournal:
        """Open the journal, which lies in a store of the host."""
        return ReceiptJournal(self._host.journals[self.name], self.guest.size)

    def taken(self, session: str) -> None:
        """Begin the map of what guests write here, and delete the journal."""
        super().taken(session)
        self._host.make_journal(self.name)

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
        self.dirty_stores = {n: CrashDisk(n, dirty_file_size(size), self.fate, rng) for n, size in sizes.items()}
        self.journals: dict[str, CrashDisk] = {}
        for name in sizes:
            self.make_journal(name)
        self.n_boots = 1
        self.dial: Callable[[str], Awaitable[ByteStream]] = self._dial_nobody
        """How this host's daemon connects to a URI when it asks who owns a disk."""
        self.on_fault: Callable[[], None] = lambda: None
        """Called when a fault on purpose strikes an epoch file."""
        self.on_death: Callable[[], None] = lambda: None
        """Called just before the process dies."""
        self.on_settled: Callable[[], None] = lambda: None
        """Called when it is known again who owns a disk that was in doubt."""
        self.gatherings = Gatherings()
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
        self.pages = {name: PageCache() for name in self.stores}
        """What the kernel caches of the files of this daemon's mount."""
        self.served = {name: SimDisk(self, name, is_incoming=self.is_incoming) for name in self.stores}
        self.doubts = Doubts(self.served, lambda record: self.dial(record.peer), self._on_settled, inline, inline)

    def make_journal(self, name: str) -> None:
        """Have a blank journal for a disk, as after a file was deleted."""
        self.journals[name] = CrashDisk(name, journal_size(self.stores[name].size), self.fate, self.rng)

    async def _dial_nobody(self, uri: str) -> ByteStream:
        raise ConnectError(f"nobody is at {uri}")

    def _on_settled(self, settled: Sequence[ServedDisk], *, is_by_hand: bool) -> None:
        for served in settled:
            served.look_again(is_destination=self.is_incoming)
        self.on_settled()

    def restart(self, *, is_mended: bool = True) -> None:
        """Kill the daemon if it lives, and start another one from what is durable; faults may stay."""
        if not self.is_dead:
            self.die(is_power_loss=False)
        if self.had_power_loss:
            self.n_boots += 1
            for store in (*self.stores.values(), *self.dirty_stores.values(), *self.journals.values()):
                store.lose_power()
        self.n_restarts += 1
        self.on_death = lambda: None
        faults = self.fails_epoch_writes, self.next_epoch_writes
        if is_mended:
            self.mend()
        self.start()
        if not is_mended:
            self.fails_epoch_writes, self.next_epoch_writes = faults

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
                drop = self._dropper(served.name)
                claimed.append(IncomingDisk(disk, served.epoch_file, drop, served.open_journal, on_taken=served.taken))
        except BaseException:
            for served in chosen:
                served.busy = ""
            raise
        return claimed

    def _dropper(self, name: str) -> Callable[[], Awaitable[None]]:
        async def drop() -> None:
            self.pages[name].drop()
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

    def loans(self, session: str, lent: Sequence[AskedDisk], scope: trio.CancelScope) -> list[Loan]:
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
