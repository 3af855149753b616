"""Delta: what need not be sent of a disk whose destination has an older copy, though no migration is gone on with.

    proved     the destination's image is what it released    KEEP: the chunks that nobody wrote since
    compare    it has an image of some kind                   HAVE, KEPT: the chunks whose contents are equal
    both                                                      WEIGH, WEIGHED, LIKE: of the others, the equal blocks

    source                                         destination
    KEEP ... , KEEP of disk -1    ───────────>
                                  <───────────     HAVE ... , HAVE of disk -1
    KEPT ...                      ───────────>
    WEIGH ... , WEIGH of disk -1  ───────────>
                                  <───────────     WEIGHED ...
    LIKE ...                      ───────────>     from here on passes

What is proved. The destination says so of its own image if its epoch record says that it released the disk, in the very
migration that brought it to the source, and if the image has the stamp that is kept with that
(`fusemig.records.epoch.is_as_released`). The source tells from its persistent map what was written since that migration
(`fusemig.disk.dirty_map`, `Since.OWNED`). Where either is missing nothing is taken on trust: contents are compared, if
that was asked for, or everything is sent.

Both digests get the same value for what is kept: one made of the migration's name for a chunk that neither side reads,
one made of the hashes of its blocks for a chunk that was weighed, to which the blocks that come are added as ever. A
weighed chunk gets into the destination's journal only when its other blocks have come.

Memory: a bit a chunk, and two messages. Everything that reads runs in worker threads.
"""

from __future__ import annotations

import struct
from collections import deque
from typing import TYPE_CHECKING, Final

from xxhash import xxh3_64_intdigest, xxh3_128_digest

from fusemig.core.bitmap import ChunkBitmap
from fusemig.core.units import (
    BLOCK_SIZE,
    BLOCKS_PER_CHUNK,
    CHUNK_SIZE,
    chunk_length,
    chunk_mask,
    mask_extents,
    n_chunks,
)
from fusemig.errors import DiskError, MigrationError, RemoteProtocolError
from fusemig.migration.link import IDLE_DEADLINE_S
from fusemig.migration.resume import ContentReconciliation
from fusemig.wire import native

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from fusemig.disk.base import Disk
    from fusemig.migration.link import NativeLink, Offload
    from fusemig.migration.reader import OutgoingDisk
    from fusemig.migration.writer import IncomingDisk

_HASH_SIZE: Final = 16
_MASK_SIZE: Final = BLOCKS_PER_CHUNK // 8
_PAGE_CHUNKS: Final = 1 << 16
"""Chunks that are looked at in one go; between two a migration can be called off."""
_WINDOW: Final = 2
"""Messages that are not answered yet, at most: the next one is read while the other side works on this one."""


def kept_value(session: str, chunk: int) -> int:
    """Return the digest's value of a chunk that is as it was when migration ``session`` took the disk away."""
    return xxh3_64_intdigest(session.encode(), seed=chunk) or 1


def weighed_value(hashes: bytes | memoryview) -> int:
    """Return the digest's value of a chunk whose blocks have these hashes."""
    return xxh3_64_intdigest(hashes) or 1


def block_hashes(image: Disk, chunk: int, buffer: memoryview) -> bytes:
    """Read a chunk into ``buffer`` and return the hashes of its blocks.

    Raises:
        DiskError: it cannot be read.
    """
    view = buffer[: chunk_length(chunk, image.size)]
    image.pread_into(view, chunk * CHUNK_SIZE)
    return b"".join(xxh3_128_digest(view[at : at + BLOCK_SIZE]) for at in range(0, len(view), BLOCK_SIZE))


