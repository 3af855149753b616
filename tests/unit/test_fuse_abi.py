"""The codec of /dev/fuse messages, against what a real kernel sent and took."""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path

import pytest

from fusemig.fuse import abi
from fusemig.fuse.abi import AbiError, Opcode

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "fuse" / "linux-6.18.json").read_text())["messages"]
PARSERS = (
    abi.parse_in_header,
    abi.parse_read_write,
    abi.parse_fsync,
    abi.parse_fallocate,
    abi.parse_lseek,
    abi.parse_interrupt,
    abi.parse_open,
    abi.parse_init,
    abi.parse_out_header,
    abi.parse_init_reply,
    abi.parse_open_reply,
)


def recorded(kind: str, opcode: str) -> list[bytes]:
    """Return the recorded messages of a kind."""
    found = [bytes.fromhex(one["hex"]) for one in VECTORS if (one["kind"], one["opcode"]) == (kind, opcode)]
    assert found
    return found


@pytest.mark.parametrize("one", VECTORS, ids=lambda one: f"{one['kind']}-{one['opcode']}")
def test_headers_of_a_real_kernel(one: dict[str, str]) -> None:
    """The length field is the message's length, and the opcode is the recorded one."""
    message = bytes.fromhex(one["hex"])
    if one["kind"] == "request":
        header = abi.parse_in_header(message)
        assert (header.length, Opcode(header.opcode).name) == (len(message), one["opcode"])
        assert header.unique
    else:
        assert abi.parse_out_header(message).length == len(message)


def test_write_and_read_requests() -> None:
    """Offset, size, the file's flags and the write's own O_DSYNC are where the kernel puts them."""
    buffered, one_dsync, direct, parked = recorded("request", "WRITE")
    request = abi.parse_read_write(buffered)
    assert (request.offset, request.size) == (4096, 16)
    assert buffered[abi.IO_HEAD_SIZE :] == b"sixteen byteswow"
    assert not request.flags & (os.O_DSYNC | os.O_DIRECT)
    assert abi.parse_read_write(one_dsync).flags & os.O_DSYNC  # pwritev2(..., RWF_DSYNC)
    assert abi.parse_read_write(direct).flags & os.O_DIRECT
    assert parked[abi.IO_HEAD_SIZE :] == b"parked"
    whole_page, sector = (abi.parse_read_write(message) for message in recorded("request", "READ"))
    assert (whole_page.offset, sector.offset, sector.size) == (0, 512, 512)


@pytest.mark.parametrize("opcode", ["READ", "WRITE"])
def test_the_fast_unpacking_agrees_with_the_whole_one(opcode: str) -> None:
    """IO_REQUEST picks the same fields as the two structures it jumps over."""
    for message in recorded("request", opcode):
        header, request = abi.parse_in_header(message), abi.parse_read_write(message)
        expected = (header.opcode, header.unique, header.nodeid, header.pid)
        assert abi.IO_REQUEST.unpack_from(message) == (*expected, request.offset, request.size, request.flags)


def test_the_other_requests() -> None:
    """FSYNC, FALLOCATE, LSEEK and OPEN."""
    assert [abi.parse_fsync(one).fsync_flags for one in recorded("request", "FSYNC")] == [1, 0, 1]
    request = abi.parse_fallocate(recorded("request", "FALLOCATE")[0])
    assert (request.offset, request.length, request.mode) == (8192, 4096, abi.FALLOC_PUNCH_HOLE | abi.FALLOC_KEEP_SIZE)
    data, hole = (abi.parse_lseek(one) for one in recorded("request", "LSEEK"))
    assert ((data.offset, data.whence), (hole.offset, hole.whence)) == ((100, os.SEEK_DATA), (0, os.SEEK_HOLE))
    assert [bool(abi.parse_open(one).flags & os.O_DIRECT) for one in recorded("request", "OPEN")] == [
        False,
        True,
        False,
    ]


