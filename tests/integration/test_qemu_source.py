"""A source that sends QEMU's stream to a destination that reads it, in one loop over memory streams."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import trio

from fusemig.core.phase import MigrationPhase as Phase
from fusemig.core.units import CHUNK_SIZE
from fusemig.disk.tracked import Gate
from fusemig.errors import (
    ConfigError,
    ConnectionLostError,
    DiskError,
    GateClosedError,
    InDoubtError,
    RemoteProtocolError,
    StateError,
)
from fusemig.migration.arrival import greet
from fusemig.migration.commit import SourceDisk
from fusemig.migration.qemu_source import QemuSource
from fusemig.records.epoch import EpochFile, Ownership
from fusemig.wire import qemu_block, savevm
from fusemig.wire.base import IncomingWire
from support.pair import Pair, inline, nothing
from support.world import FaultyEpochFile

if TYPE_CHECKING:
    from pathlib import Path

    from support.streams import MemoryStream

ODD = 5 * CHUNK_SIZE + 1536
TWO_DISKS = {"a": ODD, "b": 3 * CHUNK_SIZE}
COMPLETED = [Phase.SETUP, Phase.BULK, Phase.DIRTY, Phase.FROZEN, Phase.COMMITTED, Phase.COMPLETED]


class QemuPair(Pair):
    """Two sides that speak QEMU's wire."""

    def _new_source(self) -> QemuSource:  # type: ignore[override]
        lent = [SourceDisk(disk, self.source.epochs[name], nothing) for name, disk in self.source.disks.items()]

        async def connect() -> MemoryStream:
            await trio.lowlevel.checkpoint()
            return self.streams[0]

        return QemuSource(lent, connect, self.parameters, inline, self.phases.append)

    async def _receive(self) -> None:
        migration = await greet(self.streams[1], IncomingWire.AUTO, self.destination, inline)
        await migration.run()
        await self.streams[1].aclose()


def fill(pair: Pair) -> None:
    """Give the source's disks data and holes, and the destination's what must be overwritten."""
    rng = random.Random(1)
    for image in pair.source.images.values():
        for at in range(0, image.size, CHUNK_SIZE):
            if at != CHUNK_SIZE:
                image.content[at : at + 5000] = rng.randbytes(min(5000, image.size - at))
    for image in pair.destination.images.values():
        image.content[:] = b"\xee" * image.size


