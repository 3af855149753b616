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
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)
        except OSError:
            return
