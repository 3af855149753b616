"""A destination that a QEMU migrates to, over memory streams: what QEMU once wrote, and what no QEMU should."""

from __future__ import annotations

import json
import lzma
import tracemalloc
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import trio
from xxhash import xxh3_64_hexdigest

from fusemig.disk.allocation import AllocationMap, BaseIdentity, map_size, write_header
from fusemig.disk.memory import MemoryDisk
from fusemig.disk.overlay import OverlayDisk
from fusemig.disk.tracked import Gate, TrackedDisk
from fusemig.epoch import EpochFile, Ownership
from fusemig.errors import (
    ConnectionLostError,
    DiskError,
    FusemigError,
    MigrationError,
    PeerRefusedError,
    RemoteProtocolError,
)
from fusemig.migration.arrival import greet
from fusemig.migration.incoming import AwaitedDisk
from fusemig.migration.qemu_receiver import QemuReceiver, Turn
from fusemig.phase import MigrationPhase as Phase
from fusemig.units import CHUNK_SIZE
from fusemig.wire import native, qemu_block, savevm
from fusemig.wire.base import IncomingWire
from support.pair import Pair, Side, inline
from support.qemu import disk_bytes
from support.streams import memory_connection

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusemig.migration.incoming import IncomingMigration
    from support.streams import MemoryStream

VECTORS = Path(__file__).parent.parent / "vectors/qemu"
COMPLETED = [Phase.SETUP, Phase.BULK, Phase.FROZEN, Phase.COMPLETED]
PIECE = 100_003


def load(name: str) -> tuple[dict[str, Any], bytes]:
    """Return a vector's description and stream."""
    description: dict[str, Any] = json.loads((VECTORS / f"{name}.json").read_text())
    return description, lzma.decompress((VECTORS / f"{name}.xz").read_bytes())


