"""QemuSource: moves disks to a QEMU that waits with `-incoming`, or to a fusemig, over QEMU's stream.

    passes       QemuSender in slices on a worker thread ─> stream
    hand-off     `handed-off` durable, then the end of the stream: who has that may run its guests

Nothing comes back on this wire. That the bytes were taken by a socket is all that is known of them, so from the
hand-off on the disks are read-only here, their epoch files say `handed-off`, and nothing but a person changes that. A
failure before the hand-off thaws, as on every wire: a stream without its end is of no use to anybody.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

import trio

from fusemig.core.convergence import RateLimit
from fusemig.core.phase import MigrationPhase
from fusemig.core.units import CHUNK_SIZE
from fusemig.errors import ConnectionLostError, FusemigError, InDoubtError, RemoteProtocolError
from fusemig.migration.commit import HandoffRecords
from fusemig.migration.link import IDLE_DEADLINE_S, SLICE_BYTES, Need, drop_sent
from fusemig.migration.outgoing import TICK_S, OutgoingMigration
from fusemig.migration.qemu_sender import QemuSender
from fusemig.migration.stats import WindowStatistics
from fusemig.records.epoch import Ownership
from fusemig.tasks import run_beside

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from fusemig.core.mirror import Reach
    from fusemig.migration.commit import SourceDisk
    from fusemig.migration.link import Offload
    from fusemig.migration.stats import MigrationParameters
    from fusemig.net.transport import ByteStream

DEFAULT_MACHINE = "fusemig"
"""Sent as the machine type where none was given; a QEMU insists on its own, a fusemig does not look."""


class UnprovenHandoff:
    """Gives disks away to a destination that proves nothing."""

    def __init__(self, records: HandoffRecords) -> None:
        """Prepare to give away the disks of ``records``."""
        self._records = records
        self.may_thaw = True
        self.is_committing = False

    async def own_records(self) -> None:
        """See that the disks are ours to give; raises as `HandoffRecords.own`."""
        await self._records.own()

    async def give_away(self, peer: str) -> None:
        """Make `handed-off` durable; from here on nothing thaws by itself.

        Raises:
            StateError: that is not possible; nothing was given away.
        """
        self.is_committing = True
        try:
            await self._records.write(Ownership.HANDED_OFF, peer, may_undo=True)
        finally:
            self.is_committing = False
        self.may_thaw = False


class QemuSource(OutgoingMigration):
    """One outgoing migration over QEMU's wire."""

    wire: ClassVar[str] = "qemu"

    def __init__(
        self,
        disks: Sequence[SourceDisk],
        connect: Callable[[], Awaitable[ByteStream]],
        parameters: MigrationParameters,
        offload: Offload,
        on_phase: Callable[[MigrationPhase], None] = lambda _phase: None,
        on_pass: Callable[[int], None] = lambda _number: None,
        count_requests: Callable[[], int] = lambda: 0,
        on_pace: Callable[[Reach, int], None] = lambda _reach, _percent: None,
        machine: str = DEFAULT_MACHINE,
    ) -> None:
        """Prepare as `SourceMigration` does; ``machine`` is the machine type of the QEMU at the other end."""
        super().__init__(disks, connect, parameters, offload, on_phase, on_pass, on_pace)
        self._handoff: UnprovenHandoff = UnprovenHandoff(HandoffRecords(disks, self.session, offload, "qemu"))
        self._count_requests = count_requests
        self._machine_type = machine
        self._limit = RateLimit(0)
        self._sender: QemuSender | None = None

    async def _migrate(self) -> None:
        await self._handoff.own_records()
        stream = self._stream = await self._connect()
        self._peer = stream.peer
        try:
            await self._disks.start_tracking()
            for disk in self._disks.tracked:
                disk.allocated_bytes = disk.tracking.dirty_chunks * CHUNK_SIZE
            self._sender = QemuSender(self._disks.tracked, self._machine_type, self._count_requests)
            self._pacer.start()
            await run_beside(self._send_all, self._watch, self._tick, self._pacer.run, on_failure=self._pacer.release)
            await self._hand_off(self._sender)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await stream.aclose()

    async def _watch(self) -> None:
        """Notice a destination that goes: it has nothing to say on this wire."""
        buffer = memoryview(bytearray(1))
        while True:
            try:
                n = self._stream.receive_nowait(buffer)
            except trio.WouldBlock:
                await self._stream.wait_readable()
                continue
            if n:
                raise RemoteProtocolError(f"{self._peer} sent something, which nobody does on QEMU's wire")
            raise ConnectionLostError(
                f"{self._peer} closed the connection and this wire does not say why: look at its log; a QEMU wants its "
                "own machine type (--machine), disks of the same names and sizes, and nothing else in the stream"
            )

    async def _tick(self) -> None:
        while True:
            self._count_dirtied(trio.current_time())
            await trio.sleep(TICK_S)

    # Passes

    async def _run_pass(self, *, is_limited: bool) -> None:
        """Send everything that is dirty once."""
        sender, need = self._sender, Need.SLICE
        assert sender is not None
        sender.begin_pass(is_bulk=self._machine.phase is MigrationPhase.BULK)
        run_slice, limit = partial(sender.run_slice, self._stream), self._limit
        while need is not Need.NOTHING:
            limit.bytes_per_s = self._parameters.max_bandwidth if is_limited else 0
            wire_bytes, sent_bytes = sender.wire_bytes, sender.sent_bytes
            self._meter.begin_busy(trio.current_time())
            need = await self._offload(run_slice, limit.step_bytes(SLICE_BYTES))
            while need is Need.STREAM:
                await self._wait_writable()
                need = await self._offload(run_slice, 0)
            now = trio.current_time()
            if sender.sent_bytes > sent_bytes:
                self._meter.count_sent(sender.sent_bytes - sent_bytes, now)
            await trio.sleep(limit.delay_s(sender.wire_bytes - wire_bytes, now))

    async def _wait_writable(self) -> None:
        with trio.move_on_after(IDLE_DEADLINE_S):
            await self._stream.wait_writable()
            return
        raise ConnectionLostError(f"{self._peer} took nothing for {IDLE_DEADLINE_S:g} s")

    async def _sync_ahead(self) -> None:
        await self._disks.flush()

    def _pending_bytes(self) -> int:
        """Count whole chunks, which is what is sent."""
        return self._disks.pending_chunks * CHUNK_SIZE

    # Switchover

    async def _hand_off(self, sender: QemuSender) -> None:
        if self._is_cancel_requested:
            raise self._cancelled_error()
        with trio.CancelScope(shield=True):
            await self._handoff.give_away(self._peer)
            self._enter(MigrationPhase.COMMITTED)
            try:
                with trio.fail_after(self._parameters.taken_deadline_s):
                    await self._send_ending(sender)
            except (FusemigError, trio.TooSlowError) as exc:
                raise InDoubtError(
                    f"the end of the stream could not be sent to {self._peer} ({str(exc) or 'deadline passed'}); the"
                    " disks are read-only here until it is known whether a guest runs there: see docs/wire-qemu.md"
                ) from exc
            self._switchover.note_taken()
            self._thaw()  # answers the parked writes: EROFS
        self._log.warning("handed off without proof: QEMU's wire has no acknowledgement", destination=self._peer)

    async def _send_ending(self, sender: QemuSender) -> None:
        rest = [memoryview(buffer) for buffer in sender.ending()]
        while rest:
            try:
                drop_sent(rest, self._stream.send_nowait(rest))
            except trio.WouldBlock:
                await self._stream.wait_writable()

    # Account

    @property
    def _wire_bytes(self) -> int:
        return 0 if self._sender is None else self._sender.wire_bytes

    @property
    def _acknowledged_bytes(self) -> int:
        return 0 if self._sender is None else self._sender.sent_bytes

    def _window(self) -> WindowStatistics:
        """Return it in chunks; none is ever acknowledged, so none is in flight once it is sent."""
        sender = self._sender
        if sender is None:
            return WindowStatistics(0, 0, 0, 0)
        return WindowStatistics(
            submitted=int(sender.is_reading),
            read_done=int(sender.is_sending),
            in_flight=0,
            transferred=sender.n_chunks,
        )
