"""The state document: what a successor must know that lies in no file beside the images. Pure.

    document   JSON: `State`, with a version                     encode_state, decode_state
    memory     two slots, each a document behind a header        encode_slot, newest

Rules:

1. A document of a version that is not known here is refused before anything else in it is looked at, and so is one with
   a member or a word that is not known: a successor that understands half of what it is told must not serve.
2. So that an older version can follow all the same, a member that says what is so without it anyway is not written:
   what came later is in the way of an older reader only while it is in use. So a new member has a default, which means
   what older versions do, and of which there is one object (None, False, "", (), a small number): it is told by
   identity. What a successor can do without goes into `Hints`, of which what is not known is ignored.
3. A write goes to the slot of the older document; a header has a checksum of what follows. So whoever is killed while
   writing leaves the former document readable.
4. No secrets: credentials are named by their directory, and loaded from there again.

The document goes from one process to the next on the same host, in memory that a reboot empties: whatever must survive
that lies beside the images.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Annotated, Final, Literal

import msgspec
from msgspec import Meta
from xxhash import xxh3_64_intdigest

from fusemig import __version__
from fusemig.errors import StateError
from fusemig.qmp.objects import ObjectAdd
from fusemig.qmp.schema import MigrationCapability

if TYPE_CHECKING:
    from collections.abc import Sequence

VERSION: Final = 1
"""Of the documents that are written; grows with every change that an older reader would not understand."""
READABLE: Final = frozenset({1})
"""The versions that are read."""

SLOT_SIZE: Final = 64 << 10
"""Bytes; the two slots of a memory begin at 0 and here. A document is about 1 kB, and grows with disks and objects."""
_HEADER: Final = struct.Struct(">8sQQQ")  # magic, generation, length, xxh3_64 of the document seeded with generation
_MAGIC: Final = b"fusemig\x01"
MAX_DOCUMENT: Final = SLOT_SIZE - _HEADER.size

Natural = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Nanoseconds = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]


class _Record(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, rename="kebab", kw_only=True
):
    """Base of what must be understood in the document."""


class ServedFile(_Record, frozen=True, kw_only=True):
    """A file of the mount, as the kernel knows it and as it was asked for."""

    name: str
    inode: Natural
    path: str
    base: str = ""
    is_read_only: bool = False


class Mount(_Record, frozen=True, kw_only=True):
    """What a successor must be asked to serve in just the same way, for the kernel has it already."""

    mountpoint: str
    files: tuple[ServedFile, ...]
    is_write_back: bool = False
    is_allow_other: bool = False


class Parameters(_Record, frozen=True, kw_only=True):
    """QMP's migration parameters."""

    max_bandwidth: Natural = 0
    """Bytes per second; 0 is unlimited."""
    downtime_limit_s: Seconds = 0.3
    tls_creds: str = ""
    tls_hostname: str = ""
    tls_authz: str = ""


class Request(_Record, frozen=True, kw_only=True):
    """What an outgoing migration was asked for."""

    uri: str
    disks: tuple[str, ...]
    is_qemu: bool = False
    """On QEMU's wire, which cannot go on with anything."""
    has_guest: bool = False
    """A guest moves with the disks."""
    tls_directory: str = ""
    """Credentials for this migration alone."""
    tls_hostname: str = ""
    is_insecure: bool = False
    is_resumed: bool = False
    reconnect_limit_s: Seconds = 0.0
    is_postcopy: bool = False
    """To be handed over at once; also if that was said later."""
    order: Literal["sequential", "heat"] = "sequential"
    """Of the bulk phase."""
    incremental: bool | None = None
    compression_level: int | None = None
    streams: int = 1
    mirrors: bool = False
    """Mode `mirror`, also if that was said later."""
    group: str = ""
    """What decides of the disks together with those of other daemons."""


class Outgoing(_Record, frozen=True, kw_only=True):
    """The outgoing migration that runs, or is in doubt."""

    request: Request
    session: str
    began_s: float
    """When, on the clock that counts on from process to process (CLOCK_MONOTONIC)."""
    has_sent: bool = False
    """Whether the destination has welcomed it: there may be something to go on with."""
    may_switch_over: bool = False
    """`migrate-continue` was said."""
    n_reconnects: Natural = 0


