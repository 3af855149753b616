"""Keeper: what outlives a daemon, without a holder."""

from __future__ import annotations

import os

from fusemig.succession.fdstore import FdStore


class Keeper(FdStore):
    """A store of a daemon with a mount, of which the store of its successor can be made."""

    def __init__(self, inherited: dict[str, int] | None = None) -> None:
        """Keep what is ``inherited`` for the next one too."""
        super().__init__(inherited)
        self.kept: dict[str, int] = {name: os.dup(fd) for name, fd in (inherited or {}).items()}
        self.mounted()

    @property
    def is_on(self) -> bool:
        """Whatever is kept outlives the daemon."""
        return True

    def keep(self, name: str, descriptor: int) -> None:
        """Keep a duplicate."""
        self._own.add(name)
        self.kept[name] = os.dup(descriptor)

    def forget(self, name: str) -> None:
        """Close the duplicate."""
        os.close(self.kept.pop(name))

    def successor(self) -> Keeper:
        """Return the store of the daemon after one that is killed now, which closes nothing in order."""
        heirs, self.kept = self.kept, {name: os.dup(fd) for name, fd in self.kept.items()}
        return Keeper(heirs)
