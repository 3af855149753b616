"""What the source does with what the destination has: which chunks need not be sent again.

    what the source knows                   what the destination says         a chunk is taken as sent if
    its tracker and digest: it lives        values of its journal             both values are equal, and no frame of the
                                                                              chunk was sent that the journal lacks
    a dirty map since the session began     values of its journal             it has one, and no guest wrote it since
    nothing                                 hashes of its contents            the contents hash to the same 128 bits

What is found equal in the last case is said to the destination (KEPT), which journals it from then on: no entry of a
journal is of bytes that this session's source has not vouched for.

Everything else is sent as a whole, which gives it a fresh value at both ends; what is known to be zeros is said again,
because that costs nothing. After this the tracker is right and so are both digests, and passes go on as ever.

`Reconciliation` walks over a disk's chunks as HAVE messages come, in ascending order; it runs in worker threads and
needs no memory but the message's.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from xxhash import xxh3_64_intdigest, xxh3_128_digest

from fusemig.core.units import CHUNK_SIZE, chunk_length, n_chunks
from fusemig.errors import DiskError, MigrationError, RemoteProtocolError
from fusemig.wire import native

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from fusemig.core.bitmap import ChunkBitmap
    from fusemig.core.digest import DiskDigest
    from fusemig.disk.base import Disk
    from fusemig.migration.reader import OutgoingDisk, SentFrame

_WIDTH: Final = {native.Resumption.JOURNAL: 8, native.Resumption.COMPARE: 16}
_MOST: Final = {native.Resumption.JOURNAL: native.HAVE_VALUES, native.Resumption.COMPARE: native.HAVE_HASHES}
_NO_HASH: Final = bytes(16)


@dataclass
class ResumePoint:
    """Where a migration was interrupted."""

    session: str
    disks: list[OutgoingDisk] = field(default_factory=list)
    """With their trackers and digests, if the source has lived on; else empty."""
    doubtful: list[tuple[int, SentFrame]] = field(default_factory=list)
    """Frames that the destination may have lost, each with the attempt that sent it."""
    in_flight: list[tuple[int, SentFrame]] = field(default_factory=list)
    """Those of them that were not even acknowledged; their chunks are in flight in the tracker."""
    is_doubt_counted: bool = True
    """Whether ``doubtful`` holds them all."""

    def land(self, covered: Sequence[native.Covered]) -> None:
        """Decide on what is in flight: it arrived if the journal of its disk covers it, else it is dirty again."""
        frames, self.in_flight = self.in_flight, []
        for attempt, frame in frames:
            if _is_covered(attempt, frame, covered[frame.disk.index]):
                frame.disk.tracking.acknowledge(frame.chunks)
        for disk in self.disks:
            disk.tracking.restore_all()  # also what was taken and got into no frame

    def doubtful_chunks(self, disk: OutgoingDisk, covered: native.Covered) -> Collection[int]:
        """Return the chunks of a disk of which frames were sent that the destination's journal may not cover."""
        return {
            chunk
            for attempt, frame in self.doubtful
            if frame.disk is disk and not _is_covered(attempt, frame, covered)
            for chunk in frame.chunks
        }


def _is_covered(attempt: int, frame: SentFrame, covered: native.Covered) -> bool:
    return attempt == covered.attempt and frame.sequence <= covered.sequence


