"""The native wire: framed, checked, acknowledged.

A connection starts with the 8 bytes of `PREFACE` from the source; after them both directions carry frames:

    offset size
      0     2   magic 0xF5ED
      2     1   type (`FrameType`)
      3     1   flags (0 in version 1)
      4     2   disk index
      6     2   number of extents
      8     8   sequence: DATA and ZERO count up from 1; an ACK names the last one that was applied
     16     8   offset of the first extent, in bytes
     24     8   length of the first extent, in bytes
     32     4   length of the payload, in bytes
     36     4   0
     40     8   check: xxh3_64 of bytes 0-39 and the extent table, seeded with xxh3_64 of the payload
     48         the other extents, 16 bytes each, then the payload

All numbers are big-endian. The first extent is in the header so that a bulk frame, one chunk, is read in two steps. A
DATA payload is the bytes of its extents one after the other, at most one chunk; ZERO has extents only. Every other
payload is one JSON object (`docs/wire-native.md` lists them all).

The decoder never copies a payload: the caller reads from its socket straight into `Decoder.wanted`. Whatever the bytes,
it raises only `RemoteProtocolError`, and it checks lengths before it asks for memory: no more than two chunks.
"""

from __future__ import annotations

import struct
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import msgspec
from xxhash import xxh3_64_intdigest

from fusemig.errors import LocalProtocolError, RemoteProtocolError
from fusemig.units import BLOCK_SIZE, CHUNK_SIZE, MAX_DISK_SIZE, SECTOR_SIZE
from fusemig.wire.base import StepDecoder

if TYPE_CHECKING:
    from collections.abc import Sequence

PREFACE: Final = b"FUSEMIG\n"
VERSION: Final = 1
MAGIC: Final = 0xF5ED

MAX_EXTENTS: Final = 256
MAX_MESSAGE: Final = 256 * 1024
"""Longest JSON payload in bytes: a handshake of a thousand disks."""
MAX_SEPARATORS: Final = 8192
"""Most commas in a JSON payload: a value of two bytes becomes an object of sixty, and memory is bounded too."""

_HEADER: Final = struct.Struct(">HBBHHQQQII")
_CHECK: Final = struct.Struct(">Q")
HEADER_SIZE: Final = _HEADER.size + _CHECK.size
_EXTENT_SIZE: Final = 16


class FrameType(IntEnum):
    """What a frame means; the comments say who sends it."""

    HELLO = 1  # source: version, session, disks
    WELCOME = 2  # destination: accepted
    REFUSE = 3  # destination: not accepted, and why
    DATA = 4  # source: bytes of extents
    ZERO = 5  # source: extents that read as zeros
    ACK = 6  # destination: every frame up to `sequence` is in the image
    PROGRESS = 7  # source: a pass begins, or a second has passed
    SYNC = 8  # source: make durable what you have
    SYNCED = 9  # destination: done
    FINAL = 10  # source: frozen, all sent; digests
    PREPARED = 11  # destination: durable, digests equal
    COMMIT = 12  # source: the disks are yours
    TAKEN = 13  # destination: they are mine, durably
    RELEASED = 14  # source: I know
    ABORT = 15  # either: this migration is over, and why
    ASK = 20  # source, instead of HELLO: who owns the disks that I handed off?
    ANSWER = 21  # destination: what my durable records say
    HAVE = 24  # destination: what it holds of some chunks
    JOURNALED = 25  # destination: every frame up to `sequence` is durable and journaled
    KEPT = 26  # source: which of the chunks of a HAVE are equal here
    MISSING = 48  # source, before FINAL: what it did not send and the destination has to fetch
    LEND = 49  # source, instead of HELLO: fetch from here what you lack of the disks that you took
    FETCH = 50  # destination: send a run of blocks, now
    WHOLE = 51  # destination: it has everything, durably


RESUME: Final = "resume"
"""The feature of a side that can go on after a lost connection: it knows HAVE, JOURNALED and what belongs to them."""

POSTCOPY: Final = "postcopy"
"""The feature of a side that can hand a disk over, or take it, before all of it was sent."""
MAX_RUNS: Final = 2048
"""Most runs of a MISSING."""
MAX_DISK_RUNS: Final = 1 << 20
"""Most runs in all MISSING of a disk."""
MAX_FETCH_BLOCKS: Final = CHUNK_SIZE // BLOCK_SIZE
"""Most blocks of a FETCH."""

