"""TrackedDisk: what the gate does with a write, and that every write is marked twice."""

from __future__ import annotations

import errno
import threading
from functools import partial
from typing import TYPE_CHECKING

import pytest

from fusemig.core.units import BLOCK_SIZE, CHUNK_SIZE, FULL_MASK
from fusemig.disk.fault import Fault, FaultDisk, Operation
from fusemig.disk.gate import MAX_PARKED_WRITES
from fusemig.disk.memory import MemoryDisk
from fusemig.disk.tracked import Gate, TrackedDisk
from fusemig.errors import DiskError, GateClosedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusemig.disk.base import Buffer
    from fusemig.disk.tracking import Tracking

SIZE = 3 * CHUNK_SIZE + 1536
REFUSED = GateClosedError(errno.EAGAIN, "refused", 0, 512)
"""What a write was refused with that is then parked."""


class MeetingDisk(MemoryDisk):
    """A memory disk that calls the test in the middle of a write, when half of it is stored."""

    def __init__(self, name: str, size: int) -> None:
        super().__init__(name, size)
        self.in_the_middle: Callable[[], None] = lambda: None

    def pwrite(self, data: Buffer, offset: int) -> None:
        half = len(data) // 2
        super().pwrite(memoryview(data)[:half], offset)
        self.in_the_middle()
        super().pwrite(memoryview(data)[half:], offset + half)

    def write_zeroes(self, offset: int, length: int) -> None:
        self.in_the_middle()
        super().write_zeroes(offset, length)


def make(gate: Gate = Gate.OPEN) -> tuple[MeetingDisk, TrackedDisk]:
    """Return an image and its guest's side."""
    image = MeetingDisk("a", SIZE)
    return image, TrackedDisk(image, gate=gate)


def write(disk: TrackedDisk) -> None:
    """Write a block."""
    disk.pwrite(b"x" * BLOCK_SIZE, 0)


def zero(disk: TrackedDisk) -> None:
    """Zero a block."""
    disk.write_zeroes(0, BLOCK_SIZE)


REQUESTS = pytest.mark.parametrize("request_", [write, zero])


@REQUESTS
def test_a_write_is_marked_when_it_is_admitted_and_when_it_has_ended(
    request_: Callable[[TrackedDisk], None],
) -> None:
    """A taking in the middle of the write finds the first mark; the second makes the chunk dirty again."""
    image, disk = make()
    tracking = disk.start_tracking()
    taken: list[object] = []
    image.in_the_middle = lambda: taken.append(tracking.take_next(0))
    request_(disk)
    assert taken == [(0, 1)]
    tracking.acknowledge([0])
    assert not tracking.is_clean
    assert tracking.take_next(0) == (0, 1)


@REQUESTS
def test_a_failed_write_is_marked_too(request_: Callable[[TrackedDisk], None]) -> None:
    """Half of it may be in the image: a taking that came before the error is not enough."""
    image = MemoryDisk("a", SIZE)
    kinds = frozenset({Operation.WRITE, Operation.ZERO})
    disk = TrackedDisk(
        FaultDisk(
            image,
            Fault(kinds, torn_bytes=100, when=lambda *_: tracking.take_next(0) is not None),
        )
    )
    tracking = disk.start_tracking()
    with pytest.raises(DiskError):
        request_(disk)
    tracking.acknowledge([0])
    assert tracking.dirty_bytes == BLOCK_SIZE


def test_an_interrupted_write_is_marked_too() -> None:
    """Whatever leaves the store, also what is no `DiskError`."""
    image, disk = make()
    tracking = disk.start_tracking()

    def interrupt() -> None:
        tracking.take_next(0)
        raise KeyboardInterrupt

    image.in_the_middle = interrupt
    with pytest.raises(KeyboardInterrupt):
        write(disk)
    assert tracking.dirty_bytes == BLOCK_SIZE
    disk.set_gate(Gate.CLOSED)
    assert disk.wait_drained(0)


