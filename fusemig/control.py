"""The control socket: a QMP server on a UNIX socket, which knows no command but those about itself.

The daemon hands in a table of commands and an `EventHub`; this module does the talking. Tasks, for each client: a
*reader* that takes requests and runs them one after the other, and a *writer* that sends what lies in the client's
outbox (replies and events, in the order in which they came about).

Rules:

1. No client can hold up the daemon or another client. A client that leaves `MAX_UNSENT_REPLIES` replies unread has no
   further command run; one that leaves no room for an event in its outbox, or a line unread for `SEND_DEADLINE_S`, is
   dropped.
2. A command that was begun is finished, also when its client has gone; only the end of the server cancels it.
3. A failing command costs its client nothing: `FusemigError` becomes an error reply with its text, anything else one
   that points to the log. QMP's error class comes from `CommandError`, and is GenericError otherwise.
4. Before ``qmp_capabilities`` a client gets no event and may give no other command.
5. The socket has mode 0600 before anyone can connect to it, and only root and our own user may talk.
6. A socket file is replaced only while nobody listens on it, and removed at the end only if it is still ours.
7. Where the daemon has successors (`fusemig.succession`) they inherit the socket and its file: a client that connects
   in between waits.
"""

from __future__ import annotations

import errno
import fcntl
import inspect
import os
import socket
import stat
import struct
import time
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec
import structlog
import trio

from fusemig import __version__
from fusemig.errors import ConfigError, ConnectError, FusemigError, RemoteProtocolError
from fusemig.qmp import codec, introspection, schema
from fusemig.qmp.check import check_arguments
from fusemig.qmp.seeing import RecentEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from fusemig.qmp.codec import ErrorClass, Request
    from fusemig.succession.fdstore import FdStore

SEND_DEADLINE_S: Final = 10.0
"""A client that does not take a whole line in this time is dropped."""

FLUSH_DEADLINE_S: Final = 1.0
"""How long the end of the server waits for what clients have not taken yet."""

OUTBOX_LINES: Final = 256
"""Lines that may wait for a client; a migration sends a few events for each pass."""

MAX_UNSENT_REPLIES: Final = 16
"""Far below `OUTBOX_LINES`, so that a client which sends many commands at once still has room for events."""

MAX_CLIENTS: Final = 64

RECENT_EVENTS: Final = 32
"""Kept for who looks later; a migration has a few for each pass."""

_KEPT: Final = "control-"
_RECEIVE_BYTES: Final = 65536
_LOCK_DEADLINE_S: Final = 5.0
_UCRED: Final = struct.Struct("3i")  # pid, uid, gid: struct ucred of SO_PEERCRED, unix(7)
_NEGOTIATE: Final = "qmp_capabilities"
_OWN_COMMANDS: Final = frozenset({_NEGOTIATE, "query-version", "query-commands", "query-events", "query-qmp-schema"})

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class CommandError(FusemigError):
    """A command was refused with a QMP error class of its own."""

    def __init__(self, desc: str, error_class: ErrorClass = "GenericError") -> None:
        """Say what is wrong and what to do next."""
        super().__init__(desc)
        self.error_class: ErrorClass = error_class


class CommandNotFoundError(CommandError):
    """There is no such command, or not now."""

    def __init__(self, desc: str) -> None:
        """Say which."""
        super().__init__(desc, "CommandNotFound")


class DeviceNotFoundError(CommandError):
    """There is no such disk."""

    kind = "usage"

    def __init__(self, name: str, served: Iterable[str]) -> None:
        """Name it, in QEMU's words, and those that there are."""
        super().__init__(f"Device '{name}' not found; served are: {', '.join(sorted(served))}", "DeviceNotFound")


@dataclass(frozen=True)
class Session:
    """Who gave a command."""

    number: int
    """Counts the clients of this server."""
    pid: int
    uid: int


@dataclass(frozen=True)
class Command:
    """A command of the daemon's.

    ``run`` is called with the session and the checked arguments and returns a struct, a dict, a list or None (``{}``),
    or an awaitable of one. It need not trust anything but the types of its arguments.
    """

    arguments: type[schema.Arguments]
    run: Callable[[Session, Any], Any]


