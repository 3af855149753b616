"""Receipt: keeps the journals of what a destination received, and tells a source that comes back what is there.

    open     claimed disks: journals begun anew, or read      tell     HAVE ..., after WELCOME
    keep     a task beside the receiving: syncs the images and writes the journals, whenever `go_on` finds it time
    go_on    between slices: JOURNALED for the last time that was
    finish   at the end of a migration that failed: once more, with everything that was applied

A journal that cannot be written costs the resumption and nothing else. An image that cannot be synced is an error, and
stays one.
"""

from __future__ import annotations

import struct
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

import structlog
import trio

from fusemig.disk.journal import JournalOwner, Mark
from fusemig.errors import ConfigError, DiskError, FusemigError, RemoteProtocolError
from fusemig.migration.link import IDLE_DEADLINE_S
from fusemig.migration.resume import content_pages, group_resumption, journal_pages
from fusemig.wire import native

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from fusemig.migration.link import NativeLink, Offload
    from fusemig.migration.writer import IncomingDisk

log = structlog.get_logger(__name__)

JOURNAL_INTERVAL_S: Final = 5.0
"""From one writing of the journals to the next: what a crash of the destination costs, and one sync of its images."""


class _Entries(NamedTuple):
    """What is to be written down."""

    sectors: list[Mapping[int, bytes]]
    """Of each journal."""
    sequence: int
    """The last frame that is in them."""


