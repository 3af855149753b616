"""QEMU's block records: one table drives encoder and decoder, and every broken record has its error."""

from __future__ import annotations

import tracemalloc
from contextlib import suppress
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusemig.core.units import CHUNK_SIZE, MAX_DISK_SIZE, SECTOR_SIZE
from fusemig.errors import ConfigError, LocalProtocolError, RemoteProtocolError
from fusemig.wire import qemu_block
from fusemig.wire.qemu_block import (
    BlockCompleteness,
    BlockData,
    BlockEos,
    BlockProgress,
    BlockZero,
    Decoder,
    Device,
    Encoder,
    Tail,
)

ODD = 5 * CHUNK_SIZE + 1536
DEVICES = [Device("d0", ODD), Device("virtio-ü", 2 * CHUNK_SIZE), Device("n" * 255, MAX_DISK_SIZE)]
CHUNK = bytes(range(256)) * 4096


class Data(NamedTuple):
    """Data of a device as a value: the real event holds a view."""

    device: int
    offset: int
    payload: bytes


PlainEvent = BlockZero | BlockProgress | BlockEos | Data


def plain(event: qemu_block.Event) -> PlainEvent:
    """Return an event as a value."""
    return Data(*event[:2], bytes(event.payload)) if isinstance(event, BlockData) else event


def decode(data: bytes) -> list[PlainEvent]:
    """Decode bytes that come all at once."""
    decoder = Decoder(DEVICES)
    decoder.begin(1)
    return [plain(event) for event in decoder.feed(data)]


