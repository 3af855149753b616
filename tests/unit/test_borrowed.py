"""BorrowedDisk: requests that wait for what is missing; FetchPlan: what is asked for, and in which order."""

from __future__ import annotations

import errno
import itertools
import struct
import threading
import tracemalloc
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusemig.core.units import BLOCK_SIZE, BLOCKS_PER_CHUNK, CHUNK_SIZE, n_blocks
from fusemig.daemon.block_info import block_info, served_disk
from fusemig.daemon.disk_spec import DiskSpec
from fusemig.daemon.served import ServedDisk
from fusemig.disk.allocation import AllocationMap, map_size
from fusemig.disk.base import Disk, Extent
from fusemig.disk.borrowed import BorrowedDisk, Wants, borrow, new_map, reopen
from fusemig.disk.memory import MemoryDisk
from fusemig.disk.overlay_file import OverlayFile
from fusemig.disk.raw import RawDisk, create_image
from fusemig.disk.tracked import Gate
from fusemig.errors import ConfigError, DiskError, RemoteProtocolError
from fusemig.fuse.export import Exports
from fusemig.migration.fetch_plan import PIECE_BLOCKS, FetchPlan, Loan, Request, hot_requests
from fusemig.qmp.block import IoStatus
from fusemig.records.epoch import EpochRecord, Ownership
from fusemig.wire import native
from support.hosts import wait_until
from support.keeper import Keeper
from support.lost_pages import lost_pages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from fusemig.disk.base import Buffer

SIZE = 64 * BLOCK_SIZE + 512
BLOCKS = n_blocks(SIZE)


def borrowed(missing: Sequence[tuple[int, int]], *, size: int = SIZE, patience_s: float = 60.0) -> BorrowedDisk:
    """Return a disk of 0x11 bytes, of which some blocks are missing (and hold 0xEE, which nobody may see)."""
    image, store = MemoryDisk("d", size), MemoryDisk("d", map_size(size))
    image.content[:] = b"\x11" * size
    for first, stop in missing:
        end = min(size, stop * BLOCK_SIZE)
        image.content[first * BLOCK_SIZE : end] = b"\xee" * (end - first * BLOCK_SIZE)
    return BorrowedDisk(image, new_map(store, image, missing, "boot"), Wants("d", patience_s))


