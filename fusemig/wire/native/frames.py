"""The native wire's frames: their types, what they carry, and their bytes.

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
DATA payload is the bytes of its extents one after the other, at most one chunk; PACKED is the same compressed, and its
check is over the bytes before that; ZERO and BASE have extents only. Every other payload is one JSON object
(`fusemig.wire.native.messages`, `docs/wire-native.md`).
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec
from xxhash import xxh3_64_intdigest

from fusemig.errors import LocalProtocolError, RemoteProtocolError
from fusemig.wire.native.messages import (
    Abort,
    Answer,
    Ask,
    Commit,
    Fetch,
    FinalProofs,
    Have,
    Hello,
    Join,
    Joined,
    Journaled,
    Keep,
    Kept,
    Lend,
    Like,
    Missing,
    PreparedProofs,
    Probe,
    Probed,
    Progress,
    Refuse,
    Released,
    Streams,
    Sync,
    Synced,
    Taken,
    Weigh,
    Weighed,
    Welcome,
    Whole,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    Buffer = bytes | bytearray | memoryview

PREFACE: Final = b"FUSEMIG\n"
VERSION: Final = 1
MAGIC: Final = 0xF5ED

MAX_EXTENTS: Final = 256
MAX_MESSAGE: Final = 256 * 1024
"""Longest JSON payload in bytes: a handshake of a thousand disks."""
MAX_SEPARATORS: Final = 8192
"""Most commas in a JSON payload: a value of two bytes becomes an object of sixty, and memory is bounded too."""

HEADER: Final = struct.Struct(">HBBHHQQQII")
CHECK: Final = struct.Struct(">Q")
HEADER_SIZE: Final = HEADER.size + CHECK.size
EXTENT_SIZE: Final = 16


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
    PROBE = 0x60  # source, instead of HELLO, many times: how fast is the way to you?
    PROBED = 0x61  # destination: the answer to each
    BASE = 0x50  # source: extents that read as the shared base
    PACKED = 0x51  # source: bytes of extents, compressed
    KEEP = 0x52  # source: chunks that are as the destination released them
    WEIGH = 0x53  # source: what are the hashes of the blocks of these chunks?
    WEIGHED = 0x54  # destination: these
    LIKE = 0x55  # source: which of those blocks are equal here
    JOIN = 0x70  # source, instead of HELLO: this is a further connection of a migration
    JOINED = 0x71  # destination: it is
    STREAMS = 0x72  # source: what follows is cut in pieces over so many connections


SEQUENCED: Final = frozenset({FrameType.DATA, FrameType.ZERO, FrameType.BASE, FrameType.PACKED})
"""What changes the image: numbered and acknowledged."""


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
    | Probe
    | Probed
    | Keep
    | Weigh
    | Weighed
    | Like
    | Join
    | Joined
    | Streams
)

MESSAGE_TYPES: Final[dict[FrameType, type[Message]]] = {
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
    FrameType.PROBE: Probe,
    FrameType.PROBED: Probed,
    FrameType.KEEP: Keep,
    FrameType.WEIGH: Weigh,
    FrameType.WEIGHED: Weighed,
    FrameType.LIKE: Like,
    FrameType.JOIN: Join,
    FrameType.JOINED: Joined,
    FrameType.STREAMS: Streams,
}
_TYPE_OF: Final = {message: frame_type for frame_type, message in MESSAGE_TYPES.items()}
MESSAGE_DECODERS: Final = {frame_type: msgspec.json.Decoder(message) for frame_type, message in MESSAGE_TYPES.items()}

FROM_SOURCE: Final = SEQUENCED | frozenset(
    {
        FrameType.HELLO,
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
        FrameType.PROBE,
        FrameType.KEEP,
        FrameType.WEIGH,
        FrameType.LIKE,
        FrameType.JOIN,
        FrameType.STREAMS,
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


class BaseFrame(NamedTuple):
    """Extents of an overlay that read as its base."""

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
        return _verify(self, self.payload)


class PackedFrame(NamedTuple):
    """Compressed bytes of a disk; whoever has unpacked them calls `verify` with the result before using it."""

    disk: int
    sequence: int
    extents: Sequence[Span]
    payload: memoryview
    head: bytes
    check: int
    length: int
    """How many bytes it must unpack to: the sum of the extents."""

    def verify(self, unpacked: Buffer) -> int:
        """Check the unpacked bytes and the header as `DataFrame.verify` does."""
        return _verify(self, unpacked)


def _verify(frame: DataFrame | PackedFrame, content: Buffer) -> int:
    payload_hash = xxh3_64_intdigest(content)
    if xxh3_64_intdigest(frame.head, seed=payload_hash) != frame.check:
        raise RemoteProtocolError(f"checksum of data frame {frame.sequence} does not match: it was damaged on the way")
    return payload_hash


Frame = ZeroFrame | BaseFrame | DataFrame | PackedFrame
"""What changes the image."""
Event = Message | Ack | Frame


def encode_message(message: Message) -> bytes:
    """Return a control frame."""
    return _encode(_TYPE_OF[type(message)], payload=msgspec.json.encode(message))


def encode_ack(sequence: int) -> bytes:
    """Return an acknowledgement of every frame up to ``sequence``."""
    return _encode(FrameType.ACK, sequence=sequence)


def encode_zero(disk: int, sequence: int, extents: Sequence[Span]) -> bytes:
    """Return a frame that makes extents (ascending, at most `MAX_EXTENTS`) read as zeros."""
    return _encode(FrameType.ZERO, disk=disk, sequence=sequence, extents=extents)


def encode_base(disk: int, sequence: int, extents: Sequence[Span]) -> bytes:
    """Return a frame that makes extents (as in `encode_zero`) read as the shared base."""
    return _encode(FrameType.BASE, disk=disk, sequence=sequence, extents=extents)


def encode_packed(disk: int, sequence: int, extents: Sequence[Span], content_hash: int, length: int) -> bytes:
    """Return what goes before ``length`` compressed bytes; ``content_hash`` is of what they unpack to."""
    return _head(FrameType.PACKED, disk, sequence, extents, content_hash, length)


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


EMPTY_HASH: Final = xxh3_64_intdigest(b"")


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
    head = HEADER.pack(MAGIC, frame_type, 0, disk, len(extents), sequence, offset, first_length, length, 0)
    table = b"".join(PAIR.pack(*extent) for extent in extents[1:])
    check = xxh3_64_intdigest(head + table, seed=payload_hash)
    return head + CHECK.pack(check) + table


PAIR: Final = struct.Struct(">QQ")
assert PAIR.size == EXTENT_SIZE
