"""The container of QEMU's migration streams (`migration/savevm.c`), version 3, as QEMU 2.4 to 9.0 write it.

    QEVM, version                           8 bytes, once
    CONFIGURATION  machine, subsections     the machine type's name; what has other values than usual
    COMMAND        number, length, data     such as OPEN_RETURN_PATH and PING
    START          id, name, instance, version, contents, footer      a live section begins: `block`, `ram`
    PART, END      id, contents, footer     more of it; END is the last
    FULL           id, name, instance, version, contents, footer      a device's state, once all live sections ended
    EOF
    VMDESC         length, JSON             what the FULL sections consisted of; may be missing

All numbers are big-endian. No section says how long it is: whoever cannot parse its contents is lost. So:

- the contents of `block` go to the decoder that was given for them, `ram` is parsed here in order to skip it, and any
  other live section is refused by its name, before a byte is lost;
- device state cannot be parsed without the code of every device, and need not be: nothing that follows it is for us.
  From the first FULL section on all bytes are drained unseen until the source closes. They are complete if they end as
  a stream does: a footer, EOF, and a VMDESC whose length leads exactly to the last byte (or, without one, a footer and
  EOF). `may_end` says so; a source with a return path waits for `encode_shut` then instead of closing.

Whatever the bytes, the decoder raises only `RemoteProtocolError`; its memory is fixed, however much is skipped.
"""

from __future__ import annotations

import re
import struct
from enum import IntEnum
from typing import TYPE_CHECKING, Final, Generic, NamedTuple, NoReturn

from fusemig.errors import ConfigError, RemoteProtocolError
from fusemig.wire.base import EventT, StepDecoder

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fusemig.wire.base import SectionDecoder

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

DEFAULT_PAGE_SIZE: Final = 4096
"""Of the guests whose QEMU sends no `configuration/target-page-bits`: x86, ppc, s390x."""
_PAGE_BITS: Final = range(10, 17)
_MAX_CAPABILITIES: Final = 64
_IGNORE_SHARED: Final = "x-ignore-shared"

MAX_DEVICE_STATE: Final = 1 << 30
"""Most bytes that are drained after the live sections. A large machine sends some megabytes."""
_DRAIN_SIZE: Final = 64 * 1024

_U16_PAIR: Final = struct.Struct(">HH")
_U32: Final = struct.Struct(">I")
_U32_PAIR: Final = struct.Struct(">II")
_U64: Final = struct.Struct(">Q")

RAM_SECTION: Final = "ram"
RAM_VERSION: Final = 4
RAM_ZERO: Final = 0x02
RAM_MEM_SIZE: Final = 0x04
RAM_PAGE: Final = 0x08
RAM_EOS: Final = 0x10
RAM_CONTINUE: Final = 0x20
_RAM_REFUSED: Final = {
    0x01: "FULL (an obsolete form of the stream)",
    0x40: "XBZRLE (turn off QEMU's migration capability xbzrle)",
    0x80: "HOOK (RDMA; migrate over tcp or a unix socket)",
    0x100: "COMPRESS_PAGE (turn off QEMU's migration capability compress)",
    0x200: "MULTIFD_FLUSH (turn off QEMU's migration capability multifd)",
}


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


_COMMAND_LENGTHS: Final = {CommandType.OPEN_RETURN_PATH: 0, CommandType.PING: _U32.size}


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


def _text(data: bytes | memoryview) -> str:
    return bytes(data).decode(errors="backslashreplace")