class Later(threading.Thread):
    """A request in a thread."""

    def __init__(self, request: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._request = request
        self.result: object = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self._request()
        except DiskError as error:
            self.result = error


def test_a_read_waits_and_is_asked_for_with_its_neighbours() -> None:
    """A little more than it needs; it is answered when what it needs is there."""
    disk = borrowed([(20, 40)])
    assert disk.waits_for_peer(20 * BLOCK_SIZE, 10, is_write=False)
    assert not disk.pread_nowait(memoryview(bytearray(10)), 20 * BLOCK_SIZE)
    rings = []
    disk.wants.listen(lambda: rings.append(1))
    read = Later(lambda: disk.pread(10, 20 * BLOCK_SIZE + 7))
    wait_until(lambda: disk.wants.n_waiting == 1, "the read")
    assert rings
    assert disk.wants.take() == (16, 32)
    assert disk.wants.take() is None
    disk.fill(memoryview(bytearray(b"\x22" * BLOCK_SIZE)), 21 * BLOCK_SIZE, BLOCK_SIZE)
    assert read.is_alive()
    disk.fill(memoryview(bytearray(b"\x33" * BLOCK_SIZE)), 20 * BLOCK_SIZE, BLOCK_SIZE)
    read.join(20)
    assert read.result == b"\x33" * 10
    assert disk.missing_bytes == 18 * BLOCK_SIZE


def test_what_waits_is_wanted_again_by_the_next_connection() -> None:
    """The one before may have asked for it and be gone."""
    disk = borrowed([(3, 4)])
    read = Later(lambda: disk.pread(1, 3 * BLOCK_SIZE))
    wait_until(lambda: disk.wants.n_waiting == 1, "the read")
    assert disk.wants.take() == (0, 16)
    disk.wants.listen(lambda: None)
    assert disk.wants.take() == (0, 16)
    disk.fill(None, 3 * BLOCK_SIZE, BLOCK_SIZE)
    read.join(20)
    assert read.result == b"\0"


def test_whole_blocks_are_written_without_waiting_and_never_undone() -> None:
    """What comes afterwards is older."""
    disk = borrowed([(8, 16)])
    assert not disk.waits_for_peer(8 * BLOCK_SIZE, 2 * BLOCK_SIZE, is_write=True)
    disk.pwrite(b"\x44" * 2 * BLOCK_SIZE, 8 * BLOCK_SIZE)
    disk.write_zeroes(10 * BLOCK_SIZE, BLOCK_SIZE)
    disk.fill(memoryview(bytearray(b"\x55" * 8 * BLOCK_SIZE)), 8 * BLOCK_SIZE, 8 * BLOCK_SIZE)
    expected = b"\x44" * 2 * BLOCK_SIZE + bytes(BLOCK_SIZE) + b"\x55" * 5 * BLOCK_SIZE
    assert disk.pread(8 * BLOCK_SIZE, 8 * BLOCK_SIZE) == expected
    assert not disk.missing_bytes


@pytest.mark.parametrize("what", ["write", "zero"])
def test_a_write_that_cuts_missing_blocks_waits_for_their_rest(what: str) -> None:
    """For the first and the last block, and for nothing between them."""
    disk = borrowed([(8, 16)])
    offset, length = 8 * BLOCK_SIZE + 100, 4 * BLOCK_SIZE
    assert disk.waits_for_peer(offset, length, is_write=True)
    data = b"\x66" * length if what == "write" else bytes(length)
    write = Later(lambda: disk.pwrite(data, offset) if what == "write" else disk.write_zeroes(offset, length))
    wait_until(lambda: disk.wants.n_waiting == 1, "the first edge")
    disk.fill(memoryview(bytearray(b"\x77" * BLOCK_SIZE)), 8 * BLOCK_SIZE, BLOCK_SIZE)
    wait_until(lambda: disk.wants.n_waiting == 1, "the last edge")
    assert write.is_alive()
    disk.fill(memoryview(bytearray(b"\x77" * BLOCK_SIZE)), 12 * BLOCK_SIZE, BLOCK_SIZE)
    write.join(20)
    assert not write.is_alive()
    assert write.result is None
    found = disk.pread(5 * BLOCK_SIZE, 8 * BLOCK_SIZE)
    assert found == b"\x77" * 100 + data + b"\x77" * (BLOCK_SIZE - 100)
    assert list(disk.missing(0, BLOCKS)) == [(13, 16)]


def test_the_last_block_of_a_disk_may_be_short() -> None:
    """A write up to the end leaves nothing of it as it was."""
    disk = borrowed([(BLOCKS - 1, BLOCKS)])
    assert not disk.waits_for_peer(SIZE - 512, 512, is_write=True)
    disk.pwrite(b"\x88" * 512, SIZE - 512)
    assert not disk.missing_bytes
    assert disk.pread(512, SIZE - 512) == b"\x88" * 512


@pytest.mark.parametrize("end", ["patience", "close"])
def test_what_does_not_come_is_an_error(end: str) -> None:
    """EIO, and the same request succeeds when it has come."""
    disk = borrowed([(3, 4)], patience_s=0.05 if end == "patience" else 60.0)
    read = Later(lambda: disk.pread(1, 3 * BLOCK_SIZE))
    if end == "close":
        wait_until(lambda: disk.wants.n_waiting == 1, "the read")
        disk.wants.close()
    read.join(20)
    assert isinstance(read.result, DiskError)
    assert read.result.errno == errno.EIO
    disk.fill(None, 3 * BLOCK_SIZE, BLOCK_SIZE)
    assert disk.pread(1, 3 * BLOCK_SIZE) == b"\0"


# What to ask for


@pytest.mark.parametrize("lost", ["image", "map", None, "overlay", "overlay-map", "map over an overlay"])
def test_a_failed_sync_stays_failed_for_every_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str | None
) -> None:
    """Of the image or of a map; what has come and what guests wrote is here all the same, and the rest is fetched."""
    if lost is not None and "overlay" in lost:
        create_image(tmp_path / "base", SIZE)
        lost = lost.split()[0]
    else:
        create_image(tmp_path / "image", SIZE)
    stores = [Keeper()]
    disks = [borrow(open_image(tmp_path, stores[0]), tmp_path / "map", [(3, 9)], stores[0])]
    disks[0].pwrite(b"g" * BLOCK_SIZE, 3 * BLOCK_SIZE)
    if lost is not None:
        with lost_pages(monkeypatch, tmp_path / lost), pytest.raises(DiskError):
            disks[0].flush()
    for number in range(1, 3):
        stores.append(stores[-1].successor())
        disk = reopen(open_image(tmp_path, stores[-1]), tmp_path / "map", stores[-1])
        disks.append(disk)
        assert disk.pread(1, 3 * BLOCK_SIZE) == b"g"
        assert list(disk.missing(0, BLOCKS)) == [(3 + number, 9)]
        disk.fill(memoryview(b"f" * BLOCK_SIZE), (3 + number) * BLOCK_SIZE, BLOCK_SIZE)
        if lost is None:
            disk.flush()
            assert disk.io_error is None
            continue
        assert f"{tmp_path / lost}): fdatasync, under an earlier daemon," in str(disk.io_error)
        with pytest.raises(DiskError):
            disk.flush()
    for store, disk in zip(stores, disks, strict=True):
        store.ending()
        disk.close()
        assert store.kept == {}


