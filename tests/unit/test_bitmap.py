"""ChunkBitmap against a set of integers, and at the size where only its speed tricks are at work."""

from __future__ import annotations

import itertools
import mmap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fusemig.core.bitmap import ChunkBitmap

LARGE = 16 << 20  # the chunks of a 16 TiB disk


class BitmapMachine(RuleBasedStateMachine):
    """Every operation does what it does to a set."""

    def __init__(self) -> None:
        super().__init__()
        self.n_bits = 1
        self.bitmap = ChunkBitmap(1)
        self.model: set[int] = set()

    @initialize(n_bits=st.integers(1, 100) | st.integers(1, 70_000))
    def make(self, n_bits: int) -> None:
        self.n_bits = n_bits
        self.bitmap = ChunkBitmap(n_bits)

    @rule(data=st.data())
    def set(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, self.n_bits - 1))
        assert self.bitmap.set(index) == (index not in self.model)
        self.model.add(index)

    @rule(data=st.data())
    def clear(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, self.n_bits - 1))
        assert self.bitmap.clear(index) == (index in self.model)
        self.model.discard(index)

    @rule(data=st.data(), ones=st.booleans())
    def fill(self, data: st.DataObject, ones: bool) -> None:
        first = data.draw(st.integers(0, self.n_bits))
        stop = data.draw(st.integers(0, self.n_bits))
        if ones:
            self.bitmap.set_range(first, stop)
            self.model |= set(range(first, stop))
        else:
            self.bitmap.clear_range(first, stop)
            self.model -= set(range(first, stop))

    @rule(data=st.data())
    def search(self, data: st.DataObject) -> None:
        start = data.draw(st.integers(0, self.n_bits + 10))
        assert self.bitmap.next_set(start) == min((i for i in self.model if i >= start), default=None)
        clear = next((i for i in range(start, self.n_bits) if i not in self.model), None)
        assert self.bitmap.next_clear(start) == clear

    @rule()
    def list_runs(self) -> None:
        runs = list(self.bitmap.runs())
        assert {i for first, stop in runs for i in range(first, stop)} == self.model
        assert all(stop < first for (_, stop), (first, _) in itertools.pairwise(runs))

    @invariant()
    def counts(self) -> None:
        assert self.bitmap.count == len(self.model)


TestBitmap = BitmapMachine.TestCase
TestBitmap.settings = settings(max_examples=60, stateful_step_count=30, derandomize=True)


@given(st.sets(st.integers(0, 999)))
def test_a_buffer_is_the_map(bits: set[int]) -> None:
    """The documented layout: bit i & 7, lowest first, of byte i >> 3; a map laid over it finds bits and count."""
    buffer = bytearray(125)
    for index in bits:
        buffer[index >> 3] |= 1 << (index & 7)
    bitmap = ChunkBitmap(1000, buffer)
    assert bitmap.count == len(bits)
    assert [index for index in range(1000) if bitmap[index]] == sorted(bits)
    bitmap.set_range(0, 1000)
    assert buffer == b"\xff" * 125


def test_a_mapped_file_serves_as_buffer() -> None:
    """The persistent form of the map is a mapping, which may be longer than the map."""
    with mmap.mmap(-1, 4096) as mapping:
        bitmap = ChunkBitmap(1000, mapping)
        bitmap.set_range(3, 900)
        assert bitmap.next_clear(3) == 900
        assert ChunkBitmap(1000, mapping).count == 897


def test_a_short_buffer_is_refused() -> None:
    """A map never runs over the end of its buffer."""
    with pytest.raises(ValueError, match="1001 bits need 126 bytes, not 125"):
        ChunkBitmap(1001, bytearray(125))


def test_bits_beyond_the_end_do_not_exist() -> None:
    """The padding of a damaged file's last byte is neither counted nor found."""
    bitmap = ChunkBitmap(4, bytearray(b"\xf0"))
    assert bitmap.count == 0
    assert bitmap.next_set() is None
    assert list(bitmap.runs()) == []


def test_the_largest_disk() -> None:
    """One bit at the end of 16 TiB is found, and a full map has no clear bit."""
    bitmap = ChunkBitmap(LARGE)
    bitmap.set(LARGE - 1)
    assert bitmap.next_set(1) == LARGE - 1
    assert list(bitmap.runs()) == [(LARGE - 1, LARGE)]
    bitmap.set_range(0, LARGE)
    assert bitmap.count == LARGE
    assert bitmap.next_clear() is None
    assert list(bitmap.runs()) == [(0, LARGE)]
    bitmap.clear_range(1, LARGE - 1)
    assert list(bitmap.runs()) == [(0, 1), (LARGE - 1, LARGE)]
