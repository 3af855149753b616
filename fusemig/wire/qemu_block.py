"""The records of QEMU's live block migration (`migration/block.c`, 2009 to 9.0), byte for byte.

A `block` section of a migration stream is a row of records. Each starts with 64 bits, big-endian, that hold a sector
number shifted left by 9 and flags in the low bits:

    flags                        what follows
    DEVICE_BLOCK                 length of the device's name (1 byte), the name, 1 MiB of data from that sector on
    DEVICE_BLOCK + ZERO_BLOCK    length of the name, the name: the chunk at that sector reads as zeros
    PROGRESS                     nothing: the number above the flags is a percentage, not a sector
    EOS                          nothing: the section ends

Data is always 1 MiB long, also where the disk ends earlier; what lies beyond its end means nothing (zeros from us,
memory that was never set from QEMU) and is dropped here. **QEMU itself does not drop it**: `block_load` of QEMU 7.2
writes the whole MiB, which fails with EIO on a disk that is not a multiple of 1 MiB, its own stream included. The
receiver takes any sector as a start, though, so `Tail.OVERLAPPING` sends the last MiB of the disk instead.

Nothing is acknowledged, and a record cannot be told from another that was damaged. Whatever the bytes, the decoder
raises only `RemoteProtocolError`; it holds no memory but its header, the data is read into the caller's chunks.
"""

from __future__ import annotations

import struct
from enum import Enum, auto
from typing import TYPE_CHECKING, Final, NamedTuple

from fusemig.core.units import BLOCKS_PER_CHUNK, CHUNK_SIZE, SECTOR_SIZE, format_size, mask_runs, n_chunks
from fusemig.errors import ConfigError, LocalProtocolError, RemoteProtocolError
from fusemig.wire.base import StepDecoder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SECTION: Final = "block"
VERSION: Final = 1

DEVICE_BLOCK: Final = 0x01
EOS: Final = 0x02
PROGRESS: Final = 0x04
ZERO_BLOCK: Final = 0x08

_SECTOR_SHIFT: Final = 9
_FLAGS_MASK: Final = (1 << _SECTOR_SHIFT) - 1
_HEAD: Final = struct.Struct(">Q")
MAX_NAME: Final = 255
"""Longest name of a device, in bytes: its length is one byte."""

_PADDING: Final = memoryview(bytes(CHUNK_SIZE))
END_OF_SECTION: Final = _HEAD.pack(EOS)


class Device(NamedTuple):
    """A disk that the stream may carry, by the name that both sides use (QEMU's `-drive id=`)."""

    name: str
    size: int
    has_base: bool = False
    """Whether a source may leave out what the receiver's base has (`migrate -i`, shared base)."""


class BlockData(NamedTuple):
    """Bytes of a device from ``offset`` on; the view is cut where the device ends."""

    device: int
    offset: int
    payload: memoryview


class BlockZero(NamedTuple):
    """A range of a device that reads as zeros."""

    device: int
    offset: int
    length: int


class BlockProgress(NamedTuple):
    """How far the source's bulk phase is, in percent; 100 ends the whole migration of disks."""

    percent: int


class BlockEos(NamedTuple):
    """The section ends here."""


Event = BlockData | BlockZero | BlockProgress | BlockEos


class Tail(Enum):
    """How the last chunk of a disk is sent when it is short."""

    PADDED = auto()  # from its first sector, padded with zeros: what block.c writes, and what fusemig reads
    OVERLAPPING = auto()  # the last MiB of the disk, from an uneven sector: the only form that a real QEMU loads