HAVE_VALUES: Final = 8192
"""Most chunks of a HAVE that carries values of the digest, 8 bytes each."""
HAVE_HASHES: Final = 64
"""Most chunks of a HAVE that carries hashes of contents, 16 bytes each."""


class DiskOffer(msgspec.Struct, frozen=True, omit_defaults=True):
    """A disk as the source describes it."""

    name: str
    size: int
    image_id: str
    epoch: int
    is_resumed: bool = False
    """Whether this is to go on with what the destination has of it."""
    allocated_bytes: int = 0
    """About how much of it is no hole, so that the destination can tell whether it has the room; 0: not known."""


class Hello(msgspec.Struct, frozen=True):
    """The source's first message."""

    version: int
    session: str
    chunk_size: int
    disks: list[DiskOffer]
    features: list[str] = []
    attempt: int = 0
    """Names this connection among all of the session; any number that none before had."""


class Resumption(Enum):
    """What the destination can say of what it has."""

    NOTHING = ""
    """It begins anew."""
    JOURNAL = "journal"
    """It has a journal of this session: HAVE carries values of the digest."""
    COMPARE = "compare"
    """It has an image and does not know what of it is right: HAVE carries hashes of its contents."""


class Covered(msgspec.Struct, frozen=True):
    """The last frame that the journal of a disk covers: the connection, as its HELLO named it, and the frame."""

    attempt: int = 0
    sequence: int = 0


class Welcome(msgspec.Struct, frozen=True):
    """The destination accepts; disks are known by their place in the offer from here on."""

    version: int
    features: list[str] = []
    resumption: Resumption = Resumption.NOTHING
    covered: list[Covered] = []
    """With `Resumption.JOURNAL`, one for each disk."""


class Have(msgspec.Struct, frozen=True):
    """What the destination has of the chunks from ``first`` on; chunks that no HAVE tells of, it does not have.

    They come after WELCOME, disk by disk and in ascending order; the last one names no disk.
    """

    disk: int
    """Its place in the offer; -1: that was all."""
    first: int = 0
    values: bytes = b""
    """Of `Resumption.JOURNAL`, 64-bit values; of `Resumption.COMPARE`, xxh3_128. Little-endian; 0: it has not."""


class Refuse(msgspec.Struct, frozen=True):
    """The destination does not accept."""

    reason: str
    kind: str = "refused"
    """``authentication`` where the source itself is not welcome, and not what it offers."""
    is_busy: bool = False
    """Whether the same may be accepted in a moment."""


class Progress(msgspec.Struct, frozen=True):
    """Where the source is: shown to people at the destination, and proof of life."""

    pass_number: int
    pending_bytes: int
    total_bytes: int


class Sync(msgspec.Struct, frozen=True):
    """Make every applied frame durable."""


class Synced(msgspec.Struct, frozen=True):
    """Every frame applied before the `Sync` is durable."""


class DiskProof(msgspec.Struct, frozen=True):
    """A disk's digest and the epoch that the destination will own it in."""

    digest: int
    epoch: int


class FinalProofs(msgspec.Struct, frozen=True):
    """Frozen, everything is sent: one proof per disk, in the order of the offer."""

    disks: list[DiskProof]


class PreparedProofs(msgspec.Struct, frozen=True):
    """The destination's own proofs: durable, complete and equal."""

    disks: list[DiskProof]


class Commit(msgspec.Struct, frozen=True):
    """The source will never write again unless the destination says that it aborted."""


class Taken(msgspec.Struct, frozen=True):
    """The destination owns the disks."""


class Released(msgspec.Struct, frozen=True):
    """The source knows that it does not."""


class Abort(msgspec.Struct, frozen=True, omit_defaults=True):
    """The migration is over without a hand-off."""

    reason: str
    is_damaged: bool = False
    """Whether only this connection is: what came over it was damaged, and over another one the migration may go on."""


class AskedDisk(msgspec.Struct, frozen=True):
    """A disk that the source handed off, and the epoch in which it owned it."""

    image_id: str
    epoch: int


class Ask(msgspec.Struct, frozen=True):
    """The first message of a source that does not know whether its COMMIT arrived."""

    version: int
    session: str
    disks: list[AskedDisk]


