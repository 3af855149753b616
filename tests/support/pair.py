"""A source and a destination in one loop, over memory, with nothing of the kernel between them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import msgspec
import trio
from xxhash import xxh3_128_hexdigest

from fusemig.core.phase import MigrationPhase
from fusemig.disk.allocation import map_size
from fusemig.disk.borrowed import BorrowedDisk, Wants, new_map
from fusemig.disk.dirty_file import DirtyFile
from fusemig.disk.dirty_map import MapBase, Since, dirty_file_size
from fusemig.disk.journal import ReceiptJournal, journal_size
from fusemig.disk.memory import MemoryDisk
from fusemig.disk.overlay import OverlayDisk
from fusemig.disk.tracked import Gate, TrackedDisk
from fusemig.errors import PeerRefusedError
from fusemig.migration.commit import SourceDisk
from fusemig.migration.destination import DestinationMigration
from fusemig.migration.fetch_plan import Loan
from fusemig.migration.incoming import AwaitedDisk
from fusemig.migration.joining import Gatherings
from fusemig.migration.source import SourceMigration
from fusemig.migration.stats import MigrationParameters
from fusemig.migration.witness import RecalledDisk
from fusemig.migration.writer import IncomingDisk
from fusemig.records.epoch import EpochFile, EpochRecord, Ownership, is_as_released
from support.streams import memory_connection

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import Any

    from fusemig.disk.base import Disk
    from fusemig.migration.link import Offload
    from fusemig.migration.resume import ResumePoint
    from fusemig.wire.native import AskedDisk, DiskOffer
    from support.streams import MemoryStream


async def inline(function: Any, *args: Any, abandon_on_cancel: bool = False) -> Any:
    """Run a call that may sleep in the loop: nothing sleeps here, and every run is the same."""
    await trio.lowlevel.checkpoint()
    return function(*args)


async def nothing() -> None:
    """Stand in for the kernel's page cache, which a memory disk has not."""


class CachedDisk(MemoryDisk):
    """A disk that is read from memory until its cache is dropped; pages of it may have been lost on their way out."""

    def __init__(self, name: str, size: int) -> None:
        super().__init__(name, size)
        self.lost: dict[int, bytes] = {}
        """What the store holds instead of what is in memory, by offset; a flush knows nothing of it."""

    def drop_cache(self) -> None:
        super().drop_cache()
        for offset, stored in self.lost.items():
            self.content[offset : offset + len(stored)] = stored
        self.lost.clear()


class Side:
    """The disks of one host."""

    def __init__(self, directory: Path, sizes: dict[str, int], gate: Gate) -> None:
        directory.mkdir(exist_ok=True)
        self.images: dict[str, MemoryDisk] = {name: CachedDisk(name, size) for name, size in sizes.items()}
        self.disks = {name: TrackedDisk(image, gate=gate) for name, image in self.images.items()}
        self.epochs = {name: EpochFile(directory / f"{name}.fusemig") for name in sizes}
        self.gatherings = Gatherings()
        self.busy = False
        self.journals: dict[str, Disk] = {name: MemoryDisk(name, journal_size(size)) for name, size in sizes.items()}
        self.dirty_stores: dict[str, Disk] = {
            name: MemoryDisk(name, dirty_file_size(size)) for name, size in sizes.items()
        }
        self.dirty_files: dict[str, DirtyFile] = {}
        self.borrowed: dict[str, BorrowedDisk] = {}
        """What lies over the images of disks that are not all here."""
        self.suffix = ""
        """Changes every image's stamp, as a write of the bytes that are there does."""

    def dirty_file(self, name: str) -> DirtyFile:
        """Return a disk's persistent map, opened at the first use."""
        if name not in self.dirty_files:
            store = self.dirty_stores[name]
            self.dirty_files[name] = DirtyFile(self.disks[name], "boot", store, lambda: store)
        return self.dirty_files[name]

    def restart(self, gate: Gate) -> None:
        """Begin anew with what a killed daemon leaves: the images and the files beside them."""
        self.disks = {name: TrackedDisk(disk.image, gate=gate) for name, disk in self.disks.items()}
        self.epochs = {name: EpochFile(file.path) for name, file in self.epochs.items()}
        self.dirty_files = {}
        for name in self.disks:
            self.dirty_file(name)

    def stamp(self, name: str) -> str:
        """Return what changes whenever an image does; an ideal one."""
        content = self.images[name].content
        return xxh3_128_hexdigest(content) + self.suffix

    def _taken(self, name: str, session: str) -> None:
        record = self.epochs[name].record
        assert record is not None
        base = MapBase(image_id=record.image_id, epoch=record.epoch, session=session)
        self.dirty_file(name).begin(Since.OWNED, base)

    async def awaited(self) -> list[AwaitedDisk]:
        return [AwaitedDisk(name, disk.size, isinstance(disk.image, OverlayDisk)) for name, disk in self.disks.items()]

    async def claim(self, offers: Sequence[DiskOffer], session: str, peer: str) -> list[IncomingDisk]:
        claimed = []
        for offer in offers:
            if offer.name not in self.disks:
                raise PeerRefusedError(f"disk '{offer.name}' is not served here")
            if offer.size != self.disks[offer.name].size:
                raise PeerRefusedError(f"disk '{offer.name}' has {self.disks[offer.name].size} bytes, not {offer.size}")
            record = EpochRecord(
                state=Ownership.INCOMING, image_id=offer.image_id, epoch=offer.epoch + 1, session=session, peer=peer
            )
            known = self.epochs[offer.name].record
            if offer.is_resumed and (known is None or (known.image_id, known.epoch) != (record.image_id, record.epoch)):
                raise PeerRefusedError(f"nothing of disk '{offer.name}' to go on with here")
            is_proved = is_as_released(
                known,
                image_id=offer.image_id,
                epoch=offer.epoch,
                session=offer.since,
                stamp=self.stamp(offer.name),
            )
            self.epochs[offer.name].write(record)
            disk = self.disks[offer.name]
            open_journal = partial(ReceiptJournal, self.journals[offer.name], disk.size)
            on_taken = partial(self._taken, offer.name)
            claimed.append(
                IncomingDisk(
                    disk,
                    self.epochs[offer.name],
                    nothing,
                    open_journal,
                    partial(self._borrow, offer.name),
                    partial(self._end_loan, offer.name),
                    on_taken,
                    is_as_released=is_proved,
                )
            )
        self.busy = True
        return claimed

    def release(self, disks: Sequence[IncomingDisk]) -> None:
        self.busy = False

    def recall(self, session: str, image_ids: Sequence[str], peer: str) -> list[RecalledDisk]:
        if self.busy:
            raise PeerRefusedError("it is being received")
        self.busy = True
        return [
            RecalledDisk(name, file, self.disks[name])
            for name, file in self.epochs.items()
            for record in [file.record]
            if record is not None and (record.session == session or record.image_id in image_ids)
        ]

    def _borrow(self, name: str, missing: Sequence[tuple[int, int]]) -> None:
        image = self.disks[name].image
        allocation = new_map(MemoryDisk(name, map_size(image.size)), image, missing, "boot")
        self.borrowed[name] = BorrowedDisk(image, allocation, Wants(name))
        self.disks[name].replace_image(self.borrowed[name])

    def _end_loan(self, name: str) -> None:
        loan = self.borrowed.pop(name, None)
        if loan is not None:
            self.disks[name].replace_image(loan.image)

    def _repay(self, name: str) -> None:
        record = self.epochs[name].record
        assert record is not None
        assert not self.borrowed[name].missing_bytes
        self.borrowed[name].flush()
        self.epochs[name].write(msgspec.structs.replace(record, state=Ownership.OWNER, is_loan=False))
        self._end_loan(name)

    def loans(self, session: str, lent: Sequence[AskedDisk], scope: trio.CancelScope) -> list[Loan]:
        names = {file.record.image_id: name for name, file in self.epochs.items() if file.record is not None}
        if any(disk.image_id not in names for disk in lent):
            raise PeerRefusedError("that migration did not bring these disks here")
        asked = [names[disk.image_id] for disk in lent]
        return [Loan(self.borrowed.get(name), partial(self._repay, name)) for name in asked]

    def let_go(self, disks: Sequence[RecalledDisk]) -> None:
        self.busy = False


