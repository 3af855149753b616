"""A stand-in for the service manager that a daemon notifies."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class Manager:
    """A service manager's notification socket."""

    def __init__(self, path: Path) -> None:
        """Listen."""
        self.path = path
        self.messages: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        path.chmod(0o666)  # daemons of other users tell it, too
        self._socket.settimeout(0.01)

    def has(self, begin: str) -> bool:
        """Tell whether a message that begins so has come by now."""
        try:
            while True:
                self.messages.append(self._socket.recv(4096).decode())
        except TimeoutError:
            return any(message.startswith(begin) for message in self.messages)

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()
