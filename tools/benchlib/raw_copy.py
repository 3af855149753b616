"""The limit: sendfile(2) into a socket, and a loop of recv and pwrite at the other end; nothing is verified.

Run as a program: ``python -m benchlib.raw_copy receive HOST PORT PATH`` and ``... send HOST PORT PATH``; the sender
prints the seconds from its connecting to the receiver's word that everything is written.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from typing import Final

_STEP: Final = 1 << 20


def _receive(host: str, port: int, path: str) -> None:
    buffer = memoryview(bytearray(_STEP))
    with socket.create_server((host, port)) as listener:
        stream, _ = listener.accept()
        with stream:
            fd = os.open(path, os.O_WRONLY)
            offset = 0
            while n := stream.recv_into(buffer):
                offset += os.pwrite(fd, buffer[:n], offset)
            os.close(fd)
            stream.sendall(b"!")


def _send(host: str, port: int, path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    size = os.fstat(fd).st_size
    began = time.monotonic()
    with socket.create_connection((host, port), timeout=30) as stream:
        stream.settimeout(None)
        if stream.getpeername()[0].startswith("127."):
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")  # as fusemig does within a host
        offset = 0
        while offset < size:
            offset += os.sendfile(stream.fileno(), fd, offset, min(size - offset, 16 * _STEP))
        stream.shutdown(socket.SHUT_WR)
        stream.recv(1)
    print(time.monotonic() - began)
    os.close(fd)


if __name__ == "__main__":
    role, host_, port_, path_ = sys.argv[1:]
    (_receive if role == "receive" else _send)(host_, int(port_), path_)
