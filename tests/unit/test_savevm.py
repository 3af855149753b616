"""QEMU's migration stream: golden vectors of a real QEMU, one table of small streams, and every way to be broken."""

from __future__ import annotations

import json
import lzma
import struct
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_hexdigest

from fusemig.core.units import CHUNK_SIZE
from fusemig.errors import ConfigError, LocalProtocolError, RemoteProtocolError
from fusemig.wire import qemu_block, savevm
from fusemig.wire.qemu_block import BlockCompleteness, BlockData, BlockEos, BlockProgress, BlockZero, Device
from fusemig.wire.savevm import Command, CommandType, Configuration, DeviceState, SectionEnd, StreamEnd
from support.qemu import disk_bytes

Decoder = savevm.Decoder[qemu_block.Event]
DEVICES = [Device("d0", 3 * CHUNK_SIZE), Device("d1", 512)]
VECTORS = sorted((Path(__file__).parent.parent / "vectors/qemu").glob("*.json"))


def new_decoder(devices: list[Device] = DEVICES) -> Decoder:
    """Return a decoder of a stream that may carry ``devices``."""
    return Decoder({qemu_block.SECTION: qemu_block.Decoder(devices)})


# What QEMU wrote


def load(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return a vector's description and stream."""
    return json.loads(path.read_text()), lzma.decompress(path.with_suffix(".xz").read_bytes())


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    """A stream of a real QEMU decodes to its disks, or to the knowledge that it does not hold them."""
    description, stream = load(path)
    assert len(stream) == description["length"]
    is_incremental = description["incremental"]
    devices = [Device(disk["name"], disk["size"], is_incremental) for disk in description["disks"]]
    images = [
        bytearray(disk_bytes(device.size, seed=index) if is_incremental else bytes(device.size))
        for index, device in enumerate(devices)
    ]
    completeness = BlockCompleteness(devices)
    decoder = new_decoder(devices)
    events: list[savevm.Event | qemu_block.Event] = []
    for at in range(0, len(stream), 100_003):
        for event in decoder.feed(memoryview(stream)[at : at + 100_003]):
            completeness.observe(event)
            match event:
                case BlockData(device, offset, payload):
                    images[device][offset : offset + len(payload)] = payload
                case BlockZero(device, offset, length):
                    images[device][offset : offset + length] = bytes(length)
                case _:
                    events.append(event)
    assert decoder.may_end
    decoder.close()
    assert events[0] == Configuration("pc-q35-7.2")
    assert events.count(SectionEnd("block", is_last=True)) == events.count(SectionEnd("ram", is_last=True)) == 1
    assert isinstance(events[-1], DeviceState)
    assert (Command(CommandType.OPEN_RETURN_PATH, 0) in events) == ("return-path" in description["capabilities"])
    assert completeness.problem() == description["problem"]
    matches = [
        xxh3_64_hexdigest(image) == disk["xxh3_64"] for image, disk in zip(images, description["disks"], strict=True)
    ]
    assert all(matches) == description["complete"] == (completeness.problem() is None)


def test_the_vectors_are_there() -> None:
    """Each kind of stream that `tools/capture_qemu_stream` records, small enough to keep."""
    names = {"early-finish", "incremental", "plain", "return-path", "two-disks", "written", "zero-blocks"}
    assert {path.stem for path in VECTORS} == names
    assert all(path.with_suffix(".xz").stat().st_size < 300 * 1024 for path in VECTORS)
    assert not load(next(path for path in VECTORS if path.stem == "early-finish"))[0]["complete"]


@pytest.mark.parametrize("keep", [0, 5, 60, 210, 1_000_000, -100_000, -30_000, -1])
def test_a_golden_stream_that_is_cut(keep: int) -> None:
    """Wherever QEMU dies, the end is not taken for the end of the stream."""
    _, stream = load(VECTORS[1])
    decoder = new_decoder([Device("disk0", 5 * CHUNK_SIZE + 1536)])
    decoder.feed(stream[:keep])
    assert not decoder.may_end
    with pytest.raises(RemoteProtocolError, match=r"^the migration stream ends early, .*QEMU has stopped or was cance"):
        decoder.close()


def test_memory_is_bounded() -> None:
    """Blocks, RAM and devices of a whole stream pass through within two chunks."""
    _, stream = load(next(path for path in VECTORS if path.stem == "plain"))
    tracemalloc.start()
    try:
        decoder = new_decoder([Device("disk0", 4 * CHUNK_SIZE)])
        view = memoryview(stream)
        buffer = bytearray(CHUNK_SIZE)
        n_drained, are_devices = 0, False
        while view:
            if decoder.needs_buffer:
                decoder.give_buffer(buffer)
            wanted = decoder.wanted
            n = min(len(wanted), len(view))
            wanted[:n] = view[:n]
            view = view[n:]
            n_drained += n * are_devices
            are_devices |= isinstance(decoder.advance(n), DeviceState)
        decoder.close()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert n_drained > 10_000
    assert peak < 2 * CHUNK_SIZE


# Small streams, by hand


def u32(value: int) -> bytes:
    """Return 32 bits."""
    return struct.pack(">I", value)


def u64(value: int) -> bytes:
    """Return 64 bits."""
    return struct.pack(">Q", value)


def section(kind: bytes, section_id: int, contents: bytes) -> bytes:
    """Return a section with its footer."""
    return kind + contents + savevm.encode_footer(section_id)


HEADER = bytes.fromhex("5145564d 00000003 07 0000000a") + b"pc-q35-7.2"
EOS = qemu_block.END_OF_SECTION
ZERO = u64(9) + b"\x02d0"
BLOCK_START = bytes.fromhex("01 00000001 05") + b"block" + bytes.fromhex("00000000 00000001")
RAM_START = bytes.fromhex("01 00000002 03") + b"ram" + bytes.fromhex("00000000 00000004")
BLOCK = (
    section(BLOCK_START, 1, EOS)
    + section(savevm.encode_part(1), 1, u64(0x8404) + ZERO + EOS)
    + section(savevm.encode_end(1), 1, u64(0xC804) + EOS)
)
BLOCK_EVENTS: list[savevm.Event | qemu_block.Event] = [
    BlockEos(),
    SectionEnd("block", is_last=False),
    BlockProgress(66),
    BlockZero(0, 0, CHUNK_SIZE),
    BlockEos(),
    SectionEnd("block", is_last=False),
    BlockProgress(100),
    BlockEos(),
    SectionEnd("block", is_last=True),
]
MACHINE = Configuration("pc-q35-7.2")
RAM_LIST = u64(0x3000 | 4) + b"\x06pc.ram" + u64(0x2000) + b"\x01x" + u64(0x1000)
RAM_PAGES = (
    u64(0x0000 | 8) + b"\x06pc.ram" + b"p" * 4096 + u64(0x1000 | 0x22) + b"\0" + u64(0x28) + b"q" * 4096
    + u64(0x0000 | 2) + b"\x01x" + b"\0"
)  # fmt: skip
RAM_EOS = u64(0x10)
RAM = section(RAM_START, 2, RAM_LIST + RAM_EOS) + section(savevm.encode_end(2), 2, RAM_PAGES + RAM_EOS)
RAM_EVENTS: list[savevm.Event | qemu_block.Event] = [SectionEnd("ram", is_last=False), SectionEnd("ram", is_last=True)]
DEVICE = bytes.fromhex("04 00000003 05") + b"timer" + u32(0) + u32(2)
DESCRIPTION = b'{"devices": []}'
VMDESC = b"\x06" + u32(len(DESCRIPTION)) + DESCRIPTION
CAPABILITIES = b"\x05\x1aconfiguration/capabilities" + u32(1)
SHARED_LIST = u64(0x3000 | 4) + b"\x06pc.ram" + u64(0x3000) + u64(0xC0000)

TABLE: dict[str, tuple[bytes, list[savevm.Event | qemu_block.Event]]] = {
    "block only": (HEADER + BLOCK + b"\0", [MACHINE, *BLOCK_EVENTS, StreamEnd()]),
    "with a description": (HEADER + BLOCK + b"\0" + VMDESC, [MACHINE, *BLOCK_EVENTS, StreamEnd()]),
    "as fusemig writes it": (HEADER + BLOCK + savevm.encode_eof(), [MACHINE, *BLOCK_EVENTS, StreamEnd()]),
    "no configuration": (HEADER[:8] + BLOCK + b"\0", [*BLOCK_EVENTS, StreamEnd()]),
    "ram": (HEADER + RAM + BLOCK + b"\0", [MACHINE, *RAM_EVENTS, *BLOCK_EVENTS, StreamEnd()]),
    "commands": (
        HEADER + bytes.fromhex("08 0001 0000 08 0002 0004 0badcafe") + BLOCK + b"\0",
        [
            MACHINE,
            Command(CommandType.OPEN_RETURN_PATH, 0),
            Command(CommandType.PING, 0x0BADCAFE),
            *BLOCK_EVENTS,
            StreamEnd(),
        ],
    ),
    "ignore-shared": (
        HEADER + CAPABILITIES + u32(1) + b"\x0fx-ignore-shared" + section(RAM_START, 2, SHARED_LIST + RAM_EOS)
        + section(savevm.encode_end(2), 2, RAM_EOS) + BLOCK + b"\0",
        [MACHINE, *RAM_EVENTS, *BLOCK_EVENTS, StreamEnd()],
    ),
    "uuid and large pages": (
        HEADER + b"\x05\x12configuration/uuid" + u32(1) + bytes(16)
        + b"\x05\x1econfiguration/target-page-bits" + u32(1) + u32(14)
        + section(RAM_START, 2, u64(0x8) + b"\x01x" + b"p" * 16384 + RAM_EOS)
        + section(savevm.encode_end(2), 2, RAM_EOS) + BLOCK + b"\0",
        [MACHINE, *RAM_EVENTS, *BLOCK_EVENTS, StreamEnd()],
    ),
    "devices": (
        HEADER + BLOCK + section(DEVICE, 3, b"state") + b"\0" + VMDESC,
        [MACHINE, *BLOCK_EVENTS, DeviceState("timer")],
    ),
    "devices that look like an end": (
        HEADER + BLOCK + section(DEVICE, 3, b"\x7e~~~~\0\x06\0\0\1\0{" + b"\x7e\x7e\x7e\x7e") + b"\0" + VMDESC,
        [MACHINE, *BLOCK_EVENTS, DeviceState("timer")],
    ),
    "an end that overlaps one": (
        HEADER + BLOCK + section(DEVICE[:4] + b"{" + DEVICE[5:], 0x7B, b"state\x7e~~~~\0\x06") + b"\0" + VMDESC,
        [MACHINE, *BLOCK_EVENTS, DeviceState("timer")],
    ),
    "devices without a description": (
        HEADER + BLOCK + section(DEVICE, 3, b"state") + b"\0",
        [MACHINE, *BLOCK_EVENTS, DeviceState("timer")],
    ),
}  # fmt: skip

parametrize_table = pytest.mark.parametrize(("data", "events"), TABLE.values(), ids=TABLE)


@parametrize_table
def test_whole(data: bytes, events: list[savevm.Event | qemu_block.Event]) -> None:
    """Everything at once, and the stream is complete."""
    decoder = new_decoder()
    assert decoder.feed(data) == events
    assert decoder.may_end
    decoder.close()


@parametrize_table
def test_byte_by_byte(data: bytes, events: list[savevm.Event | qemu_block.Event]) -> None:
    """In the smallest pieces; before EOF the stream must not end."""
    decoder = new_decoder()
    found = []
    eof = data.index(b"\0", data.index(savevm.encode_end(1)) + 26)
    for number in range(len(data)):
        found += decoder.feed(data[number : number + 1])
        if number < eof:
            assert not decoder.may_end
    assert found == events
    decoder.close()


@pytest.mark.parametrize("name", ["with a description", "as fusemig writes it"])
def test_nothing_may_follow(name: str) -> None:
    """After the description there is nothing more, and after EOF nothing but a description."""
    for data in (TABLE[name][0], TABLE["block only"][0]):
        with pytest.raises(RemoteProtocolError, match=r"^bytes after the end of the stream$"):
            new_decoder().feed(data + b"x")


def test_more_after_the_devices_is_not_the_end() -> None:
    """The length of the description leads exactly to the last byte, or it is none."""
    decoder = new_decoder()
    decoder.feed(TABLE["devices"][0] + b"x")
    assert not decoder.may_end
    with pytest.raises(RemoteProtocolError, match="ends early, in the state of the devices"):
        decoder.close()


def test_the_bytes_that_we_send() -> None:
    """The encoder's pieces are those of the table."""
    assert savevm.encode_header("pc-q35-7.2") == HEADER
    assert savevm.encode_start(1, "block", 1) == BLOCK_START
    assert savevm.encode_start(2, "ram", 4) == RAM_START
    assert savevm.encode_part(1).hex() == "0200000001"
    assert savevm.encode_end(1).hex() == "0300000001"
    assert savevm.encode_footer(1).hex() == "7e00000001"
    assert savevm.encode_eof().startswith(b"\0\x06\0\0\0")
    assert savevm.encode_shut().hex() == "0001000400000000"
    assert savevm.encode_shut(failed=True).hex() == "0001000400000001"
    assert savevm.encode_pong(0x0BADCAFE).hex() == "000200040badcafe"
    for machine in ("", "m" * 256):
        with pytest.raises(ConfigError, match="is not a machine type"):
            savevm.encode_header(machine)


def test_a_payload_is_not_copied() -> None:
    """The buffer given to the container is the block decoder's."""
    decoder = new_decoder()
    with pytest.raises(LocalProtocolError):
        decoder.give_buffer(bytearray(CHUNK_SIZE))
    decoder.feed(HEADER + BLOCK_START + u64(1) + b"\x02d0")
    assert decoder.needs_buffer
    with pytest.raises(LocalProtocolError, match="no buffer was given"):
        _ = decoder.wanted
    buffer = bytearray(CHUNK_SIZE)
    decoder.give_buffer(buffer)
    (event,) = decoder.feed(b"x" * CHUNK_SIZE)
    assert isinstance(event, BlockData)
    assert event.payload.obj is buffer


NO_LIVE = " cannot be received: remove the device that sends it, or turn off the migration capability of that name"
OUT_OF_STEP = "section 'block' does not end where it should: the stream is out of step"
NO_COMMAND = " is not possible here: turn off QEMU's migration capabilities for postcopy and COLO"
IN_RAM = HEADER + RAM_START

MALFORMED: list[tuple[bytes, str]] = [
    (b"FUSEMIG\n", "this is not a migration stream of QEMU's"),
    (b"QEVM" + u32(2), "unsupported version 2 of QEMU's migration stream; 3 is known"),
    (HEADER[:9] + u32(0), "a machine type's name of 0 bytes"),
    (HEADER[:9] + u32(1 << 31), "a machine type's name of 2147483648 bytes"),
    (HEADER + b"\x09", "unknown section type 0x09: the stream is out of step"),
    (HEADER + HEADER[8:], "unknown section type 0x07: the stream is out of step"),
    (HEADER + b"\x05\x01x" + u32(1), "unknown part 'x' version 1 of the configuration"),
    (
        HEADER + b"\x05\x12configuration/uuid" + u32(2),
        "unknown part 'configuration/uuid' version 2 of the configuration",
    ),
    (HEADER + b"\x05\x1econfiguration/target-page-bits" + u32(1) + u32(40), "pages of 2^40 bytes"),
    (HEADER + b"\x05\x1aconfiguration/capabilities" + u32(1) + u32(1 << 30), "1073741824 migration capabilities"),
    (HEADER + CAPABILITIES + u32(1) + b"\0", "a migration capability without a name"),
    (
        HEADER + CAPABILITIES + u32(1) + b"\x0amapped-ram",
        "turn off QEMU's migration capability 'mapped-ram': its stream cannot be parsed",
    ),
    (HEADER + bytes.fromhex("08 0063 0000"), "unknown migration command 99"),
    (HEADER + bytes.fromhex("08 0001 0001"), "migration command OPEN_RETURN_PATH with 1 bytes, not 0"),
    (HEADER + bytes.fromhex("08 0003 0010"), f"migration command POSTCOPY_ADVISE{NO_COMMAND}"),
    (HEADER + bytes.fromhex("08 0007 0004"), f"migration command PACKAGED{NO_COMMAND}"),
    (HEADER + savevm.encode_start(5, "dirty-bitmap", 1), f"live section 'dirty-bitmap' instance 0{NO_LIVE}"),
    (HEADER + BLOCK_START[:-8] + u32(1) + u32(1), f"live section 'block' instance 1{NO_LIVE}"),
    (HEADER + BLOCK + savevm.encode_start(9, "block", 1), f"live section 'block' instance 0{NO_LIVE}"),
    (HEADER + section(BLOCK_START, 1, EOS) + BLOCK_START, "section id 1 begins twice"),
    (HEADER + savevm.encode_start(1, "block", 2), "unsupported version 2 of the 'block' section; 1 is known"),
    (HEADER + savevm.encode_start(2, "ram", 3), "unsupported version 3 of the 'ram' section; 4 is known"),
    (HEADER + savevm.encode_part(9), "unknown section id 9"),
    (HEADER + savevm.encode_end(9), "unknown section id 9"),
    (HEADER + BLOCK + savevm.encode_part(1), "more of section 'block' after its end"),
    (HEADER + section(BLOCK_START, 2, EOS), OUT_OF_STEP),
    (HEADER + BLOCK_START + EOS + b"\x02\0\0\0\1", OUT_OF_STEP),
    (HEADER + BLOCK_START + u64(9) + b"\x02dX", "unknown block device 'dX'; expected: 'd0', 'd1'"),
    (HEADER + section(BLOCK_START, 1, EOS) + b"\0", "the end of the stream comes before the end of section 'block'"),
    (
        HEADER + section(BLOCK_START, 1, EOS) + DEVICE,
        "the state of device 'timer' comes before the end of section 'block'",
    ),
    (HEADER + RAM + DEVICE, "the stream has no section 'block': start it with `migrate -b`"),
    (HEADER + b"\0", "the stream has no section 'block': start it with `migrate -b`"),
    (HEADER + BLOCK + b"\0\x06" + u32(1 << 31), "a description of 2147483648 bytes"),
    (IN_RAM + u64(0x28), "a page of RAM that continues no block"),
    (IN_RAM + u64(0x08) + b"\0", "a block of RAM without a name"),
    (IN_RAM + u64(0x1000 | 4) + b"\x01x" + u64(0x2000), "the blocks of RAM are longer than their sum"),
    (IN_RAM + u64(0x400), "unknown flags 0x400 in the 'ram' section"),
    (IN_RAM + u64(0x0), "unknown flags 0x0 in the 'ram' section"),
    (
        IN_RAM + u64(0x1),
        "RAM in a form that cannot be skipped: FULL (an obsolete form of the stream)",
    ),
    (
        IN_RAM + u64(0x60),
        "RAM in a form that cannot be skipped: XBZRLE (turn off QEMU's migration capability xbzrle)",
    ),
    (
        IN_RAM + u64(0x80),
        "RAM in a form that cannot be skipped: HOOK (RDMA; migrate over tcp or a unix socket)",
    ),
    (
        IN_RAM + u64(0x100),
        "RAM in a form that cannot be skipped: COMPRESS_PAGE (turn off QEMU's migration capability compress)",
    ),
    (
        IN_RAM + u64(0x200),
        "RAM in a form that cannot be skipped: MULTIFD_FLUSH (turn off QEMU's migration capability multifd)",
    ),
]


def feed_in_steps(decoder: Decoder, data: bytes, step: int) -> None:
    """Feed pieces of ``step`` bytes."""
    for at in range(0, len(data), step):
        decoder.feed(data[at : at + step])


@pytest.mark.parametrize(("data", "text"), MALFORMED, ids=[f"{n}-{text[:40]}" for n, (_, text) in enumerate(MALFORMED)])
def test_malformed(data: bytes, text: str) -> None:
    """Every malformed stream gets its stable text, whole or in pieces, and next to no memory before that."""
    for step in (len(data), 1):
        tracemalloc.start()
        try:
            decoder = new_decoder()
            with pytest.raises(RemoteProtocolError) as caught:
                feed_in_steps(decoder, data, step)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert str(caught.value) == text
        assert peak < 256 * 1024


def test_device_state_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that never ends is refused at some point."""
    monkeypatch.setattr("fusemig.wire.savevm.decoder.MAX_DEVICE_STATE", 100_000)
    decoder = new_decoder()
    decoder.feed(HEADER + BLOCK + DEVICE)
    decoder.feed(bytes(100_000))
    with pytest.raises(RemoteProtocolError, match=r"^more than 100000 bytes of device state$"):
        decoder.feed(b"\0")


def test_where_a_stream_was_cut() -> None:
    """The text says in what it ended."""
    for data, where in (
        (b"", "between sections"),
        (HEADER + BLOCK, "between sections"),
        (HEADER + BLOCK_START + EOS[:3], "in a 'block' section"),
        (HEADER + RAM_START + RAM_LIST, "in a 'ram' section"),
        (HEADER + BLOCK + DEVICE + b"x", "in the state of the devices"),
    ):
        decoder = new_decoder()
        decoder.feed(data)
        with pytest.raises(RemoteProtocolError, match=f"^the migration stream ends early, {where}: QEMU has stopped"):
            decoder.close()


streams = st.sampled_from(list(TABLE.values()))


@given(streams, st.data())
def test_any_split(case: tuple[bytes, list[savevm.Event | qemu_block.Event]], data: st.DataObject) -> None:
    """Where the stream is cut into pieces changes nothing."""
    stream, events = case
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)), max_size=10)))
    decoder = new_decoder()
    found = []
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += decoder.feed(stream[start:stop])
    assert found == events
    decoder.close()


@given(streams, st.data())
@settings(max_examples=300)
def test_any_damage(case: tuple[bytes, list[savevm.Event | qemu_block.Event]], data: st.DataObject) -> None:
    """A damaged stream parses or raises `RemoteProtocolError`, and nothing else."""
    stream = bytearray(case[0])
    for at in data.draw(st.lists(st.integers(0, len(stream) - 1), min_size=1, max_size=4)):
        stream[at] = data.draw(st.integers(0, 255))
    decoder = new_decoder()
    with suppress(RemoteProtocolError):
        decoder.feed(bytes(stream))
        decoder.close()


PIECES = [b"\0", b"\x01", b"\x7e", b"\x05", EOS, ZERO, BLOCK_START, RAM_START, RAM_LIST, RAM_EOS, BLOCK, DEVICE, VMDESC]


@given(st.sampled_from([b"", HEADER[:8], HEADER]), st.lists(st.binary(max_size=40) | st.sampled_from(PIECES)))
@settings(max_examples=500)
def test_garbage(start: bytes, pieces: list[bytes]) -> None:
    """Garbage parses or raises `RemoteProtocolError`, and nothing else."""
    decoder = new_decoder()
    with suppress(RemoteProtocolError):
        decoder.feed(start + b"".join(pieces))
        decoder.close()