def open_image(directory: Path, store: Keeper) -> RawDisk | OverlayFile:
    """Open the image of a directory, which is an overlay if there is a base."""
    if (directory / "base").exists():
        paths = (directory / name for name in ("overlay", "base", "overlay-map"))
        return OverlayFile("d", *paths, store=store)
    return RawDisk("d", directory / "image", store=store, role="image")


def disks_with(runs: list[tuple[int, int]]) -> list[BorrowedDisk]:
    return [borrowed(runs), borrowed([], size=BLOCK_SIZE), borrowed([(0, 1)], size=BLOCK_SIZE)]


def spans(request: Request, disk: BorrowedDisk) -> list[tuple[int, int]]:
    return [
        (first * BLOCK_SIZE, min(disk.size, stop * BLOCK_SIZE) - first * BLOCK_SIZE) for first, stop in request.runs
    ]


def zero(request: Request, disk: BorrowedDisk) -> native.ZeroFrame:
    return native.ZeroFrame(request.disk, 1, spans(request, disk))


def data_of(disk: int, extents: list[tuple[int, int]]) -> native.DataFrame:
    return native.DataFrame(disk, 1, extents, memoryview(bytearray(sum(n for _, n in extents))), b"", 0)


@given(st.sets(st.integers(0, BLOCKS - 1)), st.data())
def test_every_missing_block_is_asked_for_once_and_nothing_else(blocks: set[int], data: st.DataObject) -> None:
    """Whatever guests want, write or have fetched meanwhile, and in whatever order answers come in between."""
    disks = disks_with([(block, block + 1) for block in sorted(blocks)])
    hot = data.draw(st.lists(st.integers(0, BLOCKS - 1), max_size=4))
    max_runs = data.draw(st.sampled_from([1, 3, 64]))
    plan = FetchPlan(disks, [Request(0, first, min(BLOCKS, first + 9)) for first in hot], max_runs)
    asked = set[tuple[int, int]]()
    while not plan.is_done:
        what = data.draw(st.sampled_from(["ask", "ask", "answer", "want", "write"]))
        if what == "want":
            first = data.draw(st.integers(0, BLOCKS - 1))
            disks[0].wants._wanted.append((first, min(BLOCKS, first + data.draw(st.integers(1, 20)))))
        elif what == "write":
            disks[0].pwrite(bytes(BLOCK_SIZE), data.draw(st.integers(0, BLOCKS - 2)) * BLOCK_SIZE)
        elif what == "ask" and (request := plan.next()) is not None:
            assert len(request.runs) <= max_runs
            new = {(request.disk, block) for first, stop in request.runs for block in range(first, stop)}
            assert 0 < len(new) <= PIECE_BLOCKS
            assert not new & asked
            asked |= new
        elif plan.asked:
            head = plan.asked[0]
            zeros = [span for span in spans(head, disks[head.disk]) if data.draw(st.booleans())]
            rest = [span for span in spans(head, disks[head.disk]) if span not in zeros]
            if zeros:
                assert plan.expect(native.ZeroFrame(head.disk, 1, zeros)) == (None if rest else head)
            if rest:
                assert plan.expect(data_of(head.disk, rest)) == head
            for span in (*zeros, *rest):
                disks[head.disk].fill(None, *span)
            plan.answered()
    assert asked <= {(2, 0), *((0, block) for block in blocks)}
    assert not any(disk.missing_bytes for disk in disks)
    assert plan.next() is None


