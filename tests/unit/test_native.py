"""The native wire: one table drives encoder and decoder; whatever else comes is refused cheaply."""

from __future__ import annotations

import json
import tracemalloc
from contextlib import suppress
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from fusemig.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from fusemig.units import CHUNK_SIZE, MAX_DISK_SIZE
from fusemig.wire import native
from fusemig.wire.native import Ack, DataFrame, Decoder, FrameType, ZeroFrame, frames

EVERY_TYPE = frozenset(FrameType)
PAYLOAD = bytes(range(256)) * 4


class Data(NamedTuple):
    """A data frame as a value: the real one holds a view."""

    disk: int
    sequence: int
    extents: list[tuple[int, int]]
    payload: bytes


def encode(event: native.Event | Data) -> bytes:
    """Return the bytes of an event."""
    match event:
        case Ack():
            return native.encode_ack(event.sequence)
        case ZeroFrame():
            return native.encode_zero(*event)
        case native.BaseFrame():
            return native.encode_base(*event)
        case Data():
            payload_hash = xxh3_64_intdigest(event.payload)
            return native.encode_data(*event[:3], payload_hash, len(event.payload)) + event.payload
        case DataFrame() | native.PackedFrame():
            raise AssertionError(event)
        case _:
            return native.encode_message(event)


def plain(event: native.Event) -> native.Event | Data:
    """Return an event as a value; a data frame is verified first."""
    if not isinstance(event, DataFrame):
        return event
    assert event.verify() == xxh3_64_intdigest(event.payload)
    return Data(event.disk, event.sequence, list(event.extents), bytes(event.payload))


TABLE: list[tuple[native.Event | Data, str]] = [
    (Ack(0x0102030405060708), "f5ed 06 00 0000 0000 0102030405060708" + "00" * 24 + "b4f651056a4979fe"),
    (native.Sync(), "f5ed 08 00 0000 0000 0000000000000000" + "00" * 16 + "00000002 00000000 615e3992ecebad8f 7b7d"),
    (
        ZeroFrame(1, 1, [(1024, 512)]),
        "f5ed 05 00 0001 0001 0000000000000001 0000000000000400 0000000000000200 0000000000000000 6b0b978cd405be99",
    ),
]
"""Events and their bytes, once and for all: a change of these is a new version of the wire."""

EVENTS: list[native.Event | Data] = [
    native.Hello(1, "5e55", CHUNK_SIZE, [native.DiskOffer("a", 512, "id", 0), native.DiskOffer("ü", 1 << 44, "", 7)]),
    native.Hello(1, "", 0, [], ["zstd"]),
    native.Welcome(1),
    native.Refuse("disk 'a' has 512 bytes, not 1024"),
    native.Progress(3, 1 << 40, 1 << 44),
    native.Sync(),
    native.Synced(),
    native.FinalProofs([native.DiskProof((1 << 64) - 1, 1)]),
    native.PreparedProofs([native.DiskProof(0, 1), native.DiskProof(5, 2)]),
    native.Commit(),
    native.Taken(),
    native.Released(),
    native.Abort("cancelled at the source"),
    Ack(0),
    Ack((1 << 64) - 1),
    ZeroFrame(0, 1, [(0, MAX_DISK_SIZE)]),
    ZeroFrame(65535, 1, [(512 * 2 * i, 512) for i in range(native.MAX_EXTENTS)]),
    native.BaseFrame(2, 1, [(0, 4096), (8192, 512)]),
    native.Welcome(1, ["delta"], deltas=[native.Delta.PROVED, native.Delta.NOTHING], thin=[False, True]),
    native.Keep(0, b"\0" * 16),
    native.Lend(1, "5e55", [native.AskedDisk("id", 3)], [b"\1" * 8 * native.MAX_HOT]),
    native.Lend(1, "", []),
    native.Weigh(-1),
    native.Weigh(1, b"\1" * 8 * native.WEIGHED_CHUNKS),
    native.Weighed(bytes(range(256)) * 16 * native.WEIGHED_CHUNKS),
    native.Like(b"\xff" * 32),
    Data(0, 1, [(0, 1024)], PAYLOAD),
    Data(3, 1, [(512, 512), (4096, 512)], PAYLOAD),
    Data(0, 1, [(7 * CHUNK_SIZE, CHUNK_SIZE)], b"x" * CHUNK_SIZE),
    Data(0, 1, [(MAX_DISK_SIZE - 1024, 1024)], PAYLOAD),
    Data(0, 1, [(8192 * i, 4096) for i in range(native.MAX_EXTENTS)], b"y" * CHUNK_SIZE),
]
IDS = [f"{number}-{type(event).__name__}" for number, event in enumerate(EVENTS)]


