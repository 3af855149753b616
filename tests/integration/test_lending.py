"""A source that lends: what it answers a FETCH, and what it refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from fusemig.core.units import BLOCK_SIZE, n_blocks
from fusemig.disk.memory import MemoryDisk
from fusemig.errors import ConnectionLostError
from fusemig.migration.lend import Lending, LentDisk
from fusemig.migration.link import BufferPool, NativeLink
from fusemig.records.epoch import EpochFile, EpochRecord, Ownership
from fusemig.wire import native
from support.pair import inline
from support.streams import memory_connection

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from support.streams import MemoryStream

SIZE = 600 * BLOCK_SIZE + 512
HOLES = {20, 22, 30, 31, 32}


@pytest.fixture
async def link(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> AsyncIterator[NativeLink]:
    """Return the destination's end of a connection over which a disk is lent, after the handshake."""
    image = MemoryDisk("d", SIZE)
    for block in range(n_blocks(SIZE)):
        at = block * BLOCK_SIZE
        image.pwrite(bytes([0 if block in HOLES else 1 + block % 255]) * min(BLOCK_SIZE, SIZE - at), at)
    epoch_file = EpochFile(tmp_path / "d.fusemig")
    epoch_file.write(EpochRecord(state=Ownership.LENDING, image_id="i", epoch=0, session="s", is_loan=True))
    ours, theirs = memory_connection()

    async def dial() -> MemoryStream:
        await trio.lowlevel.checkpoint()
        return ours

    nursery.start_soon(Lending([LentDisk("d", image, epoch_file)], dial, inline).run)
    link = NativeLink(theirs, native.Decoder(native.FROM_SOURCE, preface=True), BufferPool())
    lend = await link.receive()
    assert isinstance(lend, native.Lend)
    assert lend.max_runs == native.MAX_FETCH_RUNS
    await link.send_message(native.Welcome(native.VERSION, [native.POSTCOPY]))
    yield link
    nursery.cancel_scope.cancel()


def content(*runs: tuple[int, int]) -> bytes:
    blocks = [block for first, stop in runs for block in range(first, stop)]
    return b"".join(bytes([1 + block % 255]) * min(BLOCK_SIZE, SIZE - block * BLOCK_SIZE) for block in blocks)


def bytes_of(*blocks: int) -> list[tuple[int, int]]:
    return [(block * BLOCK_SIZE, min(BLOCK_SIZE, SIZE - block * BLOCK_SIZE)) for block in blocks]


async def test_one_run_is_answered_in_one_frame(link: NativeLink) -> None:
    """Zeros within it are sent as bytes; where it begins with a hole, all of that is told."""
    await link.send_message(native.Fetch(0, 18, 24))
    data = await link.receive()
    assert isinstance(data, native.DataFrame)
    assert list(data.extents) == [(18 * BLOCK_SIZE, 6 * BLOCK_SIZE)]
    await link.send_message(native.Fetch(0, 30, 31))
    zero = await link.receive()
    assert isinstance(zero, native.ZeroFrame)
    assert list(zero.extents) == [(30 * BLOCK_SIZE, 3 * BLOCK_SIZE)]


async def test_several_runs_are_answered_in_two_frames(link: NativeLink) -> None:
    """What reads as zeros, no more than was asked for, and then the bytes of the others; the last block is short."""
    last = n_blocks(SIZE) - 1
    await link.send_message(native.Fetch(0, 3, 5, [(20, 21), (22, 24), (30, 31), (last, last + 1)]))
    zero, data = await link.receive(), await link.receive()
    assert isinstance(zero, native.ZeroFrame)
    assert list(zero.extents) == bytes_of(20, 30)
    assert isinstance(data, native.DataFrame)
    assert list(data.extents) == [(3 * BLOCK_SIZE, 2 * BLOCK_SIZE), (22 * BLOCK_SIZE, 2 * BLOCK_SIZE), *bytes_of(last)]
    data.verify()
    assert data.payload == content((3, 5)) + bytes(BLOCK_SIZE) + content((23, 24), (last, last + 1))
    await link.send_message(native.Fetch(0, 20, 21, [(22, 23)]))
    zero = await link.receive()
    assert isinstance(zero, native.ZeroFrame)
    assert (list(zero.extents), zero.sequence) == (bytes_of(20, 22), 3)
    await link.send_message(native.Fetch(0, 1, 2, [(4, 5)]))
    data = await link.receive()
    assert isinstance(data, native.DataFrame)
    assert (list(data.extents), data.sequence) == (bytes_of(1, 4), 4)


@pytest.mark.parametrize(
    "fetch",
    [
        native.Fetch(1, 0, 1),
        native.Fetch(0, -1, 1),
        native.Fetch(0, 3, 3),
        native.Fetch(0, 600, 602),
        native.Fetch(0, 0, native.MAX_FETCH_BLOCKS + 1),
        native.Fetch(0, 3, 5, [(4, 6)]),
        native.Fetch(0, 3, 5, [(1, 2)]),
        native.Fetch(0, 3, 5, [(7, 7)]),
        native.Fetch(0, 3, 5, [(7, 602)]),
        native.Fetch(0, 0, 200, [(300, 357)]),
    ],
    ids=[
        "disk",
        "negative",
        "empty",
        "beyond",
        "long",
        "overlap",
        "order",
        "empty more",
        "more beyond",
        "long together",
    ],
)
async def test_what_cannot_be_is_not_answered(link: NativeLink, fetch: native.Fetch) -> None:
    """The connection ends; another one is made, as after every other fault."""
    await link.send_message(fetch)
    with pytest.raises(ConnectionLostError):
        await link.receive()
