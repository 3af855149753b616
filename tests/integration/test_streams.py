"""Migrations over several connections in memory, where each can be slow, lost or somebody else's; and the two streams.

The simulation (`tests/property/test_migration_simulation.py`) draws its faults from seeds; here are those with names.
"""

from __future__ import annotations

import random
import socket
import threading
from contextlib import suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import trio

from fusemig.core.phase import MigrationPhase as P
from fusemig.core.units import CHUNK_SIZE
from fusemig.disk.memory import MemoryDisk
from fusemig.errors import ConnectionLostError, PeerRefusedError, RemoteProtocolError
from fusemig.migration.borrow import Borrowing
from fusemig.migration.bundle import JoinedStream, SplitStream
from fusemig.migration.incoming import AwaitedDisk
from fusemig.migration.joining import Gatherings
from fusemig.migration.lend import Lending, LentDisk
from fusemig.migration.link import BufferPool, NativeLink, Need
from fusemig.migration.qemu_receiver import QemuReceiver
from fusemig.migration.receiver import FrameReceiver
from fusemig.migration.writer import FrameWriter
from fusemig.net.transport import SocketStream
from fusemig.records.epoch import EpochRecord, Ownership
from fusemig.wire import native, qemu_block, savevm
from fusemig.wire.native.stripes import STRIPE_BYTES, StripeOrder, encode_stripe
from support.streams import memory_connection
from support.world import run

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from fusemig.net.transport import ByteStream
    from support.faults import FaultyStream
    from support.streams import MemoryStream
    from support.world import World


async def migrate(world: World, n_streams: int) -> None:
    """Migrate a busy disk over connections of very different speed."""
    rng = random.Random(5)
    world.parameters.streams = n_streams

    def differ(here: FaultyStream, there: FaultyStream) -> None:
        here.slow_down(rng.choice([3e5, 3e6, 3e7]))
        longest_s = rng.choice([0.0005, 0.05])
        there.lag = lambda: rng.random() * longest_s

    world.on_further = differ
    world.fill(rng)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.guest, rng, 0.002)
        await world.migrate()
        nursery.cancel_scope.cancel()
    assert world.outgoing.statistics().n_streams == min(n_streams, native.MAX_STREAMS)


@pytest.mark.parametrize("mirrors", [False, True])
def test_equal_over_connections_of_unequal_speed(tmp_path: Path, *, mirrors: bool) -> None:
    """The destination has every acknowledged byte, and each connection carried a part of them."""

    async def main(world: World) -> None:
        world.parameters.mirrors = mirrors
        await migrate(world, 4)

    world = run(main, tmp_path / "world")
    assert world.outgoing.phase is P.COMPLETED
    world.check_outcome()
    assert len(world.further) == 3
    assert all(here.sent_bytes > 64 << 10 for here, _ in world.further)


def test_without_the_order_nothing_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin of the test above: pieces that are put together as they come fail the migration, and nobody is hurt."""
    note_head = StripeOrder.note_head

    def note_any(order: StripeOrder, stream: int, head: bytes) -> None:
        length = int.from_bytes(head[4:8], "big")
        note_head(order, stream, encode_stripe(order.due, length) if order.turn is None else head)

    monkeypatch.setattr(StripeOrder, "note_head", note_any)

    async def main(world: World) -> None:
        await migrate(world, 4)

    world = run(main, tmp_path / "world")
    assert world.outgoing.phase is P.FAILED
    world.check_outcome()


def test_a_destination_that_takes_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of an older version: it goes on with one, and says so."""
    monkeypatch.setattr(native, "MAX_STREAMS", 1)

    async def main(world: World) -> None:
        await migrate(world, 4)

    world = run(main, tmp_path / "world")
    assert world.outgoing.phase is P.COMPLETED
    assert not world.further


