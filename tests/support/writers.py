"""A guest that writes numbered records, each durable before the next."""

from __future__ import annotations

import os
import struct
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from support.hosts import pread, wait_until

if TYPE_CHECKING:
    from pathlib import Path

RECORD = struct.Struct(">Q504x")


class RecordWriter:
    """Writes numbered records to a disk, each durable before the next, until a write fails or it is ended."""

    def __init__(self, path: Path) -> None:
        self.n_acknowledged = 0
        self._path = path
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()
        wait_until(lambda: self.n_acknowledged > 10, "the first records")

    def _write(self) -> None:
        with suppress(OSError):
            fd = os.open(self._path, os.O_WRONLY | os.O_DSYNC)
            try:
                for number in range(8000):
                    os.pwrite(fd, RECORD.pack(number + 1), number * RECORD.size)
                    self.n_acknowledged = number + 1
                    if self._is_over.is_set():
                        return
            finally:
                os.close(fd)

    def end(self) -> None:
        """End it, if it has not."""
        self._is_over.set()
        self._thread.join(40)
        assert not self._thread.is_alive()

    def check(self, path: Path) -> None:
        """See that every acknowledged record is in a file."""
        data = pread(path, self.n_acknowledged * RECORD.size)
        for number in range(self.n_acknowledged):
            assert RECORD.unpack_from(data, number * RECORD.size) == (number + 1,), number
