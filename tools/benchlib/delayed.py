"""A link with a delay: two TUN devices, and between them a program that holds each packet for a while.

Run as a program: ``python -m benchlib.delayed DEVICE DEVICE SECONDS``. It makes the devices where it runs, and whoever
started it moves them to their namespaces; they go with it. There is no loss and no limit but what one thread of Python
carries, about 30,000 packets a second here; netem would be better, and not every kernel has it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque
from contextlib import suppress
from typing import Final

_TUNSETIFF: Final = 0x400454CA  # linux/if_tun.h
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_PACKET_BYTES: Final = 65536
_BATCH: Final = 64
"""Packets read before others are looked at whose time has come."""
_NOT_UP_S: Final = 0.01
"""How long to wait before looking again at a device that nobody has set up yet."""


def _make_device(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))  # struct ifreq
    return fd


class _Way:
    """One direction."""

    def __init__(self, source: int, destination: int, delay_s: float) -> None:
        self.source = source
        self._destination = destination
        self._delay_s = delay_s
        self._held: deque[tuple[float, bytes]] = deque()

    def receive(self) -> None:
        """Take what has come."""
        with suppress(BlockingIOError):
            for _ in range(_BATCH):
                self._held.append((time.monotonic() + self._delay_s, os.read(self.source, _PACKET_BYTES)))

    def deliver(self) -> None:
        """Hand over what was held for long enough; as on any link, a packet that finds no room is lost."""
        now = time.monotonic()
        while self._held and self._held[0][0] <= now:
            with suppress(BlockingIOError):
                os.write(self._destination, self._held.popleft()[1])

    def wait_s(self) -> float:
        """Return how long nothing has to be handed over."""
        return max(0.0, self._held[0][0] - time.monotonic()) if self._held else 1.0


def main() -> None:
    """Carry packets until killed."""
    first, second = map(_make_device, sys.argv[1:3])
    delay_s = float(sys.argv[3])
    ways = _Way(first, second, delay_s), _Way(second, first, delay_s)
    poll = select.poll()
    for way in ways:
        poll.register(way.source, select.POLLIN)
    while True:
        events = dict(poll.poll(1000 * min(way.wait_s() for way in ways)))
        if any(event & select.POLLERR for event in events.values()):
            time.sleep(_NOT_UP_S)
            continue
        try:
            for way in ways:
                if way.source in events:
                    way.receive()
                way.deliver()
        except OSError as error:
            if error.errno != errno.EIO:  # one end is up, and the other one not yet
                raise


if __name__ == "__main__":
    main()