def test_a_connection_that_falls_silent(tmp_path: Path) -> None:
    """Nobody waits for its piece for ever: the migration ends as over a single connection that falls silent."""

    def silence(here: FaultyStream, _there: FaultyStream) -> None:
        here.faults[4], here.stall_s = "stall", None

    async def main(world: World) -> None:
        world.parameters.streams = 2
        world.fill(random.Random(1))
        world.on_further = silence
        await world.migrate()

    world = run(main, tmp_path / "world")
    assert world.outgoing.phase is P.FAILED
    world.check_outcome()


def test_a_place_is_given_once() -> None:
    """To whoever has the token, while the migration waits; the rest is refused."""
    gatherings = Gatherings()
    gathering = gatherings.begin("5e55", 3)
    stream = memory_connection()[1]
    for session, token in (("5e55", ""), ("5e55", gathering.token[:-1]), ("0the4", gathering.token)):
        with pytest.raises(PeerRefusedError, match="no migration waits"):
            gatherings.find(native.Join(session, token, 1))
    for place in (0, 3):
        with pytest.raises(PeerRefusedError, match=f"place {place} of 3 is not free"):
            gathering.join(native.Join("5e55", gathering.token, place), stream)
    join = native.Join("5e55", gathering.token, 1)
    gatherings.find(join).join(join, stream)
    with pytest.raises(PeerRefusedError, match="place 1 of 3 is not free"):
        gatherings.find(join).join(join, stream)
    gatherings.end(gathering)
    with pytest.raises(PeerRefusedError, match="no migration waits"):
        gatherings.find(join)


def test_two_attempts_of_one_migration_take_nothing_from_each_other() -> None:
    """A later one, or anybody who names the same session, keeps no connection from its place; each finds its own."""
    gatherings = Gatherings()
    first, later = gatherings.begin("5e55", 2), gatherings.begin("5e55", 2)
    for gathering in (first, later):
        assert gatherings.find(native.Join("5e55", gathering.token, 1)) is gathering
    gatherings.end(first)
    with pytest.raises(PeerRefusedError, match="no migration waits"):
        gatherings.find(native.Join("5e55", first.token, 1))
    assert gatherings.find(native.Join("5e55", later.token, 1)) is later


async def test_a_count_that_is_wrong(autojump_clock: trio.testing.MockClock) -> None:
    """The source may not count more than have joined, nor say nothing."""
    for said in (native.Streams(3), native.Streams(0), native.Streams(4), None):
        here, there = memory_connection()
        gathering = Gatherings().begin("5e55", 3)
        gathering.join(native.Join("5e55", gathering.token, 1), memory_connection()[1])
        link = NativeLink(there, native.Decoder(native.FROM_SOURCE, preface=False), BufferPool())
        if said is not None:
            here.send_nowait([native.encode_message(said)])
        with pytest.raises(RemoteProtocolError if said is not None else ConnectionLostError):
            await gathering.gather(link)
        assert link.stream is there


async def test_the_end_of_a_connection_between_pieces_and_inside_one() -> None:
    """Between pieces it is the end of the stream; inside one, or in a header, the connection is lost."""
    for data, is_clean in ((b"", True), (encode_stripe(0, 4)[:9], False), (encode_stripe(0, 4) + b"ab", False)):
        pairs = [memory_connection() for _ in range(2)]
        stream = JoinedStream([there for _, there in pairs])
        if data:
            pairs[1][0].send_nowait([data])
        pairs[1][0].close()
        buffer = memoryview(bytearray(100))
        if is_clean:
            assert stream.receive_nowait(buffer) == 0
            continue
        with pytest.raises(ConnectionLostError, match="inside a"):
            for _ in range(9):
                with suppress(trio.WouldBlock):
                    stream.receive_nowait(buffer)


@pytest.mark.parametrize("at", [0, 2])
async def test_the_end_of_a_connection_does_not_overtake_what_is_there_already(at: int) -> None:
    """Several pieces on another one, before or behind it in order; then it is the end of the stream."""
    pairs = [memory_connection() for _ in range(3)]
    stream = JoinedStream([there for _, there in pairs])
    pairs[1][0].close()
    for position in range(0, 12, 4):
        pairs[at][0].send_nowait([encode_stripe(position, 4) + b"data"])
    buffer, received = memoryview(bytearray(100)), b""
    while n := stream.receive_nowait(buffer):
        received += buffer[:n]
    assert received == b"data" * 3


