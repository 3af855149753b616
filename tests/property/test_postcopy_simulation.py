"""Post-copy in one loop, on a virtual clock, with everything that can go wrong with a link, a host and a power supply.

A source lends an image that never changes; a destination whose stores can be killed in any call fetches it while a
guest reads and writes there. The model knows of each sector what it may hold: after an acknowledged write one value,
after a power loss any that it had since the last flush that was answered. A run ends when the source is told WHOLE.

In every second world the disk is an overlay on both sides, and what is the base's is never missing.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from fusemig.core.units import BLOCK_SIZE, SECTOR_SIZE, n_blocks
from fusemig.disk.allocation import AllocationMap, BaseIdentity, map_size, write_header
from fusemig.disk.base import Extent
from fusemig.disk.borrowed import BorrowedDisk, Wants, new_map
from fusemig.disk.memory import MemoryDisk
from fusemig.disk.overlay import OverlayDisk
from fusemig.errors import ConnectionLostError, DiskError, FusemigError
from fusemig.migration.borrow import Borrowing
from fusemig.migration.fetch_plan import Loan
from fusemig.migration.lend import Lending, LentDisk
from fusemig.migration.link import BufferPool, NativeLink
from fusemig.records.epoch import EpochFile, EpochRecord, Ownership
from fusemig.wire import native
from support.crash import CrashDisk, Fate, KilledError
from support.faults import KINDS, FaultyStream
from support.pair import inline
from support.streams import Pipe, carry, memory_connection

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fusemig.disk.base import Disk
    from fusemig.migration.link import Offload
    from support.streams import MemoryStream

SIZE = 150 * BLOCK_SIZE + 1536
BASE_SIZE = 130 * BLOCK_SIZE + 512
N_RUNS = 40
"""And fifty times as many with ``--nightly``."""
N_OPERATIONS = 60


class World:
    """What survives, what lives now, and what the guest may expect."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.base = _random_base(rng) if seed % 2 else None
        self.origin = _random_origin(rng, self.base)
        content = self.origin.pread(SIZE, 0)
        self.epoch_file = EpochFile(directory / f"{seed}.fusemig")
        self.epoch_file.write(
            EpochRecord(state=Ownership.LENDING, image_id="i", epoch=0, session="s", peer="x", is_loan=True)
        )
        self.fate = Fate()
        self.image = CrashDisk("d", SIZE, self.fate, rng)
        self.store = CrashDisk("d", map_size(SIZE), self.fate, rng)
        self.overlay_store = CrashDisk("d", map_size(SIZE), self.fate, rng)
        self.boot = 0
        self.knows_runs = seed % 4 < 3
        """Whether the destination asks for several runs at once, where the source takes that."""
        self.n_deaths = self.n_cuts = self.n_power_losses = 0
        self.is_repaid = False
        self.may: list[set[bytes]] = [{bytes(content[at : at + 512])} for at in range(0, SIZE, SECTOR_SIZE)]
        """For each sector the values that it may have after a power loss."""
        self.now: list[bytes | None] = [next(iter(one)) for one in self.may]
        """Its value; None: one of those that it may have."""
        self.connection: FaultyStream | None = None
        self.disk = self._take_over(content)

    def _take_over(self, content: bytearray) -> BorrowedDisk:
        """Some of it was sent before, and some of that is out of date."""
        if self.base is not None:
            write_header(self.overlay_store, SIZE, BaseIdentity(size=BASE_SIZE, digest=""))
        top = self._open_image()
        missing = []
        for block in self._own_blocks():
            at = block * BLOCK_SIZE
            part = content[at : at + BLOCK_SIZE]
            if self.rng.random() < 0.8:
                missing.append((block, block + 1))
                if self.base is not None and self.rng.random() < 0.5:
                    continue  # nothing of it was ever sent, and there it reads as the base
                part = bytearray(self.rng.randbytes(len(part)))
            top.pwrite(part, at)
        top.flush()
        return BorrowedDisk(top, new_map(self.store, top, missing, "boot 0"), Wants("d"))

    def _own_blocks(self) -> list[int]:
        """Return the blocks that are not the base's."""
        if not isinstance(self.origin, OverlayDisk):
            return list(range(n_blocks(SIZE)))
        runs = self.origin.allocated(0, SIZE)
        return [block for at, n in runs for block in range(at // BLOCK_SIZE, n_blocks(at + n))]

    def _open_image(self) -> Disk:
        """Open what the loan lies over, as a new process does."""
        if self.base is None:
            return self.image
        allocation = AllocationMap(self.overlay_store, SIZE, f"boot {self.boot}")
        overlay = OverlayDisk(self.image, self.base, allocation)
        allocation.begin(self.image.flush, "")
        return overlay

    def die(self) -> None:
        """The destination's process is no more, perhaps nor are its page caches; the next one may die as it opens."""
        if self.connection is not None:
            self.connection.close()
        while True:
            self.n_deaths += 1
            if self.rng.random() < 0.5:
                self.n_power_losses += 1
                self.lose_power()
            self.fate.left = self.rng.choice((None, None, 0, 1, 2, 3, 5))
            try:
                top = self._open_image()
                disk = BorrowedDisk(top, AllocationMap(self.store, SIZE, f"boot {self.boot}"), Wants("d"))
                disk._allocation.begin(top.flush, "")
            except KilledError:
                continue
            self.fate.left = None
            self.disk = disk
            return

    def lose_power(self) -> None:
        self.boot += 1
        for store in (self.image, self.store, self.overlay_store):
            store.lose_power()
        self.now = [next(iter(one)) if len(one) == 1 else None for one in self.may]

    # The guest

    def note_write(self, data: bytes, offset: int, *, is_done: bool) -> None:
        for at in range(0, len(data), SECTOR_SIZE):
            sector, value = (offset + at) // SECTOR_SIZE, data[at : at + SECTOR_SIZE]
            if is_done:
                self.may[sector].add(value)
                self.now[sector] = value
            else:  # a kill tears it at any byte
                old = [now] if (now := self.now[sector]) is not None else self.may[sector]
                self.may[sector] = {value[:n] + one[n:] for one in old for n in range(SECTOR_SIZE + 1)} | self.may[
                    sector
                ]
                self.now[sector] = None

    def check(self, data: bytes | bytearray, offset: int) -> None:
        for at in range(0, len(data), SECTOR_SIZE):
            sector, value = (offset + at) // SECTOR_SIZE, bytes(data[at : at + SECTOR_SIZE])
            known = self.now[sector]
            assert value == known if known is not None else value in self.may[sector], f"sector {sector}"
            self.now[sector] = value

    async def guest(self) -> None:
        for _ in range(N_OPERATIONS):
            await trio.sleep(self.rng.choice((0, 0.001, 0.02)))
            if self.rng.random() < 0.05:
                self.fate.left = self.rng.randrange(6)
            try:
                await self._operate()
            except KilledError:
                self.die()

    async def _operate(self) -> None:
        rng, disk = self.rng, self.disk
        grain = rng.choice((SECTOR_SIZE, BLOCK_SIZE))
        offset = rng.randrange(SIZE // grain) * grain
        length = min(SIZE - offset, rng.randrange(1, 8) * grain)
        what = rng.choice(("read", "read", "write", "write", "zero", "flush"))
        if what == "flush":
            disk.flush()
            self.may = [one if now is None else {now} for one, now in zip(self.may, self.now, strict=True)]
            return
        while disk.waits_for_peer(offset, length, is_write=what != "read"):
            wants = disk.wants
            me = object()
            first, stop = offset // BLOCK_SIZE, n_blocks(offset + length)
            wants._waiting[me] = first, stop  # as `Wants.wait` does, without blocking the only thread
            wants._wanted.append((first, stop))
            if wants._alarm is not None:
                wants._alarm()
            await trio.sleep(0.02)
            wants._waiting.pop(me, None)
            if disk is not self.disk:
                return  # it died with its daemon
        if what == "read":
            self.check(disk.pread(length, offset), offset)
            return
        data = bytes(length) if what == "zero" else rng.randbytes(length)
        try:
            disk.pwrite(data, offset) if what == "write" else disk.write_zeroes(offset, length)
        except KilledError:
            self.note_write(data, offset, is_done=False)
            raise
        self.note_write(data, offset, is_done=True)

    # The two ends

    async def dial(self) -> FaultyStream:
        await trio.sleep(0.001)
        if self.rng.random() < 0.2:
            raise ConnectionLostError("nobody answers")
        there, back = Pipe(), Pipe()
        ours = FaultyStream("destination", there, back, 50e6)
        theirs = self.connection = FaultyStream("source", back, there, 50e6)
        for stream in (ours, theirs):
            if self.rng.random() < 0.6 and self.n_cuts < 6:
                self.n_cuts += 1
                stream.flip_at = self.rng.randrange(1 << 20)
                stream.faults[self.rng.randrange(1, 30)] = self.rng.choice(KINDS)
        self.nursery.start_soon(self._borrow, theirs)
        return ours

    async def _borrow(self, stream: FaultyStream) -> None:
        disk = self.disk
        pool = BufferPool()
        link = NativeLink(stream, native.Decoder(native.FROM_SOURCE, preface=True), pool)
        try:
            lend = await link.receive()
            assert isinstance(lend, native.Lend)
            max_runs = lend.max_runs if self.knows_runs else 1
            loans = [Loan(None if self.is_repaid else disk, self._repay)]
            await Borrowing(link, loans, pool, inline, max_runs=max_runs).run()
        except KilledError:
            self.die()
        except BaseExceptionGroup as group:
            killed, rest = group.split(KilledError)
            if rest is not None:
                raise rest from None
            assert killed is not None
            self.die()
        except FusemigError:
            pass
        finally:
            stream.close()

    def _repay(self) -> None:
        if self.is_repaid:
            return
        assert not self.disk.missing_bytes
        self.disk.flush()
        self.is_repaid = True

    async def run(self) -> None:
        async with trio.open_nursery() as self.nursery:
            lending = Lending([LentDisk("d", self.origin, self.epoch_file)], self.dial, inline)
            self.nursery.start_soon(self.guest)
            with trio.fail_after(3600):
                await lending.run()
        assert self.is_repaid
        record = EpochFile(self.epoch_file.path).record
        assert record is not None
        assert record.state is Ownership.RELEASED
        self.fate.left = None
        self.check(self._open_image().pread(SIZE, 0), 0)
        self.lose_power()  # what was repaid needs the map of the loan no more
        self.check(self._open_image().pread(SIZE, 0), 0)


def _random_base(rng: random.Random) -> MemoryDisk:
    base = MemoryDisk("d", BASE_SIZE)
    base.content[:] = rng.randbytes(BASE_SIZE)
    base.content[40 * BLOCK_SIZE : 60 * BLOCK_SIZE] = bytes(20 * BLOCK_SIZE)
    return base


def _random_origin(rng: random.Random, base: MemoryDisk | None) -> Disk:
    """Return what is lent, with zeros here and there; of an overlay about half of the blocks are its own."""
    image = MemoryDisk("d", SIZE)
    origin: Disk = image
    if base is None:
        image.content[:] = rng.randbytes(SIZE)
    else:
        store = MemoryDisk("d", map_size(SIZE))
        write_header(store, SIZE, BaseIdentity(size=BASE_SIZE, digest=""))
        origin = OverlayDisk(image, base, AllocationMap(store, SIZE, "boot"))
        for _ in range(20):
            at = rng.randrange(n_blocks(SIZE)) * BLOCK_SIZE
            origin.pwrite(rng.randbytes(min(SIZE - at, rng.randrange(1, 8) * BLOCK_SIZE)), at)
    for _ in range(3):
        at = rng.randrange(n_blocks(SIZE)) * BLOCK_SIZE
        origin.write_zeroes(at, min(SIZE - at, 20 * BLOCK_SIZE))
    return origin


@pytest.fixture
def autojump_clock() -> trio.testing.MockClock:
    return trio.testing.MockClock(autojump_threshold=0)


@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.nightly) for n in range(1, 50))])
def test_everything_comes_whatever_happens(tmp_path: Path, first: int) -> None:
    """Many worlds; each of the things that can happen did."""
    n_deaths = n_cuts = n_power = 0
    for seed in range(first * N_RUNS, (first + 1) * N_RUNS):
        world = World(tmp_path, seed)
        try:
            trio.run(world.run, clock=trio.testing.MockClock(autojump_threshold=0))
        except BaseException as exc:
            exc.add_note(f"seed {seed}")
            raise
        n_deaths += world.n_deaths
        n_cuts += world.n_cuts
        n_power += world.n_power_losses
    assert n_deaths > N_RUNS / 10
    assert n_power > N_RUNS / 30
    assert n_cuts > N_RUNS / 2


