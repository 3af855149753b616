"""Dirty tracking under every interleaving: guests, passes, the wire, losses, freezes, against a bytearray.

A guest's write and a chunk's read are each two halves with a pause between them (`support.lockstep`), so a read can
fall between a write's admission and its end, and a write between a chunk's taking and its read. The frames are made by
the real `PassReader`, travel as bytes, are decoded by the real decoder and applied by the real `FrameWriter`; the
network delivers, acknowledges and loses any number of them.

Chunks may be mirrored, so that their writes go before the pass; replies may be held: one is given only when the
destination has the write, unless a later one lies over it.

At all times: where the tracker is clean, nothing differs. At each hand-off: the destination equals the model, the
digests are equal, nothing is missing.

Taken out of the package by hand, one at a time, each of these rules makes this machine fail (rule 1: the mark at
admission, the mark at the end; rule 2: clearing before the read; rule 3: everything allocated is dirty at first;
rule 4: what is in flight is not taken again). So do: a reply that is given with the acknowledgement of what was taken
before its write ended, and holes that are sent after a mirrored write into them.
"""

from __future__ import annotations

import random
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fusemig.core.mirror import Reach
from fusemig.core.units import BLOCK_SIZE, CHUNK_SIZE, chunk_mask, chunks_of, mask_extents, n_chunks
from fusemig.disk.dirty_file import DirtyFile
from fusemig.disk.dirty_map import MapBase, Since, dirty_file_size
from fusemig.disk.fault import Fault, FaultDisk, Operation
from fusemig.disk.memory import MemoryDisk
from fusemig.disk.tracked import Gate, TrackedDisk
from fusemig.errors import DiskError, GateClosedError, MigrationError
from fusemig.migration.link import BufferPool
from fusemig.migration.order import HeatOrder
from fusemig.migration.reader import OutgoingDisk, PassReader
from fusemig.migration.resume import LivingReconciliation, MappedReconciliation, ResumePoint, journal_pages
from fusemig.migration.writer import FrameWriter, IncomingDisk
from fusemig.records.epoch import EpochFile
from fusemig.wire import native
from support.lockstep import Lockstep, pause
from support.pair import nothing

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from fusemig.disk.base import Buffer, Extent
    from fusemig.migration.reader import SentFrame
    from fusemig.migration.resume import Reconciliation

SIZE = 3 * CHUNK_SIZE + 1536
MIN_STEPS = 10_000
NOISE = random.Random(11).randbytes(2 * SIZE)
"""Where random contents are cut from: making them anew took a quarter of the time."""


class PausingDisk(MemoryDisk):
    """A memory disk on which a lockstep call pauses with half its work done."""

    def pwrite(self, data: Buffer, offset: int) -> None:
        half = len(data) // 2
        super().pwrite(memoryview(data)[:half], offset)
        pause()
        super().pwrite(memoryview(data)[half:], offset + half)

    def write_zeroes(self, offset: int, length: int) -> None:
        half = length // 2
        super().write_zeroes(offset, half)
        pause()
        super().write_zeroes(offset + half, length - half)

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        half = len(buffer) // 2
        super().pread_into(buffer[:half], offset)
        pause()
        super().pread_into(buffer[half:], offset + half)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        for extent in super().extents(offset, length):
            yield extent
            pause()


class GuestWrite:
    """A write under way, and how much of it the model must take over when."""

    def __init__(self, machine: TrackingMachine, offset: int, data: bytes | int, fails_after: int | None) -> None:
        self.machine, self.offset = machine, offset
        self.length = data if isinstance(data, int) else len(data)
        content = self.content = bytes(self.length) if isinstance(data, int) else data
        machine.cover(offset, self.length)
        stored = content if fails_after is None else content[: min(fails_after, self.length - 1)]
        half = len(stored) // 2
        self.parts = [(offset, stored[:half]), (offset + half, stored[half:])]
        self.fails = fails_after is not None
        if self.fails:
            kind = Operation.ZERO if isinstance(data, int) else Operation.WRITE
            machine.faults.add(
                Fault(
                    frozenset({kind}),
                    when=lambda _, at, length: (at, length) == (self.offset, self.length),
                    torn_bytes=len(stored),
                )
            )
        self.take_over_part()
        if isinstance(data, int):
            self.call = Lockstep(lambda: machine.disk.write_zeroes(offset, data))
        else:
            self.call = Lockstep(lambda: machine.disk.pwrite(data, offset))
        if self.call.is_over:
            self.check_outcome()

    def take_over_part(self) -> None:
        offset, data = self.parts.pop(0)
        self.machine.model[offset : offset + len(data)] = data

    def end(self) -> None:
        self.take_over_part()
        self.call.resume()
        assert self.call.is_over
        self.check_outcome()

    def check_outcome(self) -> None:
        while self.parts:
            self.take_over_part()
        assert isinstance(self.call.error, DiskError) == self.fails, self.call.error
        self.machine.written(self.offset, self.content, is_made=not self.fails)