class RamSkipper(StepDecoder[None]):
    """Parses the contents of `ram` sections in order to know where they end; no byte of memory is kept.

    A page is read together with the 8 bytes that always follow it, so it costs one step.
    """

    def __init__(self, page_size: int, *, has_addresses: bool = False) -> None:
        """Skip pages of ``page_size``; ``has_addresses`` tells the block list that goes with `x-ignore-shared`."""
        super().__init__(page_size + _U64.size)
        self._page_size = page_size
        self._block_extra = 2 * _U64.size if has_addresses else _U64.size
        self._unlisted = 0
        self._skip = 0
        self._has_block = False
        self.is_in_section = False
        self._expect_head()

    def begin(self, version: int) -> None:
        """A section begins.

        Raises:
            RemoteProtocolError: its version is not ours.
        """
        if version != RAM_VERSION:
            raise RemoteProtocolError(
                f"unsupported version {version} of the '{RAM_SECTION}' section; {RAM_VERSION} is known"
            )
        self.is_in_section = True

    def _expect_head(self, skip: int = 0) -> None:
        self._skip = skip
        self._read(skip + _U64.size, self._on_head)

    def _on_head(self) -> None:
        (head,) = _U64.unpack_from(self._scratch, self._skip)
        flags = head & (self._page_size - 1)
        kind = flags & ~RAM_CONTINUE
        if kind in (RAM_PAGE, RAM_ZERO):
            self._skip = self._page_size if kind == RAM_PAGE else 1
            if not flags & RAM_CONTINUE:
                self._read(1, self._on_name_length)
            elif not self._has_block:
                raise RemoteProtocolError("a page of RAM that continues no block")
            else:
                self._expect_head(self._skip)
        elif flags == RAM_MEM_SIZE:
            self._unlisted = head - flags
            self._expect_listed()
        elif flags == RAM_EOS:
            self.is_in_section = False
            self._expect_head()
        else:
            self._refuse(flags)

    def _refuse(self, flags: int) -> NoReturn:
        for flag, text in _RAM_REFUSED.items():
            if flags & flag:
                raise RemoteProtocolError(f"RAM in a form that cannot be skipped: {text}")
        raise RemoteProtocolError(f"unknown flags {flags:#x} in the '{RAM_SECTION}' section")

    def _on_name_length(self) -> None:
        length = self._scratch[0]
        if not length:
            raise RemoteProtocolError("a block of RAM without a name")
        self._has_block = True
        self._read(length, self._on_name)

    def _on_name(self) -> None:
        self._expect_head(self._skip)

    def _expect_listed(self) -> None:
        if self._unlisted:
            self._read(1, self._on_listed_length)
        else:
            self._expect_head()

    def _on_listed_length(self) -> None:
        self._skip = self._scratch[0]
        self._read(self._skip + self._block_extra, self._on_listed)

    def _on_listed(self) -> None:
        (length,) = _U64.unpack_from(self._scratch, self._skip)
        if length > self._unlisted:
            raise RemoteProtocolError("the blocks of RAM are longer than their sum")
        self._unlisted -= length
        self._expect_listed()


_TAIL: Final = re.compile(rb"(?=\x7e.{4}\x00\x06(.{4})\{)", re.DOTALL)
"""The last footer, EOF and the head of a VMDESC: what the end of the device state looks like."""
_TAIL_SIZE: Final = 5 + 1 + 5 + 1
_BARE_TAIL_SIZE: Final = 5 + 1


class _Drain:
    """Watches bytes that nobody can parse for the end of the stream."""

    def __init__(self) -> None:
        self.n_bytes = 0
        self._last = b""
        self._described_end = -1

    def take(self, data: memoryview) -> None:
        """Take note of more bytes."""
        seen = self._last + bytes(data)
        base = self.n_bytes - len(self._last)
        self.n_bytes += len(data)
        for match in _TAIL.finditer(seen):
            # Device state may look like the end by chance; what looks like it later is nearer to the truth.
            self._described_end = base + match.start() + _TAIL_SIZE - 1 + _U32.unpack(match[1])[0]
        self._last = seen[-(_TAIL_SIZE - 1) :]

    @property
    def may_end(self) -> bool:
        """Whether the bytes so far end as a stream does."""
        if self.n_bytes == self._described_end:
            return True
        bare = self._last[-_BARE_TAIL_SIZE:]
        return len(bare) == _BARE_TAIL_SIZE and bare[0] == FOOTER and bare[-1] == EOF


