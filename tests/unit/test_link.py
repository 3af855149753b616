"""NativeLink: what is left of a frame whose sending was cancelled, and what may follow it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from fusemig.errors import ConnectionLostError
from fusemig.migration.link import BufferPool, NativeLink
from fusemig.wire import native
from support.streams import MemoryStream, memory_connection

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fusemig.disk.base import Buffer

LAST = native.Abort("cancelled at the source")


class Dribbling(MemoryStream):
    """A stream that takes a few bytes at a time, and none as long as its way is narrow."""

    n_left = 0

    def send_nowait(self, buffers: Sequence[Buffer]) -> int:
        n = min(self.n_left, len(buffers[0]))
        if not n:
            raise trio.WouldBlock
        self.n_left -= n
        return super().send_nowait([memoryview(buffers[0])[:n]])

    async def wait_writable(self) -> None:
        while not self.n_left:
            await trio.sleep(1)


def narrow_link() -> tuple[NativeLink, Dribbling, NativeLink]:
    """Return both ends of a connection, the first of which can send ``n_left`` bytes."""
    here, there = memory_connection()
    here.__class__ = Dribbling
    assert isinstance(here, Dribbling)
    pool = BufferPool()
    return (
        NativeLink(here, native.Decoder(native.FROM_DESTINATION, preface=False), pool),
        here,
        NativeLink(there, native.Decoder(native.FROM_SOURCE, preface=False), pool),
    )


@pytest.mark.parametrize("n_sent", [0, 1, 5, 11])
async def test_the_rest_of_a_cancelled_message_goes_first(n_sent: int, autojump_clock: trio.testing.MockClock) -> None:
    """Cut anywhere it arrives whole, before the last word; one of which nothing was sent was never said."""
    link, stream, peer = narrow_link()
    stream.n_left = n_sent
    message = native.Progress(1, 2, 3)
    assert len(native.encode_message(message)) > n_sent
    with trio.move_on_after(0.5) as scope:
        await link.send_message(message)
    assert scope.cancelled_caught
    stream.n_left = 1000
    await link.send_message(LAST)
    received = [await peer.receive()]
    if n_sent:
        assert received == [message]
        received = [await peer.receive()]
    assert received == [LAST]


async def test_frames_that_are_sent_aside_do_not_go_into_the_rest(autojump_clock: trio.testing.MockClock) -> None:
    """A block sends by itself, so it may not begin as long as something is left; and one that fails ends the link."""
    link, stream, _ = narrow_link()
    stream.n_left = 3
    with trio.move_on_after(0.5):
        await link.send_message(native.Progress(1, 2, 3))
    with pytest.raises(ConnectionLostError, match="cut inside a frame"):
        async with link.frame():
            pass
    stream.n_left = 1000
    await link.send_message(LAST)
    with pytest.raises(ZeroDivisionError):
        async with link.frame():
            raise ZeroDivisionError
    with pytest.raises(ConnectionLostError, match="cut inside a frame"):
        await link.send_message(LAST)
