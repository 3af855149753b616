"""Telling a service manager how it stands: sd_notify(3) in its documented datagrams, nothing more.

``$NOTIFY_SOCKET`` names the socket, ``$WATCHDOG_USEC`` and ``$WATCHDOG_PID`` how often it wants to hear (sd_notify(3),
sd_watchdog_enabled(3)). Without the first everything here does nothing.
"""

from __future__ import annotations

import array
import os
import socket
from typing import TYPE_CHECKING, Final

import structlog

if TYPE_CHECKING:
    from collections.abc import Iterable, MutableMapping

SOCKET: Final = "NOTIFY_SOCKET"
_WATCHDOG_US: Final = "WATCHDOG_USEC"
_WATCHDOG_PID: Final = "WATCHDOG_PID"
_SEND_TIMEOUT_S: Final = 5.0

log = structlog.get_logger(__name__)


class Notifier:
    """The way to the service manager; sends from any thread."""

    def __init__(self, channel: socket.socket | None = None, watchdog_s: float | None = None) -> None:
        """Own ``channel``, a connected datagram socket; None: there is nobody to tell."""
        self._channel = channel
        self.watchdog_s = None if channel is None else watchdog_s
        """The longest time between two signs of life, in seconds; None: none are expected."""

    @property
    def is_on(self) -> bool:
        """Whether somebody listens."""
        return self._channel is not None

    def send(self, text: str, descriptors: Iterable[int] = ()) -> None:
        """Send assignments, such as ``READY=1``, one a line, with ``descriptors`` to keep; a failure ends it."""
        if self._channel is None:
            return
        rights = array.array("i", descriptors)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights.tobytes())] if rights else []
        try:
            self._channel.sendmsg([text.encode()], ancillary, socket.MSG_NOSIGNAL)
        except OSError as exc:
            self.close()
            log.warning(
                "the service manager or holder is gone: nothing that it keeps outlives this daemon any more",
                reason=exc.strerror,
            )

    def close(self) -> None:
        """Tell nobody any more; idempotent."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None


def open_notifier(environment: MutableMapping[str, str]) -> Notifier:
    """Return the way that ``environment`` tells of, which then tells no child of ours of it."""
    address = environment.pop(SOCKET, "")
    watchdog_us, watched = environment.pop(_WATCHDOG_US, ""), environment.pop(_WATCHDOG_PID, "")
    if not address:
        return Notifier()
    is_watched = watchdog_us.isdigit() and int(watchdog_us) > 0 and watched in ("", str(os.getpid()))
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    channel.settimeout(_SEND_TIMEOUT_S)
    try:
        channel.connect(f"\0{address[1:]}" if address.startswith("@") else address)
    except OSError as exc:
        channel.close()
        log.warning("the service manager cannot be told anything", socket=address, reason=exc.strerror)
        return Notifier()
    return Notifier(channel, int(watchdog_us) / 1e6 if is_watched else None)
