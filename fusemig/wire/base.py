"""What the decoders share: a machine of steps, and what a section of QEMU's stream looks like from outside.

A step names the bytes it wants and the method that looks at them. The caller reads from its socket straight into
`wanted`, so nothing is copied, and nothing is read that belongs to whatever comes next.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from fusemig.errors import LocalProtocolError
from fusemig.units import CHUNK_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

EventT = TypeVar("EventT")
EventT_co = TypeVar("EventT_co", covariant=True)


class IncomingWire(Enum):
    """Which wires a destination takes."""

    AUTO = "auto"
    """Either; the source decides."""
    NATIVE = "native"
    QEMU = "qemu"


class SectionDecoder(Protocol[EventT_co]):
    """What a container must know of the decoder of a section's contents.

    `is_in_section` is true from `begin` until the record that ends the section; the container's own bytes come next.
    """

    needs_buffer: bool
    is_in_section: bool

    @property
    def wanted(self) -> memoryview:
        """Where the next received bytes go; never empty."""

    def begin(self, version: int) -> None:
        """A section of this kind begins: its header said ``version``."""

    def give_buffer(self, buffer: bytearray | memoryview) -> None:
        """Lend one chunk of memory for the payload that comes next."""

    def advance(self, n: int) -> EventT_co | None:
        """Take note that ``n`` bytes of `wanted` were filled."""


class StepDecoder(Generic[EventT]):
    """Turns bytes into events, one step after the other.

    The caller repeats: fill (part of) `wanted` with received bytes, say how many with `advance`, handle the event that
    may return. When `needs_buffer` is set, it first gives a buffer of one chunk with `give_buffer`; the event that
    comes out of it owns that buffer.
    """

    def __init__(self, scratch_size: int) -> None:
        """Make room for steps of at most ``scratch_size`` bytes; the subclass asks for the first one."""
        self._scratch = memoryview(bytearray(scratch_size))
        self._buffer = self._scratch[:0]
        self._filled = 0
        self._step: Callable[[], EventT | None]
        self._lent_step: Callable[[], EventT | None]
        self._lent_length = 0
        self.needs_buffer = False

    @property
    def wanted(self) -> memoryview:
        """Where the next received bytes go; never empty."""
        if self.needs_buffer:
            raise LocalProtocolError("a payload comes next and no buffer was given")
        return self._buffer[self._filled :]

    def give_buffer(self, buffer: bytearray | memoryview) -> None:
        """Lend one chunk of memory for the payload that comes next; its event passes it on."""
        if not self.needs_buffer or len(buffer) < CHUNK_SIZE:
            raise LocalProtocolError(f"a buffer of {len(buffer)} bytes was given; one chunk, and only when needed")
        self.needs_buffer = False
        self._expect(memoryview(buffer)[: self._lent_length], self._lent_step)

    def advance(self, n: int) -> EventT | None:
        """Take note that ``n`` bytes of `wanted` were filled; return the event they completed, if any.

        Raises:
            RemoteProtocolError: no correct peer sends this; the connection is of no further use.
        """
        self._filled += n
        if self._filled < len(self._buffer):
            return None
        return self._step()

    def feed(self, data: bytes | memoryview) -> list[EventT]:
        """Decode ``data`` by copying, with buffers of our own: for tests and for callers that do not mind."""
        events = []
        view = memoryview(data)
        while view:
            if self.needs_buffer:
                self.give_buffer(bytearray(CHUNK_SIZE))
            wanted = self.wanted
            n = min(len(wanted), len(view))
            wanted[:n] = view[:n]
            view = view[n:]
            event = self.advance(n)
            if event is not None:
                events.append(event)
        return events

    def _expect(self, buffer: memoryview, step: Callable[[], EventT | None]) -> None:
        self._buffer = buffer
        self._filled = 0
        self._step = step

    def _read(self, length: int, step: Callable[[], EventT | None]) -> None:
        """Read the next ``length`` bytes (not 0) to the start of the scratch memory, then take ``step``."""
        self._expect(self._scratch[:length], step)

    def _read_payload(self, step: Callable[[], EventT | None], length: int = CHUNK_SIZE) -> None:
        """Read ``length`` bytes, at most a chunk, into a buffer of the caller's, then take ``step``."""
        self.needs_buffer = True
        self._lent_length = length
        self._filled = 0
        self._lent_step = step
