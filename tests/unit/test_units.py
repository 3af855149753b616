"""Units: arithmetic at every edge, sizes and times as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusemig.core import units
from fusemig.core.units import BLOCK_SIZE, BLOCKS_PER_CHUNK, CHUNK_SIZE, FULL_MASK
from fusemig.errors import ConfigError

ODD = 5 * CHUNK_SIZE + 1536

masks = st.integers(0, FULL_MASK)
sizes = st.integers(1, 40).flatmap(lambda n: st.integers(1, n * CHUNK_SIZE // 512)).map(lambda sectors: sectors * 512)


@pytest.mark.parametrize(
    ("size", "chunks", "blocks"),
    [
        (512, 1, 1),
        (BLOCK_SIZE, 1, 1),
        (BLOCK_SIZE + 512, 1, 2),
        (CHUNK_SIZE, 1, BLOCKS_PER_CHUNK),
        (CHUNK_SIZE + 512, 2, BLOCKS_PER_CHUNK + 1),
        (ODD, 6, 5 * BLOCKS_PER_CHUNK + 1),
        (units.MAX_DISK_SIZE, 1 << 24, 1 << 32),
    ],
)
def test_chunks_and_blocks_cover_a_disk(size: int, chunks: int, blocks: int) -> None:
    """Both counts round up."""
    assert units.n_chunks(size) == chunks
    assert units.n_blocks(size) == blocks


@given(sizes)
def test_chunk_lengths_add_up(size: int) -> None:
    """The chunks are the disk, and only the last one is short."""
    lengths = [units.chunk_length(chunk, size) for chunk in range(units.n_chunks(size))]
    assert sum(lengths) == size
    assert set(lengths[:-1]) <= {CHUNK_SIZE}
    assert 0 < lengths[-1] <= CHUNK_SIZE


@given(sizes, st.data())
def test_chunks_of_is_what_a_range_touches(size: int, data: st.DataObject) -> None:
    """The first and the last byte lie in the first and the last chunk; no byte, no chunk."""
    offset = data.draw(st.integers(0, size))
    length = data.draw(st.integers(0, size - offset))
    touched = units.chunks_of(offset, length)
    if length:
        assert touched == range(offset // CHUNK_SIZE, (offset + length - 1) // CHUNK_SIZE + 1)
    else:
        assert not touched


def test_the_mask_of_a_short_chunk_is_short() -> None:
    """A chunk's mask has the blocks that the disk has, the last of which may be short."""
    assert units.chunk_mask(0, ODD) == FULL_MASK
    assert units.chunk_mask(5, ODD) == 1
    assert units.chunk_mask(5, ODD - 1536 + BLOCK_SIZE + 512) == 0b11


@given(masks)
def test_mask_runs_rebuild_the_mask(mask: int) -> None:
    """Runs ascend, do not touch each other, and together are the mask."""
    rebuilt, end = 0, -1
    for first, run in units.mask_runs(mask):
        assert first > end
        assert run > 0
        rebuilt |= ((1 << run) - 1) << first
        end = first + run
    assert rebuilt == mask


@given(sizes, st.data())
def test_mask_extents_are_the_bytes_of_the_blocks(size: int, data: st.DataObject) -> None:
    """Every extent is inside the disk, and the bytes are those of the mask's blocks, cut at the disk's end."""
    chunk = data.draw(st.integers(0, units.n_chunks(size) - 1))
    mask = data.draw(masks) & units.chunk_mask(chunk, size)
    covered = {
        (at - chunk * CHUNK_SIZE) // BLOCK_SIZE
        for offset, length in units.mask_extents(mask, chunk, size)
        for at in range(offset, offset + length, BLOCK_SIZE)
    }
    assert covered == {block for block in range(BLOCKS_PER_CHUNK) if mask >> block & 1}
    for offset, length in units.mask_extents(mask, chunk, size):
        assert offset % BLOCK_SIZE == 0
        assert length > 0
        assert offset + length <= size
        assert length % BLOCK_SIZE == 0 or offset + length == size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512", 512),
        ("100M", 100 << 20),
        ("1G", 1 << 30),
        ("1g", 1 << 30),
        ("1.5K", 1536),
        (" 2 MiB ", 2 << 20),
        ("10MB/s", 10 << 20),
        ("16T", 16 << 40),
        ("0", 0),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    """Sizes are binary multiples, as QEMU reads them."""
    assert units.parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "M", "-1", "1X", "1e3", "1 2", "0x10", "1P", "nan", "inf", "١x"])
def test_what_is_no_size(text: str) -> None:
    """Anything else is refused with what to write instead."""
    with pytest.raises(ConfigError, match="is not a size: write a number with K, M, G or T, such as 100M"):
        units.parse_size(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("300ms", 0.3), ("300", 0.3), ("2s", 2.0), ("1.5 s", 1.5), ("5m", 300.0), ("1H", 3600.0), ("20us", 20e-6)],
)
def test_times(text: str, expected: float) -> None:
    """A bare number is milliseconds, as in QEMU."""
    assert units.parse_duration(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "s", "-1s", "1d", "1:30", "soon"])
def test_what_is_no_time(text: str) -> None:
    """Anything else is refused with what to write instead."""
    with pytest.raises(ConfigError, match="is not a time: write a number with ms or s, such as 300ms"):
        units.parse_duration(text)


@pytest.mark.parametrize(
    ("n_bytes", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (3 << 30, "3.0 GiB"),
        (16 << 40, "16.0 TiB"),
        (5000 << 40, "5000.0 TiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_sizes_for_people(n_bytes: int, expected: str) -> None:
    """One decimal and a binary unit."""
    assert units.format_size(n_bytes) == expected
