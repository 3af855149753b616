"""Disks that come back, or meet an older copy: what is sent, and what is not believed."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import trio
from msgspec.structs import replace

from fusemig.core.units import BLOCK_SIZE, CHUNK_SIZE
from fusemig.disk.dirty_map import Since
from fusemig.disk.tracked import Gate
from fusemig.errors import ConnectionLostError, DiskError, MigrationError
from fusemig.migration.delta import SourceDelta, kept_value
from fusemig.migration.resume import ResumePoint
from fusemig.records.epoch import Ownership
from support.pair import CachedDisk, Pair

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Any

    from fusemig.core.bitmap import ChunkBitmap
    from fusemig.migration.reader import OutgoingDisk
    from fusemig.wire import native

SIZES = {"a": 12 * CHUNK_SIZE + 1536, "b": 4 * CHUNK_SIZE}
TOTAL = sum(SIZES.values())


def fill(pair: Pair, seed: int = 1) -> None:
    """Give the source data, a hole and a chunk that is a hole in parts; the destination has garbage."""
    rng = random.Random(seed)
    for image in pair.source.images.values():
        image.content[:] = rng.randbytes(image.size)
        image.content[3 * CHUNK_SIZE - 4096 : 3 * CHUNK_SIZE + 50_000] = bytes(54_096)
    for image in pair.destination.images.values():
        image.content[:] = rng.randbytes(image.size)


def cut_after(pair: Pair, n_bytes: int) -> None:
    """Cut the connection when so much was sent."""
    stream = pair.streams[0]

    def cut(data: bytes) -> bytes | None:
        return None if stream.sent_bytes + len(data) > n_bytes else data

    stream.on_send = cut


async def moved(tmp_path: Path, **parameters: Any) -> Pair:
    """Return a pair whose disks have moved and whose next migration brings them back."""
    pair = Pair(tmp_path, SIZES, **parameters)
    fill(pair)
    await succeed(pair)
    pair.turn_round()
    return pair


async def succeed(pair: Pair) -> int:
    """Migrate; return how many bytes that took."""
    await pair.migrate()
    assert pair.outgoing.error is None, pair.outgoing.error
    assert pair.is_equal()
    assert pair.ownership() == ({Ownership.RELEASED}, {Ownership.OWNER})
    return pair.streams[0].sent_bytes


async def test_an_idle_disk_comes_back_for_nothing(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Nobody wrote it: nothing is read and next to nothing is sent, there and back again."""
    pair = await moved(tmp_path)
    for _ in range(3):
        assert await succeed(pair) < TOTAL // 100
        assert pair.outgoing.statistics().kept_bytes > TOTAL - 2 * CHUNK_SIZE
        assert pair.outgoing.statistics().dirtied_bytes == 0
        pair.turn_round()


