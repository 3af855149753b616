"""DeltaOffers: what a source offers a destination that may have an older copy, or the same base.

incremental   older copy                                  shared base
None          left out where both sides can prove it      only the overlay goes, where the destination is one too
True          ... and where contents compare equal        ... and it is refused where it is not
False         sent as if there were none                  sent with the overlay, as one whole disk
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusemig.disk.dirty_map import Since
from fusemig.disk.overlay import OverlayDisk
from fusemig.errors import MigrationError, PeerRefusedError, RemoteProtocolError
from fusemig.migration.delta import SourceDelta
from fusemig.wire import native

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fusemig.core.bitmap import ChunkBitmap
    from fusemig.migration.commit import SourceDisk
    from fusemig.migration.link import NativeLink, Offload
    from fusemig.migration.reader import OutgoingDisk
    from fusemig.records.epoch import EpochRecord


class DeltaOffers:
    """Of the disks of one migration."""

    def __init__(self, disks: Sequence[SourceDisk], incremental: bool | None, offload: Offload) -> None:
        """Offer ``disks`` as the module's table says."""
        self._lent = disks
        self._incremental = incremental
        self._offload = offload
        self._sinces: dict[str, str] = {}

    def offer(
        self, lent: SourceDisk, record: EpochRecord, *, is_resumed: bool, allocated_bytes: int
    ) -> native.DiskOffer:
        """Return what is said of a disk; what is gone on with has a journal, and is not compared with older copies."""
        disk, is_delta = lent.disk, self._incremental is not False and not is_resumed
        since = self._since(lent, record) if is_delta else ""
        self._sinces[disk.name] = since
        return native.DiskOffer(
            disk.name,
            disk.size,
            record.image_id,
            record.epoch,
            is_resumed,
            allocated_bytes,
            since,
            is_delta and self._incremental is True,
            self._base(lent),
        )

    def _since(self, lent: SourceDisk, record: EpochRecord) -> str:
        base = None if lent.dirty_file is None else lent.dirty_file.base(Since.OWNED)
        if base is None or (base.image_id, base.epoch) != (record.image_id, record.epoch):
            return ""
        return base.session

    def _base(self, lent: SourceDisk) -> native.SharedBase | None:
        image = lent.disk.image
        if self._incremental is False or not isinstance(image, OverlayDisk):
            return None
        return native.SharedBase(image.shared_base.size, image.shared_base.digest)

    def check(self, peer: str, offers: Sequence[native.DiskOffer], welcome: native.Welcome) -> None:
        """See whether an answer fits what was offered.

        Raises:
            PeerRefusedError: a base was to be shared, and the destination has none.
            RemoteProtocolError: it does not fit.
        """
        for what, size in (("deltas", len(welcome.deltas)), ("bases", len(welcome.thin))):
            if size not in (0, len(offers)):
                raise RemoteProtocolError(f"{peer} told of {size} {what} of {len(offers)} disks")
        for offer, is_thin in zip(offers, welcome.thin or [False] * len(offers), strict=True):
            if is_thin and offer.base is None:
                raise RemoteProtocolError(f"{peer} shares a base of disk '{offer.name}' that was not offered")
            if self._incremental and offer.base is not None and not is_thin:
                raise PeerRefusedError(
                    f"disk '{offer.name}' has no base at {peer}: serve it there with base=BASE, or migrate without "
                    "--incremental, which sends the base's data too"
                )

    async def run(self, link: NativeLink, disks: Sequence[OutgoingDisk], deltas: Sequence[native.Delta]) -> None:
        """Find out what of the disks need not be sent; raises as `SourceDelta.run` does."""
        written: list[ChunkBitmap | None] = [
            None
            if lent.dirty_file is None or not self._sinces[lent.disk.name]
            else lent.dirty_file.written(Since.OWNED)
            for lent in self._lent
        ]
        sinces = [self._sinces[lent.disk.name] for lent in self._lent]
        await SourceDelta(link, disks, deltas, self._offload).run(sinces, written, self._check_maps)

    def _check_maps(self) -> None:
        """See that the maps that were offered count still.

        One that cannot be written is dropped before the write that it would lack is admitted. So what was settled by a
        map that counts *afterwards* lacked no write.
        """
        for lent in self._lent:
            base = None if lent.dirty_file is None else lent.dirty_file.base(Since.OWNED)
            if self._sinces[lent.disk.name] and (base is None or base.session != self._sinces[lent.disk.name]):
                raise MigrationError(
                    f"the map of what was written to disk '{lent.disk.name}' was lost just now: migrate again"
                )
