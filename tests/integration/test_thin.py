"""Overlays over the same base: only what lies above it is sent."""

from __future__ import annotations

import errno
import random
from typing import TYPE_CHECKING

import pytest
import trio

from fusemig.core.phase import MigrationPhase
from fusemig.core.units import BLOCK_SIZE, CHUNK_SIZE
from fusemig.disk.memory import MemoryDisk
from fusemig.disk.tracked import Gate, TrackedDisk
from fusemig.errors import ConnectionLostError, DiskError, MigrationError, PeerRefusedError
from fusemig.records.epoch import Ownership
from support.overlays import lay_over
from support.pair import Pair

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import Any

    from fusemig.migration.fetch_plan import Loan
    from fusemig.wire.native import AskedDisk

SIZE = 12 * CHUNK_SIZE + 1536
BASE_SIZE = 10 * CHUNK_SIZE
BASE = random.Random(1).randbytes(BASE_SIZE)


class Over:
    """A pair of overlays over one base, with a guest that has written a little at the source."""

    def __init__(self, tmp_path: Path, **parameters: Any) -> None:
        self.pair = Pair(tmp_path, {"a": SIZE}, **parameters)
        self.there = lay_over(self.pair.destination, BASE, SIZE, Gate.READ_ONLY)
        self.here = lay_over(self.pair.source, BASE, SIZE, Gate.OPEN)
        self.pair.renew()
        self.write(random.Random(2))

    def write(self, rng: random.Random) -> None:
        """Write blocks, a part of a block, zeros over the base and beyond its end."""
        disk = self.pair.source.disks["a"]
        disk.pwrite(rng.randbytes(3 * BLOCK_SIZE), 2 * CHUNK_SIZE + 5 * BLOCK_SIZE)
        disk.pwrite(b"part", 4 * CHUNK_SIZE + 77)
        disk.write_zeroes(6 * CHUNK_SIZE + BLOCK_SIZE, 8 * BLOCK_SIZE)
        disk.pwrite(b"beyond", 11 * CHUNK_SIZE)
        disk.pwrite(b"end", SIZE - 3)

    async def succeed(self) -> int:
        """Migrate; return how many bytes that took, over the last connection where there were two."""
        pair = self.pair
        await pair.migrate()
        assert pair.outgoing.error is None, pair.outgoing.error
        assert self.here.pread(SIZE, 0) == self.there.pread(SIZE, 0)
        assert pair.ownership() == ({Ownership.RELEASED}, {Ownership.OWNER})
        return pair.streams[0].sent_bytes


