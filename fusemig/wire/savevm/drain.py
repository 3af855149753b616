"""Drain: whether bytes that nobody can parse end as a migration stream does."""

from __future__ import annotations

import re
import struct
from typing import Final

from fusemig.wire.savevm.elements import EOF, FOOTER

_U32: Final = struct.Struct(">I")
_TAIL: Final = re.compile(rb"(?=\x7e.{4}\x00\x06(.{4})\{)", re.DOTALL)
"""The last footer, EOF and the head of a VMDESC: what the end of the device state looks like."""
_TAIL_SIZE: Final = 5 + 1 + 5 + 1
_BARE_TAIL_SIZE: Final = 5 + 1


class Drain:
    """Watches bytes that nobody can parse for the end of the stream."""

    def __init__(self) -> None:
        self.n_bytes = 0
        self._last = b""
        self._described_end = -1

    def take(self, data: memoryview) -> None:
        """Take note of more bytes."""
        seen = self._last + bytes(data)
        base = self.n_bytes - len(self._last)
        self.n_bytes += len(data)
        for match in _TAIL.finditer(seen):
            # Device state may look like the end by chance; what looks like it later is nearer to the truth.
            self._described_end = base + match.start() + _TAIL_SIZE - 1 + _U32.unpack(match[1])[0]
        self._last = seen[-(_TAIL_SIZE - 1) :]

    @property
    def may_end(self) -> bool:
        """Whether the bytes so far end as a stream does."""
        if self.n_bytes == self._described_end:
            return True
        bare = self._last[-_BARE_TAIL_SIZE:]
        return len(bare) == _BARE_TAIL_SIZE and bare[0] == FOOTER and bare[-1] == EOF