def decode(data: bytes, *, preface: bool = False) -> list[native.Event | Data]:
    """Decode bytes that come all at once."""
    return [plain(event) for event in Decoder(EVERY_TYPE, preface=preface).feed(data)]


@pytest.mark.parametrize(("event", "expected"), TABLE)
def test_the_bytes_are_fixed(event: native.Event | Data, expected: str) -> None:
    """Encoder and decoder agree with the table, byte for byte."""
    assert encode(event).hex() == expected.replace(" ", "")
    assert decode(bytes.fromhex(expected)) == [event]


@pytest.mark.parametrize("event", EVENTS, ids=IDS)
def test_whole(event: native.Event | Data) -> None:
    """What was encoded is decoded, and the stream may end there."""
    decoder = Decoder(EVERY_TYPE, preface=False)
    assert [plain(found) for found in decoder.feed(encode(event))] == [event]
    assert decoder.is_between_frames
    assert not decoder.needs_buffer


@pytest.mark.parametrize("event", EVENTS, ids=IDS)
def test_byte_by_byte(event: native.Event | Data) -> None:
    """The event comes with its last byte; until then the stream must not end."""
    data = encode(event)
    if len(data) > 100_000:
        data = data[:100_000]
        event = Ack(0)
    decoder = Decoder(EVERY_TYPE, preface=False)
    assert decoder.is_between_frames
    for number in range(len(data) - 1):
        assert decoder.feed(data[number : number + 1]) == []
        assert not decoder.is_between_frames
    if event != Ack(0):
        assert [plain(found) for found in decoder.feed(data[-1:])] == [event]


@pytest.mark.parametrize("event", EVENTS, ids=IDS)
def test_with_what_follows(event: native.Event | Data) -> None:
    """A frame ends where it ends."""
    decoder = Decoder(EVERY_TYPE, preface=False)
    following = encode(native.Taken()) + encode(Ack(9))
    found = [plain(one) for one in decoder.feed(encode(event) + following + b"\xf5\xed")]
    assert found == [event, native.Taken(), Ack(9)]
    assert not decoder.is_between_frames


def test_the_preface_comes_first() -> None:
    """The source's side of a connection begins with it, the destination's does not."""
    assert decode(native.PREFACE + encode(native.Sync()), preface=True) == [native.Sync()]
    decoder = Decoder(EVERY_TYPE, preface=True)
    assert not decoder.is_between_frames
    decoder.feed(native.PREFACE[:3])
    with pytest.raises(RemoteProtocolError, match=r"^this is not a fusemig stream: connect with `fusemig migrate`$"):
        decoder.feed(b"GET / HTTP/1.1\r\n")


def header(
    frame_type: int = FrameType.ACK,
    *,
    magic: int = native.MAGIC,
    flags: int = 0,
    n_extents: int = 0,
    sequence: int = 1,
    offset: int = 0,
    length: int = 0,
    payload: int = 0,
    zero: int = 0,
) -> bytes:
    """Return a header with a right check over wrong fields (the payload taken for empty)."""
    head = frames.HEADER.pack(magic, frame_type, flags, 0, n_extents, sequence, offset, length, payload, zero)
    return head + frames.CHECK.pack(xxh3_64_intdigest(head, seed=xxh3_64_intdigest(b"")))