def encode(event: PlainEvent) -> bytes:
    """Return the bytes of an event."""
    encoder = Encoder(DEVICES)
    match event:
        case Data():
            return b"".join(encoder.data(*event))
        case BlockZero():
            return encoder.zero(event.device, event.offset // CHUNK_SIZE)
        case BlockProgress():
            total = sum(device.size for device in DEVICES)
            return encoder.progress(-(-event.percent * total // 100))
        case BlockEos():
            return qemu_block.END_OF_SECTION


TABLE: list[tuple[PlainEvent, bytes]] = [
    (BlockEos(), bytes.fromhex("0000000000000002")),
    (BlockProgress(0), bytes.fromhex("0000000000000004")),
    (BlockProgress(66), bytes.fromhex("0000000000008404")),
    (BlockProgress(100), bytes.fromhex("000000000000c804")),
    (BlockZero(0, 0, CHUNK_SIZE), bytes.fromhex("0000000000000009 02 6430")),
    (BlockZero(0, 5 * CHUNK_SIZE, 1536), bytes.fromhex("0000000000500009 02 6430")),
    (Data(0, 0, CHUNK), bytes.fromhex("0000000000000001 02 6430") + CHUNK),
    (Data(1, CHUNK_SIZE, CHUNK), bytes.fromhex("0000000000100001 09") + "virtio-ü".encode() + CHUNK),
    (
        Data(0, 5 * CHUNK_SIZE, CHUNK[:1536]),
        bytes.fromhex("0000000000500001 02 6430") + CHUNK[:1536] + bytes(CHUNK_SIZE - 1536),
    ),
    (Data(0, ODD - CHUNK_SIZE, CHUNK), bytes.fromhex("0000000000400601 02 6430") + CHUNK),
    (
        Data(2, MAX_DISK_SIZE - CHUNK_SIZE, CHUNK),
        bytes.fromhex("00000ffffff00001 ff") + b"n" * 255 + CHUNK,
    ),
]
"""Events and their bytes: block.c's, not ours to change."""

IDS = [f"{number}-{type(event).__name__}" for number, (event, _) in enumerate(TABLE)]


@pytest.mark.parametrize(("event", "data"), TABLE, ids=IDS)
def test_whole(event: PlainEvent, data: bytes) -> None:
    """Encoder and decoder agree with the table, and the stream may end after a record."""
    assert encode(event) == data
    decoder = Decoder(DEVICES)
    assert [plain(found) for found in decoder.feed(data)] == [event]
    assert decoder.is_between_records
    decoder.close()


@pytest.mark.parametrize(("event", "data"), TABLE, ids=IDS)
def test_byte_by_byte(event: PlainEvent, data: bytes) -> None:
    """The event comes with its last byte; a stream that ends before is cut, and says so."""
    decoder = Decoder(DEVICES)
    at = 0
    while at < len(data) - 1:
        step = 1 if at < 300 or at >= len(data) - 10 else min(4093, len(data) - 10 - at)
        assert decoder.feed(data[at : at + step]) == []
        at += step
        assert not decoder.is_between_records
        with pytest.raises(RemoteProtocolError, match=r"^the stream ends in the middle of a block record: "):
            decoder.close()
    assert [plain(found) for found in decoder.feed(data[-1:])] == [event]


@pytest.mark.parametrize(("event", "data"), TABLE, ids=IDS)
def test_with_what_follows(event: PlainEvent, data: bytes) -> None:
    """A record ends where it ends."""
    decoder = Decoder(DEVICES)
    found = [plain(one) for one in decoder.feed(data + TABLE[2][1] + TABLE[0][1] + b"\0")]
    assert found == [event, BlockProgress(66), BlockEos()]
    assert not decoder.is_between_records


def test_a_truncated_payload_is_noticed_before_its_first_byte() -> None:
    """The head of a record alone is no record."""
    decoder = Decoder(DEVICES)
    decoder.feed(TABLE[6][1][:11])
    assert decoder.needs_buffer
    with pytest.raises(RemoteProtocolError, match="in the middle of a block record"):
        decoder.close()


def test_sections() -> None:
    """A section lasts from `begin` to its EOS, and its version is 1."""
    decoder = Decoder(DEVICES)
    states = [decoder.is_in_section]
    decoder.begin(1)
    for data in (TABLE[1][1], qemu_block.END_OF_SECTION):
        states.append(decoder.is_in_section)
        decoder.feed(data)
    assert [*states, decoder.is_in_section] == [False, True, True, False]
    with pytest.raises(RemoteProtocolError, match=r"^unsupported version 2 of the 'block' section; 1 is known$"):
        decoder.begin(2)


def head(sector: int, flags: int, name: bytes | None = None) -> bytes:
    """Return the start of a record with any fields."""
    data = (sector << 9 | flags).to_bytes(8, "big")
    return data if name is None else data + bytes([len(name)]) + name


MALFORMED: list[tuple[bytes, str]] = [
    (head(0, 1, b"d1"), f"unknown block device 'd1'; expected: 'd0', 'virtio-ü', '{'n' * 255}'"),
    (head(0, 9, b"\xff\0../x"), f"unknown block device '\\xff\0../x'; expected: 'd0', 'virtio-ü', '{'n' * 255}'"),
    (head(0, 1, b""), "a block device without a name: give every disk in QEMU an id (-drive id=NAME)"),
    (head(0, 0), "unknown block migration flags: 0x0"),
    (head(0, 0x10), "unknown block migration flags: 0x10"),
    (head(0, 0x11, b"d0"), "unknown block migration flags: 0x11"),
    (head(0, 8, b"d0"), "unknown block migration flags: 0x8"),
    (head(0, 3, b"d0"), "unknown block migration flags: 0x3"),
    (head(0, 5, b"d0"), "unknown block migration flags: 0x5"),
    (head(0, 0x1FF, b"d0"), "unknown block migration flags: 0x1ff"),
    (head(ODD // 512, 1, b"d0"), "sector 10243 is beyond the end of block device 'd0', which has 10243"),
    (head((1 << 55) - 1, 9, b"d0"), f"sector {(1 << 55) - 1} is beyond the end of block device 'd0', which has 10243"),
    (head(101, 4), "block migration progress of 101 %"),
    (head((1 << 55) - 1, 4), f"block migration progress of {(1 << 55) - 1} %"),
    (head(1, 2), "the end of a block section with a sector number 1"),
]


def feed_in_steps(decoder: Decoder, data: bytes, step: int) -> None:
    """Feed pieces of ``step`` bytes."""
    for at in range(0, len(data), step):
        decoder.feed(data[at : at + step])


@pytest.mark.parametrize(("data", "text"), MALFORMED, ids=[f"{n}-{text[:30]}" for n, (_, text) in enumerate(MALFORMED)])
def test_malformed(data: bytes, text: str) -> None:
    """Every malformed record gets its stable text, whole or in pieces, before memory is asked for."""
    for step in (len(data), 1):
        decoder = Decoder(DEVICES)
        tracemalloc.start()
        try:
            with pytest.raises(RemoteProtocolError) as caught:
                feed_in_steps(decoder, data, step)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert str(caught.value) == text
        assert peak < 64 * 1024


def test_many_known_devices_make_no_endless_text() -> None:
    """An error names eight devices at most."""
    decoder = Decoder([Device(f"d{number}", 512) for number in range(1000)])
    with pytest.raises(RemoteProtocolError, match=r"expected: 'd0', .*'d7', \.\.\.$"):
        decoder.feed(head(0, 1, b"nope"))


def test_memory_is_bounded() -> None:
    """However long the stream, there is one chunk at a time."""
    record = TABLE[6][1]
    decoder = Decoder(DEVICES)
    tracemalloc.start()
    try:
        for _ in range(16):
            decoder.feed(memoryview(record))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * CHUNK_SIZE


def test_a_payload_is_not_copied() -> None:
    """The caller's own memory goes in and comes out, on both sides, cut where the disk ends."""
    payload = bytearray(CHUNK[:1536])
    buffers = Encoder(DEVICES).data(0, 5 * CHUNK_SIZE, payload)
    assert [len(buffer) for buffer in buffers] == [11, 1536, CHUNK_SIZE - 1536]
    assert isinstance(buffers[1], memoryview)
    assert buffers[1].obj is payload
    decoder = Decoder(DEVICES)
    decoder.feed(buffers[0])
    buffer = bytearray(CHUNK_SIZE)
    decoder.give_buffer(buffer)
    (event,) = decoder.feed(b"".join(buffers[1:]))
    assert isinstance(event, BlockData)
    assert event.payload.obj is buffer
    assert event.payload == payload


def test_our_own_misuse_is_ours() -> None:
    """Wrong spans to encode, and buffers at the wrong time, are bugs of the caller."""
    encoder = Encoder(DEVICES)
    for offset, length in ((0, 512), (0, 0), (5 * CHUNK_SIZE, CHUNK_SIZE), (1, CHUNK_SIZE), (-512, CHUNK_SIZE)):
        with pytest.raises(LocalProtocolError):
            encoder.data(0, offset, bytes(length))
    with pytest.raises(LocalProtocolError, match="is not a sector of a disk"):
        encoder.zero(0, 6)
    decoder = Decoder(DEVICES)
    with pytest.raises(LocalProtocolError, match="a buffer of 1048576 bytes was given"):
        decoder.give_buffer(bytearray(CHUNK_SIZE))
    decoder.feed(head(0, 1, b"d0"))
    with pytest.raises(LocalProtocolError, match=r"^a payload comes next and no buffer was given$"):
        _ = decoder.wanted
    with pytest.raises(LocalProtocolError, match="a buffer of 512 bytes was given"):
        decoder.give_buffer(bytearray(512))


@pytest.mark.parametrize("name", ["", "n" * 256, "a\0b"])
def test_names_that_cannot_be_sent(name: str) -> None:
    """QEMU has one byte for the length, and C strings."""
    with pytest.raises(ConfigError, match="cannot be the name of a disk in QEMU's stream"):
        Encoder([Device(name, 512)])


def test_spans() -> None:
    """A record carries a chunk; the short last one as it is, or the last MiB of the disk for a QEMU."""
    padded, overlapping = Encoder(DEVICES), Encoder(DEVICES, tail=Tail.OVERLAPPING)
    assert padded.span(0, 4) == overlapping.span(0, 4) == (4 * CHUNK_SIZE, CHUNK_SIZE)
    assert padded.span(0, 5) == (5 * CHUNK_SIZE, 1536)
    assert overlapping.span(0, 5) == (ODD - CHUNK_SIZE, CHUNK_SIZE)
    assert overlapping.span(1, 1) == (CHUNK_SIZE, CHUNK_SIZE)
    Encoder([Device("small", 512)])
    with pytest.raises(ConfigError, match="disk 'small' is smaller than 1 MiB"):
        Encoder([Device("small", 512)], tail=Tail.OVERLAPPING)


def test_progress_comes_when_the_percentage_changes() -> None:
    """As block.c does it: once for each whole percentage, and 100 at the end in any case."""
    encoder = Encoder([Device("a", 300 * CHUNK_SIZE), Device("b", 100 * CHUNK_SIZE)])
    stream = b"".join(encoder.progress(chunk * CHUNK_SIZE) for chunk in range(400)) + encoder.end()
    assert decode(stream) == [*(BlockProgress(percent) for percent in range(101)), BlockEos()]


def bulk(devices: list[Device]) -> list[qemu_block.Event]:
    """Return the events of a whole bulk phase."""
    events: list[qemu_block.Event] = []
    done = 0
    for index, device in enumerate(devices):
        for offset in range(0, device.size, CHUNK_SIZE):
            total = sum(device.size for device in devices)
            events.append(BlockProgress(done * 100 // total))
            if offset + CHUNK_SIZE < device.size:
                done += CHUNK_SIZE
            events.append(BlockZero(index, offset, min(CHUNK_SIZE, device.size - offset)))
    return events


def observed(devices: list[Device], events: list[qemu_block.Event]) -> BlockCompleteness:
    """Return what a `BlockCompleteness` makes of events and the final progress."""
    completeness = BlockCompleteness(devices)
    for event in events:
        completeness.observe(event)
    return completeness


FINAL: list[qemu_block.Event] = [BlockProgress(100), BlockEos()]
SMALL = [Device("d0", ODD), Device("d1", 600 * CHUNK_SIZE), Device("d2", 512)]


def test_a_whole_migration_is_complete() -> None:
    """Every chunk came, and 100 was said."""
    completeness = observed(SMALL, bulk(SMALL) + FINAL)
    assert completeness.problem() is None
    assert list(completeness.missing()) == []
    assert completeness.last_percent == completeness.bulk_percent == 99


def test_without_the_final_progress_nothing_is_complete() -> None:
    """A source that was cancelled never says 100."""
    problem = observed(SMALL, bulk(SMALL)).problem()
    assert problem == "the source has not said that its disks are complete: it stopped or was cancelled"


def test_what_is_missing_is_named() -> None:
    """Ranges are joined, end where the disk ends, and the text names them and the bug."""
    events: list[qemu_block.Event] = [event for event in bulk(SMALL) if isinstance(event, BlockProgress)]
    events += [BlockZero(0, chunk * CHUNK_SIZE, CHUNK_SIZE) for chunk in (0, 2)]
    events += [BlockZero(1, chunk * CHUNK_SIZE, CHUNK_SIZE) for chunk in range(600) if chunk not in range(250, 530)]
    events += [BlockZero(2, 0, 512)]
    completeness = observed(SMALL, events + FINAL)
    assert list(completeness.missing()) == [
        ("d0", CHUNK_SIZE, CHUNK_SIZE),
        ("d0", 3 * CHUNK_SIZE, 2 * CHUNK_SIZE + 1536),
        ("d1", 250 * CHUNK_SIZE, 280 * CHUNK_SIZE),
    ]
    assert completeness.problem() == (
        "the source reported success with 283.0 MiB never sent: bytes 'd0' 1048576-2097151, 'd0' 3145728-5244415,"
        " 'd1' 262144000-555745279; its last progress was 99 %. This is how QEMU 7.2 to 9.0 loses data (qemu commit"
        " b5280437a7f4): set its downtime-limit to 1 ms and its max-bandwidth to 500 MiB/s or less, not 0, and migrate"
        " again. Or it was to leave out what a base has (`inc`): then give the disk here its base"
        " (--disk NAME=PATH,base=BASE)"
    )


def test_many_missing_ranges_make_no_endless_text() -> None:
    """Six are named, the rest counted."""
    events: list[qemu_block.Event] = [BlockZero(1, chunk * CHUNK_SIZE, CHUNK_SIZE) for chunk in range(0, 600, 2)]
    problem = observed(SMALL, [*events, *FINAL]).problem()
    assert problem is not None
    assert " and 296 more ranges; its last progress was none." in problem
    assert "`inc`" not in problem, "it had not read its disks"


def test_a_disk_of_which_nothing_came_is_missing() -> None:
    """Also one that the source does not have at all."""
    problem = observed(SMALL, [*bulk(SMALL)[:-1], *FINAL]).problem()
    assert problem is not None
    assert "never sent: bytes 'd2' 0-511;" in problem


def test_an_overlapping_tail_completes_the_last_chunk_only() -> None:
    """The last MiB of a disk covers its short last chunk, and only part of the one before."""
    devices = [Device("d0", ODD)]
    completeness = observed(devices, [BlockData(0, ODD - CHUNK_SIZE, memoryview(CHUNK)), *FINAL])
    assert list(completeness.missing()) == [("d0", 0, 5 * CHUNK_SIZE)]


OVERLAYS = [device._replace(has_base=True) for device in SMALL]
LAST: list[qemu_block.Event] = [
    BlockZero(
        index, (-(-device.size // CHUNK_SIZE) - 1) * CHUNK_SIZE, min(CHUNK_SIZE, device.size % CHUNK_SIZE or CHUNK_SIZE)
    )
    for index, device in enumerate(SMALL)
]
"""The last chunk of each disk."""


@pytest.mark.parametrize(
    ("percents", "sent", "needed"),
    [
        ([0, 60], [], 100),
        ([99], [], 100),  # every last chunk was skipped, so the bulk phase must have said 100
        ([100], [], None),  # before the final 100
        ([0, 100], [], None),
        ([99], [1], None),  # the large disk's last chunk came: the bulk phase said where it begins
        ([98], [1], 99),
        ([98], [2], 99),
        ([99], [0, 1, 2], None),
        ([], [0, 1, 2], 99),
    ],
)
def test_a_base_leaves_only_the_progress(percents: list[int], sent: list[int], needed: int | None) -> None:
    """Chunks may be missing then, but a bulk phase has its end."""
    events = [LAST[index] for index in sent] + [BlockProgress(percent) for percent in percents]
    problem = observed(OVERLAYS, events + FINAL).problem()
    if needed is None:
        assert problem is None
        return
    assert problem is not None
    last = f"{percents[-1]} %" if percents else "none"
    assert problem.startswith(
        f"the source finished before it had read its disks: its last progress was {last}, not {needed} %. This is how"
    )
    assert "b5280437a7f4" in problem


def test_a_base_excuses_only_its_own_disk() -> None:
    """What is missing of a disk without one is missing."""
    devices = [OVERLAYS[0], SMALL[1], SMALL[2]]
    events: list[qemu_block.Event] = [event for event in bulk(SMALL) if not isinstance(event, BlockZero)]
    whole = [event for event in bulk(SMALL) if isinstance(event, BlockZero) and event.device]
    assert observed(devices, [*events, *whole, BlockProgress(100), *FINAL]).problem() is None
    problem = observed(devices, [*events, *whole[:-1], BlockProgress(100), *FINAL]).problem()
    assert problem is not None
    assert "never sent: bytes 'd2' 0-511;" in problem


def test_every_chunk_is_complete_whatever_the_progress() -> None:
    """A source that is no QEMU may send everything and report no progress."""
    whole = [event for event in bulk(SMALL) if isinstance(event, BlockZero)]
    assert observed(OVERLAYS, [*whole, *FINAL]).problem() is None


def test_completeness_needs_a_bit_for_a_chunk() -> None:
    """16 TiB are 2 MiB of bits, and finding what is missing needs little more."""
    devices = [Device("huge", MAX_DISK_SIZE)]
    tracemalloc.start()
    try:
        completeness = observed(devices, [BlockZero(0, MAX_DISK_SIZE // 2, CHUNK_SIZE), *FINAL])
        assert len(list(completeness.missing())) == 2
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 << 20


sizes = st.integers(1, 1100 * 2048).map(lambda n_sectors: n_sectors * SECTOR_SIZE)


@given(sizes, st.data())
def test_missing_is_what_was_not_marked(size: int, data: st.DataObject) -> None:
    """Against a set of chunks."""
    count = -(-size // CHUNK_SIZE)
    came = data.draw(st.sets(st.integers(0, count - 1), max_size=40)) | (
        set(range(*sorted(data.draw(st.tuples(st.integers(0, count), st.integers(0, count))))))
    )
    completeness = BlockCompleteness([Device("d", size)])
    for chunk in came:
        start = chunk * CHUNK_SIZE
        completeness.observe(BlockZero(0, start, min(CHUNK_SIZE, size - start)))
    expected = set(range(count)) - came
    found: set[int] = set()
    previous_end = -1
    for _, offset, length in completeness.missing():
        assert offset > previous_end
        previous_end = offset + length
        assert previous_end % CHUNK_SIZE == 0 or previous_end == size
        found |= set(range(offset // CHUNK_SIZE, -(-previous_end // CHUNK_SIZE)))
    assert found == expected


small_events = [event for event, data in TABLE if len(data) < 8192] + [TABLE[6][0]]


@given(st.lists(st.sampled_from(small_events), max_size=5), st.data())
def test_any_split(events: list[PlainEvent], data: st.DataObject) -> None:
    """Where the stream is cut into pieces changes nothing."""
    stream = b"".join(map(encode, events))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)), max_size=8)))
    decoder = Decoder(DEVICES)
    found = []
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += [plain(event) for event in decoder.feed(stream[start:stop])]
    assert found == events
    decoder.close()


@given(
    st.lists(
        st.binary(max_size=300)
        | st.builds(
            head,
            st.integers(0, 11000) | st.integers(0, (1 << 55) - 1),
            st.integers(0, 31),
            st.sampled_from([None, b"d0"]),
        )
    )
)
@settings(max_examples=500)
def test_garbage(pieces: list[bytes]) -> None:
    """Garbage parses or raises `RemoteProtocolError`, and what it yields lies on the disk."""
    decoder = Decoder(DEVICES)
    with suppress(RemoteProtocolError):
        for event in decoder.feed(b"".join(pieces)):
            match event:
                case BlockData(device, offset, payload):
                    assert offset + len(payload) <= DEVICES[device].size
                case BlockZero(device, offset, length):
                    assert length
                    assert offset + length <= DEVICES[device].size
