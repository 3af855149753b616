"""The way to the peer: URIs as QEMU writes them, byte streams, listening.

    tcp:HOST:PORT     HOST may be a name, an address or an IPv6 address in brackets
    unix:PATH

A `ByteStream` is the seam between the migration and sockets: the tests put memory streams and faults there. Errors of
the operating system become `ConnectError` and `ConnectionLostError` here and nowhere else.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import trio

from fusemig.errors import ConfigError, ConnectError, ConnectionLostError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from fusemig.disk.base import Buffer

_BACKLOG: Final = 8
_UNIX_BUFFER_BYTES: Final = 4 << 20
_MAX_SENDMSG_BUFFERS: Final = 64
_OVERLOAD_ERRNOS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
"""What `accept` may fail with without anything being wrong with the listener (as in `trio.serve_listeners`)."""


class Uri(NamedTuple):
    """Where a peer is or where to listen."""

    kind: str
    """``tcp`` or ``unix``."""
    host: str
    port: int
    path: str

    def __str__(self) -> str:
        if self.kind == "unix":
            return f"unix:{self.path}"
        return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"


def parse_uri(text: str) -> Uri:
    """Return the parts of a migration URI.

    Raises:
        ConfigError: it is none, or of a kind that is not supported.
    """
    kind, _, rest = text.partition(":")
    if kind == "unix" and rest:
        return Uri("unix", "", 0, rest)
    if kind == "tcp":
        host, _, port = rest.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if port.isascii() and port.isdigit() and int(port) < 65536:
            return Uri("tcp", host, int(port), "")
    if kind in ("exec", "fd", "rdma", "file"):
        raise ConfigError(f"'{kind}:' is not supported: use tcp:HOST:PORT or unix:PATH")
    raise ConfigError(f"'{text}' is not a migration URI: write tcp:HOST:PORT or unix:PATH")


class ByteStream(Protocol):
    """An ordered, two-way stream of bytes; one task sends and one receives at a time."""

    peer: str
    """The other end, for people."""

    async def send(self, buffers: Sequence[Buffer]) -> None:
        """Send all of ``buffers``; a send that raises or is cancelled leaves the stream unusable."""

    async def receive_into(self, buffer: memoryview) -> int:
        """Receive at least one byte into ``buffer``; return how many, 0 at the end of the stream."""

    async def aclose(self) -> None:
        """Close; always checkpoints and never raises but `trio.Cancelled`."""


class SocketStream:
    """A `ByteStream` over a connected socket."""

    def __init__(self, sock: trio.socket.SocketType, peer: str) -> None:
        """Own ``sock``."""
        self._socket = sock
        self.peer = peer
        if sock.family == socket.AF_UNIX:
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_BUFFER_BYTES)
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    async def send(self, buffers: Sequence[Buffer]) -> None:
        """Send all of ``buffers``, gathered.

        Raises:
            ConnectionLostError: the peer is gone.
        """
        rest = [memoryview(buffer) for buffer in buffers]
        at = 0
        try:
            while at < len(rest):
                n = await self._socket.sendmsg(rest[at : at + _MAX_SENDMSG_BUFFERS])
                while at < len(rest) and n >= len(rest[at]):
                    n -= len(rest[at])
                    at += 1
                if n:
                    rest[at] = rest[at][n:]
        except (OSError, trio.ClosedResourceError) as exc:
            raise _lost(self.peer, exc) from exc

    async def receive_into(self, buffer: memoryview) -> int:
        """Receive what is there, at most ``buffer`` full.

        Raises:
            ConnectionLostError: the connection broke.
        """
        try:
            return await self._socket.recv_into(buffer)
        except (OSError, trio.ClosedResourceError) as exc:
            raise _lost(self.peer, exc) from exc

    async def aclose(self) -> None:
        """Close the socket."""
        self._socket.close()
        await trio.lowlevel.checkpoint()


def _lost(peer: str, exc: BaseException) -> ConnectionLostError:
    reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else "closed"
    return ConnectionLostError(f"connection to {peer} lost: {reason}")


async def connect(uri: Uri, deadline_s: float) -> SocketStream:
    """Connect to ``uri`` within ``deadline_s`` seconds.

    Raises:
        ConnectError: nobody answers there.
    """
    try:
        with trio.fail_after(deadline_s):
            if uri.kind == "unix":
                sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                try:
                    await sock.connect(uri.path)
                except BaseException:
                    sock.close()
                    raise
            else:
                sock = (await trio.open_tcp_stream(uri.host or "localhost", uri.port)).socket
    except trio.TooSlowError as exc:
        raise ConnectError(f"no answer from {uri} within {deadline_s:g} s; is the host reachable?") from exc
    except (OSError, ExceptionGroup) as exc:
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        raise ConnectError(
            f"cannot connect to {uri}: {reason}; is `fusemig serve --incoming {uri}` running there?"
        ) from exc
    return SocketStream(sock, str(uri))


Handler = "Callable[[ByteStream], Awaitable[None]]"


@asynccontextmanager
async def listening(uri: Uri) -> AsyncIterator[Listener]:
    """Listen at ``uri`` for as long as the block runs; port 0 picks a free one, which `Listener.uri` names.

    Raises:
        ConnectError: the address is in use or not ours.
    """
    try:
        sockets = _unix_socket(uri.path) if uri.kind == "unix" else await _tcp_sockets(uri)
    except OSError as exc:
        raise ConnectError(f"cannot listen at {uri}: {exc.strerror or exc}; choose another address") from exc
    try:
        if uri.kind == "tcp":
            uri = uri._replace(port=sockets[0].getsockname()[1])
        yield Listener(uri, sockets)
    finally:
        for sock in sockets:
            sock.close()
        if uri.kind == "unix":
            with suppress(FileNotFoundError):
                os.unlink(uri.path)


class Listener:
    """Accepts connections."""

    def __init__(self, uri: Uri, sockets: list[trio.socket.SocketType]) -> None:
        """Made by `listening`."""
        self.uri = uri
        self._sockets = sockets

    async def serve(self, handler: Callable[[ByteStream], Awaitable[None]], max_connections: int) -> None:
        """Hand each connection to ``handler``, at most ``max_connections`` at once; runs until cancelled.

        Further connections wait in the kernel's backlog. ``handler`` must not raise `Exception`.
        """
        limit = trio.Semaphore(max_connections)
        async with trio.open_nursery() as nursery:
            for sock in self._sockets:
                nursery.start_soon(self._accept, sock, handler, limit, nursery)

    async def _accept(
        self,
        listener: trio.socket.SocketType,
        handler: Callable[[ByteStream], Awaitable[None]],
        limit: trio.Semaphore,
        nursery: trio.Nursery,
    ) -> None:
        while True:
            await limit.acquire()
            try:
                sock, address = await listener.accept()
            except OSError as exc:
                limit.release()
                if exc.errno not in _OVERLOAD_ERRNOS and exc.errno != errno.ECONNABORTED:
                    raise
                await trio.sleep(0.1)
                continue
            except trio.Cancelled:
                limit.release()
                raise
            peer = f"unix:{self.uri.path}" if self.uri.kind == "unix" else f"tcp:{address[0]}:{address[1]}"
            nursery.start_soon(self._handle, sock, peer, handler, limit)

    async def _handle(
        self,
        sock: trio.socket.SocketType,
        peer: str,
        handler: Callable[[ByteStream], Awaitable[None]],
        limit: trio.Semaphore,
    ) -> None:
        stream = None
        try:
            stream = SocketStream(sock, peer)
            await handler(stream)
        except OSError:  # the peer left before its socket could be set up
            pass
        finally:
            sock.close()
            limit.release()


async def _tcp_sockets(uri: Uri) -> list[trio.socket.SocketType]:
    listeners = await trio.open_tcp_listeners(uri.port, host=uri.host or "127.0.0.1", backlog=_BACKLOG)
    return [listener.socket for listener in listeners]


def _unix_socket(path: str) -> list[trio.socket.SocketType]:
    with suppress(OSError):
        if stat.S_ISSOCK(os.lstat(path).st_mode) and not _is_listening(path):
            os.unlink(path)
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        old = os.umask(0o177)
        try:
            # AF_UNIX needs no name resolution, so the underlying bind does not block.
            sock._sock.bind(path)  # type: ignore[attr-defined]  # noqa: SLF001
        finally:
            os.umask(old)
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return [sock]


def _is_listening(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path) in (0, errno.EAGAIN, errno.EINPROGRESS)
