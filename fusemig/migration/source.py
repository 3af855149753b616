"""SourceMigration: moves disks away over the native wire, while guests write them.

    handshake             HELLO, WELCOME
    passes                PassSender in slices on a worker thread ─> wire
                          receiver <─ acknowledgements     ticker: proof of life
    hand-off              OutgoingHandoff: FINAL, PREPARED, COMMIT, TAKEN

The order of things is `fusemig.migration.outgoing`'s. When a migration fails, the tracker still knows what the
destination does not hold.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar, Final

import trio

from fusemig.errors import (
    AuthenticationError,
    FusemigError,
    MigrationError,
    PeerRefusedError,
    RemoteProtocolError,
)
from fusemig.migration.commit import OutgoingHandoff
from fusemig.migration.link import HANDSHAKE_DEADLINE_S, SLICE_BYTES, BufferPool, NativeLink, Need
from fusemig.migration.outgoing import TICK_S, OutgoingMigration
from fusemig.migration.reader import PassReader
from fusemig.migration.sender import WINDOW_BYTES, PassSender
from fusemig.migration.stats import WindowStatistics
from fusemig.phase import MigrationPhase
from fusemig.units import CHUNK_SIZE
from fusemig.wire import native

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from fusemig.epoch import EpochRecord
    from fusemig.migration.commit import SourceDisk
    from fusemig.migration.link import Offload
    from fusemig.migration.stats import MigrationParameters
    from fusemig.transport import ByteStream

PROGRESS_INTERVAL_S: Final = 1.0


class SourceMigration(OutgoingMigration):
    """One outgoing migration over the native wire."""

    wire: ClassVar[str] = "native"

    def __init__(
        self,
        disks: Sequence[SourceDisk],
        connect: Callable[[], Awaitable[ByteStream]],
        parameters: MigrationParameters,
        offload: Offload,
        on_phase: Callable[[MigrationPhase], None] = lambda _phase: None,
        on_pass: Callable[[int], None] = lambda _number: None,
        count_requests: Callable[[], int] = lambda: 0,
    ) -> None:
        """Prepare as `OutgoingMigration` does.

        Args:
            disks: in the order of the bulk phase.
            connect: makes the connection to the destination.
            parameters: may be changed by the caller while `run` runs.
            offload: runs calls that may sleep.
            on_phase: called at once at each change of phase.
            on_pass: called at the start of each pass with its number, from 1.
            count_requests: tells how many requests guests have ever made; the bulk phase makes room for them.
        """
        super().__init__(disks, connect, parameters, offload, on_phase, on_pass)
        self._handoff: OutgoingHandoff = OutgoingHandoff(disks, self.session, parameters, offload)
        self._pool = BufferPool()
        self._sender = PassSender(self._pool, count_requests)
        # Set by the receiver:
        self._progress_made = trio.Event()
        self._synced = trio.Event()

    async def _migrate(self) -> None:
        records = await self._handoff.own_records()
        stream = await self._connect()
        self._peer = stream.peer
        try:
            decoder = native.Decoder(native.FROM_DESTINATION, preface=False)
            link = self._link = NativeLink(stream, decoder, self._pool)
            await self._handshake(link, records)
            try:
                await self._start_tracking()
                self._reader = PassReader(self._disks, self._pool)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._guard, self._receive, link)
                    nursery.start_soon(self._guard, self._tick, link)
                    await self._guard(self._send_all)
                    nursery.cancel_scope.cancel()
                await self._hand_off(link)
            except BaseException as exc:
                if self._handoff.may_thaw:
                    await self._handoff.call_off()
                    self._thaw()
                    await self.guest.fall_back()
                    await self._handoff.say_abort(link, self._reason(exc))
                raise
        finally:
            self._pool.clear()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await stream.aclose()

    async def _handshake(self, link: NativeLink, records: Sequence[EpochRecord]) -> None:
        offers = [
            native.DiskOffer(lent.disk.name, lent.disk.size, record.image_id, record.epoch)
            for lent, record in zip(self._lent, records, strict=True)
        ]
        hello = native.Hello(native.VERSION, self.session, CHUNK_SIZE, offers)
        await link.send([native.PREFACE, native.encode_message(hello)])
        answer = await link.receive(HANDSHAKE_DEADLINE_S)
        if isinstance(answer, native.Refuse):
            kind = AuthenticationError if answer.kind == AuthenticationError.kind else PeerRefusedError
            raise kind(f"{link.peer} refused: {answer.reason}")
        if not isinstance(answer, native.Welcome):
            raise RemoteProtocolError(f"{link.peer} sent {type(answer).__name__} where an answer to HELLO was due")

    # Passes

    async def _run_pass(self, *, is_limited: bool) -> None:
        """Send everything that is dirty once, and wait until it is acknowledged."""
        self._begin_pass()
        self._reader.begin_pass()
        link = self._link
        sender, need = self._sender, Need.SLICE
        is_bulk = self._machine.phase is MigrationPhase.BULK
        run_slice = partial(sender.run_slice, self._reader, link.stream, is_courteous=is_bulk)
        while need is not Need.NOTHING:
            if need is Need.ACKNOWLEDGEMENT:
                await self._wait_progress(lambda: sender.sent_bytes - sender.acknowledged_bytes < WINDOW_BYTES)
            self._limit.bytes_per_s = self._parameters.max_bandwidth if is_limited else 0
            if not sender.unacknowledged:
                self._busy_since = trio.current_time()
            wire_bytes = sender.wire_bytes
            async with link.sending, link.frame():
                need = await self._offload(run_slice, self._limit.step_bytes(SLICE_BYTES))
                while need is Need.STREAM:
                    await link.stream.wait_writable()
                    need = await self._offload(run_slice, 0)
            await trio.sleep(self._limit.delay_s(sender.wire_bytes - wire_bytes, trio.current_time()))
        if sender.unacknowledged:
            await self._say_progress(link)  # which has the destination acknowledge at once
        await self._wait_progress(lambda: not sender.unacknowledged)

    async def _wait_progress(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._progress_made = trio.Event()
            await self._progress_made.wait()

    async def _sync_ahead(self) -> None:
        await self._link.send_message(native.Sync())
        for disk in self._disks:
            await self._flush(disk)
        await self._synced.wait()

    # Background tasks

    async def _receive(self, link: NativeLink) -> None:
        while True:
            event = await link.receive()
            match event:
                case native.Ack():
                    self._acknowledge(event.sequence)
                case native.Synced():
                    self._synced.set()
                case native.Abort():
                    raise MigrationError(f"{link.peer} aborted the migration: {event.reason}")
                case _:
                    raise RemoteProtocolError(f"{link.peer} sent {type(event).__name__} during a pass")

    def _acknowledge(self, sequence: int) -> None:
        sender = self._sender
        if sequence > sender.last_sequence:
            raise RemoteProtocolError(f"frame {sequence} was acknowledged; the last one sent is {sender.last_sequence}")
        n_bytes = sender.acknowledge(sequence)
        if n_bytes:
            now = trio.current_time()
            self._send_rate.add(n_bytes, now)
            self._bandwidth.add(n_bytes, now - self._busy_since)
            self._busy_since = now
        self._progress_made.set()

    async def _tick(self, link: NativeLink) -> None:
        next_progress = trio.current_time()
        while True:
            now = trio.current_time()
            self._count_dirtied(now)
            if now >= next_progress:
                next_progress = now + PROGRESS_INTERVAL_S
                await self._say_progress(link)
            await trio.sleep(TICK_S)

    async def _say_progress(self, link: NativeLink) -> None:
        total = sum(disk.allocated_bytes for disk in self._disks)
        await link.send_message(native.Progress(self._pass_number, self._pending_bytes(), total))

    # Switchover

    async def _hand_off(self, link: NativeLink) -> None:
        """Run the two-phase commit; it is shielded from the moment when it cannot be called off."""
        digests = {disk.disk.name: disk.digest.value for disk in self._disks}
        with trio.move_on_at(self._freeze_ends_at) as scope:
            await self._handoff.prove(link, digests)
            if self.guest.is_moving:
                await self._load_guest(link)
        if scope.cancelled_caught:
            raise self._freeze_deadline_error()
        if self._is_cancel_requested:  # granted while PREPARED was on its way to this task
            raise self._cancelled_error()
        self._check_stores()
        with trio.CancelScope(shield=True):
            await self._handoff.commit(link, self._on_committed)
            self._taken_at = trio.current_time()
            self._thaw()  # answers the parked writes: EROFS
            await self.guest.run_there()
            await self._handoff.release(link)

    async def _load_guest(self, link: NativeLink) -> None:
        """Have the rest of the guest moved; a destination that goes away meanwhile ends it before COMMIT is said."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._guard, self._receive, link)
            await self._guard(self.guest.load)
            nursery.cancel_scope.cancel()
        await trio.lowlevel.checkpoint_if_cancelled()

    def _on_committed(self) -> None:
        self.guest.on_committed()
        self._enter(MigrationPhase.COMMITTED)

    def _reason(self, exc: BaseException) -> str:
        if self._is_cancel_requested:
            return "cancelled at the source"
        error = self._failure or exc
        return str(error) if isinstance(error, FusemigError) else "the source stopped"

    # Account

    @property
    def _wire_bytes(self) -> int:
        return self._sender.wire_bytes

    @property
    def _acknowledged_bytes(self) -> int:
        return self._sender.acknowledged_bytes

    def _window(self) -> WindowStatistics:
        sender = self._sender
        return WindowStatistics(
            submitted=int(sender.is_reading),
            read_done=sender.n_read_done,
            in_flight=len(sender.unacknowledged) - sender.n_read_done,
            transferred=sender.n_transferred,
        )
