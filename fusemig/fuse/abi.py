"""The messages of /dev/fuse as far as the data lane reads, edits or writes them: a pure codec, no I/O.

Source: ``include/uapi/linux/fuse.h``, ``FUSE_KERNEL_VERSION`` 7, structures as of ``FUSE_KERNEL_MINOR_VERSION`` 38, and
newer constants: `INIT_DIRECT_IO_ALLOW_MMAP` (7.39), `Notify.RESEND` and `INIT_HAS_RESEND` (7.40). They are part of the
kernel's user space ABI: fields are only ever added at the end, and only when both sides have agreed to a later minor
version.

A request that is sent again because of `Notify.RESEND` has the bit `UNIQUE_RESEND` set in its unique from then on, in
INTERRUPTs about it too, and must be answered with it (fs/fuse/dev.c: fuse_resend, fuse_read_interrupt,
fuse_request_find). So nothing here ever takes it off.

Rules: integers are in the machine's byte order. A request is an `InHeader`, the structure of its opcode, then data; a
reply is an out-header, then the structure of the opcode or data, and nothing else when its error is not 0. A
notification is a reply with unique 0 and a `Notify` code as its error. Short input raises `AbiError`, whatever it
holds. `IO_REQUEST` is the one concession to speed: the fields of READ and WRITE that the lane uses, in one unpacking.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct, error
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    Buffer = bytes | bytearray | memoryview


class AbiError(ValueError):
    """A message is shorter than its structure."""


class Opcode(IntEnum):
    """enum fuse_opcode."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SETUPMAPPING = 48
    REMOVEMAPPING = 49
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52


WITHOUT_REPLY: Final = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT})
"""Requests that the kernel does not wait for; INTERRUPT may be answered, and only with EAGAIN or ENOSYS."""


class Notify(IntEnum):
    """enum fuse_notify_code."""

    INVAL_INODE = 2
    RESEND = 7


FOPEN_DIRECT_IO: Final = 1 << 0
FOPEN_PARALLEL_DIRECT_WRITES: Final = 1 << 6

INIT_SPLICE_WRITE: Final = 1 << 7
INIT_SPLICE_MOVE: Final = 1 << 8
INIT_SPLICE_READ: Final = 1 << 9
INIT_WRITEBACK_CACHE: Final = 1 << 16
INIT_EXT: Final = 1 << 30
"""Both sides have a flags2 word: bits 32 to 63 of the flags."""
INIT_DIRECT_IO_ALLOW_MMAP: Final = 1 << 36
"""Files opened with `FOPEN_DIRECT_IO` can be mapped shared, and stay coherent with mappings."""
INIT_HAS_RESEND: Final = 1 << 39
"""The kernel knows `Notify.RESEND`."""

UNIQUE_RESEND: Final = 1 << 63
"""In the unique of a request that was sent before, and may have been carried out."""

FALLOC_KEEP_SIZE: Final = 0x01
FALLOC_PUNCH_HOLE: Final = 0x02
FALLOC_ZERO_RANGE: Final = 0x10

_NS: Final = 1_000_000_000
IN_HEADER_SIZE: Final = 40
OUT_HEADER_SIZE: Final = 16
IO_HEAD_SIZE: Final = 80
"""In-header and fuse_read_in or fuse_write_in, which are equally long: the data of a WRITE begins here."""

_IN_HEADER: Final = Struct("=IIQQIIIHH")
_READ_WRITE_IN: Final = Struct("=QQIIQII")
_FSYNC_IN: Final = Struct("=QII")
_FALLOCATE_IN: Final = Struct("=QQQII")
_LSEEK_IN: Final = Struct("=QQII")
_INTERRUPT_IN: Final = Struct("=Q")
_OPEN_IN: Final = Struct("=II")
_INIT_IN: Final = Struct("=IIIII")
_INIT_IN_OLD: Final = Struct("=IIII")  # before flags2 (7.36)
_INIT_OUT: Final = Struct("=IIIIHHIIHHI28x")
_OPEN_OUT: Final = Struct("=QII")
_ATTR_OUT: Final = Struct("=QI4xQQQqqqIIIIIIIIII")  # attr_valid, its ns, and fuse_attr; times before 1970 have a sign
_INVAL_INODE_OUT: Final = Struct("=Qqq")

