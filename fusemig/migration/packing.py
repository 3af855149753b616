"""PackingWatch: tells the rule of compression how long a while of sending took, and how much of it was waiting."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fusemig.core.compression import Packer


class PackingWatch:
    """One while, from its construction to `end`."""

    def __init__(self, packer: Packer | None, sent_bytes: int) -> None:
        """Begin; ``sent_bytes`` of the disk were sent so far."""
        self._packer = packer
        self._sent_bytes = sent_bytes
        self._began_at = trio.current_time()
        self._waited_s = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count what happens inside as waiting for the link."""
        since = trio.current_time()
        yield
        self._waited_s += trio.current_time() - since

    def end(self, sent_bytes: int) -> None:
        """Tell what the while brought."""
        if self._packer is not None:
            seconds = trio.current_time() - self._began_at
            self._packer.rule.note_time(seconds, self._waited_s, sent_bytes - self._sent_bytes)
