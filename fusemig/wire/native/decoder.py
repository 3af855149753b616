"""The native wire's decoder: bytes in, events out.

It never copies a payload: the caller reads from its socket straight into `Decoder.wanted`. Whatever the bytes, it
raises only `RemoteProtocolError`, and it checks lengths before it asks for memory: no more than two chunks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec
from xxhash import xxh3_64_intdigest

from fusemig.core.units import CHUNK_SIZE, MAX_DISK_SIZE, SECTOR_SIZE
from fusemig.errors import RemoteProtocolError
from fusemig.wire.base import StepDecoder
from fusemig.wire.native.frames import (
    CHECK,
    EMPTY_HASH,
    EXTENT_SIZE,
    HEADER,
    HEADER_SIZE,
    MAGIC,
    MAX_EXTENTS,
    MAX_MESSAGE,
    MAX_SEPARATORS,
    MESSAGE_DECODERS,
    MESSAGE_TYPES,
    PAIR,
    PREFACE,
    SEQUENCED,
    Ack,
    BaseFrame,
    DataFrame,
    Event,
    FrameType,
    PackedFrame,
    ZeroFrame,
)

if TYPE_CHECKING:
    from fusemig.wire.native.frames import Span

_WITH_BYTES: Final = frozenset({FrameType.DATA, FrameType.PACKED})


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
        magic, type_number, flags, disk, n_extents, sequence, offset, length, payload, zero = HEADER.unpack_from(
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
        (check,) = CHECK.unpack_from(self._scratch, HEADER.size)
        self._head = _Head(frame_type, disk, n_extents, sequence, (offset, length), payload, check)
        self._head_bytes = bytes(self._scratch[: HEADER.size])
        self._check_lengths(self._head)
        self._extents = [(offset, length)] if n_extents else []
        if n_extents > 1:
            self._expect(memoryview(bytearray((n_extents - 1) * EXTENT_SIZE)), self._on_table)
            return None
        return self._after_table()

    def _check_lengths(self, head: _Head) -> None:
        kind = head.frame_type
        if kind in SEQUENCED:
            if head.sequence != self._next_sequence:
                raise RemoteProtocolError(f"frame {head.sequence} came where {self._next_sequence} was due")
            self._next_sequence += 1
            if not 1 <= head.n_extents <= MAX_EXTENTS:
                raise RemoteProtocolError(f"{head.n_extents} extents in one frame; 1 to {MAX_EXTENTS} are allowed")
        elif head.n_extents:
            raise RemoteProtocolError(f"extents in a {kind.name} frame")
        largest = CHUNK_SIZE if kind in _WITH_BYTES else MAX_MESSAGE if kind in MESSAGE_TYPES else 0
        if head.length > largest or (kind in _WITH_BYTES and not head.length):
            raise RemoteProtocolError(f"payload of {head.length} bytes in a {kind.name} frame; at most {largest}")

    def _on_table(self) -> Event | None:
        self._head_bytes += bytes(self._buffer)
        self._extents.extend(PAIR.iter_unpack(self._buffer))
        return self._after_table()

    def _after_table(self) -> Event | None:
        head = self._head
        assert head is not None
        if self._extents:
            self._check_extents(head)
        if not head.length:
            self._buffer = self._scratch[:0]
            return self._on_payload()
        if head.frame_type in _WITH_BYTES:
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
        if head.frame_type is FrameType.PACKED and not head.length < total <= CHUNK_SIZE:
            raise RemoteProtocolError(f"extents of {total} bytes with {head.length} compressed bytes")

    def _on_payload(self) -> Event:
        head, payload = self._head, self._buffer
        assert head is not None
        self._head = None
        self._read(HEADER_SIZE, self._on_header)
        if head.frame_type is FrameType.DATA:
            return DataFrame(head.disk, head.sequence, self._extents, payload, self._head_bytes, head.check)
        if head.frame_type is FrameType.PACKED:
            length = sum(length for _, length in self._extents)
            return PackedFrame(head.disk, head.sequence, self._extents, payload, self._head_bytes, head.check, length)
        payload_hash = xxh3_64_intdigest(payload) if payload else EMPTY_HASH
        if xxh3_64_intdigest(self._head_bytes, seed=payload_hash) != head.check:
            raise RemoteProtocolError(f"checksum of a {head.frame_type.name} frame does not match")
        if head.frame_type is FrameType.ZERO:
            return ZeroFrame(head.disk, head.sequence, self._extents)
        if head.frame_type is FrameType.BASE:
            return BaseFrame(head.disk, head.sequence, self._extents)
        if head.frame_type is FrameType.ACK:
            return Ack(head.sequence)
        if bytes(payload).count(b",") > MAX_SEPARATORS:
            raise RemoteProtocolError(f"{head.frame_type.name} message with more than {MAX_SEPARATORS} separators")
        try:
            return MESSAGE_DECODERS[head.frame_type].decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise RemoteProtocolError(f"malformed {head.frame_type.name} message: {exc}") from exc
