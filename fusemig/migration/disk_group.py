"""DiskGroup: the disks of one outgoing migration, all or none: their tracking, their gates and their stores.

Its fields are written by the migration's own task; anybody may ask what is left to be sent.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from fusemig.disk.overlay import OverlayDisk
from fusemig.disk.tracked import Gate
from fusemig.errors import DiskError, MigrationError
from fusemig.migration.reader import OutgoingDisk
from fusemig.migration.stats import DiskStatistics

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Sequence

    from fusemig.disk.tracked import TrackedDisk
    from fusemig.disk.tracking import Tracking
    from fusemig.migration.commit import SourceDisk
    from fusemig.migration.link import Offload

PROOF_POLL_S: Final = 0.1
"""Between two looks whether a base is read."""


class DiskGroup:
    """Made with a migration; its disks are tracked from `start_tracking` to `stop_tracking`."""

    def __init__(self, lent: Sequence[SourceDisk], offload: Offload) -> None:
        """Touch nothing yet; ``lent`` are in the order of the bulk phase, and ``offload`` runs calls that may sleep."""
        self.lent = lent
        self.tracked: list[OutgoingDisk] = []
        """Those that are tracked, or were last, in the same order."""
        self.found_at: float | None = None
        """When it was known what holds data, on trio's clock; None: not yet, or another migration knew."""
        self._offload = offload

    # Tracking

    async def start_tracking(self, thin: Collection[int] = ()) -> None:
        """Track every disk and find what is to be sent; of those whose place is in ``thin``, what is not their base.

        Raises:
            MigrationError: an image cannot be read.
        """
        for index, lent in enumerate(self.lent):
            self.tracked.append(OutgoingDisk(index, lent.disk, lent.disk.start_tracking()))
            self.tracked[-1].is_thin = index in thin
        for disk in self.tracked:
            try:
                await self._offload(disk.find_allocated)
            except DiskError as exc:
                raise MigrationError(f"{exc}; the disk stays here: mend its image, then migrate again") from exc
        self.found_at = trio.current_time()

    async def wait_for_bases(self, on_unproved: Callable[[str], None]) -> None:
        """Wait until the bases of overlays are known to be those whose digests are told (`OverlayDisk.is_base_proved`).

        Args:
            on_unproved: told why it waits, if it does.

        Raises:
            MigrationError: one is another, or cannot be read; the disk stays here.
        """
        for lent in self.lent:
            image = lent.disk.image
            if not isinstance(image, OverlayDisk) or image.is_base_proved:
                continue
            on_unproved(f"the base of disk '{image.name}' was written while it was served, and is being read")
            while not image.is_base_proved:
                if image.io_error is not None:
                    raise _untrusted_error(image.io_error)
                await trio.sleep(PROOF_POLL_S)

    def stop_tracking(self) -> None:
        """Nobody wants to know any more what guests write; what was sent can still be told."""
        for disk in self.tracked:
            disk.tracking.stop()

    def begin_anew(self) -> None:
        """Be as before the first `start_tracking`."""
        self.stop_tracking()
        self.tracked = []

    def give_up_in_flight(self) -> None:
        """Have everything sent again of which nobody will say any more whether it arrived."""
        for disk in self.tracked:
            disk.tracking.restore_all()

    def tracking_of(self, disk: TrackedDisk) -> Tracking | None:
        """Return the tracking of a disk, as it is or was last; None where there is none."""
        return next((one.tracking for one in self.tracked if one.disk is disk), None)

    @property
    def allocated_bytes(self) -> int:
        """All that there was to be sent in the beginning."""
        return sum(disk.allocated_bytes for disk in self.tracked)

    @property
    def pending_bytes(self) -> int:
        """What is to be sent, or acknowledged."""
        return sum(disk.tracking.pending_bytes for disk in self.tracked)

    @property
    def pending_chunks(self) -> int:
        """The same in chunks, parts of chunks being whole ones."""
        return sum(disk.tracking.dirty_chunks + disk.tracking.in_flight_chunks for disk in self.tracked)

    @property
    def is_clean(self) -> bool:
        """Whether nothing is."""
        return all(disk.tracking.is_clean for disk in self.tracked)

    # Gates

    async def push_out_pages(self) -> None:
        """Have the kernel write what guests stored through mmap, while the gates are open."""
        for lent in self.lent:
            await lent.push_out_pages()

    def close_gates(self) -> None:
        """Park guests' writes from now on."""
        for disk in self.tracked:
            disk.disk.set_gate(Gate.CLOSED)

    async def drain(self, deadline: float) -> None:
        """Wait for the writes that were in progress when the gates closed; ``deadline`` is on trio's clock.

        Raises:
            MigrationError: one did not finish.
        """
        for disk in self.tracked:
            left = max(0.0, deadline - trio.current_time())
            if not await self._offload(disk.disk.wait_drained, left):
                raise MigrationError(f"a write to disk '{disk.disk.name}' did not finish before the freeze deadline")

    def thaw(self) -> None:
        """Give guests the disks back; idempotent."""
        for lent in self.lent:
            if lent.disk.gate is Gate.CLOSED:
                lent.disk.set_gate(Gate.OPEN)

    def end_writing(self) -> None:
        """The disks are not ours any more: answer what is parked with EROFS, and whatever comes; idempotent."""
        for lent in self.lent:
            lent.disk.set_gate(Gate.READ_ONLY)

    # Stores

    async def flush(self) -> None:
        """Make the disks durable, one after the other.

        Raises:
            MigrationError: a store failed, and what it holds is not to be trusted; the disks stay here.
        """
        for disk in self.tracked:
            await self._flush(disk)

    def flushes(self) -> list[Callable[[], Awaitable[None]]]:
        """Return what makes the disks durable at the same time; each raises as `flush` does.

        Cancellation: at once, because guests wait meanwhile. The sync goes on in its thread: a later one waits for it,
        and so does closing the disk; that it failed is known to the disk, as after a guest's own.
        """
        return [partial(self._flush, disk, may_abandon=True) for disk in self.tracked]

    async def _flush(self, disk: OutgoingDisk, *, may_abandon: bool = False) -> None:
        try:
            await self._offload(disk.disk.flush, abandon_on_cancel=may_abandon)
        except DiskError as exc:
            raise _untrusted_error(exc) from exc

    def check_stores(self) -> None:
        """Raise `MigrationError` if a guest's own sync failed since ours: such a disk is not handed over."""
        for disk in self.tracked:
            if disk.disk.io_error is not None:
                raise _untrusted_error(disk.disk.io_error)

    # Account

    def statistics(self) -> tuple[DiskStatistics, ...]:
        """Return what is known at this moment."""
        return tuple(
            DiskStatistics(
                name=disk.disk.name,
                size=disk.disk.size,
                allocated_bytes=disk.allocated_bytes,
                dirty_bytes=disk.tracking.dirty_bytes,
                dirty_chunks=disk.tracking.dirty_chunks,
                in_flight_chunks=disk.tracking.in_flight_chunks,
                sent_bytes=disk.sent_bytes,
                parked_writes=disk.disk.parked_writes,
                digest=disk.digest.value,
            )
            for disk in self.tracked
        )


def _untrusted_error(error: DiskError) -> MigrationError:
    return MigrationError(
        f"{error}; what was written last may be lost, so the disk is not moved: stop its guest, check the image "
        "and its store, then serve it anew"
    )
