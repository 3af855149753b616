"""The way to the peer: URIs as QEMU writes them, byte streams, connecting. `fusemig.net.listener` is the other side.

    tcp:HOST:PORT     HOST may be a name, an address or an IPv6 address in brackets
    unix:PATH

A `ByteStream` is the seam between the migration and sockets: the tests put memory streams and faults there. Errors of
the operating system become `ConnectError` and `ConnectionLostError` here and nowhere else.
"""

from __future__ import annotations

import ipaddress
import select
import socket
import struct
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import trio

from fusemig.errors import ConfigError, ConnectError, ConnectionLostError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fusemig.disk.base import Buffer
    from fusemig.errors import FusemigError

_UNIX_BUFFER_BYTES: Final = 4 << 20
_MAX_SENDMSG_BUFFERS: Final = 64
_LOW_WATER_BYTES: Final = 256 * 1024
"""A thread that waits for a payload is woken for this much."""
_FIRST_WATER_BYTES: Final = 64 * 1024
"""A thread that waits for whatever comes is woken for this much at once, and after `_FIRST_S` for anything."""
_FIRST_S: Final = 0.001
_MOMENT_S: Final = 0.02
"""How long the ``_shortly`` calls block for the next bytes."""
SHORTLY_S: Final = 0.25
"""And how long at most, however steadily a few bytes come: a thread inside cannot be cancelled."""
_KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4))
"""After 10 s of silence the other host's kernel is asked every 5 s, four times: one that is gone is found in 30 s, one
whose program is merely silent is not."""


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
    """An ordered, two-way stream of bytes; one task or thread sends and one receives at a time.

    The bytes move in calls that may be made from any thread, so that a thread that reads a disk
    can also send what it read. Waiting is for tasks (`wait_writable`, `wait_readable`) or, for moments, for the thread
    itself (``_shortly``, `poll_readable`). Closing waits for nobody: the caller sees to it that no thread is inside.
    """

    peer: str
    """The other end, for people."""

    def send_nowait(self, buffers: Sequence[Buffer]) -> int:
        """Send some of ``buffers``, gathered, and return how many bytes; at least one.

        Raises:
            trio.WouldBlock: the way is full.
            ConnectionLostError: the peer is gone.
        """

    def receive_nowait(self, buffer: memoryview) -> int:
        """Receive at least one byte into ``buffer``; return how many, 0 at the stream's end. Raises likewise."""

    async def wait_writable(self) -> None:
        """Wait until `send_nowait` may take something."""

    async def wait_readable(self) -> None:
        """Wait until `receive_nowait` has something."""

    def send_shortly(self, buffers: Sequence[Buffer]) -> int:
        """Send as `send_nowait` does, but block this thread for moments to send more at once."""

    def receive_shortly(self, buffer: memoryview) -> int:
        """Receive as `receive_nowait` does, but block this thread for moments to fill all of ``buffer``."""

    def poll_readable(self, timeout_s: float) -> bool:
        """Block this thread until something is there, at most ``timeout_s`` seconds; return whether it is."""

    async def aclose(self) -> None:
        """Close; always checkpoints and never raises but `trio.Cancelled`."""