class Reconciliation(ABC):
    """One disk's."""

    def __init__(self, disk: OutgoingDisk) -> None:
        """Begin with its first chunk."""
        self._disk = disk
        self._next = 0
        self._n_chunks = n_chunks(disk.disk.size)
        self.n_kept = 0
        """Chunks that need not be sent again."""

    def on_have(self, have: native.Have, resumption: native.Resumption) -> None:
        """Go on to the end of a message's chunks.

        Raises:
            RemoteProtocolError: it does not fit the disk, or what came before.
            MigrationError: the image could not be read.
        """
        width = _WIDTH[resumption]
        n, rest = divmod(len(have.values), width)
        if rest or not 0 < n <= _MOST[resumption] or have.first < self._next or have.first + n > self._n_chunks:
            raise RemoteProtocolError(
                f"the destination says that it has {n} chunks from {have.first} on of disk '{self._disk.disk.name}', "
                f"which has {self._n_chunks}, after {self._next} were told of"
            )
        self._lack(self._next, have.first)
        self._compare(have.first, have.values)
        self._next = have.first + n

    def end(self) -> None:
        """Go on to the end of the disk: the destination has nothing more."""
        self._lack(self._next, self._n_chunks)
        self._next = self._n_chunks

    @abstractmethod
    def _compare(self, first: int, values: bytes) -> None:
        """Decide on the chunks from ``first`` on."""

    @abstractmethod
    def _lack(self, first: int, stop: int) -> None:
        """Decide on chunks that the destination does not have."""


class LivingReconciliation(Reconciliation):
    """Of a source that has its tracker and its digest."""

    def __init__(self, disk: OutgoingDisk, doubtful: Collection[int] | None) -> None:
        """Take nothing as sent that is ``doubtful``, or nothing at all if that is None."""
        super().__init__(disk)
        self._doubtful = doubtful
        disk.holes, disk.bases = [], []

    def _compare(self, first: int, values: bytes) -> None:
        theirs = array("Q", struct.unpack(f"<{len(values) // 8}Q", values))
        if not any(theirs):
            self._lack(first, first + len(theirs))
            return
        value_of = self._disk.digest.value_of
        for chunk, value in enumerate(theirs, first):
            if value and value == value_of(chunk) and self._doubtful is not None and chunk not in self._doubtful:
                self.n_kept += 1
            else:
                self._lack(chunk, chunk + 1)

    def _lack(self, first: int, stop: int) -> None:
        tracking, digest = self._disk.tracking, self._disk.digest
        while first < stop:
            end = min(tracking.next_clean(first), stop)
            if end > first:
                self._disk.mark_whole(first, end)  # of what is dirty in parts, the rest too
                digest.forget(first, end)  # what was sent last may not have arrived
                first = end
                continue
            dirty = tracking.next_dirty(first)
            end = stop if dirty is None else min(dirty, stop)
            if not digest.has_values(first, end):
                self._say_zeros(first, end)
                first = end
                continue
            end = min(end, first + native.HAVE_HASHES)
            for chunk in range(first, end):
                if digest.value_of(chunk):
                    self._disk.mark_whole(chunk, chunk + 1)
                    digest.forget(chunk, chunk + 1)
                else:
                    self._say_zeros(chunk, chunk + 1)
            first = end

    def _say_zeros(self, first: int, stop: int) -> None:
        """Have clean chunks without a value, which are zeros or the base's, said to be so once more."""
        offset, end = first * CHUNK_SIZE, min(stop * CHUNK_SIZE, self._disk.disk.size)
        self._disk.say_again(offset, end - offset)


class MappedReconciliation(Reconciliation):
    """Of a source that was restarted and has a map of what guests wrote since the session began.

    Its tracker says that everything allocated is dirty, and its digest knows nothing yet.
    """

    def __init__(self, disk: OutgoingDisk, written: ChunkBitmap) -> None:
        """Take nothing as sent that is in ``written``, which goes on to change."""
        super().__init__(disk)
        self._written = written

    def _compare(self, first: int, values: bytes) -> None:
        tracking = self._disk.tracking
        for chunk, value in enumerate(struct.unpack(f"<{len(values) // 8}Q", values), first):
            if value and tracking.settle(chunk, self._written):
                self._disk.digest.restore(chunk, value)
                self.n_kept += 1
            elif value:
                _make_whole(self._disk, chunk)

    def _lack(self, first: int, stop: int) -> None:
        pass  # dirty, or a hole


