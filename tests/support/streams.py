"""Byte streams in memory, which can be told to break."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from fusemig.errors import ConnectionLostError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fusemig.disk.base import Buffer

CAPACITY = 4 << 20


class Pipe:
    """One direction: what was sent and not received, at most about `CAPACITY` bytes."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.is_closed = False
        self.changed = trio.Event()

    def note(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


class MemoryStream:
    """One end of a connection in memory, with a bounded buffer as a socket has."""

    def __init__(self, peer: str, outgoing: Pipe, incoming: Pipe) -> None:
        self.peer = peer
        self.sent_bytes = 0
        self.on_send: Callable[[bytes], bytes | None] = lambda data: data
        """Called with each piece before it is sent; may change it, or return None to cut the connection."""
        self._outgoing = outgoing
        self._incoming = incoming

    def send_nowait(self, buffers: Sequence[Buffer]) -> int:
        self._check_open(self._outgoing)
        if len(self._outgoing.data) >= CAPACITY:
            raise trio.WouldBlock
        piece = bytes(buffers[0])
        data = self.on_send(piece)
        if data is None:
            self.close()
            raise ConnectionLostError(f"connection to {self.peer} lost: cut by the test")
        self._outgoing.data += data
        self._outgoing.note()
        self.sent_bytes += len(data)
        return len(piece)

    def receive_nowait(self, buffer: memoryview) -> int:
        data = self._incoming.data
        if not data:
            if self._incoming.is_closed:
                return 0
            raise trio.WouldBlock
        n = min(len(buffer), len(data))
        buffer[:n] = data[:n]
        del data[:n]
        self._incoming.note()
        return n

    async def wait_writable(self) -> None:
        while len(self._outgoing.data) >= CAPACITY and not self._outgoing.is_closed:
            await self._outgoing.changed.wait()
        await trio.lowlevel.checkpoint()

    async def wait_readable(self) -> None:
        while not self._incoming.data and not self._incoming.is_closed:
            await self._incoming.changed.wait()
        await trio.lowlevel.checkpoint()

    def send_shortly(self, buffers: Sequence[Buffer]) -> int:
        """Do not wait: nothing changes while the one thread of a simulation does."""
        return self.send_nowait(buffers)

    def receive_shortly(self, buffer: memoryview) -> int:
        """Do not wait, as above."""
        return self.receive_nowait(buffer)

    def poll_readable(self, timeout_s: float) -> bool:
        """Say no, as above."""
        return False

    def close(self) -> None:
        for pipe in (self._outgoing, self._incoming):
            pipe.is_closed = True
            pipe.note()

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()

    def _check_open(self, pipe: Pipe) -> None:
        if pipe.is_closed:
            raise ConnectionLostError(f"connection to {self.peer} lost")


def memory_connection() -> tuple[MemoryStream, MemoryStream]:
    """Return the source's and the destination's end of a new connection."""
    forth, back = Pipe(), Pipe()
    return MemoryStream("destination", forth, back), MemoryStream("source", back, forth)


async def carry(stream: MemoryStream, onward: MemoryStream, bytes_per_s: float, delay_s: float) -> None:
    """Carry bytes on, so many a second, each for so long."""
    piece = bytearray(4096)

    async def deliver(data: bytes) -> None:
        await trio.sleep(delay_s)
        with suppress(ConnectionLostError):
            onward.send_nowait([data])

    async with trio.open_nursery() as nursery:
        while True:
            await stream.wait_readable()
            n = stream.receive_nowait(memoryview(piece))
            if not n:
                break
            await trio.sleep(n / bytes_per_s)
            nursery.start_soon(deliver, bytes(piece[:n]))
    await onward.aclose()