OUT_HEADER: Final = Struct("=IiQ")
"""len, error (0 or a negative errno; a `Notify` code where unique is 0), unique."""
WRITE_REPLY: Final = Struct("=IiQII")
"""Out-header and fuse_write_out: ..., size, padding."""
LSEEK_REPLY: Final = Struct("=IiQQ")
"""Out-header and fuse_lseek_out: ..., offset."""
IO_REQUEST: Final = Struct("=4xIQQ8xI4x8xQI4x8xI4x")
"""opcode, unique, nodeid, pid, offset, size, flags of a READ or WRITE; of other requests the first four only."""

assert _IN_HEADER.size == IN_HEADER_SIZE
assert OUT_HEADER.size == OUT_HEADER_SIZE
assert IO_REQUEST.size == IO_HEAD_SIZE == IN_HEADER_SIZE + _READ_WRITE_IN.size


class InHeader(NamedTuple):
    """struct fuse_in_header."""

    length: int
    opcode: int
    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    """The calling thread, as seen from the pid namespace of the mount; 0 if it has no number there."""
    total_extlen: int


class ReadWriteIn(NamedTuple):
    """struct fuse_read_in and struct fuse_write_in, which have the same layout."""

    fh: int
    offset: int
    size: int
    io_flags: int
    """read_flags or write_flags: FUSE_READ_..., FUSE_WRITE_..."""
    lock_owner: int
    flags: int
    """The open file's O_... flags; of a WRITE also O_DSYNC or O_SYNC where only this one write asked for it."""


class FsyncIn(NamedTuple):
    """struct fuse_fsync_in."""

    fh: int
    fsync_flags: int


class FallocateIn(NamedTuple):
    """struct fuse_fallocate_in."""

    fh: int
    offset: int
    length: int
    mode: int


class LseekIn(NamedTuple):
    """struct fuse_lseek_in."""

    fh: int
    offset: int
    whence: int


class InitIn(NamedTuple):
    """struct fuse_init_in; ``flags`` holds flags2 in its upper half."""

    major: int
    minor: int
    max_readahead: int
    flags: int


class InitOut(NamedTuple):
    """struct fuse_init_out; ``flags`` holds flags2 in its upper half."""

    major: int
    minor: int
    max_readahead: int
    flags: int
    max_background: int
    congestion_threshold: int
    max_write: int
    time_gran: int
    max_pages: int
    map_alignment: int


class OpenIn(NamedTuple):
    """struct fuse_open_in."""

    flags: int
    open_flags: int


class OpenOut(NamedTuple):
    """struct fuse_open_out."""

    fh: int
    open_flags: int


class FileAttributes(NamedTuple):
    """struct fuse_attr, and how long it holds."""

    inode: int
    size: int
    """Bytes."""
    n_sectors: int
    """Of 512 bytes, that the image takes."""
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    mode: int
    n_links: int
    uid: int
    gid: int
    block_size: int
    timeout_s: float


class OutHeader(NamedTuple):
    """struct fuse_out_header."""

    length: int
    error: int
    unique: int


def _unpack(layout: Struct, message: Buffer, at: int) -> tuple[int, ...]:
    try:
        return layout.unpack_from(message, at)
    except error as exc:
        raise AbiError(f"message of {len(message)} bytes is shorter than {at + layout.size}") from exc


def parse_in_header(message: Buffer) -> InHeader:
    """Read a request's header.

    Raises:
        AbiError: the message is too short, as for every ``parse_`` function here.
    """
    return InHeader(*_unpack(_IN_HEADER, message, 0)[:8])


def parse_read_write(message: Buffer) -> ReadWriteIn:
    """Read the structure of a READ or WRITE."""
    return ReadWriteIn(*_unpack(_READ_WRITE_IN, message, IN_HEADER_SIZE)[:6])


def parse_fsync(message: Buffer) -> FsyncIn:
    """Read the structure of an FSYNC."""
    return FsyncIn(*_unpack(_FSYNC_IN, message, IN_HEADER_SIZE)[:2])


def parse_fallocate(message: Buffer) -> FallocateIn:
    """Read the structure of a FALLOCATE."""
    return FallocateIn(*_unpack(_FALLOCATE_IN, message, IN_HEADER_SIZE)[:4])


def parse_lseek(message: Buffer) -> LseekIn:
    """Read the structure of an LSEEK."""
    return LseekIn(*_unpack(_LSEEK_IN, message, IN_HEADER_SIZE)[:3])


def parse_interrupt(message: Buffer) -> int:
    """Return the unique of the request that an INTERRUPT is about."""
    return _unpack(_INTERRUPT_IN, message, IN_HEADER_SIZE)[0]