@REQUESTS
def test_a_write_under_way_when_tracking_starts_is_marked_at_its_end(request_: Callable[[TrackedDisk], None]) -> None:
    """Its admission came too early to be marked, and a look for allocated blocks may have found a hole there."""
    image, disk = make()
    started: list[Tracking] = []
    image.in_the_middle = lambda: started.append(disk.start_tracking())
    request_(disk)
    assert started[0].take_next(0) == (0, 1)


@pytest.mark.parametrize(
    ("look", "expected"),
    [
        (lambda tracking: tracking.dirty_bytes, 2 * BLOCK_SIZE),
        (lambda tracking: tracking.pending_bytes, 2 * BLOCK_SIZE),
        (lambda tracking: tracking.dirty_chunks, 1),
        (lambda tracking: tracking.is_clean, False),
        (lambda tracking: tracking.next_dirty(1), 1),
        (lambda tracking: tracking.next_clean(1), 2),
        (lambda tracking: tracking.dirty_runs(), [(256, 257), (259, 260)]),
        (lambda tracking: tracking.take_next(0), (1, 0b1001)),
        (lambda tracking: tracking.take_next(1), (1, 0b1001)),
    ],
)
def test_a_look_at_a_tracker_sees_the_newest_marks(look: Callable[[Tracking], object], expected: object) -> None:
    """The mark of a second write to a chunk is not in the tracker yet."""
    _, disk = make()
    tracking = disk.start_tracking()
    disk.pwrite(b"x", CHUNK_SIZE)
    tracking.take_next(0)
    tracking.acknowledge([1])
    disk.pwrite(b"y", CHUNK_SIZE + 3 * BLOCK_SIZE)
    assert tracking.dirty_chunks == 1
    disk.pwrite(b"y", CHUNK_SIZE + 3 * BLOCK_SIZE)
    disk.pwrite(b"z", CHUNK_SIZE)
    assert look(tracking) == expected