class SocketStream:
    """A `ByteStream` over a connected socket.

    The socket itself blocks, for a moment at most, and the calls that must not block say so: the kernel's own loop
    sends a MiB in one call where a non-blocking socket takes it in four. To be woken costs a virtual machine as much as
    to copy, so a thread that waits is woken for a quarter of a MiB and not for every segment (SO_RCVLOWAT; one
    MSG_WAITALL for a whole payload is woken for every segment, and took three times as long).
    """

    def __init__(self, sock: trio.socket.SocketType, peer: str) -> None:
        """Take ``sock`` over; it must not be used any more."""
        self.peer = peer
        self._socket = socket.socket(fileno=sock.detach())
        self._socket.setblocking(True)
        moment = struct.pack("ll", 0, int(_MOMENT_S * 1e6))  # struct timeval
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, moment)
        self._low_water = 1
        """SO_RCVLOWAT as it is now."""
        self._readable = select.poll()
        self._readable.register(self._socket, select.POLLIN)
        if self._socket.family == socket.AF_UNIX:
            with suppress(OSError):
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_BUFFER_BYTES)
        else:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                self._socket.setsockopt(socket.IPPROTO_TCP, option, value)
            if _is_within_host(self._socket):
                # Where there is no network there is none to be paced for: BBR's timers cost a third of the rate.
                with suppress(OSError):
                    self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")

    def send_nowait(self, buffers: Sequence[Buffer]) -> int:
        """Send what fits (`ByteStream.send_nowait`)."""
        return self._send(buffers, socket.MSG_DONTWAIT)

    def send_shortly(self, buffers: Sequence[Buffer]) -> int:
        """Send what fits now or in a moment (`ByteStream.send_shortly`)."""
        return self._send(buffers, 0)

    def _send(self, buffers: Sequence[Buffer], flags: int) -> int:
        try:
            return self._socket.sendmsg(buffers[:_MAX_SENDMSG_BUFFERS], (), flags)
        except BlockingIOError as exc:
            raise trio.WouldBlock from exc
        except OSError as exc:
            raise self._lost(exc) from exc

    def receive_nowait(self, buffer: memoryview) -> int:
        """Receive what is there (`ByteStream.receive_nowait`)."""
        try:
            return self._socket.recv_into(buffer, 0, socket.MSG_DONTWAIT)
        except BlockingIOError as exc:
            raise trio.WouldBlock from exc
        except OSError as exc:
            raise self._lost(exc) from exc

    def receive_shortly(self, buffer: memoryview) -> int:
        """Receive what is there or comes in a moment, until ``buffer`` is full (`ByteStream.receive_shortly`)."""
        done, length = 0, len(buffer)
        until = time.monotonic() + SHORTLY_S
        while True:
            try:
                n = self.receive_nowait(buffer[done:] if done else buffer)
            except trio.WouldBlock:
                if self._poll(_MOMENT_S, min(length - done, _LOW_WATER_BYTES)):
                    continue
                if done:
                    return done
                raise
            done += n
            if not n or done == length or time.monotonic() >= until:
                return done

    def poll_readable(self, timeout_s: float) -> bool:
        """Wait in this thread; an error counts as ready, the next call reports it."""
        return self._poll(min(timeout_s, _FIRST_S), _FIRST_WATER_BYTES) or self._poll(timeout_s - _FIRST_S, 1)

    def _poll(self, timeout_s: float, low_water: int) -> bool:
        self._wake_at(low_water)
        return bool(self._readable.poll(max(0.0, timeout_s * 1000)))

    def _wake_at(self, low_water: int) -> None:
        if low_water != self._low_water:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, low_water)
            self._low_water = low_water

    async def wait_writable(self) -> None:
        """Wait in the loop."""
        await trio.lowlevel.wait_writable(self._socket)

    async def wait_readable(self) -> None:
        """Wait in the loop."""
        self._wake_at(1)
        await trio.lowlevel.wait_readable(self._socket)

    @property
    def is_private(self) -> bool:
        """Whether nobody but this host's users can be at the other end: a UNIX socket, or a loopback address."""
        return self._socket.family == socket.AF_UNIX or is_loopback(self._socket.getpeername()[0])

    async def peek_byte(self) -> int:
        """Return the next byte and leave it to be received.

        Raises:
            ConnectionLostError: none came before the end.
        """
        while True:
            try:
                byte = self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except BlockingIOError:
                await self.wait_readable()
                continue
            except OSError as exc:
                raise self._lost(exc) from exc
            if not byte:
                raise ConnectionLostError(f"{self.peer} closed the connection")
            return byte[0]

    def limit_unsent(self, n_bytes: int) -> None:
        """Count as writable only while less than this waits for the network (TCP_NOTSENT_LOWAT); for TCP only."""
        if self._socket.family != socket.AF_UNIX:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, n_bytes)

    def detach(self) -> socket.socket:
        """Give the socket away; only `aclose` may follow."""
        self._wake_at(1)
        return socket.socket(fileno=self._socket.detach())

    async def aclose(self) -> None:
        """Close the socket, if it is still ours; idempotent."""
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()
        await trio.lowlevel.checkpoint()

    def _lost(self, exc: OSError) -> FusemigError:
        return ConnectionLostError(f"connection to {self.peer} lost: {exc.strerror or exc}")


def is_loopback(host: str) -> bool:
    """Tell whether ``host`` is an address that never leaves this host."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (address if mapped is None else mapped).is_loopback


def is_private(uri: Uri) -> bool:
    """Tell, as it is written, whether nobody but this host's users can be there; no name but ``localhost`` says so."""
    return uri.kind == "unix" or uri.host in ("", "localhost") or is_loopback(uri.host)


def _is_within_host(sock: socket.socket) -> bool:
    """Tell whether both ends of a TCP connection are on this host."""
    try:
        ours, theirs = (
            ipaddress.ip_address(address[0].partition("%")[0]) for address in (sock.getsockname(), sock.getpeername())
        )
    except (OSError, ValueError):
        return False
    return theirs.is_loopback or theirs == ours


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
        raise ConnectError(
            f"cannot connect to {uri}: {_reason(exc)}; is `fusemig serve --incoming {uri}` running there?"
        ) from exc
    return SocketStream(sock, str(uri))


def _reason(exc: BaseException) -> str:
    """Return the operating system's own words, which trio wraps: one error for each address that it tried."""
    while not (isinstance(exc, OSError) and exc.strerror):
        if isinstance(exc, BaseExceptionGroup):
            exc = exc.exceptions[0]
        elif exc.__cause__ is not None:
            exc = exc.__cause__
        else:
            return str(exc)
    return exc.strerror
