"""NativeLink: the native wire on a byte stream, and the pool of chunk buffers.

A link is used by several tasks: each whole send is one unit (a lock), receiving belongs to one task at a time.
Receiving may be cancelled between frames and inside them, and goes on where it was; a send that is cancelled leaves
half a frame behind, so the link then refuses to send again.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from fusemig.errors import ConnectionLostError, MigrationError, RemoteProtocolError
from fusemig.units import CHUNK_SIZE
from fusemig.wire import native

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from typing import Any

    from fusemig.disk.base import Buffer
    from fusemig.transport import ByteStream

    Offload = Callable[..., Awaitable[Any]]
    """Runs a call that may sleep: a worker thread, or inline in the simulation."""

M = TypeVar("M", bound=native.Message)

HANDSHAKE_DEADLINE_S: Final = 10.0
IDLE_DEADLINE_S: Final = 30.0
"""Without a byte from the peer for this long the connection counts as lost; both sides say something every second."""


class BufferPool:
    """Chunk-sized buffers, the warmest first; safe to use from any thread.

    It never refuses: what bounds the number of buffers is the queues that they travel through.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._free: deque[bytearray] = deque()

    def take(self) -> bytearray:
        """Return a buffer of one chunk, with any content."""
        try:
            return self._free.pop()
        except IndexError:
            return bytearray(CHUNK_SIZE)

    def give_back(self, buffer: bytearray) -> None:
        """Return a buffer that nothing refers to any more."""
        self._free.append(buffer)


class NativeLink:
    """Frames over a stream."""

    def __init__(self, stream: ByteStream, decoder: native.Decoder, pool: BufferPool) -> None:
        """Use ``stream``, which the caller closes."""
        self.peer = stream.peer
        self._stream = stream
        self._decoder = decoder
        self._pool = pool
        self._send_lock = trio.Lock()
        self._is_broken = False

    async def send(self, buffers: Sequence[Buffer]) -> None:
        """Send buffers that together are whole frames.

        Raises:
            ConnectionLostError: the peer is gone, or an earlier send was cut short.
        """
        async with self._send_lock:
            if self._is_broken:
                raise ConnectionLostError(f"connection to {self.peer} was cut inside a frame")
            self._is_broken = True
            await self._stream.send(buffers)
            self._is_broken = False

    async def send_message(self, message: native.Message) -> None:
        """Send one control message; raises as `send` does."""
        await self.send([native.encode_message(message)])

    async def receive(self, deadline_s: float = IDLE_DEADLINE_S) -> native.Event:
        """Return the next event.

        Raises:
            ConnectionLostError: the stream ended, broke, or was silent for ``deadline_s`` seconds.
            RemoteProtocolError: the peer's bytes are wrong.
        """
        decoder = self._decoder
        while True:
            if decoder.needs_buffer:
                decoder.give_buffer(self._pool.take())
            with trio.move_on_after(deadline_s) as scope:
                n = await self._stream.receive_into(decoder.wanted)
            if scope.cancelled_caught:
                raise ConnectionLostError(f"nothing heard from {self.peer} for {deadline_s:g} s")
            if not n:
                where = "" if decoder.is_between_frames else " inside a frame"
                raise ConnectionLostError(f"{self.peer} closed the connection{where}")
            event = decoder.advance(n)
            if event is not None:
                return event

    async def expect(self, message_type: type[M], deadline_s: float) -> M:
        """Return the next message, which must be of this type; acknowledgements may come before it.

        Raises:
            MigrationError: the peer aborted, with its reason.
            RemoteProtocolError: it sent something else.
            ConnectionLostError: as `receive`.
        """
        while True:
            event = await self.receive(deadline_s)
            if isinstance(event, message_type):
                return event
            if isinstance(event, native.Abort):
                raise MigrationError(f"{self.peer} aborted the migration: {event.reason}")
            if not isinstance(event, native.Ack):
                raise RemoteProtocolError(
                    f"{self.peer} sent {type(event).__name__} where {message_type.__name__} was due"
                )
