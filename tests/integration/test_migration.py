"""Both sides of a migration in one loop over memory streams."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import trio

from fusemig.core.mirror import Reach
from fusemig.core.phase import MigrationPhase as Phase
from fusemig.core.units import CHUNK_SIZE
from fusemig.disk.tracked import Gate
from fusemig.errors import ConnectionLostError, DiskError, GateClosedError, PeerRefusedError, StateError
from fusemig.records.epoch import Ownership
from fusemig.wire import native
from support import streams
from support.pair import Pair, inline
from support.slow_sync import SlowSync
from support.streams import carry, memory_connection

if TYPE_CHECKING:
    from pathlib import Path

ODD = 5 * CHUNK_SIZE + 1536
TWO_DISKS = {"a": ODD, "b": 3 * CHUNK_SIZE}


def fill(pair: Pair, seed: int = 1) -> None:
    rng = random.Random(seed)
    for image in pair.source.images.values():
        image.content[:] = rng.randbytes(image.size)


async def test_an_idle_group_moves_whole(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Every byte arrives, the destination owns the disks durably, and the phases come in QEMU's order."""
    pair = Pair(tmp_path, TWO_DISKS)
    fill(pair)
    outgoing = await pair.migrate()
    assert outgoing.error is None
    assert pair.is_equal()
    assert pair.gates() == ({Gate.READ_ONLY}, {Gate.OPEN})
    assert pair.ownership() == ({Ownership.RELEASED}, {Ownership.OWNER})
    assert pair.phases == [Phase.SETUP, Phase.BULK, Phase.DIRTY, Phase.FROZEN, Phase.COMMITTED, Phase.COMPLETED]
    assert pair.incoming is not None
    assert pair.incoming.phase is Phase.COMPLETED


async def test_writes_during_the_migration_arrive(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """What a guest writes in any phase is at the destination, and writes after the hand-off get EROFS."""
    pair = Pair(tmp_path, TWO_DISKS, pause_before_switchover=True)
    fill(pair)
    rng = random.Random(2)
    model = {name: bytearray(image.content) for name, image in pair.source.images.items()}
    refused = []

    async def guest() -> None:
        for number in range(400):
            if number == 300:
                while pair.outgoing.phase is not Phase.PRE_SWITCHOVER:
                    await trio.sleep(0.001)
                pair.outgoing.proceed()
            name = rng.choice(list(model))
            length = rng.choice([1, 512, 4096, 10000, CHUNK_SIZE + 5])
            offset = rng.randrange(len(model[name]) - length)
            data = rng.randbytes(length)
            while True:
                try:
                    pair.source.disks[name].pwrite(data, offset)
                    model[name][offset : offset + length] = data
                except GateClosedError as paused:
                    changed = trio.Event()
                    if pair.source.disks[name].write_gate.park(changed.set, paused):
                        await changed.wait()
                    continue
                except DiskError as exc:
                    refused.append(exc.errno)
                break
            await trio.sleep(0.002)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest)
        await pair.migrate()
    assert pair.outgoing.error is None
    for name, content in model.items():
        assert pair.destination.images[name].content == content
    assert refused
    assert pair.outgoing.statistics().dirtied_bytes > 0


@pytest.mark.parametrize("cut_at", [1, 2, 5, 8, 12, 15])
async def test_a_lost_connection_leaves_the_source_serving(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, cut_at: int
) -> None:
    """Wherever the connection is cut before COMMIT, the source can be written again and a second attempt succeeds."""
    pair = Pair(tmp_path, TWO_DISKS)
    fill(pair)
    n = 0

    def cut(data: bytes) -> bytes | None:
        nonlocal n
        n += 1
        return None if n == cut_at else data

    pair.streams[0].on_send = cut
    outgoing = await pair.migrate()
    assert isinstance(outgoing.error, ConnectionLostError)
    assert outgoing.phase is Phase.FAILED
    assert pair.gates() == ({Gate.OPEN}, {Gate.READ_ONLY})
    assert pair.ownership()[0] == {Ownership.OWNER}
    assert pair.ownership()[1] <= {Ownership.INCOMING}
    pair.source.disks["a"].pwrite(b"still writable", 4711)
    pair.renew()
    assert (await pair.migrate()).error is None
    assert pair.is_equal()