@pytest.mark.parametrize("what", ["data", "zeros", "other disk", "too far"])
async def test_a_source_that_sends_something_else_is_not_believed(what: str, autojump_clock: object) -> None:
    """What was not asked for changes nothing."""
    image, store = MemoryDisk("d", SIZE), MemoryDisk("d", map_size(SIZE))
    disk = BorrowedDisk(image, new_map(store, image, [(8, 20)], "boot"), Wants("d"))
    there, back = Pipe(), Pipe()
    ours, theirs = FaultyStream("destination", there, back), FaultyStream("source", back, there)
    source = NativeLink(ours, native.Decoder(native.FROM_DESTINATION, preface=False), BufferPool())
    pool = BufferPool()
    link = NativeLink(theirs, native.Decoder(native.FROM_SOURCE, preface=False), pool)
    wrong = {
        "data": native.encode_data(0, 1, [(0, BLOCK_SIZE)], 0, BLOCK_SIZE) + bytes(BLOCK_SIZE),
        "zeros": native.encode_zero(0, 1, [(9 * BLOCK_SIZE, 11 * BLOCK_SIZE)]),
        "other disk": native.encode_zero(1, 1, [(8 * BLOCK_SIZE, 12 * BLOCK_SIZE)]),
        "too far": native.encode_zero(0, 1, [(8 * BLOCK_SIZE, SIZE)]),
    }[what]
    async with trio.open_nursery() as nursery:

        async def lie() -> None:
            assert isinstance(await source.receive(), native.Welcome)
            assert await source.receive() == native.Fetch(0, 8, 20)
            await source.send([wrong])

        nursery.start_soon(lie)
        with pytest.raises(FusemigError, match="sent"):
            await Borrowing(link, [Loan(disk, lambda: None)], pool, inline).run()
    assert list(disk.missing(0, n_blocks(SIZE))) == [(8, 20)]
    assert not any(image.content)