class Answer(msgspec.Struct, frozen=True):
    """The destination's durable word; sent again after a COMMIT or ABORT that follows an ASK."""

    disks: list[Literal["owned", "prepared", "incoming", "unknown"]]
    """In the order in which they were asked about; the words are explained in `fusemig.handoff.Evidence`."""
    is_taken: bool
    """Whether any disk of that migration is owned by the destination."""


class Kept(msgspec.Struct, frozen=True):
    """The answer to each HAVE that carries hashes: the destination keeps what is equal, and knows its values now."""

    disk: int
    first: int
    values: bytes
    """64-bit values of the digest, little-endian; 0: it is not equal."""


class Missing(msgspec.Struct, frozen=True):
    """Blocks that the destination lacks or has an older version of; all MISSING of a disk come in ascending order."""

    disk: int
    """Its place in the offer."""
    runs: list[tuple[int, int]]
    """First 4 KiB block and the one after the last of each run; at most `MAX_RUNS`."""


class Lend(msgspec.Struct, frozen=True):
    """The first message of a source whose destination fetches from it; WELCOME, WHOLE or REFUSE is the answer."""

    version: int
    session: str
    """The migration that handed the disks over."""
    disks: list[AskedDisk]
    """Known by their place here from now on."""


class Fetch(msgspec.Struct, frozen=True):
    """Send the 4 KiB blocks ``first`` to ``stop - 1`` of a disk in one frame, which may tell of more zeros than that.

    They are answered in the order in which they come.
    """

    disk: int
    first: int
    stop: int


class Whole(msgspec.Struct, frozen=True):
    """The destination needs the source no more."""


class Journaled(msgspec.Struct, frozen=True):
    """Every frame up to ``sequence`` is durable, and will be known to be after a crash of the destination."""

    sequence: int


class Ack(NamedTuple):
    """Every DATA and ZERO frame up to ``sequence`` is in the destination's image."""

    sequence: int


Message = (
    Hello
    | Welcome
    | Refuse
    | Progress
    | Sync
    | Synced
    | FinalProofs
    | PreparedProofs
    | Commit
    | Taken
    | Released
    | Abort
    | Ask
    | Answer
    | Have
    | Journaled
    | Kept
    | Missing
    | Lend
    | Fetch
    | Whole
)

_MESSAGE_TYPES: Final[dict[FrameType, type[Message]]] = {
    FrameType.HELLO: Hello,
    FrameType.WELCOME: Welcome,
    FrameType.REFUSE: Refuse,
    FrameType.PROGRESS: Progress,
    FrameType.SYNC: Sync,
    FrameType.SYNCED: Synced,
    FrameType.FINAL: FinalProofs,
    FrameType.PREPARED: PreparedProofs,
    FrameType.COMMIT: Commit,
    FrameType.TAKEN: Taken,
    FrameType.RELEASED: Released,
    FrameType.ABORT: Abort,
    FrameType.ASK: Ask,
    FrameType.ANSWER: Answer,
    FrameType.HAVE: Have,
    FrameType.JOURNALED: Journaled,
    FrameType.KEPT: Kept,
    FrameType.MISSING: Missing,
    FrameType.LEND: Lend,
    FrameType.FETCH: Fetch,
    FrameType.WHOLE: Whole,
}
_TYPE_OF: Final = {message: frame_type for frame_type, message in _MESSAGE_TYPES.items()}
_DECODERS: Final = {frame_type: msgspec.json.Decoder(message) for frame_type, message in _MESSAGE_TYPES.items()}

FROM_SOURCE: Final = frozenset(
    {
        FrameType.HELLO,
        FrameType.DATA,
        FrameType.ZERO,
        FrameType.PROGRESS,
        FrameType.SYNC,
        FrameType.FINAL,
        FrameType.COMMIT,
        FrameType.RELEASED,
        FrameType.ABORT,
        FrameType.ASK,
        FrameType.KEPT,
        FrameType.MISSING,
        FrameType.LEND,
    }
)
FROM_DESTINATION: Final = frozenset(FrameType) - FROM_SOURCE | {FrameType.ABORT}

Span = tuple[int, int]
"""Offset and length in bytes of an extent."""


class ZeroFrame(NamedTuple):
    """Extents of a disk that read as zeros."""

    disk: int
    sequence: int
    extents: Sequence[Span]


