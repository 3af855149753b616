"""SourceSetup: what goes before the passes on each connection, and what is known when one is lost.

    shake_hands          HELLO, WELCOME
    find_what_to_send    the tracker in line with what the destination has: nothing, or what it says
                         (`fusemig.migration.resume`, `fusemig.migration.delta`)
    note_lost            what was sent and may be lost

From the first connection on the tracker knows what the destination lacks, whatever becomes of the migration:
`resume_point` is where another one goes on.
"""

from __future__ import annotations

import struct
import uuid
from typing import TYPE_CHECKING

import structlog

from fusemig.core.units import CHUNK_SIZE
from fusemig.disk.dirty_map import MapBase, Since
from fusemig.errors import AuthenticationError, MigrationError, PeerBusyError, PeerRefusedError, RemoteProtocolError
from fusemig.migration.delta_offers import DeltaOffers
from fusemig.migration.link import HANDSHAKE_DEADLINE_S
from fusemig.migration.resume import (
    ContentReconciliation,
    LivingReconciliation,
    MappedReconciliation,
    ResumePoint,
)
from fusemig.wire import native

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fusemig.errors import FusemigError
    from fusemig.migration.commit import SourceDisk
    from fusemig.migration.disk_group import DiskGroup
    from fusemig.migration.link import NativeLink, Offload
    from fusemig.migration.reader import OutgoingDisk
    from fusemig.migration.resume import Reconciliation
    from fusemig.migration.sender import PassSender
    from fusemig.migration.stats import MigrationParameters
    from fusemig.records.epoch import EpochRecord

log = structlog.get_logger(__name__)


