"""FaultDisk does what its faults say, to the requests that they name, and nothing else."""

from __future__ import annotations

import errno

import pytest

from fusemig.disk.fault import Fault, FaultDisk, Operation
from fusemig.disk.memory import MemoryDisk
from fusemig.errors import DiskError

SIZE = 64 * 1024
WRITES = frozenset({Operation.WRITE})
READS = frozenset({Operation.READ})


def make(*faults: Fault) -> tuple[MemoryDisk, FaultDisk]:
    """Return an image and faults over it."""
    image = MemoryDisk("a", SIZE)
    return image, FaultDisk(image, *faults)


def outcome(disk: FaultDisk, data: bytes = b"x" * 512, offset: int = 0) -> int:
    """Write and return the errno, 0 for none."""
    try:
        disk.pwrite(data, offset)
    except DiskError as exc:
        return exc.errno
    return 0


def test_without_faults_it_is_the_image() -> None:
    """Every request goes through, and is counted."""
    image, disk = make()
    disk.pwrite(b"abc", 10)
    assert disk.pread(5, 9) == b"\0abc\0"
    disk.write_zeroes(10, 1)
    assert image.content[10:13] == b"\0bc"
    disk.flush()
    assert image.n_flushes == 1
    assert [tuple(extent) for extent in disk.extents(0, SIZE)] == [(0, 4096, True), (4096, SIZE - 4096, False)]
    assert disk.pread_nowait(memoryview(bytearray(4)), 0)
    assert not disk.pwrite_may_sleep(0, 512)
    assert (disk.name, disk.size) == ("a", SIZE)
    assert disk.n_requests() == 5
    assert disk.n_requests(Operation.WRITE, Operation.ZERO) == 2


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault(), [5, 0, 0, 0, 0]),
        (Fault(nth=3), [0, 0, 5, 0, 0]),
        (Fault(nth=2, times=2), [0, 5, 5, 0, 0]),
        (Fault(nth=4, times=None), [0, 0, 0, 5, 5]),
        (Fault(errno=errno.ENOSPC, times=None), [errno.ENOSPC] * 5),
        (Fault(READS, times=None), [0] * 5),
    ],
)
def test_which_of_them(fault: Fault, expected: list[int]) -> None:
    """From the nth on, once, a number of times or for ever; with the errno that was asked for."""
    _, disk = make(fault)
    assert [outcome(disk) for _ in range(5)] == expected
    assert fault.n_hit == sum(code != 0 for code in expected)


def test_a_range() -> None:
    """Requests that touch a byte of the range are hit, their neighbours are not, and do not count."""
    fault = Fault(offset=4096, length=4096, nth=2, times=None)
    _, disk = make(fault)
    for offset in (0, 4096 - 512, 8192):
        assert outcome(disk, offset=offset) == 0
    assert fault.n_seen == 0
    assert outcome(disk, offset=4096) == 0
    assert outcome(disk, offset=4096 - 511) == errno.EIO
    assert outcome(disk, offset=8191) == errno.EIO


def test_a_predicate() -> None:
    """It is asked with operation, offset and length."""
    _, disk = make(Fault(when=lambda operation, offset, length: (operation, offset, length) == (Operation.WRITE, 5, 3)))
    assert outcome(disk, b"abc", 4) == 0
    assert outcome(disk, b"abc", 5) == errno.EIO


@pytest.mark.parametrize("torn", [0, 1, 300, 511, 512, 9999])
def test_a_torn_write(torn: int) -> None:
    """A part of the data is stored, never all of it, then comes the error."""
    image, disk = make(Fault(WRITES, torn_bytes=torn))
    assert outcome(disk, b"x" * 512, 100) == errno.EIO
    stored = min(torn, 511)
    assert image.content == bytes(100) + b"x" * stored + bytes(SIZE - 100 - stored)


def test_a_torn_zeroing() -> None:
    """As a write."""
    image, disk = make(Fault(frozenset({Operation.ZERO}), torn_bytes=2))
    image.content[:4] = b"abcd"
    with pytest.raises(DiskError):
        disk.write_zeroes(0, 4)
    assert image.content[:4] == b"\0\0cd"


def test_the_error_says_that_it_is_on_purpose() -> None:
    """Disk, operation, range; the fields are those of the request."""
    _, disk = make(Fault(errno=errno.ENOSPC))
    with pytest.raises(DiskError, match=r"^disk 'a': read at 512\+4 \(a fault on purpose\): No space left") as caught:
        disk.pread(4, 512)
    assert (caught.value.errno, caught.value.offset, caught.value.length) == (errno.ENOSPC, 512, 4)


def test_a_failed_flush_stays_failed() -> None:
    """A transient fault fails every later flush too, until the disk is mended."""
    image, disk = make(Fault(frozenset({Operation.FLUSH})))
    for _ in range(3):
        with pytest.raises(DiskError):
            disk.flush()
    assert image.n_flushes == 0
    disk.mend()
    disk.flush()
    assert image.n_flushes == 1


def test_extents_and_zeroing_fail_too() -> None:
    """No operation is out of reach."""
    _, disk = make(Fault(times=None))
    with pytest.raises(DiskError):
        list(disk.extents(0, SIZE))
    with pytest.raises(DiskError):
        disk.write_zeroes(0, 512)


def test_delays() -> None:
    """A delay without an errno lets the request go on; with one it fails late; delays add up."""
    slept: list[float] = []
    image = MemoryDisk("a", SIZE)
    slow = Fault(WRITES, errno=None, delay_s=2.0, times=None)
    disk = FaultDisk(image, slow, Fault(WRITES, nth=2, delay_s=1.0), sleep=slept.append)
    assert disk.pwrite_may_sleep(0, 512)
    assert outcome(disk) == 0
    assert image.content[:1] == b"x"
    assert outcome(disk) == errno.EIO
    assert slept == [2.0, 2.0, 1.0]


def test_a_read_that_must_not_sleep_leaves_the_fault_to_one_that_may() -> None:
    """While a read fault is armed nothing is promised, nothing is counted; afterwards all is as before."""
    fault = Fault(READS)
    _, disk = make(fault)
    assert not disk.pread_nowait(memoryview(bytearray(4)), 0)
    assert fault.n_seen == 0
    with pytest.raises(DiskError):
        disk.pread(4, 0)
    assert disk.pread_nowait(memoryview(bytearray(4)), 0)


def test_faults_may_come_later_and_go() -> None:
    """`add` arms, `mend` forgets; counting of requests goes on."""
    _, disk = make()
    assert outcome(disk) == 0
    disk.add(Fault(times=None))
    assert outcome(disk) == errno.EIO
    disk.mend()
    assert outcome(disk) == 0
    assert disk.n_requests(Operation.WRITE) == 3
