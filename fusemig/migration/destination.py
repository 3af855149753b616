"""DestinationMigration: receives disks over the native wire, from HELLO to TAKEN.

    stream ─> FrameReceiver (slices on a worker thread) ─> images
                  └ control messages ─> this task ─> ACK, SYNCED, PREPARED, TAKEN

One task does everything, so what follows a frame on the wire finds it in the image. Until TAKEN the gates stay
read-only and the epoch files say `incoming`; a migration that fails leaves them so, and the images wait for the next
one. What was received is journaled every few seconds and at the end, so that a source can go on with it: see
`fusemig.migration.receipt`. From the moment `prepared` is durable only the source's word ends the wait: its ABORT, its
COMMIT, or its next HELLO, which a source that said COMMIT cannot send. A source that begins with ASK instead of HELLO
sends no disks; it is answered by `fusemig.migration.witness`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Final

import trio

from fusemig.core.handoff import DestinationEvent, DestinationHandoff, DestinationState
from fusemig.core.phase import MigrationPhase
from fusemig.core.units import CHUNK_SIZE, n_blocks
from fusemig.disk.overlay import OverlayDisk
from fusemig.errors import (
    ConnectionLostError,
    DiskError,
    FusemigError,
    MigrationError,
    PeerBusyError,
    PeerRefusedError,
    RemoteProtocolError,
)
from fusemig.failpoint import reach
from fusemig.migration.borrow import Borrowing
from fusemig.migration.delta import DestinationDelta
from fusemig.migration.incoming import LINGER_S, IncomingMigration
from fusemig.migration.link import HANDSHAKE_DEADLINE_S, BufferPool, NativeLink, Need
from fusemig.migration.probe import answer_probes
from fusemig.migration.receipt import Receipt
from fusemig.migration.receiver import FrameReceiver
from fusemig.migration.witness import Witness
from fusemig.migration.writer import FrameWriter
from fusemig.records.epoch import Ownership
from fusemig.tasks import run_beside
from fusemig.wire import native

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusemig.migration.incoming import IncomingHost, IncomingStatistics
    from fusemig.migration.joining import Gathering
    from fusemig.migration.link import Offload
    from fusemig.migration.writer import IncomingDisk
    from fusemig.net.transport import ByteStream


PROOF_OF_LIFE_S: Final = 5.0
"""How often a destination to which bytes trickle says that it is there, in seconds."""


class DestinationMigration(IncomingMigration):
    """One incoming migration over the native wire."""

    wire: ClassVar[str] = "native"

    def __init__(
        self,
        stream: ByteStream,
        host: IncomingHost,
        offload: Offload,
        on_phase: Callable[[MigrationPhase], None] = lambda _phase: None,
        head: bytes = b"",
        refusal: str = "",
        on_joined: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare as `IncomingMigration` does.

        Args:
            stream: a connection that somebody made to us.
            host: lends the disks.
            offload: runs calls that may sleep.
            on_phase: called at once at each change of phase.
            head: what was read of the stream already, shorter than the preface.
            refusal: why whatever is offered must be refused, if it must.
            on_joined: called when the connection has become another migration's.
        """
        super().__init__(stream, host, offload, on_phase)
        decoder = native.Decoder(native.FROM_SOURCE, preface=True)
        decoder.feed(head)
        self._pool = BufferPool()
        self._link = NativeLink(stream, decoder, self._pool)
        self._refusal = refusal
        self._on_joined = on_joined
        self._gathering: Gathering | None = None
        self._handoff = DestinationHandoff()
        self._progress = native.Progress(0, 0, 0)
        self._receipt: Receipt | None = None
        self._first: native.Event | None = None
        self._to_fetch: list[list[tuple[int, int]]] = []
        """For each disk the runs of blocks that a MISSING told of; empty unless one came."""
        self._borrowing: Borrowing | None = None

    async def run(self) -> None:
        """Receive (`IncomingMigration.run`), or answer a source that asks who owns its disks or how fast the way is.

        A question, or a loan of what has moved on, leaves `phase` at NONE, or at COMPLETED if disks were taken over.
        """
        try:
            self._first = await self._first_message()
            if isinstance(self._first, native.Ask) and not self._refusal:
                self.is_question = True
                self.session = self._first.session
                await Witness(self._link, self._host, self._offload, self._on_taken).answer(self._first)
                return
            if isinstance(self._first, native.Probe) and not self._refusal:
                self.is_question = True
                await answer_probes(self._link)
                return
            if isinstance(self._first, native.Lend) and not self._refusal:
                await self._borrow(self._first)
                return
            if isinstance(self._first, native.Join) and not self._refusal:
                await self._join(self._first)
                return
        except FusemigError as exc:
            self.error = exc
            return
        try:
            await super().run()
        finally:
            self._pool.clear()  # the daemon keeps what is over, and need not keep its buffers

    async def _first_message(self) -> native.Event:
        with trio.move_on_after(HANDSHAKE_DEADLINE_S):
            return await self._link.receive(HANDSHAKE_DEADLINE_S)
        raise RemoteProtocolError(f"{self.peer} did not say hello within {HANDSHAKE_DEADLINE_S:g} s")

    async def _join(self, join: native.Join) -> None:
        """Be a further connection of another migration, until that needs it no more.

        Raises:
            PeerRefusedError: none waits for it.
            ConnectionLostError: the source is gone.
        """
        try:
            gathering = self._host.gatherings.find(join)
            gathering.join(join, self._link.stream)
        except PeerRefusedError as exc:
            await self._refuse(str(exc))
            raise
        self.is_question = True
        self._on_joined()
        try:
            await self._link.send_message(native.Joined())
        finally:
            with trio.CancelScope(shield=True):  # a thread may be inside the stream, which is closed after this
                await gathering.over.wait()

    async def _borrow(self, lend: native.Lend) -> None:
        """Fetch what is missing of disks that are ours (`fusemig.migration.lend`).

        Raises:
            FusemigError: it was refused, or ended early; what is missing is fetched when the source comes again.
        """
        if lend.version != native.VERSION:
            self._refusal = f"wire version {lend.version} offered, {native.VERSION} spoken here; upgrade one side"
            await self._refuse(self._refusal)
            raise PeerRefusedError(self._refusal)
        try:
            with trio.CancelScope() as scope:
                loans = self._host.loans(lend.session, lend.disks, scope)
                self.session, self.is_loan = lend.session, True
                if not loans:
                    self.is_question = True  # nothing of it is a migration here any more, or to be told as one
                    await self._link.send_message(native.Whole())
                    return
                self._log = self._log.bind(migration=self.session[:8])
                self._enter(MigrationPhase.POSTCOPY)
                self._borrowing = Borrowing(self._link, loans, self._pool, self._offload, lend.hot, lend.max_runs)
                await self._borrowing.run()
                self._enter(MigrationPhase.COMPLETED)
        except PeerRefusedError as exc:
            if not self.is_loan:
                await self._refuse(str(exc))
            raise
        except DiskError as exc:
            await self._say_aborted(exc)
            raise

    def _on_taken(self) -> None:
        self._enter(MigrationPhase.COMPLETED)

    async def _meet(self) -> list[IncomingDisk]:
        if isinstance(self._first, native.Hello):
            return await self._claim(self._first)
        if isinstance(self._first, native.Ask | native.Lend | native.Probe | native.Join):
            await self._refuse(self._refusal)
            raise PeerRefusedError(self._refusal)
        raise RemoteProtocolError(f"{self.peer} began with {type(self._first).__name__}")

    async def _refuse(self, reason: str, *, is_busy: bool = False) -> None:
        await self._link.send_message(native.Refuse(reason, is_busy=is_busy))
        await self._link.linger(LINGER_S)

    async def _claim(self, hello: native.Hello) -> list[IncomingDisk]:
        try:
            if self._refusal:
                raise PeerRefusedError(self._refusal)
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
            await self._refuse(str(exc), is_busy=isinstance(exc, PeerBusyError))
            raise
        self.session = hello.session
        self._receipt = Receipt(disks, hello, self._offload)
        self._gathering = self._host.gatherings.begin(self.session, max(1, min(hello.streams, native.MAX_STREAMS)))
        return disks

    async def _run_claimed(self) -> None:
        assert self._receipt is not None
        assert self._gathering is not None
        try:
            await super()._run_claimed()
        finally:
            self._host.gatherings.end(self._gathering)
            self._receipt.close()

    async def _receive(self) -> None:
        assert self._receipt is not None
        receive = partial(self._receive_and_hear_out, self._receipt)
        await run_beside(receive, self._receipt.keep, stop=self._receipt.stop)  # what was handed over is journaled

    async def _receive_and_hear_out(self, receipt: Receipt) -> None:
        """Receive; where the connection is lost and the source had said why it ends, that is the error."""
        try:
            await self._receive_all(receipt)
        except ConnectionLostError:
            if (abort := self._link.last_word()) is None:
                raise
            await self._handle(abort)

    async def _receive_all(self, receipt: Receipt) -> None:
        assert self._gathering is not None
        await receipt.open()
        reach("before-welcome")
        delta = DestinationDelta(self._link, self.disks, receipt.hello.disks, self._offload)
        await self._lie_over_bases(receipt, delta)
        features = [native.POSTCOPY, *([native.RESUME] if receipt.is_kept else [])]
        await self._link.send_message(
            native.Welcome(
                native.VERSION,
                [*features, native.DELTA, native.THIN, native.ZSTD],
                receipt.resumption,
                receipt.covered,
                delta.deltas if delta.is_any else [],
                [disk.is_thin for disk in self.disks],
                self._gathering.n_streams,
                self._gathering.token if self._gathering.n_streams > 1 else "",
            )
        )
        await self._gathering.gather(self._link)
        await receipt.tell(self._link)
        if delta.is_any:
            await delta.run(partial(receipt.tell_contents, self._link))
        self._enter(MigrationPhase.BULK)
        receiver = FrameReceiver(self._link, FrameWriter(self.disks, self._pool))
        applied = 0
        said_at = trio.current_time()
        while True:
            try:
                event = await self._offload(receiver.run_slice)
            finally:
                receipt.applied = receiver.applied  # also of a slice that the end of the connection cut short
            if receiver.applied > applied:
                applied = receiver.applied
                if self._handoff.state is not DestinationState.INCOMING:
                    raise RemoteProtocolError(f"{self.peer} sent data after FINAL")
            if applied > receiver.acknowledged:
                receiver.acknowledged = applied
                await self._link.send([native.encode_ack(applied)])
            if self._handoff.state is DestinationState.INCOMING:
                await receipt.go_on(self._link)
            if event is Need.STREAM:
                await self._link.wait_readable()
                if trio.current_time() - said_at > PROOF_OF_LIFE_S:
                    # On a slow link a single frame may be longer under way than a silence is taken for an end.
                    said_at = trio.current_time()
                    await self._link.send([native.encode_ack(applied)])
            elif isinstance(event, native.Progress):
                await self._note_progress(event, applied)
            elif event is not Need.SLICE and await self._handle(event):
                return

    async def _lie_over_bases(self, receipt: Receipt, delta: DestinationDelta) -> None:
        """Decide which disks' bases are shared; an overlay that begins anew is its base, with nothing of its own."""
        for disk, offer, known in zip(self.disks, receipt.hello.disks, delta.deltas, strict=True):
            image = disk.disk.image
            # That it is the same one was seen when the disk was claimed.
            if offer.base is None or not isinstance(image, OverlayDisk):
                continue
            disk.is_thin = True
            if not offer.is_resumed and known is native.Delta.NOTHING:
                await self._offload(image.forget)

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
            case native.Missing():
                self._note_missing(event)
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

    def _note_missing(self, missing: native.Missing) -> None:
        self._to_fetch = self._to_fetch or [[] for _ in self.disks]
        if not 0 <= missing.disk < len(self.disks) or len(missing.runs) > native.MAX_RUNS:
            raise RemoteProtocolError(f"{self.peer} sent {len(missing.runs)} missing runs of disk {missing.disk}")
        known, end = self._to_fetch[missing.disk], n_blocks(self.disks[missing.disk].disk.size)
        for first, stop in missing.runs:
            if not (known[-1][1] if known else 0) <= first < stop <= end:
                raise RemoteProtocolError(f"{self.peer} sent missing blocks {first} to {stop} out of order")
            known.append((first, stop))
        if len(known) > native.MAX_DISK_RUNS:
            raise RemoteProtocolError(f"{self.peer} sent more than {native.MAX_DISK_RUNS} missing runs of a disk")

    async def _borrow_missing(self) -> None:
        """Have it durable what is to be fetched, before it is said that we are prepared."""
        self.is_loan = True
        for disk, runs in zip(self.disks, self._to_fetch, strict=True):
            await self._offload(disk.borrow, runs)

    async def _prepare(self, final: native.FinalProofs) -> None:
        """Answer FINAL: prove that everything is here, durably; unequal digests are answered too, and bind nobody."""
        for index, disk in enumerate(self.disks):
            if missing := disk.missing(self._to_fetch[index] if self._to_fetch else ()):
                raise MigrationError(f"incomplete: {missing}")
        await self._flush()
        await self._drop_pages()
        proofs = [
            native.DiskProof(disk.digest.value, 0 if record is None else record.epoch)
            for disk in self.disks
            for record in [disk.epoch_file.record]
        ]
        self._progress = native.Progress(self._progress.pass_number, 0, self._progress.total_bytes)
        if proofs == final.disks:
            reach("before-prepared")
            if self._to_fetch:
                await self._borrow_missing()
            await self._write_records(Ownership.PREPARED)
            self._handoff.on(DestinationEvent.PREPARED_DURABLE)
            reach("after-prepared")
            self._enter(MigrationPhase.FROZEN)
        await self._link.send_message(native.PreparedProofs(proofs))
        reach("after-prepared-sent")

    async def _take_over(self) -> None:
        if self._handoff.state is not DestinationState.PREPARED:
            raise RemoteProtocolError(f"{self.peer} sent COMMIT to a destination that is {self._handoff.state.value}")
        reach("after-commit-received")
        with trio.CancelScope(shield=True):
            await self._write_records(Ownership.OWNER)
            self._handoff.on(DestinationEvent.OWNER_DURABLE)
            reach("after-owner")
            for disk in self.disks:
                await self._offload(disk.on_taken, self.session)
            self._open_gates()
            with trio.move_on_after(1):
                try:
                    await self._link.send_message(native.Taken())
                    reach("after-taken-sent")
                except FusemigError as exc:
                    # The disks are ours whether the source hears it or not; it asks when it reconnects.
                    self._log.warning("the source could not be told of the take-over", reason=str(exc))

    async def _forget_prepared(self) -> None:
        """The source goes on with its disks: a prepared image is an incoming one again."""
        if self._handoff.state is DestinationState.PREPARED:
            await self._write_records(Ownership.INCOMING)
            if self.is_loan:
                for disk in self.disks:
                    await self._offload(disk.end_loan)
        self._handoff.on(DestinationEvent.FAILURE)

    async def _say_failed(self, reason: FusemigError) -> None:
        await self._say_aborted(reason)
        if self._receipt is not None:
            with trio.CancelScope(shield=True):
                await self._receipt.finish()

    async def _say_aborted(self, reason: FusemigError) -> None:
        if self._handoff.state is DestinationState.PREPARED:
            return  # the source decides; it will hear of us when it asks
        with trio.CancelScope(shield=True, deadline=trio.current_time() + LINGER_S):
            try:
                is_damaged = isinstance(reason, RemoteProtocolError | ConnectionLostError)  # of one of several streams
                await self._link.send_message(native.Abort(str(reason), is_damaged=is_damaged))
                await self._link.linger(LINGER_S)
            except FusemigError as exc:
                self._log.info("the source could not be told", reason=str(exc))

    def statistics(self) -> IncomingStatistics:
        """Return what is known at this moment."""
        if self._borrowing is not None:
            return replace(
                self._statistics(0, self._borrowing.missing_bytes, self._borrowing.total_bytes),
                received_bytes=self._borrowing.received_bytes,
            )
        return self._statistics(self._progress.pass_number, self._progress.pending_bytes, self._progress.total_bytes)
