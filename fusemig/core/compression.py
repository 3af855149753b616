"""Compression of what crosses the native wire: Zstandard, chunk by chunk, and when it is worth its time.

A frame's bytes are compressed by the worker thread that read them (Zstandard releases the interpreter), never on the
event loop; what does not get smaller by a sixteenth goes as it is. `PackingRule` decides whether to try at all:

    data     of the last chunks nearly nothing was saved        rest for 64 chunks, then 128, ... up to 1024
    link     the sender waited for it                           compress: that is what it is for
    CPU      the sender hardly waited, and compresses           try for a while without; go on with what was faster
             the sender hardly waited, and does not             nothing to gain

Each change is kept for a while, and a trial that did not pay is put off twice as long the next time, so that the two do
not alternate. Whoever unpacks holds no more than what the frame says, and a window of a chunk, whatever he is sent.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from fusemig.errors import ConfigError, RemoteProtocolError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    Buffer = bytes | bytearray | memoryview

DEFAULT_LEVEL: Final = 1
LEVELS: Final = range(1, 20)
"""Those whose frames need no more memory than a chunk at either end."""
_WINDOW_LOG: Final = 20
"""A chunk, 1 MiB: no larger window is of use, and none is unpacked."""

_WORTH: Final = 15 / 16
"""A frame goes compressed if that leaves no more than this of it."""
_DULL_CHUNKS: Final = 16
"""So many frames in a row that do not get smaller make a rest."""
_FIRST_REST: Final = 64
_LONGEST_REST: Final = 1024

PERIOD_S: Final = 0.2
"""How long a way of sending is watched before it is judged."""
_WAITS: Final = 0.2
"""A sender that waits for this share of its time, or more, is limited by the link."""
_FASTER: Final = 1.1
"""What is tried must be this much faster to be stayed with."""
_FIRST_TRIAL_S: Final = 4.0
_LONGEST_TRIAL_S: Final = 120.0


def parse_compression(text: str) -> int:
    """Return the level that ``zstd`` or ``zstd:LEVEL`` means.

    Raises:
        ConfigError: it is something else.
    """
    name, separator, level = text.partition(":")
    if name == "zstd" and not separator:
        return DEFAULT_LEVEL
    if name == "zstd" and level.isascii() and level.isdecimal() and int(level) in LEVELS:
        return int(level)
    raise ConfigError(f"compression '{text}' is not known: write zstd or zstd:LEVEL, with a level of 1 to {LEVELS[-1]}")


def unpack(packed: Buffer, length: int) -> bytes:
    """Return the ``length`` bytes that a frame's payload was made of.

    Raises:
        RemoteProtocolError: it is no frame of Zstandard, or of more or fewer bytes, or needs too much memory.
    """
    decompressor = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG})
    try:
        # One more than is right, so that a frame of more is told from one that ends.
        content = decompressor.decompress(packed, max_length=length + 1)
    except (zstd.ZstdError, EOFError) as exc:
        raise RemoteProtocolError(f"a compressed frame cannot be unpacked: {exc}") from exc
    if len(content) != length or not decompressor.eof or decompressor.unused_data:
        raise RemoteProtocolError(f"a compressed frame does not unpack to the {length} bytes of its extents")
    return content


class PackingRule:
    """Decides, from what was measured, whether frames are compressed; pure."""

    def __init__(self) -> None:
        """Start by compressing."""
        self.is_on = True
        self._n_dull = 0
        self._n_resting = 0
        self._rest = _FIRST_REST
        # What was measured in the present period:
        self._seconds = self._waited_s = 0.0
        self._bytes = 0
        # A trial of the other way, and what it has to beat, in bytes of the disk per second:
        self._to_beat: float | None = None
        self._until_trial_s = 0.0
        self._trial_pause_s = _FIRST_TRIAL_S

    def is_wanted(self) -> bool:
        """Tell whether the next frame is to be compressed."""
        if not self.is_on:
            return False
        if self._n_resting:
            self._n_resting -= 1
            return False
        return True

    def note_packed(self, *, is_worth: bool) -> None:
        """Take note of a frame that was compressed, and of whether it got smaller."""
        if is_worth:
            self._n_dull, self._rest = 0, _FIRST_REST
            return
        self._n_dull += 1
        if self._n_dull >= _DULL_CHUNKS:
            self._n_resting, self._rest = self._rest, min(2 * self._rest, _LONGEST_REST)

    def note_time(self, seconds: float, waited_s: float, disk_bytes: int) -> None:
        """Take note of what a while of sending brought.

        Args:
            seconds: how long it took, waits included.
            waited_s: how much of it the sender waited for the link, or for its own limit.
            disk_bytes: bytes of the disk that were sent.
        """
        self._seconds += seconds
        self._waited_s += waited_s
        self._bytes += disk_bytes
        self._until_trial_s -= seconds
        if self._seconds < PERIOD_S or not self._bytes:
            return
        rate, waits = self._bytes / self._seconds, self._waited_s / self._seconds >= _WAITS
        self._seconds = self._waited_s = 0.0
        self._bytes = 0
        if self._to_beat is not None:
            self._judge(rate)
        elif waits != self.is_on and self._until_trial_s <= 0:
            # Compressing and not waiting, or waiting and not compressing: the other way may be faster.
            self._to_beat = rate
            self.is_on = not self.is_on

    def _judge(self, rate: float) -> None:
        assert self._to_beat is not None
        if rate > self._to_beat * _FASTER:
            self._trial_pause_s = _FIRST_TRIAL_S
        else:
            self.is_on = not self.is_on
            self._trial_pause_s = min(2 * self._trial_pause_s, _LONGEST_TRIAL_S)
        self._to_beat = None
        self._until_trial_s = self._trial_pause_s


class Packer:
    """Compresses frames for one migration; one call at a time."""

    def __init__(self, level: int) -> None:
        """Compress at this level, where it is worth it."""
        self.level = level
        self.rule = PackingRule()
        self._compressor = zstd.ZstdCompressor(level=level)
        self.bytes_in = 0
        """Bytes that went compressed, before that."""
        self.bytes_out = 0
        """And what they became."""

    def pack(self, content: Buffer) -> bytes | None:
        """Return ``content`` compressed, or None if it goes as it is."""
        if not self.rule.is_wanted():
            return None
        packed = self._compressor.compress(content, mode=self._compressor.FLUSH_FRAME)
        is_worth = len(packed) < len(content) * _WORTH
        self.rule.note_packed(is_worth=is_worth)
        if not is_worth:
            return None
        self.bytes_in += len(content)
        self.bytes_out += len(packed)
        return packed