class HeldReply:
    """A write that was made and is not answered."""

    def __init__(self, offset: int, content: bytes, mirrored: Sequence[int]) -> None:
        self.offset, self.content = offset, content
        ends = offset, offset + len(content)
        places = [(max(ends[0], chunk * CHUNK_SIZE), min(ends[1], (chunk + 1) * CHUNK_SIZE)) for chunk in mirrored]
        self.parts = [(first, content[first - offset : stop - offset]) for first, stop in places]
        """What the destination must have before it is given: what lies in chunks that are mirrored. Passes send the
        rest, of which the destination lacks other parts, too."""
        self.is_covered = False
        """Whether a later write lies over a part of it."""


class TrackingMachine(RuleBasedStateMachine):
    """One disk on its way, over one connection after another, one migration after another."""

    n_steps = 0
    """Steps of all runs together."""
    n_answers = 0
    """Replies that were held and then given."""
    directory: Path

    def __init__(self) -> None:
        super().__init__()
        self.rng = random.Random(4711)
        self.source = PausingDisk("a", SIZE)
        self.target = MemoryDisk("a", SIZE)
        self.faults = FaultDisk(self.source)
        self.disk = TrackedDisk(self.faults)
        self.model = bytearray(SIZE)
        self.writes: list[GuestWrite] = []
        self.n_parked = 0
        self.held: list[HeldReply] = []
        self.is_releasing = self.mirrors = False
        self.n_since_switch_over = 0
        self.scan: Lockstep | None = None
        self.outgoing: OutgoingDisk | None = None
        self.attempt = 0
        self.n_migrations = 0
        self.dirty_file = DirtyFile(self.disk, "boot", None, lambda: MemoryDisk("a", dirty_file_size(SIZE)))

    @initialize(
        holes=st.sets(st.integers(0, 3)),
        stale=st.booleans(),
        scan_now=st.sampled_from([True, True, False]),
        mirrors=st.booleans(),
    )
    def start(self, holes: set[int], stale: bool, scan_now: bool, mirrors: bool) -> None:
        """Give the source some data, and the destination what an earlier migration left there."""
        for chunk in set(range(4)) - holes:
            start = chunk * CHUNK_SIZE
            self.model[start : start + CHUNK_SIZE] = self.noise(min(CHUNK_SIZE, SIZE - start))
        self.source.content[:] = self.model
        if stale:
            self.target.content[:] = self.noise(SIZE)
        self.mirrors = mirrors
        self.begin_migration()
        if scan_now:
            self.scan_goes_on(to_the_end=True)

    def noise(self, length: int) -> bytes:
        """Return random bytes."""
        at = self.rng.randrange(len(NOISE) - length)
        return NOISE[at : at + length]

    def begin_migration(self) -> None:
        """Start tracking, then look for what is allocated; writes may fall in between."""
        if self.outgoing is not None:
            self.mirror_ends()
            self.outgoing.tracking.stop()
        self.n_migrations += 1
        # With a write under way the map does not count.
        self.dirty_file.begin(Since.SESSION, MapBase(image_id="image", epoch=0, session=str(self.n_migrations)))
        self.outgoing = OutgoingDisk(0, self.disk, self.disk.start_tracking())
        self.incoming = IncomingDisk(TrackedDisk(self.target, gate=Gate.READ_ONLY), EpochFile(self.directory), nothing)
        self.scan = Lockstep(self.outgoing.find_allocated)
        self.connect()

    def connect(self) -> None:
        """Make a connection: both ends count frames from 1 again."""
        self.attempt += 1
        pool = BufferPool()
        assert self.outgoing is not None
        self.reader = PassReader([self.outgoing], pool)
        self.decoder = native.Decoder(native.FROM_SOURCE, preface=False)
        self.writer = FrameWriter([self.incoming], pool)
        self.read: Lockstep | None = None
        self.wire: list[bytes] = []
        self.applied = 0
        self.unacknowledged: list[SentFrame] = []

    @property
    def has_work(self) -> bool:
        """Whether a pass would find something."""
        assert self.outgoing is not None
        return self.scan is None and bool(self.outgoing.tracking.dirty_chunks or self.outgoing.holes)

    @property
    def tracking_is_clean(self) -> bool:
        assert self.outgoing is not None
        return self.scan is None and self.outgoing.tracking.is_clean and not self.outgoing.holes

    # Guests

    offsets = st.integers(0, SIZE - 1) | st.sampled_from(
        [0, BLOCK_SIZE - 1, CHUNK_SIZE - 1, CHUNK_SIZE, 2 * CHUNK_SIZE - BLOCK_SIZE, SIZE - 1, SIZE - 1536]
    )
    lengths = st.integers(1, 3 * BLOCK_SIZE) | st.sampled_from([1, 512, BLOCK_SIZE, CHUNK_SIZE, CHUNK_SIZE + 5, SIZE])

    @precondition(lambda self: len(self.writes) < 3)
    @rule(
        offset=offsets,
        length=lengths,
        kind=st.sampled_from(["data", "data", "data", "zeroes", "zero bytes"]),
        fails_after=st.none() | st.none() | st.integers(0, 2 * BLOCK_SIZE),
        ends=st.booleans(),
    )
    def guest_writes(self, offset: int, length: int, kind: str, fails_after: int | None, ends: bool) -> None:
        """Begin a write, at any place and of any length, and perhaps end it; or see it parked."""
        length = min(length, SIZE - offset)
        if any(one.offset < offset + length and offset < one.offset + one.length for one in self.writes):
            ends = True  # overlapping writes have no order that a model could know, unless one is inside the other
            for one in self.writes[:]:
                self.writes.remove(one)
                one.end()
        if self.disk.gate is Gate.CLOSED:
            self.see_it_parked(offset, length)
            return
        data = length if kind == "zeroes" else bytes(length) if kind == "zero bytes" else self.noise(length)
        write = GuestWrite(self, offset, data, fails_after)
        if not write.call.is_over:
            self.writes.append(write)
            if ends:
                self.writes.pop().end()

    @precondition(lambda self: len(self.writes) < 3 and any(frame.chunks for frame in self.unacknowledged))
    @rule(data=st.data(), block=st.sampled_from([0, 1, 200]), ends=st.sampled_from([True, True, False]))
    def guest_writes_what_is_under_way(self, data: st.DataObject, block: int, ends: bool) -> None:
        """Write a block of a chunk that was sent and is not acknowledged."""
        chunks = sorted({chunk for frame in self.unacknowledged for chunk in frame.chunks})
        offset = min(data.draw(st.sampled_from(chunks)) * CHUNK_SIZE + block * BLOCK_SIZE, SIZE - 512)
        self.guest_writes(offset=offset, length=512, kind="data", fails_after=None, ends=ends)

    # Replies

    def cover(self, offset: int, length: int) -> None:
        """A write begins, and may be seen at the destination from now on."""
        for one in self.held:
            one.is_covered |= one.offset < offset + length and offset < one.offset + len(one.content)

    def written(self, offset: int, content: bytes, *, is_made: bool) -> None:
        """A write has ended; answer it, unless its reply is held."""
        mirror = None if self.outgoing is None else self.outgoing.tracking.pacing._tracker.mirror
        mirrored = [] if mirror is None else [chunk for chunk in chunks_of(offset, len(content)) if chunk in mirror]
        held = HeldReply(offset, content, mirrored)
        self.held.append(held)
        if not is_made or not self.disk.write_gate.hold_reply(offset, len(content), lambda: self.answer(held)):
            self.held.remove(held)

    def answer(self, held: HeldReply) -> None:
        """Give a reply: the destination has the write, unless everything is given up."""
        self.held.remove(held)
        type(self).n_answers += not self.is_releasing
        if not self.is_releasing and not held.is_covered:
            for at, content in held.parts:
                assert self.target.content[at : at + len(content)] == content

    @precondition(lambda self: self.scan is None and self.n_since_switch_over % 8 == 7)
    @rule(reach=st.sampled_from([Reach.HOT, Reach.ALL]), is_blocking=st.sampled_from([True, True, False]))
    def mirror(self, reach: Reach, is_blocking: bool) -> None:
        """Mirror, or mirror other chunks than before."""
        assert self.outgoing is not None
        self.outgoing.tracking.pacing.mirror(reach, 0.0, lambda: None)
        # Wide enough for any write: everything may be dirty, and under way besides.
        self.outgoing.tracking.pacing.set_window(4 * SIZE, is_blocking=is_blocking)

    @precondition(lambda self: self.scan is None and self.read is None and self.disk.write_gate.holds_replies)
    @rule()
    def catch_up(self) -> None:
        """Send everything and have it acknowledged, so that every chunk is mirrored."""
        self.reader.begin_pass()
        self.read = Lockstep(lambda: self.reader.read_batch(64 * CHUNK_SIZE))
        self.finish_read()
        while self.wire:
            self.deliver(8)
        while self.unacknowledged:
            self.acknowledge(8)

    def mirror_ends(self) -> None:
        """Give everything up that is held."""
        if self.outgoing is not None:
            self.is_releasing = True
            self.outgoing.tracking.pacing.release()
            self.is_releasing = False
        assert not self.held

    def see_it_parked(self, offset: int, length: int) -> None:
        with pytest.raises(GateClosedError) as refused:
            self.disk.pwrite(bytes(length), offset)
        assert self.disk.write_gate.park(self.resumed, refused.value)
        self.n_parked += 1

    def resumed(self) -> None:
        self.n_parked -= 1

    @precondition(lambda self: self.writes)
    @rule(data=st.data())
    def guest_write_ends(self, data: st.DataObject) -> None:
        """End any of the writes under way."""
        self.writes.pop(data.draw(st.integers(0, len(self.writes) - 1))).end()

    # The source

    @precondition(lambda self: self.scan is not None)
    @rule(to_the_end=st.sampled_from([True, True, False]))
    def scan_goes_on(self, to_the_end: bool) -> None:
        """Go on looking for what is allocated."""
        assert self.scan is not None
        assert self.outgoing is not None
        if to_the_end:
            self.scan.finish()
        if not self.scan.is_over:
            self.scan.resume()
        if self.scan.is_over:
            self.scan.finish()
            self.scan = None
            if self.mirrors:
                self.mirror(Reach.ALL, is_blocking=True)

    @precondition(lambda self: self.read is None and self.has_work)
    @rule(by_heat=st.booleans())
    def begin_pass(self, by_heat: bool) -> None:
        """Put the cursor back; the pass may leave hot chunks for its end."""
        self.reader.begin_pass(HeatOrder([(self.disk.heat, SIZE)]) if by_heat else None)

    @precondition(lambda self: self.read is None and self.has_work)
    @rule(
        limit=st.sampled_from([1, CHUNK_SIZE, 4 * CHUNK_SIZE]),
        n_pauses=st.sampled_from([0, 0, 0, 1, 2, 6, 6]),
        is_new=st.sampled_from([True, True, False]),
        is_mirrored=st.sampled_from([True, False, False]),
    )
    def read_batch(self, limit: int, n_pauses: int, is_new: bool, is_mirrored: bool) -> None:
        """Begin to read for sending, and stop in the middle of a read; or read all of it."""
        if is_new:
            self.reader.begin_pass()
        read = self.reader.read_mirrored if is_mirrored else self.reader.read_batch
        call = self.read = Lockstep(lambda: read(limit))
        for _ in range(n_pauses):
            if not call.is_over:
                call.resume()
        if call.is_over or n_pauses == 6:
            self.finish_read()

    @precondition(lambda self: self.read is not None)
    @rule()
    def finish_read(self) -> None:
        """Read the batch to its end and send it."""
        assert self.read is not None
        read, self.read = self.read, None
        batch = read.finish()
        if batch is None:
            return
        head = None
        for buffer in batch.buffers:
            if head is None:
                head = bytes(buffer)
                if head[2] == native.FrameType.ZERO:
                    self.wire.append(head)
                    head = None
            else:
                self.wire.append(head + bytes(buffer))
                head = None
        assert head is None
        self.unacknowledged += batch.frames

    @precondition(lambda self: self.read is None and self.has_work and self.n_since_switch_over > 12)
    @rule(nth=st.integers(1, 4))
    def reading_fails(self, nth: int) -> None:
        """The source's store fails a read, which ends the migration; the next one begins anew."""
        self.faults.add(Fault(frozenset({Operation.READ}), nth=nth))
        self.reader.begin_pass()
        try:
            self.read = Lockstep(lambda: self.reader.read_batch(4 * CHUNK_SIZE))
            self.finish_read()
        except MigrationError:
            self.begin_migration()
        finally:
            self.faults.mend()

    # The network and the destination

    @precondition(lambda self: self.wire)
    @rule(n=st.sampled_from([1, 1, 2, 8]))
    def deliver(self, n: int) -> None:
        """Let frames arrive and be applied."""
        arrived, self.wire = self.wire[:n], self.wire[n:]
        frames = self.decoder.feed(b"".join(arrived))
        assert len(frames) == len(arrived)
        for frame in frames:
            assert isinstance(frame, native.DataFrame | native.ZeroFrame)
            self.writer.apply(frame)
        self.applied += len(frames)

    @precondition(lambda self: self.unacknowledged and self.unacknowledged[0].sequence <= self.applied)
    @rule(n=st.sampled_from([1, 1, 2, 8]))
    def acknowledge(self, n: int) -> None:
        """Let acknowledgements of applied frames arrive."""
        assert self.outgoing is not None
        while n and self.unacknowledged and self.unacknowledged[0].sequence <= self.applied:
            frame = self.unacknowledged.pop(0)
            self.outgoing.tracking.acknowledge(frame.chunks)
            n -= 1

    @precondition(lambda self: self.scan is None and (self.unacknowledged or self.read is not None))
    @rule(n_arrive=st.integers(0, 3), torn=st.booleans(), is_journaled=st.booleans())
    def lose_connection(self, n_arrive: int, torn: bool, is_journaled: bool) -> None:
        """Cut the connection: some frames still arrive, no acknowledgement does, and a half frame is nothing.

        Then both sides go on: the destination says what it has, and its journal covers all that came, or nothing.
        """
        assert self.outgoing is not None
        if self.read is not None:
            self.finish_read()
        self.mirror_ends()
        if self.wire and n_arrive:
            self.deliver(n_arrive)
        if self.wire and torn:
            assert not self.decoder.feed(self.wire[0][:-1])
        note(f"lost {len(self.wire)} frames, {len(self.unacknowledged)} unacknowledged")
        lost = [(self.attempt, frame) for frame in self.unacknowledged]
        point = ResumePoint("session", [self.outgoing], lost, lost)
        covered = native.Covered(self.attempt, self.applied) if is_journaled else native.Covered()
        point.land([covered])
        if not self.outgoing.holes and all(frame.chunks for _, frame in lost):
            self.check_that_what_differs_is_dirty()
        self.go_on(LivingReconciliation(self.outgoing, point.doubtful_chunks(self.outgoing, covered)))
        self.connect()
        if self.mirrors:
            self.mirror(Reach.ALL, is_blocking=True)

    def go_on(self, walk: Reconciliation) -> None:
        """Have the source hear what the destination has; the destination is one that was restarted."""
        pages = list(journal_pages(0, self.incoming.digest))
        self.incoming = IncomingDisk(TrackedDisk(self.target, gate=Gate.READ_ONLY), EpochFile(self.directory), nothing)
        for have in pages:
            for chunk, value in enumerate(struct.unpack(f"<{len(have.values) // 8}Q", have.values), have.first):
                if value:
                    self.incoming.digest.restore(chunk, value)
            walk.on_have(have, native.Resumption.JOURNAL)
        walk.end()

    @precondition(
        lambda self: (
            self.scan is None
            and not self.unacknowledged
            and self.read is None
            and self.dirty_file.base(Since.SESSION) is not None
        )
    )
    @rule()
    def restart_source(self) -> None:
        """Kill the source between two frames: its map of what was written since the migration began is left."""
        assert self.outgoing is not None
        self.mirror_ends()
        self.outgoing.tracking.stop()
        self.outgoing = OutgoingDisk(0, self.disk, self.disk.start_tracking())
        self.outgoing.find_allocated()
        self.go_on(MappedReconciliation(self.outgoing, self.dirty_file.written(Since.SESSION)))
        self.connect()

    def check_that_what_differs_is_dirty(self) -> None:
        """Compare block by block, with nothing in flight: the mask of every chunk covers what differs."""
        assert self.outgoing is not None
        tracking, chunk, masks = self.outgoing.tracking, 0, dict.fromkeys(range(n_chunks(SIZE)), 0)
        while (taken := tracking.take_next(chunk)) is not None:
            chunk = taken[0] + 1
            masks[taken[0]] = taken[1]
        tracking.restore_all()
        for chunk, mask in masks.items():
            for offset, length in mask_extents(chunk_mask(chunk, SIZE) & ~mask, chunk, SIZE):
                assert self.target.content[offset : offset + length] == self.source.content[offset : offset + length]

    # The hand-off

    @precondition(lambda self: self.scan is None and self.disk.gate is Gate.OPEN and self.n_since_switch_over % 5 == 4)
    @rule()
    def freeze(self) -> None:
        """Close the gate; writes under way go on."""
        self.disk.set_gate(Gate.CLOSED)
        assert self.disk.wait_drained(0) == (not self.writes)

    @precondition(lambda self: self.disk.gate is Gate.CLOSED)
    @rule()
    def thaw(self) -> None:
        """Give up the switchover: every parked write is tried again."""
        self.disk.set_gate(Gate.OPEN)
        assert self.n_parked == 0

    @precondition(lambda self: self.scan is None and self.n_since_switch_over > 12)
    @rule(again=st.sampled_from([False, False, True]))
    def switch_over(self, again: bool) -> None:
        """Freeze, drain, send the rest, compare; then thaw, with the same migration going on or a new one."""
        assert self.outgoing is not None
        self.n_since_switch_over = 0
        self.disk.set_gate(Gate.CLOSED)
        while self.writes:
            self.writes.pop().end()
        assert self.disk.wait_drained(0)
        if self.read is not None:
            self.finish_read()
        for _ in range(3):
            while self.wire:
                self.deliver(8)
            while self.unacknowledged:
                self.acknowledge(8)
            self.reader.begin_pass()
            self.read = Lockstep(lambda: self.reader.read_batch(64 * CHUNK_SIZE))
            self.finish_read()
        assert not self.wire
        assert self.tracking_is_clean
        assert not self.held
        assert self.source.content == self.model
        assert self.target.content == self.model
        assert not self.incoming.missing()
        assert self.outgoing.digest.value == self.incoming.digest.value
        self.thaw()
        if again:
            self.begin_migration()

    @precondition(lambda self: self.scan is None and self.disk.gate is Gate.OPEN and self.writes)
    @rule()
    def start_over(self) -> None:
        """Give the migration up and begin another one while guests' writes are under way."""
        if self.read is not None:
            self.finish_read()
        self.begin_migration()

    # Invariants

    @invariant()
    def counted(self) -> None:
        type(self).n_steps += 1
        self.n_since_switch_over += 1

    @invariant()
    def clean_is_equal(self) -> None:
        """Where nothing is dirty and nothing in flight, the destination holds what the source holds, even now."""
        if self.outgoing is None or self.read is not None:
            return
        if self.tracking_is_clean and all(frame.chunks for frame in self.unacknowledged):
            assert self.target.content == self.source.content

    @invariant()
    def the_model_is_the_source(self) -> None:
        """The model knows what is stored of every write, also of half ones."""
        assert self.source.content == self.model

    def teardown(self) -> None:
        """Let no thread outlive the run."""
        self.mirror_ends()
        for write in self.writes:
            write.end()
        for call in (self.read, self.scan) if self.outgoing is not None else ():
            if call is not None:
                call.finish()


@pytest.mark.timeout(3600)
def test_tracking_under_every_interleaving(tmp_path: Path, nightly: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At least ten thousand steps, the same in every run; with ``--nightly`` ten times as many, new every time."""
    TrackingMachine.directory = tmp_path / "unused"
    TrackingMachine.n_steps = 0
    monkeypatch.setattr("fusemig.disk.dirty_file.BEGIN_DEADLINE_S", 0)  # there is one thread: no write ends meanwhile
    run_state_machine_as_test(
        TrackingMachine,
        settings=settings(
            max_examples=3200 if nightly else 320,
            stateful_step_count=50,
            derandomize=not nightly,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(f"{TrackingMachine.n_steps} steps, {TrackingMachine.n_answers} held replies given")
    assert TrackingMachine.n_answers
    assert TrackingMachine.n_steps >= MIN_STEPS
