"""Settings: what a run was asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

MIB: Final = 1 << 20
GIB: Final = 1 << 30
MEMORY: Final = Path("/dev/shm")  # noqa: S108  (the tmpfs rows mean this file system)

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """The command line, read."""

    asked_rounds: int | None
    """Rounds of every row, if somebody said how many."""
    quick: bool
    directory: Path
    """Where the rows on a real file system keep their images."""
    fusemig: tuple[str, ...]
    """The command to measure."""
    lanes: tuple[str | None, ...]
    """Values for `serve --lane`, each a side of its own; None passes no option."""

    def pick(self, full: T, quick: T) -> T:
        """Return the value for this kind of run."""
        return quick if self.quick else full

    def rounds(self, full: int = 5, quick: int = 2) -> int:
        """Return how many rounds a row makes: as many as were asked for, else its own number for this kind of run."""
        return self.asked_rounds or self.pick(full, quick)
