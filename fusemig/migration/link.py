"""NativeLink: the native wire on a byte stream, and the pool of chunk buffers.

A link is used by several tasks: each whole send is one unit (a lock), receiving belongs to one task at a time.
Receiving may be cancelled between frames and inside them, and goes on where it was. What a send that was cancelled left
of a frame goes before the next message, so that the last word can always be said.

What moves in bulk does not pass through the loop chunk by chunk: `fusemig.migration.sender` and
`fusemig.migration.receiver` run in slices on a worker thread, where a chunk is read, hashed and sent, or received,
checked and written, while it is warm in the cache. A slice comes back with a `Need` when only the loop can go on.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import asynccontextmanager, contextmanager, suppress
from enum import Enum
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from fusemig.core.units import CHUNK_SIZE
from fusemig.errors import ConnectionLostError, FusemigError, MigrationError, RemoteProtocolError
from fusemig.net.transport import SHORTLY_S
from fusemig.wire import native

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
    from typing import Any

    from fusemig.disk.base import Buffer
    from fusemig.net.transport import ByteStream

    Offload = Callable[..., Awaitable[Any]]
    """Runs a call that may sleep, as `trio.to_thread.run_sync` does: a worker thread, or inline in the simulation."""

M = TypeVar("M", bound=native.Message)

HANDSHAKE_DEADLINE_S: Final = 10.0
IDLE_DEADLINE_S: Final = 30.0
"""Without a byte from the peer for this long the connection counts as lost; both sides say something every second."""


MIN_BYTES_PER_S: Final = 4096
"""A frame that takes longer than `IDLE_DEADLINE_S` must come at least this fast: who dribbles holds disks for ever."""


class Pace:
    """Judges whether what is under way comes fast enough; of one task."""

    def __init__(self, peer: str) -> None:
        """``peer`` is named in the error."""
        self._peer = peer
        self._n_done = -1
        self._since = self._checked_at = 0.0
        self._then = 0

    def check(self, n_done: int, n_bytes: int, now: float) -> None:
        """Look before each wait; ``n_done`` counts whole frames, ``n_bytes`` all bytes.

        Raises:
            ConnectionLostError: the present frame is too slow.
        """
        silence_s, self._checked_at = now - self._checked_at, now
        if silence_s > IDLE_DEADLINE_S:  # which the wire allows, or it had been lost by now
            self._since += silence_s
        if n_done != self._n_done or n_bytes == self._then:  # nothing of the next frame has come yet
            self._n_done, self._since, self._then = n_done, now, n_bytes
        elif now - self._since > IDLE_DEADLINE_S and n_bytes - self._then < MIN_BYTES_PER_S * (now - self._since):
            raise ConnectionLostError(
                f"{self._peer} sends less than {MIN_BYTES_PER_S} bytes a second; is the network that slow?"
            )


class Need(Enum):
    """Why a slice of work in a worker thread came back."""

    SLICE = "slice"
    """It has done its share; call it again."""
    STREAM = "stream"
    """The stream is full, or empty."""
    ACKNOWLEDGEMENT = "acknowledgement"
    """The window is full."""
    NOTHING = "nothing"
    """All is done."""


SLICE_BYTES: Final = 32 << 20
"""Disk bytes that one slice moves: long enough that the thread hop does not count, short enough to be cancelled."""
SLICE_S: Final = 1.0
"""How long a slice receives at most, so that a peer cannot keep a thread: between slices `Pace` is judged."""
POLL_S: Final = 0.002
"""How long a slice waits for the next frame by itself, which is cheaper than coming back."""
_MAX_LAST_BYTES: Final = 16 << 20
"""More than a socket holds of what a peer sent before it was gone."""


def drop_sent(buffers: list[memoryview], n: int) -> None:
    """Remove the first ``n`` bytes, which were sent, from ``buffers``."""
    done = 0
    while done < len(buffers) and n >= len(buffers[done]):
        n -= len(buffers[done])
        done += 1
    del buffers[:done]
    if n:
        buffers[0] = buffers[0][n:]


def first_bytes(buffers: list[memoryview], n: int) -> list[memoryview]:
    """Return views of the first ``n`` bytes of ``buffers``, or of all where there are fewer."""
    views = []
    for buffer in buffers:
        if n <= 0:
            break
        views.append(buffer[:n])
        n -= len(buffer)
    return views


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

    def clear(self) -> None:
        """Forget the buffers: the migration is over, and what is known of it is kept for long."""
        self._free.clear()


class NativeLink:
    """Frames over a stream."""

    def __init__(self, stream: ByteStream, decoder: native.Decoder, pool: BufferPool) -> None:
        """Use ``stream``, which the caller closes."""
        self.peer = stream.peer
        self.stream = stream
        self.sending = trio.Lock()
        """Held by whoever sends, from the first byte of a frame to the last."""
        self._decoder = decoder
        self._pool = pool
        self._is_broken = False
        self.aborted: native.Abort | None = None
        """With what the peer has said that it is over; it waits until we close."""
        self._pace = Pace(stream.peer)
        self._n_received = self._n_frames = 0
        self._unsent: list[memoryview] = []
        """The rest of a frame that was sent in part, which goes before whatever is sent next."""

    async def send(self, buffers: Sequence[Buffer]) -> None:
        """Send buffers that together are whole frames.

        Raises:
            ConnectionLostError: the peer is gone or takes nothing, or an earlier frame was cut short.
        """
        async with self.sending:
            self._check_whole()
            before, self._unsent = self._unsent, []
            rest = [*before, *(memoryview(buffer) for buffer in buffers)]
            n_bytes = sum(map(len, rest))
            try:
                while rest:
                    try:
                        drop_sent(rest, self.stream.send_nowait(rest))
                    except trio.WouldBlock:
                        await self.wait_writable()
            finally:
                # Cancelled before the first byte, it was never said; later, the rest goes before what is sent next.
                self._unsent = before if sum(map(len, rest)) == n_bytes else rest

    async def wait_writable(self) -> None:
        """Wait until the stream may take something.

        Raises:
            ConnectionLostError: the peer took nothing for `IDLE_DEADLINE_S`.
        """
        with trio.move_on_after(IDLE_DEADLINE_S) as scope:
            await self.stream.wait_writable()
        if scope.cancelled_caught:
            raise ConnectionLostError(f"{self.peer} took nothing for {IDLE_DEADLINE_S:g} s")

    def try_send(self, frame: bytes) -> bool:
        """Send a small frame if that is possible at once; may be called from any thread that may send.

        Raises:
            ConnectionLostError: the peer is gone.
        """
        if self._unsent or self._is_broken:
            return False
        try:
            n = self.stream.send_nowait([frame])
        except trio.WouldBlock:
            return False
        if n < len(frame):
            self._unsent = [memoryview(frame)[n:]]
        return True

    async def send_message(self, message: native.Message) -> None:
        """Send one control message; raises as `send` does."""
        await self.send([native.encode_message(message)])

    @asynccontextmanager
    async def frame(self) -> AsyncIterator[None]:
        """Guard whole frames, which the block sends itself; one that fails before `end_frame` leaves the link useless.

        Raises:
            ConnectionLostError: an earlier frame was cut short.
        """
        self._check_whole()
        if self._unsent:
            raise self._cut()
        self._is_broken = True
        yield
        self.end_frame()

    def end_frame(self, rest: Sequence[memoryview] = ()) -> None:
        """Say that the frames of the present block are whole, but for ``rest``, although the block may not end."""
        self._unsent += rest
        self._is_broken = False

    def _check_whole(self) -> None:
        if self._is_broken:
            raise self._cut()

    def _cut(self) -> FusemigError:
        return ConnectionLostError(f"connection to {self.peer} was cut inside a frame")

    def receive_nowait(self) -> native.Event:
        """Return the next event; may be called from any thread.

        Raises:
            trio.WouldBlock: it has not come yet, or not all of it; bytes may be there all the same, so the caller goes
                on only after `wait_readable`, which judges the pace, or for `SLICE_S` at most.
            ConnectionLostError: the stream ended or broke.
            RemoteProtocolError: the peer's bytes are wrong.
        """
        return self._receive(self.stream.receive_nowait)

    def receive_shortly(self) -> native.Event:
        """Return the next event, blocking this thread for moments while one is under way; raises as above."""
        return self._receive(self.stream.receive_shortly)

    def _receive(self, receive_in_frame: Callable[[memoryview], int]) -> native.Event:
        decoder = self._decoder
        until = time.monotonic() + SHORTLY_S
        while True:
            if decoder.needs_buffer:
                decoder.give_buffer(self._pool.take())
            receive = self.stream.receive_nowait if decoder.is_between_frames else receive_in_frame
            n = receive(decoder.wanted)
            if not n:
                where = "" if decoder.is_between_frames else " inside a frame"
                raise ConnectionLostError(f"{self.peer} closed the connection{where}")
            self._n_received += n
            event = decoder.advance(n)
            if event is not None:
                self._n_frames += 1
                if isinstance(event, native.Abort):
                    self.aborted = event
                return event
            if time.monotonic() >= until:
                raise trio.WouldBlock

    async def wait_readable(self, deadline_s: float = IDLE_DEADLINE_S) -> None:
        """Wait for bytes from the peer.

        Raises:
            ConnectionLostError: it was silent for ``deadline_s`` seconds, or dribbles.
        """
        self._pace.check(self._n_frames, self._n_received, trio.current_time())
        with trio.move_on_after(deadline_s) as scope:
            await self.stream.wait_readable()
        if scope.cancelled_caught:
            raise ConnectionLostError(f"nothing heard from {self.peer} for {deadline_s:g} s")

    async def receive(self, deadline_s: float = IDLE_DEADLINE_S) -> native.Event:
        """Return the next event; raises what `receive_nowait` and `wait_readable` raise."""
        while True:
            try:
                return self.receive_nowait()
            except trio.WouldBlock:
                await self.wait_readable(deadline_s)

    async def hear_abort(self) -> None:
        """Receive until the peer says that it is over; acknowledgements may come before it. Raises as `receive`."""
        while not isinstance(await self.receive(), native.Abort):
            pass

    def last_word(self) -> native.Abort | None:
        """Return the ABORT that the peer sent before it was gone, if it did; while nobody else receives.

        A peer that says why it ends, and closes with something of ours unread, resets the connection: our next send
        fails, and what it said is still there to be read.
        """
        until = self._n_received + _MAX_LAST_BYTES
        with suppress(trio.WouldBlock, FusemigError):
            while self.aborted is None and self._n_received < until:
                self.receive_nowait()
        return self.aborted

    def aborted_error(self, abort: native.Abort) -> FusemigError:
        """Return what the peer's ABORT means before the hand-off: the migration's end, or only this connection's."""
        reason = f"{self.peer} aborted the migration: {abort.reason}"
        return ConnectionLostError(reason) if abort.is_damaged else MigrationError(reason)

    @contextmanager
    def heard_out(self) -> Iterator[None]:
        """Have the peer's last word be the error of a block that loses the connection."""
        try:
            yield
        except ConnectionLostError as exc:
            if (abort := self.last_word()) is None:
                raise
            raise self.aborted_error(abort) from exc

    async def linger(self, deadline_s: float) -> None:
        """Receive and forget until the peer closes, so that our last message is not lost with what it still sends.

        A socket that is closed with unread bytes resets the connection, and the peer may never see what we said last.
        """
        scratch = memoryview(bytearray(1 << 16))
        with trio.move_on_after(deadline_s):
            while True:
                try:
                    if not self.stream.receive_nowait(scratch):
                        return
                except trio.WouldBlock:
                    await self.stream.wait_readable()

    async def expect(self, message_type: type[M], deadline_s: float) -> M:
        """Return the next message, which must be of this type; acknowledgements of frames may come before it.

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
            if not isinstance(event, native.Ack | native.Journaled):
                raise RemoteProtocolError(
                    f"{self.peer} sent {type(event).__name__} where {message_type.__name__} was due"
                )