class Pair:
    """Two sides and one migration at a time between them."""

    def __init__(self, directory: Path, sizes: dict[str, int], **parameters: Any) -> None:
        self.source = Side(directory / "source", sizes, Gate.OPEN)
        self.destination = Side(directory / "destination", sizes, Gate.READ_ONLY)
        self.parameters = MigrationParameters(**parameters)
        self.phases: list[MigrationPhase] = []
        self.streams: tuple[MemoryStream, MemoryStream] = memory_connection()
        self._nursery: trio.Nursery | None = None
        self.offload: Offload = inline
        """Runs the source's calls; of a migration that is made from now on."""
        self.outgoing = self._new_source()
        self.incoming: DestinationMigration | None = None

    def _new_source(self, resume: ResumePoint | None = None) -> SourceMigration:
        lent = [
            SourceDisk(
                disk,
                self.source.epochs[name],
                nothing,
                self.source.dirty_file(name),
                stamp=partial(self.source.stamp, name),
            )
            for name, disk in self.source.disks.items()
        ]

        return SourceMigration(lent, self._connect, self.parameters, self.offload, self.phases.append, resume=resume)

    async def _connect(self) -> MemoryStream:
        await trio.lowlevel.checkpoint()
        if self.outgoing.phase is MigrationPhase.POSTCOPY:  # the connection that the disks are lent over
            self.streams = memory_connection()
            assert self._nursery is not None
            self._nursery.start_soon(self._receive)
        return self.streams[0]

    def renew(self, resume: ResumePoint | None = None) -> None:
        """Make a new connection and a new migration over it, which may go on with another one."""
        if resume is None:
            self.outgoing.forget()
        self.phases.clear()
        self.streams = memory_connection()
        self.outgoing = self._new_source(resume)

    def turn_round(self) -> None:
        """Have the next migration go the other way."""
        self.source, self.destination = self.destination, self.source
        self.renew()

    async def migrate(self) -> SourceMigration:
        """Run both ends to their end."""
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(self._receive)
            self._nursery.start_soon(self.outgoing.run)
        return self.outgoing

    async def _receive(self) -> None:
        self.incoming = DestinationMigration(self.streams[1], self.destination, inline)
        await self.incoming.run()
        await self.streams[1].aclose()

    def gates(self) -> tuple[set[Gate], set[Gate]]:
        """Return the gates of the source's and of the destination's disks."""
        return (
            {disk.gate for disk in self.source.disks.values()},
            {disk.gate for disk in self.destination.disks.values()},
        )

    def ownership(self) -> tuple[set[Ownership], set[Ownership]]:
        """Return what the epoch files say, read anew from disk."""
        source, destination = (
            {record.state for record in (EpochFile(file.path).record for file in side.epochs.values()) if record}
            for side in (self.source, self.destination)
        )
        return source, destination

    def is_equal(self) -> bool:
        """Whether both sides hold the same bytes."""
        return all(self.source.images[n].content == self.destination.images[n].content for n in self.source.images)
