"""Listening for peers, and what strangers on the port can take: a bounded number of places, for a bounded time."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import stat
from collections import Counter
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final

import trio

from fusemig.errors import ConnectError
from fusemig.net.transport import SocketStream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from fusemig.net.transport import Uri
    from fusemig.succession.fdstore import FdStore

MAX_PENDING: Final = 8
"""Connections that have not become a migration, at once; a migration has a disk, which bounds their number."""
MAX_PENDING_PER_ADDRESS: Final = 4
_ACCEPT_PAUSE_S: Final = 0.01
"""After each connection: a flood has the kernel refuse, and leaves the loop to the guests."""
_BACKLOG: Final = 8
_KEPT: Final = "incoming-"
_OVERLOAD_ERRNOS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
"""What `accept` may fail with without anything being wrong with the listener (as in `trio.serve_listeners`)."""


@asynccontextmanager
async def listening(uri: Uri, store: FdStore | None = None) -> AsyncIterator[Listener]:
    """Listen at ``uri`` for as long as the block runs; port 0 picks a free one, which `Listener.uri` names.

    ``store`` keeps the sockets for a successor of this process, which listens at the same port: whoever connects in
    between waits for it.

    Raises:
        ConnectError: the address is in use or not ours.
    """
    try:
        inherited = [] if store is None else store.take_sockets(_KEPT)
        if inherited:
            sockets = [trio.socket.from_stdlib_socket(one) for one in inherited]
        else:
            sockets = _unix_socket(uri.path) if uri.kind == "unix" else await _tcp_sockets(uri)
            if store is not None:
                store.keep_sockets(_KEPT, sockets)
    except OSError as exc:
        raise ConnectError(f"cannot listen at {uri}: {exc.strerror or exc}; choose another address") from exc
    try:
        if uri.kind == "tcp":
            uri = uri._replace(port=sockets[0].getsockname()[1])
        yield Listener(uri, sockets)
    finally:
        for sock in sockets:
            sock.close()
        if uri.kind == "unix" and (store is None or store.is_last):
            with suppress(FileNotFoundError):
                os.unlink(uri.path)


class Connection:
    """A connection that somebody made to us: pending, until it has shown that it is more than a stranger's."""

    def __init__(self, listener: Listener, stream: SocketStream, origin: str) -> None:
        """Made by `Listener`."""
        self.stream = stream
        self.origin = origin
        """Where it comes from, without a port: an address, or the network that one IPv6 host has to itself."""
        self.scope = trio.CancelScope()
        self._listener = listener

    def settle(self) -> None:
        """Count it among the pending ones no more: it stays, however many come after it; idempotent."""
        self._listener.pending.pop(self, None)


class Listener:
    """Accepts connections, and bounds what strangers can take.

    The accept loop waits for nobody. When too many connections are pending, the oldest one of whoever has most of them
    gives way to the new one: a source shows what it is in milliseconds, so it gets through, and those who wait for
    nothing drive out each other.
    """

    def __init__(self, uri: Uri, sockets: list[trio.socket.SocketType]) -> None:
        """Made by `listening`."""
        self.uri = uri
        self.n_displaced = 0
        """Pending connections that had to give way."""
        self.pending: dict[Connection, None] = {}
        """In the order in which they came."""
        self._sockets = sockets

    async def serve(self, handler: Callable[[Connection], Awaitable[None]]) -> None:
        """Hand each connection to ``handler``, which must not raise `Exception`; runs until cancelled.

        The handler is cancelled where the connection must give way; `Connection.settle` ends that.
        """
        async with trio.open_nursery() as nursery:
            for sock in self._sockets:
                nursery.start_soon(self._accept, sock, handler, nursery)

    async def _accept(
        self,
        listener: trio.socket.SocketType,
        handler: Callable[[Connection], Awaitable[None]],
        nursery: trio.Nursery,
    ) -> None:
        while True:
            try:
                sock, address = await listener.accept()
            except OSError as exc:
                if exc.errno not in _OVERLOAD_ERRNOS and exc.errno != errno.ECONNABORTED:
                    raise
                await trio.sleep(0.1)
                continue
            is_unix = self.uri.kind == "unix"
            peer = f"unix:{self.uri.path}" if is_unix else f"tcp:{address[0]}:{address[1]}"
            try:
                stream = SocketStream(sock, peer)
            except OSError:  # the peer left before its socket could be set up
                sock.close()
                continue
            connection = Connection(self, stream, "" if is_unix else _origin(address[0]))
            self._make_room(connection.origin)
            self.pending[connection] = None
            nursery.start_soon(self._handle, connection, handler)
            await trio.sleep(_ACCEPT_PAUSE_S)

    def _make_room(self, origin: str) -> None:
        counts = Counter(one.origin for one in self.pending)
        if counts[origin] >= MAX_PENDING_PER_ADDRESS:
            crowd = origin
        elif len(self.pending) >= MAX_PENDING:
            crowd = counts.most_common(1)[0][0]
        else:
            return
        oldest = next(one for one in self.pending if one.origin == crowd)
        self.n_displaced += 1
        oldest.settle()
        oldest.scope.cancel()

    async def _handle(self, connection: Connection, handler: Callable[[Connection], Awaitable[None]]) -> None:
        try:
            with connection.scope:
                await handler(connection)
        finally:
            connection.settle()
            with trio.CancelScope(shield=True):
                await connection.stream.aclose()


def _origin(host: str) -> str:
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


async def _tcp_sockets(uri: Uri) -> list[trio.socket.SocketType]:
    listeners = await trio.open_tcp_listeners(uri.port, host=uri.host or "127.0.0.1", backlog=_BACKLOG)
    return [listener.socket for listener in listeners]


def _unix_socket(path: str) -> list[trio.socket.SocketType]:
    with suppress(OSError):
        if stat.S_ISSOCK(os.lstat(path).st_mode) and not _is_listening(path):
            os.unlink(path)
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(sock.fileno(), 0o600)  # the file gets the socket's own mode (Linux, unix_bind)
        # AF_UNIX needs no name resolution, so the underlying bind does not block.
        sock._sock.bind(path)  # type: ignore[attr-defined]  # noqa: SLF001
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return [sock]


def _is_listening(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path) in (0, errno.EAGAIN, errno.EINPROGRESS)
