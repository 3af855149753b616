"""A guest that writes numbered records, syncs each one and keeps an account of what was acknowledged."""

from __future__ import annotations

import os
import struct
import threading
from typing import TYPE_CHECKING
from zlib import crc32

if TYPE_CHECKING:
    from pathlib import Path

SLOT = 4096
_HEAD = struct.Struct("<QQI")


class RecordWriter:
    """Writes to one open file in a thread of its own until the disk refuses."""

    def __init__(self, file: Path, n_slots: int, first_slot: int = 0) -> None:
        """Write to ``n_slots`` slots from ``first_slot`` on."""
        self.n_slots = n_slots
        self.first_slot = first_slot
        self.acknowledged: dict[int, int] = {}
        """The newest record of each slot that was written and synced."""
        self.tried: dict[int, int] = {}
        """The newest record of each slot that was begun."""
        self.error: OSError | None = None
        self._file = file
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            fd = os.open(self._file, os.O_RDWR)
            try:
                number = 0
                while not self._stop.is_set():
                    number += 1
                    slot = self.first_slot + number * 7 % self.n_slots
                    self.tried[slot] = number
                    os.pwrite(fd, record(slot, number), slot * SLOT)
                    os.fdatasync(fd)
                    self.acknowledged[slot] = number
            finally:
                os.close(fd)
        except OSError as exc:
            self.error = exc

    def stop(self) -> None:
        """End it; a write that is parked for ever is a failure."""
        self._stop.set()
        self._thread.join(40)
        assert not self._thread.is_alive(), "a guest's write was never answered"

    def lost(self, image: Path) -> list[str]:
        """Return what is wrong with an image that should hold every acknowledged record."""
        wrong = []
        with image.open("rb") as file:
            for slot, acknowledged in self.acknowledged.items():
                file.seek(slot * SLOT)
                data = file.read(SLOT)
                at, number, _ = _HEAD.unpack_from(data)
                if data != record(at, number) or at != slot:
                    wrong.append(f"slot {slot} holds no whole record")
                elif not acknowledged <= number <= self.tried[slot]:
                    wrong.append(f"slot {slot} holds record {number}; {acknowledged} was acknowledged")
        return wrong


def record(slot: int, number: int) -> bytes:
    """Return a record that cannot be mistaken for another one."""
    body = struct.pack("<QQ", slot, number) * ((SLOT - _HEAD.size) // 16)
    data = _HEAD.pack(slot, number, crc32(body)) + body
    return data.ljust(SLOT, b"\1")
