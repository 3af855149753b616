"""A migration that was interrupted and goes on: what is sent again, and what is not believed."""

from __future__ import annotations

import random
import struct
from typing import TYPE_CHECKING

import pytest
import trio

from fusemig.core.phase import MigrationPhase as Phase
from fusemig.core.units import CHUNK_SIZE
from fusemig.disk.dirty_map import Since
from fusemig.disk.tracked import Gate
from fusemig.errors import ConnectError, ConnectionLostError, PeerRefusedError
from fusemig.migration.reconnection import MAX_LOST_SWITCHOVERS
from fusemig.migration.resume import ResumePoint
from fusemig.records.epoch import EpochRecord, Ownership
from fusemig.wire.native import MAGIC, FrameType
from support.pair import CachedDisk, Pair
from support.streams import memory_connection

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.streams import MemoryStream

SIZES = {"a": 12 * CHUNK_SIZE + 1536, "b": 8 * CHUNK_SIZE}
TOTAL = sum(SIZES.values())


def fill(pair: Pair, seed: int = 1) -> None:
    """Give the source data, holes and a chunk that is a hole in parts; the destination has garbage."""
    rng = random.Random(seed)
    for image in pair.source.images.values():
        image.content[:] = rng.randbytes(image.size)
        image.content[3 * CHUNK_SIZE : 4 * CHUNK_SIZE + 50_000] = bytes(CHUNK_SIZE + 50_000)
    for image in pair.destination.images.values():
        image.content[:] = rng.randbytes(image.size)


def cut_after(stream: MemoryStream, n_bytes: int) -> None:
    """Cut the connection when so much was sent."""

    def cut(data: bytes) -> bytes | None:
        return None if stream.sent_bytes + len(data) > n_bytes else data

    stream.on_send = cut


def write(pair: Pair, rng: random.Random, n: int = 3) -> int:
    """Have the guest write blocks here and there; return how many bytes of chunks that touches at most."""
    for _ in range(n):
        name = rng.choice(list(pair.source.disks))
        disk = pair.source.disks[name]
        disk.pwrite(rng.randbytes(4096), rng.randrange(disk.size - 4096))
    return 2 * n * CHUNK_SIZE


async def interrupt(pair: Pair, n_bytes: int = 14 * CHUNK_SIZE) -> None:
    """Have a migration lose its connection after so many bytes."""
    cut_after(pair.streams[0], n_bytes)
    outgoing = await pair.migrate()
    assert isinstance(outgoing.error, ConnectionLostError)
    assert outgoing.phase is Phase.FAILED


def map_point(pair: Pair) -> ResumePoint:
    """Return what a restarted source knows of its last migration."""
    sessions = set()
    for name in pair.source.disks:
        base = pair.source.dirty_file(name).base(Since.SESSION)
        assert base is not None
        sessions.add(base.session)
    (session,) = sessions
    return ResumePoint(session)


async def resume(pair: Pair, point: ResumePoint | None, at_most: int) -> None:
    """Go on, and see that it completes with equal disks and few bytes on the wire."""
    assert point is not None
    pair.renew(point)
    await pair.migrate()
    assert pair.outgoing.error is None
    assert pair.is_equal()
    assert pair.ownership() == ({Ownership.RELEASED}, {Ownership.OWNER})
    assert pair.streams[0].sent_bytes < at_most + CHUNK_SIZE // 2
    assert pair.outgoing.statistics().kept_bytes > 0


@pytest.mark.parametrize("is_destination_restarted", [False, True])
async def test_what_has_arrived_is_not_sent_again(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, is_destination_restarted: bool
) -> None:
    """A source that lives sends what is missing and what was written since, also to a restarted destination."""
    pair = Pair(tmp_path, SIZES)
    fill(pair)
    await interrupt(pair)
    written = write(pair, random.Random(2))
    if is_destination_restarted:
        pair.destination.restart(Gate.READ_ONLY)
    await resume(pair, pair.outgoing.resume_point(), TOTAL - 13 * CHUNK_SIZE + written)


