"""The units of a disk and their arithmetic.

    sector   512 B     the address unit of QEMU's stream; the size of every image is a multiple of it
    block    4 KiB     the unit of precision inside a dirty chunk
    chunk    1 MiB     the unit of the dirty bitmap and of the bulk phase (BLK_MIG_BLOCK_SIZE in migration/block.c)

Offsets and lengths are bytes everywhere else; a chunk or block is an index. The last chunk and the last block of a
disk may be short.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from fusemig.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

SECTOR_SIZE: Final = 512
BLOCK_SIZE: Final = 4096
CHUNK_SIZE: Final = 1 << 20
BLOCKS_PER_CHUNK: Final = CHUNK_SIZE // BLOCK_SIZE
MAX_DISK_SIZE: Final = 16 << 40

FULL_MASK: Final = (1 << BLOCKS_PER_CHUNK) - 1
"""A block mask with every block of a chunk set (bit 0 is the chunk's first block)."""


def n_chunks(size: int) -> int:
    """Return how many chunks cover ``size`` bytes."""
    return -(-size // CHUNK_SIZE)


def n_blocks(size: int) -> int:
    """Return how many blocks cover ``size`` bytes."""
    return -(-size // BLOCK_SIZE)


def chunk_length(chunk: int, size: int) -> int:
    """Return the length in bytes of a chunk of a disk of ``size`` bytes; only the last one is short."""
    return min(CHUNK_SIZE, size - chunk * CHUNK_SIZE)


def chunks_of(offset: int, length: int) -> range:
    """Return the chunks that a range of bytes touches; an empty one touches none."""
    return range(offset // CHUNK_SIZE, -(-(offset + length) // CHUNK_SIZE) if length else 0)


def chunk_mask(chunk: int, size: int) -> int:
    """Return the block mask of a whole chunk: all the blocks that a disk of ``size`` bytes has in it."""
    return (1 << n_blocks(chunk_length(chunk, size))) - 1


def mask_runs(mask: int) -> Iterator[tuple[int, int]]:
    """Yield ``(first block, number of blocks)`` for each run of set bits, in ascending order."""
    base = 0
    while mask:
        skip = (mask & -mask).bit_length() - 1
        mask >>= skip
        run = (~mask & (mask + 1)).bit_length() - 1
        yield base + skip, run
        mask >>= run
        base += skip + run


def mask_extents(mask: int, chunk: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield ``(offset, length)`` in bytes for each run of blocks of a chunk's mask; the disk's end cuts the last."""
    start = chunk * CHUNK_SIZE
    for first, run in mask_runs(mask):
        offset = start + first * BLOCK_SIZE
        yield offset, min(run * BLOCK_SIZE, size - offset)


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?(?:/s)?", re.IGNORECASE)
_SIZE_FACTOR: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(us|ms|s|m|h)?", re.IGNORECASE)
_TIME_FACTOR: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_size(text: str) -> int:
    """Return the bytes (or bytes per second) meant by ``100M``, ``1G``, ``512``: binary multiples, as QEMU reads them.

    Raises:
        ConfigError: the text is not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"'{text}' is not a size: write a number with K, M, G or T, such as 100M")
    return int(float(match[1]) * _SIZE_FACTOR[match[2].upper()])


def parse_duration(text: str) -> float:
    """Return the seconds meant by ``300ms``, ``2s``, ``5m``; a bare number is milliseconds, as in QEMU.

    Raises:
        ConfigError: the text is not a time.
    """
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"'{text}' is not a time: write a number with ms or s, such as 300ms")
    return float(match[1]) * _TIME_FACTOR[(match[2] or "ms").lower()]


def format_size(n_bytes: float) -> str:
    """Return ``n_bytes`` for people: ``1.5 GiB``."""
    value = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