async def test_what_was_written_comes_back(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Of a chunk that was written only the blocks that differ are sent, and zeros as zeros."""
    pair = await moved(tmp_path)
    disk = pair.source.disks["a"]
    disk.pwrite(b"changed", 5 * CHUNK_SIZE + 70_000)
    disk.pwrite(bytes(disk.pread(BLOCK_SIZE, 7 * CHUNK_SIZE)), 7 * CHUNK_SIZE)  # with the bytes that are there
    disk.write_zeroes(9 * CHUNK_SIZE, CHUNK_SIZE)
    disk.pwrite(b"end", disk.size - 3)
    sent = await succeed(pair)
    assert sent < 4 * BLOCK_SIZE + 40_000


async def test_garbage_where_the_source_wrote_is_overwritten(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """What the guest wrote into a hole, or discarded, is as it left it at the other end."""
    pair = await moved(tmp_path)
    disk = pair.source.disks["a"]
    disk.pwrite(b"x" * 100_000, 3 * CHUNK_SIZE - 2048)
    disk.write_zeroes(CHUNK_SIZE + 4096, 8192)
    await succeed(pair)


async def test_a_restart_of_both_keeps_the_proof(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Maps, records and stamps are what is kept beside the images, not what a daemon remembers."""
    pair = await moved(tmp_path)
    pair.source.restart(Gate.OPEN)
    pair.destination.restart(Gate.READ_ONLY)
    pair.renew()
    assert await succeed(pair) < TOTAL // 100


@pytest.mark.parametrize("is_compared", [False, True])
async def test_a_write_behind_our_back_breaks_the_proof(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, is_compared: bool
) -> None:
    """One byte at the destination: everything is sent, or compared if that was asked for."""
    pair = await moved(tmp_path, incremental=True if is_compared else None)
    pair.destination.images["a"].content[5 * CHUNK_SIZE + 12_345] ^= 1
    sent = await succeed(pair)
    assert pair.outgoing.statistics().kept_bytes > 0  # the other disk's
    if is_compared:
        assert sent < BLOCK_SIZE + 20_000
    else:
        assert sent > SIZES["a"] - CHUNK_SIZE


async def test_without_the_stamp_the_write_would_be_kept(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stamp is what finds it: with one that never changes the disks end up different."""
    monkeypatch.setattr("support.pair.Side.stamp", lambda *_: "always")
    pair = await moved(tmp_path)
    pair.destination.images["a"].content[5 * CHUNK_SIZE + 12_345] ^= 1
    await pair.migrate()
    assert pair.outgoing.error is None
    assert not pair.is_equal()


async def test_without_the_map_the_write_would_be_lost(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """The map is what finds the guest's writes."""
    pair = await moved(tmp_path)
    pair.source.disks["a"].pwrite(b"changed", 5 * CHUNK_SIZE)
    pair.source.dirty_file("a").written(Since.OWNED).clear(5)
    await pair.migrate()
    assert pair.outgoing.error is None
    assert not pair.is_equal()


@pytest.mark.parametrize("what", ["map", "session", "epoch", "image", "stamp"])
async def test_what_breaks_the_proof(tmp_path: Path, autojump_clock: trio.testing.MockClock, what: str) -> None:
    """No map, another migration, another epoch, another disk, no stamp: nothing is taken on trust."""
    pair = await moved(tmp_path)
    for name in SIZES:
        record = pair.destination.epochs[name].record
        assert record is not None
        match what:
            case "map":
                pair.source.dirty_file(name)._maps[Since.OWNED].drop()
            case "session":
                pair.destination.epochs[name].write(replace(record, session="another"))
            case "epoch":
                pair.destination.epochs[name].write(replace(record, epoch=record.epoch - 1))
            case "image":
                pair.destination.epochs[name].write(replace(record, image_id="another"))
            case "stamp":
                pair.destination.epochs[name].write(replace(record, stamp=""))
    assert await succeed(pair) > TOTAL - 3 * CHUNK_SIZE
    assert pair.outgoing.statistics().kept_bytes == 0


async def test_a_map_that_is_lost_meanwhile(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its store fails while it is asked: what it does not tell of is not left out, and the next one sends all of it."""
    pair = await moved(tmp_path)
    keeps = SourceDelta._keeps

    def lose(self: SourceDelta, disk: OutgoingDisk, since: str, bits: ChunkBitmap) -> Iterator[native.Keep | None]:
        if disk.disk.name == "a":
            disk.disk._admission.notes._drop_map(
                pair.source.dirty_file("a")._maps[Since.OWNED], DiskError(5, "the map")
            )
            disk.disk.pwrite(b"not in the map", 5 * CHUNK_SIZE)
        yield from keeps(self, disk, since, bits)

    monkeypatch.setattr(SourceDelta, "_keeps", lose)
    await pair.migrate()
    assert isinstance(pair.outgoing.error, MigrationError)
    assert "was lost just now: migrate again" in str(pair.outgoing.error)
    monkeypatch.undo()
    pair.renew()
    await succeed(pair)


async def test_everything_is_sent_on_demand(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """``--no-incremental``: a proof is not looked at."""
    pair = await moved(tmp_path, incremental=False)
    assert await succeed(pair) > TOTAL - 3 * CHUNK_SIZE


async def test_an_unrelated_copy_is_compared(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """A copy that somebody brought there by other means: blocks that are equal are not sent; garbage is replaced."""
    pair = Pair(tmp_path, SIZES, incremental=True)
    fill(pair)
    for name, image in pair.destination.images.items():
        image.content[:] = pair.source.images[name].content
    changed = pair.destination.images["a"].content
    changed[0] ^= 1
    changed[3 * CHUNK_SIZE] = 7  # where the source has a hole
    changed[6 * CHUNK_SIZE : 7 * CHUNK_SIZE] = bytes(CHUNK_SIZE)
    changed[-1] ^= 1
    assert await succeed(pair) < CHUNK_SIZE + 3 * BLOCK_SIZE + 40_000


async def test_a_copy_is_compared_as_it_is_stored(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """A page that was lost on its way to the store is in memory still, and would not be there for long."""
    pair = Pair(tmp_path, SIZES, incremental=True)
    fill(pair)
    for name, image in pair.destination.images.items():
        image.content[:] = pair.source.images[name].content
    cached = pair.destination.images["b"]
    assert isinstance(cached, CachedDisk)
    cached.lost[CHUNK_SIZE] = b"what was there before"
    assert await succeed(pair) < 2 * BLOCK_SIZE + 40_000
    cached.drop_cache()
    assert pair.is_equal()


async def test_a_return_that_is_cut_can_be_resumed(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """What was kept is in the journal of the new session; what was weighed and did not come is not."""
    pair = await moved(tmp_path)
    rng = random.Random(3)
    for chunk in range(1, 10):
        pair.source.disks["a"].pwrite(rng.randbytes(8 * BLOCK_SIZE), chunk * CHUNK_SIZE + 4 * BLOCK_SIZE)
    cut_after(pair, 150_000)
    await pair.migrate()
    assert isinstance(pair.outgoing.error, ConnectionLostError)
    pair.renew(pair.outgoing.resume_point())
    cut_after(pair, 150_000)
    await pair.migrate()
    assert isinstance(pair.outgoing.error, ConnectionLostError)
    pair.outgoing.forget()
    pair.source.restart(Gate.OPEN)
    pair.destination.restart(Gate.READ_ONLY)
    base = pair.source.dirty_file("a").base(Since.SESSION)
    assert base is not None
    pair.renew(ResumePoint(base.session))
    assert await succeed(pair) < 10 * CHUNK_SIZE


async def test_a_third_host_makes_the_copy_old(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """A to B to C to A: what A released is not what C got."""
    pair = await moved(tmp_path)
    first = pair.destination
    (tmp_path / "elsewhere").mkdir()
    third = Pair(tmp_path / "elsewhere", SIZES)
    pair.source.disks["a"].pwrite(b"on B", 0)
    pair.destination = third.destination
    pair.renew()
    await succeed(pair)
    pair.source, pair.destination = pair.destination, first
    pair.renew()
    assert await succeed(pair) > TOTAL - 3 * CHUNK_SIZE


async def test_identical_rewrites_are_not_sent(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """A chunk that is written again as it was costs a read; one that differs in a byte is sent."""
    pair = Pair(tmp_path, SIZES)
    fill(pair)
    base = await succeed(pair)
    (tmp_path / "again").mkdir()
    pair = Pair(tmp_path / "again", SIZES, pause_before_switchover=True)
    fill(pair)

    async def guest() -> None:
        while pair.outgoing.phase.value != "pre-switchover":
            await trio.sleep(0.01)
        for chunk in (1, 5, 6):
            content = bytes(pair.source.images["a"].content[chunk * CHUNK_SIZE : (chunk + 1) * CHUNK_SIZE])
            if chunk == 6:
                content = b"!" + content[1:]
            pair.source.disks["a"].pwrite(content, chunk * CHUNK_SIZE)
        await trio.sleep(1)
        pair.outgoing.proceed()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest)
        sent = await succeed(pair)
    assert pair.outgoing.statistics().unchanged_bytes == 2 * CHUNK_SIZE
    assert CHUNK_SIZE < sent - base < 2 * CHUNK_SIZE


def test_values_differ() -> None:
    """Chunks and migrations are told apart by the values of what is kept."""
    values = {kept_value(session, chunk) for session in ("a", "b") for chunk in range(100)}
    assert len(values) == 200
    assert 0 not in values
