"""A guest that writes 4 KiB every millisecond, follows its disk to the destination, and checks what was acknowledged.

Run as a program: ``python -m benchlib.paced SOURCE DESTINATION RECORD SECONDS_AFTER``. It writes numbered blocks round
robin into the first 4 MiB; when the source answers EROFS it goes on at the destination, trying until the write is
taken, for SECONDS_AFTER more. Then it reads every block back from the destination: each must hold the last number
acknowledged. RECORD gets one JSON object; RECORD.ready appears after the first acknowledgement.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import sys
import time
from pathlib import Path
from typing import Final

BLOCK: Final = 4096
N_BLOCKS: Final = 1024
REGION: Final = BLOCK * N_BLOCKS
"""What this guest writes: the first bytes of the disk."""
_PERIOD_S: Final = 0.001
_MAX_S: Final = 60.0
_MAX_SWITCH_S: Final = 10.0


class _Guest:
    def __init__(self, source: str, destination: str) -> None:
        self._source = os.open(source, os.O_RDWR | os.O_DIRECT)
        self._destination = os.open(destination, os.O_RDWR | os.O_DIRECT)
        self._buffer = mmap.mmap(-1, BLOCK)
        self._acknowledged = [0] * N_BLOCKS
        self._number = 0
        self.moved_at = 0.0
        self.longest_gap_s = 0.0
        self._last = 0.0

    def write(self, fd: int) -> None:
        number = self._number + 1
        slot = number % N_BLOCKS
        self._buffer[:] = number.to_bytes(8, "little") * (BLOCK // 8)
        os.pwrite(fd, self._buffer, slot * BLOCK)
        now = time.monotonic()
        if self._last:
            self.longest_gap_s = max(self.longest_gap_s, now - self._last)
        self._last, self._number, self._acknowledged[slot] = now, number, number

    def run(self, ready: Path, seconds_after: float) -> None:
        fd, due = self._source, time.monotonic()
        give_up = due + _MAX_S
        while True:
            now = time.monotonic()
            if now > (self.moved_at + seconds_after if self.moved_at else give_up):
                return
            try:
                self.write(fd)
            except OSError as error:
                if error.errno != errno.EROFS or self.moved_at:
                    raise
                self._move()
                fd, due = self._destination, time.monotonic()
            if self._number == 1:
                ready.touch()
            due = max(due + _PERIOD_S, time.monotonic() - _PERIOD_S)
            time.sleep(max(0.0, due - time.monotonic()))

    def _move(self) -> None:
        deadline = time.monotonic() + _MAX_SWITCH_S
        while True:
            try:
                self.write(self._destination)
            except OSError as error:
                if error.errno != errno.EROFS or time.monotonic() > deadline:
                    raise
                time.sleep(0.0002)
            else:
                self.moved_at = time.monotonic()
                return

    def lost(self) -> int:
        """Return how many blocks do not hold what was acknowledged last."""
        n_lost = 0
        for slot, number in enumerate(self._acknowledged):
            if number:
                os.preadv(self._destination, [self._buffer], slot * BLOCK)
                n_lost += self._buffer[:] != number.to_bytes(8, "little") * (BLOCK // 8)
        return n_lost


def main() -> None:
    """Be the guest."""
    source, destination, record, seconds_after = sys.argv[1:]
    guest = _Guest(source, destination)
    guest.run(Path(f"{record}.ready"), float(seconds_after))
    result = {"gap_s": guest.longest_gap_s, "moved": bool(guest.moved_at)}
    result["lost"] = guest.lost() if guest.moved_at else 0
    Path(record).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