def test_a_piece_of_a_large_disk_is_found_as_fast_as_one_of_a_small_disk() -> None:
    """The search looks at what is next, and not at all that is here behind it: it runs once for each piece."""

    class Counting:
        n_looks = 0

        def __call__(self, first: int, stop: int) -> int:
            self.n_looks += 1
            return look(first, stop)

    blocks = 1 << 24
    image, store = MemoryDisk("d", 0), MemoryDisk("d", map_size(blocks * BLOCK_SIZE))
    image.size = blocks * BLOCK_SIZE
    disk = BorrowedDisk(image, new_map(store, image, [(0, 640), (blocks - 640, blocks)], "boot"), Wants("d"))
    look, counting = disk._allocation.mask, Counting()
    disk._allocation.mask = counting  # type: ignore[method-assign]
    plan = FetchPlan([disk])
    requests = [plan.next() for _ in range(20)]
    assert requests[9:11] == [Request(0, 576, 640), Request(0, blocks - 640, blocks - 576)]
    assert plan.next() is None
    assert counting.n_looks <= 4 * len(requests)


@pytest.mark.parametrize(("distance", "n_requests"), [(2, 10), (40_000, 10), (1, 10)])
def test_scattered_blocks_are_asked_for_together(distance: int, n_requests: int) -> None:
    """As many as one piece has, however far apart they lie; the source is asked for no more at once than ever."""
    blocks = 640 * distance
    image, store = MemoryDisk("d", 0), MemoryDisk("d", map_size(blocks * BLOCK_SIZE))
    image.size = blocks * BLOCK_SIZE
    missing = [(at, at + 1) for at in range(0, blocks, distance)]
    disk = BorrowedDisk(image, new_map(store, image, missing, "boot"), Wants("d"))
    plan = FetchPlan([disk], max_runs=native.MAX_FETCH_RUNS)
    requests = []
    while (request := plan.next()) is not None:
        assert request.n_bytes == PIECE_BLOCKS * BLOCK_SIZE
        requests.append(request)
    assert len(requests) == n_requests
    found = [block for request in requests for first, stop in request.runs for block in range(first, stop)]
    assert found == list(range(0, blocks, distance))
    for max_runs in (1, 0, -5):
        alone = FetchPlan([disk], max_runs=max_runs)
        assert alone.next() == Request(0, 0, PIECE_BLOCKS if distance == 1 else 1), "a source that takes one gets one"


def test_scattered_blocks_that_a_guest_waits_for_are_asked_for_together() -> None:
    """What of a wanted range does not fit is asked for next, before the rest; what is on its way is left out."""
    disk = borrowed([(at, at + 1) for at in range(0, 60, 2)])
    plan = FetchPlan([disk], max_runs=4)
    assert plan.next() == Request(0, 0, 1, ((2, 3), (4, 5), (6, 7)))
    disk.wants._wanted.append((4, 20))
    assert plan.next() == Request(0, 8, 9, ((10, 11), (12, 13), (14, 15)))
    assert plan.next() == Request(0, 16, 17, ((18, 19),))
    assert plan.next() == Request(0, 20, 21, ((22, 23), (24, 25), (26, 27)))


