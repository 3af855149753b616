"""What a migration asks of the guest whose disks it moves; `NoGuest` is the answer where none moves with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from fusemig.core.guest import GuestState


class GuestAccount(NamedTuple):
    """What is known of a guest's move; times in seconds of trio's clock."""

    runtime: str
    """What runs the guest: ``qemu`` or ``command``."""
    state: GuestState
    timeline: tuple[tuple[GuestState, float], ...]
    """Each state but the first, with the time at which it was entered."""
    error: str
    """Why the guest does not run where it may, and what to do; empty if there is nothing to say."""

    def at(self, *states: GuestState) -> float | None:
        """Return when the first of ``states`` that it came to was entered."""
        return next((time for state, time in self.timeline if state in states), None)


class MovingGuest(Protocol):
    """A guest on its way, as `OutgoingMigration` and the native hand-off lead it; the order is `core.guest`'s."""

    is_moving: bool
    """Whether there is a guest to be moved."""

    async def prepare(self) -> None:
        """Look whether the guest could move; changes nothing.

        Raises:
            FusemigError: it could not, and why.
        """

    async def bring_to_standstill(self) -> None:
        """Have the memory copied; return when the guest stands still. Passes go on meanwhile.

        Raises:
            FusemigError: it failed; `fall_back` must follow, as after any other failure.
        """

    async def load(self) -> None:
        """Have the destination hold all of the guest, standing still; the disks are proved. Raises as above."""

    def on_committed(self) -> None:
        """Note that COMMIT is about to be said: from here the source's runtime is not touched again."""

    async def run_there(self) -> None:
        """Let the guest run at the destination, which owns the disks; never fails, see `GuestAccount.error`."""

    async def fall_back(self) -> None:
        """End a move that failed: let the guest run at the source if it may. Idempotent, never fails; is shielded."""

    def account(self) -> GuestAccount | None:
        """Return what is known of the move."""


class NoGuest:
    """Only disks move."""

    is_moving = False

    async def prepare(self) -> None:
        """Do nothing, as everything here."""

    async def bring_to_standstill(self) -> None:
        """Whoever uses the disks is parked by the write gate."""

    async def load(self) -> None:
        """Nothing follows the disks."""

    def on_committed(self) -> None:
        """Nobody has to be told."""

    async def run_there(self) -> None:
        """Nobody waits there."""

    async def fall_back(self) -> None:
        """The opened gate is all."""

    def account(self) -> None:
        """There is nothing to tell."""
