"""`TlsStream` keeps the contract of a `ByteStream`, and strangers at a `Listener` get a bounded time and place."""

from __future__ import annotations

import os
import random
import socket
import ssl
import stat
import struct
import threading
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio

from fusemig.errors import AuthenticationError, ConnectionLostError
from fusemig.migration import arrival, destination, link
from fusemig.migration.arrival import greet
from fusemig.net import listener as listener_module
from fusemig.net import tls
from fusemig.net.credentials import Endpoint, load_credentials
from fusemig.net.listener import MAX_PENDING_PER_ADDRESS, listening
from fusemig.net.transport import SocketStream, connect, is_private, parse_uri
from fusemig.wire import native
from fusemig.wire.base import IncomingWire
from support.certificates import HOST, Authority

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from fusemig.net.listener import Connection, Listener
    from fusemig.net.transport import ByteStream

ANYWHERE = parse_uri("tcp:127.0.0.1:0")
BIG = 24 << 20


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """Give an authority."""
    return Authority(tmp_path)


@asynccontextmanager
async def secured(authority: Authority) -> AsyncIterator[tuple[tls.TlsStream, tls.TlsStream]]:
    """Connect two ends over TLS: the source's and the destination's."""
    client = load_credentials(authority.client(), Endpoint.CLIENT)
    server = load_credentials(authority.server(), Endpoint.SERVER)
    near, far = await plain_pair()
    ends: list[tls.TlsStream] = []

    async def serve() -> None:
        ends.append(await tls.secure_server(far, server))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        ours = await tls.secure_client(near, client, HOST)
    try:
        yield ours, ends[0]
    finally:
        await ours.aclose()
        await ends[0].aclose()