class DataFrame(NamedTuple):
    """Bytes of a disk, not verified yet: call `verify` (off the event loop) before using them."""

    disk: int
    sequence: int
    extents: Sequence[Span]
    payload: memoryview
    head: bytes
    check: int

    def verify(self) -> int:
        """Check payload and header against the sender's hash; return the payload's own xxh3_64.

        Raises:
            RemoteProtocolError: a byte differs from what was sent.
        """
        payload_hash = xxh3_64_intdigest(self.payload)
        if xxh3_64_intdigest(self.head, seed=payload_hash) != self.check:
            raise RemoteProtocolError(
                f"checksum of data frame {self.sequence} does not match: it was damaged on the way"
            )
        return payload_hash


Event = Message | Ack | ZeroFrame | DataFrame


def encode_message(message: Message) -> bytes:
    """Return a control frame."""
    return _encode(_TYPE_OF[type(message)], payload=msgspec.json.encode(message))


def encode_ack(sequence: int) -> bytes:
    """Return an acknowledgement of every frame up to ``sequence``."""
    return _encode(FrameType.ACK, sequence=sequence)


def encode_zero(disk: int, sequence: int, extents: Sequence[Span]) -> bytes:
    """Return a frame that makes extents (ascending, at most `MAX_EXTENTS`) read as zeros."""
    return _encode(FrameType.ZERO, disk=disk, sequence=sequence, extents=extents)


def encode_data(disk: int, sequence: int, extents: Sequence[Span], payload_hash: int, length: int) -> bytes:
    """Return what goes before the payload of a data frame; the payload follows as it is.

    Args:
        disk: index of the disk in the offer.
        sequence: the frame's number.
        extents: where the payload's bytes belong, ascending, at most `MAX_EXTENTS`.
        payload_hash: xxh3_64 of the payload.
        length: length of the payload in bytes, the sum of the extents'.
    """
    return _head(FrameType.DATA, disk, sequence, extents, payload_hash, length)


_EMPTY_HASH: Final = xxh3_64_intdigest(b"")


def _encode(
    frame_type: FrameType, *, disk: int = 0, sequence: int = 0, extents: Sequence[Span] = (), payload: bytes = b""
) -> bytes:
    return _head(frame_type, disk, sequence, extents, xxh3_64_intdigest(payload), len(payload)) + payload


def _head(
    frame_type: FrameType, disk: int, sequence: int, extents: Sequence[Span], payload_hash: int, length: int
) -> bytes:
    if len(extents) > MAX_EXTENTS:
        raise LocalProtocolError(f"{len(extents)} extents in one frame")
    offset, first_length = extents[0] if extents else (0, 0)
    head = _HEADER.pack(MAGIC, frame_type, 0, disk, len(extents), sequence, offset, first_length, length, 0)
    table = b"".join(_PAIR.pack(*extent) for extent in extents[1:])
    check = xxh3_64_intdigest(head + table, seed=payload_hash)
    return head + _CHECK.pack(check) + table


_PAIR: Final = struct.Struct(">QQ")
assert _PAIR.size == _EXTENT_SIZE


class _Head(NamedTuple):
    frame_type: FrameType
    disk: int
    n_extents: int
    sequence: int
    first: Span
    length: int
    check: int


