"""DestinationMigration: receives disks over one connection, from HELLO to TAKEN.

    stream ─> FrameReceiver (slices on a worker thread) ─> images
                  └ control messages ─> this task ─> ACK, SYNCED, PREPARED, TAKEN

One task does everything, so what follows a frame on the wire finds it in the image. Until TAKEN the gates stay
read-only and the epoch files say `incoming`; a migration that fails leaves them so, and the images wait for the next
one. From the moment `prepared` is durable only the source's word ends the wait: its ABORT, its COMMIT, or its next
HELLO, which a source that said COMMIT cannot send.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import structlog
import trio

from fusemig.disk.tracked import Gate
from fusemig.epoch import EpochRecord, Ownership
from fusemig.errors import FusemigError, MigrationError, PeerRefusedError, RemoteProtocolError
from fusemig.handoff import DestinationEvent, DestinationHandoff, DestinationState
from fusemig.migration.link import HANDSHAKE_DEADLINE_S, BufferPool, NativeLink, Need
from fusemig.migration.receiver import FrameReceiver
from fusemig.migration.writer import FrameWriter
from fusemig.phase import MigrationPhase
from fusemig.units import CHUNK_SIZE
from fusemig.wire import native

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fusemig.migration.link import Offload
    from fusemig.migration.writer import IncomingDisk
    from fusemig.transport import ByteStream

_LINGER_S: Final = 2.0
"""How long a refused source is given to read why, in seconds."""

log = structlog.get_logger(__name__)


class IncomingHost(Protocol):
    """What a destination needs of its daemon."""

    async def claim(self, offers: Sequence[native.DiskOffer], session: str, peer: str) -> list[IncomingDisk]:
        """Reserve the offered disks and mark them `incoming`, durably.

        Raises:
            FusemigError: they cannot be received here; its text is the answer to the source.
        """

    def release(self, disks: Sequence[IncomingDisk]) -> None:
        """End the reservation; whoever owns the disks is written in their epoch files."""


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


class DestinationMigration:
    """One incoming migration, made for one connection."""

    def __init__(
        self,
        stream: ByteStream,
        host: IncomingHost,
        offload: Offload,
        on_phase: Callable[[MigrationPhase], None] = lambda _phase: None,
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
        self.session = ""
        self.peer = stream.peer
        self.disks: list[IncomingDisk] = []
        self._pool = BufferPool()
        self._link = NativeLink(stream, native.Decoder(native.FROM_SOURCE, preface=True), self._pool)
        self._host = host
        self._offload = offload
        self._on_phase = on_phase
        self._handoff = DestinationHandoff()
        self._progress = native.Progress(0, 0, 0)
        self._log = log

    async def run(self) -> None:
        """Receive; returns when the connection is done with, with the outcome in `phase` and `error`.

        A connection that never becomes a migration (garbage, refused) leaves `phase` at NONE and `error` set.
        """
        try:
            hello = await self._hello()
            self.disks = await self._claim(hello)
        except FusemigError as exc:
            self.error = exc
            return
        try:
            await self._run_claimed()
        finally:
            self._host.release(self.disks)

    async def _hello(self) -> native.Hello:
        with trio.move_on_after(HANDSHAKE_DEADLINE_S):
            event = await self._link.receive(HANDSHAKE_DEADLINE_S)
            if isinstance(event, native.Hello):
                return event
            raise RemoteProtocolError(f"{self.peer} began with {type(event).__name__}")
        raise RemoteProtocolError(f"{self.peer} did not say hello within {HANDSHAKE_DEADLINE_S:g} s")

    async def _claim(self, hello: native.Hello) -> list[IncomingDisk]:
        try:
            if hello.version != native.VERSION:
                raise PeerRefusedError(
                    f"wire version {hello.version} offered, {native.VERSION} spoken here; upgrade one side"
                )
            if hello.chunk_size != CHUNK_SIZE:
                raise PeerRefusedError(f"chunk size {hello.chunk_size} offered, {CHUNK_SIZE} used here")
            if not hello.disks:
                raise PeerRefusedError("no disk offered")
            disks = await self._host.claim(hello.disks, hello.session, self.peer)
        except FusemigError as exc:
            await self._link.send_message(native.Refuse(str(exc)))
            await self._link.linger(_LINGER_S)
            raise
        self.session = hello.session
        self._log = log.bind(migration=hello.session[:8])
        return disks

    async def _run_claimed(self) -> None:
        self._enter(MigrationPhase.SETUP)
        try:
            await self._receive_disks()
        except FusemigError as exc:
            self.error = exc
            await self._say_abort(exc)
            self._log.warning("incoming migration over", reason=str(exc))
            self._enter(MigrationPhase.FAILED)

    def _enter(self, phase: MigrationPhase) -> None:
        self.phase = phase
        self._log.info("incoming migration phase", phase=phase.value)
        self._on_phase(phase)

    async def _receive_disks(self) -> None:
        await self._link.send_message(native.Welcome(native.VERSION))
        self._enter(MigrationPhase.BULK)
        receiver = FrameReceiver(self._link, FrameWriter(self.disks, self._pool))
        applied = 0
        while True:
            event = await self._offload(receiver.run_slice)
            if receiver.applied > applied:
                applied = receiver.applied
                if self._handoff.state is not DestinationState.INCOMING:
                    raise RemoteProtocolError(f"{self.peer} sent data after FINAL")
            if applied > receiver.acknowledged:
                receiver.acknowledged = applied
                await self._link.send([native.encode_ack(applied)])
            if event is Need.STREAM:
                await self._link.wait_readable()
            elif isinstance(event, native.Progress):
                await self._note_progress(event, applied)
            elif event is not Need.SLICE and await self._handle(event):
                return

    async def _note_progress(self, progress: native.Progress, applied: int) -> None:
        """Show it, and prove that we are alive."""
        self._progress = progress
        if self.phase is MigrationPhase.BULK and progress.pass_number > 1:
            self._enter(MigrationPhase.DIRTY)
        await self._link.send([native.encode_ack(applied)])

    async def _handle(self, event: native.Event) -> bool:
        """Handle a control message; return whether the migration is complete."""
        match event:
            case native.Sync():
                await self._flush()
                await self._link.send_message(native.Synced())
            case native.FinalProofs():
                await self._prepare(event)
            case native.Commit():
                await self._take_over()
                return True
            case native.Abort():
                await self._forget_prepared()
                raise MigrationError(f"{self.peer} called the migration off: {event.reason}")
            case _:
                raise RemoteProtocolError(f"{self.peer} sent {type(event).__name__} out of order")
        return False

    async def _flush(self) -> None:
        for disk in self.disks:
            await self._offload(disk.disk.image.flush)

    async def _prepare(self, final: native.FinalProofs) -> None:
        """Answer FINAL: prove that everything is here, durably; unequal digests are answered too, and bind nobody."""
        for disk in self.disks:
            if missing := disk.missing():
                raise MigrationError(f"incomplete: {missing}")
        await self._flush()
        for disk in self.disks:
            # Before the disk is ours, so that a kernel that will not let go is a failure and not a doubt. What early
            # readers cache from here on is the final content.
            await disk.drop_pages()
        proofs = [
            native.DiskProof(disk.digest.value, 0 if record is None else record.epoch)
            for disk in self.disks
            for record in [disk.epoch_file.record]
        ]
        self._progress = native.Progress(self._progress.pass_number, 0, self._progress.total_bytes)
        if proofs == final.disks:
            await self._write_records(Ownership.PREPARED)
            self._handoff.on(DestinationEvent.PREPARED_DURABLE)
            self._enter(MigrationPhase.FROZEN)
        await self._link.send_message(native.PreparedProofs(proofs))

    async def _take_over(self) -> None:
        if self._handoff.state is not DestinationState.PREPARED:
            raise RemoteProtocolError(f"{self.peer} sent COMMIT to a destination that is {self._handoff.state.value}")
        with trio.CancelScope(shield=True):
            await self._write_records(Ownership.OWNER)
            self._handoff.on(DestinationEvent.OWNER_DURABLE)
            for disk in self.disks:
                disk.disk.set_gate(Gate.OPEN)
            self._enter(MigrationPhase.COMPLETED)
            with trio.move_on_after(1):
                try:
                    await self._link.send_message(native.Taken())
                except FusemigError as exc:
                    # The disks are ours whether the source hears it or not; it asks when it reconnects.
                    self._log.warning("the source could not be told of the take-over", reason=str(exc))

    async def _forget_prepared(self) -> None:
        """The source goes on with its disks: a prepared image is an incoming one again."""
        if self._handoff.state is DestinationState.PREPARED:
            await self._write_records(Ownership.INCOMING)
        self._handoff.on(DestinationEvent.FAILURE)

    async def _write_records(self, state: Ownership) -> None:
        for disk in self.disks:
            record = disk.epoch_file.record
            assert record is not None, "a claimed disk has an epoch record"
            new = EpochRecord(
                state=state, image_id=record.image_id, epoch=record.epoch, session=self.session, peer=self.peer
            )
            await self._offload(disk.epoch_file.write, new)

    async def _say_abort(self, reason: FusemigError) -> None:
        if self._handoff.state is DestinationState.PREPARED:
            return  # the source decides; it will hear of us when it asks
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _LINGER_S):
            try:
                await self._link.send_message(native.Abort(str(reason)))
                await self._link.linger(_LINGER_S)
            except FusemigError as exc:
                self._log.info("the source could not be told", reason=str(exc))

    def statistics(self) -> IncomingStatistics:
        """Return what is known at this moment."""
        return IncomingStatistics(
            phase=self.phase,
            session=self.session,
            peer=self.peer,
            pass_number=self._progress.pass_number,
            received_bytes=sum(disk.received_bytes for disk in self.disks),
            pending_bytes=0 if self.phase is MigrationPhase.COMPLETED else self._progress.pending_bytes,
            total_bytes=self._progress.total_bytes,
            error=None if self.error is None else str(self.error),
            error_kind=None if self.error is None else self.error.kind,
        )
