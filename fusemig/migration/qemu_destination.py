"""QemuDestination: receives disks from a QEMU that runs `migrate -b`, over QEMU's own stream (docs/wire-qemu.md).

    stream ─> QemuReceiver (slices on a worker thread) ─> images
                  └ events ─> this task ─> claim, progress, completeness, take-over

The stream says neither beforehand which disks come nor how large they are. So every disk that waits must come, and its
image, which must be there, tells its size. The disks are claimed with the first sign of a `block` section.

A disk with a base here (`fusemig.disk.overlay`) takes `migrate -i` as well: what the source leaves out is the base's.
So whatever the overlay held before, from an attempt that failed or from another life, is forgotten first.

Nothing is acknowledged, so this side decides alone whether it has everything (`BlockCompleteness`), and decides it when
the live sections end: a source that still sends the state of its devices then fails and lets its guest run on. A
source with a return path waits for our word (SHUT), fails if it is a bad one, and closes after a good one: only then
are the disks ours. Without a return path a whole stream and its orderly end are all there is.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, ClassVar, Final

import trio

from fusemig.core.phase import MigrationPhase
from fusemig.disk.overlay import OverlayDisk
from fusemig.errors import ConnectionLostError, FusemigError, MigrationError, RemoteProtocolError
from fusemig.migration.incoming import LINGER_S, IncomingMigration
from fusemig.migration.link import HANDSHAKE_DEADLINE_S, Need, Pace, drop_sent
from fusemig.migration.qemu_receiver import QemuReceiver, Turn
from fusemig.records.epoch import Ownership
from fusemig.wire import native, qemu_block, savevm

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusemig.migration.incoming import AwaitedDisk, IncomingHost, IncomingStatistics
    from fusemig.migration.link import Offload
    from fusemig.migration.qemu_receiver import Event
    from fusemig.migration.writer import IncomingDisk
    from fusemig.net.transport import ByteStream

_IDLE_DEADLINE_S: Final = 600.0
"""Without a byte for this long the source counts as lost.

