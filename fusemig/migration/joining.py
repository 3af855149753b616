"""How further connections become a migration's: the source makes them, the destination knows them by a token.

    source    join_streams     connect, JOIN, JOINED; one after the other; then STREAMS on the first
    host      Gatherings       who waits, by token
    dest.     Gathering        a migration's places, until the source has said how many it took

A stranger who guesses takes nothing: the token is 128 random bits, new with each attempt, and a place is given once.
With TLS a connection is admitted as every other one before it may say JOIN.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Final

import structlog
import trio

from fusemig.errors import FusemigError, PeerRefusedError, RemoteProtocolError
from fusemig.migration.bundle import JoinedStream, SplitStream
from fusemig.migration.link import HANDSHAKE_DEADLINE_S, IDLE_DEADLINE_S, BufferPool, NativeLink
from fusemig.wire import native

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fusemig.net.transport import ByteStream

JOIN_DEADLINE_S: Final = 10.0
"""For all further connections together; who waits at the other side is more patient (`IDLE_DEADLINE_S`)."""

log = structlog.get_logger(__name__)


class Gathering:
    """The further connections of one migration, as they come."""

    def __init__(self, session: str, n_streams: int) -> None:
        """Wait for all of ``n_streams`` but the first."""
        self.session = session
        self.n_streams = n_streams
        self.token = secrets.token_hex(16)
        self.is_open = n_streams > 1
        """Whether more may join."""
        self.over = trio.Event()
        """The migration uses none of them any more."""
        self._streams: dict[int, ByteStream] = {}

    def join(self, join: native.Join, stream: ByteStream) -> None:
        """Give a connection its place; whoever brings it keeps it open until `over`.

        Raises:
            PeerRefusedError: there is no such place, or not any more.
        """
        if not self.is_open or not 1 <= join.place < self.n_streams or join.place in self._streams:
            raise PeerRefusedError(f"place {join.place} of {self.n_streams} is not free")
        self._streams[join.place] = stream

    async def gather(self, link: NativeLink) -> int:
        """Wait until the source has said how many there are, and have ``link`` receive over them; return how many.

        Raises:
            RemoteProtocolError: it counts connections that did not join.
            ConnectionLostError: it is gone.
            MigrationError: it gave up.
        """
        if self.n_streams == 1:
            return 1
        said = await link.expect(native.Streams, IDLE_DEADLINE_S)
        self.is_open = False
        if not 1 <= said.n <= self.n_streams or any(place not in self._streams for place in range(1, said.n)):
            raise RemoteProtocolError(f"{link.peer} counts {said.n} connections, of which {len(self._streams)} joined")
        if said.n > 1:
            link.stream = JoinedStream([link.stream, *(self._streams[place] for place in range(1, said.n))])
        return said.n

    def end(self) -> None:
        """Let go of the connections; no thread may be inside one. Idempotent."""
        self.is_open = False
        self.over.set()


class Gatherings:
    """Those of a host."""

    def __init__(self) -> None:
        """Nobody waits."""
        self._waiting: dict[str, Gathering] = {}

    def begin(self, session: str, n_streams: int) -> Gathering:
        """Begin one; those that wait already, of the same migration too, lose nothing by it."""
        gathering = Gathering(session, n_streams)
        self._waiting[gathering.token] = gathering
        return gathering

    def end(self, gathering: Gathering) -> None:
        """End one; idempotent."""
        gathering.end()
        self._waiting.pop(gathering.token, None)

    def find(self, join: native.Join) -> Gathering:
        """Return that which a connection belongs to.

        A session is no secret, and whoever names one in HELLO may not be its source: so the token alone tells.

        Raises:
            PeerRefusedError: there is none.
        """
        gathering = self._waiting.get(join.token)
        if gathering is None or gathering.session != join.session:
            raise PeerRefusedError("no migration waits for this connection")
        return gathering


async def join_streams(
    connect: Callable[[], Awaitable[ByteStream]],
    link: NativeLink,
    session: str,
    welcome: native.Welcome,
    n_wanted: int,
) -> int:
    """Make the further connections that a destination takes, and have ``link`` send over all; return how many.

    One that cannot be made is not missed: what is there is used, and the log says so.

    Raises:
        ConnectionLostError: the first one is gone.
    """
    if welcome.streams <= 1:
        return 1
    streams = [link.stream]
    try:
        with trio.move_on_after(JOIN_DEADLINE_S) as scope:
            await _join_all(connect, streams, session, welcome.token, min(welcome.streams, n_wanted))
        if scope.cancelled_caught:
            log.warning("no more streams", reason=f"not made within {JOIN_DEADLINE_S:g} s", streams=len(streams))
        await link.send_message(native.Streams(len(streams)))
        if len(streams) > 1:
            link.stream = SplitStream(streams)
    except BaseException:
        for stream in streams[1:]:
            with trio.CancelScope(shield=True):
                await stream.aclose()
        raise
    return len(streams)


async def _join_all(
    connect: Callable[[], Awaitable[ByteStream]], streams: list[ByteStream], session: str, token: str, n_streams: int
) -> None:
    """Add connections to ``streams``, one at a time: more would look like a crowd to the listener there."""
    while len(streams) < n_streams:
        try:
            stream = await connect()
            try:
                await _join(stream, native.Join(session, token, len(streams)))
            except BaseException:
                with trio.CancelScope(shield=True):
                    await stream.aclose()
                raise
        except FusemigError as exc:
            log.warning("no more streams", reason=str(exc), streams=len(streams))
            return
        streams.append(stream)


async def _join(stream: ByteStream, join: native.Join) -> None:
    link = NativeLink(stream, native.Decoder(native.FROM_DESTINATION, preface=False), BufferPool())
    await link.send([native.PREFACE, native.encode_message(join)])
    answer = await link.receive(HANDSHAKE_DEADLINE_S)
    if isinstance(answer, native.Refuse):
        raise PeerRefusedError(f"{link.peer} refused: {answer.reason}")
    if not isinstance(answer, native.Joined):
        raise RemoteProtocolError(f"{link.peer} sent {type(answer).__name__} where an answer to JOIN was due")
