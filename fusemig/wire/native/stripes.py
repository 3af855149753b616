"""Stripes: one sequence of bytes cut in pieces that travel over several connections, and put together again.

The native wire is a sequence of bytes whose order is what its proofs rest on. So streams do not share out frames or
chunks, which would need an order of their own: the sequence itself is cut, as GridFTP's extended block mode (GFD.20)
and Multipath TCP's data sequence mapping (RFC 8684, 3.3) do, and every piece says where it belongs:

    offset size
      0     4   mark 0xF5ED0057
      4     4   length of the piece, 1 to `STRIPE_BYTES`
      8     8   position of its first byte in the sequence
     16     8   check: xxh3_64 of bytes 0-15
     24         the piece

Numbers are big-endian. The pieces on one connection ascend, and each byte of the sequence is in one piece, so the piece
that is due is either the next on some connection or has not come yet: whoever puts them together reads headers ahead,
one on each connection, and no piece before its turn. It needs no buffer, whatever the peer sends.
"""

from __future__ import annotations

import struct
from typing import Final

from xxhash import xxh3_64_intdigest

from fusemig.errors import RemoteProtocolError

STRIPE_BYTES: Final = 64 << 10
"""Longest piece: no longer than the smallest usual TCP window, or the connections would have to take turns."""
MAX_STREAMS: Final = 16
_MARK: Final = 0xF5ED0057
_HEAD: Final = struct.Struct(">IIQ")
_CHECK: Final = struct.Struct(">Q")
STRIPE_HEAD_SIZE: Final = _HEAD.size + _CHECK.size


def encode_stripe(position: int, length: int) -> bytes:
    """Return what goes before ``length`` bytes that begin at ``position``."""
    head = _HEAD.pack(_MARK, length, position)
    return head + _CHECK.pack(xxh3_64_intdigest(head))


class StripeOrder:
    """Whose turn it is among streams that carry the pieces of one sequence; pure."""

    def __init__(self, n_streams: int) -> None:
        """Begin with the first byte of the sequence; nothing is known of any stream."""
        self.due = 0
        """Position of the next byte."""
        self.turn: int | None = None
        """The stream that has it, once that is known."""
        self._pieces: list[tuple[int, int] | None] = [None] * n_streams
        """Of each stream the position and length of what is left of the piece that is next on it, if it is known."""

    @property
    def left(self) -> int:
        """How many bytes may be read from the stream whose turn it is."""
        piece = None if self.turn is None else self._pieces[self.turn]
        return 0 if piece is None else piece[1]

    def unknown(self) -> list[int]:
        """Return the streams whose next header was not read."""
        return [at for at, piece in enumerate(self._pieces) if piece is None]

    def note_head(self, stream: int, head: bytes) -> None:
        """Take note of the next header on a stream.

        Raises:
            RemoteProtocolError: it is none, or its piece fits nowhere.
        """
        mark, length, position = _HEAD.unpack_from(head)
        (check,) = _CHECK.unpack_from(head, _HEAD.size)
        if mark != _MARK or xxh3_64_intdigest(head[: _HEAD.size]) != check:
            raise RemoteProtocolError(f"stream {stream} is out of step: no piece begins there")
        if not 1 <= length <= STRIPE_BYTES:
            raise RemoteProtocolError(f"a piece of {length} bytes on stream {stream}; 1 to {STRIPE_BYTES} are allowed")
        if position < self.due:
            raise RemoteProtocolError(f"stream {stream} has bytes from {position} on, which came before")
        self._pieces[stream] = position, length
        if position == self.due:
            if self.turn is not None:
                raise RemoteProtocolError(f"streams {self.turn} and {stream} both have the bytes from {position} on")
            self.turn = stream
        elif None not in self._pieces and self.turn is None:
            raise RemoteProtocolError(f"no stream has the bytes from {self.due} on")

    def advance(self, n_bytes: int) -> None:
        """Take note of bytes that were read from the stream whose turn it is.

        Raises:
            RemoteProtocolError: as `note_head`; seen when it can be.
        """
        turn = self.turn
        piece = None if turn is None else self._pieces[turn]
        assert turn is not None
        assert piece is not None
        assert n_bytes <= piece[1], "bytes of the next header"
        self.due += n_bytes
        if n_bytes < piece[1]:
            self._pieces[turn] = self.due, piece[1] - n_bytes
            return
        self._pieces[turn] = self.turn = None
        for at, other in enumerate(self._pieces):
            if other is None:
                continue
            if other[0] < self.due:
                raise RemoteProtocolError(f"stream {at} has bytes from {other[0]} on, which came before")
            if other[0] == self.due:
                if self.turn is not None:
                    raise RemoteProtocolError(f"streams {self.turn} and {at} both have the bytes from {self.due} on")
                self.turn = at
