"""A byte stream over several: what the source sends is cut in pieces for whichever is free, and put together in order.

    NativeLink ─> SplitStream ══ connections ══> JoinedStream ─> NativeLink
                      └────────<── the first ──<──────┘

Whoever sends or receives notices nothing of it (`fusemig.wire.native.stripes` says why it is done at this level). What
the destination says is little, and goes over the first connection. The end of one is the end of all.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import trio

from fusemig.errors import ConnectionLostError
from fusemig.migration.link import first_bytes
from fusemig.net.transport import SHORTLY_S, SocketStream
from fusemig.wire.native.stripes import STRIPE_BYTES, STRIPE_HEAD_SIZE, StripeOrder, encode_stripe

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from fusemig.disk.base import Buffer
    from fusemig.net.transport import ByteStream

_MOMENT_S: Final = 0.02
"""How long `JoinedStream.receive_shortly` waits for what is due."""
_UNSENT_BYTES: Final = 2 * STRIPE_BYTES
"""What a connection may hold that the network did not take yet: more would wait there while others are free."""


class _Bundle:
    """Several connections to one peer."""

    def __init__(self, streams: Sequence[ByteStream]) -> None:
        """Take ``streams`` over; the first one is that of the handshake."""
        self.peer = streams[0].peer
        self._streams = streams
        self._first = streams[0]

    async def aclose(self) -> None:
        """Close them all."""
        for stream in self._streams:
            with trio.CancelScope(shield=True):
                await stream.aclose()
        await trio.lowlevel.checkpoint()


class SplitStream(_Bundle):
    """The source's end: sends over all, receives over the first; a `ByteStream`.

    A piece that was begun is ended before another one begins, so all that was taken is on its way.
    """

    def __init__(self, streams: Sequence[ByteStream]) -> None:
        """Begin a sequence."""
        super().__init__(streams)
        for stream in streams:
            if isinstance(stream, SocketStream):
                stream.limit_unsent(_UNSENT_BYTES)
        self._position = 0
        self._next = 0
        """Where the next piece goes, if it can."""
        self._head = b""
        """What is left of the header of the piece that was begun, and goes to `_next`."""
        self._left = 0
        """And of its bytes."""

    def send_nowait(self, buffers: Sequence[Buffer]) -> int:
        """Send a part of a piece over a connection that takes it (`ByteStream.send_nowait`)."""
        views = [memoryview(buffer) for buffer in buffers]
        if self._is_begun:
            return self._go_on(views, self._streams[self._next].send_nowait)
        # What is short goes over the first: so the others are idle between passes.
        first = self._next if sum(map(len, views)) >= STRIPE_BYTES else 0
        for step in range(len(self._streams)):
            at = (first + step) % len(self._streams)
            try:
                return self._begin(views, at, self._streams[at].send_nowait)
            except trio.WouldBlock:
                if self._is_begun:
                    raise
        raise trio.WouldBlock

    def send_shortly(self, buffers: Sequence[Buffer]) -> int:
        """Send as `send_nowait` does; if no connection is free, wait a moment for the one whose turn it is."""
        try:
            return self.send_nowait(buffers)
        except trio.WouldBlock:
            views, send = [memoryview(buffer) for buffer in buffers], self._streams[self._next].send_shortly
            return self._go_on(views, send) if self._is_begun else self._begin(views, self._next, send)

    @property
    def _is_begun(self) -> bool:
        return bool(self._head or self._left)

    def _begin(self, views: list[memoryview], at: int, send: Callable[[Sequence[Buffer]], int]) -> int:
        """Begin a piece on a connection; nothing is begun if that takes nothing."""
        length = min(STRIPE_BYTES, sum(map(len, views)))
        head = encode_stripe(self._position, length)
        n = send([head, *first_bytes(views, length)])
        self._next, self._head, self._left = at, head[n:], length
        return self._note_sent(n - len(head)) if n > len(head) else self._go_on(views, send)

    def _go_on(self, views: list[memoryview], send: Callable[[Sequence[Buffer]], int]) -> int:
        while self._head:
            n = send([self._head, *first_bytes(views, self._left)])
            n_payload, self._head = n - len(self._head), self._head[n:]
            if n_payload > 0:
                return self._note_sent(n_payload)
        return self._note_sent(send(first_bytes(views, self._left)))

    def _note_sent(self, n_bytes: int) -> int:
        self._position += n_bytes
        self._left -= n_bytes
        if not self._left:
            self._next = (self._next + 1) % len(self._streams)
        return n_bytes

    async def wait_writable(self) -> None:
        """Wait for the connection of the piece that was begun, or for any."""
        if self._head or self._left:
            await self._streams[self._next].wait_writable()
        else:
            await _wait_any(stream.wait_writable for stream in self._streams)

    def receive_nowait(self, buffer: memoryview) -> int:
        """Receive over the first (`ByteStream.receive_nowait`)."""
        return self._first.receive_nowait(buffer)

    def receive_shortly(self, buffer: memoryview) -> int:
        """Receive over the first (`ByteStream.receive_shortly`)."""
        return self._first.receive_shortly(buffer)

    def poll_readable(self, timeout_s: float) -> bool:
        """Wait for the first."""
        return self._first.poll_readable(timeout_s)

    async def wait_readable(self) -> None:
        """Wait for the first."""
        await self._first.wait_readable()


class JoinedStream(_Bundle):
    """The destination's end: receives over all, sends over the first; a `ByteStream`.

    Bytes go from the connection whose turn it is straight to whoever reads; what is ahead of its turn stays with the
    kernel, and holds up its sender.
    """

    def __init__(self, streams: Sequence[ByteStream]) -> None:
        """Begin a sequence."""
        super().__init__(streams)
        self._order = StripeOrder(len(streams))
        self._heads = [b""] * len(streams)
        """What came of the next header on each."""

    def receive_nowait(self, buffer: memoryview) -> int:
        """Receive what is due (`ByteStream.receive_nowait`)."""
        return self._receive(buffer, is_patient=False)

    def receive_shortly(self, buffer: memoryview) -> int:
        """Receive what is due, and wait for moments for more of it (`ByteStream.receive_shortly`)."""
        done = 0
        until = time.monotonic() + SHORTLY_S
        while done < len(buffer):
            try:
                n = self._receive(buffer[done:], is_patient=True)
            except trio.WouldBlock:
                if time.monotonic() < until and self.poll_readable(_MOMENT_S):
                    continue
                if done:
                    break
                raise
            done += n
            if not n or time.monotonic() >= until:
                break
        return done

    def _receive(self, buffer: memoryview, *, is_patient: bool) -> int:
        order = self._order
        if order.turn is None and self._read_heads():
            return 0
        if order.turn is None:
            raise trio.WouldBlock
        stream = self._streams[order.turn]
        part = buffer[: order.left]
        n = stream.receive_shortly(part) if is_patient else stream.receive_nowait(part)
        if not n:
            raise ConnectionLostError(f"{self.peer} closed the connection inside a piece")
        order.advance(n)
        return n

    def _read_heads(self) -> bool:
        """Read headers until it is known whose turn it is, or no more are there; return whether that is the end.

        A stream that has ended ends them all, but not before what is there already on the others. What is still under
        way on them may come too late: nobody ends in order with something unacknowledged.
        """
        has_ended = False
        for at in self._order.unknown():
            scratch = memoryview(bytearray(STRIPE_HEAD_SIZE - len(self._heads[at])))
            try:
                n = self._streams[at].receive_nowait(scratch)
            except trio.WouldBlock:
                continue
            if not n:
                if self._heads[at]:
                    raise ConnectionLostError(f"{self.peer} closed the connection inside a header")
                has_ended = True
                continue
            self._heads[at] += scratch[:n]
            if len(self._heads[at]) == STRIPE_HEAD_SIZE:
                head, self._heads[at] = self._heads[at], b""
                self._order.note_head(at, head)
                if self._order.turn is not None:
                    return False
        return has_ended

    def poll_readable(self, timeout_s: float) -> bool:
        """Wait in this thread for the connection that is due, or for those that may be."""
        if self._order.turn is not None:
            return self._streams[self._order.turn].poll_readable(timeout_s)
        unknown = self._order.unknown()
        return any(self._streams[at].poll_readable(timeout_s / len(unknown)) for at in unknown)

    async def wait_readable(self) -> None:
        """Wait for the connection that is due, or for any that may be."""
        if self._order.turn is not None:
            await self._streams[self._order.turn].wait_readable()
        else:
            await _wait_any(self._streams[at].wait_readable for at in self._order.unknown())

    def send_nowait(self, buffers: Sequence[Buffer]) -> int:
        """Send over the first (`ByteStream.send_nowait`)."""
        return self._first.send_nowait(buffers)

    def send_shortly(self, buffers: Sequence[Buffer]) -> int:
        """Send over the first (`ByteStream.send_shortly`)."""
        return self._first.send_shortly(buffers)

    async def wait_writable(self) -> None:
        """Wait for the first."""
        await self._first.wait_writable()


async def _wait_any(waits: Iterable[Callable[[], Awaitable[None]]]) -> None:
    """Return when the first of them does."""

    async def one(wait: Callable[[], Awaitable[None]]) -> None:
        await wait()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for wait in waits:
            nursery.start_soon(one, wait)