async def test_a_store_that_syncs_for_ever_parks_no_guest(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """They go on at the freeze deadline with nothing lost; once the store answers, the next migration completes."""
    pair = Pair(tmp_path, TWO_DISKS)
    fill(pair)
    slow = SlowSync(pair.source.disks["b"])
    slow.is_slow, pair.offload = True, slow.offload
    pair.renew()
    try:
        outgoing = await pair.migrate()
        assert outgoing.phase is Phase.FAILED
        assert "longer than the freeze deadline of 5 s" in str(outgoing.error)
        assert outgoing.statistics().frozen_s == pytest.approx(5.0)
        assert Phase.FROZEN in pair.phases
        assert pair.gates() == ({Gate.OPEN}, {Gate.READ_ONLY})
        assert pair.ownership()[0] == {Ownership.OWNER}
        assert not slow.has_ended.is_set()
        pair.source.disks["b"].pwrite(b"beside it", 4711)
        pair.source.disks["b"].flush()
    finally:
        slow.may_end.set()
    assert slow.has_ended.wait(60)
    pair.offload = inline
    pair.renew()
    assert (await pair.migrate()).error is None
    assert pair.is_equal()
    assert pair.destination.images["b"].content[4711:4720] == b"beside it"


async def test_a_refused_disk_is_reported_with_both_sizes(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """A mismatch stops the migration at once, with both values in the text, and nothing is marked anywhere."""
    pair = Pair(tmp_path, {"a": CHUNK_SIZE})
    pair.destination = type(pair.destination)(tmp_path / "other", {"a": 2 * CHUNK_SIZE}, Gate.READ_ONLY)
    outgoing = await pair.migrate()
    assert isinstance(outgoing.error, PeerRefusedError)
    assert str(CHUNK_SIZE) in str(outgoing.error)
    assert str(2 * CHUNK_SIZE) in str(outgoing.error)
    assert pair.gates() == ({Gate.OPEN}, {Gate.READ_ONLY})
    assert pair.ownership()[1] == set()


async def test_cancel_before_the_commit(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """A cancelled migration leaves the source serving, no tracking behind, and the destination incoming."""
    pair = Pair(tmp_path, TWO_DISKS, pause_before_switchover=True)
    fill(pair)

    async def canceller() -> None:
        while pair.outgoing.phase is not Phase.PRE_SWITCHOVER:
            await trio.sleep(0.01)
        pair.outgoing.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(canceller)
        await pair.migrate()
    assert pair.outgoing.phase is Phase.CANCELLED
    assert pair.phases[-2:] == [Phase.CANCELLING, Phase.CANCELLED]
    assert pair.gates() == ({Gate.OPEN}, {Gate.READ_ONLY})
    assert pair.ownership() == ({Ownership.OWNER}, {Ownership.INCOMING})
    with pytest.raises(StateError):
        pair.outgoing.cancel()


@pytest.mark.parametrize("capacity", [streams.CAPACITY, 1], ids=["", "in mid-frame"])
@pytest.mark.parametrize("n_sent", range(3, 20))
async def test_the_destination_hears_why_the_source_ends(
    tmp_path: Path,
    n_sent: int,
    capacity: int,
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cancelled at any piece of the bulk phase, with acknowledgements under way: not just a lost connection."""
    monkeypatch.setattr(streams, "CAPACITY", capacity)
    pair = Pair(tmp_path, TWO_DISKS)
    fill(pair)
    pieces = iter(range(n_sent))

    def cancel(data: bytes) -> bytes:
        if next(pieces, None) == n_sent - 1:
            pair.outgoing.cancel()
        return data

    pair.streams[0].on_send = cancel
    await pair.migrate()
    assert pair.outgoing.phase is Phase.CANCELLED
    assert pair.incoming is not None
    assert str(pair.incoming.error).endswith("called the migration off: cancelled at the source")


@pytest.mark.parametrize("n_sent", [3, 4])
@pytest.mark.parametrize("side", ["source", "destination"])
async def test_what_a_peer_said_before_it_was_gone_is_the_reason(
    tmp_path: Path, side: str, n_sent: int, autojump_clock: trio.testing.MockClock
) -> None:
    """A side that comes to send, which fails, before it comes to receive, does not just lose its connection."""
    pair = Pair(tmp_path, TWO_DISKS)
    fill(pair)
    listener, speaker = pair.streams if side == "source" else reversed(pair.streams)
    pieces = iter(range(n_sent))

    def leave(data: bytes) -> bytes:
        if next(pieces, None) == n_sent - 1:
            speaker.send_nowait([native.encode_message(native.Abort("for a reason"))])
            speaker.close()
        return data

    listener.on_send = leave
    await pair.migrate()
    assert pair.incoming is not None
    error = pair.outgoing.error if side == "source" else pair.incoming.error
    assert str(error).endswith(": for a reason")


async def test_a_damaged_frame_is_noticed(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """One flipped bit in a payload ends the migration with an error that names the frame; nothing is taken over."""
    pair = Pair(tmp_path, TWO_DISKS)
    fill(pair)

    def flip(data: bytes) -> bytes:
        if len(data) == CHUNK_SIZE and data[:1] != b"\0":
            return bytes([data[0] ^ 1]) + data[1:]
        return data

    pair.streams[0].on_send = flip
    outgoing = await pair.migrate()
    assert "checksum of data frame" in str(outgoing.error)
    assert pair.gates() == ({Gate.OPEN}, {Gate.READ_ONLY})


@pytest.mark.parametrize("may_mirror", [True, False])
async def test_a_long_freeze_within_the_limit_is_made_shorter(
    tmp_path: Path, may_mirror: bool, autojump_clock: trio.testing.MockClock
) -> None:
    """What is hot is mirrored for the last passes; where that may not be, guests stand still for all that is dirty."""
    pair = Pair(tmp_path, {"a": 2 * CHUNK_SIZE}, downtime_limit_s=2.0, auto_mirror=may_mirror)
    (source, near), (far, destination) = memory_connection(), memory_connection()
    pair.streams = source, destination
    fill(pair)
    rng, reached, left = random.Random(3), set[Reach](), 0

    def note(phase: Phase) -> None:
        nonlocal left
        if phase is Phase.FROZEN:
            left = pair.outgoing.statistics().pending_bytes

    pair.outgoing._on_phase = note

    async def guest() -> None:
        while pair.outgoing.phase not in (Phase.COMMITTED, Phase.COMPLETED):
            reached.add(pair.outgoing.statistics().pacing.reach)
            if pair.source.disks["a"].gate is Gate.OPEN:
                with suppress(GateClosedError):  # it would have to wait
                    pair.source.disks["a"].pwrite(rng.randbytes(4096), rng.randrange(256) * 4096)
            await trio.sleep(0.001)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(carry, near, far, 2e6, 0.0001)
        nursery.start_soon(carry, far, near, 1e9, 0.0001)
        nursery.start_soon(guest)
        outgoing = await pair.migrate()
        await source.aclose()
    assert outgoing.error is None
    assert pair.is_equal()
    assert (Reach.HOT in reached) == may_mirror
    assert (left < CHUNK_SIZE // 2) == may_mirror