def message(frame_type: FrameType, payload: bytes) -> bytes:
    """Return a control frame around any payload."""
    return frames._encode(frame_type, payload=payload)


ZERO, DATA, HELLO, PACKED = FrameType.ZERO, FrameType.DATA, FrameType.HELLO, FrameType.PACKED

MALFORMED = [
    (header(magic=0xF5EE), "the stream is out of step: no frame begins here"),
    (bytes(48), "the stream is out of step: no frame begins here"),
    (header(flags=1), "frame with unknown flags 0x1: the peer speaks a later version"),
    (header(zero=1), "frame with unknown flags 0x0: the peer speaks a later version"),
    (header(0), "unknown frame type 0"),
    (header(16), "unknown frame type 16"),
    (header(FrameType.TAKEN), "frame type TAKEN does not come from this side"),
    (header(ZERO, n_extents=1, length=512, sequence=0), "frame 0 came where 1 was due"),
    (header(DATA, n_extents=1, length=512, sequence=2, payload=512), "frame 2 came where 1 was due"),
    (encode(ZeroFrame(0, 1, [(0, 512)])) * 2, "frame 1 came where 2 was due"),
    (header(ZERO), "0 extents in one frame; 1 to 256 are allowed"),
    (header(DATA, n_extents=257, length=512, payload=512), "257 extents in one frame; 1 to 256 are allowed"),
    (header(DATA, n_extents=65535, length=512, payload=512), "65535 extents in one frame; 1 to 256 are allowed"),
    (header(FrameType.SYNC, n_extents=1, length=512), "extents in a SYNC frame"),
    (
        header(DATA, n_extents=1, length=1 << 20, payload=CHUNK_SIZE + 1),
        "payload of 1048577 bytes in a DATA frame; at most 1048576",
    ),
    (header(DATA, n_extents=1, length=512), "payload of 0 bytes in a DATA frame; at most 1048576"),
    (header(DATA, n_extents=1, payload=0xFFFFFFFF), "payload of 4294967295 bytes in a DATA frame; at most 1048576"),
    (header(ZERO, n_extents=1, length=512, payload=1), "payload of 1 bytes in a ZERO frame; at most 0"),
    (header(FrameType.ACK, payload=1), "payload of 1 bytes in a ACK frame; at most 0"),
    (header(HELLO, payload=262145), "payload of 262145 bytes in a HELLO frame; at most 262144"),
    (header(ZERO, n_extents=1), "extent 0+0 is empty, unaligned or out of order"),
    (header(ZERO, n_extents=1, offset=1, length=512), "extent 1+512 is empty, unaligned or out of order"),
    (header(ZERO, n_extents=1, length=100), "extent 0+100 is empty, unaligned or out of order"),
    (
        header(ZERO, n_extents=1, offset=MAX_DISK_SIZE, length=512),
        f"an extent ends at {MAX_DISK_SIZE + 512}, beyond the largest disk",
    ),
    (
        header(ZERO, n_extents=1, offset=(1 << 64) - 512, length=512),
        f"an extent ends at {1 << 64}, beyond the largest disk",
    ),
    (
        native.encode_zero(0, 1, [(4096, 512), (0, 512)]),
        "extent 0+512 is empty, unaligned or out of order",
    ),
    (native.encode_zero(0, 1, [(0, 1024), (512, 512)]), "extent 512+512 is empty, unaligned or out of order"),
    (
        native.encode_data(0, 1, [(0, 512), (1024, 512)], 0, 1536),
        "extents of 1024 bytes with a payload of 1536",
    ),
    (native.encode_data(0, 1, [(0, MAX_DISK_SIZE)], 0, 512), f"extents of {MAX_DISK_SIZE} bytes with a payload of 512"),
    (header(PACKED, n_extents=1, length=512), "payload of 0 bytes in a PACKED frame; at most 1048576"),
    (
        native.encode_packed(0, 1, [(0, 512)], 0, 512),
        "extents of 512 bytes with 512 compressed bytes",
    ),
    (
        native.encode_packed(0, 1, [(0, CHUNK_SIZE + 512)], 0, 512),
        f"extents of {CHUNK_SIZE + 512} bytes with 512 compressed bytes",
    ),
    (native.encode_base(0, 1, [(0, 1024), (512, 512)]), "extent 512+512 is empty, unaligned or out of order"),
    (header(FrameType.BASE, n_extents=1, length=512, payload=1), "payload of 1 bytes in a BASE frame; at most 0"),
    (encode(ZeroFrame(0, 1, [(0, 512)]))[:-1] + b"\0", "checksum of a ZERO frame does not match"),
    (encode(Ack(5))[:-1] + b"\0", "checksum of a ACK frame does not match"),
    (encode(native.Sync())[:-1] + b" ", "checksum of a SYNC frame does not match"),
    (message(HELLO, b""), "malformed HELLO message: Input data was truncated"),
    (message(HELLO, b"{"), "malformed HELLO message: Input data was truncated"),
    (message(HELLO, b"{}"), "malformed HELLO message: Object missing required field `version`"),
    (message(HELLO, b"[]"), "malformed HELLO message: Expected `object`, got `array`"),
    (
        message(HELLO, b'{"version":"1","session":"","chunk_size":1,"disks":[]}'),
        "malformed HELLO message: Expected `int`, got `str` - at `$.version`",
    ),
    (
        message(HELLO, b'{"version":1,"session":"\xff","chunk_size":1,"disks":[]}'),
        "malformed HELLO message: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
    ),
    (
        message(FrameType.ABORT, b'{"reason":null}'),
        "malformed ABORT message: Expected `str`, got `null` - at `$.reason`",
    ),
    (
        message(FrameType.ABORT, b'{"reason":""} {}'),
        "malformed ABORT message: JSON is malformed: trailing characters (byte 15)",
    ),
    (
        message(HELLO, b'{"x":' + b"[" * 100_000),
        "malformed HELLO message: maximum recursion depth exceeded while deserializing an object",
    ),
    (
        message(
            HELLO, b'{"version":1,"session":"","chunk_size":1,"disks":[],"features":[' + b'"a",' * 50_000 + b'"a"]}'
        ),
        "HELLO message with more than 8192 separators",
    ),
    (
        message(FrameType.FINAL, b'{"disks":[' + b"[]," * 80_000 + b"1]}"),
        "FINAL message with more than 8192 separators",
    ),
]


