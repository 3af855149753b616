"""What an image is like from outside: a stamp that changes whenever the file does.

It is made of the inode, the size and the times of change, so it costs one call and no read. It shows every write
through the kernel, also with the times set back, since that changes ctime. It shows nothing of a block device, nor of a
file system that was changed while it was not mounted: where no stamp can be had it is empty, and equal to none.
"""

from __future__ import annotations

import stat
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

SETTLE_NS: Final = 20_000_000
"""A file that changed so lately may change again with the same times: the kernel's clock ticks every 1 to 10 ms."""


def stamp_of(found: os.stat_result) -> str:
    """Return the stamp of a file, or nothing where there is none."""
    if not stat.S_ISREG(found.st_mode):
        return ""
    return f"{found.st_ino}:{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}"


def settled_stamp(stat_file: Callable[[], os.stat_result]) -> str:
    """Return the stamp of a file that nobody of us writes any more, once a later write would change it.

    Sleeps for up to `SETTLE_NS`; returns nothing for a file whose times lie in the future.
    """
    age_ns = time.time_ns() - stat_file().st_ctime_ns
    if age_ns < SETTLE_NS:
        time.sleep((SETTLE_NS - max(age_ns, 0)) / 1e9)
    found = stat_file()
    return stamp_of(found) if time.time_ns() - found.st_ctime_ns >= SETTLE_NS else ""