class SourceSetup:
    """Of one migration, over all its connections; of the migration's own task."""

    def __init__(
        self,
        session: str,
        disks: DiskGroup,
        parameters: MigrationParameters,
        offload: Offload,
        resume: ResumePoint | None = None,
    ) -> None:
        """Prepare to move ``disks``.

        Args:
            session: of the migration; that of ``resume``, if there is one.
            disks: tracked, or not.
            parameters: may be changed meanwhile.
            offload: runs calls that may sleep.
            resume: where an earlier migration of the same disks was interrupted; None: there was none.
        """
        self._session = session
        self._disks = disks
        self._parameters = parameters
        self._offload = offload
        self._resume = resume
        if resume is not None:
            disks.tracked = resume.disks
        self._is_packed = parameters.compression_level is not None
        self._delta = DeltaOffers(disks.lent, parameters.incremental, offload)
        self._log = log.bind(migration=session[:8])
        self._attempt = 0
        self._is_agreed = False
        """Whether the tracker and the digests are what the destination has, but for what is under way."""
        self.can_resume = False
        """Whether the destination keeps account of what it has."""
        self.can_lend = False
        """Whether it knows post-copy."""
        self.kept_bytes = 0
        """What it had already and need not be sent."""

    @property
    def is_resumed(self) -> bool:
        """Whether the next connection goes on with something."""
        return self._resume is not None

    @property
    def resume_point(self) -> ResumePoint | None:
        """Where it was interrupted; None: nobody could go on from there."""
        return self._resume if self._resume is not None and self._resume.disks else None

    # HELLO, WELCOME

    async def shake_hands(self, link: NativeLink, records: Sequence[EpochRecord]) -> native.Welcome:
        """Say what is to be moved, and return the destination's answer.

        Raises:
            PeerRefusedError: it refused.
            PeerBusyError: it may not at another time.
            RemoteProtocolError: its answer is none.
        """
        self._attempt = uuid.uuid4().int >> 65
        self._is_agreed = False
        offers = [
            self._delta.offer(
                lent,
                record,
                is_resumed=self.is_resumed,
                allocated_bytes=await self._offload(lent.count_allocated),
            )
            for lent, record in zip(self._disks.lent, records, strict=True)
        ]
        features = [native.RESUME, native.POSTCOPY]
        hello = native.Hello(
            native.VERSION, self._session, CHUNK_SIZE, offers, features, self._attempt, self._parameters.streams
        )
        await link.send([native.PREFACE, native.encode_message(hello)])
        answer = await link.receive(HANDSHAKE_DEADLINE_S)
        if isinstance(answer, native.Refuse):
            kind: type[FusemigError] = PeerBusyError if answer.is_busy else PeerRefusedError
            if answer.kind == AuthenticationError.kind:
                kind = AuthenticationError
            raise kind(f"{link.peer} refused: {answer.reason}")
        if not isinstance(answer, native.Welcome):
            raise RemoteProtocolError(f"{link.peer} sent {type(answer).__name__} where an answer to HELLO was due")
        self._delta.check(link.peer, offers, answer)
        if self._is_packed and native.ZSTD not in answer.features:
            raise PeerRefusedError(
                f"{link.peer} cannot unpack what is compressed: upgrade fusemig there, or migrate without --compress"
            )
        return answer

    # What is to be sent

    async def find_what_to_send(
        self, link: NativeLink, welcome: native.Welcome, records: Sequence[EpochRecord]
    ) -> bool:
        """Bring the tracker in line with what the destination has; return whether that may be something.

        Raises:
            MigrationError: it cannot go on with what was interrupted, or a disk cannot be read.
            FusemigError: it is gone, or what it says is wrong.
        """
        self.can_resume = native.RESUME in welcome.features
        self.can_lend = native.POSTCOPY in welcome.features
        resume, resumption = self._resume, welcome.resumption
        if resume is not None and resumption is native.Resumption.NOTHING:
            raise MigrationError(
                f"{link.peer} cannot go on with an interrupted migration: migrate without --resume, to send everything"
            )
        has_lived = resume is not None and bool(resume.disks) and resumption is native.Resumption.JOURNAL
        are_thin = [disk.is_thin for disk in self._disks.tracked]
        if has_lived and are_thin != (welcome.thin or [False] * len(are_thin)):
            raise MigrationError(f"{link.peer} has other bases than before: migrate without --resume")
        if not has_lived:
            self._disks.begin_anew()
            if resume is not None:
                self._resume = resume = ResumePoint(self._session)  # until it is known again what is allocated
            if resumption is not native.Resumption.JOURNAL:
                await self._begin_maps(records)
            elif not self._have_maps(records):
                raise MigrationError("there is no map of what was written since: this is a bug, please report it")
            await self._disks.start_tracking([at for at, is_thin in enumerate(welcome.thin) if is_thin])
            if resume is not None:
                resume.disks = self._disks.tracked
        if resume is not None:
            await self._reconcile(link, welcome, resume, has_lived=has_lived)
            is_mapped = not has_lived and resumption is native.Resumption.JOURNAL
            if is_mapped and not self._have_maps(records):
                # It may have lacked a write when it was asked; one that counts now did not.
                raise MigrationError("the map of what was written was lost just now: migrate with --resume again")
        elif welcome.deltas:
            pending_bytes = self._disks.pending_bytes
            await self._delta.run(link, self._disks.tracked, welcome.deltas)
            self.kept_bytes += max(0, pending_bytes - self._disks.pending_bytes)
        # From here on the tracker and the digests know, whatever becomes of this connection.
        self._resume = ResumePoint(self._session, self._disks.tracked)
        self._is_agreed = True
        return resume is not None or bool(welcome.deltas)

    def _have_maps(self, records: Sequence[EpochRecord]) -> bool:
        """Tell whether every disk has a map of what was written since this session began."""
        return all(
            lent.dirty_file is not None and lent.dirty_file.base(Since.SESSION) == self._map_base(record)
            for lent, record in zip(self._disks.lent, records, strict=True)
        )

    async def _begin_maps(self, records: Sequence[EpochRecord]) -> None:
        """Have it kept from now on what guests write, in case this daemon does not live to the end."""
        for lent, record in zip(self._disks.lent, records, strict=True):
            if lent.dirty_file is not None:
                await self._offload(lent.dirty_file.begin, Since.SESSION, self._map_base(record))

    def _map_base(self, record: EpochRecord) -> MapBase:
        return MapBase(image_id=record.image_id, epoch=record.epoch, session=self._session)

    async def _reconcile(
        self, link: NativeLink, welcome: native.Welcome, resume: ResumePoint, *, has_lived: bool
    ) -> None:
        """Hear what the destination has, and take as sent what of it is right."""
        disks = self._disks.tracked
        if has_lived:
            if len(welcome.covered) != len(disks):
                raise RemoteProtocolError(f"{link.peer} covers {len(welcome.covered)} disks of {len(disks)}")
            resume.land(welcome.covered)
        walks = [
            _walk(disk, lent, welcome, resume, has_lived=has_lived)
            for disk, lent in zip(disks, self._disks.lent, strict=True)
        ]
        current = 0
        while True:
            event = await link.receive()
            if isinstance(event, native.Abort):
                raise link.aborted_error(event)
            if not isinstance(event, native.Have):
                raise RemoteProtocolError(f"{link.peer} sent {type(event).__name__} where HAVE was due")
            if event.disk == -1:
                break
            if not current <= event.disk < len(walks):
                raise RemoteProtocolError(f"{link.peer} has chunks of disk {event.disk}; there are {len(walks)}")
            current = event.disk
            walk = walks[current]
            await self._offload(walk.on_have, event, welcome.resumption)
            if isinstance(walk, ContentReconciliation):
                await link.send_message(
                    native.Kept(current, event.first, struct.pack(f"<{len(walk.kept)}Q", *walk.kept))
                )
        for walk in walks:
            await self._offload(walk.end)
        kept = sum(walk.n_kept for walk in walks)
        self.kept_bytes += kept * CHUNK_SIZE
        self._log.info(
            "going on", how=welcome.resumption.value, kept_chunks=kept, pending_bytes=self._disks.pending_bytes
        )

    # A connection that is over

    def note_lost(self, sender: PassSender) -> None:
        """What ``sender`` sent and the destination did not say to be durable may have been lost."""
        if not self._is_agreed:
            return
        assert self._resume is not None
        self._resume.is_doubt_counted = sender.is_journaled
        self._resume.in_flight = [(self._attempt, frame) for frame in sender.unacknowledged]
        self._resume.doubtful = [*((self._attempt, frame) for frame in sender.undurable), *self._resume.in_flight]
        self._is_agreed = False


def _walk(
    disk: OutgoingDisk, lent: SourceDisk, welcome: native.Welcome, resume: ResumePoint, *, has_lived: bool
) -> Reconciliation:
    if welcome.resumption is native.Resumption.COMPARE:
        return ContentReconciliation(disk)
    if not has_lived:
        assert lent.dirty_file is not None
        return MappedReconciliation(disk, lent.dirty_file.written(Since.SESSION))
    covered = welcome.covered[disk.index]
    return LivingReconciliation(disk, resume.doubtful_chunks(disk, covered) if resume.is_doubt_counted else None)