class _Section(Generic[EventT]):
    """A live section, and whether its last part has begun."""

    def __init__(self, name: str, version: int, contents: SectionDecoder[EventT] | RamSkipper) -> None:
        self.name = name
        self.version = version
        self.contents = contents
        self.has_ended = False


class Decoder(StepDecoder[Event | EventT]):
    """Turns a migration stream into events, its own and those of the decoders of live sections."""

    def __init__(self, sections: Mapping[str, SectionDecoder[EventT]]) -> None:
        """Decode live sections with ``sections``, one of which must occur; `ram` is skipped."""
        super().__init__(_DRAIN_SIZE)
        self._decoders = dict(sections)
        self._sections: dict[int, _Section[EventT]] = {}
        self._page_size = DEFAULT_PAGE_SIZE
        self._has_addresses = False
        self._current: SectionDecoder[EventT] | RamSkipper | None = None
        self._kind = 0
        self._section_id = 0
        self._name = ""
        self._command = CommandType.PING
        self._n_capabilities = 0
        self._to_skip = 0
        self._drained: _Drain | None = None
        self._read(_U32_PAIR.size, self._on_start)

    # The contents of a section are read by its own decoder, in the caller's buffers.

    @property
    def needs_buffer(self) -> bool:
        """Whether a chunk of memory must be given before more can be received."""
        return self._current is not None and self._current.needs_buffer

    @needs_buffer.setter
    def needs_buffer(self, value: bool) -> None:
        assert not value  # the container itself carries no payload

    @property
    def wanted(self) -> memoryview:
        """Where the next received bytes go; never empty."""
        return super().wanted if self._current is None else self._current.wanted

    def give_buffer(self, buffer: bytearray | memoryview) -> None:
        """Lend one chunk of memory for the payload that comes next; its event passes it on."""
        if self._current is None:
            super().give_buffer(buffer)
        else:
            self._current.give_buffer(buffer)

    def advance(self, n: int) -> Event | EventT | None:
        """Take note that ``n`` bytes of `wanted` were filled; return the event they completed, if any.

        Raises:
            RemoteProtocolError: no correct peer sends this; the connection is of no further use.
        """
        if self._drained is not None:
            self._on_drained(self._drained, n)
            return None
        contents = self._current
        if contents is None:
            return super().advance(n)
        event = contents.advance(n)
        if not contents.is_in_section:
            self._current = None
            self._read(1 + _U32.size, self._on_footer)
        return event

    @property
    def may_end(self) -> bool:
        """Whether the stream may end here; after the state of devices this is as good as known."""
        if self._drained is not None:
            return self._drained.may_end
        return self._step in (self._on_after_eof, self._on_trailing) and not self._filled

    def close(self) -> None:
        """The source has closed the stream.

        Raises:
            RemoteProtocolError: it is not complete.
        """
        if self.may_end:
            return
        if self._drained is not None:
            where = "in the state of the devices"
        elif self._current is not None:
            where = f"in a '{self._sections[self._section_id].name}' section"
        else:
            where = "between sections"
        raise RemoteProtocolError(f"the migration stream ends early, {where}: QEMU has stopped or was cancelled")

    def _on_start(self) -> None:
        magic, version = _U32_PAIR.unpack_from(self._scratch)
        if magic != MAGIC:
            raise RemoteProtocolError("this is not a migration stream of QEMU's")
        if version != VERSION:
            raise RemoteProtocolError(f"unsupported version {version} of QEMU's migration stream; {VERSION} is known")
        self._read(1, self._on_first)

    def _expect_element(self) -> None:
        self._read(1, self._on_element)

    def _on_first(self) -> Event | EventT | None:
        if self._scratch[0] == CONFIGURATION:
            self._read(_U32.size, self._on_machine_length)
            return None
        return self._on_element()

    def _on_element(self) -> Event | EventT | None:
        self._kind = kind = self._scratch[0]
        if kind in (START, FULL):
            self._read(_U32.size + 1, self._on_section_head)
        elif kind in (PART, END):
            self._read(_U32.size, self._on_part)
        elif kind == COMMAND:
            self._read(_U16_PAIR.size, self._on_command)
        elif kind == EOF:
            self._check_ended("the end of the stream")
            self._read(1, self._on_after_eof)
            return StreamEnd()
        else:
            raise RemoteProtocolError(f"unknown section type {kind:#04x}: the stream is out of step")
        return None

    # Configuration

    def _on_machine_length(self) -> None:
        (length,) = _U32.unpack_from(self._scratch)
        if not 0 < length < 256:
            raise RemoteProtocolError(f"a machine type's name of {length} bytes")
        self._read(length, self._on_machine)

    def _on_machine(self) -> Event:
        machine = _text(self._buffer)
        self._read(1, self._on_after_configuration)
        return Configuration(machine)

    def _on_after_configuration(self) -> Event | EventT | None:
        if self._scratch[0] == SUBSECTION:
            self._read(1, self._on_subsection_length)
            return None
        return self._on_element()

    def _on_subsection_length(self) -> None:
        self._to_skip = self._scratch[0]
        self._read(self._to_skip + _U32.size, self._on_subsection)

    def _on_subsection(self) -> None:
        name = _text(self._scratch[: self._to_skip])
        (version,) = _U32.unpack_from(self._scratch, self._to_skip)
        if version == 1 and name == "configuration/target-page-bits":
            self._read(_U32.size, self._on_page_bits)
        elif version == 1 and name == "configuration/capabilities":
            self._read(_U32.size, self._on_capabilities)
        elif version == 1 and name == "configuration/uuid":
            self._read(16, self._on_subsection_end)
        else:
            raise RemoteProtocolError(f"unknown part '{name}' version {version} of the configuration")

    def _on_subsection_end(self) -> None:
        self._read(1, self._on_after_configuration)

    def _on_page_bits(self) -> None:
        (bits,) = _U32.unpack_from(self._scratch)
        if bits not in _PAGE_BITS:
            raise RemoteProtocolError(f"pages of 2^{bits} bytes")
        self._page_size = 1 << bits
        self._on_subsection_end()

    def _on_capabilities(self) -> None:
        (self._n_capabilities,) = _U32.unpack_from(self._scratch)
        if self._n_capabilities > _MAX_CAPABILITIES:
            raise RemoteProtocolError(f"{self._n_capabilities} migration capabilities")
        self._expect_capability()

    def _expect_capability(self) -> None:
        if self._n_capabilities:
            self._n_capabilities -= 1
            self._read(1, self._on_capability_length)
        else:
            self._on_subsection_end()

    def _on_capability_length(self) -> None:
        length = self._scratch[0]
        if not length:
            raise RemoteProtocolError("a migration capability without a name")
        self._read(length, self._on_capability)

    def _on_capability(self) -> None:
        name = _text(self._buffer)
        if name != _IGNORE_SHARED:
            raise RemoteProtocolError(f"turn off QEMU's migration capability '{name}': its stream cannot be parsed")
        self._has_addresses = True
        self._expect_capability()

    # Commands

    def _on_command(self) -> Event | None:
        number, length = _U16_PAIR.unpack_from(self._scratch)
        try:
            self._command = CommandType(number)
        except ValueError as exc:
            raise RemoteProtocolError(f"unknown migration command {number}") from exc
        expected = _COMMAND_LENGTHS.get(self._command)
        if expected is None:
            raise RemoteProtocolError(
                f"migration command {self._command.name} is not possible here: turn off QEMU's migration capabilities"
                " for postcopy and COLO"
            )
        if length != expected:
            raise RemoteProtocolError(f"migration command {self._command.name} with {length} bytes, not {expected}")
        if length:
            self._read(length, self._on_command_value)
            return None
        self._expect_element()
        return Command(self._command, 0)

    def _on_command_value(self) -> Event:
        (value,) = _U32.unpack_from(self._scratch)
        self._expect_element()
        return Command(self._command, value)

    # Sections

    def _on_section_head(self) -> None:
        (self._section_id,) = _U32.unpack_from(self._scratch)
        self._to_skip = self._scratch[_U32.size]
        self._read(self._to_skip + _U32_PAIR.size, self._on_section_name)

    def _on_section_name(self) -> Event | None:
        name = _text(self._scratch[: self._to_skip])
        instance, version = _U32_PAIR.unpack_from(self._scratch, self._to_skip)
        if self._kind == FULL:
            self._check_ended(f"the state of device '{name}'")
            self._drained = _Drain()
            self._expect(self._scratch, self._expect_element)
            return DeviceState(name)
        if self._section_id in self._sections:
            raise RemoteProtocolError(f"section id {self._section_id} begins twice")
        contents: SectionDecoder[EventT] | RamSkipper | None
        if name == RAM_SECTION:
            contents = RamSkipper(self._page_size, has_addresses=self._has_addresses)
        else:
            contents = self._decoders.get(name)
        if contents is None or instance or any(name == known.name for known in self._sections.values()):
            raise RemoteProtocolError(
                f"live section '{name}' instance {instance} cannot be received: remove the device that sends it,"
                " or turn off the migration capability of that name"
            )
        self._sections[self._section_id] = _Section(name, version, contents)
        contents.begin(version)
        self._current = contents
        return None

    def _on_part(self) -> None:
        (self._section_id,) = _U32.unpack_from(self._scratch)
        section = self._sections.get(self._section_id)
        if section is None:
            raise RemoteProtocolError(f"unknown section id {self._section_id}")
        if section.has_ended:
            raise RemoteProtocolError(f"more of section '{section.name}' after its end")
        section.has_ended = self._kind == END
        section.contents.begin(section.version)
        self._current = section.contents

    def _on_footer(self) -> Event:
        mark = self._scratch[0]
        (section_id,) = _U32.unpack_from(self._scratch, 1)
        section = self._sections[self._section_id]
        if mark != FOOTER or section_id != self._section_id:
            raise RemoteProtocolError(
                f"section '{section.name}' does not end where it should: the stream is out of step"
            )
        self._expect_element()
        return SectionEnd(section.name, section.has_ended)

    def _check_ended(self, what: str) -> None:
        """Refuse ``what`` before every live section has ended, or if there was none for us."""
        for section in self._sections.values():
            if not section.has_ended:
                raise RemoteProtocolError(f"{what} comes before the end of section '{section.name}'")
        if not any(section.name in self._decoders for section in self._sections.values()):
            names = ", ".join(f"'{name}'" for name in self._decoders)
            raise RemoteProtocolError(f"the stream has no section {names}: start it with `migrate -b`")

    # What comes after the live sections

    def _on_drained(self, drained: _Drain, n: int) -> None:
        drained.take(self._scratch[:n])
        if drained.n_bytes > MAX_DEVICE_STATE:
            raise RemoteProtocolError(f"more than {MAX_DEVICE_STATE} bytes of device state")

    def _on_after_eof(self) -> None:
        if self._scratch[0] != VMDESC:
            self._on_trailing()
        self._read(_U32.size, self._on_description_length)

    def _on_trailing(self) -> NoReturn:
        raise RemoteProtocolError("bytes after the end of the stream")

    def _on_description_length(self) -> None:
        (self._to_skip,) = _U32.unpack_from(self._scratch)
        if self._to_skip > MAX_DEVICE_STATE:
            raise RemoteProtocolError(f"a description of {self._to_skip} bytes")
        self._skip_description()

    def _skip_description(self) -> None:
        if self._to_skip:
            n = min(self._to_skip, len(self._scratch))
            self._to_skip -= n
            self._read(n, self._skip_description)
        else:
            self._read(1, self._on_trailing)