class EventHub:
    """Takes events from the daemon and gives them, as lines, to every client that listens."""

    def __init__(self, are_migration_events_on: Callable[[], bool]) -> None:
        """``are_migration_events_on`` tells whether the migration capability ``events`` is on."""
        self._are_migration_events_on = are_migration_events_on
        self._listeners: dict[object, Callable[[bytes], None]] = {}
        self._recent: deque[RecentEvent] = deque(maxlen=RECENT_EVENTS)
        self._n_events = 0

    @property
    def recent(self) -> list[RecentEvent]:
        """The last events, oldest first, for whoever was not there to hear them."""
        return list(self._recent)

    def emit(self, name: str, data: schema.Result | Mapping[str, Any] | None = None) -> None:
        """Send an event to all; never blocks. Only from the trio thread."""
        assert name in schema.EVENTS, f"{name} is not in schema.EVENTS"
        self._n_events += 1
        members = {} if data is None else msgspec.to_builtins(data)
        text = ", ".join(f"{key} {value}" for key, value in members.items() if value is not False)
        if name == "MIGRATION_PASS" and self._recent and self._recent[-1].event == name:
            self._recent.pop()  # while a migration waits at pre-switchover there are ten a second
        self._recent.append(RecentEvent(number=self._n_events, at=time.time_ns() // 1_000_000, event=name, text=text))
        if name in schema.MIGRATION_EVENTS and not self._are_migration_events_on():
            return
        line = codec.encode_event(name, data, time.time_ns())
        for listener in list(self._listeners.values()):
            listener(line)

    @contextmanager
    def listen(self, listener: Callable[[bytes], None]) -> Iterator[None]:
        """Have ``listener`` called with each event's line; it must neither block nor raise."""
        key = object()
        self._listeners[key] = listener
        try:
            yield
        finally:
            del self._listeners[key]


async def serve_control(
    path: Path,
    commands: Mapping[str, Command],
    events: EventHub,
    store: FdStore | None = None,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the control socket until cancelled; ``store`` keeps it for a successor.

    Cancellation: running commands are cancelled, what clients were sent before is given `FLUSH_DEADLINE_S` to arrive,
    and the socket file is removed.

    Raises:
        ConfigError: the path cannot be a socket.
        ConnectError: another process serves it, or it cannot be made.
    """
    assert not _OWN_COMMANDS & commands.keys(), "these commands are the server's"
    listener, identity = await _listen(path, store)
    try:
        server = _Server(commands, events)
        async with trio.open_nursery() as nursery:
            task_status.started()
            await trio.serve_listeners(server.serve_client, [listener], handler_nursery=nursery)
    finally:
        listener.socket.close()
        if store is None or store.is_last:
            _unlink_if_ours(path, identity)


class _Server:
    """What all clients of one control socket share."""

    def __init__(self, commands: Mapping[str, Command], events: EventHub) -> None:
        self.events = events
        self._n_clients = 0
        self._last_number = 0
        self.commands = {
            **commands,
            "query-version": Command(schema.NoArguments, lambda *_: codec.version(__version__)),
            "query-commands": Command(schema.NoArguments, self._query_commands),
            "query-events": Command(schema.NoArguments, lambda *_: [schema.Name(name=name) for name in schema.EVENTS]),
            "query-qmp-schema": Command(schema.NoArguments, lambda *_: introspection.describe(self._names())),
        }

    def _names(self) -> list[str]:
        return sorted({_NEGOTIATE, *self.commands})

    def _query_commands(self, _session: Session, _arguments: schema.NoArguments) -> list[schema.Name]:
        return [schema.Name(name=name) for name in self._names()]

    async def serve_client(self, stream: trio.SocketStream) -> None:
        """Serve one client to its end; nothing that it does ends the server."""
        async with stream:
            pid, uid, _gid = _UCRED.unpack(stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
            if uid not in (0, os.geteuid()):
                log.warning("control.client_refused", pid=pid, uid=uid, reason="another user")
                return
            if self._n_clients >= MAX_CLIENTS:
                log.warning("control.client_refused", pid=pid, uid=uid, reason="too many clients")
                return
            self._n_clients += 1
            self._last_number += 1
            try:
                await _Client(self, stream, Session(self._last_number, pid, uid)).serve()
            finally:
                self._n_clients -= 1


class _Client:
    """One connection.

    Owned by the reader: ``_parser``, ``_is_negotiated``. The outbox is filled by the reader and by `EventHub.emit`
    and emptied by the writer. Dropping the client ends the writer and the connection, never a running command.
    """

    def __init__(self, server: _Server, stream: trio.SocketStream, session: Session) -> None:
        self._server = server
        self._stream = stream
        self._session = session
        self._log = log.bind(client=session.number, pid=session.pid)
        self._parser = codec.RequestParser()
        self._is_negotiated = False
        self._outbox, self._to_send = trio.open_memory_channel[tuple[bytes, bool]](OUTBOX_LINES)  # line, is a reply
        self._unsent, self._sent = trio.open_memory_channel[None](MAX_UNSENT_REPLIES)  # holds a None for each reply
        self._is_dropped = False
        self._writer_scope = trio.CancelScope(shield=True)

    async def serve(self) -> None:
        """Talk until the client has gone or is dropped."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write)
            try:
                with self._outbox, self._unsent, self._server.events.listen(self._offer):
                    self._put(codec.encode_greeting(__version__), is_reply=False)
                    await self._read()
            except trio.Cancelled:
                # The writer is shielded, so that the reply to `quit` and the last events still arrive.
                self._writer_scope.deadline = trio.current_time() + FLUSH_DEADLINE_S
                raise

    def _drop(self, reason: str) -> None:
        """Give the client up at once."""
        if self._is_dropped:
            return
        self._log.warning("control.client_dropped", reason=reason)
        self._is_dropped = True
        self._writer_scope.cancel()
        with suppress(OSError):  # it may have gone by itself
            self._stream.socket.shutdown(trio.socket.SHUT_RDWR)  # the reader sees the end

    def _offer(self, line: bytes) -> None:
        """Send an event's line, if the client has come so far."""
        if self._is_negotiated:
            self._put(line, is_reply=False)

    def _put(self, line: bytes, *, is_reply: bool) -> None:
        if self._is_dropped:
            return
        try:
            self._outbox.send_nowait((line, is_reply))
        except trio.WouldBlock:
            self._drop("it does not read its events")

    async def _reply(self, line: bytes) -> None:
        # First put, then wait: the command may have asked for the end of the server, and is still answered.
        self._put(line, is_reply=True)
        with suppress(trio.BrokenResourceError):  # the writer has ended: dropped
            await self._unsent.send(None)

    async def _write(self) -> None:
        is_gone = False  # then what the client has asked for is still done, and the outbox kept empty
        with self._writer_scope, self._to_send, self._sent:
            async for line, is_reply in self._to_send:
                try:
                    if not is_gone:
                        with trio.fail_after(SEND_DEADLINE_S):
                            await self._stream.send_all(line)
                except trio.TooSlowError:
                    self._drop("it takes nothing")
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    is_gone = True
                if is_reply:
                    with suppress(trio.EndOfChannel):  # the reader has ended
                        await self._sent.receive()

    async def _read(self) -> None:
        while True:
            try:
                data = await self._stream.receive_some(_RECEIVE_BYTES)
            except trio.BrokenResourceError:
                return
            if not data:
                return
            self._parser.receive(bytes(data))
            try:
                while (request := self._parser.next_request()) is not None:
                    if isinstance(request, codec.BadRequest):
                        await self._reply(codec.encode_error("GenericError", request.desc, request.id))
                    else:
                        await self._reply(await self._execute(request))
                    if self._is_dropped:
                        return
                    await trio.lowlevel.checkpoint_if_cancelled()
            except RemoteProtocolError as error:
                self._log.warning("control.client_closed", reason=str(error))
                await self._reply(codec.encode_error("GenericError", f"{error}; closing"))
                return

    async def _execute(self, request: Request) -> bytes:
        """Run a command and return its reply; raises nothing but trio's cancellation."""
        try:
            result = await self._run(request)
            return codec.encode_return(result, request.id)
        except FusemigError as error:
            error_class: ErrorClass = error.error_class if isinstance(error, CommandError) else "GenericError"
            return codec.encode_error(error_class, str(error), request.id, kind=error.kind)
        except Exception:
            self._log.exception("control.command_crashed", command=request.execute)
            desc = f"'{request.execute}' failed because of a bug in fusemig; the daemon's log has the details"
            return codec.encode_error("GenericError", desc, request.id)

    async def _run(self, request: Request) -> Any:
        if request.execute == _NEGOTIATE:
            return self._negotiate(request)
        if not self._is_negotiated:
            raise CommandNotFoundError(f"Expecting capabilities negotiation with '{_NEGOTIATE}'")
        command = self._server.commands.get(request.execute)
        if command is None:
            raise CommandNotFoundError(f"The command {request.execute} has not been found")
        arguments = check_arguments(command.arguments, request.arguments)
        self._log.debug("control.command", command=request.execute)
        result = command.run(self._session, arguments)
        return await result if inspect.isawaitable(result) else result

    def _negotiate(self, request: Request) -> None:
        if self._is_negotiated:
            raise CommandNotFoundError("Capabilities negotiation is already complete, command ignored")
        for name in check_arguments(schema.QmpCapabilities, request.arguments).enable:
            raise CommandError(f"Capability {name} not available")
        self._is_negotiated = True


async def _listen(path: Path, store: FdStore | None) -> tuple[trio.SocketListener, tuple[int, int]]:
    """Make the socket, or take a predecessor's; return it with the device and inode of its file."""
    for inherited in () if store is None else store.take_sockets(_KEPT):
        if inherited.getsockname() == os.fspath(path) and (identity := _identity(path)):
            return trio.SocketListener(trio.socket.from_stdlib_socket(inherited)), identity
        inherited.close()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        async with _DirectoryLock(path.parent):
            identity = _bind(sock, path)
        if store is not None:
            store.keep_sockets(_KEPT, [sock])
        return trio.SocketListener(trio.socket.from_stdlib_socket(sock)), identity
    except BaseException as error:
        sock.close()
        if isinstance(error, OSError):
            if str(error) == "AF_UNIX path too long":
                raise ConfigError(f"control socket '{path}': the path is too long, 107 bytes is the most") from error
            raise ConnectError(f"control socket '{path}' cannot be made: {error.strerror or error}") from error
        raise


def _identity(path: Path) -> tuple[int, int] | None:
    """Return the device and inode of a socket's file, None if there is none."""
    with suppress(OSError):
        status = path.lstat()
        if stat.S_ISSOCK(status.st_mode):
            return status.st_dev, status.st_ino
    return None


def _bind(sock: socket.socket, path: Path) -> tuple[int, int]:
    _remove_stale(path)
    os.fchmod(sock.fileno(), 0o600)  # the file gets the socket's own mode (Linux, unix_bind)
    sock.bind(os.fspath(path))
    status = path.lstat()
    sock.listen(MAX_CLIENTS)
    return status.st_dev, status.st_ino


class _DirectoryLock:
    """Keeps two daemons from replacing the same stale socket: the second would unlink the first one's new one."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._fd = -1

    async def __aenter__(self) -> None:
        self._fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with trio.fail_after(_LOCK_DEADLINE_S):
                while not self._try_lock():  # noqa: ASYNC110  (the kernel tells nobody)
                    await trio.sleep(0.01)
        except trio.TooSlowError:
            os.close(self._fd)
            raise ConnectError(f"'{self._directory}' is locked by another process: put the socket elsewhere") from None
        except BaseException:
            os.close(self._fd)
            raise

    def _try_lock(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    async def __aexit__(self, *_: object) -> None:
        os.close(self._fd)


def _remove_stale(path: Path) -> None:
    """Remove a socket file on which nobody listens.

    Raises:
        ConfigError: it is no socket.
        ConnectError: somebody listens.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"control socket '{path}' exists and is no socket: choose another path, or remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        reply = probe.connect_ex(os.fspath(path))
    if reply == errno.ECONNREFUSED:
        log.info("control.stale_socket_removed", path=os.fspath(path))
        path.unlink(missing_ok=True)
    elif reply != errno.ENOENT:
        detail = "" if reply in (0, errno.EAGAIN) else f" ({os.strerror(reply)})"
        raise ConnectError(f"control socket '{path}' is in use{detail}: stop the daemon there, or choose another path")


def _unlink_if_ours(path: Path, identity: tuple[int, int]) -> None:
    try:
        status = path.lstat()
        if (status.st_dev, status.st_ino) == identity:
            path.unlink()
    except OSError as error:
        log.warning("control.socket_not_removed", path=os.fspath(path), error=str(error))