async def test_what_a_guest_waits_for_is_asked_for_at_once(autojump_clock: object) -> None:
    """Also while as much is asked for as may be in advance, and nothing of that comes."""
    image, store = MemoryDisk("d", SIZE), MemoryDisk("d", map_size(SIZE))
    disk = BorrowedDisk(image, new_map(store, image, [(0, 150)], "boot"), Wants("d"))
    there, back = Pipe(), Pipe()
    source = NativeLink(
        FaultyStream("destination", there, back), native.Decoder(native.FROM_DESTINATION, preface=False), BufferPool()
    )
    pool = BufferPool()
    link = NativeLink(FaultyStream("source", back, there), native.Decoder(native.FROM_SOURCE, preface=False), pool)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Borrowing(link, [Loan(disk)], pool, inline).run)
        assert isinstance(await source.receive(), native.Welcome)
        assert await source.receive() == native.Fetch(0, 0, 64)
        with trio.move_on_after(1) as scope:
            await source.receive()
        assert scope.cancelled_caught, "that was all that is asked for in advance"
        disk.wants._wanted.append((140, 144))
        assert disk.wants._alarm is not None
        disk.wants._alarm()
        assert await source.receive() == native.Fetch(0, 140, 144)
        nursery.cancel_scope.cancel()


async def test_a_long_way_is_kept_full(autojump_clock: object, tmp_path: Path) -> None:
    """How much is asked for in advance grows with the way: half a MiB for each round trip would take 3.2 s here."""
    n_bytes, bytes_per_s, delay_s = 16 << 20, 25e6, 0.05
    image, store = MemoryDisk("d", n_bytes), MemoryDisk("d", map_size(n_bytes))
    n = n_blocks(n_bytes)
    disk = BorrowedDisk(image, new_map(store, image, [(0, n)], "boot"), Wants("d"))
    epoch_file = EpochFile(tmp_path / "d.fusemig")
    epoch_file.write(EpochRecord(state=Ownership.LENDING, image_id="i", epoch=0, session="s", is_loan=True))
    pool = BufferPool()

    async def dial() -> MemoryStream:
        await trio.lowlevel.checkpoint()
        ours, network = memory_connection()
        far_network, theirs = memory_connection()
        nursery.start_soon(carry, network, far_network, bytes_per_s, delay_s)
        nursery.start_soon(carry, far_network, network, bytes_per_s, delay_s)
        nursery.start_soon(borrow, theirs)
        return ours

    async def borrow(stream: MemoryStream) -> None:
        link = NativeLink(stream, native.Decoder(native.FROM_SOURCE, preface=True), pool)
        assert isinstance(await link.receive(), native.Lend)
        await Borrowing(link, [Loan(disk)], pool, inline).run()
        stream.close()

    async with trio.open_nursery() as nursery:
        lent = MemoryDisk("d", n_bytes)
        lent.content[:] = b"x" * n_bytes
        lent.extents = lambda offset, length: iter([Extent(offset, length, is_data=True)])  # type: ignore[method-assign]
        began_at = trio.current_time()
        await Lending([LentDisk("d", lent, epoch_file)], dial, inline).run()
        took_s = trio.current_time() - began_at
        nursery.cancel_scope.cancel()
    assert not disk.missing_bytes
    assert took_s < 2.4, "on the virtual clock; the link alone takes 0.7"


