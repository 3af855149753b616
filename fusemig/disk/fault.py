"""FaultDisk: a layer that fails or delays requests on purpose.

    TrackedDisk ──> FaultDisk ──> image
                       └─ the first `Fault` that applies decides: delay · store a part · error

What nbdkit's error and delay filters do, for a disk in process: each `Fault` says which requests it is for (the
operation, a range of bytes, a predicate), which of those it hits (from the nth on, once, a number of times or for
ever) and what happens to them. Rules:

1. A request that is hit never reaches the image as a whole; of a write or a zeroing, the first ``torn_bytes`` bytes
   do, as on a real disk that loses power or runs full.
2. Requests are counted when they begin, also those that fail, so "fail the nth" means the same in every run.
3. A failed flush stays failed (`Disk.flush`), also when the fault that failed it is over.
4. ``pread_nowait`` promises nothing while a fault for reads is armed: the sleeping read meets the fault instead, and
   only sleeping reads are counted.

Thread safe; a delay holds no lock.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from fusemig.disk.base import Disk
from fusemig.errors import DiskError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fusemig.disk.base import Buffer, Extent


class Operation(Enum):
    """The requests that can be hit."""

    READ = "read"
    WRITE = "write"
    ZERO = "zero"
    FLUSH = "flush"
    EXTENTS = "extents"


EVERY_OPERATION = frozenset(Operation)


@dataclass
class Fault:
    """Which requests go wrong, and how."""

    operations: frozenset[Operation] = EVERY_OPERATION
    """A request of another kind is not for this fault. A flush has the range of the whole disk."""
    nth: int = 1
    """The first of its requests that is hit, counted from 1."""
    times: int | None = 1
    """How many are hit: 1 is a transient fault, None a persistent one."""
    offset: int = 0
    """Only requests that touch the bytes from here on, ..."""
    length: int | None = None
    """... this many of them; None is to the end of the disk."""
    when: Callable[[Operation, int, int], bool] | None = None
    """Only requests, given as operation, offset and length in bytes, for which this holds."""
    errno: int | None = errno.EIO
    """The error; None lets the request go on, after the delay."""
    torn_bytes: int = 0
    """How much of a failing write or zeroing is stored before the error, in bytes; always less than all of it."""
    delay_s: float = 0.0
    """How long the request takes longer, in seconds."""
    n_seen: int = field(default=0, init=False)
    """How many of its requests came."""
    n_hit: int = field(default=0, init=False)
    """How many of them were hit."""

    @property
    def is_over(self) -> bool:
        """Whether it hits no more."""
        return self.times is not None and self.n_hit >= self.times

    def _hits(self, operation: Operation, offset: int, length: int) -> bool:
        """Count a request that is for this fault; tell whether it is hit."""
        if operation not in self.operations or offset + length <= self.offset:
            return False
        if self.length is not None and offset >= self.offset + self.length:
            return False
        if self.when is not None and not self.when(operation, offset, length):
            return False
        self.n_seen += 1
        if self.n_seen < self.nth or self.is_over:
            return False
        self.n_hit += 1
        return True


class FaultDisk(Disk):
    """A disk that does what its faults say, and else what the image under it does."""

    def __init__(self, image: Disk, *faults: Fault, sleep: Callable[[float], object] = time.sleep) -> None:
        """Lay faults over ``image``; `close` closes the image too.

        Args:
            image: the layer below.
            faults: as `add` adds them.
            sleep: waits for a number of seconds; a simulation moves its clock instead.
        """
        self.image = image
        self.name = image.name
        self._sleep = sleep
        self._lock = threading.Lock()
        # Guarded by _lock:
        self._faults = list(faults)
        self._n_requests: Counter[Operation] = Counter()
        self._flush_error: DiskError | None = None

    @property
    def size(self) -> int:  # type: ignore[override]
        """Size of the image in bytes."""
        return self.image.size

    def add(self, fault: Fault) -> Fault:
        """Add a fault, after the others, and return it."""
        with self._lock:
            self._faults.append(fault)
        return fault

    def mend(self) -> None:
        """Forget every fault, and the failed flush as if the disk had been replaced."""
        with self._lock:
            self._faults.clear()
            self._flush_error = None

    def n_requests(self, *operations: Operation) -> int:
        """Return how many requests of these kinds (none given: of all kinds) have come."""
        with self._lock:
            return sum(self._n_requests[operation] for operation in operations or Operation)

    def _meet(self, operation: Operation, offset: int, length: int) -> Fault | None:
        """Count the request, wait its delay out and return the fault that fails it, if one does."""
        with self._lock:
            self._n_requests[operation] += 1
            hits = [fault for fault in self._faults if fault._hits(operation, offset, length)]  # noqa: SLF001
        for fault in hits:
            if fault.delay_s:
                self._sleep(fault.delay_s)
        return next((fault for fault in hits if fault.errno is not None), None)

    def _error(self, fault: Fault, operation: Operation, offset: int, length: int) -> DiskError:
        assert fault.errno is not None
        what = f"disk '{self.name}': {operation.value} at {offset}+{length} (a fault on purpose)"
        return DiskError(fault.errno, what, offset, length)

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from the image."""
        fault = self._meet(Operation.READ, offset, len(buffer))
        if fault is not None:
            raise self._error(fault, Operation.READ, offset, len(buffer))
        self.image.pread_into(buffer, offset)

    def pread_nowait(self, buffer: memoryview, offset: int) -> bool:
        """Fill ``buffer`` if that does not sleep and no fault for reads is armed."""
        return not self._is_armed(Operation.READ) and self.image.pread_nowait(buffer, offset)

    def is_hole(self, offset: int, length: int) -> bool:
        """Ask the image."""
        return self.image.is_hole(offset, length)

    def pwrite_may_sleep(self, offset: int, length: int) -> bool:
        """Ask the image; a write that a fault may delay may sleep."""
        return self._is_armed(Operation.WRITE) or self.image.pwrite_may_sleep(offset, length)

    def _is_armed(self, operation: Operation) -> bool:
        with self._lock:
            return any(operation in fault.operations and not fault.is_over for fault in self._faults)

    def pwrite(self, data: Buffer, offset: int) -> None:
        """Write ``data``, or only a part of it."""
        length = len(data)
        fault = self._meet(Operation.WRITE, offset, length)
        if fault is None:
            self.image.pwrite(data, offset)
            return
        torn = min(fault.torn_bytes, length - 1)
        if torn > 0:
            self.image.pwrite(memoryview(data)[:torn], offset)
        raise self._error(fault, Operation.WRITE, offset, length)

    def write_zeroes(self, offset: int, length: int) -> None:
        """Zero the range, or only a part of it."""
        fault = self._meet(Operation.ZERO, offset, length)
        if fault is None:
            self.image.write_zeroes(offset, length)
            return
        torn = min(fault.torn_bytes, length - 1)
        if torn > 0:
            self.image.write_zeroes(offset, torn)
        raise self._error(fault, Operation.ZERO, offset, length)

    def flush(self) -> None:
        """Make finished writes durable, unless a flush failed before."""
        if self._flush_error is not None:
            raise self._flush_error
        fault = self._meet(Operation.FLUSH, 0, self.size)
        if fault is not None:
            self._flush_error = self._error(fault, Operation.FLUSH, 0, self.size)
            raise self._flush_error
        self.image.flush()

    def drop_cache(self) -> None:
        """Flush, and have the image drop its cache."""
        self.flush()
        self.image.drop_cache()

    def check_in_place(self) -> None:
        """Ask the image."""
        self.image.check_in_place()

    @property
    def io_error(self) -> DiskError | None:
        """The flush that failed on purpose, or what the image says."""
        return self._flush_error or self.image.io_error

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield the image's allocation; a fault hits before the first extent."""
        fault = self._meet(Operation.EXTENTS, offset, length)
        if fault is not None:
            raise self._error(fault, Operation.EXTENTS, offset, length)
        yield from self.image.extents(offset, length)

    def close(self) -> None:
        """Close the image."""
        self.image.close()
