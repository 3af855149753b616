"""A stand-in for the ``trio`` that pyfuse3 sees, so that a busy mount takes no trio step per request.

pyfuse3 waits for its descriptor through its module attribute ``pyfuse3.trio``, the one that `pyfuse3.asyncio` swaps
too. While `polling_trio` is entered, two things differ from trio itself:

- ``lowlevel.wait_readable`` asks the kernel first, which costs half a microsecond, and really waits only when nothing
  is there. It yields to the other tasks after every `SLICE_REQUESTS` requests or `SLICE_S` seconds, whichever comes
  first, so that the control socket and a migration are never starved by a busy guest.
- ``Lock`` takes no checkpoint when it is free, and whoever runs may take it before the one that waits. pyfuse3 keeps
  one spare reader; a fair lock would hand over to it, and so change tasks, on every request. The spare is woken at
  each release, so it takes over as soon as the reader is held up in a handler.

Before it returns, ``wait_readable`` has always polled: pyfuse3 then reads the blocking descriptor on the event loop,
and a request that its caller took back while other tasks ran would leave that read, and all of us, asleep.

Where pyfuse3 has no such attribute, or somebody else swapped it, nothing is changed: pyfuse3 works as it comes.
"""

from __future__ import annotations

import select
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import pyfuse3
import trio
from trio.lowlevel import ParkingLot

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

SLICE_REQUESTS: Final = 64
SLICE_S: Final = 0.005


class UnfairLock:
    """A lock for ``async with`` that the running task may take again before the one that waits."""

    def __init__(self) -> None:
        """Make a free lock."""
        self._is_held = False
        self._waiting = ParkingLot()

    async def __aenter__(self) -> None:
        while self._is_held:
            await self._waiting.park()
        self._is_held = True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_held = False
        self._waiting.unpark()


class PollingLowlevel:
    """``trio.lowlevel`` with a ``wait_readable`` that polls before it waits."""

    def __init__(self) -> None:
        """Start a slice."""
        self._fd = -1
        self._poll = select.poll()
        self._n_requests = 0
        self._slice_end_s = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel, name)

    async def wait_readable(self, fd: int) -> None:
        """Return when ``fd`` is readable, which was true a moment before; a checkpoint only once per slice."""
        if fd != self._fd:
            self._poll = select.poll()
            self._poll.register(fd, select.POLLIN)
            self._fd = fd
        self._n_requests += 1
        if self._n_requests >= SLICE_REQUESTS or time.monotonic() > self._slice_end_s:
            await trio.lowlevel.checkpoint()
            self._start_slice()
        while not self._poll.poll(0):
            await trio.lowlevel.wait_readable(fd)
            self._start_slice()

    def _start_slice(self) -> None:
        self._n_requests = 0
        self._slice_end_s = time.monotonic() + SLICE_S


class PollingTrio:
    """``trio`` with the two differences."""

    Lock = UnfairLock

    def __init__(self) -> None:
        """Make one for one mount."""
        self.lowlevel = PollingLowlevel()

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)


@contextmanager
def polling_trio() -> Iterator[bool]:
    """Give pyfuse3 the stand-in for the time of the block; yield whether that was possible."""
    if getattr(pyfuse3, "trio", None) is not trio:
        yield False
        return
    module: Any = pyfuse3
    module.trio = PollingTrio()
    try:
        yield True
    finally:
        module.trio = trio
