"""A TCP proxy between two daemons that knows nothing of what it forwards, so that it may be TLS."""

from __future__ import annotations

import socket
import threading
from typing import Self


class Doorkeeper:
    """Stands before a destination, lets so many connections through, and can end one of them."""

    def __init__(self, uri: str, n_admitted: int) -> None:
        self._there = "127.0.0.1", int(uri.rsplit(":", 1)[1])
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"
        self.n_admitted = n_admitted
        self.ends: list[tuple[socket.socket, socket.socket]] = []
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for at in range(len(self.ends)):
            self.cut(at)

    def cut(self, at: int) -> None:
        """End one connection."""
        for end in self.ends[at]:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def _serve(self) -> None:
        movers: list[threading.Thread] = []
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                break
            if len(self.ends) >= self.n_admitted:
                near.close()
                continue
            far = socket.create_connection(self._there)
            self.ends.append((near, far))
            for pair in ((near, far), (far, near)):
                movers.append(threading.Thread(target=self._move, args=pair))
                movers[-1].start()
        for at in range(len(self.ends)):
            self.cut(at)
        for mover in movers:
            mover.join()
        for pair in self.ends:
            for end in pair:
                end.close()

    def _move(self, one: socket.socket, other: socket.socket) -> None:
        try:
            while data := one.recv(1 << 16):
                self._admit(one, len(data))
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def _admit(self, one: socket.socket, n_bytes: int) -> None:
        """Return when so much of what one end has sent may go on."""


class Sluice(Doorkeeper):
    """Lets one connection through, and of what the source sends only as much as it was told to."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri, 1)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)  # hold it back, and not take it in
        self._way = threading.Condition()
        self._n_left = 0

    def let(self, n_bytes: int) -> None:
        """Let so many more bytes through."""
        with self._way:
            self._n_left += n_bytes
            self._way.notify_all()

    def open(self) -> None:
        """Let everything through."""
        self.let(1 << 60)

    def __exit__(self, *exc: object) -> None:
        self.open()
        super().__exit__(*exc)

    def _admit(self, one: socket.socket, n_bytes: int) -> None:
        if one is self.ends[0][0]:
            with self._way:
                self._way.wait_for(lambda: self._n_left >= n_bytes)
                self._n_left -= n_bytes
