"""EpochFile: the durable word on who may write an image.

It lies beside the image as ``IMAGE.fusemig`` (or in ``--state-dir``). Only migrations write it: an image without
one has never taken part in any and belongs to whoever opens it. Layout: two slots of 4 KiB, each one line of JSON
padded with spaces; a write goes to the older slot and is followed by fdatasync, so a torn write leaves the other slot
and no rename is needed at switchover. The valid slot with the higher counter counts.

    state        meaning                                                may guests write?
    owner        this side owns the disk in `epoch`                     yes
    incoming     a destination's image, incomplete                      no: `serve --incoming` only
    prepared     a destination's image, complete, not yet given         no: `serve --incoming` only
    handed-off   a source that said COMMIT and knows no more            no, until resolved
    released     a source whose disk lives elsewhere now                no
"""

from __future__ import annotations

import os
from enum import Enum
from typing import TYPE_CHECKING, Final

import msgspec
from xxhash import xxh3_64_hexdigest

from fusemig.errors import ConfigError, StateError

if TYPE_CHECKING:
    from pathlib import Path

_SLOT_SIZE: Final = 4096
_VERSION: Final = 1


class Ownership(Enum):
    """Whose the disk is, as far as this side knows; see the module's table."""

    OWNER = "owner"
    INCOMING = "incoming"
    PREPARED = "prepared"
    HANDED_OFF = "handed-off"
    RELEASED = "released"


class EpochRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What an epoch file says."""

    state: Ownership
    image_id: str
    """Names the disk, wherever it lives; given by the first source."""
    epoch: int
    """Counts hand-offs of this disk: 0 where it was born."""
    session: str = ""
    """The migration that wrote this record."""
    peer: str = ""
    """Where that migration went to or came from, for people."""
    version: int = _VERSION


class _Slot(msgspec.Struct, frozen=True):
    counter: int
    check: str
    record: msgspec.Raw


class _Versioned(msgspec.Struct, frozen=True):
    """All that a record of any version has to have."""

    version: int = _VERSION


class _LaterVersionError(Exception):
    """A whole slot, written by a later version."""


class EpochFile:
    """Reads and writes one image's record; calls sleep (fdatasync)."""

    def __init__(self, path: Path) -> None:
        """Read ``path``, which need not exist.

        Raises:
            ConfigError: it cannot be read, is damaged in both slots, or was written by a later version.
        """
        self.path = path
        self.record: EpochRecord | None = None
        self._counter = 0
        self._read()

    def _read(self) -> None:
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                content = os.read(fd, 2 * _SLOT_SIZE)
            finally:
                os.close(fd)
        except FileNotFoundError:
            return
        except OSError as exc:
            raise ConfigError(f"cannot read the epoch file {self.path}: {exc.strerror}") from exc
        try:
            slots = [_parse(content[at : at + _SLOT_SIZE]) for at in (0, _SLOT_SIZE)]
        except _LaterVersionError as exc:
            raise ConfigError(
                f"the epoch file {self.path} was written by a later version of fusemig; upgrade first"
            ) from exc
        valid = [slot for slot in slots if slot is not None]
        if not valid:
            if not content.strip(b" \n\0"):
                return  # created and never written
            raise ConfigError(
                f"the epoch file {self.path} is damaged, so who owns the disk is not known here; "
                "find out which side wrote last, then remove the file on that side"
            )
        self._counter, self.record = max(valid, key=lambda slot: slot[0])

    def write(self, record: EpochRecord) -> None:
        """Make ``record`` durable; on return it is.

        Raises:
            StateError: it could not be made durable; the former record counts.
        """
        counter = self._counter + 1
        raw = msgspec.json.encode(record)
        line = msgspec.json.encode(_Slot(counter, xxh3_64_hexdigest(raw, seed=counter), msgspec.Raw(raw)))
        slot = line.ljust(_SLOT_SIZE - 1) + b"\n"
        assert len(slot) == _SLOT_SIZE
        try:
            is_new = not self.path.exists()
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                if is_new:
                    _pwrite(fd, b"\n".rjust(_SLOT_SIZE) * 2, 0)
                _pwrite(fd, slot, (counter % 2) * _SLOT_SIZE)
                os.fdatasync(fd)
            finally:
                os.close(fd)
            if self.record is None:  # also after a first try that left the file behind
                _sync_directory(self.path.parent)
        except OSError as exc:
            raise StateError(
                f"cannot write the epoch file {self.path}: {exc.strerror}; free space there first"
            ) from exc
        self._counter = counter
        self.record = record


def _parse(slot: bytes) -> tuple[int, EpochRecord] | None:
    try:
        parsed = msgspec.json.decode(slot, type=_Slot)
        if xxh3_64_hexdigest(bytes(parsed.record), seed=parsed.counter) != parsed.check:
            return None
        # Before the rest, which may have words in it that are not known here.
        if msgspec.json.decode(parsed.record, type=_Versioned).version > _VERSION:
            raise _LaterVersionError
        return parsed.counter, msgspec.json.decode(parsed.record, type=EpochRecord)
    except (msgspec.DecodeError, UnicodeDecodeError, OverflowError, RecursionError):
        return None


def _pwrite(fd: int, data: bytes, offset: int) -> None:
    """Write all of ``data``; a store that runs full may take a part first and say so only the next time."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
