"""Pause: QMP's `stop` and `cont`, the freeze that an operator asks for.

    stop ── the kernel pushes out what guests stored through mmap ── every disk held ── drained ── synced
    cont ── no disk held; writes that were parked are made

Rules:

1. All disks are held or none, also those whose image is still to come and those that are read-only now: whatever a
   migration opens meanwhile stays closed until `cont`.
2. Lifting opens nothing that is not ours to write: holding a disk is a wish beside the gate's own (`TrackedDisk`).
3. There is no deadline. Whoever stops the disks wants images that stand still, so nothing but `cont` and the daemon's
   end lifts it; each answers every parked write.
4. Pages are never pushed out while a gate is closed: the kernel would wait for a write that is parked. So a migration
   that freezes a disk which is held finds it pushed out already, and the two never push at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from fusemig.disk.tracked import Gate
from fusemig.errors import DiskError, StateError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from fusemig.daemon.served import ServedDisk

_DRAIN_STEP_S: Final = 1.0
"""How long a thread waits for admitted writes at a stretch; a store that hangs must not hold a thread for good."""


class Pause:
    """Whether the operator has stopped the disks of a daemon."""

    def __init__(self, disks: Iterable[ServedDisk], push_out: Callable[[ServedDisk], Awaitable[None]]) -> None:
        """Nothing is stopped.

        Args:
            disks: all disks of the daemon, also those that come to life later.
            push_out: has the kernel write back what it holds of a disk.
        """
        self.is_on = False
        self._disks = disks
        self._push_out = push_out
        self._pushing = trio.Lock()

    async def start(self, on_stopped: Callable[[], None]) -> None:
        """Hold every disk; return when no write is running and the images are durable.

        ``on_stopped`` is called at once when the disks are held, unless they were. Waits for writes that were admitted
        before, however long they take.

        Raises:
            DiskError: the kernel did not write back what it holds; nothing is held.
            StateError: the disks are held, but an image is not known to be durable.

        Cancellation: the disks are held, or they are not.
        """
        async with self._pushing:
            if not self.is_on:
                for served in self._disks:
                    await self._push_out_if_open(served)
                self.hold()
                on_stopped()
        for served in self._disks:
            disk = served.disk
            if disk is None or disk.gate is Gate.READ_ONLY:
                continue
            while not await trio.to_thread.run_sync(disk.wait_drained, _DRAIN_STEP_S):
                pass
            try:
                await trio.to_thread.run_sync(disk.flush)
            except DiskError as exc:
                raise StateError(f"the disks are stopped, but not known to be durable: {exc}") from exc

    def hold(self) -> None:
        """Hold every disk as they are; a successor does before it serves, when nothing can be written or cached yet."""
        self.is_on = True
        for served in self._disks:
            served.set_held(is_held=True)

    def lift(self) -> None:
        """Let every disk be what it is without this; idempotent."""
        self.is_on = False
        for served in self._disks:
            served.set_held(is_held=False)

    async def push_out(self, served: ServedDisk) -> None:
        """Push out the pages of a disk, for a migration that is about to freeze it.

        Raises:
            DiskError: the kernel did not write them back.
        """
        async with self._pushing:
            await self._push_out_if_open(served)

    async def _push_out_if_open(self, served: ServedDisk) -> None:
        if served.disk is not None and served.disk.gate is Gate.OPEN:
            await self._push_out(served)