def test_an_answer_to_several_runs_is_held_against_all_of_them() -> None:
    """Zeros, then bytes; together they are what was asked for, and nothing else is."""
    plan = FetchPlan([borrowed([(4, 6), (8, 9), (BLOCKS - 1, BLOCKS)])], max_runs=8)
    request = plan.next()
    assert request == Request(0, 4, 6, ((8, 9), (BLOCKS - 1, BLOCKS)))
    one, two, three = (4 * BLOCK_SIZE, 2 * BLOCK_SIZE), (8 * BLOCK_SIZE, BLOCK_SIZE), (SIZE - 512, 512)
    for wrong in (
        data_of(0, [one, two]),
        data_of(0, [one, two, (three[0], 4096)]),
        data_of(1, [one, two, three]),
        native.ZeroFrame(0, 1, [(4 * BLOCK_SIZE, BLOCK_SIZE)]),
        native.ZeroFrame(0, 1, [(4 * BLOCK_SIZE, 5 * BLOCK_SIZE)]),
        native.ZeroFrame(0, 1, [one, (10 * BLOCK_SIZE, BLOCK_SIZE)]),
        native.ZeroFrame(0, 1, [(8 * BLOCK_SIZE, SIZE - 8 * BLOCK_SIZE)]),
    ):
        with pytest.raises(RemoteProtocolError, match="was due"):
            plan.expect(wrong)
    assert plan.expect(native.ZeroFrame(0, 1, [two])) is None
    for wrong in (native.ZeroFrame(0, 2, [two]), data_of(0, [one]), data_of(0, [one, two, three])):
        with pytest.raises(RemoteProtocolError, match="was due"):
            plan.expect(wrong)
    assert plan.expect(data_of(0, [one, three])) == request
    plan.answered()
    with pytest.raises(RemoteProtocolError, match="nobody asked"):
        plan.expect(native.ZeroFrame(0, 3, [one]))


def test_what_a_guest_waits_for_goes_first() -> None:
    """In front of what comes next in order, and only what of it is missing."""
    plan = FetchPlan(disks := disks_with([(0, 20), (40, 60)]))
    assert plan.next() == Request(0, 0, 20)
    disks[0].wants._wanted.append((30, 50))
    disks[2].wants._wanted.append((0, 1))
    disks[0].pwrite(bytes(BLOCK_SIZE), 45 * BLOCK_SIZE)
    assert plan.next() == Request(0, 40, 45)
    disks[0].pwrite(bytes(BLOCK_SIZE), 47 * BLOCK_SIZE)
    assert plan.next() == Request(0, 46, 47)
    assert plan.next() == Request(0, 48, 50)
    assert plan.next() == Request(2, 0, 1)
    assert plan.next() == Request(0, 50, 60)
    assert plan.next() is None


def test_what_is_hot_goes_before_the_rest_and_after_what_guests_wait_for() -> None:
    """In the order in which it was named, and only what of it is missing."""
    plan = FetchPlan(disks := disks_with([(0, 60)]), [Request(0, 40, 50), Request(2, 0, 1), Request(0, 10, 12)])
    disks[0].pwrite(bytes(BLOCK_SIZE), 44 * BLOCK_SIZE)
    assert plan.next() == Request(0, 40, 44)
    disks[0].wants._wanted.append((47, 52))
    assert plan.next() == Request(0, 47, 52)
    assert plan.next() == Request(0, 45, 47)
    assert plan.next() == Request(2, 0, 1)
    assert plan.next() == Request(0, 10, 12)
    assert plan.next() == Request(0, 0, 10)
    assert plan.next() == Request(0, 12, 40)
    assert plan.next() == Request(0, 52, 60)
    assert plan.next() is None


def numbers(*chunks: int) -> bytes:
    return struct.pack(f"<{len(chunks)}Q", *chunks)


def test_hot_chunks_of_several_disks_take_turns() -> None:
    """A disk that is all here does not count; the last chunk of a disk may be short."""
    first = borrowed([], size=2 * CHUNK_SIZE)
    second = borrowed([], size=CHUNK_SIZE + 512)
    loans = [Loan(disk, lambda: None) for disk in (first, None, second)]
    assert hot_requests([numbers(1, 0), numbers(7), numbers(1)], loans) == [
        Request(0, BLOCKS_PER_CHUNK, 2 * BLOCKS_PER_CHUNK),
        Request(1, BLOCKS_PER_CHUNK, BLOCKS_PER_CHUNK + 1),
        Request(0, 0, BLOCKS_PER_CHUNK),
    ]
    assert hot_requests([], loans) == []


