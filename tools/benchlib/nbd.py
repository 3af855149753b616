"""NbdDisk: a disk behind an NBD server on a Unix socket, one request at a time.

The protocol is that of doc/proto.md of the NetworkBlockDevice project: fixed newstyle handshake with
NBD_OPT_EXPORT_NAME, simple replies. It lets the same guest write to QEMU as to a mount.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import Final

_MAGIC: Final = b"NBDMAGICIHAVEOPT"
_FIXED_NEWSTYLE_NO_ZEROES: Final = 3
_OPT_EXPORT_NAME: Final = 1
_REQUEST: Final = struct.Struct(">IHHQQI")
_REQUEST_MAGIC: Final = 0x25609513
_REPLY: Final = struct.Struct(">IIQ")
_REPLY_MAGIC: Final = 0x67446698
_CMD_WRITE: Final = 1
_CMD_DISCONNECT: Final = 2


class NbdDisk:
    """A connected export."""

    def __init__(self, socket_path: str, export: str) -> None:
        """Connect; raises OSError."""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(20)
        self._socket.connect(socket_path)
        if self._read(18)[:16] != _MAGIC:
            raise ConnectionError("not an NBD server")
        name = export.encode()
        self._socket.sendall(struct.pack(">I", _FIXED_NEWSTYLE_NO_ZEROES))
        self._socket.sendall(_MAGIC[8:] + struct.pack(">II", _OPT_EXPORT_NAME, len(name)) + name)
        self.size: int = struct.unpack(">QH", self._read(10))[0]

    def _read(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            piece = self._socket.recv(length - len(data))
            if not piece:
                raise ConnectionError("the NBD server hung up")
            data += piece
        return data

    def pwrite(self, data: bytes, offset: int) -> None:
        """Write; raises OSError with the server's errno."""
        self._socket.sendmsg([_REQUEST.pack(_REQUEST_MAGIC, 0, _CMD_WRITE, 0, offset, len(data)), data])
        magic, error, _ = _REPLY.unpack(self._read(_REPLY.size))
        if magic != _REPLY_MAGIC:
            raise ConnectionError("malformed NBD reply")
        if error:
            raise OSError(error, os.strerror(error))

    def close(self) -> None:
        """Say goodbye."""
        with self._socket:
            self._socket.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, _CMD_DISCONNECT, 0, 0, 0))