class FileTimes(msgspec.Struct, frozen=True, rename="kebab", kw_only=True):
    """Times of a file of the mount, in nanoseconds since the epoch; before it they are negative."""

    atime_ns: Nanoseconds
    mtime_ns: Nanoseconds
    changed_ns: Nanoseconds
    """When they were set."""


class Hints(msgspec.Struct, frozen=True, omit_defaults=True, rename="kebab", kw_only=True):
    """What a successor can do without, so that an older one ignores what it has not heard of."""

    times: dict[str, FileTimes] = {}
    """Of the files whose times a guest has set, by name."""


class State(_Record, frozen=True, kw_only=True):
    """Everything."""

    software: str = msgspec.field(default_factory=lambda: __version__)
    """Who wrote it, for people; always written, as the version is."""
    mount: Mount
    sizes: dict[str, Natural] = {}
    """Bytes of the disks that have an image, by name, as guests know them: a cut image is not a smaller disk."""
    is_stopped: bool = False
    """QMP's `stop`."""
    parameters: Parameters = Parameters()
    capabilities: tuple[MigrationCapability, ...] = ()
    objects: tuple[ObjectAdd, ...] = ()
    listening: str = ""
    """Where the daemon listens for sources, as a URI with the port that it got; empty where it does not."""
    outgoing: Outgoing | None = None
    n_predecessors: Natural = 0
    """How many daemons served the mount before the one that wrote this."""
    hints: Hints | None = None
    left_s: float = 0.0
    """When that one stopped taking requests for its successor, on the clock of `Outgoing.began_s`; 0: it did not."""
    version: int = msgspec.field(default_factory=lambda: VERSION)


class _Versioned(msgspec.Struct, frozen=True):
    """All that a document of any version has to have."""

    version: int
    software: str = "?"


def encode_state(state: State) -> bytes:
    """Return the document.

    Raises:
        StateError: it has grown too large for a slot.
    """
    document = msgspec.json.encode(state)
    if len(document) > MAX_DOCUMENT:
        raise StateError(
            f"what a successor must know takes {len(document)} bytes, and {MAX_DOCUMENT} is the most: delete objects"
            " that no migration needs (object-del)"
        )
    return document


def decode_state(document: bytes) -> State:
    """Read a document.

    Raises:
        StateError: it is of a version that is not known here, or no document.
    """
    try:
        found = msgspec.json.decode(document, type=_Versioned)
        if found.version not in READABLE:
            raise StateError(
                f"the state of the running daemon (fusemig {found.software[:40]}) is of version {found.version}, and"
                f" fusemig {__version__} reads {_readable()}: install a version that reads it"
            )
        return msgspec.json.decode(document, type=State)
    except (msgspec.DecodeError, UnicodeDecodeError, OverflowError, RecursionError, ValueError) as exc:
        raise StateError(
            f"the state of the running daemon cannot be read ({exc}): end it and start `fusemig serve` anew"
        ) from exc


def _readable() -> str:
    return "version " + ", ".join(str(version) for version in sorted(READABLE))


def encode_slot(document: bytes, generation: int) -> bytes:
    """Return the bytes of a slot, for the one of `slot_of`."""
    assert len(document) <= MAX_DOCUMENT
    return _HEADER.pack(_MAGIC, generation, len(document), xxh3_64_intdigest(document, seed=generation)) + document


def slot_of(generation: int) -> int:
    """Return the offset of the slot that a document goes to: never that of the one before."""
    return (generation % 2) * SLOT_SIZE


def newest(slots: Sequence[bytes]) -> tuple[int, bytes]:
    """Return the newest whole document with its generation; generation 0 and nothing where none was written.

    Raises:
        StateError: something was written, and nothing of it is whole.
    """
    found = [slot for slot in map(_parse_slot, slots) if slot is not None]
    if found:
        return max(found, key=lambda slot: slot[0])
    if any(slot.strip(b"\0") for slot in slots):
        raise StateError("the state of the running daemon is damaged: end it and start `fusemig serve` anew")
    return 0, b""


def _parse_slot(slot: bytes) -> tuple[int, bytes] | None:
    if len(slot) < _HEADER.size:
        return None
    magic, generation, length, check = _HEADER.unpack_from(slot)
    document = slot[_HEADER.size : _HEADER.size + min(length, MAX_DOCUMENT)]
    if magic != _MAGIC or len(document) != length or xxh3_64_intdigest(document, seed=generation) != check:
        return None
    return generation, document