@pytest.mark.parametrize(
    "hot",
    [[numbers(2)], [numbers((1 << 64) - 1)], [b"1234567"], [b"", b""], [numbers(*[0] * (native.MAX_HOT + 1))]],
    ids=["beyond the disk", "far beyond it", "a part of a number", "of more disks", "too many"],
)
def test_hot_chunks_that_cannot_be_are_refused(hot: list[bytes]) -> None:
    """What the other side says is not trusted."""
    with pytest.raises(RemoteProtocolError, match="the source named"):
        hot_requests(hot, [Loan(borrowed([], size=2 * CHUNK_SIZE), lambda: None)])


def test_what_is_not_due_is_refused() -> None:
    """Another disk, another place, more than one extent, too little."""
    plan = FetchPlan(disks := disks_with([(4, 8)]))
    with pytest.raises(RemoteProtocolError, match="nobody asked"):
        plan.expect(native.ZeroFrame(0, 1, [(0, BLOCK_SIZE)]))
    request = plan.next()
    assert request is not None
    right = zero(request, disks[0])
    assert plan.expect(right._replace(extents=[(4 * BLOCK_SIZE, SIZE - 4 * BLOCK_SIZE)])) == request
    for wrong in (
        right._replace(disk=1),
        right._replace(extents=[(5 * BLOCK_SIZE, 4 * BLOCK_SIZE)]),
        right._replace(extents=[(4 * BLOCK_SIZE, 3 * BLOCK_SIZE)]),
        right._replace(extents=[(4 * BLOCK_SIZE, 4 * BLOCK_SIZE + 512)]),
        right._replace(extents=[(4 * BLOCK_SIZE, SIZE)]),
        right._replace(extents=[*right.extents, (10 * BLOCK_SIZE, BLOCK_SIZE)]),
    ):
        with pytest.raises(RemoteProtocolError, match="was due"):
            plan.expect(wrong)


def test_a_loan_is_repaid_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two connections' threads may be at it; the later one undoes nothing of what was done with the disk since."""
    served = ServedDisk(DiskSpec("d", tmp_path / "d.img"), Exports(), None, is_incoming=True)
    served.receive(native.DiskOffer("d", 1 << 20, "i", 0), "5e55", "peer")
    served.borrow([])
    record = EpochRecord(state=Ownership.BORROWING, image_id="i", epoch=1, session="5e55", is_loan=True)
    served.epoch_file.write(record)
    loan = served.loan
    assert loan is not None
    count = itertools.count()
    is_inside, may_go = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]

    def flush() -> None:
        n = next(count)
        is_inside[n].set()
        assert may_go[n].wait(60)

    monkeypatch.setattr(loan, "flush", flush)
    errors: list[Exception] = []

    def repay() -> None:
        try:
            served.repay()
        except Exception as exc:
            errors.append(exc)

    threads = [threading.Thread(target=repay) for _ in range(2)]
    threads[0].start()
    assert is_inside[0].wait(60)
    threads[1].start()
    is_inside[1].wait(0.3)  # where it does not get
    may_go[0].set()
    threads[0].join()
    assert (served.ownership, served.loan) == (Ownership.OWNER, None)
    served.epoch_file.write(EpochRecord(state=Ownership.RELEASED, image_id="i", epoch=1, session="0the4"))
    may_go[1].set()
    threads[1].join()
    assert served.ownership is Ownership.RELEASED
    assert next(count) == 1, "it was written out once"
    assert not errors
    served.close()


