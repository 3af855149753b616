"""ServedDisk: one disk of the daemon, from its place on the command line to the file that guests see.

What it may do when the daemon starts, and what may be received into it, says `fusemig.daemon.ownership`.

A disk with a base (``--disk NAME=OVERLAY,base=BASE``) has an image from the start: an overlay that does not exist is
made (`fusemig.disk.overlay_file`). An overlay is never served without its base.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import msgspec
import structlog

from fusemig.daemon.disk_spec import epoch_path, state_directory
from fusemig.daemon.ownership import RECEIVABLE, check_offer, starting_gate
from fusemig.disk import borrowed
from fusemig.disk.allocation import boot_id
from fusemig.disk.dirty_file import open_dirty_file
from fusemig.disk.dirty_map import MapBase, Since
from fusemig.disk.journal import open_journal
from fusemig.disk.overlay_file import OverlayFile
from fusemig.disk.raw import RawDisk, create_image
from fusemig.disk.room import room_of
from fusemig.disk.stamp import settled_stamp, stamp_of
from fusemig.disk.tracked import Gate, TrackedDisk
from fusemig.disk.zeroes import DetectZeroes
from fusemig.errors import ConfigError, DiskError, PeerBusyError, PeerRefusedError, StateError
from fusemig.records.epoch import EpochFile, EpochRecord, Ownership, is_as_released

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from fusemig.daemon.disk_spec import DiskSpec
    from fusemig.disk.borrowed import BorrowedDisk
    from fusemig.disk.dirty_file import DirtyFile
    from fusemig.disk.journal import ReceiptJournal
    from fusemig.disk.room import Room
    from fusemig.fuse.export import Export, Exports
    from fusemig.succession.fdstore import FdStore
    from fusemig.wire.native import DiskOffer

log = structlog.get_logger(__name__)


class ServedDisk:
    """An image, its guest's side, its epoch file and the file of the mount."""

    def __init__(
        self,
        spec: DiskSpec,
        exports: Exports,
        state_dir: Path | None,
        *,
        is_incoming: bool,
        store: FdStore | None = None,
        known_size: int = 0,
        detect_zeroes: DetectZeroes = DetectZeroes.OFF,
    ) -> None:
        """Open the image, unless it is still to come, and export it; ``store`` keeps its files for a successor.

        ``known_size`` is that which guests of a predecessor know (`RawDisk`).

        Raises:
            ConfigError: the image, its epoch file or the name cannot be used as asked; nothing is left open.
        """
        self._store = store
        self._known_size = known_size
        self.name = spec.name
        self.path = spec.path
        self.base = spec.base
        self.is_read_only = spec.is_read_only
        self._detect_zeroes = detect_zeroes
        self.busy = ""
        """Why the disk must not be migrated, received or closed now; empty if nothing keeps it (an op blocker)."""
        self.doubt = ""
        """What has become of asking who owns the disk, if it is in doubt; for people."""
        state_dir = state_directory(spec, state_dir)
        self.epoch_file = EpochFile(epoch_path(spec, state_dir))
        self._dirty_path = state_dir / f"{spec.path.name}.fusemig-dirty"
        self._journal_path = state_dir / f"{spec.path.name}.fusemig-journal"
        self._map_path = state_dir / f"{spec.path.name}.fusemig-map"
        self._loan_path = state_dir / f"{spec.path.name}.fusemig-loan"
        self.is_waiting = is_incoming and not spec.is_read_only and self.ownership in RECEIVABLE
        """Whether a source may fill this disk."""
        self._is_held = False
        self._ending_loan = threading.Lock()
        """Held by whoever ends the loan: the thread of a lost connection may be at it when that of the next one is."""
        self._past_loans: list[BorrowedDisk] = []
        self.image: RawDisk | OverlayFile | None = None
        self.disk: TrackedDisk | None = None
        self.loan: BorrowedDisk | None = None
        """The layer over the image of a disk that is not all here."""
        self.dirty_file: DirtyFile | None = None
        """What guests wrote since a migration began; None for a disk that cannot be written."""
        if not self.is_waiting or self.base is not None or _exists(spec.path):
            self._open(starting_gate(spec, self.epoch_file, is_waiting=self.is_waiting, is_incoming=is_incoming))
        try:
            self.export: Export = exports.add(self.name, self.disk, read_only=spec.is_read_only)
        except ConfigError:
            self.close()
            raise

    @property
    def ownership(self) -> Ownership | None:
        """What the epoch file says; None where the disk never moved."""
        record = self.epoch_file.record
        return None if record is None else record.state

    def count_allocated(self) -> int:
        """Return about how many bytes of the image are no holes; 0 where that says nothing. May sleep."""
        image = self.image
        if not isinstance(image, RawDisk):
            return 0  # of an overlay, the destination may have the base
        try:
            held = image.stat().st_blocks * 512  # less than the data where the store compresses
            data = sum(extent.length for extent in image.extents(0, image.size) if extent.is_data)
        except DiskError:
            return 0  # the migration will meet it, and say so
        return min(held, data)

    def room(self) -> Room | None:
        """Return what the image's file system has for it; None where that is not known. May sleep."""
        return room_of(self.path)

    @property
    def is_writable(self) -> bool:
        """Whether guests may write now or are only waiting for a switchover."""
        return self.disk is not None and self.disk.gate is not Gate.READ_ONLY

    @property
    def io_error(self) -> DiskError | None:
        """The sync that failed for good, of the image, of an overlay's map or of that of what is still missing."""
        return None if self.disk is None else self.disk.io_error

    @property
    def _is_base_proved(self) -> bool:
        return not isinstance(self.image, OverlayFile) or self.image.is_base_proved

    def _open(self, gate: Gate) -> None:
        self.image = self._open_image()
        self.disk = TrackedDisk(self.image, gate=gate, detect_zeroes=self._detect_zeroes)
        record = self.epoch_file.record
        if record is not None and record.is_loan and record.state in (Ownership.BORROWING, Ownership.PREPARED):
            self._lay(borrowed.reopen(self.image, self._loan_path, self._store))
        self.disk.set_held(self._is_held)
        if not self.is_read_only:
            self.dirty_file = self._open_dirty_file(self.image, self.disk)

    # A disk that is ours before all of it is here

    def borrow(self, missing: Sequence[tuple[int, int]]) -> None:
        """Take note that runs of blocks are to be fetched once the disk is ours (`IncomingDisk.borrow`)."""
        assert self.image is not None
        self._lay(borrowed.borrow(self.image, self._loan_path, missing, self._store))

    def _lay(self, loan: BorrowedDisk) -> None:
        assert self.disk is not None
        self.loan = loan
        self.disk.replace_image(loan)

    def end_loan(self) -> None:
        """Be an ordinary image again (`IncomingDisk.end_loan`), whatever is missing."""
        with self._ending_loan:
            self._end_loan()

    def _end_loan(self) -> None:
        if self.loan is None:
            return
        assert self.disk is not None
        assert self.image is not None
        self.disk.replace_image(self.image)
        self.loan.wants.close()
        # Requests under way may still look at it, so it is closed with the image.
        self._past_loans.append(self.loan)
        self.loan = None
        borrowed.forget(self._loan_path)

    def repay(self) -> None:
        """Make a disk of which everything has come an ordinary one, durably (`Loan.repay`); may sleep.

        One that is ordinary by now, or may even be on its way to another host, is left as it is.

        Raises:
            DiskError: the store failed.
            StateError: the epoch file cannot be written.
        """
        with self._ending_loan:
            record = self.epoch_file.record
            if self.loan is None or record is None or record.state is not Ownership.BORROWING:
                return
            assert not self.loan.missing_bytes
            self.loan.flush()
            self.epoch_file.write(msgspec.structs.replace(record, state=Ownership.OWNER, is_loan=False))
            self._end_loan()

    def _open_dirty_file(self, image: RawDisk | OverlayFile, disk: TrackedDisk) -> DirtyFile | None:
        try:
            return open_dirty_file(disk, self._dirty_path, boot_id(), image.stat, self._store)
        except (StateError, DiskError):
            disk.close()
            raise
        except ConfigError as exc:
            log.warning("no map of written chunks is kept", disk=self.name, reason=str(exc))
            return None

    def set_held(self, is_held: bool) -> None:
        """Hold the disk (`TrackedDisk`), also one whose image is still to come."""
        self._is_held = is_held
        if self.disk is not None:
            self.disk.set_held(is_held)

    def _open_image(self) -> RawDisk | OverlayFile:
        if self.base is None:
            if _exists(self._map_path):
                raise ConfigError(
                    f"image {self.path} of disk '{self.name}' is an overlay, and much of its disk is in its base: name"
                    f" that (--disk {self.name}={self.path},base=BASE), or delete {self._map_path} if the image is"
                    " another one now"
                )
            return RawDisk(
                self.name,
                self.path,
                read_only=self.is_read_only,
                store=self._store,
                role="image",
                known_size=self._known_size,
            )
        if not self.is_waiting and self.ownership is not None and not _exists(self.path):
            raise ConfigError(f"overlay {self.path} of disk '{self.name}' is missing: restore it, and its map with it")
        if self.ownership is not None and _exists(self.path) and not _exists(self._map_path):
            # An image without data would be taken for a new overlay, and it may hold blocks of zeros.
            raise ConfigError(
                f"the map {self._map_path} of overlay {self.path} of disk '{self.name}' is missing: restore it, or "
                f"delete the image and {self.epoch_file.path} to begin anew"
            )
        return OverlayFile(
            self.name,
            self.path,
            self.base,
            self._map_path,
            read_only=self.is_read_only,
            store=self._store,
            known_size=self._known_size,
        )

    def check_offer(self, offer: DiskOffer) -> None:
        """Raise `PeerRefusedError` unless this disk can be received as offered; changes nothing."""
        if self.busy:
            raise PeerBusyError(f"disk '{self.name}' is busy: {self.busy}")
        image = self.image
        if offer.base is not None and not self._is_base_proved:
            if self.io_error is not None:
                raise PeerRefusedError(
                    f"disk '{self.name}' has an I/O error there and cannot be trusted: {self.io_error}"
                )
            raise PeerBusyError(
                f"the base of disk '{self.name}' was written there while it was served, and is being read: migrate "
                "again later"
            )
        check_offer(
            offer,
            record=self.epoch_file.record,
            is_waiting=self.is_waiting,
            size=None if self.disk is None else self.disk.size,
            base=(self.base, image.shared_base) if self.base is not None and isinstance(image, OverlayFile) else None,
        )

    def look_again(self, *, is_destination: bool) -> None:
        """Decide anew whether the disk waits for a source, after its epoch file has changed."""
        self.is_waiting = (
            is_destination and not self.is_read_only and not self.is_writable and self.ownership in RECEIVABLE
        )

    def is_as_released(self, offer: DiskOffer) -> bool:
        """Tell whether the image is, provably, what was released to the source; before it is marked. May sleep."""
        if self.image is None or self.io_error is not None or not self._is_base_proved:
            return False
        return is_as_released(
            self.epoch_file.record,
            image_id=offer.image_id,
            epoch=offer.epoch,
            session=offer.since,
            stamp=stamp_of(self.image.stat()),
        )

    def stamp(self) -> str:
        """Return what the image is like, which nobody here writes any more (`SourceDisk.stamp`). May sleep."""
        return "" if self.image is None else settled_stamp(self.image.stat)

    def open_journal(self) -> ReceiptJournal:
        """Open the journal of what is received (`IncomingDisk.open_journal`)."""
        assert self.disk is not None
        return open_journal(self.name, self._journal_path, self.disk.size)

    def taken(self, session: str) -> None:
        """Take note that the disk is ours, before guests may write it: from here on it differs from the one given."""
        record = self.epoch_file.record
        if self.dirty_file is not None and record is not None:
            base = MapBase(image_id=record.image_id, epoch=record.epoch, session=session)
            self.dirty_file.begin(Since.OWNED, base)
        try:
            self._journal_path.unlink(missing_ok=True)
        except OSError as exc:
            log.warning("a journal is left behind", path=str(self._journal_path), reason=exc.strerror)

    @property
    def interrupted_session(self) -> str | None:
        """The migration since whose beginning it is known what guests wrote; None where it is not."""
        record = self.epoch_file.record
        base = None if self.dirty_file is None else self.dirty_file.base(Since.SESSION)
        if record is None or base is None or (base.image_id, base.epoch) != (record.image_id, record.epoch):
            return None
        return base.session

    def open_created(self) -> int:
        """Return the size of the image, opening one that was created since the daemon started. May sleep.

        Raises:
            PeerRefusedError: there is none.
            ConfigError: it cannot be opened.
        """
        if self.disk is None:
            if not _exists(self.path):
                raise PeerRefusedError(
                    f"disk '{self.name}' has no image, and QEMU's stream does not tell the size of one: create it with"
                    f" `truncate -s SIZE {self.path}`, as large as the disk in QEMU, and migrate again"
                )
            self._open(Gate.READ_ONLY)
        assert self.disk is not None
        self.export.disk = self.disk
        return self.disk.size

    def receive(self, offer: DiskOffer, session: str, peer: str) -> TrackedDisk:
        """Make ready for the bytes of an offer that was checked: create the image if need be, mark it `incoming`.

        The mark is durable when this returns, before the first byte is written. May sleep.

        Raises:
            ConfigError: the image cannot be created or opened.
            StateError: the epoch file cannot be written.
        """
        record = EpochRecord(
            state=Ownership.INCOMING, image_id=offer.image_id, epoch=offer.epoch + 1, session=session, peer=peer
        )
        self.epoch_file.write(record)
        self.end_loan()
        if self.disk is None:
            create_image(self.path, offer.size)
            self._open(Gate.READ_ONLY)
        assert self.disk is not None
        self.export.disk = self.disk
        return self.disk

    def close(self) -> None:
        """Close the image; idempotent."""
        if self.dirty_file is not None:
            self.dirty_file.close(is_synced=self._is_synced())
            self.dirty_file = None
        for loan in (*self._past_loans, *((self.loan,) if self.loan is not None else ())):
            loan.close()
        if self.disk is not None:
            self.disk.close()

    def _is_synced(self) -> bool:
        try:
            assert self.disk is not None
            self.disk.image.flush()
        except DiskError:
            return False
        return True


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()