async def test_answers_that_come_together_are_taken_in_together(autojump_clock: object) -> None:
    """Each is held against what was asked for in its turn."""
    image, store = MemoryDisk("d", SIZE), MemoryDisk("d", map_size(SIZE))
    disk = BorrowedDisk(image, new_map(store, image, [(8, 20), (30, 40)], "boot"), Wants("d"))
    there, back = Pipe(), Pipe()
    ours, theirs = FaultyStream("destination", there, back), FaultyStream("source", back, there)
    source = NativeLink(ours, native.Decoder(native.FROM_DESTINATION, preface=False), BufferPool())
    pool = BufferPool()
    link = NativeLink(theirs, native.Decoder(native.FROM_SOURCE, preface=False), pool)
    image.content[:] = b"\xee" * SIZE

    async def lend() -> None:
        assert isinstance(await source.receive(), native.Welcome)
        assert await source.receive() == native.Fetch(0, 8, 20)
        assert await source.receive() == native.Fetch(0, 30, 40)
        answers = [
            native.encode_zero(0, 1, [(8 * BLOCK_SIZE, 12 * BLOCK_SIZE)]),
            native.encode_zero(0, 2, [(30 * BLOCK_SIZE, 10 * BLOCK_SIZE)]),
        ]
        await source.send([b"".join(answers)])
        assert isinstance(await source.receive(), native.Whole)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lend)
        await Borrowing(link, [Loan(disk, lambda: None)], pool, inline).run()
    assert not disk.missing_bytes
    assert image.content.count(0) == 22 * BLOCK_SIZE