@pytest.mark.parametrize("lost", ["d.img", "d.img.fusemig-loan", None])
def test_a_failed_sync_is_shown_wherever_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str | None
) -> None:
    """Of the image or of the map of what is missing: guests' flushes fail for either, so status says so of either."""
    served = ServedDisk(DiskSpec("d", tmp_path / "d.img"), Exports(), None, is_incoming=True)
    served.receive(native.DiskOffer("d", 1 << 20, "i", 0), "5e55", "peer")
    served.borrow([(3, 9)])
    assert served.disk is not None
    served.disk.set_gate(Gate.OPEN)
    served.disk.pwrite(b"g" * BLOCK_SIZE, 3 * BLOCK_SIZE)
    if lost is None:
        served.disk.flush()
    else:
        with lost_pages(monkeypatch, tmp_path / lost), pytest.raises(DiskError):
            served.disk.flush()
    shown = (served_disk(served).io_error, block_info(served).io_status)
    assert shown == ((False, IoStatus.OK) if lost is None else (True, IoStatus.FAILED))
    assert (lost or "None") in str(served.io_error)
    served.close()


@pytest.fixture
def overlay_spec(tmp_path: Path) -> DiskSpec:
    """Leave a destination's overlay of which two blocks are missing, and one came; its base is full of 0xBB."""
    spec = DiskSpec("d", tmp_path / "d.img", base=tmp_path / "golden.img")
    (tmp_path / "golden.img").write_bytes(b"\xbb" * SIZE)
    with closing(ServedDisk(spec, Exports(), None, is_incoming=True)) as served:
        served.receive(native.DiskOffer("d", SIZE, "i", 0), "5e55", "peer").image.write_zeroes(0, BLOCK_SIZE)
        served.borrow([(3, 5)])
        record = EpochRecord(state=Ownership.PREPARED, image_id="i", epoch=1, session="5e55", is_loan=True)
        served.epoch_file.write(record)
    return spec


def test_an_overlay_that_is_not_all_here_is_opened_again(overlay_spec: DiskSpec) -> None:
    """Prepared, then ours, then repaid; each time as it was left."""
    for state in (Ownership.PREPARED, Ownership.BORROWING):
        with closing(ServedDisk(overlay_spec, Exports(), None, is_incoming=True)) as served:
            assert served.ownership is state
            assert served.loan is not None
            assert list(served.loan.missing(0, BLOCKS)) == [(3, 5)]
            assert served.is_writable is (state is Ownership.BORROWING)
            record = served.epoch_file.record
            assert record is not None
            served.epoch_file.write(record.taken() if state is Ownership.PREPARED else record)
    with closing(ServedDisk(overlay_spec, Exports(), None, is_incoming=True)) as served:
        loan = served.loan
        assert served.disk is not None
        assert loan is not None
        served.disk.pwrite(b"w" * BLOCK_SIZE, 4 * BLOCK_SIZE)
        loan.fill(memoryview(bytearray(b"f" * 2 * BLOCK_SIZE)), 3 * BLOCK_SIZE, 2 * BLOCK_SIZE)
        served.disk.pwrite(b"cut", 8 * BLOCK_SIZE + 1)
        served.repay()
        assert (served.ownership, served.loan) == (Ownership.OWNER, None)
    assert not overlay_spec.path.with_name("d.img.fusemig-loan").exists()
    with closing(ServedDisk(overlay_spec, Exports(), None, is_incoming=False)) as served:
        assert served.disk is not None
        found = served.disk.pread(SIZE, 0)
    parts = [b"\0" * BLOCK_SIZE, b"\xbb" * 2 * BLOCK_SIZE, b"f" * BLOCK_SIZE, b"w" * BLOCK_SIZE, b"\xbb" * SIZE]
    expected = bytearray(b"".join(parts)[:SIZE])
    expected[8 * BLOCK_SIZE + 1 : 8 * BLOCK_SIZE + 4] = b"cut"
    assert found == expected


@pytest.mark.parametrize(
    ("gone", "match"),
    [
        ("d.img.fusemig-loan", "the map of what is missing, .* is gone"),
        ("d.img.fusemig-map", "the map .*fusemig-map of overlay .* is missing: restore it"),
        ("golden.img", "does not exist: name the image that the overlay lies over"),
        ("", "its contents differ"),
    ],
    ids=["the loan's map", "the overlay's map", "the base", "the base's contents"],
)
def test_an_overlay_that_lacks_what_it_needs_is_not_served(overlay_spec: DiskSpec, gone: str, match: str) -> None:
    """Of the image alone, which holds no data yet, nobody could tell which bytes are the disk's."""
    if gone:
        overlay_spec.path.with_name(gone).unlink()
    else:
        overlay_spec.path.with_name("golden.img").write_bytes(b"\xbc" * SIZE)
    with pytest.raises(ConfigError, match=match):
        ServedDisk(overlay_spec, Exports(), None, is_incoming=True)