def test_more_chunks_than_may_have_fresh_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes to the others are marked in the trackers, and nothing is lost."""
    monkeypatch.setattr("fusemig.disk.marks.MAX_FRESH", 1)
    _, disk = make()
    tracking = disk.start_tracking()
    for chunk in (0, 1, 2, 0, 1, 2):
        disk.pwrite(b"x", chunk * CHUNK_SIZE)
        disk.pwrite(b"x" * 3 * BLOCK_SIZE, chunk * CHUNK_SIZE + 3 * BLOCK_SIZE)
    assert [tracking.take_next(chunk) for chunk in (0, 1, 2)] == [(chunk, 0b111001) for chunk in (0, 1, 2)]


def test_every_tracker_sees_every_write() -> None:
    """Trackers do not know each other; one that stopped sees nothing more."""
    _, disk = make()
    first = disk.start_tracking()
    write(disk)
    second = disk.start_tracking()
    disk.pwrite(b"y", CHUNK_SIZE)
    assert (first.dirty_chunks, second.dirty_chunks) == (2, 1)
    first.stop()
    first.stop()
    disk.pwrite(b"z", 2 * CHUNK_SIZE)
    assert (first.dirty_chunks, second.dirty_chunks) == (2, 2)


def test_the_migrations_own_traffic_is_not_marked() -> None:
    """Writes to the layer below pass the gate and the marks by."""
    image, disk = make(Gate.READ_ONLY)
    tracking = disk.start_tracking()
    image.pwrite(b"abcd", 0)
    assert tracking.is_clean
    assert disk.pread(4, 0) == b"abcd"


@REQUESTS
def test_a_closed_gate_parks(request_: Callable[[TrackedDisk], None]) -> None:
    """Nothing has happened to the write: no byte stored, nothing marked."""
    image, disk = make(Gate.CLOSED)
    image.content[:] = b"\1" * SIZE
    tracking = disk.start_tracking()
    with pytest.raises(GateClosedError) as caught:
        request_(disk)
    assert (caught.value.errno, caught.value.offset, caught.value.length) == (errno.EAGAIN, 0, BLOCK_SIZE)
    assert image.content == b"\1" * SIZE
    assert tracking.is_clean
    assert disk.bytes_written == disk.written_chunks == 0


@REQUESTS
def test_a_read_only_gate_refuses(request_: Callable[[TrackedDisk], None]) -> None:
    """EROFS, which is no reason to park."""
    _, disk = make(Gate.READ_ONLY)
    tracking = disk.start_tracking()
    with pytest.raises(DiskError) as caught:
        request_(disk)
    assert caught.value.errno == errno.EROFS
    assert not isinstance(caught.value, GateClosedError)
    assert tracking.is_clean


@pytest.mark.parametrize("gate", Gate)
def test_reads_and_flushes_are_never_gated(gate: Gate) -> None:
    """A frozen guest reads, and its fsync is answered."""
    image, disk = make(gate)
    image.content[:1] = b"x"
    assert disk.pread(1, 0) == b"x"
    assert disk.pread_nowait(memoryview(bytearray(1)), 0)
    assert not disk.pwrite_may_sleep(0, 1)
    disk.flush()
    assert image.n_flushes == 1
    assert next(disk.extents(0, SIZE)) == (0, BLOCK_SIZE, True)


@pytest.mark.parametrize("gate", [Gate.OPEN, Gate.READ_ONLY])
def test_parked_writes_resume_when_the_gate_changes(gate: Gate) -> None:
    """Each is called once, in order, after the change, and may make its write again at once."""
    _, disk = make(Gate.CLOSED)
    resumed: list[tuple[int, Gate]] = []
    for number in range(3):
        assert disk.write_gate.park(lambda number=number: resumed.append((number, disk.gate)), REFUSED)  # type: ignore[misc]
    assert disk.parked_writes == 3
    disk.set_gate(Gate.CLOSED)
    assert not resumed
    disk.set_gate(gate)
    assert resumed == [(0, gate), (1, gate), (2, gate)]
    assert disk.parked_writes == 0
    disk.set_gate(Gate.OPEN)
    assert len(resumed) == 3


@pytest.mark.parametrize("gate", [Gate.OPEN, Gate.READ_ONLY])
def test_nothing_is_parked_at_a_gate_that_is_not_closed(gate: Gate) -> None:
    """Between the refusal and the parking the gate may have changed: try again, nobody would call."""
    _, disk = make(gate)
    assert not disk.write_gate.park(lambda: pytest.fail("called"), REFUSED)
    assert disk.parked_writes == 0


def test_a_resumed_write_may_write_and_park_again() -> None:
    """`resume` runs without the lock: the gate that opens and closes again parks it again."""
    _, disk = make(Gate.CLOSED)
    tries = []

    def resume() -> None:
        tries.append(disk.gate)
        write(disk)

    disk.write_gate.park(resume, REFUSED)
    disk.set_gate(Gate.OPEN)
    assert tries == [Gate.OPEN]
    assert disk.bytes_written == BLOCK_SIZE


def test_one_frozen_disk_does_not_take_every_place() -> None:
    """Past the cap a write is answered EAGAIN; those parked are kept, and places become free again."""
    _, disk = make(Gate.CLOSED)
    resumed: list[int] = []
    for number in range(MAX_PARKED_WRITES):
        assert disk.write_gate.park(lambda number=number: resumed.append(number), REFUSED)  # type: ignore[misc]
    with pytest.raises(DiskError) as caught:
        disk.write_gate.park(lambda: None, REFUSED)
    assert caught.value.errno == errno.EAGAIN
    assert not isinstance(caught.value, GateClosedError)
    disk.set_gate(Gate.OPEN)
    assert resumed == list(range(MAX_PARKED_WRITES))
    disk.set_gate(Gate.CLOSED)
    assert disk.write_gate.park(lambda: None, REFUSED)


def test_an_answered_write_gives_its_place_back() -> None:
    """What was unparked is never called, the others still are, in order; unparking twice or too late does nothing."""
    _, disk = make(Gate.CLOSED)
    resumed: list[int] = []
    resumes = [partial(resumed.append, number) for number in range(MAX_PARKED_WRITES)]
    for resume in resumes:
        assert disk.write_gate.park(resume, REFUSED)
    disk.write_gate.unpark(resumes[1])
    disk.write_gate.unpark(resumes[1])
    assert disk.parked_writes == MAX_PARKED_WRITES - 1
    last = partial(resumed.append, -1)
    assert disk.write_gate.park(last, REFUSED)
    disk.set_gate(Gate.OPEN)
    assert resumed == [0, *range(2, MAX_PARKED_WRITES), -1]
    disk.write_gate.unpark(last)
    assert disk.parked_writes == 0


def test_the_gate_is_drained_when_the_last_admitted_write_has_ended() -> None:
    """Closing does not wait; `wait_drained` does, and gives up when told to."""
    image, disk = make()
    reached, leave = threading.Event(), threading.Event()

    def linger() -> None:
        reached.set()
        assert leave.wait(10)

    image.in_the_middle = linger
    thread = threading.Thread(target=write, args=[disk])
    thread.start()
    try:
        assert reached.wait(10)
        disk.set_gate(Gate.CLOSED)
        assert not disk.wait_drained(0)
        with pytest.raises(GateClosedError):
            write(disk)
        waiter: list[bool] = []
        waiting = threading.Thread(target=lambda: waiter.append(disk.wait_drained(10)))
        waiting.start()
    finally:
        leave.set()
        thread.join(10)
    waiting.join(10)
    assert waiter == [True]
    assert disk.wait_drained(0)
    assert image.content[:BLOCK_SIZE] == b"x" * BLOCK_SIZE


def test_a_failed_write_drains() -> None:
    """An error is an end too."""
    disk = TrackedDisk(FaultDisk(MemoryDisk("a", SIZE), Fault(times=None)))
    with pytest.raises(DiskError):
        write(disk)
    disk.set_gate(Gate.CLOSED)
    assert disk.wait_drained(0)


@pytest.mark.parametrize(("offset", "length"), [(SIZE, 1), (SIZE - 1, 2), (-1, 1), (1 << 70, 1)])
def test_a_write_outside_the_disk_is_refused_before_anything(offset: int, length: int) -> None:
    """EINVAL, unmarked, whatever the gate."""
    _, disk = make()
    tracking = disk.start_tracking()
    for gate in Gate:
        disk.set_gate(gate)
        with pytest.raises(DiskError) as caught:
            disk.pwrite(b"x" * length, offset)
        assert caught.value.errno == errno.EINVAL
    assert tracking.is_clean


def test_an_empty_write_changes_nothing() -> None:
    """It is admitted and marks nothing."""
    _, disk = make()
    tracking = disk.start_tracking()
    disk.pwrite(b"", 5)
    assert tracking.is_clean
    assert disk.written_chunks == 0


def test_taking_goes_round_what_is_in_flight() -> None:
    """A chunk that is dirty and in flight waits for its acknowledgement (rule 4)."""
    _, disk = make()
    tracking = disk.start_tracking()
    tracking.mark_chunks(0, 3)
    assert tracking.take_next(0) == (0, FULL_MASK)
    write(disk)
    assert tracking.take_next(0) == (1, FULL_MASK)
    tracking.restore(1)
    assert tracking.take_next(2) == (2, FULL_MASK)
    assert tracking.take_next(2) is None
    tracking.acknowledge([0, 2])
    assert tracking.take_next(0) == (0, 1)
    tracking.mark(CHUNK_SIZE * 3, 1)
    assert tracking.pending_bytes == BLOCK_SIZE + CHUNK_SIZE + 1536
    assert (tracking.dirty_chunks, tracking.in_flight_chunks) == (2, 1)
    tracking.restore_all()
    assert (tracking.dirty_chunks, tracking.in_flight_chunks) == (3, 0)


def test_statistics_count_what_guests_wrote() -> None:
    """Bytes and chunks since the disk was opened."""
    _, disk = make()
    disk.pwrite(b"x" * (CHUNK_SIZE + 1), CHUNK_SIZE - 1)
    assert disk.bytes_written == CHUNK_SIZE + 1
    assert disk.written_chunks == 2


def test_closing_closes_the_image() -> None:
    """The layer owns what it lies on."""
    closed: list[bool] = []

    class Image(MemoryDisk):
        def close(self) -> None:
            closed.append(True)

    with TrackedDisk(FaultDisk(Image("a", 512))):
        pass
    assert closed == [True]


def test_a_held_disk_stays_closed_whatever_a_migration_does() -> None:
    """`stop` is a wish of its own: freezing, thawing and taking over do not undo it, and a hand-off answers."""
    disk = TrackedDisk(MemoryDisk("a", CHUNK_SIZE))
    tried: list[str] = []
    disk.set_held(True)
    assert (disk.gate, disk.is_frozen) == (Gate.CLOSED, False)
    with pytest.raises(GateClosedError, match="is stopped"):
        disk.pwrite(b"x", 0)
    assert disk.write_gate.park(lambda: tried.append("parked"), REFUSED)
    disk.set_gate(Gate.CLOSED)
    assert (disk.gate, disk.is_frozen) == (Gate.CLOSED, True)
    with pytest.raises(GateClosedError, match="is frozen"):
        disk.pwrite(b"x", 0)
    disk.set_gate(Gate.OPEN)
    assert disk.gate is Gate.CLOSED
    assert not tried
    disk.set_gate(Gate.READ_ONLY)
    assert (disk.gate, tried) == (Gate.READ_ONLY, ["parked"])


def test_lifting_a_hold_opens_only_what_would_be_open() -> None:
    """It makes no second writer: a read-only or frozen disk stays what it is."""
    disk = TrackedDisk(MemoryDisk("a", CHUNK_SIZE))
    tried: list[str] = []
    for gate in (Gate.READ_ONLY, Gate.CLOSED):
        disk.set_held(True)
        disk.set_gate(gate)
        disk.set_held(False)
        assert disk.gate is gate
    disk.set_held(True)
    disk.set_gate(Gate.OPEN)
    assert disk.write_gate.park(lambda: tried.append("parked"), REFUSED)
    disk.set_held(False)
    assert disk.gate is Gate.OPEN
    assert tried == ["parked"]
    disk.pwrite(b"x", 0)
    assert not disk.write_gate.park(lambda: tried.append("late"), REFUSED)
    counters = disk.statistics()
    assert (counters.written_bytes, counters.n_writes, counters.n_flushes) == (1, 1, 0)


def test_requests_that_the_store_fails_are_counted_apart() -> None:
    """A failed read, write and flush each; what the gate or the disk's end refuses is no failure of the store."""
    fault = FaultDisk(MemoryDisk("a", CHUNK_SIZE), *(Fault(frozenset({one})) for one in Operation))
    disk = TrackedDisk(fault)
    buffer = memoryview(bytearray(512))
    requests: list[Callable[[], None]] = [
        partial(disk.pread_into, buffer, 0),
        partial(disk.pwrite, b"x", 0),
        disk.flush,
        partial(disk.pwrite, b"x", CHUNK_SIZE),
    ]
    for request in requests:
        with pytest.raises(DiskError):
            request()
    counters = disk.statistics()
    assert (counters.n_failed_reads, counters.n_failed_writes, counters.n_failed_flushes) == (1, 1, 1)
    assert (counters.n_reads, counters.n_flushes) == (0, 0)