def feed_in_steps(decoder: Decoder, data: bytes, step: int) -> None:
    """Feed pieces of ``step`` bytes."""
    for at in range(0, len(data), step):
        decoder.feed(data[at : at + step])


@pytest.mark.parametrize(("data", "text"), MALFORMED, ids=[f"{n}-{text[:40]}" for n, (_, text) in enumerate(MALFORMED)])
def test_malformed(data: bytes, text: str) -> None:
    """Every malformed frame gets its stable text, whole or in pieces, and next to no memory before that."""
    allowed = EVERY_TYPE if "TAKEN" not in text else native.FROM_SOURCE
    for step in (len(data), 4099, 1) if len(data) < 1000 else (len(data), 4099):
        decoder = Decoder(allowed, preface=False)
        tracemalloc.start()
        try:
            with pytest.raises(RemoteProtocolError) as caught:
                feed_in_steps(decoder, data, step)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert str(caught.value) == text
        assert peak < 2 * CHUNK_SIZE


LARGEST = [
    native.Hello(1, "s", CHUNK_SIZE, [native.DiskOffer("n", i, "i", i) for i in range(2000)]),
    native.FinalProofs([native.DiskProof((1 << 63) + i, i) for i in range(4000)]),
    native.Abort("a" * 200_000 + "\U0001f600"),
    Data(0, 1, [(8192 * i, 4096) for i in range(native.MAX_EXTENTS)], b"y" * CHUNK_SIZE),
    ZeroFrame(65535, 1, [(512 * 2 * i, 512) for i in range(native.MAX_EXTENTS)]),
]


