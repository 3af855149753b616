"""Byte streams in memory, and one that breaks on purpose."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio
import trio.testing

from fusemig.errors import ConnectionLostError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fusemig.disk.base import Buffer


class MemoryStream:
    """One end of a connection in memory, with a bounded buffer as a socket has."""

    def __init__(self, peer: str, outgoing: trio.MemorySendChannel[bytes], incoming: trio.MemoryReceiveChannel[bytes]):
        self.peer = peer
        self.sent_bytes = 0
        self.on_send: Callable[[bytes], bytes | None] = lambda data: data
        """Called with each piece before it is sent; may change it, or return None to cut the connection."""
        self._outgoing = outgoing
        self._incoming = incoming
        self._rest = memoryview(b"")

    async def send(self, buffers: Sequence[Buffer]) -> None:
        for buffer in buffers:
            data = self.on_send(bytes(buffer))
            if data is None:
                await self.aclose()
                raise ConnectionLostError(f"connection to {self.peer} lost: cut by the test")
            self.sent_bytes += len(data)
            try:
                await self._outgoing.send(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                raise ConnectionLostError(f"connection to {self.peer} lost") from exc

    async def receive_into(self, buffer: memoryview) -> int:
        if not self._rest:
            try:
                self._rest = memoryview(await self._incoming.receive())
            except trio.EndOfChannel:
                return 0
            except trio.ClosedResourceError as exc:
                raise ConnectionLostError(f"connection to {self.peer} lost") from exc
        n = min(len(buffer), len(self._rest))
        buffer[:n] = self._rest[:n]
        self._rest = self._rest[n:]
        return n

    async def aclose(self) -> None:
        self._outgoing.close()
        self._incoming.close()
        await trio.lowlevel.checkpoint()


def memory_connection() -> tuple[MemoryStream, MemoryStream]:
    """Return the source's and the destination's end of a new connection."""
    to_destination, at_destination = trio.open_memory_channel[bytes](8)
    to_source, at_source = trio.open_memory_channel[bytes](64)
    return MemoryStream("destination", to_destination, at_source), MemoryStream("source", to_source, at_destination)
