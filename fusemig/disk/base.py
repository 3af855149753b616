"""The interface that every disk layer has.

All calls are synchronous and may be made from any thread at once; overlapping requests are as unordered as they are on
a real disk. Offsets and lengths are bytes. Requests lie inside ``[0, size)``: who takes requests from outside checks
them (`check_range`) and the layers below rely on it.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final, NamedTuple

from fusemig.errors import DiskError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

    Buffer = bytes | bytearray | memoryview

_ZERO_STEP: Final = 1 << 20


class Extent(NamedTuple):
    """A run of bytes of one kind."""

    offset: int
    length: int
    is_data: bool
    """False: a hole, which reads as zeros and costs nothing to read."""


class Disk(ABC):
    """A disk of a fixed size.

    Every request raises `DiskError` with the errno that a guest should see.
    """

    name: str
    """What the user calls it; used in messages and as a key, never joined to a path."""

    size: int
    """Size in bytes, a multiple of 512."""

    @abstractmethod
    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``; may sleep."""

    @abstractmethod
    def pwrite(self, data: Buffer, offset: int) -> None:
        """Write all of ``data`` at ``offset``; on an error any part of it may have been written."""

    @abstractmethod
    def write_zeroes(self, offset: int, length: int) -> None:
        """Make the range read as zeros, deallocating it where the store can."""

    def zero_allocated(self, offset: int, length: int) -> None:
        """Make the range read as zeros and keep its room, cheaply where the store can."""
        for at in range(offset, offset + length, _ZERO_STEP):
            self.pwrite(bytes(min(_ZERO_STEP, offset + length - at)), at)

    @abstractmethod
    def flush(self) -> None:
        """Return when every finished write is durable; may sleep.

        A failure is sticky: the kernel may have dropped the pages, so a later success would prove nothing.
        """

    @abstractmethod
    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield the allocation of the range in ascending order without gaps; data where the store cannot tell."""

    def drop_cache(self) -> None:
        """Flush, and have later reads come from the store, where the layer can tell it from a cache; may sleep.

        Whoever believes that what is read is also durable, without having written it, calls this first: pages whose
        writing failed may stay in memory as if they were clean, and a flush knows nothing of them any more.

        Raises:
            DiskError: the flush failed.
        """
        self.flush()

    def check_in_place(self) -> None:  # noqa: B027  (memory has no place)
        """Raise `DiskError` if what is written is not what a daemon that is started later would find."""

    def is_hole(self, offset: int, length: int) -> bool:
        """Tell whether a range is known to be a hole, at the cost of one call whatever is allocated elsewhere."""
        return False

    def pread_nowait(self, buffer: memoryview, offset: int) -> bool:
        """Fill ``buffer`` if that is only a memory copy; return False, having promised nothing, if it may sleep."""
        return False

    def read_ahead(self, offset: int, length: int) -> None:  # noqa: B027  (memory has nothing to fetch)
        """Have the store begin to fetch a range that is going to be read; a hint, which fails for nobody."""

    def pwrite_may_sleep(self, offset: int, length: int) -> bool:
        """Tell whether a write there may wait for the store (a cold, partly covered page) rather than only copy."""
        return True

    def waits_for_peer(self, offset: int, length: int, *, is_write: bool) -> bool:
        """Tell whether a request there must wait for bytes that are at another host yet, however long that takes."""
        return False

    @property
    def io_error(self) -> DiskError | None:
        """The failed flush that made this disk untrustworthy, if one did."""
        return None

    def close(self) -> None:  # noqa: B027  (most layers hold nothing)
        """Release what the layer holds; idempotent."""

    def pread(self, length: int, offset: int) -> bytearray:
        """Return ``length`` bytes from ``offset``; may sleep."""
        data = bytearray(length)
        self.pread_into(memoryview(data), offset)
        return data

    def check_range(self, offset: int, length: int) -> None:
        """Raise `DiskError` (EINVAL) unless the range lies inside the disk."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise DiskError(errno.EINVAL, f"disk '{self.name}': range {offset}+{length} of {self.size}", offset, length)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