@pytest.mark.parametrize("event", LARGEST, ids=lambda event: type(event).__name__)
def test_memory_is_bounded(event: native.Event | Data) -> None:
    """The largest messages there can be stay within two chunks, payload included."""
    data = encode(event)
    decoder = Decoder(EVERY_TYPE, preface=False)
    tracemalloc.start()
    try:
        decoder.feed(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * CHUNK_SIZE


@pytest.mark.parametrize("at", [5, 18, 50, 60, 80, 500, -1])
def test_a_damaged_data_frame_is_noticed(at: int) -> None:
    """A flipped bit anywhere in head, extents or payload; where the frame still makes sense the text names it."""
    data = bytearray(encode(Data(3, 1, [(512, 512), (4096, 512)], PAYLOAD)))
    data[at] ^= 2
    with pytest.raises(RemoteProtocolError) as caught:
        decode(bytes(data))
    if at not in (18, 50, 60):
        assert str(caught.value) == "checksum of data frame 1 does not match: it was damaged on the way"


@pytest.mark.parametrize("at", [-1, 5, 18, 52])
def test_a_damaged_packed_frame_is_noticed(at: int) -> None:
    """The check is over what is unpacked: a flipped bit of head, table or contents shows."""
    content = bytearray(PAYLOAD)
    head = bytearray(native.encode_packed(3, 1, [(512, 512), (4096, 512)], xxh3_64_intdigest(content), 10))
    frame = Decoder(EVERY_TYPE, preface=False).feed(bytes(head) + b"compressed")[0]
    assert isinstance(frame, native.PackedFrame)
    assert (bytes(frame.payload), frame.length) == (b"compressed", 1024)
    assert frame.verify(content) == xxh3_64_intdigest(content)
    if at == -1:
        content[at] ^= 2
    else:
        head[at] ^= 2
    with pytest.raises(RemoteProtocolError):
        damaged = Decoder(EVERY_TYPE, preface=False).feed(bytes(head) + b"compressed")[0]
        assert isinstance(damaged, native.PackedFrame)
        damaged.verify(content)


@pytest.mark.parametrize("allowed", [native.FROM_SOURCE, native.FROM_DESTINATION])
def test_who_may_say_what(allowed: frozenset[FrameType]) -> None:
    """Between them the two sides say everything, and only ABORT may come from either."""
    assert native.FROM_SOURCE | native.FROM_DESTINATION == EVERY_TYPE
    assert {FrameType.ABORT} == native.FROM_SOURCE & native.FROM_DESTINATION
    for event in EVENTS:
        data = encode(event)
        decoder = Decoder(allowed, preface=False)
        if data[2] in allowed:
            assert len(decoder.feed(data)) == 1
        else:
            with pytest.raises(RemoteProtocolError, match=r"does not come from this side$"):
                decoder.feed(data)


def test_our_own_misuse_is_ours() -> None:
    """Too many extents to encode, and a payload without a buffer, are bugs of the caller."""
    with pytest.raises(LocalProtocolError, match=r"^257 extents in one frame$"):
        native.encode_zero(0, 1, [(1024 * i, 512) for i in range(257)])
    decoder = Decoder(EVERY_TYPE, preface=False)
    head = encode(Data(0, 1, [(0, 1024)], PAYLOAD))[: native.HEADER_SIZE]
    decoder.wanted[:] = head
    decoder.advance(len(head))
    assert decoder.needs_buffer
    with pytest.raises(LocalProtocolError, match=r"^a payload comes next and no buffer was given$"):
        _ = decoder.wanted
    with pytest.raises(TypeError):
        raise ProtocolError("abstract")


def test_a_payload_is_not_copied() -> None:
    """The caller's own buffer comes back in the frame, cut to the payload's length."""
    decoder = Decoder(EVERY_TYPE, preface=False)
    data = encode(Data(0, 1, [(0, 1024)], PAYLOAD))
    decoder.feed(data[: native.HEADER_SIZE])
    buffer = bytearray(CHUNK_SIZE)
    decoder.give_buffer(buffer)
    (frame,) = decoder.feed(data[native.HEADER_SIZE :])
    assert isinstance(frame, DataFrame)
    assert frame.payload.obj is buffer
    assert buffer[:1024] == PAYLOAD


small_events = [event for event in EVENTS if len(encode(event)) < 8192]
streams = st.lists(st.sampled_from(small_events), max_size=6)


def number(events: list[native.Event | Data]) -> list[native.Event | Data]:
    """Give data and zero frames their sequence numbers."""
    numbered: list[native.Event | Data] = []
    sequence = 0
    for event in events:
        if isinstance(event, Data | ZeroFrame | native.BaseFrame):
            sequence += 1
            numbered.append(event._replace(sequence=sequence))
        else:
            numbered.append(event)
    return numbered


@given(streams.map(number), st.data())
def test_any_split(events: list[native.Event | Data], data: st.DataObject) -> None:
    """Where the stream is cut into pieces changes nothing."""
    stream = native.PREFACE + b"".join(map(encode, events))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)), max_size=8)))
    decoder = Decoder(EVERY_TYPE, preface=True)
    found = []
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += [plain(event) for event in decoder.feed(stream[start:stop])]
    assert found == events
    assert decoder.is_between_frames