async def test_only_what_lies_above_is_sent(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """A few blocks, whatever the overlay there held before; it then holds the same blocks."""
    over = Over(tmp_path)
    over.there.pwrite(b"old" * 5000, 8 * CHUNK_SIZE)
    assert await over.succeed() < 6 * BLOCK_SIZE + 10_000
    assert list(over.there.allocated(0, SIZE)) == list(over.here.allocated(0, SIZE))
    assert not over.there.image.pread(8 * BLOCK_SIZE, 6 * CHUNK_SIZE + BLOCK_SIZE).strip(b"\0")


async def test_a_guest_writes_meanwhile(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Blocks that become the overlay's during the migration follow in the passes."""
    over = Over(tmp_path, pause_before_switchover=True)

    async def guest() -> None:
        while over.pair.outgoing.phase.value != "pre-switchover":
            await trio.sleep(0.01)
        for at in range(0, SIZE - BLOCK_SIZE, CHUNK_SIZE):
            over.pair.source.disks["a"].pwrite(b"later", at + 7)
        over.pair.source.disks["a"].write_zeroes(0, 2 * CHUNK_SIZE)
        await trio.sleep(1)
        over.pair.outgoing.proceed()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest)
        assert await over.succeed() < 20 * BLOCK_SIZE + 20_000
    assert list(over.there.allocated(0, SIZE)) == list(over.here.allocated(0, SIZE))


async def test_it_comes_back(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Over a base and with a proof: what was written since, and nothing else."""
    over = Over(tmp_path)
    await over.succeed()
    over.pair.turn_round()
    assert await over.succeed() < 4000
    over.pair.turn_round()
    over.write(random.Random(3))
    assert await over.succeed() < 12 * BLOCK_SIZE + 10_000


async def test_an_old_overlay_is_compared(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Blocks that it holds and the source has from the base read as the base afterwards."""
    over = Over(tmp_path, incremental=True)
    over.there.pwrite(b"old" * 5000, 8 * CHUNK_SIZE)
    over.there.pwrite(over.here.pread(3 * BLOCK_SIZE, 2 * CHUNK_SIZE + 5 * BLOCK_SIZE), 2 * CHUNK_SIZE + 5 * BLOCK_SIZE)
    assert await over.succeed() < 3 * BLOCK_SIZE + 20_000


@pytest.mark.parametrize("is_restarted", [False, True])
async def test_a_cut_migration_is_gone_on_with(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, is_restarted: bool
) -> None:
    over = Over(tmp_path)
    rng = random.Random(5)
    for chunk in range(9):
        over.pair.source.disks["a"].pwrite(rng.randbytes(CHUNK_SIZE // 2), chunk * CHUNK_SIZE + 8192)
    stream = over.pair.streams[0]
    stream.on_send = lambda data: None if stream.sent_bytes + len(data) > 2 * CHUNK_SIZE else data
    await over.pair.migrate()
    assert isinstance(over.pair.outgoing.error, ConnectionLostError)
    over.pair.source.disks["a"].pwrite(b"in between", 5 * CHUNK_SIZE + 100)
    if is_restarted:
        over.pair.destination.restart(Gate.READ_ONLY)
    over.pair.renew(over.pair.outgoing.resume_point())
    # A chunk that is sent again is sent as a whole, its base's blocks too, and there are seven.
    assert await over.succeed() < 7 * CHUNK_SIZE + 20_000


async def test_no_base_there(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """The disk goes as a whole; where the base was a must, it does not go."""
    over = Over(tmp_path, incremental=True)
    pair = over.pair
    pair.destination.images["a"] = image = MemoryDisk("a", SIZE)
    pair.destination.disks["a"] = TrackedDisk(image, gate=Gate.READ_ONLY)
    await pair.migrate()
    error = pair.outgoing.error
    assert isinstance(error, PeerRefusedError)
    assert "has no base" in str(error)
    assert pair.gates() == ({Gate.OPEN}, {Gate.READ_ONLY})
    pair.parameters.incremental = None
    pair.renew()
    await pair.migrate()
    assert pair.outgoing.error is None
    assert image.content == over.here.pread(SIZE, 0)


async def test_everything_on_demand(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """``--no-incremental`` sends the base's data too, and the overlay there holds all of it."""
    over = Over(tmp_path, incremental=False)
    assert await over.succeed() > BASE_SIZE - CHUNK_SIZE
    assert over.there.allocated_bytes >= SIZE


@pytest.mark.parametrize("incremental", [None, False], ids=["thin", "as a whole"])
async def test_the_rest_is_fetched(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, incremental: bool | None
) -> None:
    """Post-copy: what lies above the base and nothing else, whatever the overlay there held before."""
    over = Over(tmp_path, incremental=incremental, is_postcopy=True)
    over.there.pwrite(b"old" * 5000, 8 * CHUNK_SIZE)
    over.there.pwrite(b"older", 2 * CHUNK_SIZE + 6 * BLOCK_SIZE)
    n_bytes = await over.succeed()
    if incremental is None:
        assert 4 * BLOCK_SIZE < n_bytes < 6 * BLOCK_SIZE + 10_000
        assert list(over.there.allocated(0, SIZE)) == list(over.here.allocated(0, SIZE))
    else:
        assert n_bytes > BASE_SIZE - CHUNK_SIZE
        assert over.there.allocated_bytes >= SIZE
    assert not over.there.image.pread(8 * BLOCK_SIZE, 6 * CHUNK_SIZE + BLOCK_SIZE).strip(b"\0")
    assert not over.pair.destination.borrowed


async def test_a_guest_is_there_before_the_rest(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Nothing of the base is waited for, nor a write of whole missing blocks; a write that cuts one is."""
    over = Over(tmp_path, is_postcopy=True)
    pair = over.pair
    expected = bytearray(over.here.pread(SIZE, 0))
    missing = 2 * CHUNK_SIZE + 5 * BLOCK_SIZE

    def write(data: bytes, offset: int) -> None:
        assert not there.waits_for_peer(offset, len(data), is_write=True)
        there.pwrite(data, offset)
        expected[offset : offset + len(data)] = data

    there = pair.destination.disks["a"]
    was_there = False
    lend_out = pair.destination.loans

    def loans(session: str, lent: Sequence[AskedDisk], scope: trio.CancelScope) -> list[Loan]:
        nonlocal was_there
        was_there = True
        assert there.gate is Gate.OPEN
        for offset in (CHUNK_SIZE + 5, 4 * CHUNK_SIZE + BLOCK_SIZE, 10 * CHUNK_SIZE + 8):  # the base's, and nobody's
            assert not there.waits_for_peer(offset, 10, is_write=False)
            assert there.pread(10, offset) == expected[offset : offset + 10]
            write(b"new", offset)
        assert there.waits_for_peer(missing, 1, is_write=False)
        assert there.waits_for_peer(missing + 7, 10, is_write=True)
        write(b"w" * BLOCK_SIZE, missing)
        write(b"cut", missing + 7)
        return lend_out(session, lent, scope)

    pair.destination.loans = loans  # type: ignore[method-assign]
    await pair.migrate()
    assert pair.outgoing.error is None, pair.outgoing.error
    assert was_there
    assert pair.streams[0].sent_bytes < 6 * BLOCK_SIZE + 10_000
    assert over.there.pread(SIZE, 0) == expected
    assert pair.ownership() == ({Ownership.RELEASED}, {Ownership.OWNER})


@pytest.mark.parametrize("is_postcopy", [False, True])
@pytest.mark.parametrize("is_right", [False, True])
async def test_a_base_is_not_offered_before_it_is_read(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, is_right: bool, is_postcopy: bool
) -> None:
    """Guests read one that was written under a predecessor; the destination's may be another, and no digest tells."""
    over = Over(tmp_path, is_postcopy=is_postcopy)
    outgoing, here = over.pair.outgoing, over.here
    here.is_base_proved = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(over.pair.migrate)
        await trio.sleep(1)
        assert outgoing.phase is MigrationPhase.SETUP
        assert "base of disk 'a'" in outgoing.statistics().waiting
        assert not over.pair.streams[0].sent_bytes
        if is_right:
            here.is_base_proved = True
        else:
            here.distrust(DiskError(errno.EIO, "its contents differ", 0, 1))
    assert not outgoing.statistics().waiting
    if is_right:
        assert outgoing.error is None
        assert over.pair.ownership() == ({Ownership.RELEASED}, {Ownership.OWNER})
    else:
        assert isinstance(outgoing.error, MigrationError)
        assert "its contents differ" in str(outgoing.error)
        assert over.pair.gates() == ({Gate.OPEN}, {Gate.READ_ONLY})


async def test_a_base_that_is_not_offered_is_not_waited_for(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """With ``--no-incremental`` what guests read is sent, whatever it is."""
    over = Over(tmp_path, incremental=False)
    over.here.is_base_proved = False
    assert await over.succeed() > BASE_SIZE - CHUNK_SIZE


async def test_a_migration_that_waits_for_a_base_can_be_cancelled(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Before it has connected to anybody."""
    over = Over(tmp_path)
    over.here.is_base_proved = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(over.pair.outgoing.run)
        await trio.sleep(1)
        over.pair.outgoing.cancel()
        await over.pair.outgoing.wait_over()
    assert over.pair.outgoing.phase is MigrationPhase.CANCELLED
    assert over.pair.gates() == ({Gate.OPEN}, {Gate.READ_ONLY})