class Receipt:
    """What is kept of one connection's disks."""

    def __init__(self, disks: Sequence[IncomingDisk], hello: native.Hello, offload: Offload) -> None:
        """Keep it for ``disks``, which ``hello`` offered in this order."""
        self.applied = 0
        """The last frame that is in the images."""
        self.is_kept = native.RESUME in hello.features
        """Whether the migration can be gone on with."""
        self.resumption = native.Resumption.NOTHING
        self.covered: list[native.Covered] = []
        self._disks = disks
        self.hello = hello
        self._offload = offload
        self._written = 0
        self._told = 0
        self._due_at = 0.0
        self._error: FusemigError | None = None
        self._is_writing = False
        self._to_write, self._ordered = trio.open_memory_channel[_Entries](1)

    async def open(self) -> None:
        """Open the journals and see what is in them.

        Raises:
            DiskError: an image failed.
        """
        self.is_kept = self.is_kept and all(disk.open_journal is not None for disk in self._disks)
        kinds = []
        for disk, offer in zip(self._disks, self.hello.disks, strict=True):
            if self.is_kept:
                await self._offload(self._open_journal, disk, offer)
            if not offer.is_resumed:
                kinds.append(native.Resumption.NOTHING)
            elif disk.journal is not None and disk.journal.owner == self._owner(offer):
                kinds.append(native.Resumption.JOURNAL)
            else:
                kinds.append(native.Resumption.COMPARE)
        self.resumption = group_resumption(kinds)
        for disk, offer in zip(self._disks, self.hello.disks, strict=True):
            if self.is_kept and self.resumption is not native.Resumption.JOURNAL:
                await self._offload(self._begin, disk, offer)
        self._due_at = trio.current_time() + JOURNAL_INTERVAL_S
        if self.resumption is native.Resumption.JOURNAL:
            self.covered = [
                native.Covered(disk.journal.mark.attempt, disk.journal.mark.sequence)
                for disk in self._disks
                if disk.journal is not None
            ]

    def _owner(self, offer: native.DiskOffer) -> JournalOwner:
        return JournalOwner(image_id=offer.image_id, epoch=offer.epoch + 1, session=self.hello.session)

    def _open_journal(self, disk: IncomingDisk, offer: native.DiskOffer) -> None:
        assert disk.open_journal is not None
        try:
            disk.journal = disk.open_journal()
        except (ConfigError, DiskError) as exc:
            self._give_up(offer.name, exc)

    def _begin(self, disk: IncomingDisk, offer: native.DiskOffer) -> None:
        assert disk.journal is not None
        try:
            disk.journal.begin(self._owner(offer))
        except DiskError as exc:
            self._give_up(offer.name, exc)

    def _give_up(self, name: str, reason: FusemigError) -> None:
        self.is_kept = False
        log.warning("no journal is kept: an interrupted migration compares contents", disk=name, reason=str(reason))

    async def tell(self, link: NativeLink) -> None:
        """Tell the source what is there, if it asked.

        Raises:
            DiskError: an image, or a journal, cannot be read.
            ConnectionLostError: the source is gone.
            RemoteProtocolError: it answers what it was not asked.
        """
        if self.resumption is native.Resumption.NOTHING:
            return
        asked: deque[native.Have] = deque()
        for index, disk in enumerate(self._disks):
            if self.resumption is native.Resumption.JOURNAL:
                assert disk.journal is not None
                await self._offload(disk.journal.load, disk.digest)
                pages = journal_pages(index, disk.digest)
            else:
                await self._offload(disk.disk.image.drop_cache)
                pages = content_pages(index, disk.disk.image)
            is_compared = self.resumption is native.Resumption.COMPARE
            await self._tell_pages(link, pages, asked, is_compared=is_compared)
        await self._end_pages(link, asked)

    async def tell_contents(self, link: NativeLink, indices: Sequence[int]) -> None:
        """Tell the source the hashes of what some disks hold; raises as `tell`."""
        asked: deque[native.Have] = deque()
        for index in indices:
            image = self._disks[index].disk.image
            await self._offload(image.drop_cache)
            await self._tell_pages(link, content_pages(index, image), asked, is_compared=True)
        await self._end_pages(link, asked)

    async def _tell_pages(
        self, link: NativeLink, pages: Iterator[native.Have], asked: deque[native.Have], *, is_compared: bool
    ) -> None:
        while (have := await self._offload(next, pages, None)) is not None:
            await link.send_message(have)
            if is_compared:
                asked.append(have)
                # The next one is read while the source compares this one; more would fill the stream both ways.
                if len(asked) > 1:
                    await self._hear_kept(link, asked.popleft())

    async def _end_pages(self, link: NativeLink, asked: deque[native.Have]) -> None:
        while asked:
            await self._hear_kept(link, asked.popleft())
        await link.send_message(native.Have(-1))

    async def _hear_kept(self, link: NativeLink, asked: native.Have) -> None:
        kept = await link.expect(native.Kept, IDLE_DEADLINE_S)
        n = len(asked.values) // 16
        if (kept.disk, kept.first, len(kept.values)) != (asked.disk, asked.first, 8 * n):
            raise RemoteProtocolError(f"{link.peer} compared chunks that it was not asked for")
        disk = self._disks[asked.disk]
        for chunk, value in enumerate(struct.unpack(f"<{n}Q", kept.values), asked.first):
            if value:
                disk.note_found(chunk, value)

    async def go_on(self, link: NativeLink) -> None:
        """Have the journals written if it is time, and tell the source of the last time; between slices.

        Raises:
            DiskError: an image could not be synced.
            ConnectionLostError: the source is gone.
        """
        if self._error is not None:
            raise self._error
        if not self.is_kept:
            return
        if self._written > self._told:
            self._told = self._written
            await link.send_message(native.Journaled(self._written))
        if self._is_writing or self.applied == self._written or trio.current_time() < self._due_at:
            return
        entries = await self._snapshot()
        self._is_writing = True
        self._to_write.send_nowait(entries)

    async def _snapshot(self) -> _Entries:
        """Take what changed, of all disks or of none: what is taken and not written would never be."""
        entries = _Entries([], self.applied)
        with trio.CancelScope(shield=True):  # a copy of memory
            for disk in self._disks:
                if disk.journal is not None:
                    entries.sectors.append(await self._offload(disk.journal.snapshot, disk.digest, disk.changed))
        return entries

    async def keep(self) -> None:
        """Write what `go_on` hands over, until `stop`; what it has begun it ends, also if it is cancelled."""
        async for entries in self._ordered:
            try:
                with trio.CancelScope(shield=True):
                    await self._write(entries)
            except FusemigError as exc:
                self._error = exc
            self._due_at = trio.current_time() + JOURNAL_INTERVAL_S
            self._is_writing = False

    async def _write(self, entries: _Entries) -> None:
        for disk in self._disks:
            await self._offload(disk.disk.image.flush)
        journals = [disk.journal for disk in self._disks if disk.journal is not None]
        try:
            for journal, sectors in zip(journals, entries.sectors, strict=True):
                await self._offload(journal.write, sectors, Mark(self.hello.attempt, entries.sequence))
        except DiskError as exc:
            self._give_up(self._disks[0].disk.name, exc)
            return
        self._written = entries.sequence

    def stop(self) -> None:
        """Have `keep` end after what it is writing."""
        self._to_write.close()

    async def finish(self) -> None:
        """Write the journals a last time; does not raise."""
        if not self.is_kept or self._error is not None or not any(disk.changed.count for disk in self._disks):
            return
        try:
            await self._write(await self._snapshot())
        except FusemigError as exc:
            log.warning("what was received last is not known to be durable", reason=str(exc))

    def close(self) -> None:
        """Close the journals; idempotent."""
        for disk in self._disks:
            if disk.journal is not None:
                disk.journal.close()