@given(streams.filter(bool).map(number), st.data())
def test_any_flipped_bit(events: list[native.Event | Data], data: st.DataObject) -> None:
    """A flipped bit is refused, or leaves the stream in the middle of a frame; it never makes another event."""
    stream = bytearray(b"".join(map(encode, events)))
    stream[data.draw(st.integers(0, len(stream) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    decoder = Decoder(EVERY_TYPE, preface=False)
    found: list[native.Event | Data] = []
    try:
        for at in range(0, len(stream), 64):
            found += [plain(event) for event in decoder.feed(bytes(stream[at : at + 64]))]
    except RemoteProtocolError:
        pass
    else:
        assert not decoder.is_between_frames
    assert found == events[: len(found)]
    assert len(found) < len(events)


@given(st.binary(max_size=300), st.booleans())
@settings(max_examples=300)
def test_garbage(data: bytes, preface: bool) -> None:
    """Garbage parses or raises `RemoteProtocolError`, and nothing else."""
    decoder = Decoder(EVERY_TYPE, preface=preface)
    with suppress(RemoteProtocolError):
        decoder.feed(data)


@given(
    st.integers(0, 20),
    st.integers(0, 1),
    st.integers(0, 300),
    st.integers(0, 2),
    st.integers(0, (1 << 64) - 1) | st.sampled_from([0, 512, 4096]),
    st.integers(0, (1 << 64) - 1) | st.sampled_from([0, 512, 4096]),
    st.integers(0, (1 << 32) - 1) | st.integers(0, 5000),
    st.binary(max_size=500),
)
@settings(max_examples=500)
def test_garbage_behind_a_good_header(
    frame_type: int, flags: int, n_extents: int, sequence: int, offset: int, length: int, payload: int, rest: bytes
) -> None:
    """Fields of any value with a right check, and any bytes after them."""
    head = header(
        frame_type,
        flags=flags,
        n_extents=n_extents,
        sequence=sequence,
        offset=offset,
        length=length,
        payload=payload,
    )
    try:
        for event in Decoder(EVERY_TYPE, preface=False).feed(head + rest):
            plain(event)
    except RemoteProtocolError:
        pass


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["version", "session", "chunk_size", "disks", "features", "digest", "epoch", "reason"]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=10,
)


@given(st.sampled_from(sorted(native.MESSAGE_TYPES)), json_like)
def test_any_json_in_any_message(frame_type: FrameType, value: object) -> None:
    """JSON of another shape is refused or ignored where it is unknown, never another error."""
    with suppress(RemoteProtocolError):
        decode(message(frame_type, json.dumps(value).encode()))