async def test_a_group_moves_whole(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Every byte arrives, the source's disks are read-only for good, and its phases come in the usual order."""
    pair = QemuPair(tmp_path, TWO_DISKS)
    fill(pair)
    assert (await pair.migrate()).error is None
    assert pair.is_equal()
    assert pair.phases == COMPLETED
    assert pair.gates() == ({Gate.READ_ONLY}, {Gate.OPEN})
    assert pair.ownership() == ({Ownership.HANDED_OFF}, {Ownership.OWNER})
    statistics = pair.outgoing.statistics()
    assert statistics.pending_bytes == 0
    assert statistics.window.transferred == 5 + 2
    assert statistics.dirtied_bytes == 0
    with pytest.raises(DiskError, match="Read-only"):
        pair.source.disks["a"].pwrite(b"x", 0)
    assert not any(disk._admission.marks.trackers for disk in pair.source.disks.values())


def decoded(pair: QemuPair, stream: bytes) -> list[object]:
    """Return the events of a stream that the source sent."""
    devices = [qemu_block.Device(name, image.size) for name, image in pair.source.images.items()]
    block: qemu_block.Decoder = qemu_block.Decoder(devices)
    decoder: savevm.Decoder[qemu_block.Event] = savevm.Decoder({qemu_block.SECTION: block})
    return list(decoder.feed(stream))


@pytest.mark.parametrize("is_sparse", [False, True])
async def test_progress(tmp_path: Path, autojump_clock: trio.testing.MockClock, is_sparse: bool) -> None:
    """As block.c has it: in the bulk phase whenever the percentage of all disks changes; and 100 at the end."""
    sizes = {"a": 150 * CHUNK_SIZE, "b": 3 * CHUNK_SIZE, "c": 97 * CHUNK_SIZE + 512}
    pair = QemuPair(tmp_path, sizes)
    for image in pair.source.images.values():
        for at in range(0, image.size, CHUNK_SIZE * (40 if is_sparse else 1)):
            image.content[at] = 1
    stream = bytearray()

    def keep(data: bytes) -> bytes:
        stream.extend(data)
        return data

    pair.streams[0].on_send = keep
    assert (await pair.migrate()).error is None
    total, done = sum(sizes.values()), 0
    expected: list[int] = []
    for size in sizes.values():
        for at in range(0, size, CHUNK_SIZE):
            if not expected or expected[-1] != done * 100 // total:
                expected.append(done * 100 // total)
            done += min(CHUNK_SIZE, size - at)
    events = decoded(pair, bytes(stream))
    found = [event.percent for event in events if isinstance(event, qemu_block.BlockProgress)]
    assert found == [*expected, 100]
    assert len(set(found)) == 101
    last = [event for event in events if isinstance(event, qemu_block.Event)][-2:]
    assert last == [qemu_block.BlockProgress(100), qemu_block.BlockEos()]
    assert pair.is_equal()


async def test_writes_during_the_migration_arrive(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """What a guest writes in any phase is at the destination, in holes and in the overlapping last MiB as well."""
    pair = QemuPair(tmp_path, TWO_DISKS, pause_before_switchover=True, max_bandwidth=20 << 20)
    fill(pair)
    rng = random.Random(2)
    model = {name: bytearray(image.content) for name, image in pair.source.images.items()}

    async def guest() -> None:
        for number in range(400):
            if number == 300:
                while pair.outgoing.phase is not Phase.PRE_SWITCHOVER:
                    await trio.sleep(0.001)
                pair.outgoing.proceed()
            name = rng.choice(list(model))
            length = rng.choice([1, 512, 4096, 10_000])
            low = len(model[name]) - CHUNK_SIZE - 2000 if rng.random() < 0.5 else 0
            offset = rng.randrange(low, len(model[name]) - length)
            data = bytes(length) if rng.random() < 0.2 else rng.randbytes(length)
            while True:
                try:
                    pair.source.disks[name].pwrite(data, offset)
                    model[name][offset : offset + length] = data
                except GateClosedError as paused:
                    changed = trio.Event()
                    if pair.source.disks[name].write_gate.park(changed.set, paused):
                        await changed.wait()
                    continue
                except DiskError:
                    return
                break
            await trio.sleep(0.002)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest)
        await pair.migrate()
    assert pair.outgoing.error is None
    for name, content in model.items():
        assert pair.destination.images[name].content == content
    assert pair.outgoing.statistics().dirtied_bytes > 0
    assert pair.outgoing.statistics().pass_number > 2


async def test_a_connection_that_is_cut_anywhere(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Before the end of the stream the source serves on; from there on it is in doubt, and read-only."""
    n_cuts = 0
    outcomes: set[Phase] = set()
    while Phase.COMPLETED not in outcomes:
        directory = tmp_path / str(n_cuts)
        directory.mkdir()
        pair = QemuPair(directory, TWO_DISKS)
        fill(pair)
        n_sent = 0

        def cut(data: bytes, at: int = n_cuts) -> bytes | None:
            nonlocal n_sent
            n_sent += 1
            return None if n_sent > at else data

        pair.streams[0].on_send = cut
        await pair.migrate()
        outcomes.add(pair.outgoing.phase)
        there = {Gate.OPEN} if pair.outgoing.phase is Phase.COMPLETED else {Gate.READ_ONLY}
        if pair.outgoing.phase is Phase.FAILED:
            assert Phase.COMMITTED not in pair.phases
            assert isinstance(pair.outgoing.error, ConnectionLostError)
            assert pair.gates() == ({Gate.OPEN}, there)
            assert pair.ownership()[0] == {Ownership.OWNER}
        else:
            assert pair.gates() == ({Gate.READ_ONLY}, there)
            assert pair.ownership()[0] == {Ownership.HANDED_OFF}
        if pair.outgoing.phase is Phase.IN_DOUBT:
            assert isinstance(pair.outgoing.error, InDoubtError)
        n_cuts += 1
    assert outcomes == {Phase.FAILED, Phase.IN_DOUBT, Phase.COMPLETED}
    assert n_cuts > 10


async def test_cancel_before_the_hand_off(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """A cancelled migration leaves the source serving and the destination with an incomplete disk."""
    pair = QemuPair(tmp_path, TWO_DISKS, pause_before_switchover=True)
    fill(pair)

    async def canceller() -> None:
        while pair.outgoing.phase is not Phase.PRE_SWITCHOVER:
            await trio.sleep(0.01)
        pair.outgoing.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(canceller)
        await pair.migrate()
    assert pair.outgoing.phase is Phase.CANCELLED
    assert pair.gates() == ({Gate.OPEN}, {Gate.READ_ONLY})
    assert pair.ownership() == ({Ownership.OWNER}, {Ownership.INCOMING})


@pytest.mark.parametrize("fails_at", [3, 4])
async def test_a_hand_off_that_cannot_be_noted(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, fails_at: int
) -> None:
    """If `handed-off` cannot be made durable for every disk, the end of the stream is not sent and the source thaws."""
    pair = QemuPair(tmp_path, TWO_DISKS)
    fill(pair)
    n_writes = 0

    def fails(_number: int) -> bool:
        nonlocal n_writes
        n_writes += 1
        return n_writes == fails_at

    for name in TWO_DISKS:
        file = FaultyEpochFile(pair.source.epochs[name].path)
        file.fails = fails
        pair.source.epochs[name] = file
    pair.outgoing = pair._new_source()  # type: ignore[assignment]
    await pair.migrate()
    assert isinstance(pair.outgoing.error, StateError)
    assert pair.outgoing.phase is Phase.FAILED
    assert pair.gates() == ({Gate.OPEN}, {Gate.READ_ONLY})
    states = [record.state for file in pair.source.epochs.values() if (record := EpochFile(file.path).record)]
    assert states == [Ownership.OWNER, Ownership.OWNER]


async def test_a_destination_that_speaks(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Nothing comes back on this wire: whatever does is not from a destination of its kind."""
    pair = QemuPair(tmp_path, TWO_DISKS)
    fill(pair)

    async def answer() -> None:
        pair.streams[1].send_nowait([b"220 ready"])
        await trio.lowlevel.checkpoint()

    pair._receive = answer  # type: ignore[method-assign]
    await pair.migrate()
    assert isinstance(pair.outgoing.error, RemoteProtocolError)
    assert pair.gates()[0] == {Gate.OPEN}


async def test_a_read_error_keeps_the_disk(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """A chunk that cannot be read ends the migration, and the source serves on."""
    pair = QemuPair(tmp_path, TWO_DISKS)
    fill(pair)

    def fail(buffer: memoryview, offset: int) -> None:
        raise DiskError(5, "read of disk 'b'", offset, len(buffer))

    pair.source.images["b"].pread_into = fail  # type: ignore[method-assign]
    await pair.migrate()
    assert "mend its image" in str(pair.outgoing.error)
    assert pair.outgoing.phase is Phase.FAILED
    assert pair.gates() == ({Gate.OPEN}, {Gate.READ_ONLY})


async def test_a_disk_below_a_mib(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """QEMU cannot load it, so it is not sent."""
    pair = QemuPair(tmp_path, {"a": CHUNK_SIZE - 512})
    await pair.migrate()
    assert isinstance(pair.outgoing.error, ConfigError)
    assert pair.gates()[0] == {Gate.OPEN}
