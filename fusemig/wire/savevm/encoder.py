"""The elements of a migration stream as bytes, and those of its return path."""

from __future__ import annotations

import struct
from typing import Final

from fusemig.errors import ConfigError
from fusemig.wire.savevm.elements import CONFIGURATION, END, EOF, FOOTER, MAGIC, PART, START, VERSION, VMDESC

_U16_PAIR: Final = struct.Struct(">HH")
_U32: Final = struct.Struct(">I")
_U32_PAIR: Final = struct.Struct(">II")


def encode_header(machine: str) -> bytes:
    """Return the start of a stream for a QEMU that runs machine type ``machine`` (`-M`, with its version).

    Raises:
        ConfigError: there can be no such machine.
    """
    name = machine.encode()
    if not 0 < len(name) < 256:
        raise ConfigError(f"'{machine}' is not a machine type of QEMU's")
    return _U32_PAIR.pack(MAGIC, VERSION) + bytes([CONFIGURATION]) + _U32.pack(len(name)) + name


def encode_start(section_id: int, name: str, version: int) -> bytes:
    """Return the header of a live section's first part."""
    encoded = name.encode()
    head = bytes([START]) + _U32.pack(section_id) + bytes([len(encoded)]) + encoded
    return head + _U32_PAIR.pack(0, version)


def encode_part(section_id: int) -> bytes:
    """Return the header of another part of a live section."""
    return bytes([PART]) + _U32.pack(section_id)


def encode_end(section_id: int) -> bytes:
    """Return the header of a live section's last part."""
    return bytes([END]) + _U32.pack(section_id)


def encode_footer(section_id: int) -> bytes:
    """Return what follows the contents of every section."""
    return bytes([FOOTER]) + _U32.pack(section_id)


def encode_eof() -> bytes:
    """Return the end of a stream, with the description of no devices, which QEMU tries to read."""
    description = b'{"page_size": 4096, "devices": []}'
    return bytes([EOF, VMDESC]) + _U32.pack(len(description)) + description


def encode_shut(*, failed: bool = False) -> bytes:
    """Return the last message of a return path, to a source that waits for it: all was loaded, or ``failed``."""
    return _U16_PAIR.pack(1, _U32.size) + _U32.pack(failed)


def encode_pong(value: int) -> bytes:
    """Return the answer to a PING on a return path."""
    return _U16_PAIR.pack(2, _U32.size) + _U32.pack(value)
