"""A stand-in for the service manager that a daemon notifies."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class Manager:
    """A service manager's notification socket, which is read at once: the kernel keeps ten messages, and no more."""

    def __init__(self, path: Path) -> None:
        """Listen."""
        self.path = path
        self.messages: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        path.chmod(0o666)  # daemons of other users tell it, too
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        with suppress(OSError):
            while message := self._socket.recv(4096):
                self.messages.append(message.decode())

    def has(self, begin: str) -> bool:
        """Tell whether a message that begins so has come by now."""
        return any(message.startswith(begin) for message in list(self.messages))

    def close(self) -> None:
        """Stop listening."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(40)
        self._socket.close()