async def test_a_restarted_source_goes_on_by_its_map(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """What no guest wrote since the session began, before and after the restart, is not sent again."""
    pair = Pair(tmp_path, SIZES)
    fill(pair)
    await interrupt(pair)
    written = write(pair, random.Random(2))
    pair.outgoing.forget()
    pair.source.restart(Gate.OPEN)
    written += write(pair, random.Random(3))
    await resume(pair, map_point(pair), TOTAL - 13 * CHUNK_SIZE + written)


async def test_a_written_chunk_is_sent_again_by_the_map(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """A write between the interruption and the restart would be lost without the map; a map without it shows so."""
    pair = Pair(tmp_path, {"a": SIZES["a"]})
    fill(pair)
    await interrupt(pair, 9 * CHUNK_SIZE)
    pair.source.disks["a"].pwrite(b"written", 0)
    pair.source.restart(Gate.OPEN)
    pair.source.dirty_file("a").written(Since.SESSION).clear(0)
    pair.renew(map_point(pair))
    await pair.migrate()
    assert not pair.is_equal()


async def test_without_a_map_contents_are_compared(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """A restarted source that knows nothing sends what differs, and no more."""
    pair = Pair(tmp_path, SIZES)
    fill(pair)
    await interrupt(pair)
    written = write(pair, random.Random(2))
    pair.outgoing.forget()
    pair.source.restart(Gate.OPEN)
    await resume(pair, ResumePoint("another session"), TOTAL - 13 * CHUNK_SIZE + written)


async def test_what_only_a_cache_holds_is_not_taken_for_there(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """A page whose writing failed stays in memory, over a restart too: contents are compared with what is stored."""
    pair = Pair(tmp_path, SIZES)
    fill(pair)
    await interrupt(pair)
    pair.outgoing.forget()
    pair.source.restart(Gate.OPEN)
    pair.destination.restart(Gate.READ_ONLY)
    image = pair.destination.images["a"]
    assert isinstance(image, CachedDisk)
    image.lost[2 * CHUNK_SIZE] = b"what was there before"
    await resume(pair, ResumePoint("another session"), TOTAL - 12 * CHUNK_SIZE)
    image.drop_cache()
    assert pair.is_equal()


async def test_a_damaged_frame_is_sent_again(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """One flipped bit costs a connection: the migration goes on over another one by itself, with what is not there."""
    pair = Pair(tmp_path, SIZES, reconnect_limit_s=20.0)
    fill(pair)
    n_damaged = 0

    def flip(data: bytes) -> bytes:
        nonlocal n_damaged
        if len(data) == CHUNK_SIZE and pair.streams[0].sent_bytes > 5 * CHUNK_SIZE and not n_damaged:
            n_damaged += 1
            return bytes([data[0] ^ 1]) + data[1:]
        return data

    pair.streams[0].on_send = flip
    await migrate_over_new_connections(pair)
    assert n_damaged == 1
    assert pair.outgoing.error is None
    assert pair.is_equal()
    assert pair.outgoing.statistics().n_reconnects == 1


async def test_a_link_that_damages_everything_is_given_up(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """The twin: without progress it ends, with what was wrong."""
    pair = Pair(tmp_path, SIZES, reconnect_limit_s=20.0)
    fill(pair)
    await migrate_over_new_connections(pair, lambda data: data if len(data) < CHUNK_SIZE else data[:-1] + b"?")
    assert pair.outgoing.phase is Phase.FAILED
    assert "it was damaged on the way; for 20 s nothing could be sent" in str(pair.outgoing.error)
    assert pair.gates() == ({Gate.OPEN}, {Gate.READ_ONLY})


async def migrate_over_new_connections(pair: Pair, on_send: Callable[[bytes], bytes] | None = None) -> None:
    """Run both ends, with a new connection for each try after the first."""
    n_tries = 0

    async with trio.open_nursery() as nursery:

        async def connect() -> MemoryStream:
            nonlocal n_tries
            await trio.lowlevel.checkpoint()
            n_tries += 1
            if n_tries > 1:
                pair.streams = memory_connection()
            if on_send is not None:
                pair.streams[0].on_send = on_send
            nursery.start_soon(pair._receive)
            return pair.streams[0]

        pair.outgoing._connect = connect
        await pair.outgoing.run()


async def test_a_damaged_journal_is_not_believed(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """A flipped bit of an entry costs its chunks, one of the header makes both sides compare; all arrives."""
    for at, most in ((8192 + 20, TOTAL), (10, TOTAL - 13 * CHUNK_SIZE)):
        (tmp_path / str(at)).mkdir()
        pair = Pair(tmp_path / str(at), SIZES)
        fill(pair)
        await interrupt(pair)
        for store in pair.destination.journals.values():
            store.content[at] ^= 4  # type: ignore[attr-defined]
        point = pair.outgoing.resume_point()
        assert point is not None
        pair.renew(point)
        await pair.migrate()
        assert pair.outgoing.error is None
        assert pair.is_equal()
        assert pair.streams[0].sent_bytes < most + CHUNK_SIZE // 2


async def test_an_entry_that_is_not_the_last_frame_is_not_believed(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Contents that go A, B, A: the journal says A, and a power loss left the image with B, the last A being lost."""
    pair = Pair(tmp_path, {"a": SIZES["a"]}, pause_before_switchover=True)
    fill(pair)
    first = bytes(pair.source.images["a"].content[:CHUNK_SIZE])
    snapshots: list[bytes] = []

    async def guest() -> None:
        while pair.outgoing.phase is not Phase.PRE_SWITCHOVER:
            await trio.sleep(0.01)
        await trio.sleep(6)
        pair.source.disks["a"].pwrite(bytes(reversed(first)), 0)
        await trio.sleep(0.5)
        assert pair.destination.images["a"].content[:CHUNK_SIZE] == bytes(reversed(first))
        snapshots.append(bytes(pair.destination.journals["a"].content))  # type: ignore[attr-defined]
        pair.source.disks["a"].pwrite(first, 0)
        await trio.sleep(0.5)
        assert pair.destination.images["a"].content[:CHUNK_SIZE] == first
        cut_after(pair.streams[0], 0)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest)
        await pair.migrate()
    pair.destination.journals["a"].content[:] = snapshots[0]  # type: ignore[attr-defined]
    pair.destination.images["a"].content[:CHUNK_SIZE] = bytes(reversed(first))
    pair.destination.restart(Gate.READ_ONLY)
    pair.parameters.pause_before_switchover = False
    point = pair.outgoing.resume_point()
    assert point is not None
    pair.renew(point)
    await pair.migrate()
    assert pair.outgoing.error is None
    assert pair.is_equal()


async def test_another_image_is_refused(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Nothing of another image, or of another epoch, is taken for a part of this one."""
    pair = Pair(tmp_path, {"a": SIZES["a"]})
    fill(pair)
    await interrupt(pair, 4 * CHUNK_SIZE)
    file = pair.destination.epochs["a"]
    assert file.record is not None
    for image_id, epoch in (("another", file.record.epoch), (file.record.image_id, file.record.epoch + 1)):
        file.write(EpochRecord(state=Ownership.INCOMING, image_id=image_id, epoch=epoch))
        point = pair.outgoing.resume_point()
        pair.renew(point)
        await pair.migrate()
        assert isinstance(pair.outgoing.error, PeerRefusedError)
    assert pair.gates()[0] == {Gate.OPEN}


class FlakyLink(Pair):
    """A pair whose connection is cut again and again, and made again by the source itself."""

    def __init__(self, directory: Path, cuts: list[int], **parameters: object) -> None:
        super().__init__(directory, SIZES, reconnect_limit_s=60.0, **parameters)
        self.cuts = cuts
        self.n_connections = 0
        self.sent_bytes = 0
        self.outgoing._connect = self._connect
        self.nursery: trio.Nursery | None = None

    async def _connect(self) -> MemoryStream:
        await trio.lowlevel.checkpoint()
        self.n_connections += 1
        self.sent_bytes += self.streams[0].sent_bytes
        self.streams = memory_connection()
        if self.cuts:
            cut_after(self.streams[0], self.cuts.pop(0))
        assert self.nursery is not None
        self.nursery.start_soon(self._receive)
        return self.streams[0]

    async def run(self) -> None:
        async with trio.open_nursery() as self.nursery:
            await self.outgoing.run()
        self.sent_bytes += self.streams[0].sent_bytes


class LostAt(FlakyLink):
    """A link of which each connection is lost with a frame that one side sends."""

    def __init__(self, directory: Path, frames: list[FrameType]) -> None:
        super().__init__(directory, [])
        self.frames = frames

    async def _connect(self) -> MemoryStream:
        await super()._connect()
        if self.frames:
            frame = self.frames.pop(0)

            def cut(data: bytes) -> bytes | None:
                return None if data[:3] == struct.pack(">HB", MAGIC, frame) else data

            for stream in self.streams:
                stream.on_send = cut
        return self.streams[0]


@pytest.mark.parametrize(
    "frames",
    [
        [FrameType.FINAL],
        [FrameType.PREPARED],
        [FrameType.PREPARED, FrameType.FINAL, FrameType.PREPARED],
        [FrameType.HELLO],
        [FrameType.WELCOME, FrameType.HELLO],
        [FrameType.DATA, FrameType.HELLO, FrameType.WELCOME, FrameType.HAVE, FrameType.FINAL],
        [FrameType.SYNCED, FrameType.PREPARED],
    ],
    ids=lambda frames: "-".join(frame.name.lower() for frame in frames),
)
async def test_lost_before_anything_was_sent_and_in_the_switchover(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, frames: list[FrameType]
) -> None:
    """Both are taken up again like the passes are: the guests run on between, and what they write then is moved."""
    n_lost = len(frames)
    pair = LostAt(tmp_path, frames)
    fill(pair)

    async def guest() -> None:
        rng, n_seen = random.Random(3), 0
        while not pair.outgoing.is_over:
            if pair.n_connections > n_seen and pair.gates()[0] == {Gate.OPEN}:
                n_seen = pair.n_connections
                write(pair, rng)
            await trio.sleep(0.02)
        assert n_seen >= n_lost  # the last connection may be over before the guest writes again

    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest)
        await pair.run()
    assert pair.outgoing.error is None
    assert pair.is_equal()
    assert pair.ownership() == ({Ownership.RELEASED}, {Ownership.OWNER})
    assert pair.gates() == ({Gate.READ_ONLY}, {Gate.OPEN})


async def test_a_switchover_is_not_lost_for_ever(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Each costs the guests a pause: after a few the migration fails, and they go on."""
    pair = LostAt(tmp_path, [FrameType.FINAL] * 99)
    fill(pair)
    await pair.run()
    assert isinstance(pair.outgoing.error, ConnectionLostError)
    assert pair.n_connections == MAX_LOST_SWITCHOVERS + 1
    assert pair.phases.count(Phase.FROZEN) == MAX_LOST_SWITCHOVERS + 1
    assert pair.gates() == ({Gate.OPEN}, {Gate.READ_ONLY})
    assert pair.ownership()[0] == {Ownership.OWNER}


@pytest.mark.parametrize("frame", [FrameType.FINAL, FrameType.HELLO])
async def test_without_a_limit_it_is_lost_at_once(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, frame: FrameType
) -> None:
    """The twin: whoever does not ask for it is told of the first loss."""
    pair = LostAt(tmp_path, [frame])
    pair.parameters.reconnect_limit_s = 0.0
    fill(pair)
    await pair.run()
    assert isinstance(pair.outgoing.error, ConnectionLostError)
    assert pair.n_connections == 1
    assert pair.gates() == ({Gate.OPEN}, {Gate.READ_ONLY})


async def test_where_nobody_ever_was_is_told_at_once(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """A wrong address is no lost connection."""
    pair = FlakyLink(tmp_path, [])

    async def refuse() -> MemoryStream:
        pair.n_connections += 1
        raise ConnectError("nobody listens there")

    pair.outgoing._connect = refuse
    await pair.run()
    assert isinstance(pair.outgoing.error, ConnectError)
    assert pair.n_connections == 1


@pytest.mark.parametrize("seed", range(6))
async def test_a_lost_connection_is_made_again(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, seed: int
) -> None:
    """Cut at any place, any number of times: what was sent before is not sent again, and guests notice nothing."""
    rng = random.Random(seed)
    cuts = [rng.randrange(1 << 20, 8 << 20) for _ in range(4)]
    pair = FlakyLink(tmp_path, list(cuts), pause_before_switchover=True)
    fill(pair)
    written = 0

    async def guest() -> None:
        nonlocal written
        for _ in range(20):
            written += write(pair, rng, 1)
            await trio.sleep(rng.random())
        while pair.outgoing.phase is not Phase.PRE_SWITCHOVER:
            await trio.sleep(0.01)
        pair.outgoing.proceed()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest)
        await pair.run()
    assert pair.outgoing.error is None
    assert pair.outgoing.phase is Phase.COMPLETED
    assert pair.is_equal()
    statistics = pair.outgoing.statistics()
    assert statistics.n_reconnects == pair.n_connections - 1 >= 3
    assert not statistics.waiting
    # A chunk is lost with each cut, and what guests wrote into chunks that had not arrived is sent with them.
    assert pair.sent_bytes < TOTAL + written + 5 * 2 * CHUNK_SIZE
    assert statistics.wire_bytes <= pair.sent_bytes


async def test_without_progress_a_source_gives_up(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """The limit counts from the last progress; what is told says how to go on."""
    pair = FlakyLink(tmp_path, [6 * CHUNK_SIZE] + [0] * 1000)
    fill(pair)
    begun = trio.current_time()
    await pair.run()
    assert isinstance(pair.outgoing.error, ConnectionLostError)
    assert "--resume" in str(pair.outgoing.error)
    assert pair.outgoing.phase is Phase.FAILED
    assert 40 < trio.current_time() - begun < 120
    assert pair.gates() == ({Gate.OPEN}, {Gate.READ_ONLY})
    assert pair.outgoing.resume_point() is not None


async def test_a_source_that_waits_can_be_cancelled(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """While there is no connection, status says so and a cancel works at once."""
    pair = FlakyLink(tmp_path, [6 * CHUNK_SIZE] + [0] * 1000)
    fill(pair)

    async def canceller() -> None:
        while not pair.outgoing.statistics().waiting:
            await trio.sleep(0.01)
        pair.outgoing.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(canceller)
        await pair.run()
    assert pair.outgoing.phase is Phase.CANCELLED
    assert pair.outgoing.resume_point() is None
