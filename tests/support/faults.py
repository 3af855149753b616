"""Faults on a connection in memory, counted or drawn from a seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from fusemig.errors import ConnectionLostError
from support.streams import MemoryStream, Pipe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fusemig.disk.base import Buffer

KINDS = ("cut", "stall", "flip", "duplicate", "reorder", "half")


class FaultyStream(MemoryStream):
    """One end of a connection on which the nth send goes wrong.

    cut        nothing of it is sent, and the connection is gone
    half       half of it is sent, and the connection is gone
    stall      nothing more gets through, in this direction, for `stall_s` seconds (None: ever)
    flip       one bit changes on the way
    duplicate  it arrives twice
    reorder    it arrives after the next one
    """

    def __init__(self, peer: str, outgoing: Pipe, incoming: Pipe, bytes_per_s: float | None = None) -> None:
        """Send at most so fast."""
        super().__init__(peer, outgoing, incoming)
        self.n_sends = 0
        self.n_receives = 0
        self.on_receive: Callable[[int], None] = lambda _number: None
        """Called with the number of each receive that has something, from 1, just after it."""
        self.faults: dict[int, str] = {}
        """Which sends go wrong, counted from 1, and how."""
        self.flip_at = 0
        """Which bit `flip` changes, modulo the length."""
        self.stall_s: float | None = None
        self.lag: Callable[[], float] = lambda: 0.0
        """How long what comes after each receive is still under way, in seconds."""
        self._heard_from = 0.0
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0
        self._held = b""

    def slow_down(self, bytes_per_s: float) -> None:
        """Send no faster from now on."""
        self._bytes_per_s = bytes_per_s

    def send_nowait(self, buffers: Sequence[Buffer]) -> int:
        """Send a piece, or have its fault."""
        if trio.current_time() < self._free_at:
            raise trio.WouldBlock
        piece = bytes(buffers[0])
        self.n_sends += 1
        kind = self.faults.get(self.n_sends)
        if kind in ("cut", "half"):
            if kind == "half" and len(piece) > 1:
                super().send_nowait([piece[: len(piece) // 2]])
            self.close()
            raise ConnectionLostError(f"connection to {self.peer} lost: cut by the test")
        if kind == "stall":
            self._free_at = float("inf") if self.stall_s is None else trio.current_time() + self.stall_s
            raise trio.WouldBlock
        data = piece
        if kind == "flip":
            at = self.flip_at % (8 * len(piece))
            data = bytes([*piece[: at // 8], piece[at // 8] ^ 1 << at % 8]) + piece[at // 8 + 1 :]
        elif kind == "duplicate":
            data = piece + piece
        elif kind == "reorder":
            self._held, data = data, b""
        else:
            self._held, data = b"", data + self._held
        if data:
            n = super().send_nowait([data])
            assert n == len(data)
        if self._bytes_per_s is not None:
            self._free_at = trio.current_time() + len(piece) / self._bytes_per_s
        return len(piece)

    def receive_nowait(self, buffer: memoryview) -> int:
        """Receive what came."""
        if trio.current_time() < self._heard_from:
            raise trio.WouldBlock
        n = super().receive_nowait(buffer)
        self._heard_from = trio.current_time() + self.lag()
        self.n_receives += 1
        self.on_receive(self.n_receives)
        return n

    async def wait_readable(self) -> None:
        """Wait for the stream, and for what is under way."""
        await trio.sleep_until(self._heard_from)
        await super().wait_readable()

    async def wait_writable(self) -> None:
        """Wait for the stream, and for the end of a stall."""
        await trio.sleep_until(self._free_at)
        await super().wait_writable()


def faulty_connection(bytes_per_s: float | None = None) -> tuple[FaultyStream, FaultyStream]:
    """Return the source's and the destination's end of a new connection."""
    forth, back = Pipe(), Pipe()
    return FaultyStream("destination", forth, back, bytes_per_s), FaultyStream("source", back, forth)