async def plain_pair() -> tuple[SocketStream, SocketStream]:
    """Connect two ends over TCP."""
    with socket.create_server((HOST, 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    streams = [SocketStream(trio.socket.from_stdlib_socket(one), "peer") for one in (near, far)]
    return streams[0], streams[1]


async def receive_all(stream: ByteStream, length: int) -> bytes:
    """Receive exactly so much, or less at the end."""
    data = bytearray(length)
    n = 0
    while n < length:
        try:
            received = stream.receive_nowait(memoryview(data)[n:])
        except trio.WouldBlock:
            await stream.wait_readable()
            continue
        if not received:
            break
        n += received
    return bytes(data[:n])


async def send_all(stream: ByteStream, data: bytes) -> None:
    """Send it all, in whatever pieces are taken."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[stream.send_nowait([rest[:100_000], rest[100_000:3_000_000]]) :]
        except trio.WouldBlock:
            await stream.wait_writable()


async def test_both_ways_at_once(authority: Authority) -> None:
    """More than any buffer holds, sent from both ends before either reads a byte of it."""
    forth, back = random.Random(1).randbytes(BIG), random.Random(2).randbytes(BIG)
    got: dict[str, bytes] = {}

    async def read(name: str, stream: ByteStream) -> None:
        await trio.sleep(0.05)
        got[name] = await receive_all(stream, BIG)

    async with secured(authority) as (ours, theirs), trio.open_nursery() as nursery:
        nursery.start_soon(send_all, ours, forth)
        nursery.start_soon(send_all, theirs, back)
        nursery.start_soon(read, "forth", theirs)
        nursery.start_soon(read, "back", ours)
    assert got == {"forth": forth, "back": back}


async def test_from_threads(authority: Authority) -> None:
    """A thread sends while another receives on the same stream, with the calls that block for moments."""
    data = random.Random(3).randbytes(BIG)

    def send(stream: ByteStream) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[stream.send_shortly([rest[: 1 << 20]]) :]
            except trio.WouldBlock:
                continue

    def receive(stream: ByteStream) -> bytes:
        buffer = bytearray(BIG)
        n = 0
        while n < BIG:
            if stream.poll_readable(0.05):
                n += stream.receive_shortly(memoryview(buffer)[n : n + (1 << 20)])
        return bytes(buffer)

    async with secured(authority) as (ours, theirs):
        got: list[bytes] = []

        async def collect(stream: ByteStream) -> None:
            got.append(await trio.to_thread.run_sync(receive, stream))

        async with trio.open_nursery() as nursery:
            for stream in (ours, theirs):
                nursery.start_soon(partial(trio.to_thread.run_sync, send, stream))
                nursery.start_soon(collect, stream)
        assert got == [data, data]


async def test_a_refused_send_took_nothing(authority: Authority) -> None:
    """After WouldBlock the caller may send something else: what it was refused is never sent."""
    async with secured(authority) as (ours, theirs):
        sent = bytearray()
        number = 0
        while True:
            piece = number.to_bytes(4, "big") * 4096
            try:
                n = ours.send_nowait([piece])
            except trio.WouldBlock:
                if number and sent[-4:] == b"last":
                    break
                await trio.sleep(0.02)  # the relay may still move something
                piece = b"last"
                try:
                    n = ours.send_nowait([piece])
                except trio.WouldBlock:
                    break
            sent += piece[:n]
            number += 1
        assert len(sent) > 1 << 20
        assert await receive_all(theirs, len(sent)) == sent
        await send_all(ours, b"and this")
        assert await receive_all(theirs, 8) == b"and this"


async def test_what_was_sent_before_the_end_arrives(authority: Authority) -> None:
    """Closing loses nothing that was taken, and the other end sees the end after it."""
    async with secured(authority) as (ours, theirs):
        sent = await fill(ours)
        await ours.aclose()
        assert await receive_all(theirs, len(sent) + 1) == sent
        with pytest.raises(ConnectionLostError):
            for _ in range(100):
                with trio.move_on_after(0.01):
                    await send_all(theirs, sent)


async def test_no_thread_is_left(authority: Authority) -> None:
    """Not when both ends close, nor when one closes with unread bytes and the other takes nothing."""
    before = set(threading.enumerate())
    async with secured(authority) as (ours, theirs):
        await fill(ours)
        await theirs.aclose()
    await wait_no_thread_since(before)


async def test_a_peer_that_takes_nothing_holds_no_thread(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be sent after the end is given up in time, though the peer stays there."""
    monkeypatch.setattr(tls, "_CLOSE_DEADLINE_S", 0.1)
    async with secured(authority) as (ours, theirs):
        theirs_too = {one for one in threading.enumerate() if one is theirs._relay}
        before = {one for one in threading.enumerate() if one is not ours._relay} | theirs_too
        await fill(ours)
        await ours.aclose()
        await wait_no_thread_since(before)


async def wait_no_thread_since(before: set[threading.Thread]) -> None:
    """Wait until no relay runs that is not in ``before``."""
    with trio.fail_after(20):
        while any(one.name.startswith("tls ") for one in set(threading.enumerate()) - before):
            await trio.sleep(0.01)


async def fill(stream: ByteStream) -> bytes:
    """Send until nothing more is taken, for a moment; return what was."""
    source = random.Random(4)
    sent = bytearray()
    n_refused = 0
    while n_refused < 5:
        piece = source.randbytes(1 << 16)
        try:
            sent += piece[: stream.send_nowait([piece])]
            n_refused = 0
        except trio.WouldBlock:
            n_refused += 1
            await trio.sleep(0.02)
    return bytes(sent)


async def test_who_is_not_accepted_hears_why(authority: Authority, tmp_path: Path) -> None:
    """The source's handshake ends first: it learns what the destination thinks of it when it goes on."""
    client = load_credentials(authority.client(is_expired=True), Endpoint.CLIENT)
    server = load_credentials(authority.server(), Endpoint.SERVER)
    near, far = await plain_pair()

    async def serve() -> None:
        with pytest.raises(AuthenticationError, match="did not prove who it is: certificate has expired"):
            await tls.secure_server(far, server)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        ours = await tls.secure_client(near, client, HOST)
        with pytest.raises(AuthenticationError, match="did not accept our certificate"):
            while True:
                await send_all(ours, bytes(1000))
                await trio.sleep(0.01)
        await ours.aclose()


@pytest.mark.parametrize("is_expired", [False, True], ids=["bytes", "alert"])
async def test_what_was_said_before_a_reset_is_heard(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, is_expired: bool
) -> None:
    """A peer that says why and is gone, with a reset: a relay that comes to send first still passes it on."""
    client = load_credentials(authority.client(is_expired=is_expired), Endpoint.CLIENT)
    server = load_credentials(authority.server(), Endpoint.SERVER)
    monkeypatch.setattr(tls._Relay, "start", lambda _self: None)
    near, far = await plain_pair()
    plain = far.detach()
    plain.settimeout(20)
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def serve() -> None:
        with suppress(ssl.SSLError), server.context.wrap_socket(plain, server_side=True) as secure:
            secure.sendall(b"this is why")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, serve)
        ours = await tls.secure_client(near, client, HOST)
    await send_all(ours, b"a word of ours")
    threading.Thread.start(ours._relay)
    if is_expired:
        with pytest.raises(AuthenticationError, match=r"did not accept our certificate .*certificate expired"):
            await receive_all(ours, 1)
    else:
        assert await receive_all(ours, 11) == b"this is why"
        with pytest.raises(ConnectionLostError, match="lost"):
            await receive_all(ours, 1)
    await ours.aclose()


async def test_an_idle_relay_sleeps(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the peer has sent more than anybody reads, and then closed: its turns are few."""
    turns = 0
    wait = tls._Poll.wait

    def count(*args: Any) -> Any:
        nonlocal turns
        turns += 1
        return wait(*args)

    monkeypatch.setattr(tls._Poll, "wait", count)
    async with secured(authority) as (ours, theirs):
        with trio.move_on_after(0.3):
            await send_all(ours, bytes(BIG))
        await ours.aclose()
        await trio.sleep(0.1)
        before = turns
        await trio.sleep(0.3)
        assert turns - before < 10, "something spins"
        assert await receive_all(theirs, 1) == b"\0"


async def test_tampering_is_noticed(authority: Authority) -> None:
    """One flipped bit ends the connection, and no byte after it is delivered."""
    client = load_credentials(authority.client(), Endpoint.CLIENT)
    server = load_credentials(authority.server(), Endpoint.SERVER)
    near, near_wire = await plain_pair()
    far_wire, far = await plain_pair()
    spoil = trio.Event()

    async def forward(source: SocketStream, target: SocketStream) -> None:
        buffer = memoryview(bytearray(1 << 16))
        while True:
            try:
                n = source.receive_nowait(buffer)
            except trio.WouldBlock:
                await source.wait_readable()
                continue
            except ConnectionLostError:
                return
            data = bytearray(buffer[:n])
            if spoil.is_set() and n:
                data[n // 2] ^= 1
            await send_all(target, bytes(data))
            if not n:
                return

    async with trio.open_nursery() as nursery:
        nursery.start_soon(forward, near_wire, far_wire)
        nursery.start_soon(forward, far_wire, near_wire)
        ends: list[tls.TlsStream] = []

        async def serve() -> None:
            ends.append(await tls.secure_server(far, server))

        async with trio.open_nursery() as handshakes:
            handshakes.start_soon(serve)
            ours = await tls.secure_client(near, client, HOST)
        theirs = ends[0]
        await send_all(ours, b"whole")
        assert await receive_all(theirs, 5) == b"whole"
        spoil.set()
        await send_all(ours, b"spoiled")
        with pytest.raises(ConnectionLostError, match=r"lost: TLS: .*bad record mac"):
            await receive_all(theirs, 7)
        nursery.cancel_scope.cancel()
    for stream in (ours, theirs, near_wire, far_wire):
        await stream.aclose()


# Time and place for strangers


async def send_slowly(stream: SocketStream, data: bytes) -> None:
    """Send one byte after the other until the other end has had enough."""
    for at in range(len(data)):
        try:
            stream.send_nowait([data[at : at + 1]])
        except ConnectionLostError:
            return
        await trio.sleep(0.01)


async def test_a_slow_handshake_ends(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that dribbles a valid hello, byte by byte, has the deadline of one that is silent."""
    monkeypatch.setattr(tls, "HANDSHAKE_DEADLINE_S", 0.3)
    server = load_credentials(authority.server(), Endpoint.SERVER)
    near_end, far_end = await plain_pair()
    incoming = ssl.MemoryBIO()
    outgoing = ssl.MemoryBIO()
    context = load_credentials(authority.client(), Endpoint.CLIENT).context
    client = context.wrap_bio(incoming, outgoing, server_hostname=HOST)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    hello = outgoing.read()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_slowly, near_end, hello)
        with pytest.raises(ConnectionLostError, match=r"did not end the TLS handshake within 0\.3 s"):
            await tls.secure_server(far_end, server)
        nursery.cancel_scope.cancel()
    for stream in (near_end, far_end):
        await stream.aclose()


async def test_a_slow_hello_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first message of the native wire has a deadline as a whole, also where the first bytes are right."""
    for module in (arrival, destination):
        monkeypatch.setattr(module, "HANDSHAKE_DEADLINE_S", 0.3)
    near, far = await plain_pair()
    async with trio.open_nursery() as nursery:
        hello = native.PREFACE + native.encode_message(native.Hello(native.VERSION, "0" * 32, 1 << 20, []))
        nursery.start_soon(send_slowly, near, hello)
        migration = await greet(far, IncomingWire.AUTO, None, trio.to_thread.run_sync)  # type: ignore[arg-type]
        await migration.run()
        assert str(migration.error) == "peer did not say hello within 0.3 s"
        nursery.cancel_scope.cancel()
    await near.aclose()
    await far.aclose()


async def test_who_dribbles_a_frame_is_lost(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """Below the minimum rate a frame is given up, though a byte comes every second; above it, it is not."""
    pace = link.Pace("peer")
    for second in range(31):
        pace.check(1, 100 + second, float(second))
    with pytest.raises(ConnectionLostError, match="peer sends less than 4096 bytes a second"):
        pace.check(1, 140, 32.0)
    fast = link.Pace("peer")
    for second in range(200):
        fast.check(1, 100 + 5000 * second, float(second))
    between = link.Pace("peer")
    for second in range(200):
        between.check(second, 100 + 10 * second, float(second))
    silent = link.Pace("peer")
    for second in range(200):
        silent.check(1, 100, float(second))
    silent.check(1, 101, 200.0)
    paused = link.Pace("peer")
    paused.check(1, 100, 0.0)
    paused.check(1, 101, 1.0)
    paused.check(1, 102, 3000.0)


@asynccontextmanager
async def crowd_at(listener: Listener) -> AsyncIterator[list[Connection]]:
    """Serve with a handler that waits for ever; give the connections that are being handled."""
    present: list[Connection] = []

    async def handle(connection: Connection) -> None:
        present.append(connection)
        try:
            await trio.sleep_forever()
        finally:
            present.remove(connection)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.serve, handle)
        yield present
        nursery.cancel_scope.cancel()


async def test_the_oldest_stranger_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A place per address is bounded; whoever has settled keeps his, however many come after."""
    monkeypatch.setattr(listener_module, "_ACCEPT_PAUSE_S", 0)
    async with listening(ANYWHERE) as listener, crowd_at(listener) as present:
        first = await connect(listener.uri, 30)
        with trio.fail_after(30):
            while not present:
                await trio.sleep(0.001)
            settled = present[0]
            settled.settle()
            others = []
            for number in range(12):
                others.append(await connect(listener.uri, 30))
                while len(present) + listener.n_displaced < number + 2:
                    await trio.sleep(0.001)
            while len(present) > MAX_PENDING_PER_ADDRESS + 1:
                await trio.sleep(0.001)
        assert settled in present
        assert listener.n_displaced == 12 - MAX_PENDING_PER_ADDRESS
        assert len(listener.pending) == MAX_PENDING_PER_ADDRESS
        for stream in (first, *others):
            await stream.aclose()


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("tcp:127.0.0.1:1", True),
        ("tcp:127.8.9.1:1", True),
        ("tcp:[::1]:1", True),
        ("tcp:[::ffff:127.0.0.1]:1", True),
        ("tcp:localhost:1", True),
        ("tcp::1", True),
        ("unix:/x", True),
        ("tcp:0.0.0.0:1", False),
        ("tcp:[::]:1", False),
        ("tcp:10.0.0.2:1", False),
        ("tcp:[fe80::1%eth0]:1", False),
        ("tcp:localhost.example.com:1", False),
        ("tcp:127.0.0.1.example.com:1", False),
        ("tcp:2130706433:1", False),
    ],
)
def test_what_stays_on_this_host(uri: str, expected: bool) -> None:
    """Only what cannot be anything else."""
    assert is_private(parse_uri(uri)) is expected


async def test_a_unix_socket_is_for_its_owner(tmp_path: Path) -> None:
    """Its file has mode 0600 from the start, whatever the umask."""
    old = os.umask(0)
    try:
        async with listening(parse_uri(f"unix:{tmp_path / 'incoming'}")):
            assert stat.S_IMODE((tmp_path / "incoming").stat().st_mode) == 0o600
    finally:
        os.umask(old)