def parse_open(message: Buffer) -> OpenIn:
    """Read the structure of an OPEN."""
    return OpenIn(*_unpack(_OPEN_IN, message, IN_HEADER_SIZE))


def parse_init(message: Buffer) -> InitIn:
    """Read the structure of an INIT; kernels before 7.36 send no flags2."""
    if len(message) < IN_HEADER_SIZE + _INIT_IN.size:
        return InitIn(*_unpack(_INIT_IN_OLD, message, IN_HEADER_SIZE))
    major, minor, max_readahead, flags, flags2 = _unpack(_INIT_IN, message, IN_HEADER_SIZE)
    return InitIn(major, minor, max_readahead, flags | (flags2 << 32 if flags & INIT_EXT else 0))


def without_splice(message: Buffer) -> bytes:
    """Return an INIT request in which the kernel does not offer splicing: its reader has a socket, not /dev/fuse."""
    changed = bytearray(message)
    flags = parse_init(message).flags & ~(INIT_SPLICE_WRITE | INIT_SPLICE_MOVE | INIT_SPLICE_READ)
    Struct("=I").pack_into(changed, IN_HEADER_SIZE + 12, flags & 0xFFFFFFFF)
    return bytes(changed)


def parse_out_header(message: Buffer) -> OutHeader:
    """Read a reply's header."""
    return OutHeader(*_unpack(OUT_HEADER, message, 0))


def parse_init_reply(message: Buffer) -> InitOut:
    """Read the structure of the reply to an INIT."""
    *fields, flags2 = _unpack(_INIT_OUT, message, OUT_HEADER_SIZE)
    if fields[3] & INIT_EXT:
        fields[3] |= flags2 << 32
    return InitOut(*fields)


def parse_open_reply(message: Buffer) -> OpenOut:
    """Read the structure of the reply to an OPEN."""
    return OpenOut(*_unpack(_OPEN_OUT, message, OUT_HEADER_SIZE)[:2])


def reply(unique: int, payload: Buffer = b"") -> bytes:
    """Return the reply of success."""
    return OUT_HEADER.pack(OUT_HEADER_SIZE + len(payload), 0, unique) + bytes(payload)


def error_reply(unique: int, errno: int) -> bytes:
    """Return the reply that carries ``errno`` (positive)."""
    return OUT_HEADER.pack(OUT_HEADER_SIZE, -errno, unique)


def init_reply(unique: int, out: InitOut) -> bytes:
    """Return the reply to an INIT."""
    low, high = out.flags & 0xFFFFFFFF, out.flags >> 32
    return reply(unique, _INIT_OUT.pack(*out[:3], low, *out[4:], high))


def with_unique(message: Buffer, unique: int) -> bytes:
    """Return a reply as the one to another request."""
    header = parse_out_header(message)
    return OUT_HEADER.pack(header.length, header.error, unique) + bytes(message[OUT_HEADER_SIZE:])


def open_reply(unique: int, out: OpenOut) -> bytes:
    """Return the reply to an OPEN."""
    return reply(unique, _OPEN_OUT.pack(*out, 0))


def attr_reply(unique: int, attributes: FileAttributes) -> bytes:
    """Return the reply to a GETATTR."""
    one = attributes
    valid_s, valid_ns = divmod(round(one.timeout_s * _NS), _NS)
    (atime, atime_ns), (mtime, mtime_ns), (ctime, ctime_ns) = (
        divmod(ns, _NS) for ns in (one.atime_ns, one.mtime_ns, one.ctime_ns)
    )
    return reply(
        unique,
        _ATTR_OUT.pack(
            *(valid_s, valid_ns, one.inode, one.size, one.n_sectors),
            *(atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns),
            *(one.mode, one.n_links, one.uid, one.gid, 0, one.block_size, 0),
        ),
    )


def invalidate_inode(nodeid: int, offset: int = 0, length: int = 0) -> bytes:
    """Return the notification that drops an inode's cached attributes and pages; length 0 reaches to the end."""
    payload = _INVAL_INODE_OUT.pack(nodeid, offset, length)
    return OUT_HEADER.pack(OUT_HEADER_SIZE + len(payload), Notify.INVAL_INODE, 0) + payload


def resend() -> bytes:
    """Return the notification that asks for every unanswered request again (kernel 6.9 and later)."""
    return OUT_HEADER.pack(OUT_HEADER_SIZE, Notify.RESEND, 0)
