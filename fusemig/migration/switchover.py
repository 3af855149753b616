"""Switchover: from closing the gates until the destination owns the disks; its deadline, and how long it took.

    bring_to_standstill    a guest that moves with the disks; passes go on meanwhile
    push_out_pages         the kernel writes what guests stored through mmap; the gates are still open
    begin                  gates closed
    finish_sending         drained, synced, with the last pass beside it
    (the hand-off, within the same deadline: `in_time`)
    note_taken             the downtime is known;     or `undo`: the guests go on, and it may come again

Whoever is to thaw when one of them fails is `fusemig.migration.outgoing`.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import trio

from fusemig.errors import MigrationError
from fusemig.migration.pacer import TICK_S
from fusemig.tasks import run_all

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from fusemig.migration.disk_group import DiskGroup
    from fusemig.migration.guest import MovingGuest
    from fusemig.migration.pacer import Pacer
    from fusemig.migration.stats import MigrationParameters


class Switchover:
    """Of one migration; made before it begins."""

    def __init__(self, disks: DiskGroup, pacer: Pacer, parameters: MigrationParameters) -> None:
        """Prepare to freeze ``disks``, whose guests ``pacer`` holds back until then."""
        self._disks = disks
        self._pacer = pacer
        self._parameters = parameters
        self._frozen_at: float | None = None
        self._taken_at: float | None = None
        self.deadline = 0.0
        """When the guests must go on, on trio's clock."""

    async def bring_to_standstill(self, guest: MovingGuest, keep_up: Callable[[trio.Event], Awaitable[None]]) -> None:
        """Bring the guest to a standstill, from where on it waits.

        Args:
            guest: that moves with the disks.
            keep_up: makes passes until an event is set.

        Raises:
            MigrationError: the pass that was under way then took longer than the freeze deadline.
            FusemigError: the guest cannot, or a pass failed.
        """
        is_still = trio.Event()
        passes = trio.CancelScope()

        async def bring() -> None:
            await guest.bring_to_standstill()
            passes.deadline = trio.current_time() + self._parameters.freeze_deadline_s
            is_still.set()

        async def make_passes() -> None:
            with passes:
                await keep_up(is_still)
            if passes.cancelled_caught:
                raise self.late_error()

        await run_all(bring, make_passes, on_failure=self._pacer.release)

    async def push_out_pages(self, keep_up: Callable[[trio.Event], Awaitable[None]]) -> None:
        """Have the kernel write what guests stored through mmap.

        Such a write may have to wait for passes to make room: ``keep_up`` makes them until an event is set.
        """
        is_out = trio.Event()

        async def push() -> None:
            await self._disks.push_out_pages()
            is_out.set()

        async def make_room() -> None:
            while not self._pacer.is_mirroring and not is_out.is_set():
                await self._pacer.pause(TICK_S, is_out)  # it may come, or come back
            if not is_out.is_set():
                await keep_up(is_out)

        await run_all(push, make_room, on_failure=self._pacer.release)

    def begin(self) -> None:
        """Close the gates: guests' writes wait from now on."""
        self._frozen_at = trio.current_time()
        self.deadline = self._frozen_at + self._parameters.freeze_deadline_s
        self._disks.close_gates()
        self._pacer.freeze()

    async def finish_sending(self, last_pass: Callable[[], Awaitable[None]]) -> None:
        """Drain, sync and send the rest.

        Raises:
            MigrationError: the deadline has passed, or a store failed.
            FusemigError: what the pass raises.
        """
        with self.in_time():
            await self._disks.drain(self.deadline)
            await run_all(last_pass, *self._disks.flushes(), on_failure=self._pacer.release)

    @contextmanager
    def in_time(self) -> Iterator[None]:
        """Raise `MigrationError` in place of what is inside when the deadline has passed."""
        with trio.move_on_at(self.deadline) as scope:
            yield
        if scope.cancelled_caught:
            raise self.late_error()

    def late_error(self) -> MigrationError:
        """Return what is raised when guests had to wait too long."""
        return MigrationError(
            f"the switchover took longer than the freeze deadline of {self._parameters.freeze_deadline_s:g} s; "
            "the guests run on here: migrate again, with a lower --downtime-limit or at a quieter time"
        )

    def note_taken(self) -> None:
        """The destination owns the disks."""
        self._taken_at = trio.current_time()

    def undo(self) -> None:
        """The guests go on, and this is over as if it had not been."""
        self._frozen_at = None

    @property
    def downtime_s(self) -> float | None:
        """From closing the gates to TAKEN; None as long as it is not known."""
        return None if self._taken_at is None or self._frozen_at is None else self._taken_at - self._frozen_at

    def frozen_s(self, now: float) -> float:
        """Return how long the gates have been closed ``now``, or were; 0 before."""
        if self._frozen_at is None:
            return 0.0
        return (now if self._taken_at is None else self._taken_at) - self._frozen_at