class Decoder(StepDecoder[Event]):
    """Turns one direction of a connection into events.

    It is driven as every `StepDecoder`; a `DataFrame` owns the buffer that was lent for its payload.
    """

    def __init__(self, allowed: frozenset[FrameType], *, preface: bool) -> None:
        """Decode frames of the ``allowed`` types, after `PREFACE` if ``preface``."""
        super().__init__(HEADER_SIZE)
        self._allowed = allowed
        self._head: _Head | None = None
        self._head_bytes = b""
        self._extents: list[Span] = []
        self._next_sequence = 1
        self._is_preface = preface
        if preface:
            self._read(len(PREFACE), self._on_preface)
        else:
            self._read(HEADER_SIZE, self._on_header)

    @property
    def is_between_frames(self) -> bool:
        """Whether the stream may end here without cutting a frame."""
        return self._head is None and self._filled == 0 and not self._is_preface

    def _on_preface(self) -> None:
        if bytes(self._buffer) != PREFACE:
            raise RemoteProtocolError("this is not a fusemig stream: connect with `fusemig migrate`")
        self._is_preface = False
        self._read(HEADER_SIZE, self._on_header)

    def _on_header(self) -> Event | None:
        magic, type_number, flags, disk, n_extents, sequence, offset, length, payload, zero = _HEADER.unpack_from(
            self._scratch
        )
        if magic != MAGIC:
            raise RemoteProtocolError("the stream is out of step: no frame begins here")
        if flags or zero:
            raise RemoteProtocolError(f"frame with unknown flags {flags:#x}: the peer speaks a later version")
        try:
            frame_type = FrameType(type_number)
        except ValueError as exc:
            raise RemoteProtocolError(f"unknown frame type {type_number}") from exc
        if frame_type not in self._allowed:
            raise RemoteProtocolError(f"frame type {frame_type.name} does not come from this side")
        (check,) = _CHECK.unpack_from(self._scratch, _HEADER.size)
        self._head = _Head(frame_type, disk, n_extents, sequence, (offset, length), payload, check)
        self._head_bytes = bytes(self._scratch[: _HEADER.size])
        self._check_lengths(self._head)
        self._extents = [(offset, length)] if n_extents else []
        if n_extents > 1:
            self._expect(memoryview(bytearray((n_extents - 1) * _EXTENT_SIZE)), self._on_table)
            return None
        return self._after_table()

    def _check_lengths(self, head: _Head) -> None:
        kind = head.frame_type
        if kind in (FrameType.DATA, FrameType.ZERO):
            if head.sequence != self._next_sequence:
                raise RemoteProtocolError(f"frame {head.sequence} came where {self._next_sequence} was due")
            self._next_sequence += 1
            if not 1 <= head.n_extents <= MAX_EXTENTS:
                raise RemoteProtocolError(f"{head.n_extents} extents in one frame; 1 to {MAX_EXTENTS} are allowed")
        elif head.n_extents:
            raise RemoteProtocolError(f"extents in a {kind.name} frame")
        largest = CHUNK_SIZE if kind is FrameType.DATA else MAX_MESSAGE if kind in _MESSAGE_TYPES else 0
        if head.length > largest or (kind is FrameType.DATA and not head.length):
            raise RemoteProtocolError(f"payload of {head.length} bytes in a {kind.name} frame; at most {largest}")

    def _on_table(self) -> Event | None:
        self._head_bytes += bytes(self._buffer)
        self._extents.extend(_PAIR.iter_unpack(self._buffer))
        return self._after_table()

    def _after_table(self) -> Event | None:
        head = self._head
        assert head is not None
        if self._extents:
            self._check_extents(head)
        if not head.length:
            self._buffer = self._scratch[:0]
            return self._on_payload()
        if head.frame_type is FrameType.DATA:
            self._read_payload(self._on_payload, head.length)
        else:
            self._expect(memoryview(bytearray(head.length)), self._on_payload)
        return None

    def _check_extents(self, head: _Head) -> None:
        end = total = 0
        for offset, length in self._extents:
            if offset < end or not length or offset % SECTOR_SIZE or length % SECTOR_SIZE:
                raise RemoteProtocolError(f"extent {offset}+{length} is empty, unaligned or out of order")
            end = offset + length
            total += length
        if end > MAX_DISK_SIZE:
            raise RemoteProtocolError(f"an extent ends at {end}, beyond the largest disk")
        if head.frame_type is FrameType.DATA and total != head.length:
            raise RemoteProtocolError(f"extents of {total} bytes with a payload of {head.length}")

    def _on_payload(self) -> Event:
        head, payload = self._head, self._buffer
        assert head is not None
        self._head = None
        self._read(HEADER_SIZE, self._on_header)
        if head.frame_type is FrameType.DATA:
            return DataFrame(head.disk, head.sequence, self._extents, payload, self._head_bytes, head.check)
        payload_hash = xxh3_64_intdigest(payload) if payload else _EMPTY_HASH
        if xxh3_64_intdigest(self._head_bytes, seed=payload_hash) != head.check:
            raise RemoteProtocolError(f"checksum of a {head.frame_type.name} frame does not match")
        if head.frame_type is FrameType.ZERO:
            return ZeroFrame(head.disk, head.sequence, self._extents)
        if head.frame_type is FrameType.ACK:
            return Ack(head.sequence)
        if bytes(payload).count(b",") > MAX_SEPARATORS:
            raise RemoteProtocolError(f"{head.frame_type.name} message with more than {MAX_SEPARATORS} separators")
        try:
            return _DECODERS[head.frame_type].decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise RemoteProtocolError(f"malformed {head.frame_type.name} message: {exc}") from exc