class Encoder:
    """Gives the buffers of records to send, in order and without copying the data.

    A chunk with `Tail.OVERLAPPING` repeats bytes of the chunk before it, so the two must be *read* in the order in
    which they are sent; the simplest way to be sure is to send it after the disk was frozen.
    """

    def __init__(self, devices: Sequence[Device], *, tail: Tail = Tail.PADDED) -> None:
        """Prepare to send ``devices``, which the methods know by their index.

        Raises:
            ConfigError: a device cannot be sent in this form at all.
        """
        self._sizes = [device.size for device in devices]
        self._names = [_encode_name(device.name) for device in devices]
        self._tail = tail
        self._total = sum(self._sizes)
        self._percent = -1
        for device in devices:
            if tail is Tail.OVERLAPPING and device.size < CHUNK_SIZE:
                raise ConfigError(
                    f"disk '{device.name}' is smaller than 1 MiB, which QEMU's block migration cannot load: enlarge it"
                )

    def span(self, device: int, chunk: int) -> tuple[int, int]:
        """Return the offset and length in bytes of what a record for a chunk carries: read this, give it to `data`."""
        start = chunk * CHUNK_SIZE
        length = min(CHUNK_SIZE, self._sizes[device] - start)
        if length < CHUNK_SIZE and self._tail is Tail.OVERLAPPING:
            return self._sizes[device] - CHUNK_SIZE, CHUNK_SIZE
        return start, length

    def data(self, device: int, offset: int, payload: bytes | bytearray | memoryview) -> list[bytes | memoryview]:
        """Return the buffers of a record with the bytes of a `span`."""
        length = len(payload)
        if not length or length != min(CHUNK_SIZE, self._sizes[device] - offset):
            raise LocalProtocolError(f"{length} bytes at {offset}: a record carries 1 MiB or what is left of the disk")
        buffers: list[bytes | memoryview] = [self._head(device, offset, DEVICE_BLOCK), memoryview(payload)]
        if length < CHUNK_SIZE:
            buffers.append(_PADDING[length:])
        return buffers

    def zero(self, device: int, chunk: int) -> bytes:
        """Return the record that makes a chunk read as zeros; a short last one needs no padding and no overlap."""
        return self._head(device, chunk * CHUNK_SIZE, DEVICE_BLOCK | ZERO_BLOCK)

    def progress(self, completed_bytes: int) -> bytes:
        """Return the record to send when so much of all disks together has been read in bulk, if any is due."""
        percent = completed_bytes * 100 // self._total if self._total else 100
        if percent == self._percent:
            return b""
        self._percent = percent
        return _HEAD.pack(percent << _SECTOR_SHIFT | PROGRESS)

    def end(self) -> bytes:
        """Return the last records of the last section: everything is sent; others end with `END_OF_SECTION`."""
        return _HEAD.pack(100 << _SECTOR_SHIFT | PROGRESS) + END_OF_SECTION

    def _head(self, device: int, offset: int, flags: int) -> bytes:
        if offset % SECTOR_SIZE or not 0 <= offset < self._sizes[device]:
            raise LocalProtocolError(f"offset {offset} is not a sector of a disk of {self._sizes[device]} bytes")
        return _HEAD.pack(offset // SECTOR_SIZE << _SECTOR_SHIFT | flags) + self._names[device]


def _encode_name(name: str) -> bytes:
    encoded = name.encode()
    if not 0 < len(encoded) <= MAX_NAME or b"\0" in encoded:
        raise ConfigError(f"'{name}' cannot be the name of a disk in QEMU's stream: 1 to {MAX_NAME} bytes are possible")
    return bytes([len(encoded)]) + encoded


class Decoder(StepDecoder[Event]):
    """Turns the contents of `block` sections into events; a container tells it where each one begins."""

    def __init__(self, devices: Sequence[Device]) -> None:
        """Accept records of ``devices``, which the events name by their index, and of no others."""
        super().__init__(MAX_NAME)
        self._devices = list(devices)
        self._by_name = {device.name.encode(): index for index, device in enumerate(devices)}
        self._flags = 0
        self._sector = 0
        self._device = 0
        self.is_in_section = False
        self._read(_HEAD.size, self._on_head)

    @property
    def is_between_records(self) -> bool:
        """Whether the stream may end here without cutting a record."""
        return self._filled == 0 and self._step == self._on_head and not self.needs_buffer

    def begin(self, version: int) -> None:
        """A section begins.

        Raises:
            RemoteProtocolError: its version is not ours.
        """
        if version != VERSION:
            raise RemoteProtocolError(f"unsupported version {version} of the '{SECTION}' section; {VERSION} is known")
        self.is_in_section = True

    def close(self) -> None:
        """The stream has ended.

        Raises:
            RemoteProtocolError: it has cut a record.
        """
        if not self.is_between_records:
            raise RemoteProtocolError("the stream ends in the middle of a block record: the source has gone")

    def _on_head(self) -> Event | None:
        (head,) = _HEAD.unpack_from(self._scratch)
        self._flags = head & _FLAGS_MASK
        self._sector = head >> _SECTOR_SHIFT
        if self._flags in (DEVICE_BLOCK, DEVICE_BLOCK | ZERO_BLOCK):
            self._read(1, self._on_name_length)
            return None
        self._read(_HEAD.size, self._on_head)
        if self._flags == PROGRESS:
            if self._sector > 100:
                raise RemoteProtocolError(f"block migration progress of {self._sector} %")
            return BlockProgress(self._sector)
        if self._flags != EOS:
            raise RemoteProtocolError(f"unknown block migration flags: {self._flags:#x}")
        if self._sector:
            raise RemoteProtocolError(f"the end of a block section with a sector number {self._sector}")
        self.is_in_section = False
        return BlockEos()

    def _on_name_length(self) -> Event | None:
        length = self._scratch[0]
        if not length:
            # QEMU sends the name of the drive's backend, which is empty for a disk made with -blockdev alone.
            raise RemoteProtocolError("a block device without a name: give every disk in QEMU an id (-drive id=NAME)")
        self._read(length, self._on_name)
        return None

    def _on_name(self) -> Event | None:
        name = bytes(self._buffer)
        device = self._by_name.get(name)
        if device is None:
            known = ", ".join(f"'{device.name}'" for device in self._devices[:8])
            more = ", ..." if len(self._devices) > 8 else ""
            raise RemoteProtocolError(
                f"unknown block device '{name.decode(errors='backslashreplace')}'; expected: {known}{more}"
            )
        self._device = device
        n_sectors = self._devices[device].size // SECTOR_SIZE
        if self._sector >= n_sectors:
            raise RemoteProtocolError(
                f"sector {self._sector} is beyond the end of block device '{self._devices[device].name}',"
                f" which has {n_sectors}"
            )
        if self._flags & ZERO_BLOCK:
            self._read(_HEAD.size, self._on_head)
            return BlockZero(device, self._sector * SECTOR_SIZE, self._length())
        self._read_payload(self._on_payload)
        return None

    def _on_payload(self) -> Event:
        payload = self._buffer[: self._length()]
        self._read(_HEAD.size, self._on_head)
        return BlockData(self._device, self._sector * SECTOR_SIZE, payload)

    def _length(self) -> int:
        """What of the record's MiB lies on the device."""
        return min(CHUNK_SIZE, self._devices[self._device].size - self._sector * SECTOR_SIZE)


EARLY_FINISH_COMMIT: Final = "b5280437a7f4"
"""The commit in qemu.git that lets QEMU 7.2 to 9.0 report success before its bulk phase is over."""
_MAX_RANGES: Final = 6
_BYTES_PER_WORD: Final = BLOCKS_PER_CHUNK // 8


class BlockCompleteness:
    """Whether everything has come: the stream says nothing of it, and QEMU may report success without.

    QEMU's bulk phase is a cursor that nothing waits for since commit b5280437a7f4: if little is queued compared with
    bandwidth x downtime-limit, the migration completes with the rest of the disk unsent. Two signs show it:

    - a chunk that never came. It decides for disks that come as wholes, as they do without `inc`;
    - the last progress before the final 100, which lies below what a whole bulk phase reaches (`bulk_percent`). It is
      all there is for disks of which the source leaves out what they share with a base.

    Feed it every event; ask it when the last section has ended. One bit per chunk.
    """

    def __init__(self, devices: Sequence[Device]) -> None:
        """Expect all of ``devices``; of those with a base, what is not shared with it."""
        self._devices = list(devices)
        self._received = [bytearray(-(-n_chunks(device.size) // 8)) for device in devices]
        self.last_percent: int | None = None
        """The progress before the latest one: what the bulk phase had reached when the final 100 came."""
        self._percent: int | None = None

    @property
    def is_final(self) -> bool:
        """Whether the latest progress was 100, as in the END section; the bulk phase of `inc` may end so too."""
        return self._percent == 100

    @property
    def bulk_percent(self) -> int:
        """The progress that a whole bulk phase reports at least.

        It counts a device as a whole when it skips the last chunk, which the base has, and up to the beginning of that
        chunk when it sends it.
        """
        total = sum(device.size for device in self._devices)
        done = 0
        for device, received in zip(self._devices, self._received, strict=True):
            last = n_chunks(device.size) - 1
            done += last * CHUNK_SIZE if received[last >> 3] >> (last & 7) & 1 else device.size
        return done * 100 // total if total else 0

    def observe(self, event: object) -> None:
        """Take note of an event of the decoder's; others do not matter."""
        match event:
            case BlockData():
                self._mark(event.device, event.offset, len(event.payload))
            case BlockZero():
                self._mark(event.device, event.offset, event.length)
            case BlockProgress():
                self.last_percent, self._percent = self._percent, event.percent

    def _mark(self, device: int, offset: int, length: int) -> None:
        """Mark the chunks that lie in a range as a whole; the disk's end counts as a chunk's."""
        first = -(-offset // CHUNK_SIZE)
        end = offset + length
        stop = n_chunks(end) if end == self._devices[device].size else end // CHUNK_SIZE
        received = self._received[device]
        for chunk in range(first, stop):
            received[chunk >> 3] |= 1 << (chunk & 7)

    def missing(self) -> Iterator[tuple[str, int, int]]:
        """Yield name, offset and length in bytes of each range that never came, device by device, in order."""
        for device, received in zip(self._devices, self._received, strict=True):
            for first, count in _clear_runs(received, n_chunks(device.size)):
                offset = first * CHUNK_SIZE
                yield device.name, offset, min(count * CHUNK_SIZE, device.size - offset)

    def problem(self) -> str | None:
        """Return why the disks must not be used, naming what is missing, or None if all is well."""
        if not self.is_final:
            return "the source has not said that its disks are complete: it stopped or was cancelled"
        progress = f"its last progress was {'none' if self.last_percent is None else f'{self.last_percent} %'}"
        reason = (
            f"This is how QEMU 7.2 to 9.0 loses data (qemu commit {EARLY_FINISH_COMMIT}):"
            " set its downtime-limit to 1 ms and its max-bandwidth to 500 MiB/s or less, not 0, and migrate again"
        )
        has_base = {device.name for device in self._devices if device.has_base}
        ranges: list[str] = []
        n_missing = total = 0
        is_shared = False
        for name, offset, length in self.missing():
            if name in has_base:
                is_shared = True
                continue
            n_missing += 1
            total += length
            if n_missing <= _MAX_RANGES:
                ranges.append(f"'{name}' {offset}-{offset + length - 1}")
        is_read = self.last_percent is not None and self.last_percent >= self.bulk_percent
        if n_missing:
            if is_read:
                reason += (
                    ". Or it was to leave out what a base has (`inc`): then give the disk here its base"
                    " (--disk NAME=PATH,base=BASE)"
                )
            more = f" and {n_missing - _MAX_RANGES} more ranges" if n_missing > _MAX_RANGES else ""
            return (
                f"the source reported success with {format_size(total)} never sent: bytes {', '.join(ranges)}{more};"
                f" {progress}. {reason}"
            )
        if is_shared and not is_read:
            return f"the source finished before it had read its disks: {progress}, not {self.bulk_percent} %. {reason}"
        return None


def _clear_runs(bits: bytearray, n_bits: int) -> Iterator[tuple[int, int]]:
    """Yield first and count of each run of clear bits; long stretches of set ones cost next to nothing."""
    start = count = 0
    for at in range(0, len(bits), _BYTES_PER_WORD):
        base = at * 8
        width = min(_BYTES_PER_WORD * 8, n_bits - base)
        clear = ((1 << width) - 1) & ~int.from_bytes(bits[at : at + _BYTES_PER_WORD], "little")
        for first, run in mask_runs(clear):
            if count and start + count == base + first:
                count += run
                continue
            if count:
                yield start, count
            start, count = base + first, run
    if count:
        yield start, count
