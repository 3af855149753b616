"""A small QMP client: for the command line to talk with the daemon, and for the daemon to talk with QEMU.

Rules: no task of its own, so no exception of the caller's is ever wrapped in a group. Whoever waits reads the socket,
one at a time, and files what is another's: replies by their ``id``, events in a queue. Every wait has a deadline. A
request that could not be sent whole makes the connection unusable.
"""

from __future__ import annotations

import os
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import trio

from fusemig.errors import ConfigError, ConnectError, ConnectionLostError, FusemigError, RemoteProtocolError
from fusemig.qmp import codec

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

MAX_QUEUED_EVENTS: Final = 1000
"""Events kept for a caller that does not ask for them; the oldest go first."""

_RECEIVE_BYTES: Final = 65536


class Server(NamedTuple):
    """Who is expected behind a socket, for the texts of errors."""

    name: str
    if_absent: str
    """What to do where nobody listens; ``{path}`` stands for the socket."""
    if_mute: str
    """What to do where a connection is made and no QMP greeting comes."""
    if_refused: str
    """What to do where the socket is another user's."""
    if_lost: str
    """Where to look when it has gone."""


DAEMON: Final = Server(
    "the daemon",
    "is `fusemig serve` running with --control {path}?",
    "is it fusemig's --control?",
    "run this as the user of `fusemig serve`, or as root",
    "see its log",
)


class QmpError(FusemigError):
    """The server refused a command.

    Attributes:
        error_class: QMP's error class.
        desc: the server's text.
        kind: the daemon's `FusemigError.kind`, from which the exit code follows; empty from other servers.
    """

    def __init__(self, error_class: str, desc: str, kind: str = "") -> None:
        """Keep what the server said."""
        super().__init__(desc)
        self.error_class = error_class
        self.desc = desc
        if kind:
            self.kind = kind  # type: ignore[misc]  # the daemon's error has a kind, this class has none of its own


