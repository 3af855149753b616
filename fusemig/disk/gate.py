"""WriteGate: whether guests may write now, and the writes and replies that wait for it.

A closed gate refuses a write with `GateClosedError`, and nothing has happened to it: the lane *parks* it, that is,
keeps the data and asks `park` for a call when the gate has changed. A parked write is data held for a later reply,
never a blocked thread. Whoever closes the gate owes every parked write an answer before a deadline.

A migration that guests write faster than it can follow lays a *brake* on the disk (`fusemig.core.admission`): an open
gate then refuses a write until its turn, which the lane parks as it does at a closed one, and `hold_reply` keeps the
answer of a write that was made until the destination has it.

A disk that is *held* (QMP's `stop`) keeps its gate closed where it would be open. That is a second, independent wish:
no migration that thaws, takes over or hands off undoes it, and lifting it never opens a gate that is closed or
read-only for another reason.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from fusemig.disk.regime import Gate
from fusemig.errors import DiskError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusemig.core.admission import Brake
    from fusemig.disk.regime import Admission
    from fusemig.errors import GateClosedError

MAX_PARKED_WRITES: Final = 1024
"""Parked writes per disk; further ones are answered EAGAIN so that one frozen disk cannot starve the others."""


class WriteGate:
    """The wishes that make a disk's gate, and who waits for it."""

    def __init__(self, name: str, admission: Admission) -> None:
        """Decide for the disk ``name``; the gate is as ``admission`` has it."""
        self._name = name
        self._admission = admission
        self._lock = admission.lock
        # Guarded by _lock:
        self._unheld = admission.gate
        """What the gate is where the disk is not held."""
        self._is_held = False
        self._parked: list[Callable[[], None]] = []
        self.holds_replies = False
        """Whether `hold_reply` is to be asked before a write is answered; read without the lock."""

    # For the lanes

    def park(self, resume: Callable[[], None], refused: GateClosedError) -> bool:
        """Have ``resume`` called once when the gate changes, or at the write's turn; False if it can be made already.

        ``resume`` is called on the thread that changes the gate or gives the turn, must be quick and must not raise.
        The caller then makes its write again, as if it were new. A write that is answered before that gives its place
        back: `unpark`.

        Args:
            resume: is called.
            refused: what the write was refused with, which says where it goes.

        Raises:
            DiskError: EAGAIN, too many writes are parked already.
        """
        with self._lock:
            if len(self._parked) + self.paced_writes >= MAX_PARKED_WRITES:
                raise DiskError(errno.EAGAIN, f"disk '{self._name}' has {MAX_PARKED_WRITES} parked writes")
            gate, brake = self._admission.gate, self._admission.brake
            if gate is Gate.CLOSED:
                self._parked.append(resume)
                return True
            if gate is not Gate.OPEN or brake is None:
                return False
            if not brake.wait(resume, refused.offset, refused.length):
                return False
        self._admission.on_waiting()
        return True

    def unpark(self, resume: Callable[[], None]) -> None:
        """Give the place of a parked write back: it was answered, ``resume`` need not be called any more.

        The gate may have changed meanwhile; then ``resume`` has been called, or is about to be.
        """
        with self._lock:
            if resume in self._parked:
                self._parked.remove(resume)
            elif self._admission.brake is not None:
                self._admission.brake.forget(resume)

    def hold_reply(self, offset: int, length: int, answer: Callable[[], None]) -> bool:
        """Have ``answer`` called when a write that has ended may be answered; False if it may be now.

        ``answer`` is called as `park`'s ``resume`` is, and must neither wait nor raise.
        """
        with self._lock:
            brake = self._admission.brake
            if brake is None or not brake.hold(offset, length, answer):
                return False
        self._admission.on_waiting()
        return True

    # For the migration and the daemon

    @property
    def paced_writes(self) -> int:
        """How many writes wait for their turn."""
        brake = self._admission.brake
        return 0 if brake is None else brake.n_waiting

    @property
    def parked_writes(self) -> int:
        """How many writes wait for the gate."""
        return len(self._parked)

    @property
    def is_frozen(self) -> bool:
        """Whether the gate is closed for a switchover, held or not."""
        return self._unheld is Gate.CLOSED

    def set(self, gate: Gate) -> None:
        """Change the gate and have every parked write tried again.

        Once the gate is closed no write is admitted; those admitted before may still be running: `wait_drained`. Of a
        disk that is held, an open gate is closed until that is lifted.
        """
        with self._lock:
            self._unheld = gate
            parked = self._change()
        for resume in parked:
            resume()

    def set_held(self, is_held: bool) -> None:
        """Keep the gate from being open, or lift that."""
        with self._lock:
            self._is_held = is_held
            parked = self._change()
        for resume in parked:
            resume()

    def _change(self) -> list[Callable[[], None]]:
        """Bring the gate in line with both wishes; return the parked writes that are to be tried again."""
        is_stopped = self._is_held and self._unheld is Gate.OPEN
        gate = Gate.CLOSED if is_stopped else self._unheld
        self._admission.set_gate(gate, why_closed="stopped" if is_stopped else "frozen")
        if gate is Gate.CLOSED:
            return []
        parked, self._parked = self._parked, []
        if gate is Gate.READ_ONLY and self._admission.brake is not None:
            parked += self._admission.brake.release_waiting()
        return parked

    def lay_brake(self, brake: Brake | None, on_waiting: Callable[[], None] = lambda: None) -> None:
        """Have a brake decide from now on which writes are admitted, or none; the one before is to be released."""
        with self._lock:
            self._admission.lay_brake(brake, on_waiting)
            self.holds_replies = brake is not None and brake.is_blocking