def _n_hashes(chunk: int, size: int) -> int:
    return -(-chunk_length(chunk, size) // BLOCK_SIZE)


class SourceDelta:
    """The source's half; of one connection."""

    def __init__(
        self,
        link: NativeLink,
        disks: Sequence[OutgoingDisk],
        deltas: Sequence[native.Delta],
        offload: Offload,
    ) -> None:
        """Find out what of ``disks`` the destination has, which knows as much of each as ``deltas`` says."""
        self._link = link
        self._disks = disks
        self._deltas = deltas
        self._offload = offload
        self._doubtful = [ChunkBitmap(n_chunks(disk.disk.size)) for disk in disks]
        """Chunks that the destination has and that differ, as wholes."""
        self._buffer = memoryview(bytearray(CHUNK_SIZE))

    async def run(
        self, sinces: Sequence[str], written: Sequence[ChunkBitmap | None], check_maps: Callable[[], None]
    ) -> None:
        """Bring trackers and digests in line with what the destination has.

        Args:
            sinces: of each disk, the migration that brought it here.
            written: of each disk, the chunks that guests wrote since; they go on to change. None: not known.
            check_maps: raises `MigrationError` if ``written`` may lack a write by now.

        Raises:
            FusemigError: the destination is gone, or says what makes no sense; or an image cannot be read.
        """
        for disk, delta, since, bits in zip(self._disks, self._deltas, sinces, written, strict=True):
            if delta is native.Delta.PROVED and bits is not None:
                await self._send_each(self._keeps(disk, since, bits))
        check_maps()
        await self._link.send_message(native.Keep(-1, b""))
        await self._compare()
        for disk in self._disks:
            await self._weigh(disk)
        await self._link.send_message(native.Weigh(-1))

    async def _send_each(self, messages: Iterator[native.Keep | None]) -> None:
        done = object()
        while (message := await self._offload(next, messages, done)) is not done:
            if message is not None:
                await self._link.send_message(message)

    def _keeps(self, disk: OutgoingDisk, since: str, written: ChunkBitmap) -> Iterator[native.Keep | None]:
        """Count chunks as sent that are not in ``written``; yield them, with a None now and then."""
        runs: list[int] = []
        doubtful = self._doubtful[disk.index]
        chunk = disk.tracking.next_dirty(0)
        n_seen = 0
        while chunk is not None:
            if disk.tracking.settle(chunk, written):
                disk.digest.restore(chunk, kept_value(since, chunk))
                if runs and runs[-1] == chunk:
                    runs[-1] = chunk + 1
                else:
                    runs += [chunk, chunk + 1]
            else:
                doubtful.set(chunk)
            n_seen += 1
            if len(runs) == 2 * native.KEEP_RUNS:
                yield native.Keep(disk.index, struct.pack(f"<{len(runs)}Q", *runs))
                runs = []
            elif n_seen % _PAGE_CHUNKS == 0:
                yield None
            chunk = disk.tracking.next_dirty(chunk + 1)
        if runs:
            yield native.Keep(disk.index, struct.pack(f"<{len(runs)}Q", *runs))

    async def _compare(self) -> None:
        """Hear what there is of the disks that are compared, and answer."""
        walks = {
            disk.index: ContentReconciliation(disk)
            for disk in self._disks
            if self._deltas[disk.index] is native.Delta.COMPARE
        }
        while (have := await self._link.expect(native.Have, IDLE_DEADLINE_S)).disk != -1:
            walk = walks.get(have.disk)
            if walk is None:
                raise RemoteProtocolError(f"{self._link.peer} compares disk {have.disk}, which is not to be compared")
            await self._offload(walk.on_have, have, native.Resumption.COMPARE)
            await self._link.send_message(
                native.Kept(have.disk, have.first, struct.pack(f"<{len(walk.kept)}Q", *walk.kept))
            )
            for at, value in enumerate(walk.kept):
                if not value and any(have.values[at * _HASH_SIZE : (at + 1) * _HASH_SIZE]):
                    self._doubtful[have.disk].set(have.first + at)

    async def _weigh(self, disk: OutgoingDisk) -> None:
        """Ask for the blocks of the doubtful chunks that are to be sent, and keep those that are equal."""
        asked: deque[list[int]] = deque()
        start: int | None = 0
        while start is not None or asked:
            chunks, start = ([], None) if start is None else self._next_doubtful(disk, start)
            if chunks:
                await self._link.send_message(native.Weigh(disk.index, struct.pack(f"<{len(chunks)}Q", *chunks)))
                asked.append(chunks)
            if asked and (len(asked) >= _WINDOW or start is None):
                weighed = await self._link.expect(native.Weighed, IDLE_DEADLINE_S)
                masks = await self._offload(self._match, disk, asked.popleft(), weighed.hashes)
                await self._link.send_message(native.Like(masks))

    def _next_doubtful(self, disk: OutgoingDisk, start: int) -> tuple[list[int], int | None]:
        """Return the next chunks to be weighed, and where to go on."""
        chunks: list[int] = []
        chunk = self._doubtful[disk.index].next_set(start)
        while chunk is not None and len(chunks) < native.WEIGHED_CHUNKS:
            if disk.tracking.next_dirty(chunk) == chunk:
                chunks.append(chunk)
            chunk = self._doubtful[disk.index].next_set(chunk + 1)
        return chunks, chunk

    def _match(self, disk: OutgoingDisk, chunks: Sequence[int], hashes: bytes) -> bytes:
        size = disk.disk.size
        if len(hashes) != _HASH_SIZE * sum(_n_hashes(chunk, size) for chunk in chunks):
            raise RemoteProtocolError(f"{self._link.peer} sent {len(hashes)} bytes of hashes of {len(chunks)} chunks")
        masks, at = [], 0
        for chunk in chunks:
            end = at + _HASH_SIZE * _n_hashes(chunk, size)
            masks.append(self._match_chunk(disk, chunk, hashes[at:end]).to_bytes(_MASK_SIZE, "little"))
            at = end
        return b"".join(masks)

    def _match_chunk(self, disk: OutgoingDisk, chunk: int, theirs: bytes) -> int:
        """Leave of a dirty chunk dirty what differs from what the destination has; return the mask of the rest."""
        taken = disk.tracking.take_next(chunk)
        assert taken is not None
        assert taken[0] == chunk, "nobody else takes chunks yet"
        try:
            ours = block_hashes(disk.disk.image, chunk, self._buffer)
        except DiskError as exc:
            disk.tracking.restore(chunk)
            raise MigrationError(f"{exc}; the disk stays here: mend its image, then migrate again") from exc
        equal = 0
        for block in range(len(ours) // _HASH_SIZE):
            place = slice(block * _HASH_SIZE, (block + 1) * _HASH_SIZE)
            equal |= (ours[place] == theirs[place]) << block
        disk.digest.restore_blocks(chunk, weighed_value(theirs), equal)
        disk.tracking.acknowledge([chunk])
        for offset, length in mask_extents(taken[1] & ~equal, chunk, disk.disk.size):
            disk.tracking.mark(offset, length)
        return equal


class DestinationDelta:
    """The destination's half; of one connection."""

    def __init__(
        self, link: NativeLink, disks: Sequence[IncomingDisk], offers: Sequence[native.DiskOffer], offload: Offload
    ) -> None:
        """Answer for ``disks``, which were offered as ``offers`` say."""
        self._link = link
        self._disks = disks
        self._offers = offers
        self._offload = offload
        self.deltas = [
            native.Delta.PROVED
            if disk.is_as_released
            else native.Delta.COMPARE
            if offer.is_compared
            else native.Delta.NOTHING
            for disk, offer in zip(disks, offers, strict=True)
        ]
        self.is_any = any(delta is not native.Delta.NOTHING for delta in self.deltas)
        self._asked: deque[tuple[IncomingDisk, tuple[int, ...], bytes]] = deque()
        self._buffer = memoryview(bytearray(CHUNK_SIZE if self.is_any else 0))

    async def run(self, tell_contents: Callable[[Sequence[int]], Awaitable[None]]) -> None:
        """Do what the source asks until passes begin.

        Args:
            tell_contents: sends the HAVE messages of disks by their place in the offer, and hears the answers.

        Raises:
            FusemigError: the source is gone, or says what makes no sense; or an image cannot be read.
        """
        while (keep := await self._link.expect(native.Keep, IDLE_DEADLINE_S)).disk != -1:
            await self._offload(self._keep, keep)
        await tell_contents([at for at, delta in enumerate(self.deltas) if delta is native.Delta.COMPARE])
        while True:
            event = await self._link.receive()
            match event:
                case native.Weigh(disk=-1) if not self._asked:
                    return
                case native.Weigh() if len(self._asked) < _WINDOW:
                    hashes = await self._offload(self._weigh, event)
                    await self._link.send_message(native.Weighed(hashes))
                case native.Like() if self._asked:
                    await self._offload(self._like, event)
                case native.Abort():
                    raise MigrationError(f"{self._link.peer} called the migration off: {event.reason}")
                case _:
                    raise RemoteProtocolError(f"{self._link.peer} sent {type(event).__name__} while disks are compared")

    def _keep(self, keep: native.Keep) -> None:
        if not 0 <= keep.disk < len(self._disks) or self.deltas[keep.disk] is not native.Delta.PROVED:
            raise RemoteProtocolError(f"{self._link.peer} keeps chunks of disk {keep.disk}, which is not proved here")
        disk, since = self._disks[keep.disk], self._offers[keep.disk].since
        bounds = _numbers(keep.runs, 2 * native.KEEP_RUNS)
        limit = n_chunks(disk.disk.size)
        if len(bounds) % 2 or list(bounds) != sorted(set(bounds)) or bounds[-1] > limit:
            raise RemoteProtocolError(f"{self._link.peer} keeps runs of chunks that disk {keep.disk} does not have")
        for first, stop in zip(bounds[::2], bounds[1::2], strict=True):
            for chunk in range(first, stop):
                disk.note_found(chunk, kept_value(since, chunk))

    def _weigh(self, weigh: native.Weigh) -> bytes:
        if not 0 <= weigh.disk < len(self._disks) or self.deltas[weigh.disk] is native.Delta.NOTHING:
            raise RemoteProtocolError(f"{self._link.peer} weighs disk {weigh.disk}, which is not to be compared")
        disk = self._disks[weigh.disk]
        chunks = _numbers(weigh.chunks, native.WEIGHED_CHUNKS)
        if list(chunks) != sorted(set(chunks)) or chunks[-1] >= n_chunks(disk.disk.size):
            raise RemoteProtocolError(f"{self._link.peer} weighs chunks that disk {weigh.disk} does not have")
        hashes = b"".join(block_hashes(disk.disk.image, chunk, self._buffer) for chunk in chunks)
        self._asked.append((disk, chunks, hashes))
        return hashes

    def _like(self, like: native.Like) -> None:
        disk, chunks, hashes = self._asked.popleft()
        if len(like.masks) != _MASK_SIZE * len(chunks):
            raise RemoteProtocolError(f"{self._link.peer} answered for other chunks than it had asked for")
        size, at = disk.disk.size, 0
        for number, chunk in enumerate(chunks):
            end = at + _HASH_SIZE * _n_hashes(chunk, size)
            mask = int.from_bytes(like.masks[number * _MASK_SIZE : (number + 1) * _MASK_SIZE], "little")
            disk.note_blocks_found(chunk, weighed_value(hashes[at:end]), mask & chunk_mask(chunk, size))
            at = end


def _numbers(packed: bytes, at_most: int) -> tuple[int, ...]:
    n, rest = divmod(len(packed), 8)
    if rest or not 0 < n <= at_most:
        raise RemoteProtocolError(f"a list of {len(packed)} bytes; at most {at_most} numbers of 8 bytes are allowed")
    return struct.unpack(f"<{n}Q", packed)
