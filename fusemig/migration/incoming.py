"""IncomingMigration: what receiving disks is, whatever the wire; and what it needs of its daemon.

    run ── meet (claim the disks: `incoming` is durable)     a connection that fails here never becomes a migration
         └ receive ── ... ── own the disks                   from here on a failure is a failed migration

Until the disks are owned the gates stay read-only and the epoch files do not say `owner`; a migration that fails leaves
them so, and the images wait for the next one.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple, Protocol

import structlog

from fusemig.core.phase import MigrationPhase
from fusemig.core.units import format_size
from fusemig.disk.tracked import Gate
from fusemig.errors import DiskError, FusemigError, MigrationError
from fusemig.failpoint import reach
from fusemig.migration.witness import RecallHost
from fusemig.records.epoch import EpochRecord, Ownership

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import trio

    from fusemig.migration.fetch_plan import Loan
    from fusemig.migration.joining import Gatherings
    from fusemig.migration.link import Offload
    from fusemig.migration.writer import IncomingDisk
    from fusemig.net.transport import ByteStream
    from fusemig.wire.native import AskedDisk, DiskOffer

LINGER_S: Final = 2.0
"""How long a refused source is given to read why, in seconds."""

log = structlog.get_logger(__name__)


class AwaitedDisk(NamedTuple):
    """A disk that waits for a source, and whose size is known from its image."""

    name: str
    size: int
    has_base: bool = False
    """Whether it is an overlay: what a source leaves out may be its base's."""


class IncomingHost(RecallHost, Protocol):
    """What a destination needs of its daemon."""

    gatherings: Gatherings
    """Who waits for further connections."""

    async def awaited(self) -> list[AwaitedDisk]:
        """Return every disk that waits and is not busy, for a wire that does not say beforehand which disks come.

        Raises:
            FusemigError: there is none, or one has no image, whose size is then not known.
        """

    async def claim(self, offers: Sequence[DiskOffer], session: str, peer: str) -> list[IncomingDisk]:
        """Reserve the offered disks and mark them `incoming`, durably.

        Raises:
            FusemigError: they cannot be received here; its text is the answer to the source.
        """

    def release(self, disks: Sequence[IncomingDisk]) -> None:
        """End the reservation; whoever owns the disks is written in their epoch files."""

    def loans(self, session: str, lent: Sequence[AskedDisk], scope: trio.CancelScope) -> list[Loan]:
        """Return the disks of a migration that are to be fetched; whoever fetched them before is cancelled.

        None where all of them have moved on, which none does before all of it was here. ``scope`` is what a later call
        for the same migration cancels.

        Raises:
            PeerRefusedError: that migration did not bring one of these disks here.
        """


@dataclass(frozen=True)
class IncomingStatistics:
    """An incoming migration at one moment; bytes."""

    phase: MigrationPhase
    session: str
    peer: str
    pass_number: int
    received_bytes: int
    pending_bytes: int
    """What the source last said that it still has to send."""
    total_bytes: int
    error: str | None
    error_kind: str | None


class IncomingMigration(ABC):
    """One incoming migration, made for one connection."""

    wire: ClassVar[str]
    """The name of the stream format."""

    def __init__(
        self, stream: ByteStream, host: IncomingHost, offload: Offload, on_phase: Callable[[MigrationPhase], None]
    ) -> None:
        """Prepare to receive over ``stream``, which the caller closes.

        Args:
            stream: a connection that somebody made to us.
            host: lends the disks.
            offload: runs calls that may sleep.
            on_phase: called at once at each change of phase.
        """
        self.phase = MigrationPhase.NONE
        self.error: FusemigError | None = None
        self.is_question = False
        """Whether the source only asked who owns its disks."""
        self.is_loan = False
        """Whether the disks are ours before all of them is here."""
        self.session = ""
        self.peer = stream.peer
        self.disks: list[IncomingDisk] = []
        self._host = host
        self._offload = offload
        self._on_phase = on_phase
        self._log = log

    async def run(self) -> None:
        """Receive; returns when the connection is done with, with the outcome in `phase` and `error`.

        A connection that never becomes a migration (garbage, refused) leaves `phase` at NONE and `error` set.
        """
        try:
            self.disks = await self._meet()
        except FusemigError as exc:
            self.error = exc
            return
        self._log = self._log.bind(migration=self.session[:8])
        try:
            await self._run_claimed()
        finally:
            self._host.release(self.disks)

    async def _run_claimed(self) -> None:
        self._enter(MigrationPhase.SETUP)
        try:
            await self._receive()
        except FusemigError as exc:
            error = self._store_error(exc) if isinstance(exc, DiskError) else exc
            self.error = error
            await self._say_failed(error)
            self._log.warning("incoming migration over", reason=str(error))
            self._enter(MigrationPhase.FAILED)

    def _store_error(self, error: DiskError) -> MigrationError:
        """Say what somebody has to do about a store that failed here."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            to_come = format_size(self.statistics().pending_bytes)
            step = f"about {to_come} are still to come: make room at the destination, then migrate again"
        else:
            step = "mend the destination's store, then migrate again"
        return MigrationError(f"{error}; the disk stays at the source: {step}")

    @abstractmethod
    async def _meet(self) -> list[IncomingDisk]:
        """Hear what the source wants, set `session`, and claim the disks."""

    @abstractmethod
    async def _receive(self) -> None:
        """Receive the disks and take them over."""

    @abstractmethod
    async def _say_failed(self, reason: FusemigError) -> None:
        """Tell the source, if the wire can; does not raise."""

    @abstractmethod
    def statistics(self) -> IncomingStatistics:
        """Return what is known at this moment."""

    # The steps that every wire takes

    def _enter(self, phase: MigrationPhase) -> None:
        self.phase = phase
        self._log.info("incoming migration phase", phase=phase.value)
        self._on_phase(phase)

    async def _flush(self) -> None:
        for disk in self.disks:
            await self._offload(disk.disk.image.flush)
            await self._offload(disk.disk.image.check_in_place)

    async def _drop_pages(self) -> None:
        """Have early readers see the final content.

        Before the disks are ours, so that a kernel that will not let go is a failure and not a doubt. What is cached
        from here on is the final content.
        """
        for disk in self.disks:
            await disk.drop_pages()

    async def _write_records(self, state: Ownership) -> None:
        for disk in self.disks:
            record = disk.epoch_file.record
            assert record is not None, "a claimed disk has an epoch record"
            new = EpochRecord(
                state=state,
                image_id=record.image_id,
                epoch=record.epoch,
                session=self.session,
                peer=self.peer,
                is_loan=self.is_loan and state is not Ownership.INCOMING,
            )
            await self._offload(disk.epoch_file.write, new.taken() if state is Ownership.OWNER else new)
            reach(f"after-one-{state.value}")

    def _open_gates(self) -> None:
        for disk in self.disks:
            disk.disk.set_gate(Gate.OPEN)
        self._enter(MigrationPhase.POSTCOPY if self.is_loan else MigrationPhase.COMPLETED)

    def _statistics(self, pass_number: int, pending_bytes: int, total_bytes: int) -> IncomingStatistics:
        return IncomingStatistics(
            phase=self.phase,
            session=self.session,
            peer=self.peer,
            pass_number=pass_number,
            received_bytes=sum(disk.received_bytes for disk in self.disks),
            pending_bytes=0 if self.phase is MigrationPhase.COMPLETED else pending_bytes,
            total_bytes=total_bytes,
            error=None if self.error is None else str(self.error),
            error_kind=None if self.error is None else self.error.kind,
        )