async def test_a_piece_that_was_begun_is_ended_with_whatever_comes_next() -> None:
    """A sender that is cancelled before its first byte and sends something else leaves no gap."""
    pairs = [memory_connection() for _ in range(2)]
    split, joined = SplitStream([here for here, _ in pairs]), JoinedStream([there for _, there in pairs])
    pairs[0][0].on_send = _only_the_header(pairs[0][0])
    with pytest.raises(trio.WouldBlock):
        split.send_nowait([b"a frame that is given up"])
    pairs[0][0].on_send = lambda data: data
    rest = b"another one, which is longer than what was given up"
    while rest:
        rest = rest[split.send_nowait([rest]) :]
    buffer, n = bytearray(100), 0
    while n < 51:
        n += joined.receive_nowait(memoryview(buffer)[n:])
    assert buffer[:n] == b"another one, which is longer than what was given up"


def _only_the_header(stream: MemoryStream):  # type: ignore[no-untyped-def]
    """Take the first piece that is sent, and nothing more."""
    taken: list[bytes] = []

    def take(data: bytes) -> bytes:
        if taken:
            raise trio.WouldBlock
        taken.append(data)
        return data

    return take


@pytest.mark.parametrize("family", [socket.AF_UNIX, socket.AF_INET])
async def test_over_sockets(family: socket.AddressFamily) -> None:
    """Bytes sent by one thread in lumps of any size come out of another one as they were, over small buffers."""
    pairs = [_socket_pair(family) for _ in range(5)]
    ours = [SocketStream(trio.socket.from_stdlib_socket(one), "there") for one, _ in pairs]
    theirs = [SocketStream(trio.socket.from_stdlib_socket(one), "here") for _, one in pairs]
    split, joined = SplitStream(ours), JoinedStream(theirs)
    sent = random.Random(3).randbytes(6 << 20)
    received = bytearray(len(sent))
    is_given_up = threading.Event()  # so that what is broken fails, and does not wait for ever

    def send() -> None:
        rng, at = random.Random(4), 0
        while at < len(sent) and not is_given_up.is_set():
            lump = memoryview(sent)[at : at + rng.choice([1, 50, 70_000, 1 << 20])]
            try:
                at += split.send_shortly([lump[:10], lump[10:]] if len(lump) > 10 else [lump])
            except trio.WouldBlock:
                continue

    def receive() -> None:
        rng, at = random.Random(5), 0
        while at < len(received):
            try:
                at += joined.receive_shortly(memoryview(received)[at : at + rng.choice([1, 48, 1 << 20])])
            except trio.WouldBlock:
                joined.poll_readable(0.01)
            except BaseException:
                is_given_up.set()
                raise

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, send)
        nursery.start_soon(trio.to_thread.run_sync, receive)
    assert received == sent
    joined.send_nowait([b"over the first"])
    await split.wait_readable()
    buffer = bytearray(100)
    assert buffer[: split.receive_nowait(memoryview(buffer))] == b"over the first"
    await split.wait_writable()
    await split.aclose()
    await joined.wait_readable()
    assert joined.receive_nowait(memoryview(buffer)) == 0
    await joined.aclose()


async def receive_frames(stream: ByteStream) -> object:
    """Receive for a destination."""
    link = NativeLink(stream, native.Decoder(native.FROM_SOURCE, preface=False), BufferPool())
    writer = FrameWriter([], BufferPool())
    return await trio.to_thread.run_sync(FrameReceiver(link, writer).run_slice)


async def receive_from_qemu(stream: ByteStream) -> object:
    """Receive for a destination of QEMU's."""
    receiver = QemuReceiver(stream, [AwaitedDisk("vda", CHUNK_SIZE)], b"")
    while not isinstance(event := await trio.to_thread.run_sync(receiver.run_slice), Need):
        pass
    return event