A slow ``max-bandwidth`` is no silence: QEMU sends a chunk at least in every window of 100 ms, however small the limit
(7.2: migration/block.c, flush_blks; migration/migration.c, BUFFER_DELAY). What is one is a store that hangs, and a
source that waits for `migrate-continue` at pre-switchover, for a person or a script. A host that is gone does not last
so long: the kernel's keepalive finds it (`fusemig.net.transport`).
"""
_SETTLE_S: Final = 0.1
"""How long a stream that may be whole must be silent before the source is told so."""
_CLOSE_DEADLINE_S: Final = 10.0
"""How long a source that was told that all is well may take to close."""


class QemuDestination(IncomingMigration):
    """One incoming migration from a QEMU."""

    wire: ClassVar[str] = "qemu"

    def __init__(
        self,
        stream: ByteStream,
        host: IncomingHost,
        offload: Offload,
        on_phase: Callable[[MigrationPhase], None] = lambda _phase: None,
        head: bytes = b"",
    ) -> None:
        """Prepare as `IncomingMigration` does; ``head`` is what was read of the stream already."""
        super().__init__(stream, host, offload, on_phase)
        self._stream = stream
        self._head = head
        self._awaited: list[AwaitedDisk] = []
        self._percent = 0
        self._has_return_path = False
        self._is_told = False
        self._pace = Pace(stream.peer)

    async def _meet(self) -> list[IncomingDisk]:
        self._awaited = await self._host.awaited()
        self._receiver = QemuReceiver(self._stream, self._awaited, self._head)
        with trio.move_on_after(HANDSHAKE_DEADLINE_S):
            while True:
                event = await self._next_event(HANDSHAKE_DEADLINE_S)
                if isinstance(event, qemu_block.BlockEos | qemu_block.BlockProgress) or event is Turn.DISKS:
                    return await self._claim()
                await self._handle(event)
        raise RemoteProtocolError(f"{self.peer} did not begin to send disks within {HANDSHAKE_DEADLINE_S:g} s")

    async def _claim(self) -> list[IncomingDisk]:
        self.session = uuid.uuid4().hex
        # To us the disks are new: QEMU keeps no epochs.
        offers = [native.DiskOffer(disk.name, disk.size, uuid.uuid4().hex, 0) for disk in self._awaited]
        self._receiver.disks = await self._host.claim(offers, self.session, self.peer)
        return self._receiver.disks

    async def _receive(self) -> None:
        self._enter(MigrationPhase.BULK)
        for disk in self.disks:
            image = disk.disk.image
            if isinstance(image, OverlayDisk):
                await self._offload(image.forget)
        while await self._handle(await self._next_event(_IDLE_DEADLINE_S)):
            pass
        await self._take_over()

    async def _next_event(self, deadline_s: float) -> Event:
        """Return the next event; STREAM where the stream may be whole and the source waits for our word."""
        while True:
            event = await self._offload(self._receiver.run_slice)
            if event is Need.STREAM:
                self._pace.check(self._receiver.n_events, self._receiver.n_bytes, trio.current_time())
                is_waiting = self._has_return_path and not self._is_told and self._receiver.may_end
                with trio.move_on_after(_SETTLE_S if is_waiting else deadline_s):
                    await self._stream.wait_readable()
                    continue
                if is_waiting:
                    return Need.STREAM
                raise ConnectionLostError(f"nothing heard from {self.peer} for {deadline_s:g} s")
            if event is not Need.SLICE:
                return event  # type: ignore[no-any-return]

    async def _handle(self, event: Event) -> bool:
        """Act on an event; return whether more is to come."""
        match event:
            case qemu_block.BlockProgress(percent):
                self._percent = percent
            case savevm.Command(savevm.CommandType.OPEN_RETURN_PATH):
                self._has_return_path = True
            case savevm.Command(savevm.CommandType.PING, value) if self._has_return_path:
                await self._send(savevm.encode_pong(value))
            case savevm.DeviceState() | savevm.StreamEnd():
                self._enter(MigrationPhase.FROZEN)
                self._check_complete()
            case Turn.CLOSED if self._has_return_path:
                raise ConnectionLostError(
                    f"{self.peer} closed the connection before it heard that its disks arrived: not taken over"
                )
            case Turn.CLOSED | Need.STREAM:
                return False
        return True

    def _check_complete(self) -> None:
        """Refuse to go on with less than everything.

        Raises:
            MigrationError: and what is missing.
        """
        problem = self._receiver.completeness.problem()
        unseen = [disk for index, disk in enumerate(self._awaited) if index not in self._receiver.received]
        if problem is None and not unseen:
            return
        if unseen:
            # Also with a base, where that may be right: nothing has said that the QEMU has such a disk.
            names = ", ".join(f"'{disk.name}'" for disk in unseen)
            problem = f"{problem}; " if problem else ""
            problem += f"of {names} nothing came at all: serve only the disks that the QEMU has"
            if any(disk.has_base for disk in unseen):
                problem += "; an overlay that holds nothing there need not move, a new one here is the same disk"
        raise MigrationError(
            f"not taken over: {problem}; the disks are whole in QEMU: where its guest stands still, `cont` there first"
        )

    async def _take_over(self) -> None:
        await self._flush()
        await self._drop_pages()
        if self._has_return_path:
            await self._tell_and_wait_closed()
        with trio.CancelScope(shield=True):
            await self._write_records(Ownership.OWNER)
            self._open_gates()

    async def _tell_and_wait_closed(self) -> None:
        """Say that all is well; the source then ends, and closes.

        If it does not, it may not have heard us, and its guest may run on: the disks do not become ours.
        """
        self._is_told = True
        with trio.move_on_after(_CLOSE_DEADLINE_S):
            await self._send(savevm.encode_shut())
            while await self._next_event(_CLOSE_DEADLINE_S) is not Turn.CLOSED:
                pass
            return
        raise ConnectionLostError(
            f"{self.peer} was told that its disks arrived and did not end within {_CLOSE_DEADLINE_S:g} s: not taken"
            " over; `cont` there, and migrate again"
        )

    async def _send(self, message: bytes) -> None:
        rest = [memoryview(message)]
        while rest:
            try:
                drop_sent(rest, self._stream.send_nowait(rest))
            except trio.WouldBlock:
                await self._stream.wait_writable()

    async def _say_failed(self, reason: FusemigError) -> None:
        """Have a source with a return path fail; one without finds the connection closed."""
        if not self._has_return_path or self._is_told:
            return
        with trio.CancelScope(shield=True, deadline=trio.current_time() + LINGER_S):
            try:
                await self._send(savevm.encode_shut(failed=True))
                # A socket closed with unread bytes resets the connection, and our word with it.
                scratch = memoryview(bytearray(1 << 16))
                while True:
                    try:
                        if not self._stream.receive_nowait(scratch):
                            return
                    except trio.WouldBlock:
                        await self._stream.wait_readable()
            except FusemigError as exc:
                self._log.info("the source could not be told", reason=str(exc))

    def statistics(self) -> IncomingStatistics:
        """Return what is known at this moment; what is pending is what the source's progress leaves."""
        total = sum(disk.size for disk in self._awaited)
        return self._statistics(1, total * (100 - self._percent) // 100, total)
