"""Decoder: a migration stream as events, its own and those of the decoders of its live sections."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, Generic, NoReturn

from fusemig.errors import RemoteProtocolError
from fusemig.wire.base import EventT, StepDecoder
from fusemig.wire.savevm.drain import Drain
from fusemig.wire.savevm.elements import (
    COMMAND,
    CONFIGURATION,
    END,
    EOF,
    FOOTER,
    FULL,
    MAGIC,
    PART,
    START,
    SUBSECTION,
    VERSION,
    VMDESC,
    Command,
    CommandType,
    Configuration,
    DeviceState,
    Event,
    SectionEnd,
    StreamEnd,
)
from fusemig.wire.savevm.ram import DEFAULT_PAGE_SIZE, RAM_SECTION, RamSkipper

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fusemig.wire.base import SectionDecoder

_PAGE_BITS: Final = range(10, 17)
_MAX_CAPABILITIES: Final = 64
_IGNORE_SHARED: Final = "x-ignore-shared"

MAX_DEVICE_STATE: Final = 1 << 30
"""Most bytes that are drained after the live sections. A large machine sends some megabytes."""
_DRAIN_SIZE: Final = 64 * 1024


_U16_PAIR: Final = struct.Struct(">HH")
_U32: Final = struct.Struct(">I")
_U32_PAIR: Final = struct.Struct(">II")

_COMMAND_LENGTHS: Final = {CommandType.OPEN_RETURN_PATH: 0, CommandType.PING: _U32.size}


def _text(data: bytes | memoryview) -> str:
    return bytes(data).decode(errors="backslashreplace")


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
        self._drained: Drain | None = None
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
            self._drained = Drain()
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

    def _on_drained(self, drained: Drain, n: int) -> None:
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