class ContentReconciliation(Reconciliation):
    """Of a source that knows nothing but its image: what is dirty is read, and compared by hash."""

    def __init__(self, disk: OutgoingDisk) -> None:
        """Begin with its first chunk."""
        super().__init__(disk)
        self.kept = array("Q")
        """The values of the last message's chunks; 0 for those that are not equal."""

    def _compare(self, first: int, values: bytes) -> None:
        self.kept = array("Q", bytes(8 * (len(values) // 16)))
        disk, buffer = self._disk, memoryview(bytearray(CHUNK_SIZE))
        chunk, stop = first, first + len(values) // 16
        while chunk < stop:
            taken = disk.tracking.take_next(chunk)
            if taken is None:
                return
            if taken[0] >= stop:
                disk.tracking.restore(taken[0])
                return
            chunk = taken[0]
            theirs = values[(chunk - first) * 16 : (chunk - first + 1) * 16]
            view = buffer[: chunk_length(chunk, disk.disk.size)]
            try:
                if theirs != _NO_HASH:
                    disk.disk.image.pread_into(view, chunk * CHUNK_SIZE)
            except DiskError as exc:
                disk.tracking.restore(chunk)
                raise MigrationError(f"{exc}; the disk stays here: mend its image, then migrate again") from exc
            if theirs != _NO_HASH and xxh3_128_digest(view) == theirs:
                self.kept[chunk - first] = value = xxh3_64_intdigest(view) or 1
                disk.digest.restore(chunk, value)
                disk.tracking.acknowledge([chunk])
                self.n_kept += 1
            else:
                disk.tracking.restore(chunk)
                _make_whole(disk, chunk)
            chunk += 1

    def _lack(self, first: int, stop: int) -> None:
        pass  # dirty, or a hole


def _make_whole(disk: OutgoingDisk, chunk: int) -> None:
    """Have a chunk sent as a whole if any of it is: the destination has a value of it that is not ours.

    A chunk of which nothing is to be sent is a hole, which gives it the value 0 at both ends; but over a shared base it
    may be one in parts only.
    """
    if disk.is_thin or disk.tracking.next_dirty(chunk) == chunk:
        disk.mark_whole(chunk, chunk + 1)


# The destination's side


def journal_pages(index: int, digest: DiskDigest) -> Iterator[native.Have]:
    """Yield what a digest, restored from a journal, has of disk number ``index``."""
    total = n_chunks(digest.size)
    for first in digest.pages(native.HAVE_VALUES):
        values = digest.values(first, min(first + native.HAVE_VALUES, total))
        if any(values):
            yield native.Have(index, first, struct.pack(f"<{len(values)}Q", *values))


def content_pages(index: int, image: Disk) -> Iterator[native.Have]:
    """Read the image of disk number ``index`` and yield the hashes of its chunks that hold data.

    Raises:
        DiskError: it cannot be read.
    """
    buffer = memoryview(bytearray(CHUNK_SIZE))
    for first, stop in _data_runs(image):
        for start in range(first, stop, native.HAVE_HASHES):
            hashes = []
            for chunk in range(start, min(start + native.HAVE_HASHES, stop)):
                view = buffer[: chunk_length(chunk, image.size)]
                image.pread_into(view, chunk * CHUNK_SIZE)
                hashes.append(xxh3_128_digest(view))
            yield native.Have(index, start, b"".join(hashes))


def _data_runs(image: Disk) -> Iterator[tuple[int, int]]:
    """Yield the runs of chunks that hold data, as first and stop, apart from each other."""
    first = stop = 0
    for extent in image.extents(0, image.size):
        if not extent.is_data:
            continue
        start = max(extent.offset // CHUNK_SIZE, stop)
        end = n_chunks(extent.offset + extent.length)
        if start > stop:
            if stop > first:
                yield first, stop
            first = start
        stop = max(stop, end)
    if stop > first:
        yield first, stop


def group_resumption(kinds: Sequence[native.Resumption]) -> native.Resumption:
    """Return what goes for all disks of a migration: what the one that knows least can say."""
    for kind in (native.Resumption.NOTHING, native.Resumption.COMPARE):
        if kind in kinds:
            return kind
    return native.Resumption.JOURNAL
