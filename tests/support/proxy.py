"""A TCP proxy between two daemons that knows frames and spoils one of them.

It reads the native wire's framing from its description alone (`fusemig.wire.native`, module docstring). Nothing is left
to timing: a fault strikes at the nth frame of a type after `arm`, and a cut is a clean end of both streams, after
which whatever the peers still send is taken and thrown away.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
from contextlib import suppress
from enum import Enum, auto
from typing import TYPE_CHECKING, Self

from fusemig.wire.native import HEADER_SIZE, PREFACE, FrameType

if TYPE_CHECKING:
    from types import TracebackType

DEADLINE_S = 60.0


class Fault(Enum):
    """What happens to the frame."""

    CUT = auto()
    """Half of it arrives, then both streams end."""
    LOSE = auto()
    """Nothing of it arrives; both streams end."""
    FLIP = auto()
    """One bit of its payload arrives wrong, or of its sequence number where it has no payload."""
    STALL = auto()
    """It never arrives, and nothing after it; the streams stay open."""


class FaultProxy:
    """Forwards connections to a target until a fault strikes; a context manager."""

    def __init__(self, target: str, seed: int = 1) -> None:
        """Forward to ``target``, a ``tcp:`` URI; ``seed`` chooses the bit that is flipped."""
        host, port = target.removeprefix("tcp:").rsplit(":", 1)
        self._target = (host, int(port))
        self._random = random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"
        self.struck = threading.Event()
        """Set when the fault has struck."""
        self._lock = threading.Lock()
        self._armed: tuple[FrameType, Fault] | None = None
        self._left = 0
        self._bars = False
        self.is_barred = False
        """Whether new connections are closed at once."""
        self._closing = threading.Event()
        self._sockets: list[socket.socket] = [self._listener]
        self._threads: list[threading.Thread] = []

    def arm(self, frame: FrameType, fault: Fault, nth: int = 1, *, bars: bool = False) -> None:
        """Have ``fault`` strike at the ``nth`` frame of this type from now on, once; then perhaps ``bars`` the way."""
        with self._lock:
            self._armed, self._left, self._bars = (frame, fault), nth, bars
            self.struck.clear()

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every connection; idempotent."""
        self._closing.set()
        for sock in list(self._sockets):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join(DEADLINE_S)
        for sock in self._sockets:
            sock.close()

    def _start(self, function: object, *arguments: object) -> None:
        assert callable(function)
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(near)
            if self.is_barred:
                near.shutdown(socket.SHUT_RDWR)
                continue
            far = socket.create_connection(self._target, DEADLINE_S)
            far.settimeout(None)
            self._sockets.append(far)
            connection = _Connection(near, far)
            self._start(self._pump, connection, near, far, len(PREFACE))
            self._start(self._pump, connection, far, near, 0)

    def _pump(self, connection: _Connection, come: socket.socket, go: socket.socket, preface: int) -> None:
        try:
            _send(connection, go, _receive(come, preface))
            while True:
                head = _receive(come, HEADER_SIZE)
                kind, n_extents = FrameType(head[2]), struct.unpack_from(">H", head, 6)[0]
                rest = 16 * max(0, n_extents - 1) + struct.unpack_from(">I", head, 32)[0]
                frame = head + _receive(come, rest)
                fault = self._fault_of(kind)
                if fault is None:
                    _send(connection, go, frame)
                else:
                    self._strike(connection, go, frame, fault)
        except (OSError, EOFError):
            # One side has ended: so does the other, as on a wire.
            with suppress(OSError):
                go.shutdown(socket.SHUT_WR)

    def _fault_of(self, kind: FrameType) -> Fault | None:
        with self._lock:
            if self._armed is None or self._armed[0] is not kind:
                return None
            self._left -= 1
            if self._left:
                return None
            fault = self._armed[1]
            self._armed = None
            self.is_barred = self.is_barred or self._bars
            return fault

    def _strike(self, connection: _Connection, go: socket.socket, frame: bytes, fault: Fault) -> None:
        match fault:
            case Fault.FLIP:
                spoiled = bytearray(frame)
                # Not of its lengths: what a wrong length costs is a wait for bytes that never come.
                where = range(HEADER_SIZE, len(frame)) if len(frame) > HEADER_SIZE else range(8, 16)
                spoiled[self._random.choice(where)] ^= 1 << self._random.randrange(8)
                _send(connection, go, bytes(spoiled))
                self.struck.set()
            case Fault.STALL:
                self.struck.set()
                self._closing.wait(DEADLINE_S)
                raise EOFError
            case Fault.CUT | Fault.LOSE:
                if fault is Fault.CUT:
                    _send(connection, go, frame[: len(frame) // 2])
                with connection.lock:
                    connection.is_cut = True
                    for sock in connection.near, connection.far:
                        with suppress(OSError):
                            sock.shutdown(socket.SHUT_WR)
                self.struck.set()


class _Connection:
    """Both sockets of a forwarded connection."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.near = near
        self.far = far
        self.lock = threading.Lock()
        self.is_cut = False


def _send(connection: _Connection, sock: socket.socket, data: bytes) -> None:
    """Send whole frames, so that a cut of one direction is never inside a frame of the other."""
    # Small frames (everything that the destination says) under the lock; a bulk frame may wait for its reader.
    if len(data) <= 4096:
        with connection.lock:
            if not connection.is_cut:
                sock.sendall(data)
    elif not connection.is_cut:
        sock.sendall(data)


def _receive(sock: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        part = sock.recv(min(1 << 20, length - len(data)))
        if not part:
            raise EOFError
        data += part
    return bytes(data)
