"""GuestMove: leads a runtime through the move of its guest, in the order of `fusemig.core.guest`.

It lives in the source's daemon and nowhere else, because the daemon is the one process without which the guest has no
disk: whoever asked for the move may go away, and if the daemon dies there is nothing left that the guest could run on.
So no state is ever held by a process whose death alone strands a guest.

Rules: each event is told to the machine when the runtime has *said* it. Before the runtime at the source is told
anything after a failure, the machine and the disks' hand-off must agree that the guest may run here. Every step has a
deadline.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

import structlog
import trio

from fusemig.core.guest import GuestEvent, GuestMachine, GuestState
from fusemig.errors import FusemigError, StateError
from fusemig.migration.guest import GuestAccount

if TYPE_CHECKING:
    from collections.abc import Callable

log = structlog.get_logger(__name__)

FALL_BACK_DEADLINE_S: Final = 15.0
"""For the source's runtime to let the guest run again."""
RUN_DEADLINE_S: Final = 15.0
"""For the destination's runtime to let the guest run."""


class Runtime(Protocol):
    """What runs a guest at the source and can run it at the destination.

    Every call may be cancelled; what it leaves then is what `run_here` has to expect.
    """

    name: str
    fall_back_deadline_s: float
    run_deadline_s: float

    async def prepare(self) -> None:
        """Look whether the guest could move; change nothing."""

    async def begin_copy(self) -> None:
        """Begin to copy the memory; returns at once."""

    async def wait_standstill(self) -> None:
        """Return when the guest stands still and has nothing under way to its disks."""

    async def load(self) -> None:
        """Have the destination hold all of the guest without running it; return when both sides have said so.

        From then on the source must not run it by itself, whatever becomes of the destination.
        """

    async def run_there(self) -> None:
        """Let the guest run at the destination; return when it does."""

    async def run_here(self) -> None:
        """Undo whatever was done; return when the guest runs at the source as it did before."""

    async def release(self) -> None:
        """Let go of connections; never fails."""


class GuestMove:
    """The move of one guest; a `fusemig.migration.guest.MovingGuest`."""

    is_moving = True

    def __init__(self, runtime: Runtime, may_run_here: Callable[[], bool]) -> None:
        """Prepare to move the guest of ``runtime``.

        Args:
            runtime: does it.
            may_run_here: asks the disks' hand-off whether the source's disks are, or will at once be, writable.
        """
        self._runtime = runtime
        self._may_run_here = may_run_here
        self._machine = GuestMachine()
        self._timeline: list[tuple[GuestState, float]] = []
        self._error = ""

    def _on(self, event: GuestEvent) -> None:
        self._machine.on(event)
        self._timeline.append((self._machine.state, trio.current_time()))
        log.info("guest", state=self._machine.state.value)

    async def prepare(self) -> None:
        """Look whether the guest could move."""
        await self._runtime.prepare()

    async def bring_to_standstill(self) -> None:
        """Have the memory copied; return when the guest stands still."""
        await self._runtime.begin_copy()
        self._on(GuestEvent.COPY_BEGUN)
        await self._runtime.wait_standstill()
        self._on(GuestEvent.STOOD_STILL)

    async def load(self) -> None:
        """Have the destination hold all of the guest."""
        self._on(GuestEvent.DISKS_PROVED)
        await self._runtime.load()
        self._on(GuestEvent.LOADED)

    def on_committed(self) -> None:
        """Note that COMMIT is about to be said."""
        self._on(GuestEvent.COMMITTED)

    async def run_there(self) -> None:
        """Let the guest run at the destination."""
        self._on(GuestEvent.TAKEN)
        try:
            with trio.fail_after(self._runtime.run_deadline_s):
                await self._runtime.run_there()
        except (FusemigError, trio.TooSlowError) as exc:
            self._on(GuestEvent.FAILURE)
            self._error = (
                f"the disks are at the destination and the guest does not run there: {_text(exc)}. It must not be "
                "resumed at the source, whose disks are read-only"
            )
            log.error("the guest does not run", reason=self._error)
        else:
            self._on(GuestEvent.RUNS_THERE)
        await self._release()

    async def fall_back(self) -> None:
        """Let the guest run at the source, if it may."""
        if self._machine.is_over:
            return
        with trio.CancelScope(shield=True):
            self._on(GuestEvent.FAILURE)
            if self._machine.state is GuestState.RETURNING:
                await self._run_here()
            elif self._machine.state is GuestState.IN_DOUBT:
                self._error = (
                    "the guest stands still at both ends; resume it only where its disks turn out to be (the source "
                    "still holds all of it)"
                )
            await self._release()

    async def _run_here(self) -> None:
        try:
            if not self._may_run_here():
                raise StateError("the disks have been handed off: this is a bug, please report it")
            with trio.fail_after(self._runtime.fall_back_deadline_s):
                await self._runtime.run_here()
        except (FusemigError, trio.TooSlowError) as exc:
            self._on(GuestEvent.FAILURE)
            self._error = (
                f"the guest's disks are here and the guest could not be resumed: {_text(exc)}. Resume it by hand, "
                "here only"
            )
            log.error("the guest does not run", reason=self._error)
        else:
            self._on(GuestEvent.RUNS_HERE)

    async def _release(self) -> None:
        with trio.CancelScope(shield=True):
            await self._runtime.release()

    def account(self) -> GuestAccount:
        """Return what is known of the move."""
        return GuestAccount(self._runtime.name, self._machine.state, tuple(self._timeline), self._error)


def _text(exc: FusemigError | trio.TooSlowError) -> str:
    return str(exc) if isinstance(exc, FusemigError) else "it did not answer in time"
