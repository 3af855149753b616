"""Answers: how a lane answers a request, once and on the descriptor that it was read from, and what it counts of that.

`DiskError` is answered as its errno; anything else is a bug: EIO, logged and counted.
"""

from __future__ import annotations

import errno
import os
import threading
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog

from fusemig.errors import DiskError, StateError
from fusemig.fuse import abi

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusemig.fuse.pool import SleepPool

ENDED: Final = frozenset({errno.ENODEV, errno.ENOTCONN, errno.ECONNABORTED, errno.EBADF, errno.EPERM})
"""Reading says the mount is gone: unmounted, aborted, or never made (EPERM)."""
_UNWANTED: Final = ENDED | {errno.ENOENT}
"""Answering says that nobody waits any more."""

log = structlog.get_logger()


class Answers:
    """The replies of one lane; any thread gives them."""

    def __init__(self, descriptor: int) -> None:
        """Answer on ``descriptor`` of /dev/fuse, which stays its owner's."""
        self._device = descriptor
        self.is_leaving = False
        """Whether what the pools have not done is a successor's."""
        self._lock = threading.Lock()
        # Guarded by _lock:
        self._counts = dict.fromkeys(("forwarded", "errors", "bugs", "held", "interrupted", "handed_over"), 0)

    def count(self, name: str) -> None:
        """Count something that `LaneStatistics` names."""
        with self._lock:
            self._counts[name] += 1

    def counts(self) -> dict[str, int]:
        """Return what was counted, by name."""
        with self._lock:
            return dict(self._counts)

    def give(self, reply: bytes | bytearray) -> None:
        """Answer, unless nobody waits any more."""
        try:
            os.write(self._device, reply)
        except OSError as exc:
            if exc.errno not in _UNWANTED:
                raise

    def give_held(self, unique: int, reply: bytes) -> None:
        """Answer what was held, on whichever thread; never raises."""
        self.guard(unique, partial(self.give, reply))

    def give_error(self, unique: int, code: int) -> None:
        """Answer with an errno."""
        self.count("errors")
        self.give(abi.error_reply(unique, code))

    def give_exception(self, unique: int, exc: Exception) -> None:
        """Answer a request that raised; never raises itself."""
        if self.is_leaving and isinstance(exc, StateError):
            return  # its pool has ended before it was done: it is sent to the successor
        try:
            if isinstance(exc, DiskError):
                self.give_error(unique, exc.errno)
            elif not (isinstance(exc, OSError) and exc.errno in _UNWANTED):  # it was the answer that failed
                self.count("bugs")
                log.error("request failed by a bug, answered EIO", exc_info=exc)
                self.give_error(unique, errno.EIO)
        except Exception as second:
            log.error("a request could not be answered", error=repr(second))

    def guard(self, unique: int, request: Callable[[], None]) -> None:
        """Run what answers a request; if it raises, answer for it."""
        try:
            request()
        except Exception as exc:
            self.give_exception(unique, exc)

    def hand_over(self, pool: SleepPool, unique: int, request: Callable[[], None]) -> None:
        """Have a pool run what answers a request."""
        self.count("handed_over")
        pool.submit(partial(self.guard, unique, request))