def test_a_store_that_fails_ends_it_and_loses_nothing() -> None:
    """A block that could not be written is missing still."""

    class Full(MemoryDisk):
        def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
            if offset >= 10 * BLOCK_SIZE:
                raise DiskError(28, "no room", offset, len(data))
            super().pwrite(data, offset)

    image, store = Full("d", SIZE), MemoryDisk("d", map_size(SIZE))
    disk = BorrowedDisk(image, new_map(store, image, [(8, 20)], "boot"), Wants("d"))
    with pytest.raises(DiskError, match="no room"):
        disk.fill(memoryview(bytearray(b"x" * 8 * BLOCK_SIZE)), 9 * BLOCK_SIZE + 3 * BLOCK_SIZE, 8 * BLOCK_SIZE)
    assert list(disk.missing(0, 30)) == [(8, 20)]
    disk.fill(memoryview(bytearray(b"x" * 2 * BLOCK_SIZE)), 8 * BLOCK_SIZE, 2 * BLOCK_SIZE)
    assert list(disk.missing(0, 30)) == [(10, 20)]


@pytest.mark.parametrize("what", ["the flush of what came", "the repaying"])
async def test_a_slow_store_does_not_cost_the_connection(what: str, autojump_clock: object) -> None:
    """The source hears that the destination lives while a store takes long, until WHOLE."""
    image, store = MemoryDisk("d", SIZE), MemoryDisk("d", map_size(SIZE))
    disk = BorrowedDisk(image, new_map(store, image, [(8, 20)], "boot"), Wants("d"))
    loan = Loan(disk, lambda: None)
    slow = loan.repay if what == "the repaying" else disk.flush
    there, back = Pipe(), Pipe()
    ours, theirs = FaultyStream("destination", there, back), FaultyStream("source", back, there)
    source = NativeLink(ours, native.Decoder(native.FROM_DESTINATION, preface=False), BufferPool())
    pool = BufferPool()
    link = NativeLink(theirs, native.Decoder(native.FROM_SOURCE, preface=False), pool)

    async def offload(function: Callable[..., object], *args: object) -> object:
        if function == slow:
            with trio.CancelScope(shield=True):  # as a thread cannot be cancelled
                await trio.sleep(200)
        return await inline(function, *args)

    async def lend() -> None:
        assert isinstance(await source.receive(), native.Welcome)
        assert await source.receive() == native.Fetch(0, 8, 20)
        with trio.move_on_after(7):  # what came is flushed from the fifth second on
            while True:
                assert await source.receive() == native.Ack(0)
        await source.send([native.encode_zero(0, 1, [(8 * BLOCK_SIZE, 12 * BLOCK_SIZE)])])
        while isinstance(event := await source.receive(), native.Ack):
            pass
        assert isinstance(event, native.Whole)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lend)
        await Borrowing(link, [loan], pool, offload).run()