class ControlClient:
    """A negotiated connection; made by `open_control`. May be used by several tasks."""

    def __init__(self, stream: trio.SocketStream, path: Path, deadline_s: float, server: Server = DAEMON) -> None:
        """Take over a connected stream."""
        self._stream = stream
        self._server = server
        self._path = path
        self._deadline_s = deadline_s
        self._buffer = bytearray()
        self._reading = trio.Lock()
        self._sending = trio.Lock()
        self._last_id = 0
        self._replies: dict[int, codec.Return | codec.Error | None] = {}  # by id; None: awaited
        self._events: deque[codec.Event] = deque(maxlen=MAX_QUEUED_EVENTS)
        self._is_broken = False

    async def negotiate(self) -> str:
        """Read the greeting, leave the negotiation mode and return the server's name and version."""
        try:
            with trio.fail_after(self._deadline_s):
                greeting = await self._receive()
        except trio.TooSlowError:
            raise ConnectError(
                f"'{self._path}' does not greet as QMP does: {self._server.if_mute.format(path=self._path)}"
            ) from None
        if not isinstance(greeting, codec.Greeting):
            raise RemoteProtocolError(f"'{self._path}' does not begin with a QMP greeting")
        await self.execute("qmp_capabilities")
        return greeting.package

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, deadline_s: float | None = None
    ) -> Any:
        """Run a command and return what it returned.

        Raises:
            QmpError: the server refused.
            ConnectionLostError: it went away, or did not answer in time.
        """
        self._last_id += 1
        id_ = self._last_id
        limit_s = self._deadline_s if deadline_s is None else deadline_s
        self._replies[id_] = None
        try:
            with trio.fail_after(limit_s):
                await self._send(codec.encode_request(command, dict(arguments or {}), id_))
                while (reply := self._replies[id_]) is None:
                    async with self._reading:
                        if self._replies[id_] is None:
                            self._file(await self._receive())
        except trio.TooSlowError:
            raise ConnectionLostError(
                f"{self._server.name} at '{self._path}' did not answer {command} in {limit_s:g} s"
            ) from None
        finally:
            del self._replies[id_]
        if isinstance(reply, codec.Error):
            raise QmpError(reply.error_class, reply.desc, reply.kind)
        return reply.result

    async def next_event(self) -> codec.Event:
        """Return the oldest event not taken yet; waits for one, and leaves the deadline to the caller.

        Raises:
            ConnectionLostError: the server went away.
        """
        while not self._events:
            async with self._reading:
                if not self._events:
                    self._file(await self._receive())
        return self._events.popleft()

    async def events(self) -> AsyncIterator[codec.Event]:
        """Yield events until the server has gone."""
        while True:
            try:
                event = await self.next_event()
            except ConnectionLostError:
                return
            yield event

    def _file(self, message: codec.Greeting | codec.Return | codec.Error | codec.Event) -> None:
        if isinstance(message, codec.Event):
            self._events.append(message)
        elif isinstance(message, codec.Greeting):
            raise RemoteProtocolError(f"{self._server.name} sent a second greeting")
        elif message.id in self._replies:  # else: of a command whose caller has given up
            self._replies[message.id] = message
        elif message.id is None and isinstance(message, codec.Error):
            raise RemoteProtocolError(f"{self._server.name} did not understand us: {message.desc}")

    async def _send(self, line: bytes) -> None:
        async with self._sending:
            if self._is_broken:
                raise ConnectionLostError(f"the connection to '{self._path}' is unusable: open a new one")
            # Who is cancelled before the first byte leaves nothing half said; from here to the first byte no task runs.
            await trio.lowlevel.checkpoint_if_cancelled()
            self._is_broken = True
            try:
                await self._stream.send_all(line)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise self._lost() from error
            self._is_broken = False

    async def _receive(self) -> codec.Greeting | codec.Return | codec.Error | codec.Event:
        """Return the next message; a cancelled call loses nothing."""
        scanned = 0
        while (end := self._buffer.find(b"\n", scanned)) < 0:
            scanned = len(self._buffer)
            if scanned > codec.MAX_REPLY_BYTES:
                raise RemoteProtocolError(f"a line of {self._server.name} is longer than {codec.MAX_REPLY_BYTES} bytes")
            try:
                data = await self._stream.receive_some(_RECEIVE_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise self._lost() from error
            if not data:
                raise self._lost()
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return codec.decode_server_line(line)

    def _lost(self) -> ConnectionLostError:
        return ConnectionLostError(
            f"{self._server.name} at '{self._path}' closed the connection: {self._server.if_lost}"
        )


@asynccontextmanager
async def open_control(path: Path, deadline_s: float = 10.0, server: Server = DAEMON) -> AsyncIterator[ControlClient]:
    """Connect to the control socket of ``server``; ``deadline_s`` bounds the connecting and each command.

    Raises:
        ConnectError: nobody listens, or not to us.
        ConnectionLostError, RemoteProtocolError: what listens is no QMP server.
    """
    stream = await _connect(path, deadline_s, server)
    async with stream:
        client = ControlClient(stream, path, deadline_s, server)
        await client.negotiate()
        yield client


async def _connect(path: Path, deadline_s: float, server: Server) -> trio.SocketStream:
    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    try:
        with trio.fail_after(deadline_s):
            await sock.connect(os.fspath(path))
    except BaseException as error:
        sock.close()
        if isinstance(error, (FileNotFoundError, ConnectionRefusedError)):
            nobody = f"no {server.name.removeprefix('the ')}"
            raise ConnectError(f"{nobody} listens at '{path}': {server.if_absent.format(path=path)}") from error
        if isinstance(error, PermissionError):
            raise ConnectError(f"'{path}' belongs to another user: {server.if_refused}") from error
        if isinstance(error, trio.TooSlowError):
            raise ConnectError(f"{server.name} at '{path}' accepts no connection within {deadline_s:g} s") from error
        if isinstance(error, OSError):
            if error.strerror is None:  # "AF_UNIX path too long": found by Python, not by the kernel
                raise ConfigError(f"control socket '{path}': {error}") from error
            raise ConnectError(f"cannot connect to '{path}': {error.strerror}") from error
        raise
    return trio.SocketStream(sock)
