"""StateMemory: the state document in memory that outlives the process, a memfd in the store of descriptors."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from fusemig.errors import StateError
from fusemig.handover.state import SLOT_SIZE, decode_state, encode_slot, encode_state, newest, slot_of

if TYPE_CHECKING:
    from fusemig.handover.state import State

NAME: Final = "state"
"""Of the descriptor in the store."""


class StateMemory:
    """Two slots of a memfd, of which one always holds a whole document once there was one."""

    def __init__(self, fd: int) -> None:
        """Own a descriptor.

        Raises:
            StateError: what is in it is damaged.
        """
        self.fd = fd
        self._generation, self._document = newest([os.pread(fd, SLOT_SIZE, at) for at in (0, SLOT_SIZE)])

    @classmethod
    def create(cls) -> StateMemory:
        """Make a new one, empty, with all the memory that it will ever need.

        Raises:
            StateError: there is no memory for it.
        """
        try:
            fd = os.memfd_create("fusemig-state", os.MFD_CLOEXEC)
            os.posix_fallocate(fd, 0, 2 * SLOT_SIZE)
        except OSError as exc:
            raise StateError(f"no memory for what a successor must know: {exc.strerror}") from exc
        return cls(fd)

    @property
    def document(self) -> bytes:
        """What was written last; empty if nothing was."""
        return self._document

    def read(self) -> State | None:
        """Return what was written last.

        Raises:
            StateError: it is of a version that is not known here, or nothing that can be read.
        """
        return decode_state(self._document) if self._document else None

    def write(self, state: State) -> None:
        """Replace the document, unless it says that already; whenever this process dies, one of the two is whole.

        Raises:
            StateError: it is too large; the former one counts.
        """
        document = encode_state(state)
        if document == self._document:
            return
        generation = self._generation + 1
        slot = encode_slot(document, generation)
        at = slot_of(generation)
        done = 0
        while done < len(slot):
            done += os.pwrite(self.fd, slot[done:], at + done)
        self._generation, self._document = generation, document

    def close(self) -> None:
        """Close the descriptor; others of the same memory stay."""
        os.close(self.fd)