async def test_a_connection_that_ends_late_leaves_the_next_one_its_alarm(autojump_clock: object) -> None:
    """The thread of a lost connection comes back when the next one has begun; that hears of what guests wait for."""
    image, store = MemoryDisk("d", SIZE), MemoryDisk("d", map_size(SIZE))
    disk = BorrowedDisk(image, new_map(store, image, [(8, 20)], "boot"), Wants("d"))
    may_return = trio.Event()

    async def late(function: Callable[..., object], *args: object) -> object:
        with trio.CancelScope(shield=True):  # as a thread cannot be cancelled
            await may_return.wait()
        return await inline(function, *args)

    async def fetch(offload: Offload, scope: trio.CancelScope) -> None:
        there, back = Pipe(), Pipe()
        pool = BufferPool()
        link = NativeLink(FaultyStream("source", back, there), native.Decoder(native.FROM_SOURCE, preface=False), pool)
        with scope:
            await Borrowing(link, [Loan(disk, lambda: None)], pool, offload).run()

    first, second = trio.CancelScope(), trio.CancelScope()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch, late, first)
        await trio.testing.wait_all_tasks_blocked()
        first.cancel()
        nursery.start_soon(fetch, inline, second)
        await trio.testing.wait_all_tasks_blocked()
        alarm = disk.wants._alarm
        may_return.set()
        await trio.testing.wait_all_tasks_blocked()
        assert disk.wants._alarm is alarm is not None
        second.cancel()
    assert disk.wants._alarm is None