async def receive_fetched(stream: ByteStream) -> object:
    """Receive for one that fetches."""
    pool = BufferPool()
    link = NativeLink(stream, native.Decoder(native.FROM_SOURCE, preface=False), pool)
    return await trio.to_thread.run_sync(Borrowing(link, [], pool, trio.to_thread.run_sync)._take_in)


async def receive_asked(stream: ByteStream) -> object:
    """Receive for a source that lends."""
    link = NativeLink(stream, native.Decoder(native.FROM_DESTINATION, preface=False), BufferPool())
    record = EpochRecord(state=Ownership.LENDING, image_id="i", epoch=0, session="5e55")
    lent = LentDisk("d", MemoryDisk("d", 1 << 20), SimpleNamespace(record=record))  # type: ignore[arg-type]
    lending = Lending([lent], trio.sleep_forever, trio.to_thread.run_sync)
    return await trio.to_thread.run_sync(lending._answer, link)


def data_frame() -> bytes:
    """Return the head of a frame of data, the payload of which is to come."""
    return native.encode_data(0, 1, [(0, CHUNK_SIZE)], 0, CHUNK_SIZE)


def long_message() -> bytes:
    """Return the begin of a message."""
    return native.encode_message(native.Abort("x" * 40_000))[:1000]


def qemu_block_head() -> bytes:
    """Return a stream of QEMU's as far as the first block's payload."""
    encoder = qemu_block.Encoder([qemu_block.Device("vda", CHUNK_SIZE)])
    start = savevm.encode_header("pc") + savevm.encode_start(1, qemu_block.SECTION, qemu_block.VERSION)
    return start + b"".join(encoder.data(0, 0, bytes(CHUNK_SIZE))[:-1])


@pytest.mark.parametrize(
    ("family", "is_joined", "receive", "begin"),
    [
        (socket.AF_UNIX, False, receive_frames, data_frame()),
        (socket.AF_INET, False, receive_frames, data_frame()),
        (socket.AF_UNIX, True, receive_frames, data_frame()),
        (socket.AF_UNIX, False, receive_fetched, data_frame()),
        (socket.AF_UNIX, False, receive_asked, long_message()),
        (socket.AF_UNIX, False, receive_from_qemu, qemu_block_head()),
    ],
    ids=["frames", "frames-tcp", "frames-joined", "fetched", "asked", "qemu"],
)
async def test_a_dribbled_frame_keeps_no_thread(
    family: socket.AddressFamily, receive: Callable[[ByteStream], Awaitable[object]], begin: bytes, *, is_joined: bool
) -> None:
    """A thread that receives it comes back in time for the pace to be judged, though bytes never cease to come."""
    ours, theirs = _socket_pair(family)
    stream: ByteStream = SocketStream(trio.socket.from_stdlib_socket(theirs), "peer")
    if is_joined:
        begin = encode_stripe(0, STRIPE_BYTES) + begin
        stream = JoinedStream([stream])
    is_back = threading.Event()

    def dribble() -> bool:
        """Go on until told, or for a minute; return which."""
        ours.sendall(begin)
        for _ in range(60_000):
            if is_back.wait(0.001):
                return True
            ours.send(b"x")
        return False

    async def come_back() -> None:
        need = await receive(stream)
        is_back.set()
        assert need is Need.STREAM

    try:
        with ours:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(come_back)
                is_told = await trio.to_thread.run_sync(dribble)
            assert is_told
    finally:
        await stream.aclose()


def _socket_pair(family: socket.AddressFamily) -> tuple[socket.socket, socket.socket]:
    """Return two connected sockets whose buffers are small."""
    if family == socket.AF_UNIX:
        return socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        accepted: list[socket.socket] = []
        thread = threading.Thread(target=lambda: accepted.append(listener.accept()[0]))
        thread.start()
        ours = socket.create_connection(listener.getsockname())
        thread.join()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 << 10)
    return ours, accepted[0]
