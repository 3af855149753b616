"""A guest that writes 4 KiB every millisecond to one disk, and says how long it waited at most.

Run as a program: ``python -m benchlib.steady FILE RECORD``. It writes with O_DIRECT into the first 4 MiB until
RECORD.stop is there; RECORD.ready appears when it has written for `WARM_UP_S`, and pauses count from then on. RECORD
gets one JSON object: ``gap_s``, the longest time between the ends of two writes, and ``n_writes``.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
from pathlib import Path
from typing import Final

BLOCK: Final = 4096
N_BLOCKS: Final = 1024
WARM_UP_S: Final = 0.5
_PERIOD_S: Final = 0.001
_MAX_S: Final = 60.0


def main() -> None:
    """Be the guest."""
    file, record = sys.argv[1:]
    stop, ready = Path(f"{record}.stop"), Path(f"{record}.ready")
    fd = os.open(file, os.O_WRONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, BLOCK)
    begun = last = due = time.monotonic()
    longest_s, n_writes, is_ready = 0.0, 0, False
    while last < begun + _MAX_S and not (n_writes % 16 == 0 and stop.exists()):
        os.pwrite(fd, buffer, n_writes % N_BLOCKS * BLOCK)
        now = time.monotonic()
        if is_ready:
            longest_s = max(longest_s, now - last)
        elif now > begun + WARM_UP_S:
            ready.touch()
            is_ready, now = True, time.monotonic()
        last, n_writes = now, n_writes + 1
        due = max(due + _PERIOD_S, now - _PERIOD_S)
        time.sleep(max(0.0, due - now))
    Path(record).write_text(json.dumps({"gap_s": longest_s, "n_writes": n_writes}))


if __name__ == "__main__":
    main()