class Vast(Disk):
    """An image that holds nothing and takes note of what is zeroed."""

    def __init__(self, size: int) -> None:
        self.name = "d"
        self.size = size
        self.zeroed: list[tuple[int, int]] = []

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        raise AssertionError("it is not read")

    def pwrite(self, data: Buffer, offset: int) -> None:
        raise AssertionError("it is not written")

    def write_zeroes(self, offset: int, length: int) -> None:
        self.zeroed.append((offset, length))

    def flush(self) -> None:
        pass

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        yield Extent(offset, length, is_data=True)


class Written(RawDisk):
    """A store that counts."""

    n_writes = n_bytes = 0

    def pwrite(self, data: Buffer, offset: int) -> None:
        self.n_writes += 1
        self.n_bytes += len(data)
        super().pwrite(data, offset)


MANY = 3 * 32768 + 5
"""Blocks whose map has three pages and a little."""
bounds = st.one_of(
    st.integers(0, MANY),
    st.builds(lambda page, n: min(MANY, max(0, page * 32768 + n)), st.integers(0, 3), st.integers(-9, 9)),
)


@given(st.lists(bounds, max_size=40).map(sorted))
def test_a_new_map_has_all_but_what_is_missing(edges: list[int]) -> None:
    """Durably: also as another boot of the host sees it."""
    missing = [(first, stop) for first, stop in zip(edges[::2], edges[1::2], strict=False) if first < stop]
    image, store = Vast(MANY * BLOCK_SIZE), MemoryDisk("d", map_size(MANY * BLOCK_SIZE))
    disk = BorrowedDisk(image, new_map(store, image, missing, "boot"), Wants("d"))
    merged: list[tuple[int, int]] = []
    for first, stop in missing:
        merged[-1:] = [(merged[-1][0], stop)] if merged and merged[-1][1] == first else [*merged[-1:], (first, stop)]
    assert list(disk.missing(0, MANY)) == merged
    assert disk.missing_bytes == sum(stop - first for first, stop in missing) * BLOCK_SIZE
    again = AllocationMap(store, image.size, "another boot")
    assert again.bits[:] == disk._allocation.bits[:]
    assert again.n_allocated == disk._allocation.n_allocated


def test_a_new_map_is_written_once_and_takes_no_memory_but_its_own(tmp_path: Path) -> None:
    """Guests wait for it: neither numbers as long as the map, nor a write for each run."""
    size = 64 << 30
    n = n_blocks(size)
    missing = [(first, first + 1) for first in range(7, n // 2, 1024)]
    create_image(tmp_path / "map", map_size(size))
    with closing(Written("d", tmp_path / "map")) as store:
        tracemalloc.start()
        try:
            allocation = new_map(store, Vast(size), missing, "boot")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert allocation.n_allocated == n - len(missing)
    assert store.n_bytes <= n // 8 + 2 * 4096
    assert store.n_writes < 20
    assert peak < n // 16


def test_a_long_hole_is_filled_in_a_step_at_a_time() -> None:
    """A ZERO may tell of all that is left of a disk; guests' writes there wait for one step."""
    size = (5 << 30) + 512
    image = Vast(size)
    disk = BorrowedDisk(
        image, new_map(MemoryDisk("d", map_size(size)), image, [(5, n_blocks(size))], "boot"), Wants("d")
    )
    disk.fill(None, 5 * BLOCK_SIZE, size - 5 * BLOCK_SIZE)
    assert not disk.missing_bytes
    assert max(length for _, length in image.zeroed) <= 1 << 30
    at = 5 * BLOCK_SIZE
    for offset, length in image.zeroed:
        assert offset == at
        at += length
    assert at == size
