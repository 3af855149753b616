"""What a migration stream consists of: the marks of its elements, its commands, and the events made of them."""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NamedTuple

MAGIC: Final = 0x5145564D
VERSION: Final = 3

EOF: Final = 0x00
START: Final = 0x01
PART: Final = 0x02
END: Final = 0x03
FULL: Final = 0x04
SUBSECTION: Final = 0x05
VMDESC: Final = 0x06
CONFIGURATION: Final = 0x07
COMMAND: Final = 0x08
FOOTER: Final = 0x7E


class CommandType(IntEnum):
    """The commands that a source may send."""

    OPEN_RETURN_PATH = 1
    PING = 2
    POSTCOPY_ADVISE = 3
    POSTCOPY_LISTEN = 4
    POSTCOPY_RUN = 5
    POSTCOPY_RAM_DISCARD = 6
    PACKAGED = 7
    ENABLE_COLO = 8
    POSTCOPY_RESUME = 9
    RECV_BITMAP = 10


class Configuration(NamedTuple):
    """The machine type of the source, such as ``pc-q35-7.2``."""

    machine: str


class Command(NamedTuple):
    """A command; ``value`` is what a PING wants back in `encode_pong`, if the return path is used."""

    type: CommandType
    value: int


class SectionEnd(NamedTuple):
    """Part of a live section is over; it was the last one if ``is_last``."""

    name: str
    is_last: bool


class DeviceState(NamedTuple):
    """The live sections are over, and the state of devices follows, of which ``name`` is the first: it is drained."""

    name: str


class StreamEnd(NamedTuple):
    """The stream's EOF, without any state of devices before it; only a VMDESC may follow."""


Event = Configuration | Command | SectionEnd | DeviceState | StreamEnd