class Arrival:
    """A destination, and a source that is nothing but bytes."""

    def __init__(self, directory: Path, sizes: dict[str, int], accepted: IncomingWire = IncomingWire.AUTO) -> None:
        self.side = Side(directory, sizes, Gate.READ_ONLY)
        for image in self.side.images.values():
            image.content[:] = b"\xee" * image.size
        self.accepted = accepted
        self.phases: list[Phase] = []
        self.migration: IncomingMigration | None = None
        self.error: FusemigError | None = None
        self.answer = b""
        """What the destination sent back."""
        self.states_at_answer: list[Ownership] = []

    async def receive(self, stream: bytes, *, until_shut: bool = False, close: bool = True) -> FusemigError | None:
        """Have ``stream`` received; the source closes after it, or when it has been told how it ended."""
        source, destination = memory_connection()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive, destination)
            await self._send(source, stream)
            if until_shut:
                await self._read_answer(source, lambda: self.answer.endswith(savevm.encode_shut()))
            if close:
                source._outgoing.is_closed = True
                source._outgoing.note()
            await self._read_answer(source, lambda: False)
        return self.error

    async def _send(self, source: MemoryStream, stream: bytes) -> None:
        view = memoryview(stream)
        try:
            while view:
                await source.wait_writable()
                view = view[source.send_nowait([view[:PIECE]]) :]
        except ConnectionLostError:
            pass

    async def _read_answer(self, source: MemoryStream, is_enough: Callable[[], bool]) -> None:
        buffer = memoryview(bytearray(4096))
        while not is_enough():
            await source.wait_readable()
            n = source.receive_nowait(buffer)
            if not n:
                return
            self.answer += bytes(buffer[:n])
            self.states_at_answer = self.states()

    async def _receive(self, stream: MemoryStream) -> None:
        try:
            self.migration = await greet(stream, self.accepted, self.side, inline, self.phases.append)
            await self.migration.run()
            self.error = self.migration.error
        except FusemigError as exc:
            self.error = exc
        finally:
            await stream.aclose()

    def lay_over(self, name: str, base: bytes) -> OverlayDisk:
        """Make a disk an overlay over ``base``, which holds something from an earlier life."""
        image, under = self.side.images[name], MemoryDisk(name, len(base))
        under.content[:] = base
        store = MemoryDisk(name, map_size(image.size))
        write_header(store, image.size, BaseIdentity(size=under.size, digest=""))
        overlay = OverlayDisk(image, under, AllocationMap(store, image.size, "boot"))
        overlay.pwrite(b"\xdd" * (image.size // 2), 0)
        self.side.disks[name] = TrackedDisk(overlay, gate=Gate.READ_ONLY)
        return overlay

    def gates(self) -> set[Gate]:
        """Return the gates of all disks."""
        return {disk.gate for disk in self.side.disks.values()}

    def states(self) -> list[Ownership]:
        """Return what the epoch files say, read anew."""
        records = [EpochFile(file.path).record for file in self.side.epochs.values()]
        return [record.state for record in records if record is not None]

    def assert_not_taken(self, *states: Ownership) -> None:
        """See that no disk became ours."""
        assert Phase.COMPLETED not in self.phases
        assert self.gates() == {Gate.READ_ONLY}
        assert self.states() == list(states)


def arrival_for(directory: Path, description: dict[str, Any], **options: Any) -> Arrival:
    """Return a destination that waits for the disks of a vector."""
    return Arrival(directory, {disk["name"]: disk["size"] for disk in description["disks"]}, **options)


@pytest.mark.parametrize("accepted", [IncomingWire.AUTO, IncomingWire.QEMU])
@pytest.mark.parametrize("name", ["plain", "two-disks", "written", "zero-blocks"])
async def test_golden(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, name: str, accepted: IncomingWire
) -> None:
    """What a real QEMU sent becomes its disks, owned durably."""
    description, stream = load(name)
    arrival = arrival_for(tmp_path, description, accepted=accepted)
    assert await arrival.receive(stream) is None
    for disk in description["disks"]:
        assert xxh3_64_hexdigest(bytes(arrival.side.images[disk["name"]].content)) == disk["xxh3_64"]
        assert arrival.side.images[disk["name"]].n_flushes >= 1
    assert arrival.phases == COMPLETED
    assert arrival.gates() == {Gate.OPEN}
    assert arrival.states() == [Ownership.OWNER] * len(description["disks"])
    assert arrival.answer == b""
    assert arrival.migration is not None
    assert arrival.migration.wire == "qemu"
    statistics = arrival.migration.statistics()
    assert statistics.pending_bytes == 0
    assert statistics.total_bytes == sum(disk["size"] for disk in description["disks"])
    assert {file.record.epoch for file in arrival.side.epochs.values() if file.record} == {1}


async def test_a_source_with_a_return_path_is_told_before_the_disks_are_ours(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """It hears that all arrived, and closes; only then may guests write here."""
    description, stream = load("return-path")
    arrival = arrival_for(tmp_path, description)
    assert await arrival.receive(stream, until_shut=True) is None
    assert arrival.answer.endswith(savevm.encode_shut())
    assert arrival.states_at_answer == [Ownership.INCOMING]
    assert arrival.states() == [Ownership.OWNER]
    assert arrival.gates() == {Gate.OPEN}


async def test_a_source_with_a_return_path_that_does_not_wait_keeps_its_disks(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """A source that closes before it heard has given up, and its guest runs on there."""
    description, stream = load("return-path")
    arrival = arrival_for(tmp_path, description)
    error = await arrival.receive(stream)
    assert isinstance(error, ConnectionLostError)
    assert "before it heard" in str(error)
    arrival.assert_not_taken(Ownership.INCOMING)


async def test_a_source_that_was_told_and_does_not_end_keeps_its_disks(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """It may not have heard us."""
    description, stream = load("return-path")
    arrival = arrival_for(tmp_path, description)
    error = await arrival.receive(stream, close=False)
    assert isinstance(error, ConnectionLostError)
    assert "did not end" in str(error)
    arrival.assert_not_taken(Ownership.INCOMING)


async def test_early_finish_is_refused(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """QEMU reported success with half of the disk unsent: the ranges and the bug are named, and nothing is taken."""
    description, stream = load("early-finish")
    arrival = arrival_for(tmp_path, description)
    error = str(await arrival.receive(stream))
    assert description["problem"] in error
    assert "'disk0' 33554432-67108863" in error
    assert "b5280437a7f4" in error
    assert arrival.phases == [Phase.SETUP, Phase.BULK, Phase.FROZEN, Phase.FAILED]
    arrival.assert_not_taken(Ownership.INCOMING)
    # The disk waits on, and the next migration succeeds.
    record = arrival.side.epochs["disk0"].record
    assert record is not None
    assert record.session


async def test_a_disk_of_which_nothing_comes(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Whether QEMU has it not or skipped it cannot be told: refused, and the text says what to do about either."""
    description, stream = load("plain")
    arrival = Arrival(tmp_path, {"disk0": description["disks"][0]["size"], "other": CHUNK_SIZE})
    error = str(await arrival.receive(stream))
    assert "of 'other' nothing came at all: serve only the disks that the QEMU has" in error
    arrival.assert_not_taken(Ownership.INCOMING, Ownership.INCOMING)


@pytest.mark.parametrize("share", [0.001, 0.3, 0.9, 0.999, -1])
async def test_a_cut_stream(tmp_path: Path, autojump_clock: trio.testing.MockClock, share: float) -> None:
    """Wherever it ends, up to the byte before the last, the disks do not become ours; whole, they then do."""
    description, stream = load("plain")
    arrival = arrival_for(tmp_path, description)
    cut = stream[:-1] if share < 0 else stream[: int(len(stream) * share)]
    error = await arrival.receive(cut)
    assert isinstance(error, RemoteProtocolError)
    assert "ends early" in str(error)
    arrival.assert_not_taken(Ownership.INCOMING)
    assert arrival.phases[-1] is Phase.FAILED
    arrival.phases.clear()
    assert await arrival.receive(stream) is None
    assert arrival.phases == COMPLETED


async def test_an_unknown_disk(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """The error names it and those that are awaited."""
    arrival = Arrival(tmp_path, {"vda": 4 * CHUNK_SIZE})
    error = await arrival.receive(load("plain")[1])
    assert isinstance(error, RemoteProtocolError)
    assert str(error) == "unknown block device 'disk0'; expected: 'vda'"
    arrival.assert_not_taken(Ownership.INCOMING)


async def test_a_disk_that_is_too_small(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Data beyond the end of an image is an error, not a larger image."""
    arrival = Arrival(tmp_path, {"disk0": 3 * CHUNK_SIZE})
    assert "beyond the end of block device 'disk0'" in str(await arrival.receive(load("plain")[1]))
    arrival.assert_not_taken(Ownership.INCOMING)


async def test_a_stream_without_disks_claims_none(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """A plain `migrate` is refused with the option to add, and no image is marked."""
    arrival = Arrival(tmp_path, {"disk0": CHUNK_SIZE})
    assert "migrate -b" in str(await arrival.receive(savevm.encode_header("pc") + savevm.encode_eof()))
    assert arrival.phases == []
    arrival.assert_not_taken()


async def test_data_in_the_first_part(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """A source that is not QEMU may put data into the very first section; zeros become holes."""
    encoder = qemu_block.Encoder([qemu_block.Device("a", CHUNK_SIZE + 512)])
    stream = savevm.encode_header("pc") + savevm.encode_start(1, qemu_block.SECTION, qemu_block.VERSION)
    stream += b"".join(encoder.data(0, 0, b"x" * CHUNK_SIZE)) + qemu_block.END_OF_SECTION + savevm.encode_footer(1)
    stream += savevm.encode_end(1) + b"".join(encoder.data(0, CHUNK_SIZE, bytes(512)))
    stream += encoder.end() + savevm.encode_footer(1) + savevm.encode_eof()
    arrival = Arrival(tmp_path, {"a": CHUNK_SIZE + 512})
    assert await arrival.receive(stream) is None
    assert arrival.side.images["a"].content == b"x" * CHUNK_SIZE + bytes(512)
    assert arrival.gates() == {Gate.OPEN}


async def test_a_pinned_native_destination_refuses_qemu(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Before anything is claimed, and with the option to change."""
    description, stream = load("plain")
    arrival = arrival_for(tmp_path, description, accepted=IncomingWire.NATIVE)
    error = await arrival.receive(stream)
    assert isinstance(error, PeerRefusedError)
    assert "--wire auto" in str(error)
    arrival.assert_not_taken()


async def test_a_pinned_qemu_destination_refuses_a_native_source(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """The source is told why, in its own wire."""
    pair = Pair(tmp_path, {"a": CHUNK_SIZE})
    error: list[FusemigError | None] = []

    async def receive() -> None:
        migration = await greet(pair.streams[1], IncomingWire.QEMU, pair.destination, inline)
        await migration.run()
        error.append(migration.error)
        await pair.streams[1].aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await pair.outgoing.run()
    assert isinstance(pair.outgoing.error, PeerRefusedError)
    assert "only QEMU's migration stream is taken there" in str(pair.outgoing.error)
    assert isinstance(error[0], PeerRefusedError)
    assert pair.ownership()[1] == set()


@pytest.mark.parametrize("head", [b"", b"Q", b"QEV", b"QEMU", b"FUS", native.PREFACE, b"GET / HTTP/1.1\r\n\r\n"])
async def test_garbage(tmp_path: Path, autojump_clock: trio.testing.MockClock, head: bytes) -> None:
    """What is neither wire's start ends in one error of ours, and nothing is claimed."""
    arrival = Arrival(tmp_path, {"a": CHUNK_SIZE})
    assert isinstance(await arrival.receive(head), RemoteProtocolError | ConnectionLostError)
    assert arrival.phases == []
    arrival.assert_not_taken()


@pytest.mark.parametrize("head", [b"", b"QE", b"QEVM", b"FUSE"])
async def test_silence(tmp_path: Path, autojump_clock: trio.testing.MockClock, head: bytes) -> None:
    """A source that begins and says no more is given up."""
    arrival = Arrival(tmp_path, {"a": CHUNK_SIZE})
    assert isinstance(await arrival.receive(head, close=False), FusemigError)
    assert arrival.phases == []


async def test_a_source_that_falls_silent_lets_the_disk_go(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """In the middle of its stream, for ten minutes: failed, and the disk is free for the next one."""
    description, stream = load("plain")
    arrival = arrival_for(tmp_path, description)
    began_at = trio.current_time()
    error = str(await arrival.receive(stream[: len(stream) // 2], close=False))
    assert "nothing heard from" in error
    assert "for 600 s" in error
    assert 600 <= trio.current_time() - began_at < 700
    arrival.assert_not_taken(Ownership.INCOMING)
    assert await arrival.receive(stream) is None


async def test_a_shared_base(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """What `migrate -i` leaves out is the base's, whatever the overlay held before."""
    description, stream = load("incremental")
    arrival = arrival_for(tmp_path, description)
    (disk,) = description["disks"]
    overlay = arrival.lay_over("disk0", disk_bytes(disk["size"], seed=0))
    assert await arrival.receive(stream) is None
    assert xxh3_64_hexdigest(bytes(overlay.pread(overlay.size, 0))) == disk["xxh3_64"]
    assert list(overlay.allocated(0, overlay.size)) == [(2 * CHUNK_SIZE, CHUNK_SIZE)]
    assert arrival.phases == COMPLETED
    assert arrival.states() == [Ownership.OWNER]


async def test_a_shared_base_needs_a_base_here(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Without one the same stream lacks what it lacks."""
    description, stream = load("incremental")
    arrival = arrival_for(tmp_path, description)
    error = str(await arrival.receive(stream))
    assert "never sent: bytes 'disk0' 0-2097151, 'disk0' 3145728-5244415" in error
    arrival.assert_not_taken(Ownership.INCOMING)


async def test_a_whole_disk_onto_a_base(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """`migrate -b` to a destination with a base replaces all of it."""
    description, stream = load("plain")
    arrival = arrival_for(tmp_path, description)
    (disk,) = description["disks"]
    overlay = arrival.lay_over("disk0", b"\x77" * disk["size"])
    assert await arrival.receive(stream) is None
    assert xxh3_64_hexdigest(bytes(overlay.pread(overlay.size, 0))) == disk["xxh3_64"]
    assert overlay.allocated_bytes >= disk["size"]


async def test_an_early_finish_over_a_base(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Then only the progress tells."""
    description, stream = load("early-finish")
    arrival = arrival_for(tmp_path, description)
    (disk,) = description["disks"]
    arrival.lay_over("disk0", bytes(disk["size"]))
    error = str(await arrival.receive(stream))
    assert "not taken over: the source finished before it had read its disks: its last progress was" in error
    assert "b5280437a7f4" in error
    arrival.assert_not_taken(Ownership.INCOMING)


async def test_an_overlay_of_which_nothing_comes(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Nothing says that the QEMU has it, so it is not taken over as a copy of its base."""
    description, stream = load("plain")
    arrival = Arrival(tmp_path, {"disk0": description["disks"][0]["size"], "other": 512})
    arrival.lay_over("other", bytes(512))
    error = str(await arrival.receive(stream))
    assert "not taken over: of 'other' nothing came at all: serve only the disks that the QEMU has" in error
    assert "a new one here is the same disk" in error
    arrival.assert_not_taken(Ownership.INCOMING, Ownership.INCOMING)


async def test_an_overlay_that_cannot_be_emptied(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """It must not keep what it held: the migration fails, and the disk is free for the next one."""
    description, stream = load("incremental")
    arrival = arrival_for(tmp_path, description)
    (disk,) = description["disks"]
    overlay = arrival.lay_over("disk0", disk_bytes(disk["size"], seed=0))
    forget = overlay.forget

    def fail() -> None:
        raise DiskError(28, "the map")

    overlay.forget = fail  # type: ignore[method-assign]
    error = await arrival.receive(stream)
    assert isinstance(error, MigrationError)
    assert "make room at the destination" in str(error)
    arrival.assert_not_taken(Ownership.INCOMING)
    overlay.forget = forget  # type: ignore[method-assign]
    assert await arrival.receive(stream) is None


def block_stream(*records: bytes | memoryview) -> bytes:
    """Return the start of a stream with these records in the first part of its `block` section."""
    start = savevm.encode_header("pc") + savevm.encode_start(1, qemu_block.SECTION, qemu_block.VERSION)
    return start + qemu_block.END_OF_SECTION + savevm.encode_footer(1) + savevm.encode_part(1) + b"".join(records)


def head(sector: int, flags: int, name: bytes = b"") -> bytes:
    """Return the start of a record."""
    return (sector << 9 | flags).to_bytes(8, "big") + (bytes([len(name)]) + name if name else b"")


CHUNK = b"x" * CHUNK_SIZE
HOSTILE = {
    "unknown device": (block_stream(head(0, 1, b"nope"), CHUNK), "unknown block device 'nope'; expected: 'a'"),
    "unknown flags": (block_stream(head(0, 0x11, b"a"), CHUNK), "unknown block migration flags: 0x11"),
    "beyond the end": (block_stream(head(2049, 1, b"a"), CHUNK), "sector 2049 is beyond the end of block device 'a'"),
    "progress": (block_stream(head(101, 4)), "block migration progress of 101 %"),
    "truncated": (block_stream(head(0, 1, b"a"), CHUNK[:-1]), "ends early"),
    "no payload": (block_stream(head(0, 1, b"a")), "ends early"),
    "section id": (block_stream(head(0, 2), savevm.encode_footer(2)), "does not end where it should"),
    "no such section": (block_stream(head(0, 2), savevm.encode_footer(1), savevm.encode_part(7)), "7"),
    "version": (
        savevm.encode_header("pc") + savevm.encode_start(1, "block", 2),
        "unsupported version 2 of the 'block'",
    ),
    "chunks for ever": (block_stream(*[head(0, 1, b"a") + CHUNK] * 40), "ends early"),
    "zeros for ever": (block_stream(*[head(0, 9, b"a")] * 100_000), "ends early"),
}
"""Streams that no QEMU sends, of a disk `a` of 1 MiB and a sector, and what the error says."""


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile(tmp_path: Path, autojump_clock: trio.testing.MockClock, name: str) -> None:
    """One clear error of one line; nothing is taken over, and the next source is welcome."""
    stream, text = HOSTILE[name]
    arrival = Arrival(tmp_path, {"a": CHUNK_SIZE + 512})
    error = await arrival.receive(stream)
    assert isinstance(error, RemoteProtocolError)
    assert text in str(error)
    assert "\n" not in str(error)
    # A stream that is wrong before the disks are claimed leaves no mark on them.
    arrival.assert_not_taken(*[Ownership.INCOMING] * (name != "version"))
    encoder = qemu_block.Encoder([qemu_block.Device("a", CHUNK_SIZE + 512)])
    whole = block_stream(*encoder.data(0, 0, CHUNK), *encoder.data(0, CHUNK_SIZE, b"y" * 512), head(0, 2))
    whole += savevm.encode_footer(1) + savevm.encode_end(1) + encoder.end() + savevm.encode_footer(1)
    assert await arrival.receive(whole + savevm.encode_eof()) is None
    assert arrival.side.images["a"].content == CHUNK + b"y" * 512


@pytest.mark.parametrize("name", ["chunks for ever", "zeros for ever", "beyond the end", "unknown device", "truncated"])
def test_memory_of_hostile_streams(name: str) -> None:
    """The decoder refuses before it asks for memory, and holds one chunk at a time."""
    host = Discarding({"disks": [{"name": "a", "size": CHUNK_SIZE + 512}]})
    assert host.peak_of(HOSTILE[name][0]) < 2 * CHUNK_SIZE


@pytest.mark.parametrize("name", ["plain", "two-disks", "written", "zero-blocks", "early-finish"])
async def test_memory(tmp_path: Path, autojump_clock: trio.testing.MockClock, name: str) -> None:
    """Whatever the stream brings, the receiver allocates less than two chunks: one for the payload, and some change."""
    description, stream = load(name)
    host = Discarding(description)
    assert host.peak_of(stream) < 2 * CHUNK_SIZE
    assert host.n_written > CHUNK_SIZE


class Discarding:
    """A stream, and disks that keep nothing."""

    def __init__(self, description: dict[str, Any]) -> None:
        self.stream = memoryview(b"")
        self.n_written = 0
        self.awaited = [AwaitedDisk(disk["name"], disk["size"]) for disk in description["disks"]]
        image = SimpleNamespace(pwrite=self._write, write_zeroes=lambda _offset, _length: None)
        self.disks: Any = [SimpleNamespace(disk=SimpleNamespace(image=image), received_bytes=0) for _ in self.awaited]

    def peak_of(self, stream: bytes) -> int:
        """Receive a stream, to its end or its error; return the bytes that were allocated at most at one time."""
        self.stream = memoryview(stream)
        tracemalloc.start()
        try:
            receiver = QemuReceiver(self, self.awaited, b"")  # type: ignore[arg-type]
            with suppress(RemoteProtocolError):
                while (event := receiver.run_slice()) is not Turn.CLOSED:
                    if event is Turn.DISKS:
                        receiver.disks = self.disks
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def _write(self, data: memoryview, _offset: int) -> None:
        self.n_written += len(data)

    def receive_nowait(self, buffer: memoryview) -> int:
        n = min(len(buffer), len(self.stream), PIECE)
        buffer[:n] = self.stream[:n]
        self.stream = self.stream[n:]
        return n

    receive_shortly = receive_nowait
