"""NativePasses: passes over one connection of the native wire, and what the destination says of them.

    run_pass        PassSender in slices on a worker thread ─> wire
    receive         <─ ACK, SYNCED, JOURNALED
    say_progress    ─> proof of life

What is sent and not acknowledged is bounded by a window, a small one while guests' writes wait behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import trio

from fusemig.core.convergence import RateLimit
from fusemig.errors import RemoteProtocolError
from fusemig.migration.link import SLICE_BYTES, Need
from fusemig.migration.order import HeatOrder, Order
from fusemig.migration.packing import PackingWatch
from fusemig.migration.reader import PassReader
from fusemig.migration.sender import WINDOW_BYTES, PassSender
from fusemig.migration.stats import WindowStatistics
from fusemig.wire import native

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusemig.core.compression import Packer
    from fusemig.migration.disk_group import DiskGroup
    from fusemig.migration.link import BufferPool, NativeLink, Offload
    from fusemig.migration.meter import Meter
    from fusemig.migration.pacer import Pacer
    from fusemig.migration.stats import MigrationParameters


@dataclass
class Sent:
    """What went over connections, in bytes."""

    wire_bytes: int = 0
    """Handed to the stream, headers included."""
    acknowledged_bytes: int = 0
    """Of the disks, that need not be sent again."""
    unchanged_bytes: int = 0
    """Those of them that were not sent, because the destination has the same bytes from before."""

    def add(self, other: Sent) -> None:
        """Count what went over another connection, too."""
        self.wire_bytes += other.wire_bytes
        self.acknowledged_bytes += other.acknowledged_bytes
        self.unchanged_bytes += other.unchanged_bytes


class NativePasses:
    """Made when both ends know what is to be sent; of no use once the connection is lost, but for its account."""

    def __init__(
        self,
        link: NativeLink,
        disks: DiskGroup,
        pool: BufferPool,
        packer: Packer | None,
        parameters: MigrationParameters,
        meter: Meter,
        pacer: Pacer,
        offload: Offload,
        count_requests: Callable[[], int],
        progress: Callable[[], native.Progress],
        on_progress: Callable[[], None],
        *,
        is_journaled: bool,
    ) -> None:
        """Prepare to send ``disks`` over ``link``.

        Args:
            link: past the handshake.
            disks: tracked.
            pool: gave the link its buffers.
            packer: compresses, where it is worth it; None: nothing is compressed.
            parameters: may be changed meanwhile.
            meter: hears what arrives.
            pacer: says how much may be under way, and hears that something arrives.
            offload: runs calls that may sleep.
            count_requests: tells how many requests guests have ever made.
            progress: returns what is told to the destination.
            on_progress: called when something has arrived.
            is_journaled: the destination says what is durable there.
        """
        self._link = link
        self._disks = disks
        self._packer = packer
        self._parameters = parameters
        self._meter = meter
        self._pacer = pacer
        self._offload = offload
        self._progress = progress
        self._on_progress = on_progress
        self._limit = RateLimit(0)
        self.sender = PassSender(pool, count_requests)
        """Knows which frames may be lost with the connection."""
        self.sender.is_journaled = is_journaled
        self._reader = PassReader(disks.tracked, pool, packer)
        # Set by `receive`, and made anew by whoever waits:
        self._arrived = trio.Event()
        self._synced = trio.Event()

    # What the migration's own task does

    async def run_pass(self, *, is_bulk: bool, is_limited: bool) -> None:
        """Send everything that is dirty once, and wait until it is acknowledged.

        One that is limited keeps to the bandwidth that is allowed, and ends early when post-copy is asked for.
        """
        sender, stream, need = self.sender, self._link.stream, Need.SLICE
        self._reader.begin_pass(
            self._heat_order() if is_bulk and self._parameters.order is Order.HEAT else None,
            only_holes=self._parameters.is_postcopy and not is_limited,
        )
        # Of compressed bytes a slice would take long, and its end is when it is looked whether they were worth it.
        slice_bytes = SLICE_BYTES if self._packer is None else SLICE_BYTES >> 3
        while need is not Need.NOTHING and not (is_limited and self._parameters.is_postcopy):
            if need is Need.ACKNOWLEDGEMENT:
                await self._wait_arrival(lambda: sender.has_room)
            self.tune()
            is_courteous = is_bulk and not self._pacer.is_mirroring  # guests would wait for us
            run_slice = partial(sender.run_slice, self._reader, stream, is_courteous=is_courteous)
            self._limit.bytes_per_s = self._parameters.max_bandwidth if is_limited else 0
            if not sender.unacknowledged:
                self._meter.begin_busy(trio.current_time())
            wire_bytes = sender.wire_bytes
            watch = PackingWatch(self._packer, sender.sent_bytes)
            need = await self._run_slice(run_slice, self._limit.step_bytes(slice_bytes), watch)
            with watch.waiting():
                await trio.sleep(self._limit.delay_s(sender.wire_bytes - wire_bytes, trio.current_time()))
            watch.end(sender.sent_bytes)
        if sender.unacknowledged:
            await self.say_progress()  # which has the destination acknowledge at once
        await self._wait_arrival(lambda: not sender.unacknowledged)
        self._on_progress()

    async def _run_slice(self, run_slice: Callable[[int], Need], limit_bytes: int, watch: PackingWatch) -> Need:
        """Send a slice, to the end of a frame; if it is cancelled, the rest goes before what is sent next."""
        link = self._link
        async with link.sending, link.frame():
            try:
                need: Need = await self._offload(run_slice, limit_bytes)
                while need is Need.STREAM:
                    with watch.waiting():
                        await link.stream.wait_writable()
                    need = await self._offload(run_slice, 0)
            except trio.Cancelled:
                # Behind half a frame the destination could not be told why this ends; nobody waits here for the rest.
                link.end_frame(self.sender.take_rest())
                raise
        return need

    def _heat_order(self) -> HeatOrder:
        return HeatOrder([(disk.disk.heat, disk.disk.size) for disk in self._disks.tracked])

    async def _wait_arrival(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._arrived = trio.Event()
            await self._arrived.wait()

    async def sync(self) -> None:
        """Make both ends' stores durable."""
        self._synced = trio.Event()
        await self._link.send_message(native.Sync())
        await self._disks.flush()
        await self._synced.wait()

    # What goes on beside it

    def tune(self) -> None:
        """Keep what is under way short, and have it acknowledged soon, while guests' writes wait behind it.

        Also in the middle of a slice, so it is called again and again.
        """
        if self._pacer.is_mirroring:
            self.sender.window_bytes = self._pacer.under_way_bytes
            self.sender.prompt = native.encode_message(self._progress())
        else:
            self.sender.window_bytes, self.sender.prompt = WINDOW_BYTES, b""

    async def say_progress(self) -> None:
        """Tell the destination how far this is, and that we are alive."""
        await self._link.send_message(self._progress())

    async def receive(self) -> None:
        """Hear what the destination says, until cancelled.

        Raises:
            FusemigError: it aborted, is gone, or says what it was not asked.
        """
        while True:
            event = await self._link.receive()
            match event:
                case native.Ack():
                    self._acknowledge(event.sequence)
                case native.Synced():
                    self._synced.set()
                case native.Journaled():
                    self.sender.journaled(event.sequence)
                case native.Abort():
                    raise self._link.aborted_error(event)
                case _:
                    raise RemoteProtocolError(f"{self._link.peer} sent {type(event).__name__} during a pass")

    def _acknowledge(self, sequence: int) -> None:
        sender = self.sender
        if sequence > sender.last_sequence:
            raise RemoteProtocolError(f"frame {sequence} was acknowledged; the last one sent is {sender.last_sequence}")
        n_bytes = sender.acknowledge(sequence)
        if n_bytes:
            now = trio.current_time()
            self._meter.count_sent(n_bytes, now)
            self._on_progress()
            self._pacer.note_acknowledged(now)
        self._arrived.set()

    # Account

    @property
    def sent(self) -> Sent:
        """What went over this connection."""
        unchanged_bytes = self._reader.unchanged_bytes
        return Sent(self.sender.wire_bytes, self.sender.acknowledged_bytes + unchanged_bytes, unchanged_bytes)

    def window(self) -> WindowStatistics:
        """Return what is on its way."""
        sender = self.sender
        return WindowStatistics(
            submitted=int(sender.is_reading),
            read_done=sender.n_read_done,
            in_flight=len(sender.unacknowledged) - sender.n_read_done,
            transferred=sender.n_transferred,
        )