def test_an_interrupt_names_the_write_it_is_about() -> None:
    """The unique in an INTERRUPT is that of the parked write."""
    parked = abi.parse_in_header(recorded("request", "WRITE")[-1])
    assert abi.parse_interrupt(recorded("request", "INTERRUPT")[0]) == parked.unique
    assert abi.parse_out_header(recorded("reply", "WRITE")[-1]).error == -errno.EINTR


def test_init_request_and_reply() -> None:
    """Both directions; flags2 is the upper half of the flags, and no flag is asked for that was not offered."""
    asked, taken = abi.parse_init(recorded("request", "INIT")[0]), abi.parse_init_reply(recorded("reply", "INIT")[0])
    assert asked.major == taken.major == 7
    assert asked.flags & abi.INIT_EXT
    assert asked.flags & abi.INIT_DIRECT_IO_ALLOW_MMAP
    assert taken.flags & ~asked.flags == 0
    assert (taken.max_background, taken.congestion_threshold, taken.max_write, taken.max_pages) == (
        128,
        96,
        1 << 20,
        256,
    )


def test_replies_encode_as_recorded() -> None:
    """Decoding and encoding a recorded reply gives its bytes."""
    for message in recorded("reply", "INIT"):
        assert abi.init_reply(abi.parse_out_header(message).unique, abi.parse_init_reply(message)) == message
    for message in recorded("reply", "OPEN"):
        assert abi.open_reply(abi.parse_out_header(message).unique, abi.parse_open_reply(message)) == message
    for message in recorded("reply", "FSYNC"):
        assert abi.reply(abi.parse_out_header(message).unique) == message
    interrupted = recorded("reply", "WRITE")[-1]
    assert abi.error_reply(abi.parse_out_header(interrupted).unique, errno.EINTR) == interrupted
    assert abi.invalidate_inode(2) == recorded("reply", "NOTIFY")[0]


def test_attributes_encode_as_the_kernel_takes_them() -> None:
    """Word by word as fuse_attr_out of include/uapi/linux/fuse.h; a time before 1970 counts its nanoseconds upwards."""
    one = abi.FileAttributes(2, 3, 4, -500_000_000, 6_000_000_007, 8_000_000_009, 0o100600, 1, 10, 11, 4096, 1.5)
    message = abi.attr_reply(5, one)
    assert abi.parse_out_header(message) == (len(message), 0, 5)
    words = (1, 500_000_000, 0, 2, 3, 4, -1, 6, 8, 500_000_000, 7, 9, 0o100600, 1, 10, 11, 0, 4096, 0)
    assert struct.unpack("=QII3Q3q3I7I", message[abi.OUT_HEADER_SIZE :]) == words


def test_without_splice_changes_the_splice_flags_only() -> None:
    """Every other byte of the request stays."""
    message = recorded("request", "INIT")[0]
    splice = abi.INIT_SPLICE_READ | abi.INIT_SPLICE_WRITE | abi.INIT_SPLICE_MOVE
    changed = abi.without_splice(message)
    assert abi.parse_init(changed).flags == abi.parse_init(message).flags & ~splice
    assert changed[:52] + changed[56:] == message[:52] + message[56:]


def test_an_old_kernel_s_init_has_no_flags2() -> None:
    """Before 7.36 the structure ends after flags; nothing behind it is read."""
    message = recorded("request", "INIT")[0][:56]
    assert abi.parse_init(message).flags < 1 << 32


@pytest.mark.parametrize("parse", PARSERS, ids=lambda parse: parse.__name__)
def test_short_messages_raise_abi_error(parse: object) -> None:
    """Whatever is cut off, a parser returns or raises AbiError, and an empty message never passes."""
    assert callable(parse)
    with pytest.raises(AbiError):
        parse(b"")
    for one in VECTORS:
        message = bytes.fromhex(one["hex"])
        for length in range(len(message)):
            try:
                parse(message[:length])
            except AbiError:
                continue
